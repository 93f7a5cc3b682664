"""The bench of serving, without a server of vLLM: its load, what is made of times, and how servers are started and ended."""

import asyncio
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
from support.models import tiny_pair

from bench import pairs
from bench.common import Row, read_csv
from bench.pairs import PAIRS
from bench.serving import load, plots, run, servers
from droidspeak_ops.cli.parser import make_parser

# --- load -------------------------------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of the mean and the standard deviation of the exponential distribution."""
    due = load.arrivals(4.0, 20_000, seed=0)
    gaps = [after - before for before, after in zip([0.0, *due], due, strict=False)]
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 4, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.03)


def test_arrivals_of_a_seed_are_the_same_but_for_the_pace() -> None:
    due = load.arrivals(1.0, 50, seed=3)
    assert load.arrivals(1.0, 50, seed=3) == due != load.arrivals(1.0, 50, seed=4)
    assert load.arrivals(4.0, 50, seed=3) == pytest.approx([seconds / 4 for seconds in due])


@pytest.mark.parametrize("name", ["lora", "full"])
def test_questions_are_of_different_contexts(name: str) -> None:
    contexts = load.draw_contexts(PAIRS[name].task, 3, 4, seed=1)
    assert contexts == load.draw_contexts(PAIRS[name].task, 3, 4, seed=1)
    assert [len(set(questions)) for questions in contexts] == [4, 4, 4]
    assert [len({each.context for each in questions}) for questions in contexts] == [1, 1, 1]
    assert len({questions[0].context for questions in contexts}) == 3
    assert all(3_900 < len(questions[0].context) < 7_500 for questions in contexts)
    assert all(each.answer in each.context for questions in contexts for each in questions) == (name == "lora")


