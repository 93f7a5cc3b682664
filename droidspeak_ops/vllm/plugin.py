"""The entry point ``vllm.general_plugins``, which vLLM calls in each of its processes: it makes names known."""

from __future__ import annotations

CONNECTOR = "DroidSpeakConnector"
"""The name of the connector, as ``kv_connector`` has it."""
LOAD_FORMAT = "droidspeak"
"""The load format that keeps hold of the model, which connectors do not see."""


def register() -> None:
    """Make the connector and the load format known to vLLM. vLLM may call this several times in one process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    from .loader import Loader

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "droidspeak_ops.vllm.connector", CONNECTOR)
    if LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(LOAD_FORMAT)(Loader)
