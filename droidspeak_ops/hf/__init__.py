"""Partial prefill for plain transformers models. The only package here that imports transformers."""

from .cache import MixedCache, MixedLayer
from .capture import capture
from .families import UnsupportedModelError
from .prefill import partial_prefill

__all__ = ["MixedCache", "MixedLayer", "UnsupportedModelError", "capture", "partial_prefill"]
