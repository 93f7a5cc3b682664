"""RMS norm over the rows of a matrix: either 1/rms of each row, or the normalised rows in the model's rounding order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _row_norm_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [C]
    rstd_ptr,  # [T] float32
    out_ptr,  # [T, C]
    hidden_size,
    eps,
    stride_xm,
    stride_om,
    STORE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < hidden_size
    b_x = tl.load(x_ptr + pid * stride_xm + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / hidden_size + eps)
    if STORE_ROWS:
        # transformers rounds the normalised row to the model's dtype before it multiplies by the weight.
        DTYPE: tl.constexpr = x_ptr.dtype.element_ty
        b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_y = (b_x * rstd).to(DTYPE).to(tl.float32) * b_w
        tl.store(out_ptr + pid * stride_om + o_c, b_y.to(out_ptr.dtype.element_ty), mask=m_c)
    else:
        tl.store(rstd_ptr + pid, rstd)


def rms_rstd(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Launch the kernel for 1/rms alone: `x` [T, C], `out` [T] float32."""
    _launch(x, None, out, None, eps)


def row_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Launch the kernel for normalised rows: `x` and `out` [T, C], `weight` [C]."""
    _launch(x, weight, None, out, eps)


def _launch(
    x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor | None, out: torch.Tensor | None, eps: float
) -> None:
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return
    block_c = triton.next_power_of_2(hidden_size)
    _row_norm_kernel[(num_tokens,)](
        x, weight, rstd, out, hidden_size, eps, x.stride(0), 0 if out is None else out.stride(0),
        STORE_ROWS=out is not None, BLOCK_C=block_c, num_warps=num_warps(hidden_size), enable_fp_fusion=False,
    )  # fmt: skip


def num_warps(hidden_size: int) -> int:
    """Warps for one row: 16 elements a thread, two 16-byte loads in half precision."""
    return min(max(triton.next_power_of_2(hidden_size) // 512, 1), 16)
