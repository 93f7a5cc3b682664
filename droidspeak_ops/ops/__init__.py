"""Operators on plain tensors: K/V projected and spliced in place into a KV cache, norms before, attention over it."""

from ..kernels.arguments import Projection
from .attention import attend_rows, attention_peaks
from .functions import (
    fold_norm_weight,
    kv_project,
    kv_project_layers,
    kv_splice,
    packed_slots,
    qkv_project,
    rms_rstd,
    rotation_between,
    row_norm,
)

__all__ = [
    "Projection",
    "attend_rows",
    "attention_peaks",
    "fold_norm_weight",
    "kv_project",
    "kv_project_layers",
    "kv_splice",
    "packed_slots",
    "qkv_project",
    "rms_rstd",
    "rotation_between",
    "row_norm",
]
