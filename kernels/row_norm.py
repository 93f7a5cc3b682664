"""RMS norm over the rows of a matrix: either 1/rms of each row, or the normalised rows in the model's rounding order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .epilogue import round_to, weigh
from .sizes import cdiv, next_power_of_2


@triton.jit
def _row_norm_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [C]
    rstd_ptr,  # [T] float32
    out_ptr,  # [T, C]
    num_tokens,
    hidden_size,
    rows_per_program,
    eps,
    stride_xm,
    stride_om,
    STORE_ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_ORDER: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < hidden_size
    if HAS_WEIGHT:
        b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    for row in range(first, tl.minimum(first + rows_per_program, num_tokens)):
        b_x = tl.load(x_ptr + row * stride_xm + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK_C]
        rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / hidden_size + eps)
        if STORE_ROWS:
            b_y = b_x * rstd
            b_y = weigh(b_y, b_w, NORM_ORDER, DTYPE) if HAS_WEIGHT else round_to(b_y, DTYPE)
            tl.store(out_ptr + row * stride_om + o_c, b_y.to(DTYPE), mask=m_c)
        else:
            tl.store(rstd_ptr + row, rstd)


def rms_rstd(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Launch the kernel for 1/rms alone: `x` [T, C], `out` [T] float32."""
    _launch(x, None, out, None, "llama", eps)


def row_norm(x: torch.Tensor, weight: torch.Tensor | None, norm_order: str, eps: float, out: torch.Tensor) -> None:
    """Launch the kernel for normalised rows: `x` and `out` [T, C], `weight` [C]."""
    _launch(x, weight, None, out, norm_order, eps)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor | None,
    out: torch.Tensor | None,
    norm_order: str,
    eps: float,
) -> None:
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return
    rows = rows_per_program(num_tokens)
    _row_norm_kernel[(cdiv(num_tokens, rows),)](
        x, weight, rstd, out, num_tokens, hidden_size, rows, eps, x.stride(0), 0 if out is None else out.stride(0),
        STORE_ROWS=out is not None, HAS_WEIGHT=weight is not None, NORM_ORDER=norm_order,
        BLOCK_C=next_power_of_2(hidden_size), num_warps=num_warps(hidden_size), enable_fp_fusion=False,
    )  # fmt: skip


def rows_per_program(num_tokens: int) -> int:
    """Rows that share one read of the weight: 16 make that read 3 % of the traffic; fewer where programs would be too few.

    A row's result does not depend on it.
    """
    return min(max(num_tokens // 256, 1), 16)


def num_warps(hidden_size: int) -> int:
    """Warps for one row: 16 elements a thread, two 16-byte loads in half precision."""
    return min(max(next_power_of_2(hidden_size) // 512, 1), 16)
