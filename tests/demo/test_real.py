"""The real model and its real fine-tune: exactness, quality, the shipped examples, the demo as a user runs it."""

import copy
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.compare import assert_bitwise_equal
from transformers import DynamicCache

import droidspeak_ops as ds
from droidspeak_ops.demo.measure import Strategy, glossary_examples, measure
from droidspeak_ops.demo.run import load_glossary_variant
from droidspeak_ops.hf.pretrained import SMOLLM2, load_pretrained

pytestmark = pytest.mark.real

LAYERS = 30


@pytest.fixture(scope="module")
def sender():
    return load_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def receiver():
    return load_glossary_variant()


@pytest.fixture(scope="module")
def prompt(sender) -> tuple[torch.Tensor, int]:
    """Token ids of a shipped example, and how many of them are context (shortened: exactness needs no length)."""
    example = glossary_examples()[0]
    context, suffix = (sender[1](text, return_tensors="pt").input_ids for text in (example.context, example.suffix))
    return torch.cat((context[:, :300], suffix), 1), 300


def test_recomputing_everything_is_the_own_prefill(sender, receiver, prompt) -> None:
    ids, length = prompt
    own = DynamicCache(config=receiver[0].config)
    with torch.no_grad():
        receiver[0](ids[:, :length], past_key_values=own, logits_to_keep=1)
    context = ds.capture(sender[0], ids[:, :length], tokenizer=sender[1])
    cache = ds.partial_prefill(receiver[0], context, ds.Plan([(0, LAYERS)]), prompt_ids=ids, tokenizer=receiver[1])
    for ours, theirs in zip(cache.layers, own.layers, strict=True):
        assert_bitwise_equal(ours.keys, theirs.keys)
        assert_bitwise_equal(ours.values, theirs.values)
    with torch.no_grad():
        logits = [receiver[0](ids[:, length:], past_key_values=copy.deepcopy(each)).logits for each in (cache, own)]
    assert_bitwise_equal(*logits)
    text = [receiver[0].generate(ids, past_key_values=each, max_new_tokens=8, do_sample=False) for each in (cache, own)]
    assert torch.equal(*text)


def test_reuse_with_one_model_is_prefix_caching(receiver, prompt) -> None:
    model, ids, length = receiver[0], *prompt
    cache = ds.partial_prefill(model, ds.capture(model, ids[:, :length]), ds.Plan())
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False), expected)


def test_the_shipped_examples_are_held_out_questions_with_answers_in_their_contexts(sender) -> None:
    examples = glossary_examples()
    assert len(examples) >= 32
    assert len({example.context for example in examples}) == len(examples)
    for example in examples:
        assert example.answer in example.context
        assert 800 <= len(sender[1](example.context).input_ids) <= 1200


def test_the_variant_answers_and_full_reuse_is_visibly_worse(sender, receiver) -> None:
    """The task is worth it: reuse alone loses answers that full prefill gets, and a band wins quality back."""
    full, reuse, band = strategies = [Strategy(None), Strategy(ds.Plan()), Strategy(ds.Plan([(10, 25)]))]
    for _ in measure(sender[0], receiver[0], (sender[1], receiver[1]), strategies, glossary_examples()[:4]):
        pass
    assert full.mean("f1") >= 0.9
    assert reuse.mean("f1") <= full.mean("f1") - 0.15
    assert reuse.mean("nll") >= 3 * full.mean("nll")
    assert band.mean("nll") < reuse.mean("nll")
    differences = [a.nll - b.nll for a, b in zip(reuse.measured, full.measured, strict=True)]
    assert statistics.median(differences) > 0


def test_demo(tmp_path: Path) -> None:
    plot = tmp_path / "demo.png"
    command = [sys.executable, "-m", "droidspeak_ops.cli", "demo", "--examples", "1", "--plot", str(plot)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in ("full prefill", "all reused", "all projected", "reference"):
        assert re.search(name.replace(" ", r"\s+[^│]*?"), out), out


def test_a_local_path_is_loaded_as_it_is(sender, tmp_path: Path) -> None:
    sender[0].save_pretrained(tmp_path / "model")
    sender[1].save_pretrained(tmp_path / "model")
    model, tokenizer = load_pretrained(tmp_path / "model")
    assert torch.equal(model.lm_head.weight, sender[0].lm_head.weight)
    assert len(tokenizer) == len(sender[1])
