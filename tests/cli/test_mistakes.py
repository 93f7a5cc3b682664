"""The command line's mistakes, one line each, and its inputs."""

import json
import os
import re
import shlex
import sys

import pytest
import torch
from support.cli import PAIR

import droidspeak_ops as ds
from droidspeak_ops.cli import main
from droidspeak_ops.example import TextExample, read_examples, read_text
from droidspeak_ops.hf.pretrained import load_pretrained

MISTAKES = {
    # arguments
    "": "droidspeak: error: the following arguments are required: command",
    "fly": "droidspeak: error: argument command: invalid choice: 'fly'",
    "fit": "fit: error: the following arguments are required: sender, receiver, texts",
    f"fit {PAIR} --wrong": "droidspeak: error: unrecognized arguments: --wrong",
    f"fit {PAIR} --band 5": "fit: error: argument --band: expected a band's first layer and its end, such as 15:20, got 5",
    f"fit {PAIR} --band 5:5": "argument --band: bands: expected .* 0 <= start < end, got",
    f"fit {PAIR} --band=-1:3": "argument --band: bands: expected a layer index of 0 or more, got -1",
    f"fit {PAIR} --band -1:3": "argument --band: expected one argument",
    f"fit {PAIR} --band 0:99": "fit: error: plan: expected layers 0 to 3 of a model of 4, got layer 98",
    f"fit {PAIR} --tokens many": "argument --tokens: expected a whole number, got 'many'",
    f"fit {PAIR} --tokens 63": "argument --tokens: expected 64 or more, got 63",
    f"fit {PAIR} --contexts 2": "argument --contexts: expected 3 or more, got 2",
    f"fit {PAIR} --contexts some": "argument --contexts: expected a whole number, got 'some'",
    f"fit {PAIR} --seed x": "argument --seed: expected a whole number, got 'x'",
    f"profile {PAIR} --granularity 0": "profile: error: argument --granularity: expected 1 or more, got 0",
    f"profile {PAIR} --granularity 5": "profile: error: --granularity: expected 1 to 4, the number of layers, got 5",
    f"profile {PAIR} --metric taste": "argument --metric: invalid choice: 'taste'",
    "profile sender receiver text.txt --metric F1": "--metric: expected .jsonl files, which have answers .*, got plain text",
    "profile sender receiver good.jsonl text.txt --metric F1": "--metric: expected .jsonl files",
    "demo --examples 0": "demo: error: argument --examples: expected 1 or more, got 0",
    "demo --examples 99": "demo: error: examples: expected 1 to 64, the shipped ones, got 99",
    "demo --sender shallow --receiver shallow": "demo: error: shallow: expected a model of 6 layers or more, got 3",
    "compile --targets sm_1": "compile: error: argument --targets: targets: expected some of .* got",
    "serve tuned --store s --busy-plan cheap": "--busy-plan: expected a number of requests and a file, such as 8=cheap.json",
    "serve tuned --store s --busy-plan 0=cheap": "serve: error: argument --busy-plan: expected 1 or more, got 0",
    "serve tuned --store s --read-seconds 0": "argument --read-seconds: expected a positive number of seconds, got '0'",
    "serve tuned --store s --read-seconds nan": "argument --read-seconds: expected a positive number of seconds, got 'nan'",
    # outputs
    f"fit {PAIR} --out folder": "argument --out: expected a file, got folder, which is a folder",
    f"fit {PAIR} --out none/maps": "argument --out: expected a file in a folder that exists, got none/maps",
    f"fit {PAIR} --out a-file/maps": "argument --out: expected a file in a folder that exists, got a-file/maps",
    f"fit {PAIR} --out /dev/null": "argument --out: expected a file, got /dev/null, which is another thing",
    f"fit {PAIR} --out good.jsonl": "fit: error: --out: expected another file than the texts, got good.jsonl",
    f"fit {PAIR} --out {'x' * 300}": "File name too long",
    f"profile {PAIR} --out a-file": "argument --out: expected a folder, got a-file, where .*a-file is a file",
    f"profile {PAIR} --out a-file/deep/er": "argument --out: expected a folder, got a-file/deep/er, where .*a-file is a file",
    f"profile {PAIR} --out taken": "profile: error: expected a file, got taken/frontier.json, which is a folder",
    "demo --plot folder": "demo: error: argument --plot: expected a file that ends in .png, got folder",
    "demo --plot none/plot.png": "argument --plot: expected a file in a folder that exists, got none/plot.png",
    "compile --json folder": "compile: error: argument --json: expected a file, got folder, which is a folder",
    # texts
    "fit sender receiver missing.txt": "fit: error: missing.txt: No such file or directory",
    "fit sender receiver folder": "fit: error: folder: Is a directory",
    "fit sender receiver a-file/text.txt": "fit: error: a-file/text.txt: Not a directory",
    "fit sender receiver empty.txt": "empty.txt: expected text, got an empty file",
    "fit sender receiver blank.txt": "blank.txt: expected text, got an empty file",
    "fit sender receiver latin.txt": "latin.txt: expected UTF-8, got the byte 0xe9 at 3",
    "fit sender receiver short.txt": "texts: expected at least 3 contexts from pieces of 64 to 1024 tokens, got 1",
    "fit sender receiver array.jsonl": "array.jsonl, line 2: expected object, got array",
    "fit sender receiver field.jsonl": "field.jsonl, line 2: expected the field answer, got none",
    "fit sender receiver more.jsonl": r"more.jsonl, line 1: expected the fields context, suffix, answer, got \['note'\]",
    "fit sender receiver number.jsonl": "number.jsonl, line 1: expected str, got int at answer",
    "fit sender receiver cut.jsonl": "cut.jsonl, line 2: expected JSON, got",
    "fit sender receiver gap.jsonl": "gap.jsonl, line 2: expected JSON, got",
    "fit sender receiver no-context.jsonl": "no-context.jsonl, line 2: context: expected text, got an empty one",
    "fit sender receiver no-suffix.jsonl": "no-suffix.jsonl, line 2: suffix: expected text, got an empty one",
    "fit sender receiver no-answer.jsonl": "no-answer.jsonl, line 2: answer: expected text, got an empty one",
    "fit sender receiver spaces.jsonl": "spaces.jsonl, line 2: suffix: expected text of one token or more, got",
    "fit sender receiver half.jsonl": "half.jsonl, line 1: expected Unicode text, got half of a surrogate pair",
    "fit sender receiver twice.jsonl": "twice.jsonl, line 1: expected JSON .* every name once, got 'context' more than once",
    # maps
    f"profile {PAIR} --maps missing": "profile: error: missing: No such file or directory",
    f"profile {PAIR} --maps text.txt": "profile: error: text.txt: expected .*droidspeak maps",
    f"profile {PAIR} --maps sender/model.safetensors": "sender/model.safetensors: expected .*droidspeak maps",
    # models
    "fit ./missing receiver text.txt": "fit: error: ./missing: expected a folder, a hub name or 'smollm2', got none of them",
    "fit /not/here receiver text.txt": "fit: error: /not/here: expected a folder, a hub name or 'smollm2', got none of them",
    "fit a-file receiver text.txt": "fit: error: a-file: expected a folder, a hub name or 'smollm2', got a file",
    "fit no/such-hub-name receiver text.txt": "no/such-hub-name: expected a model that transformers reads, got OSError",
    "fit folder receiver text.txt": "folder: expected a folder with config.json or adapter_config.json, got one with neither",
    "fit no-config receiver text.txt": "no-config: expected a folder with config.json",
    "fit sender bad-config text.txt": "bad-config: expected a model that transformers reads, got",
    "fit sender untyped text.txt": "untyped: expected a model that transformers reads, got",
    "fit sender unknown text.txt": "unknown: expected a model that transformers reads, got ValueError: .*nonesuch",
    "fit sender worded text.txt": "worded: expected a model that transformers reads, got",
    "fit sender gpt2 text.txt": "model: expected one of .*'llama'.*, got the family 'gpt2'",
    "fit sender no-weights good.jsonl": "no-weights: expected a model that transformers reads, got OSError",
    "fit sender bad-weights good.jsonl": "bad-weights: expected a model that transformers reads, got SafetensorError",
    "fit sender wider good.jsonl": "wider: expected a model that transformers reads, got RuntimeError",
    "fit sender lacking good.jsonl": "lacking: expected files with all weights, got none of 1, such as model.layers.2.mlp",
    "fit sender no-tokens text.txt": "no-tokens: expected a model that transformers reads, got",
    "fit sender bad-tokens text.txt": "bad-tokens: expected a model that transformers reads, got",
    "fit sender shallow text.txt": r"architecture: expected one .*, got two \(num_hidden_layers is 4 and 3\)",
    "fit sender few-heads text.txt": r"architecture: expected one .*, got two \(num_key_value_heads is 2 and 4\)",
    "fit sender other-tokens text.txt": "tokenizer: expected one vocabulary for sender and receiver, got two",
    "fit sender small-vocabulary text.txt": "text.txt: expected tokens below 50 in each context, got",
    "demo --sender sender --receiver shallow": r"architecture: .*\(num_hidden_layers is 4 and 3\)",
    # adapters
    "fit sender narrow text.txt": r"narrow: expected a base model that lora_A \(2, 32\) of model.layers.0.self_attn.q_proj",
    "fit sender deep text.txt": "deep: expected a base model with the layer model.layers.4.*, got sender, which has none",
    "fit sender bad-adapter text.txt": "bad-adapter: expected a model that transformers reads, got SafetensorError",
    "fit sender bad-adapter-config text.txt": "bad-adapter-config: expected a model that transformers reads, got",
    "fit orphan sender text.txt": "orphan: expected its base model '/where/it/was', which is gone",
    "fit nameless sender text.txt": "nameless: expected its base model '', which is gone",
    "fit sender orphan text.txt --base ./missing": "./missing: expected a folder, a hub name or 'smollm2', got none of them",
    "fit sender orphan text.txt --base shallow": "orphan: expected a base model with the layer model.layers.3",
    "fit sender child text.txt --base receiver": "base: expected an adapter whose base model is gone, got none",
}  # fmt: skip