def test_questions_of_several_contexts_are_interleaved() -> None:
    contexts = load.draw_contexts(PAIRS["lora"].task, 8, 4, seed=0)
    asked = load.interleaved(contexts, 3, seed=0)
    assert sorted(map(str, asked)) == sorted(str(each) for questions in contexts for each in questions[:3])
    numbers = [[questions[0].context for questions in contexts].index(each.context) for each in asked]
    assert numbers != sorted(numbers)
    assert all(abs(place // 3 - number) <= 3 for place, number in enumerate(numbers))


class Streaming(BaseHTTPRequestHandler):
    """Answers as vLLM does, with two tokens, but the prompt [0] with an error. As many answers as `gate` has begin together."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]]
    gate: ClassVar[threading.Barrier]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if body["prompt"] == [0]:
            self.wfile.write(b'data: {"error": "no room"}\n\n')
            return
        self.gate.wait(60)
        for text in ("one ", "two "):
            said = json.dumps({"choices": [{"text": text}]})
            self.wfile.write(f"data: {said}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Streaming.asked, Streaming.gate = [], threading.Barrier(1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Streaming) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_requests_are_sent_when_they_are_due(url: str) -> None:
    """Also before others are answered."""
    Streaming.gate = threading.Barrier(2)
    requests = [load.Request([1, 2]), load.Request([3], {"capture": True}, tokens=1)]
    answers = asyncio.run(load.play(url, requests, [0.0, 0.1]))
    assert [each.text for each in answers] == ["one two", "one two"]
    assert all(0 < each.first_token <= each.last_token for each in answers)
    plain, capturing = Streaming.asked
    assert plain == {"prompt": [1, 2], "max_tokens": load.MAX_ANSWER_TOKENS, "temperature": 0, "stream": True}
    assert (capturing["max_tokens"], capturing["kv_transfer_params"]) == (1, {"droidspeak": {"capture": True}})


def test_what_is_not_answered_is_an_error(url: str) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(load.play(url, [load.Request([0])], [0.0]))
    (error,) = raised.value.exceptions
    assert "expected tokens, got" in str(error) and "no room" in str(error)


# --- servers ----------------------------------------------------------------------------------------------------------------


def test_command_lines() -> None:
    options = ["--port", "1", "--served-model-name", "of two words"]
    plain = servers.plain("python", "model", options)
    assert plain == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "model", *options]
    shared = servers.sharing("python", "model", ["--store", "s", "--sender", "base"], options)
    assert shared[:4] == ["python", "-m", "droidspeak_ops.cli", "serve"]
    parsed = make_parser().parse_args(shared[3:])
    assert (parsed.model, parsed.store, parsed.sender, parsed.vllm) == ("model", "s", "base", options)


HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        text = b'droidspeak_contexts_total{engine="0"} 3.0\\nvllm:other_total 1.0\\n'
        self.send_response(200); self.send_header("Content-Length", str(len(text))); self.end_headers(); self.wfile.write(text)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()
"""


def test_a_server_is_ended_with_its_processes(tmp_path: Path) -> None:
    """Also where an error comes in between."""
    child = tmp_path / "child"
    with suppress(KeyError), _server(HEALTHY, tmp_path, str(child)) as server:
        server.wait(60)
        assert server.counted() == {"contexts": 3}
        os.kill(int(child.read_text()), 0)
        raise KeyError
    assert _ends(int(child.read_text()))


def test_a_server_that_ends_is_an_error(tmp_path: Path) -> None:
    server = _server("print('no such model'); raise SystemExit(1)", tmp_path)
    with pytest.raises(RuntimeError, match="(?s)expected a server within 60 s, got: .*no such model"):
        server.wait(60)


def test_a_server_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = HEALTHY.replace("http.server.HTTPServer", "import time; time.sleep(600)  # ")
    with _server(code, tmp_path, str(child)) as server, pytest.raises(RuntimeError, match="within 1 s"):
        server.wait(1)
    assert not child.exists() or _ends(int(child.read_text()))


def _server(code: str, scratch: Path, *arguments: str) -> servers.Server:
    return servers.Server(lambda options: [sys.executable, "-c", code, *arguments, *options], [], scratch, {})


def _ends(process: int) -> bool:
    """Return whether a process is soon gone, or one that nobody has waited for."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


# --- what was measured ------------------------------------------------------------------------------------------------------


def answered(way: str, rate: float, times: list[float], seed: int = 0, score: float = 0.5) -> list[Row]:
    return [
        {
            "pair": "lora", "sharing": way, "seed": seed, "questions": 1, "rate": rate, "due": f"{place}",
            "first_token_seconds": f"{seconds}", "seconds": f"{seconds + 1}", "score": score,
        }
        for place, seconds in enumerate(times)
    ]  # fmt: skip


def measured() -> list[Row]:
    """Plain vLLM takes a second, and three from two a second on; sharing a quarter of a second, and 1.5 at eight a second."""
    slow = [row for rate in (2.0, 4.0, 8.0) for row in answered("off", rate, [3.0] * 4, score=0.8)]
    quick = [row for rate in (1.0, 2.0, 4.0) for row in answered("on", rate, [0.25] * 4, score=0.76)]
    return answered("off", 1.0, [1.0] * 4, score=0.8) + slow + quick + answered("on", 8.0, [1.5] * 4, score=0.76)


def test_rates() -> None:
    rows = run.by_rate(answered("off", 1.0, [1.0, 2.0, 3.0]) + answered("off", 1.0, [4.0, 5.0], seed=1))
    assert rows == [
        {
            "pair": "lora", "questions": 1, "rate": 1.0, "sharing": "off", "p50_ms": "3000", "p95_ms": "4800",
            "answers_per_second": f"{(3 / 6 + 2 / 7) / 2:.3f}", "requests": 5,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0.5e3, (0.0, True)), (1e3, (1.0, True)), (2e3, (1.5, True)), (3e3, (8.0, False)), (9e3, (8.0, False))],
)
def test_the_knee_lies_between_rates(limit: float, expected: tuple[float, bool]) -> None:
    rates = [row for row in run.by_rate(measured()) if row["sharing"] == "off"]
    found = run.knee(rates[::-1], limit)
    assert found == (pytest.approx(expected[0]), expected[1])


def test_times_that_fall_again_do_not_move_the_knee() -> None:
    rates = [{"rate": rate, "p50_ms": time} for rate, time in ((1, 100), (2, 300), (4, 100))]
    assert run.knee(rates, 200) == (pytest.approx(1.5), True)


def test_summary_and_what_is_drawn(tmp_path: Path) -> None:
    requests = measured()
    rates = run.by_rate(requests)
    (row,) = run.summary(requests, rates)
    assert (row["off_p50_ms"], row["on_p50_ms"], row["faster"]) == ("1000", "250", "4.00")
    assert (row["off_knee"], row["on_knee"], row["knee_ratio"], row["at_least"]) == ("1.500", "8.000", "5.33", True)
    assert (row["off_most"], row["on_most"], row["most_ratio"]) == ("0.800", "0.941", "1.18")
    assert (row["off_score"], row["on_score"], row["of_off"], row["answers"]) == ("0.8", "0.76", "0.95", 16)

    plots.draw(rates, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{plots.MARKS[0]}\nold\n{plots.MARKS[1]}\nbehind")
    plots.write([row], page)
    text = page.read_text()
    assert (
        "| `lora` | 1 | 1000 ms | 250 ms | 4.00x | 1.500 | at least 8.000 | at least 5.33 | 0.800 | 0.941 | 1.18 |"
        in text
    )
    assert text.startswith("before") and text.endswith("behind") and "old" not in text


def test_a_knee_that_plain_vllm_did_not_reach_gives_no_ratio() -> None:
    requests = answered("off", 1.0, [1.0] * 4) + answered("on", 1.0, [0.25] * 4)
    (row,) = run.summary(requests, run.by_rate(requests))
    assert (row["off_knee"], row["knee_ratio"]) == ("1.000", "")


class Words:
    """A tokenizer of words, by their hash."""

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=[1 + sum(word.encode()) % 100 for word in text.split()])

    def save_pretrained(self, folder: Path) -> None:
        pass


class Asked:
    """In the place of a server: what it is told, and a URL that answers."""

    url: ClassVar[str]
    told: ClassVar[dict[str, list[str]]]
    counts: ClassVar[dict[str, float]]

    def __init__(self, command: Any, options: list[str], scratch: Path, environment: dict[str, str]) -> None:
        self.told[scratch.name] = command(options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def counted(self) -> dict[str, float]:
        return self.counts


@pytest.fixture
def stored(url: str, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """The command's servers are :class:`Asked`; as many contexts are in the store as this has."""
    found: list[None] = []
    Asked.url, Asked.told, Asked.counts = url, {}, {"contexts": 9, "failed_contexts": 0, "refused_requests": 0}
    sender, receiver = tiny_pair(6)
    monkeypatch.setattr(run, "Server", Asked)
    monkeypatch.setattr(pairs, "load_variant", lambda name: (sender if name == "base" else receiver, Words()))
    monkeypatch.setattr(run.ds.ContextStore, "stored", lambda _: found)
    monkeypatch.setattr(run, "fitted_maps", lambda pair: pairs.Fitted(Written(), 0.0, 0))  # type: ignore[arg-type]
    return found


class Written:
    """Maps as far as the command looks at them."""

    def save(self, path: Path) -> None:
        path.write_text("maps")


ARGUMENTS = "--python py --pairs lora --rates 500 1000 --requests 4 --questions 1 2 --seeds 2 --vllm=--enforce-eager"


def test_the_command(stored: list[None], tmp_path: Path) -> None:
    stored += [None] * 16
    plan = tmp_path / "plan.json"
    plan.write_text('{"bands": [[2, 4]]}')
    once, twice = run.main([*ARGUMENTS.split(), "--folder", str(tmp_path / "out"), "--plan", str(plan)])
    assert (once["questions"], twice["questions"], once["answers"]) == (1, 2, 16)
    requests, rates, summary = (read_csv(tmp_path / "out" / f"{name}.csv") for name in ("requests", "rates", "summary"))
    assert (len(requests), len(rates), len(summary)) == (2 * 2 * 2 * 2 * 4, 2 * 2 * 2, 2)
    assert all(row["setting"] and float(row["first_token_seconds"]) > 0 for row in requests)
    assert (tmp_path / "out" / "serving.png").exists()

    sender, plain, shared = (Asked.told[f"server-{name}"] for name in ("sender", "off", "on"))
    assert all("--enforce-eager" in " ".join(each) and each[0] == "py" for each in (sender, plain, shared))
    parsed = make_parser().parse_args(sender[3:])
    assert (parsed.capture, parsed.hidden_layers, parsed.sender) == (True, [2], None)
    shares = make_parser().parse_args(shared[3:])
    assert (shares.store, shares.sender, shares.capture) == (parsed.store, parsed.model, False)
    assert plain[4] == shares.model != parsed.model and "droidspeak" not in " ".join(plain)


def test_maps_go_with_contexts_of_keys_and_values_alone(stored: list[None], tmp_path: Path) -> None:
    stored += [None] * 16
    run.main([*ARGUMENTS.replace("lora", "full").split(), "--folder", str(tmp_path)])
    sender, shared = (make_parser().parse_args(Asked.told[f"server-{name}"][3:]) for name in ("sender", "on"))
    assert (sender.capture, sender.hidden_layers, sender.maps) == (True, [], None)
    assert Path(shared.maps).name == "maps.safetensors" and Path(shared.plan).name == "plan.json"


def test_both_ways_are_asked_the_same(stored: list[None], tmp_path: Path) -> None:
    stored += [None] * 16
    run.main([*ARGUMENTS.split(), "--folder", str(tmp_path)])
    prompts = [tuple(each["prompt"]) for each in Streaming.asked if "kv_transfer_params" not in each]
    loads = [sorted(prompts[start : start + 4]) for start in range(4, len(prompts), 4)]  # the first are of warming up
    assert loads[::2] == loads[1::2] and len(loads) == 2 * 2 * 2 * 2
    assert len(set(map(tuple, loads[::2]))) == 2 * 2 * 2  # each rate has contexts of its own


@pytest.mark.parametrize("counts", [{"contexts": 0}, {"failed_contexts": 1}, {"refused_requests": 1}])
def test_times_of_requests_that_reuse_nothing_are_not_written(
    counts: dict[str, float], stored: list[None], tmp_path: Path
) -> None:
    stored += [None] * 4
    Asked.counts |= counts
    with pytest.raises(RuntimeError, match="lora: expected requests that reuse contexts, got"):
        run.main([*ARGUMENTS.split(), "--seeds", "1", "--rates", "500", "--folder", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_contexts_that_were_not_captured_are_an_error(stored: list[None], tmp_path: Path) -> None:
    stored += [None] * 7
    with pytest.raises(RuntimeError, match="lora: expected 16 captured contexts, got 7"):
        run.main([*ARGUMENTS.split(), "--folder", str(tmp_path)])
