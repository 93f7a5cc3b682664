"""Make Triton's interpreter compute with bfloat16, which it stores as integers, and sum as hardware does.

As of Triton 3.9 it truncates to bfloat16 where hardware rounds to nearest even, and `tl.dot` multiplies the bit patterns.
Kernels cast to float32 before any other arithmetic, so these two are all that stands between them and exact bfloat16. And
`tl.dot` of half precision goes through BLAS, where a row's sum depends on where in the tile it lies: in float64, where
these sums are exact to far below float32, it does not.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def correct_interpreter() -> None:
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
        if a.dtype.scalar == tl.float32:
            return dot(self, a, b, d, *options)
        a, b = (_widen(operand) if operand.dtype.scalar == tl.bfloat16 else operand.data for operand in (a, b))
        product = a.astype(np.float64) @ b.astype(np.float64)
        return TensorHandle((product + d.data).astype(np.float32), tl.float32)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


def _widen(handle: TensorHandle) -> np.ndarray:
    return torch.tensor(handle.data).view(torch.bfloat16).float().numpy()
