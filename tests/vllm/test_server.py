"""``droidspeak serve``: the OpenAI-compatible server, asked over HTTP, killed and started again."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from support.engine import BLOCK_SIZE, ENVIRONMENT
from support.serving import PLANS, Pair, asking, prompt

import droidspeak_ops as ds
from bench.serving.servers import SECONDS, Server, sharing

pytest.importorskip("vllm.config")

OPTIONS = ["--dtype", "float32", "--max-model-len", "512", "--block-size", str(BLOCK_SIZE), "--enforce-eager"]


def ask(server: Server, ids: list[int], wish: Any, count: int = 12) -> tuple[list[int], dict[str, Any]]:
    """Return the greedy tokens of a prompt, and what the connector says of it."""
    body = {
        "prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        "kv_transfer_params": {"droidspeak": wish},
    }  # fmt: skip
    found = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS).raise_for_status().json()
    return found["choices"][0]["token_ids"], (found["kv_transfer_params"] or {}).get("droidspeak", {})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def serving(model: str, *arguments: str) -> Server:
        command = partial(sharing, sys.executable, model, arguments)
        servers.append(Server(command, OPTIONS, tmp_path / f"server-{len(servers)}", ENVIRONMENT))
        servers[-1].wait()
        return servers[-1]

    yield serving
    for server in servers:
        server.kill()


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
        found, said = ask(server, prompt(ids, suffix), wish)
        assert found == llama.expected(ids, suffix, PLANS[used])
        assert said == {"context_tokens": 128, "sender": "sender", "plan": str(PLANS[used]), "loaded": True}
    assert ask(server, prompt(ids, suffix), None) == (llama.expected(ids, suffix, None), {})
    assert ask(server, mine[0].tolist(), {"capture": True}, 1)[1] == {"capture_tokens": 128}
    assert "expected layers" in ask(server, prompt(ids, suffix), {"plan": {"bands": [[0, 7]]}})[1]["refused"]
    ask(server, prompt(ids, suffix), asking(ds.Plan(select=20)))
    counted = server.counted()
    assert counted.pop("read_seconds") > 0 and counted.pop("fill_seconds") > 0
    assert counted == {
        "contexts": 3, "context_tokens": 3 * 128, "selected_tokens": 20, "failed_contexts": 0, "refused_requests": 1,
    }  # fmt: skip
    server.kill()

    again = serve(*arguments)
    assert ask(again, prompt(ids, suffix), {})[0] == llama.expected(ids, suffix, PLANS["middle"])
    context = llama.store.load(mine, llama.captured(mine, "receiver").sender)
    assert context is not None and context.hidden_layers == (1, 2, 3)
    assert torch.equal(context.tokens, mine)
