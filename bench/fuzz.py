"""Damaged files for every reader of files: each has to give the right value or an error that names the file.

    python -m bench.fuzz --inputs 20000 --seed 0

Bytes are flipped, cut, inserted, repeated and swapped, and texts encoded otherwise. In JSON, fields and items are removed,
renamed, doubled and swapped, and values replaced by others: huge, negative or no numbers, other types, deep nesting. Files with
a digest or checksums are damaged before these are made, too, as whoever wrote the file could have done.

`same` counts inputs that were read as what was written, `valid` those that are another value of the kind, which was then used
and written again: allowed only where no digest tells. `named` counts ValueErrors that name the file, and OSErrors. Anything
else is a failure, among it running out of the memory that the process is given; `peak_MiB` is by how much memory grew. An input
depends on the seed, the reader and its number alone, so ``--readers NAME --number N`` repeats it.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load

import droidspeak_ops as ds
from bench.common import Row, parser, show
from droidspeak_ops import example, tensor_file
from droidspeak_ops.context.context import SharedContext
from droidspeak_ops.context.kv import KV
from droidspeak_ops.files import Journal
from droidspeak_ops.kernels.project_splice_config import ProjectSpliceConfig
from droidspeak_ops.ops import tuning
from droidspeak_ops.prefill.maps import Correction, Domain, LayerMap
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.profiling.cost import CostModel, Polynomial
from droidspeak_ops.profiling.frontier import WORST_KL, Frontier, Point, Sensitivity
from droidspeak_ops.profiling.run import MeasuredContext, ScoredContext, read_record

MEMORY = 4 << 30
"""Bytes that the process may allocate beyond what it has when it starts."""

INPUT = "input.file"

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """A reader of files, and how its files are damaged.

    Args:
        name: of the reader.
        wholes: contents of whole files.
        read: reads a file, uses what it holds, and returns what that is written as.
        damages: one is chosen for each input.
        sealed: damages under a digest or checksums that fit: other values are allowed.
        has_digest: whether `damages` may give nothing but the value that was written.
        prefix: whether a file that was cut may be read up to there.
        named: what errors name instead of the file.
        identity: of what a value is written as: contents with one identity are the same.
    """

    name: str
    wholes: Sequence[bytes]
    read: Callable[[Path], bytes]
    damages: Sequence[Damage]
    sealed: Sequence[Damage] = ()
    has_digest: bool = False
    prefix: bool = False
    named: str | None = None
    identity: Callable[[bytes], bytes] = bytes

    @cached_property
    def expected(self) -> list[bytes]:
        """What the whole files are read as."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            return [self.identity(self.read(path)) for whole in self.wholes if path.write_bytes(whole)]


# --- damages ----------------------------------------------------------------------------------------------------------------


def flip(content: bytes, rng: random.Random) -> bytes:
    """Flip one to three bits."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Cut off the end."""
    return content[: rng.randrange(len(content))]


def splice_bytes(content: bytes, rng: random.Random) -> bytes:
    """Replace some bytes by random ones, by those of another place, or by none."""
    (start, end), (first, last) = (sorted(rng.choices(range(len(content) + 1), k=2)) for _ in "ab")
    if rng.random() < 0.5:  # a few, so that most of the file is left
        end, last = min(end, start + 8), min(last, first + 8)
    put = rng.choice([rng.randbytes(rng.randint(0, 9)), content[first:last], b"", b"\0" * (end - start)])
    return content[:start] + put + content[rng.choice([start, end]) :]


def encode(content: bytes, rng: random.Random) -> bytes:
    """Encode the file, as if it were text, otherwise."""
    text = content.decode("latin1")
    return text.encode(rng.choice(["utf-8", "utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037"]), "replace")


BYTES: tuple[Damage, ...] = (flip, cut, splice_bytes, encode)

