"""Counters of the connector, for vLLM's log and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "contexts": "Contexts that have filled pages of a request.",
    "context_tokens": "Tokens of prompts whose pages contexts have filled.",
    "selected_tokens": "Tokens of contexts that were selected and recomputed.",
    "failed_contexts": "Contexts that could not be read, so that requests ran as they were.",
    "refused_requests": "Requests that asked for what could not be done, and ran as they were.",
    "read_seconds": "Time of reading contexts.",
    "fill_seconds": "Time of filling pages, with bands and selected tokens.",
}
"""By name; on the endpoint ``droidspeak_NAME_total``."""


class Counts(KVConnectorStats):
    """Counters since they were last taken."""

    def add(self, name: str, value: float) -> None:
        """Count more of something."""
        self.data[name] = self.data.get(name, 0) + value

    def take(self) -> Counts | None:
        """Return what was counted, and begin anew; None where nothing was."""
        taken = Counts(self.data)
        self.reset()
        return taken if taken.data else None

    def reset(self) -> None:
        self.data = dict[str, float]()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class PromCounters(KVConnectorPromMetrics):
    """The same, on the Prometheus endpoint."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], engines: dict[int, list[Any]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, engines)
        counter = metric_types[Counter]
        made = {name: counter(f"droidspeak_{name}", about, labelnames) for name, about in COUNTERS.items()}
        self._counters = {
            engine: {name: each.labels(*labels) for name, each in made.items()} for engine, labels in engines.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._counters[engine_idx][name].inc(value)
