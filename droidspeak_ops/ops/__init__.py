"""The operators on plain tensors: projection to K/V and splicing in place into a KV cache, and the norms they start from."""

from ..kernels.arguments import Projection
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
