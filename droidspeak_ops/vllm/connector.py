"""The connector: what vLLM calls in its scheduler and in its workers, handed to the half that is there."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.distributed.parallel_state import get_tp_group

from .capture import Capture
from .counters import Counts, PromCounters
from .messages import Work
from .scheduler import Scheduling
from .settings import Settings
from .worker import Filling


class DroidSpeakConnector(KVConnectorBase_V1):
    """DroidSpeak in vLLM: ``kv_producer`` captures contexts for a store, ``kv_consumer`` reuses them, ``kv_both`` does both.

    Args:
        vllm_config, role, kv_cache_config: as vLLM gives them.

    Raises:
        ValueError, OSError: the engine is configured in a way that is not supported, or the connector's settings are wrong.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_supported(vllm_config)
        settings = Settings.of(self._kv_transfer_config)
        block_size = vllm_config.cache_config.block_size
        self._captures, self._reuses = self._kv_transfer_config.is_kv_producer, self._kv_transfer_config.is_kv_consumer
        self._counts: Counts | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduling = Scheduling(vllm_config, settings, block_size)
            self._counts = self._scheduling.counts
            return
        self._capture = Capture(vllm_config, settings) if self._captures else None
        self._filling = Filling(vllm_config, settings, block_size) if self._reuses else None
        if self._filling is not None and get_tp_group().is_first_rank:
            self._counts = self._filling.counts

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a context that is not captured is one that is not reused

    def get_kv_connector_stats(self) -> Counts | None:
        return None if self._counts is None else self._counts.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Counts:
        return Counts(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PromCounters:
        return PromCounters(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # In the scheduler.

    def on_new_request(self, request: Any) -> None:
        self._scheduling.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduling.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduling.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._scheduling.work(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduling.stepped(connector_output.invalid_block_ids)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduling.finished(request)

    # In a worker.

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._capture is not None and isinstance(connector_metadata, Work):
            self._capture.begin(connector_metadata.chunks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        work = self._get_connector_metadata()
        if self._filling is not None and isinstance(work, Work) and work.load is not None:
            self._filling.fill(work.load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Pages are filled before the step runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """K and V are kept where they are written."""

    def wait_for_save(self) -> None:
        if self._capture is not None:
            self._capture.end()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._capture is not None:
            self._capture.forget(finished_req_ids)
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._filling is None else self._filling.take_invalid()


def check_supported(config: VllmConfig) -> None:
    """Raise unless all of an engine's configuration is supported.

    Raises:
        ValueError: something is not; the message names it as vLLM does.
    """
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    tensor_parallel = parallel.tensor_parallel_size
    expected = {
        "quantization": (config.model_config.quantization, None),
        "kv_cache_dtype": (config.cache_config.cache_dtype, "auto"),
        "speculative_config": (config.speculative_config, None),
        "lora_config": (config.lora_config, None),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, 1),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, 1),
        "revision": (config.model_config.revision, None),
        "model runner V2 (VLLM_USE_V2_MODEL_RUNNER)": (bool(config.use_v2_model_runner), False),
    }
    if transfer.is_kv_consumer:
        expected["kv_load_failure_policy"] = transfer.kv_load_failure_policy, "recompute"
    if transfer.is_kv_producer:
        expected["tensor_parallel_size (where contexts are captured)"] = tensor_parallel, 1
    for name, (found, needed) in expected.items():
        if found != needed:
            raise ValueError(f"{name}: expected {needed!r}, got {found!r}")
