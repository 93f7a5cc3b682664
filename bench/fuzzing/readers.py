"""The readers of files that others may have written: each uses what it reads, and says what that is written as."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import droidspeak_ops as ds
from bench.fuzzing.damages import (
    BYTES,
    Damage,
    damage_header,
    damage_journal,
    damage_json,
    damage_line,
    damage_line_order,
    damage_stored,
    damage_tensors,
    in_order,
    split_header,
)
from bench.fuzzing.wholes import (
    CONTEXTS,
    ENTRY,
    LAYERS,
    RUN,
    make_context,
    make_frontier,
    make_maps,
    write_journal,
    write_tuned,
    written,
)
from droidspeak_ops import example, tensor_file
from droidspeak_ops.context import entry
from droidspeak_ops.context.context import SharedContext
from droidspeak_ops.context.keys import Chain
from droidspeak_ops.context.storage import storage_at
from droidspeak_ops.files import Journal
from droidspeak_ops.kernels.project_splice_config import ProjectSpliceConfig
from droidspeak_ops.ops import tuning
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.profiling.cost import CostModel
from droidspeak_ops.profiling.frontier import Frontier
from droidspeak_ops.profiling.run import MeasuredContext, ScoredContext, read_record


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
        """Results of reading the whole files."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            return [self.identity(self.read(path)) for whole in self.wholes if path.write_bytes(whole)]


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
    header: dict[str, Any] = json.loads(split_header(content)[0])
    return str(header["__metadata__"]["sha256"]).encode()


def read_stored(path: Path) -> bytes:
    """Read a stored context, and write it."""
    stored = entry.Entry(str(path), storage_at(path.parent).open(path.name))
    tensors = tensor_file.Tensors({name: stored.fetch(name) for name in stored.manifest.digests})
    return _encoded(SharedContext._from_described(stored.manifest.context, tensors), stored.manifest.namespace)


def _encoded(context: SharedContext, namespace: str) -> bytes:
    return b"".join(entry.encode(context, Chain(namespace, "", context.sender, context.tokens), namespace))


def stored_digest_of(content: bytes) -> bytes:
    """Return the digest of the header of a stored context, which has those of its tensors."""
    header: dict[str, Any] = json.loads(split_header(content)[0])
    return str(header["__metadata__"][entry.DIGEST]).encode()


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
    contexts = [in_order(written(each.save)) for each in (context, context.quantized(torch.int8))]
    maps = [in_order(written(make_maps().save))]
    frontiers = [written(make_frontier(scored=scored).save) for scored in (False, True)]
    plans = [
        plan.to_json().encode() for plan in (ds.Plan(), ds.Plan([(1, 3), (5, 6)], [0, 4]), ds.Plan([(2, 4)], "rest"))
    ]
    tuned = {
        tuple({**ENTRY, "num_tokens": tokens}.values()): ProjectSpliceConfig(64, 64, 64, 4, 2) for tokens in (0, 99)
    }
    texts = {"context": "once", "answer": "time \u2028 \u00e9"}
    lines = b"".join(json.dumps({**texts, "suffix": str(number)}).encode() + b"\n" for number in range(3))
    stored = [_encoded(each, "a tenant") for each in (context, context.quantized(torch.int8))]
    return [
        Reader("maps", maps, read_maps, tensors, [damage_tensors], has_digest=True, identity=digest_of),
        Reader("contexts", contexts, read_context, tensors, [damage_tensors], has_digest=True, identity=digest_of),
        Reader(
            "stored contexts", stored, read_stored, tensors, [damage_stored], has_digest=True, identity=stored_digest_of
        ),
        Reader("plans", plans, read_plan, (*BYTES, *[damage_json] * 4), named="plan"),
        Reader("frontiers", frontiers, read_frontier, (*BYTES, *[damage_json] * 4)),
        Reader(
            "journals", [written(write_journal)], read_journal, (*BYTES, damage_line_order),
            [damage_journal], has_digest=True, prefix=True,
        ),
        Reader("tuned", [written(partial(write_tuned, table=tuned))], read_tuned, (*BYTES, *[damage_json] * 4)),
        Reader("examples", [lines], read_examples, (*BYTES, *[damage_line] * 4)),
    ]  # fmt: skip
