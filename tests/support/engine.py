"""A vLLM engine in a process of its own, which is ended when it answers too late: an engine that hangs must not hang tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 240  # until an engine has started, or has answered
BLOCK_SIZE = 32
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions go to the ranks
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Output(NamedTuple):
    """The greedy tokens of a request, and what the connector says of it."""

    tokens: list[int]
    said: dict[str, Any]


class Engine:
    """An engine of a model, which keeps its compiled code in a folder of its own.

    Args:
        model: folder of the model.
        scratch: for what vLLM writes.
        transfer: of ``KVTransferConfig``; None for plain vLLM.
        options: others of ``LLM``.
    """

    def __init__(self, model: str, scratch: Path, transfer: dict[str, Any] | None, **options: Any) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = model, str(scratch), transfer, options, theirs
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        theirs.close()
        self._await()

    def generate(self, requests: Sequence[tuple[list[int], Any]], count: int = 12, **sampling: Any) -> list[Output]:
        """Run requests together: of each the prompt, and what it asks of the connector (None for a null, ... for nothing)."""
        return self.call(_generate, list(requests), count, sampling)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of a module with the engine, and what else it is given, in the engine's process."""
        self._ours.send((function, arguments))
        return self._await()

    def close(self) -> None:
        """End the engine."""
        if self._process.is_alive():
            self._ours.send(None)
            self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _await(self) -> Any:
        try:
            if not self._ours.poll(SECONDS):
                raise TimeoutError(f"vLLM: expected an answer within {SECONDS} s, got none")
            answer = self._ours.recv()
        except (EOFError, TimeoutError):
            self._process.kill()
            raise
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(model: str, scratch: str, transfer: dict[str, Any] | None, options: dict[str, Any], pipe: Any) -> None:
    for name in list(os.environ):
        if name.startswith("TRITON_"):  # which the tests set for kernels
            del os.environ[name]
    os.environ |= ENVIRONMENT | {"VLLM_CACHE_ROOT": scratch, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if "tensor_parallel_size" in options:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # there may be fewer NUMA nodes than ranks
    from vllm import LLM
    from vllm.config import KVTransferConfig

    if transfer is not None:
        options = {
            "kv_transfer_config": KVTransferConfig(kv_connector="DroidSpeakConnector", **transfer),
            "load_format": "droidspeak",
        } | options
    defaults = {"dtype": "float32", "max_model_len": 512, "block_size": BLOCK_SIZE, "enforce_eager": True}
    try:
        engine = LLM(model, **defaults | options)
    except BaseException as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        pipe.send(function(engine, *arguments))


def _generate(
    engine: Any, requests: Sequence[tuple[list[int], Any]], count: int, sampling: dict[str, Any]
) -> list[Output]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    parameters = [
        SamplingParams(
            temperature=0.0, max_tokens=count, ignore_eos=True,
            extra_args={} if wish is ... else {"kv_transfer_params": {"droidspeak": wish}}, **sampling,
        )
        for _, wish in requests
    ]  # fmt: skip
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    return [
        Output(list(each.outputs[0].token_ids), (each.kv_transfer_params or {}).get("droidspeak", {}))
        for each in outputs
    ]
