"""Partial prefill for plain transformers models. The only package here that imports transformers."""

from .cache import MixedCache, MixedLayer
from .families import UnsupportedModelError
from .receiver import partial_prefill
from .sender import capture

__all__ = ["MixedCache", "MixedLayer", "UnsupportedModelError", "capture", "partial_prefill"]
