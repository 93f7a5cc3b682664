"""Partial prefill for plain transformers models. The only package here that imports transformers."""

from .adapters import UnsupportedModelError
from .batch import capture_batch, partial_prefill_batch
from .cache import MixedCache
from .fitting import fit
from .profiling import profile
from .receiver import Receiver, partial_prefill
from .sender import capture
from .timing import measure_costs

__all__ = [
    "MixedCache",
    "Receiver",
    "UnsupportedModelError",
    "capture",
    "capture_batch",
    "fit",
    "measure_costs",
    "partial_prefill",
    "partial_prefill_batch",
    "profile",
]
