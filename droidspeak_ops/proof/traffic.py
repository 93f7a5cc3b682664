"""Bytes that kernels and sequences of torch operations read and write, counted rather than estimated.

:func:`of_kernels` counts every load and store that Triton's interpreter carries out: what the programs ask of the memory
system, before any cache. :func:`of_torch` counts, for each torch operation, its inputs read once and its output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Traffic:
    """Bytes read and written; of the reads, those by matrix products."""

    loaded: int = 0
    stored: int = 0
    loaded_by_products: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


def of_kernels(run: Callable[[], Any]) -> Traffic:
    """Count what the kernels launched by `run` load and store; Triton must be imported with ``TRITON_INTERPRET=1``."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        loaded = load(self, pointers, mask, *rest, **named)
        read = np.asarray(mask.data)  # a buffer for a descriptor in Triton 3.6
        traffic.loaded += int(read.sum()) * loaded.data.itemsize
        return loaded

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    counted: dict[str, Any] = {"create_masked_load": counted_load, "create_masked_store": counted_store}
    with mock.patch.multiple(InterpreterBuilder, **counted):
        run()
    return traffic


def of_torch(run: Callable[[], Any]) -> Traffic:
    """Count what the torch operations that `run` calls read and write; views move nothing."""
    counter = _Counter()
    with torch.no_grad(), counter:
        run()
    return counter.traffic


def minimum(read: Iterable[torch.Tensor | None], written: Iterable[torch.Tensor | None]) -> int:
    """Bytes if each input is read once and each output written once."""
    return sum(tensor.nbytes for tensors in (read, written) for tensor in tensors if tensor is not None)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name = function._schema.name
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        views = all(output.untyped_storage().data_ptr() in memory for output in outputs)
        if (views and not function._schema.is_mutable) or name.startswith(("aten::empty", "aten::new_empty")):
            return result
        if name == "aten::copy_":
            inputs = inputs[1:]  # its target is written and not read
        loaded = sum(tensor.nbytes for tensor in inputs)
        self.traffic.loaded += loaded
        if name in ("aten::mm", "aten::addmm"):
            self.traffic.loaded_by_products += loaded
        self.traffic.stored += sum(tensor.nbytes for tensor in outputs)
        return result
