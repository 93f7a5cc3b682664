"""Functions that the kernels share: rounding to the model's dtype, a norm's weight, the rotated pairs of a head's columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round float32 to the model's dtype and back: what storing an intermediate result does."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def weigh(x, weight, NORM_ORDER: tl.constexpr, DTYPE: tl.constexpr):
    """Multiply normalised float32 values by the norm's weight and round where the model's family rounds.

    "llama" rounds before it multiplies, "olmo" only after, and "gemma" multiplies by 1 + weight and then rounds.
    """
    if NORM_ORDER == "llama":
        x = round_to(x, DTYPE)
    if NORM_ORDER == "gemma":
        weight = 1.0 + weight
    return round_to(x * weight, DTYPE)


@triton.jit
def rotate(x1, x2, cos, sin, ROTARY_DTYPE: tl.constexpr, DTYPE: tl.constexpr):
    """Rotate pairs by an angle, rounding each product and each sum as separate operations would.

    They are in the dtype of cos and sin (float32 in OLMo 2, whatever the model's), the result in that of the model.
    """
    y1 = round_to(x1 * cos, ROTARY_DTYPE) - round_to(x2 * sin, ROTARY_DTYPE)
    y2 = round_to(x2 * cos, ROTARY_DTYPE) + round_to(x1 * sin, ROTARY_DTYPE)
    return round_to(round_to(y1, ROTARY_DTYPE), DTYPE), round_to(round_to(y2, ROTARY_DTYPE), DTYPE)


@triton.jit
def pair_columns(o_pair, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """The two columns of each pair of a head. Rotated pairs are (i, i + ROTARY_DIM/2), and what RoPE passes through is
    paired in halves behind them."""
    o_col1 = o_pair
    o_col2 = o_pair + HEAD_DIM // 2
    # Only partial RoPE pays for the `where`: it hides from the compiler that the columns are contiguous.
    PARTIAL: tl.constexpr = ROTARY_DIM > 0 and ROTARY_DIM < HEAD_DIM
    if PARTIAL:
        HALF: tl.constexpr = ROTARY_DIM // 2
        o_col1 = tl.where(o_pair < HALF, o_pair, o_pair + HALF)
        o_col2 = tl.where(o_pair < HALF, o_pair + HALF, o_pair + HEAD_DIM // 2)
    return o_col1, o_col2
