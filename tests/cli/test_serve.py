"""The command line that ``droidspeak serve`` gives to vLLM."""

import json
from itertools import pairwise

import pytest

from droidspeak_ops.cli import serve
from droidspeak_ops.cli.parser import make_parser


@pytest.mark.parametrize(
    ("options", "role", "extra"),
    [
        (["--capture", "--hidden-layers", "3,1"], "kv_producer", {"hidden_layers": [1, 3]}),
        (
            ["--sender", "base", "--maps", "m", "--plan", "p"],
            "kv_consumer",
            {"senders": {"sender": {"model": "base", "maps": "m"}}, "plans": {"default": "p"}},
        ),
        (["--sender", "base", "--capture"], "kv_both", {"senders": {"sender": {"model": "base"}}}),
        (
            ["--sender", "base", "--plan", "p", "--busy-plan", "2=q", "--busy-plan", "8=a=b", "--read-seconds", "0.5"],
            "kv_consumer",
            {
                "senders": {"sender": {"model": "base"}},
                "plans": {"default": "p", "from 2 waiting": "q", "from 8 waiting": "a=b"},
                "by_queue": {"2": "from 2 waiting", "8": "from 8 waiting"},
                "read_seconds": 0.5,
            },
        ),
    ],
)
def test_serve_tells_vllm_what_it_is_to_do(options: list[str], role: str, extra: dict) -> None:
    parsed = make_parser().parse_args(["serve", "tuned", "--store", "s", *options, "--vllm=--port 8001"])
    command = serve.command_of(parsed)
    told = dict(zip(command[3::2], command[4::2], strict=True))
    assert (told["--model"], told["--load-format"], told["--port"]) == ("tuned", "droidspeak", "8001")
    transfer = json.loads(told["--kv-transfer-config"])
    assert (transfer["kv_role"], transfer["kv_load_failure_policy"]) == (role, "recompute")
    assert transfer["kv_connector_extra_config"] == {"store": "s"} | extra


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --capture, --sender or both"),
        (["--capture", "--plan", "p"], "--maps, --plan, --busy-plan: expected them with --sender"),
        (["--capture", "--busy-plan", "2=p"], "--maps, --plan, --busy-plan: expected them with --sender"),
        (["--sender", "base", "--hidden-layers", "1"], "--hidden-layers: expected it with --capture"),
    ],
)
def test_serve_refuses_half_a_role(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve.command_of(make_parser().parse_args(["serve", "tuned", "--store", "s", *options]))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_serve_puts_what_a_cpu_wants_before_what_the_user_does(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    options = ["serve", "tuned", "--store", "s", "--capture", "--vllm=--block-size 64"]
    command = serve.command_of(make_parser().parse_args(options))
    sizes = [value for name, value in pairwise(command) if name == "--block-size"]
    assert sizes == (["64"] if has_gpu else ["32", "64"]), "the last one counts"
    assert ("--compilation-config" in command) != has_gpu