_RAW = "<raw>"
_WILD = [
    *("null", "true", "false", "0", "1", "2", "-1", "3.5", "-0.0", "1e308", "-1e308", "5e-324", "1e999", "NaN", "-Infinity"),
    *("1.0", "4096", "65536", "9223372036854775807", "9223372036854775808", "1" + "0" * 400, "1" * 5000, "[]", "{}"),
    *('""', '"x"', '"1"', '"rest"', '"reuse"', '"fitted"', '"float16"', '"\\ud800"', '"\\u0000"', '"' + "x" * 9999 + '"'),
    *("[[1, 2]]", "[0, 1]", '{"0": [1, 2]}', "[" * 500 + "]" * 500, "[" * 99_999, '{"a":' * 99_999, '{"a":1,"a":2}'),
]  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every list or object in a value, with each index or name."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(item)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Change the fields, items and values of a JSON document."""
    document, raw = [json.loads(content)], ""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(document))
        (at, key), (other, other_key) = rng.choices(places, k=2)
        action = rng.choice(["replace", "nudge", "remove", "rename", "double", "swap", "wrap", "add"])
        if action == "replace":
            at[key], raw = _RAW, rng.choice(_WILD)
        elif action == "nudge" and isinstance(at[key], (int, float)):
            at[key] = rng.choice([at[key] + 1, at[key] - 1, -at[key], at[key] * 1000, float(at[key]), str(at[key])])
        elif action == "remove" and at is not document:
            del at[key]
        elif action == "rename" and isinstance(at, dict):
            at[rng.choice(["", key + "s", key.upper(), "weights"])] = at.pop(key)
        elif action == "double" and isinstance(at, dict):
            at[_RAW], raw = at[key], json.dumps(key)
        elif action == "double":
            at.append(copy.deepcopy(at[key]))
        elif action == "swap":
            at[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(at[key])
        elif action == "wrap":
            at[key] = rng.choice([[at[key]], {"x": at[key]}, [at[key], at[key]]])
        elif action == "add" and isinstance(at, dict):
            at[rng.choice(["x", "", "__class__", "weights"])] = 1
    return json.dumps(document[0]).replace(json.dumps(_RAW), raw).encode()


def damage_line(content: bytes, rng: random.Random) -> bytes:
    """Damage a line of a file of JSON documents, or swap, double or drop lines."""
    lines = content.splitlines()
    first, second = rng.choices(range(len(lines)), k=2)
    action = rng.choice(["json", "json", "json", "swap", "double", "drop", "empty"])
    if action == "json":
        lines[first] = damage_json(lines[first], rng)
    elif action == "swap":
        lines[first], lines[second] = lines[second], lines[first]
    elif action == "double":
        lines.insert(second, lines[first])
    elif action == "drop":
        del lines[first]
    else:
        lines.insert(first, rng.choice([b"", b" ", b"\r", b"\x0c", "\u2028".encode()]))
    return b"".join(line + b"\n" for line in lines)


def damage_journal(content: bytes, rng: random.Random) -> bytes:
    """The same, under checksums that fit."""
    lines = damage_line(b"".join(line[9:] + b"\n" for line in content.splitlines()), rng).split(b"\n")[:-1]
    return b"".join(b"%08x %b\n" % (zlib.crc32(line), line) for line in lines)


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """Damage the header of a safetensors file, which says where its tensors are and of which shape."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = damage_json(content[8:end], rng)
    return struct.pack("<Q", rng.choice([len(header), len(header), len(header), 2**63, 2**40])) + header + content[end:]


def damage_tensors(content: bytes, rng: random.Random) -> bytes:
    """Damage the tensors and plain values of a file, under a digest that fits."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    (key,) = header.keys() - {"sha256"}
    text, tensors = header[key], load(content)
    if rng.random() < 0.5:
        text = damage_json(text.encode(), rng).decode()
    else:
        for _ in range(rng.randint(1, 2)):
            name, other = rng.choices(list(tensors), k=2)
            _damage_tensor(tensors, name, other, rng)
    return tensor_file.sealed(key.removeprefix("droidspeak_"), text, tensors)


def _damage_tensor(tensors: dict[str, torch.Tensor], name: str, other: str, rng: random.Random) -> None:
    tensor = torch.atleast_1d(tensors[name])
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
    flat = (tensor.real if tensor.is_complex() else tensor).float().reshape(-1)
    changed: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.to(rng.choice([*dtypes, torch.complex64, torch.float8_e4m3fn, torch.uint8])),
        lambda: tensor.reshape(-1),
        lambda: tensor.mT if tensor.dim() > 1 else tensor[None],
        lambda: tensor[..., :-1],
        lambda: tensor[:0],
        lambda: torch.zeros(0, 2**40),
        lambda: torch.tensor(rng.random()),
        lambda: torch.cat([tensor, tensor]),
        lambda: flat.where(torch.arange(len(flat)) > 0, rng.choice([torch.nan, torch.inf, -1e9, 1e38])).view(tensor.shape),
        lambda: torch.full_like(tensor, rng.choice([0, 1, 99, -1])),
        lambda: tensors[other],
    ]  # fmt: skip
    action = rng.choice(["change"] * 4 + ["drop", "rename", "add", "swap"])
    if action == "change":
        tensors[name] = rng.choice(changed)()
    elif action == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        if action != "add" and len(tensors) > 1:
            del tensors[name]
        if action != "drop":
            names = [
                name + "s",
                "",
                "x",
                name.replace("1", "2"),
                name.replace("1", "99999999999999999999"),
                f"0{name}",
                "0.x",
            ]
            tensors[rng.choice(names)] = tensor


