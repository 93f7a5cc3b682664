"""RMS norm over the rows of matrices: either 1/rms of each row, or the normalised rows in the model's rounding order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .arguments import Projection
from .epilogue import weigh
from .projected_tile import of_layer
from .sizes import next_power_of_2


@triton.jit
def _row_norm_kernel(
    xs,  # for each layer [T, C]
    weights,  # for each layer [C]
    rstds,  # for each layer [T] float32
    outs,  # for each layer [T, C]
    hidden_size,
    eps,
    stride_xm,
    stride_om,
    NUM_LAYERS: tl.constexpr,
    STORE_ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_ORDER: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A row a program: more of them could share the weight, which comes from the caches anyway, and were slower.
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    x_ptr = of_layer(xs, layer, NUM_LAYERS)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < hidden_size
    b_x = tl.load(x_ptr + row * stride_xm + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / hidden_size + eps)
    if STORE_ROWS:
        b_y = b_x * rstd
        if HAS_WEIGHT:
            b_w = tl.load(of_layer(weights, layer, NUM_LAYERS) + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK_C]
            b_y = weigh(b_y, b_w, NORM_ORDER, DTYPE)
        tl.store(of_layer(outs, layer, NUM_LAYERS) + row * stride_om + o_c, b_y.to(DTYPE), mask=m_c)
    else:
        tl.store(of_layer(rstds, layer, NUM_LAYERS) + row, rstd)


def rms_rstd(x: Sequence[torch.Tensor], eps: float, out: Sequence[torch.Tensor]) -> None:
    """Launch the kernel for 1/rms alone: for each layer `x` [T, C], `out` [T] float32."""
    _launch(x, [], out, [], "llama", eps)


def row_norm(
    x: Sequence[torch.Tensor], weight: Sequence[torch.Tensor], norm_order: str, eps: float, out: Sequence[torch.Tensor]
) -> None:
    """Launch the kernel for normalised rows: for each layer `x` and `out` [T, C], `weight` [C], or none."""
    _launch(x, weight, [], out, norm_order, eps)


def normed(layers: Sequence[Projection]) -> list[Projection]:
    """Return `layers` as `project_splice` takes them, with the input norm of ``"hf"`` or the 1/rms of ``"folded"`` computed."""
    first, x = layers[0], [layer.hidden_states for layer in layers]
    if first.norm == "hf":
        rows = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in x]
        weights = [layer.norm_weight for layer in layers if layer.norm_weight is not None]
        row_norm(x, weights, first.norm_order, first.norm_eps, rows)
        return [layer._replace(hidden_states=each) for layer, each in zip(layers, rows, strict=True)]
    if first.norm == "folded" and first.rstd is None:
        rstds = [torch.empty(each.shape[0], dtype=torch.float32, device=each.device) for each in x]
        rms_rstd(x, first.norm_eps, rstds)
        return [layer._replace(rstd=each) for layer, each in zip(layers, rstds, strict=True)]
    return list(layers)


def _launch(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    rstd: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    norm_order: str,
    eps: float,
) -> None:
    num_tokens, hidden_size = x[0].shape
    if num_tokens == 0:
        return
    _row_norm_kernel[(num_tokens, len(x))](
        *(tuple(tensors) or (None,) for tensors in (x, weight, rstd, out)),
        hidden_size, eps, x[0].stride(0), out[0].stride(0) if out else 0,
        NUM_LAYERS=len(x), STORE_ROWS=bool(out), HAS_WEIGHT=bool(weight), NORM_ORDER=norm_order,
        BLOCK_C=next_power_of_2(hidden_size), num_warps=num_warps(hidden_size), enable_fp_fusion=False,
    )  # fmt: skip


def num_warps(hidden_size: int) -> int:
    """Warps for one row: 16 elements a thread, two 16-byte loads in half precision."""
    return min(max(next_power_of_2(hidden_size) // 512, 1), 16)
