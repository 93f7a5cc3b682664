"""The command line's mistakes, one line each, and Ctrl-C."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import fine_tuned, save_with_tokenizer, tiny_llama, tiny_pair, tokens

import droidspeak_ops as ds
from droidspeak_ops.cli import main, serve
from droidspeak_ops.cli.parser import make_parser
from droidspeak_ops.example import TextExample, read_examples, read_text
from droidspeak_ops.hf.pretrained import load_pretrained
from droidspeak_ops.profiling import run as profiling

ROOT = Path(__file__).parent.parent
LAYERS = 4
COSTS = ds.CostModel((0, 1e-4, 0), (0, 1e-5, 0), (0.05, 0, 0), 4000, 1000, "made up", (100, 2000))


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in tokens(count, vocabulary=100)[0].tolist())


def json_lines(count: int = 4, **changes: str) -> str:
    examples = ({"context": words(40), "suffix": words(5), "answer": words(4)} | changes for _ in range(count))
    return "".join(json.dumps(each) + "\n" for each in examples)


def copied(source: str, target: str, **changes: object) -> Path:
    """A copy of a model with changes of its configuration, None to take a value away."""
    folder = Path(shutil.copytree(source, target))
    if changes:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        config = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def adapter(base: torch.nn.Module, folder: str, recorded: str | None) -> None:
    """Save a LoRA adapter that names `recorded` as its base."""
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(fine_tuned(base, 0), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub for the base
    config = Path(folder) / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": recorded}),
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and texts, right ones and wrong ones."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cli")
    before = Path.cwd()
    os.chdir(root)
    try:
        sender, receiver = tiny_pair(layers=LAYERS)
        save_with_tokenizer(sender, Path("sender"))
        save_with_tokenizer(receiver, Path("receiver"))
        save_with_tokenizer(tiny_llama(head_dim=16, layers=3), Path("shallow"))
        adapter(sender, "orphan", "/where/it/was")
        adapter(sender, "nameless", None)
        adapter(sender, "child", "sender")
        adapter(tiny_llama(head_dim=16, layers=LAYERS, hidden_size=32), "narrow", "/where/it/was")
        adapter(tiny_llama(head_dim=16, layers=6), "deep", "/where/it/was")
        _broken_models()
        _texts()
    finally:
        os.chdir(before)
    return root


def _broken_models() -> None:
    for name, file in (
        ("no-config", "config.json"),
        ("no-weights", "model.safetensors"),
        ("no-tokens", "tokenizer.json"),
    ):
        (copied("sender", name) / file).unlink()
    for name, file in (
        ("bad-config", "config.json"),
        ("bad-weights", "model.safetensors"),
        ("bad-tokens", "tokenizer.json"),
    ):
        path = copied("sender", name) / file
        path.write_bytes(path.read_bytes()[:-99])
    weights = load_file("sender/model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, copied("sender", "lacking") / "model.safetensors", {"format": "pt"})
    copied("sender", "wider", intermediate_size=96)
    copied("sender", "gpt2", model_type="gpt2")
    copied("sender", "unknown", model_type="nonesuch")
    copied("sender", "untyped", model_type=None, architectures=None)
    copied("sender", "worded", num_hidden_layers="four")
    copied("sender", "few-heads", num_key_value_heads=4)
    copied("sender", "small-vocabulary", vocab_size=50)
    tokenizer = copied("sender", "other-tokens") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace('"w7"', '"v7"'), encoding="utf-8")
    (copied("orphan", "bad-adapter") / "adapter_model.safetensors").write_bytes(b"no tensors")
    (copied("orphan", "bad-adapter-config") / "adapter_config.json").write_text("{", encoding="utf-8")


def _texts() -> None:
    for name in ("text.txt", "other.txt"):
        Path(name).write_text(words(450), encoding="utf-8")
    Path("short.txt").write_text(words(70), encoding="utf-8")
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("blank.txt").write_text(" \n\n", encoding="utf-8")
    Path("latin.txt").write_bytes(b"caf\xe9 " * 99)
    Path("good.jsonl").write_text(json_lines(), encoding="utf-8")
    good = json_lines(1)
    Path("array.jsonl").write_text(good + "[1]\n", encoding="utf-8")
    Path("field.jsonl").write_text(good + json.dumps({"context": "w1", "suffix": "w2"}), encoding="utf-8")
    Path("more.jsonl").write_text(json_lines(1, note="w1"), encoding="utf-8")
    Path("number.jsonl").write_text(json_lines(1, answer=7), encoding="utf-8")
    Path("cut.jsonl").write_text(json_lines(2)[:-9], encoding="utf-8")
    Path("gap.jsonl").write_text(good + "\n" + good, encoding="utf-8")
    for name in ("context", "suffix", "answer"):
        Path(f"no-{name}.jsonl").write_text(good + json_lines(1, **{name: ""}), encoding="utf-8")
    Path("spaces.jsonl").write_text(good + json_lines(1, suffix="  "), encoding="utf-8")
    Path("half.jsonl").write_text(json_lines(1, answer="\ud800"), encoding="utf-8")
    Path("twice.jsonl").write_text(
        '{"context": "w1", "context": "w2", "suffix": "w1", "answer": "w1"}', encoding="utf-8"
    )
    Path("folder").mkdir()
    Path("taken/frontier.json").mkdir(parents=True)
    Path("a-file").write_text("w1", encoding="utf-8")


PAIR = "sender receiver good.jsonl"
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


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


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


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_ctrl_c_of_a_fit_leaves_nothing(here, monkeypatch, tmp_path, capsys) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("droidspeak_ops.cli.fit.fit", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(f"fit {PAIR} --out {tmp_path / 'maps'}"))
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "droidspeak fit: interrupted; no result was written"
    assert not any(tmp_path.iterdir())


def test_ctrl_c_is_known_whatever_a_library_makes_of_it(here, monkeypatch, tmp_path, capsys) -> None:
    def swallow(*args: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("could not import") from error

    monkeypatch.setattr("droidspeak_ops.cli.fit.fit", swallow)
    before = signal.getsignal(signal.SIGINT)  # another than Python's own in a process that was started to ignore it
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(f"fit {PAIR} --out {tmp_path / 'maps'}"))
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "droidspeak fit: interrupted; no result was written"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_during_imports_ends_the_program_at_once(here) -> None:
    interrupted = """if True:
        import signal, sys
        from droidspeak_ops import cli
        def import_module(*names):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                print("went on", file=sys.stderr)
        cli.import_module = import_module
        cli.main(sys.argv[1:])
    """
    command = [sys.executable, "-c", interrupted, "compile"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "droidspeak compile: interrupted; no result was written\n")


def test_ctrl_c_of_a_profile_keeps_the_journal_that_it_resumes_from(here, monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["profile", *PAIR.split(), "--granularity", "2", "--out", str(out)]
    # As main, but for a context that takes as long as it takes to be interrupted.
    slow = """if True:
        import sys, time
        from droidspeak_ops.cli import main
        from droidspeak_ops.profiling import run
        measure, done = run.measure_context, []
        def measure_context(*args):
            if len(done) == 2:
                print("waiting", flush=True)
                time.sleep(60)
            done.append(1)
            return measure(*args)
        run.measure_context = measure_context
        main(sys.argv[1:])
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", slow, *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
    ) as run:
        assert run.stdout.readline() == "waiting\n"
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"droidspeak profile: interrupted; the journal {out / 'journal.jsonl'} keeps what was measured, "
        "and the same command resumes from it"
    )
    measured = []
    measure = profiling.measure_context
    monkeypatch.setattr(profiling, "measure_context", lambda *args: measured.append(1) or measure(*args))
    monkeypatch.setattr(profiling, "measure_costs", lambda *args, **options: COSTS)
    main(command)
    assert len(measured) == 2  # of four
    assert (out / "frontier.json").exists() and not (out / "journal.jsonl").exists()


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
        (["--capture", "--plan", "p"], "--maps, --plan: expected them with --sender"),
        (["--sender", "base", "--hidden-layers", "1"], "--hidden-layers: expected it with --capture"),
    ],
)
def test_serve_refuses_half_a_role(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve.command_of(make_parser().parse_args(["serve", "tuned", "--store", "s", *options]))