# --- whole files ------------------------------------------------------------------------------------------------------------

LAYERS, HIDDEN, HEADS, HEAD_DIM = 3, 16, 2, 4
MODEL = ds.Fingerprint(
    {
        "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4,
        "num_key_value_heads": HEADS, "vocab_size": 50, "head_dim": HEAD_DIM, "sliding_windows": [None, 4, None],
    },
    {"rope_type": "default", "rope_theta": 1e4, "applied": "0" * 64}, "float32", "0" * 64, f"50:{'0' * 64}",
)  # fmt: skip
OTHER = replace(MODEL, weights="1" * 64)
COSTS = CostModel(
    Polynomial(0.0, 1e-4, 0.0), Polynomial(0.0, 1e-5, 0.0), Polynomial(0.05, 0.0, 0.0), 64, 64, "a machine", (100, 2000)
)


def make_context() -> SharedContext:
    """Return a context of five tokens, one layer with a sliding window and one without RoPE."""
    rows = [KV(*torch.randn(2, 1, HEADS, held, HEAD_DIM)) for held in (5, 3, 5)]
    angles = torch.randn(5, HEAD_DIM // 2)
    return SharedContext(
        torch.arange(5)[None], rows, {1: torch.randn(1, 5, HIDDEN)}, [(angles.cos(), angles.sin())] * 2 + [None], MODEL
    )


def make_maps() -> ds.Maps:
    """Return maps from hidden states and from K/V, and a correction."""
    width = HEADS * HEAD_DIM

    def layer_map(columns: int) -> LayerMap:
        return LayerMap(*torch.randn(2, width, columns), *torch.randn(2, width))

    return ds.Maps(
        MODEL, OTHER, ("project", "fitted", "reuse"), ("project", "reuse", "fitted_kv"),
        {(1, "fitted"): layer_map(HIDDEN), (2, "fitted_kv"): layer_map(2 * width)},
        {1: Correction(torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN))}, {1: (0.5, 1.0), 2: (0.0, 0.25)},
        Domain(0, torch.randn(2 * width), torch.eye(2 * width), 2.5),
    )  # fmt: skip


def make_frontier(*, scored: bool) -> Frontier:
    """Return a frontier with maps and scores, or without either."""

    def point(plan: ds.Plan, kl: float) -> Point:
        rest: Any = "reuse" if not plan.project else "fitted" if scored else "project"
        scores = (0.5, 0.5, 0.25) if scored else None
        return Point(plan, rest, False, resolve(plan, LAYERS).work, (None, kl, kl), (None, 0.5, 0.75), scores)

    own = replace(point(ds.Plan([(0, LAYERS)]), 0.0), kl=(0.0,) * 3, agreement=(1.0,) * 3)
    points = (point(ds.Plan(), 0.5), point(ds.Plan([(1, 2)], "rest"), WORST_KL), own)
    alone = tuple(Sensitivity(layer, layer + 1, (0.25,)) for layer in range(LAYERS))
    scores = (1.0, 0.5, 0.5) if scored else None
    return Frontier(MODEL, OTHER, "2" * 64 if scored else None, points, alone, COSTS, (9, 8, 7), 1, 1, 0, scores)


RUN = {"profile of": ["0" * 64], "maps": None}
CONTEXTS = ["3" * 64, "4" * 64]
ENTRY = dict(zip(tuning.KEY, ("torch.bfloat16", 64, 2, 32, False, 8192), strict=True))


