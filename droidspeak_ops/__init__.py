"""Reuse of a KV cache across fine-tuned models: Triton kernels for partial-layer prefill and everything around them.

>>> plan = ds.Plan(bands=[(10, 20)], project="rest")
>>> context = ds.capture(sender, input_ids, layers=plan.hidden_layers(num_layers))
>>> cache = ds.partial_prefill(receiver, context, plan)
>>> receiver.generate(prompt_ids, past_key_values=cache)
"""

import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import metrics, ops
    from .context.context import SharedContext
    from .context.fingerprint import Fingerprint, ReuseError
    from .context.store import ContextStore
    from .example import Example
    from .fitting.run import fit
    from .hf.adapters import UnsupportedModelError
    from .hf.batch import capture_batch, partial_prefill_batch
    from .hf.cache import MixedCache
    from .hf.gate import Gate
    from .hf.reading import invalidate
    from .hf.receiver import Receiver, partial_prefill
    from .hf.sender import capture
    from .prefill.maps import Maps
    from .prefill.plan import Plan
    from .profiling.cost import CostModel
    from .profiling.frontier import Frontier
    from .profiling.run import profile
    from .profiling.timing import measure_costs
    from .trace import Trace

# Imported when first asked for: torch and transformers take seconds, and the operators need neither a model nor transformers.
_MODULES = {
    "ContextStore": "context.store",
    "CostModel": "profiling.cost",
    "Example": "example",
    "Fingerprint": "context.fingerprint",
    "Frontier": "profiling.frontier",
    "Gate": "hf.gate",
    "Maps": "prefill.maps",
    "MixedCache": "hf.cache",
    "Plan": "prefill.plan",
    "Receiver": "hf.receiver",
    "ReuseError": "context.fingerprint",
    "SharedContext": "context.context",
    "Trace": "trace",
    "UnsupportedModelError": "hf.adapters",
    "capture": "hf.sender",
    "capture_batch": "hf.batch",
    "fit": "fitting.run",
    "invalidate": "hf.reading",
    "measure_costs": "profiling.timing",
    "partial_prefill": "hf.receiver",
    "partial_prefill_batch": "hf.batch",
    "profile": "profiling.run",
}

__all__ = [
    "ContextStore",
    "CostModel",
    "Example",
    "Fingerprint",
    "Frontier",
    "Gate",
    "Maps",
    "MixedCache",
    "Plan",
    "Receiver",
    "ReuseError",
    "SharedContext",
    "Trace",
    "UnsupportedModelError",
    "__version__",
    "capture",
    "capture_batch",
    "fit",
    "invalidate",
    "measure_costs",
    "metrics",
    "ops",
    "partial_prefill",
    "partial_prefill_batch",
    "profile",
]


_importing = threading.RLock()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        with _importing:  # transformers cannot be imported by several threads at once
            value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    elif name in __all__:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # looked up once
    return value