def fails(command: str, capsys: pytest.CaptureFixture) -> str:
    """Return the last line that a failing command writes to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(command))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()[-1]


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(here, command, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(here.rglob("*"))
    said = fails(command, capsys)
    assert said.startswith("droidspeak") and ": error: " in said
    assert re.search(MISTAKES[command], said), said
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", [f"fit {PAIR} --out maps", f"profile {PAIR} --out new", "demo --plot plot.png"])
def test_a_folder_that_cannot_be_written_is_known_at_once(here, command, monkeypatch, capsys) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    assert re.search(r"argument --\w+: expected a folder that can be written, got /", fails(command, capsys))


def test_a_fault_of_the_program_keeps_its_traceback(here, monkeypatch) -> None:
    monkeypatch.setattr("droidspeak_ops.cli.fit.fit", lambda *args, **options: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        main(shlex.split(f"fit {PAIR} --out new.safetensors"))


def test_a_module_that_is_missing_is_named(here, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for module in ("cli.profile", "profiling.report"):
        monkeypatch.delitem(sys.modules, f"droidspeak_ops.{module}", raising=False)
    said = fails(f"profile {PAIR}", capsys)
    assert "expected the module matplotlib; pip install 'droidspeak-ops[demo]' has it" in said


@pytest.mark.parametrize("options", ["", "--base sender"])
def test_an_adapter_whose_base_is_gone_gets_the_senders_or_the_one_that_is_named(
    here, options, tmp_path, capsys
) -> None:
    out = tmp_path / "maps.safetensors"
    main(shlex.split(f"fit sender orphan text.txt --tokens 100 --out {out} {options}"))
    err = capsys.readouterr().err
    assert "droidspeak fit: warning: orphan: its base model '/where/it/was' is gone; merged into sender instead" in err
    assert ds.Maps.load(out).receiver != ds.Maps.load(out).sender


def test_an_adapter_whose_base_is_there_needs_no_other(here, tmp_path, capsys) -> None:
    out = tmp_path / "maps.safetensors"
    main(shlex.split(f"fit receiver child text.txt --tokens 100 --out {out}"))
    assert "is gone" not in capsys.readouterr().err
    weights = load_pretrained("child")[0].state_dict()
    assert torch.equal(weights["lm_head.weight"], load_pretrained("sender")[0].lm_head.weight)


def test_contexts_are_drawn_from_all_files_by_the_seed(here, monkeypatch, tmp_path, capsys) -> None:
    drawn = []

    def record(sender, receiver, examples, **options):
        drawn.append([tuple(example.context[0].tolist()) for example in examples])
        raise ValueError("drawn")

    monkeypatch.setattr("droidspeak_ops.cli.fit.fit", record)
    command = f"fit sender receiver text.txt other.txt good.jsonl --tokens 64 --out {tmp_path / 'maps'}"
    for options in ("--contexts 6", "--contexts 6", "--contexts 6 --seed 1", "--contexts all", "--contexts 0", ""):
        with pytest.raises(SystemExit):
            main(shlex.split(f"{command} {options}"))
    said = [line for line in capsys.readouterr().err.splitlines() if "contexts" in line]
    six, again, other_seed, everything, zero, default = drawn
    assert len(six) == 6 and six == again != other_seed and set(six) < set(everything)
    assert everything == zero == default and len(everything) == 18
    where = [everything.index(each) // 7 for each in six]
    assert where == [0, 0, 1, 1, 2, 2]
    assert re.fullmatch(r"droidspeak fit: 6 of 18 contexts, 2\d\d of 594 tokens; about \d+ seconds", said[0]), said


def test_texts_may_have_byte_order_marks_and_any_line_breaks(tmp_path) -> None:
    path = tmp_path / "some.jsonl"
    strange = "w1 \u2028 w2 \x85 w3"
    line = json.dumps({"context": strange, "suffix": "w1", "answer": "w2"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\n\n")
    assert read_examples(path) == [TextExample(strange, "w1", "w2")] * 2
    path.write_bytes(b"\xef\xbb\xbfw1\r\nw2\x0cw3\n")
    assert read_text(path) == "w1\nw2\x0cw3\n"
