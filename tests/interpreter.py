"""Make Triton's interpreter compute with bfloat16, which it stores as integers.

As of Triton 3.9 it truncates where hardware rounds to nearest even, and `tl.dot` multiplies the bit patterns. Kernels cast
to float32 before any other arithmetic, so these two operations are all that stands between them and exact bfloat16.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def correct_bfloat16() -> None:
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(src.data).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), target)
        if (source, target) == (tl.bfloat16, tl.float32):
            return TensorHandle(_widen(src), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(_widen(operand), tl.float32) for operand in (a, b))
        return dot(self, a, b, d, *options)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


def _widen(handle: TensorHandle) -> np.ndarray:
    return torch.tensor(handle.data).view(torch.bfloat16).float().numpy()