def written(write: Callable[[Path], object]) -> bytes:
    """Return the content of a file that is written."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def write_journal(path: Path) -> None:
    """Write the journal of a profile of two contexts."""
    with Journal(path, RUN) as records:
        for context in CONTEXTS:
            records.add(asdict(MeasuredContext(context, [0.5, WORST_KL], [0.75, 0.0])))
        records.add(asdict(COSTS))
        for context in CONTEXTS:
            records.add(asdict(ScoredContext(context, [1.0, 0.5, 0.5])))


def write_tuned(path: Path, table: dict[tuple[Any, ...], ProjectSpliceConfig]) -> None:
    """Write configurations of project_splice."""
    entries = [{**dict(zip(tuning.KEY, key, strict=True)), "config": vars(config)} for key, config in table.items()]
    tuning.save(path, "a GPU", entries)


# --- readers ----------------------------------------------------------------------------------------------------------------


def read_maps(path: Path) -> bytes:
    """Read maps, and resolve plans with them."""
    maps = ds.Maps.load(path)
    for plan in (ds.Plan(project="rest"), ds.Plan([(1, 2)], "rest")):
        resolve(plan, LAYERS, maps), resolve(plan, LAYERS, maps, held=[])
    return written(maps.save)


def read_context(path: Path) -> bytes:
    """Read a context, and use each layer."""
    context = SharedContext.load(path)
    for layer in range(context.num_layers):
        context.unrotated(layer)
    for layer in context.hidden_layers:
        context.hidden(layer)
    return written(context.save)


def digest_of(content: bytes) -> bytes:
    """Return the digest in a file of tensors: safetensors has no order of what is beside them."""
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return str(header["__metadata__"]["sha256"]).encode()


def read_plan(path: Path) -> bytes:
    """Read a plan."""
    plan = ds.Plan.from_json(path.read_bytes())
    assert str(plan)
    return plan.to_json().encode()


def read_frontier(path: Path) -> bytes:
    """Read a frontier, and choose plans."""
    frontier = Frontier.load(path)
    for tokens, bandwidth in ((None, None), (1, 1.0), (10**6, 1e9)):
        options = {"tokens": tokens, "bandwidth": bandwidth}
        for max_quality_loss in (0.0, 0.5, 1.0):
            chosen = frontier.point(
                frontier.choose(max_quality_loss=max_quality_loss, max_ttft=1.0, queue=3, **options)
            )
            frontier.speedup(chosen, **options)
        frontier.pareto(**options)
    for point in frontier.points[:2]:
        for held_out in (False, True):
            frontier.kl(point, held_out=held_out)
    return written(frontier.save)


def read_journal(path: Path) -> bytes:
    """Resume from a journal as a profile does."""
    with Journal(path, RUN) as records:
        records.check_end(5)
        for index in range(len(records.done)):
            if index == 2:
                records.read(index, CostModel)
            else:
                kind, count = (MeasuredContext, 2) if index < 2 else (ScoredContext, 3)
                read_record(records, index, kind, CONTEXTS[index % 3], count)
    return path.read_bytes()


def read_tuned(path: Path) -> bytes:
    """Read tuned configurations; those for another GPU are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written(partial(write_tuned, table=tuning.load(path, "a GPU")))


def read_examples(path: Path) -> bytes:
    """Read examples of a context, a suffix and an answer, as the command line does."""
    found = example.read_examples(path)
    return b"".join(json.dumps(asdict(each)).encode() + b"\n" for each in found)


def make_readers() -> list[Reader]:
    """Return the readers of files that others may have written."""
    torch.manual_seed(0)
    context, tensors = make_context(), (*BYTES, damage_header)
    contexts = [written(each.save) for each in (context, context.quantized(torch.int8))]
    frontiers = [written(make_frontier(scored=scored).save) for scored in (False, True)]
    plans = [
        plan.to_json().encode() for plan in (ds.Plan(), ds.Plan([(1, 3), (5, 6)], [0, 4]), ds.Plan([(2, 4)], "rest"))
    ]
    tuned = {
        tuple({**ENTRY, "num_tokens": tokens}.values()): ProjectSpliceConfig(64, 64, 64, 4, 2) for tokens in (0, 99)
    }
    texts = {"context": "once", "answer": "time \u2028 \u00e9"}
    lines = b"".join(json.dumps({**texts, "suffix": str(number)}).encode() + b"\n" for number in range(3))
    return [
        Reader("maps", [written(make_maps().save)], read_maps, tensors, [damage_tensors], has_digest=True, identity=digest_of),
        Reader("contexts", contexts, read_context, tensors, [damage_tensors], has_digest=True, identity=digest_of),
        Reader("plans", plans, read_plan, (*BYTES, *[damage_json] * 4), named="plan"),
        Reader("frontiers", frontiers, read_frontier, (*BYTES, *[damage_json] * 4)),
        Reader(
            "journals", [written(write_journal)], read_journal, (*BYTES, damage_line_order),
            [damage_journal], has_digest=True, prefix=True,
        ),
        Reader("tuned", [written(partial(write_tuned, table=tuned))], read_tuned, (*BYTES, *[damage_json] * 4)),
        Reader("examples", [lines], read_examples, (*BYTES, *[damage_line] * 4)),
    ]  # fmt: skip


