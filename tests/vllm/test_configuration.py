"""Settings of the connector, and those that it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import droidspeak_ops as ds

pytest.importorskip("vllm.config")

from droidspeak_ops.vllm import plugin
from droidspeak_ops.vllm.connector import check_supported
from droidspeak_ops.vllm.settings import Asked, Settings


def engine(**changes: Any) -> Any:
    """The configuration of an engine that is supported, but for `changes`, whose names have a double underscore for a dot."""
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    transfer = {"is_kv_consumer": True, "is_kv_producer": False, "kv_load_failure_policy": "recompute"}
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=None, revision=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
        lora_config=None,
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(**parallel),
        kv_transfer_config=SimpleNamespace(**transfer),
    )
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(config, owner) if owner else config, name, value)
    return config


def test_what_is_supported() -> None:
    check_supported(engine())
    check_supported(engine(parallel_config__tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config__quantization": "fp8"}, "quantization: expected None, got 'fp8'"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype: expected 'auto', got 'fp8'"),
        ({"speculative_config": "eagle"}, "speculative_config: expected None"),
        ({"lora_config": "some"}, "lora_config: expected None"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1, got 2"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size: expected 1, got 2"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size: expected 1, got 2"),
        ({"model_config__revision": "main"}, "revision: expected None, got 'main'"),
        ({"use_v2_model_runner": True}, "model runner V2 .*: expected False, got True"),
        (
            {"kv_transfer_config__kv_load_failure_policy": "fail"},
            "kv_load_failure_policy: expected 'recompute', got 'fail'",
        ),
        (
            {"kv_transfer_config__is_kv_producer": True, "parallel_config__tensor_parallel_size": 2},
            "tensor_parallel_size .where contexts are captured.: expected 1, got 2",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_supported(engine(**changes))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "kv_connector_extra_config: expected the field store, got none"),
        ({"store": "x", "sender": "y"}, "expected the fields store, .*, got .'sender'."),
        ({"store": "x", "senders": {"a": {"maps": "m"}}}, "expected the field model, got none at senders"),
        (
            {"store": "x", "plans": {"good": {}}, "by_queue": {"4": "cheap"}},
            "by_queue: expected a plan among .'good'., got 'cheap'",
        ),
        ({"store": "x", "plans": {"good": {}}, "by_queue": {"-1": "good"}}, "by_queue: expected 0 or more .*, got -1"),
        ({"store": "x", "by_queue": {"few": "good"}}, "expected int.* at by_queue"),
        ({"store": "x", "read_seconds": 0}, "read_seconds: expected a positive number, got 0"),
        ({"store": "x", "hidden_layers": ["1"]}, "expected int, got str at hidden_layers"),
    ],
)
def test_settings_that_are_wrong_are_named(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.of(SimpleNamespace(kv_connector_extra_config=extra))


def test_plans_are_files_or_values(tmp_path: Path) -> None:
    plan = ds.Plan(bands=[(1, 3)])
    (tmp_path / "plan.json").write_text(plan.to_json())
    settings = Settings("x", plans={"default": str(tmp_path / "plan.json"), "other": {"project": "rest"}})
    plans = settings.read_plans()
    assert plans == {"default": plan, "other": ds.Plan(project="rest")}
    assert Asked().plan_among(plans, "default") == Asked(plan="default").plan_among(plans, "other") == plan
    assert Asked().plan_among(plans, "other") == ds.Plan(project="rest") and Asked().plan_among({}, "default") is None
    assert Asked(plan={"bands": [[0, 1]]}).plan_among(plans, "default") == ds.Plan(bands=[(0, 1)])
    with pytest.raises(ValueError, match="plans: other: expected array, got int at bands"):
        Settings("x", plans={"other": {"bands": [3]}}).read_plans()


def test_a_longer_queue_has_another_default() -> None:
    plans = {"good": {"bands": [[0, 1]]}, "cheap": {}}
    extra = {"store": "x", "plans": plans, "by_queue": {"2": "good", "10": "cheap"}}
    settings = Settings.of(SimpleNamespace(kv_connector_extra_config=extra))
    expected = {0: "default", 1: "default", 2: "good", 9: "good", 10: "cheap", 99: "cheap"}
    assert {waiting: settings.default_plan(waiting) for waiting in expected} == expected


def test_the_plugin_may_be_called_again() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    for _ in range(2):
        plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name(plugin.CONNECTOR).__name__ == plugin.CONNECTOR
    assert _LOAD_FORMAT_TO_MODEL_LOADER[plugin.LOAD_FORMAT].__name__ == "Loader"
