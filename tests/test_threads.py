"""Threads that share models: a short form of bench/threads.py, and the moments that it meets rarely."""

import subprocess
import sys
import threading
from collections import OrderedDict

import pytest
import torch
from support.models import tiny_llama, tokens

import droidspeak_ops as ds
from bench import threads
from bench.threads import KINDS, LONGROPE, Outcome
from droidspeak_ops.hf.decoder import Decoder

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def test_every_result_is_as_alone() -> None:
    outcomes = threads.run(KINDS["plain"], threads=3, calls=15, rounds=1, seed=0)
    assert [outcome for outcome in outcomes if outcome.wrong is not None] == []
    (total,) = (row for row in threads.rows_of("plain", outcomes) if row["function"] == "all")
    assert total["calls"] > 3 * 15, "one thread does nothing but generate"


def test_a_wrong_result_and_an_error_are_counted() -> None:
    def fail() -> str:
        raise KeyError("layer")

    jobs = {"right": [lambda: "a"], "wrong": [lambda: "b"], "error": [fail], "generate": [lambda: "c"]}
    expected = {(function, 0): frozenset(["a", "c"]) for function in jobs}
    outcomes = threads.run_round(jobs, expected, [[("right", 0), ("wrong", 0)], [("error", 0)]])
    found = {row["function"]: (row["wrong"], row["first"]) for row in threads.rows_of("none", outcomes)}
    assert found["right"] == found[threads.BESIDE] == (0, "")
    assert found["wrong"] == (1, "another result") and found["error"] == (1, "KeyError: 'layer'")
    assert found["all"][0] == 2
    assert Outcome("right", None) in outcomes


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=lambda rope: rope["rope_type"])
def test_a_pass_leaves_the_models_frequencies_alone(rope: dict) -> None:
    """Another thread may be between the choice of frequencies for its length and their use."""
    model = tiny_llama(head_dim=16, layers=2, max_position_embeddings=30, rope_parameters=rope)
    rotary, lengths = model.model.rotary_emb, (36, 10)
    expected = [ds.capture(model, tokens(length)).rotations[0] for length in lengths]
    for length, other in (lengths, lengths[::-1]):
        with torch.no_grad():
            model(tokens(other))
        before = rotary.inv_freq
        context = ds.capture(model, tokens(length))
        ds.partial_prefill(model, context, ds.Plan([(0, 2)]))
        assert rotary.inv_freq is before
        cos, sin = expected[lengths.index(length)]
        assert torch.equal(context.rotations[0][0], cos) and torch.equal(context.rotations[0][1], sin)


# Needs `remove_duplicate=False` where hf/decoder.py takes the digest of the frequencies: after a pass over a short prompt two
# of the buffers are one tensor.
def test_a_pass_leaves_the_models_identity_alone() -> None:
    model = tiny_llama(head_dim=16, layers=2, rope_parameters=LONGROPE)
    before = Decoder(model).fingerprint(weights=True)
    with torch.no_grad():
        model(tokens(10))
    assert Decoder(model).fingerprint(weights=True) == before


class _Pausing(OrderedDict):
    """A dict in which somebody else's step comes before every change."""

    def __init__(self, step) -> None:
        super().__init__()
        self.step = step

    def __setitem__(self, key, value) -> None:
        self.step()
        super().__setitem__(key, value)


def test_a_step_of_another_thread_while_the_first_cache_of_a_model_is_filled() -> None:
    """torch adds a hook first, and then what it takes."""
    model = tiny_llama(head_dim=16, layers=2)
    context, errors = ds.capture(model, tokens(20)), []

    def step() -> None:
        try:
            with torch.no_grad():
                model(tokens(4))
        except TypeError as error:
            errors.append(error)

    def beside() -> None:
        other = threading.Thread(target=step)
        other.start()
        other.join()

    model.model._forward_pre_hooks_with_kwargs = paused = _Pausing(beside)
    ds.partial_prefill(model, context, ds.Plan())
    assert errors == [] and len(paused) == 1


FIRST_USES = """
import sys, threading
import droidspeak_ops as ds
sys.setswitchinterval(1e-6)
names = sorted(set(ds.__all__) - {"__version__"})
begin = threading.Barrier(len(names))
errors = []
def use(name):
    begin.wait()
    try:
        getattr(ds, name)
    except ImportError as error:
        errors.append(f"{name}: {error}")
threads = [threading.Thread(target=use, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit("; ".join(errors) or 0)
"""


def test_threads_may_use_the_package_first_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
