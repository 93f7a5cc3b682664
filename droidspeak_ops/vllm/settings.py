"""Settings of the connector: by the server's configuration, and by each request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import schema
from ..context.store import ContextStore
from ..prefill.plan import Plan

REQUEST = "droidspeak"
"""The name in ``kv_transfer_params`` of what a request asks for, and in its output of what was done."""


@dataclass(frozen=True)
class Sender:
    """A sender whose contexts are reused.

    Args:
        model: folder or hub name, whose files say which contexts of the store are its own.
        maps: file of the maps from it to the receiver, or None.
    """

    model: str
    maps: str | None = None


@dataclass(frozen=True)
class Settings:
    """``kv_connector_extra_config`` of vLLM's ``KVTransferConfig``; its ``kv_role`` says who captures and who reuses.

    Args:
        store: folder or URL of the contexts.
        namespace, salt, budget: as :class:`ContextStore` has them.
        senders: whose contexts are reused, by the names that requests use; the first is the default.
        plans: as :meth:`Plan.to_json` writes them, or files of such, by the names that requests use. ``"default"`` is for
            requests that name none; without it they run as they are.
        by_queue: names of plans that take the place of ``"default"`` while requests wait, by the least number that do; the
            largest number that is reached counts (paper, appendix B).
        read_seconds: that a context may take to be found, and to be read, before its request runs as it is.
        hidden_layers: at which contexts are captured with hidden states.

    Raises:
        ValueError: `by_queue` has a negative number, or a name that is not among `plans`; `read_seconds` are not positive.
    """

    store: str
    namespace: str = ""
    salt: str = ""
    budget: int | None = None
    senders: dict[str, Sender] = field(default_factory=dict)
    plans: dict[str, Any] = field(default_factory=dict)
    by_queue: dict[int, str] = field(default_factory=dict)
    read_seconds: float = 10.0
    hidden_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.read_seconds > 0:
            raise ValueError(f"read_seconds: expected a positive number, got {self.read_seconds}")
        for waiting, name in self.by_queue.items():
            if waiting < 0:
                raise ValueError(f"by_queue: expected 0 or more requests that wait, got {waiting}")
            if name not in self.plans:
                raise ValueError(f"by_queue: expected a plan among {sorted(self.plans)}, got {name!r}")

    @classmethod
    def of(cls, kv_transfer_config: Any) -> Settings:
        """Read the connector's part of vLLM's configuration.

        Raises:
            ValueError: it is not as it should be; the message names the field.
        """
        return schema.convert(kv_transfer_config.kv_connector_extra_config, cls, "kv_connector_extra_config")

    def open_store(self) -> ContextStore:
        """Return the store of contexts."""
        return ContextStore(self.store, namespace=self.namespace, salt=self.salt, budget=self.budget)

    def read_plans(self) -> dict[str, Plan]:
        """Return the plans by name, read from their files.

        Raises:
            ValueError, OSError: one is no plan, or cannot be read.
        """
        return {
            name: Plan.from_json(Path(plan).read_bytes())
            if isinstance(plan, str)
            else schema.convert(plan, Plan, f"plans: {name}")
            for name, plan in self.plans.items()
        }

    def default_plan(self, waiting: int) -> str:
        """Return the name of the plan for requests that name none, while so many others wait."""
        reached = [least for least in self.by_queue if least <= waiting]
        return self.by_queue[max(reached)] if reached else "default"


@dataclass(frozen=True)
class Asked:
    """The wish of a request: ``kv_transfer_params={"droidspeak": {...}}``.

    Args:
        plan: a plan as :meth:`Plan.to_json` writes it, or the name of one that the server was told; None for the default.
        sender: the name of the sender; None for the default.
        prefix_tokens: the most tokens of the prompt that are reused, or captured; None for all but the last.
        capture: whether the context is kept in the store, by a server that captures.
    """

    plan: Any = None
    sender: str | None = None
    prefix_tokens: int | None = None
    capture: bool = False

    @classmethod
    def by(cls, kv_transfer_params: Mapping[str, Any] | None) -> Asked | None:
        """Read what a request asks for; None where it asks to be left as it is, by a null.

        Raises:
            ValueError: it is not as it should be; the message names the field.
        """
        asked = (kv_transfer_params or {}).get(REQUEST, {})
        if asked is None:
            return None
        found = schema.convert(asked, cls, f"kv_transfer_params: {REQUEST}")
        if found.prefix_tokens is not None and found.prefix_tokens < 1:
            raise ValueError(f"kv_transfer_params: expected prefix_tokens of 1 or more, got {found.prefix_tokens}")
        return found

    def plan_among(self, plans: Mapping[str, Plan], default: str) -> Plan | None:
        """Return the plan that is asked for, or the one of the default's name; None where there is none.

        Raises:
            ValueError: it is no plan, or not among `plans`.
        """
        if self.plan is None:
            return plans.get(default)
        if not isinstance(self.plan, str):
            return schema.convert(self.plan, Plan, f"kv_transfer_params: {REQUEST}: plan")
        if self.plan not in plans:
            raise ValueError(f"kv_transfer_params: expected a plan among {sorted(plans)}, got {self.plan!r}")
        return plans[self.plan]
