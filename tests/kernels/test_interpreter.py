"""The corrections to Triton's interpreter, against torch."""

import pytest
import torch
import triton
import triton.language as tl
from support.compare import assert_close

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@triton.jit
def _cast_and_multiply_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x_ptr + offsets).to(tl.bfloat16)
    tl.store(y_ptr + offsets, b_x)
    tl.store(z_ptr + offsets, tl.dot(b_x, b_x))


def test_bfloat16() -> None:
    x = torch.randn(32, 32)
    y, z = torch.empty(32, 32, dtype=torch.bfloat16), torch.empty(32, 32)
    _cast_and_multiply_kernel[(1,)](x, y, z, 32)
    assert torch.equal(y, x.bfloat16())
    assert_close(z, x.bfloat16().float() @ x.bfloat16().float())
