"""Values as they are stored: floating as they are, fp8 (e4m3) and int8 as codes.

Codes are read and written as integers and computed here, so that every target gives the same ones, also those whose hardware
has no such fp8, and the interpreter too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# How values are stored.
FLOAT, FP8, INT8 = tl.constexpr("float"), tl.constexpr("fp8"), tl.constexpr("int8")


@triton.jit
def decode(codes, FORMAT: tl.constexpr):
    """Stored values as float32."""
    if FORMAT == FP8:
        # Exponent and mantissa moved into those of float16, whose bias is 8 larger; exact, subnormals too.
        codes = codes.to(tl.uint16)
        half = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((codes & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    else:
        return codes.to(tl.float32)


@triton.jit
def encode(x, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """float32 as stored values: rounded to nearest even and, in 8 bits, saturated."""
    if FORMAT == FP8:
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        # Rebias the exponent and round at bit 20. Below 2^-6, where codes are multiples of 2^-9, adding 2^14 rounds to
        # one and leaves it in the last bits of the mantissa.
        normal = (bits - (120 << 23) + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
        code = tl.where(size < 0.015625, subnormal, normal)
        code = tl.where(x == x, code, 0x7F)
        return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(DTYPE)
    elif FORMAT == INT8:
        # Adding and subtracting 1.5 · 2^23 rounds to an integer.
        return ((tl.minimum(tl.maximum(x, -127.0), 127.0) + 12582912.0) - 12582912.0).to(DTYPE)
    else:
        return x.to(DTYPE)


def storage(dtype: torch.dtype) -> str:
    """Name, to the kernels, of the way a tensor of `dtype` stores its values."""
    return {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(dtype, "float")


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """fp8 as the integers that the kernels read and write."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
