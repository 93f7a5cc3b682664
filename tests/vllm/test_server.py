"""``droidspeak serve``: the OpenAI-compatible server, asked over HTTP, killed and started again."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import BLOCK_SIZE, ENVIRONMENT, SECONDS
from support.serving import PLANS, Pair, asking, prompt

import droidspeak_ops as ds

pytest.importorskip("vllm.config")


class Server:
    """A server in a process of its own, which is killed when it answers too late."""

    def __init__(self, arguments: list[str], scratch: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        options = f"--port {port} --dtype float32 --max-model-len 512 --block-size {BLOCK_SIZE} --enforce-eager"
        self._log = (scratch / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "droidspeak_ops.cli", "serve", *arguments, "--vllm", options],
            env=os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(scratch)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine is a process of its own, and is to be killed with it
        )
        self._await_health()

    def ask(self, ids: list[int], wish: Any, count: int = 12) -> tuple[list[int], dict[str, Any]]:
        """Return the greedy tokens of a prompt, and what the connector says of it."""
        body = {
            "prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
            "kv_transfer_params": {"droidspeak": wish},
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            found = json.load(answer)
        return found["choices"][0]["token_ids"], (found["kv_transfer_params"] or {}).get("droidspeak", {})

    def counted(self) -> dict[str, float]:
        """The connector's counters on the Prometheus endpoint."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=SECONDS) as answer:
            found = re.findall(r"^droidspeak_(\w+)_total\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def kill(self) -> None:
        os.killpg(self._process.pid, 9)
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()
        self._log.close()

    def _await_health(self) -> None:
        for _ in range(SECONDS):
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self._url}/health", timeout=5)
            except (urllib.error.URLError, OSError):
                time.sleep(1)
            else:
                return
        self._log.seek(0)
        text = self._log.read()
        self.close()
        raise RuntimeError(f"vllm serve: expected a server within {SECONDS} s, got: {text[-3000:]}")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def serving(*arguments: str) -> Server:
        servers.append(Server(list(arguments), tmp_path))
        return servers[-1]

    yield serving
    for server in servers:
        server.close()


def test_a_server_captures_and_reuses(serve: Callable[..., Server], llama: Pair, tmp_path: Path) -> None:
    """By its default plan or a request's, and what it has captured once it was killed and started again."""
    plan = tmp_path / "plan.json"
    plan.write_text(PLANS["middle"].to_json())
    arguments = (
        llama.receiver_folder, "--store", llama.store.url, "--sender", llama.sender_folder, "--plan", str(plan),
        "--capture", "--hidden-layers", "1,2,3",
    )  # fmt: skip
    server = serve(*arguments)
    ids, mine, suffix = llama.stored(128), llama.tokens(128), llama.tokens(9)
    for wish, used in (({}, "middle"), (asking(PLANS["reuse"]), "reuse")):
        found, said = server.ask(prompt(ids, suffix), wish)
        assert found == llama.expected(ids, suffix, PLANS[used])
        assert said == {"context_tokens": 128, "sender": "sender", "plan": str(PLANS[used]), "loaded": True}
    assert server.ask(prompt(ids, suffix), None) == (llama.expected(ids, suffix, None), {})
    assert server.ask(mine[0].tolist(), {"capture": True}, 1)[1] == {"capture_tokens": 128}
    assert "expected layers" in server.ask(prompt(ids, suffix), {"plan": {"bands": [[0, 7]]}})[1]["refused"]
    server.ask(prompt(ids, suffix), asking(ds.Plan(select=20)))
    counted = server.counted()
    assert counted.pop("read_seconds") > 0 and counted.pop("fill_seconds") > 0
    assert counted == {
        "contexts": 3, "context_tokens": 3 * 128, "selected_tokens": 20, "failed_contexts": 0, "refused_requests": 1,
    }  # fmt: skip
    server.kill()

    again = serve(*arguments)
    assert again.ask(prompt(ids, suffix), {})[0] == llama.expected(ids, suffix, PLANS["middle"])
    context = llama.store.load(mine, llama.captured(mine, "receiver").sender)
    assert context is not None and context.hidden_layers == (1, 2, 3)
    assert torch.equal(context.tokens, mine)