def damage_line_order(content: bytes, rng: random.Random) -> bytes:
    """Swap, double or drop lines whose checksums fit."""
    lines = content.splitlines(keepends=True)
    first, second = rng.choices(range(len(lines)), k=2)
    return b"".join(
        rng.choice(
            [
                [*lines[:first], *lines[first + 1 :]],
                [*lines[:first], lines[second], *lines[first:]],
                [lines[{first: second, second: first}.get(number, number)] for number in range(len(lines))],
            ]
        )
    )


# --- the run ----------------------------------------------------------------------------------------------------------------


def outcome(reader: Reader, seed: int, number: int, path: Path) -> str:
    """Damage a file, read it, and return what came of it: ``"same"``, ``"valid"`` or ``"named"``.

    Raises:
        Exception: whatever the reader should not have raised, or an AssertionError that says what it should not have returned.
    """
    rng = random.Random(f"{seed} {reader.name} {number}")
    which = rng.randrange(len(reader.wholes))
    whole, expected = reader.wholes[which], reader.expected[which]
    is_sealed = bool(reader.sealed) and rng.random() < 0.5
    path.write_bytes(rng.choice(reader.sealed if is_sealed else reader.damages)(whole, rng))
    try:
        found = reader.read(path)
    except OSError:
        return "named"
    except ValueError as error:
        if type(error) in (ValueError, ds.ReuseError) and (reader.named or str(path)) in str(error):
            return "named"
        raise
    if reader.identity(found) == expected or (reader.prefix and expected.startswith(found)):
        return "same"
    assert is_sealed or not reader.has_digest, "a damaged file was read as another value"
    path.write_bytes(found)
    again = reader.identity(reader.read(path))
    assert again == reader.identity(found), "what was read comes back as another value"
    return "valid"


def fuzz(reader: Reader, inputs: Sequence[int], seed: int) -> tuple[Row, list[str]]:
    """Return a row of the outcomes of a reader's inputs, and the failures."""
    counts, failures, before = Counter[str](), [], _peak()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number in track(inputs, description=reader.name, console=Console(stderr=True)):
            try:
                counts[outcome(reader, seed, number, Path(folder) / INPUT)] += 1
            except Exception:
                last = traceback.format_exc(limit=-3)
                failures.append(f"{reader.name}: seed {seed}, input {number}: {last}")
    return {
        "reader": reader.name, "inputs": len(inputs), **{name: counts[name] for name in ("same", "valid", "named")},
        "failures": len(failures), "peak_MiB": (_peak() - before) >> 10,
    }, failures  # fmt: skip


def _peak() -> int:
    """The most memory that the process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Have allocations fail beyond :data:`MEMORY`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; exit with 1 if an input had another outcome than those allowed."""
    readers = {reader.name: reader for reader in make_readers()}
    options = parser("fuzz", __doc__)
    options.add_argument("--inputs", type=int, default=20_000, help="for each reader")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--readers", nargs="+", choices=list(readers), default=list(readers))
    options.add_argument("--number", type=int, help="this input alone")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    inputs = range(args.inputs) if args.number is None else [args.number]
    with bounded_memory():
        results = [fuzz(readers[name], inputs, args.seed) for name in args.readers]
    rows = [row for row, _ in results]
    show(rows, f"damaged files, seed {args.seed}")
    failures = [failure for _, of_reader in results for failure in of_reader]
    for failure in failures[:20]:
        print(failure)
    if failures:
        raise SystemExit(1)
    return rows


if __name__ == "__main__":
    main()
