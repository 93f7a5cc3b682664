"""Reuse of a KV cache across fine-tuned models: Triton kernels for partial-layer prefill and everything around them.

>>> plan = ds.Plan(bands=[(10, 20)], project="rest")
>>> context = ds.capture(sender, input_ids, layers=plan.hidden_layers(num_layers))
>>> cache = ds.partial_prefill(receiver, context, plan)
>>> receiver.generate(prompt_ids, past_key_values=cache)
"""

from typing import TYPE_CHECKING, Any

from . import metrics, ops
from ._version import __version__
from .context import SharedContext
from .cost import CostModel
from .example import Example
from .fingerprint import Fingerprint, ReuseError
from .frontier import Frontier
from .maps import Maps
from .plan import Plan

if TYPE_CHECKING:
    from .hf import (
        MixedCache,
        Receiver,
        UnsupportedModelError,
        capture,
        capture_batch,
        fit,
        measure_costs,
        partial_prefill,
        partial_prefill_batch,
        profile,
    )

__all__ = [
    "CostModel",
    "Example",
    "Fingerprint",
    "Frontier",
    "Maps",
    "MixedCache",
    "Plan",
    "Receiver",
    "ReuseError",
    "SharedContext",
    "UnsupportedModelError",
    "__version__",
    "capture",
    "capture_batch",
    "fit",
    "measure_costs",
    "metrics",
    "ops",
    "partial_prefill",
    "partial_prefill_batch",
    "profile",
]


def __getattr__(name: str) -> Any:
    # Only what is not imported above comes here. transformers takes seconds to import, and the operators do not need it.
    if name in __all__:
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
