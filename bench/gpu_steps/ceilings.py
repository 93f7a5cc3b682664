"""Ceilings of the GPU: the step `ceilings` of ``python -m bench.gpu``."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from bench.gpu_steps.step import Step
from bench.gpu_steps.times import Replay, host_microseconds, median


@triton.jit
def _empty_kernel(x_ptr):
    pass


@triton.jit
def _read_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Read all of x in each program, past L1, from a place of its own."""
    pid = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        total += tl.load(x_ptr + (start + pid * BLOCK) % size + o, cache_modifier=".cg")
    tl.store(out_ptr + pid * BLOCK + o, total)


def ceilings(step: Step) -> None:
    """Measure rates that no kernel beats on this GPU, and what a launch costs."""
    device, size = step.device, 128 if step.dry else 8192
    with step.guarded("matmul"):
        a, b = (torch.randn(size, size, dtype=step.dtype, device=device) for _ in range(2))
        ms = median(partial(torch.mm, a, b, out=torch.empty_like(a)), rounds=20, warm_up=10)
        step.add("matmul", size=size, ms=ms, tflops=2 * size**3 / ms / 1e9)
    with step.guarded("copy"):
        source = torch.empty(2**16 if step.dry else 4 * 10**9, dtype=torch.uint8, device=device).fill_(7)
        ms = median(partial(torch.empty_like(source).copy_, source), rounds=20, warm_up=3)
        step.add("copy", bytes=2 * source.nbytes, ms=ms, tb_per_s=2 * source.nbytes / ms / 1e9)
    if step.dry:
        step.add("l2 read", not_run="needs a GPU")
        step.add("launch", not_run="needs a GPU")
        return
    with step.guarded("l2 read"):
        x = torch.randn(4 * 2**20, device=device)
        programs = 4 * torch.cuda.get_device_properties(0).multi_processor_count
        out = torch.empty(programs * 4096, device=device)
        ms = median(lambda: _read_kernel[(programs,)](x, out, x.numel(), BLOCK=4096, num_warps=8), rounds=10, warm_up=3)
        step.add("l2 read", bytes=programs * x.nbytes, ms=ms, tb_per_s=programs * x.nbytes / ms / 1e9)
    with step.guarded("launch"):
        x = torch.zeros(1, device=device)

        def launch() -> None:
            _empty_kernel[(1,)](x)

        in_graph = Replay.of([launch], launches=200).median() * 1e3
        torch_us = host_microseconds(lambda: x.add_(1), calls=500)
        step.add("launch", triton_host_us=host_microseconds(launch, 500), torch_host_us=torch_us, in_graph_us=in_graph)
