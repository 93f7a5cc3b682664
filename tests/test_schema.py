"""JSON from files: what is refused, and how errors name the file, the field, what is expected and what came."""

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest
import torch

from droidspeak_ops import schema
from droidspeak_ops.context.fingerprint import Fingerprint


class Pair(NamedTuple):
    first: int
    second: float


@dataclass(frozen=True)
class Part:
    kind: Literal["a", "b"]
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Whole:
    parts: list[Part]
    by_layer: dict[int, Part]
    count: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count: expected 0 or more, got {self.count}")


def test_a_document_becomes_its_type() -> None:
    text = '{"parts": [{"kind": "a", "pairs": [[1, 2]]}], "by_layer": {"3": {"kind": "b"}}}'
    expected = Whole([Part("a", (Pair(1, 2.0),))], {3: Part("b")})
    assert schema.decode(text, Whole, "file") == expected
    assert schema.decode(b"\xef\xbb\xbf" + text.encode(), Whole, "file") == expected
    assert schema.decode('"\\ud83d\\ude00"', str, "file") == "\U0001f600"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, got Expecting value at line 1"),
        ('{"parts": [],\n', "expected JSON, got .* at line 2"),
        (b"\xff\xfe{\x00", "expected UTF-8, got the byte 0xff at 0"),
        (b"\xef\xbb\xbf1\xff", "expected UTF-8, got the byte 0xff at 1"),
        ('"\\ud800"', "expected Unicode text, got half of a surrogate pair"),
        ('{"count": 1, "count": 1}', "expected .* every name once, got 'count' more than once"),
        ('{"count": NaN}', "expected .* finite numbers .*, got NaN"),
        ('{"count": -Infinity}', "got -Infinity"),
        ('{"count": 1e999}', "got the number 1e999"),
        ('{"count": 9223372036854775808}', "got the number 9223372036854775808"),
        ('{"count": ' + "1" * 5000 + "}", "got the number 11111111111111111111$"),
        ("[" * 200_000, "got too deeply nested JSON"),
        ('{"a":' * 200_000, "got too deeply nested JSON"),
        ("[]", "expected object, got array"),
        ('{"by_layer": {}}', "expected the field parts, got none"),
        ('{"parts": [{"kind": "c"}], "by_layer": {}}', r"one of the values that are known, got 'c' at parts\[0\].kind"),
        ('{"parts": [{"kind": "a", "pairs": [[1]]}], "by_layer": {}}', r"array of length 2, got 1 at parts\[0\].pairs"),
        ('{"parts": [{"kind": "a", "size": 1}], "by_layer": {}}', r"the fields kind, pairs at parts\[0\], got .'size'."),
        ('{"parts": [], "by_layer": {"3": {"kind": "a", "x": 1}}}', "expected the fields kind, pairs at by_layer.3, got"),
        ('{"parts": [], "by_layer": {"three": {"kind": "a"}}}', "expected int, got str at by_layer"),
        ('{"parts": [], "by_layer": {"0": {"kind": "a"}, "-0": {"kind": "a"}}}', "expected every name once at by_layer, got"),
        ('{"parts": [], "by_layer": {}, "count": -1}', "count: expected 0 or more, got -1"),
        ('{"parts": [], "by_layer": {}, "count": true}', "expected int, got bool at count"),
        ('{"parts": [], "by_layer": {}, "count": 1.5}', "expected int, got float at count"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^some\.json: .*{message}") as caught:
        schema.decode(text, Whole, "some.json")
    assert type(caught.value) is ValueError


FINGERPRINT = {
    "architecture": {"num_hidden_layers": 3, "sliding_windows": [None, 4, None]},
    "rope": {"sliding": {"factors": [1.5]}},
    "dtype": "float32",
    "weights": "0" * 64,
    "tokenizer": "9:" + "0" * 64,
}


def test_a_dtype_is_one_that_models_are_read_in() -> None:
    """It may be unknown, and then nothing is made of it."""
    assert Fingerprint({}, {}, "bfloat16").torch_dtype == torch.bfloat16
    for dtype in ("", "int8", "__name__"):
        with pytest.raises(ValueError, match=f"dtype: expected one of float32, float16, bfloat16, got '{dtype}'"):
            _ = Fingerprint({}, {}, dtype).torch_dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": {"num_hidden_layers": 0}},
            "architecture: expected num_hidden_layers to be an integer from 1 to",
        ),
        ({"architecture": {"num_hidden_layers": 10**9}}, "architecture: expected num_hidden_layers .*, got 1000000000"),
        ({"architecture": {"head_dim": True}}, "architecture: expected head_dim .*, got True"),
        ({"architecture": {"x": [[[[1]]]]}}, "architecture: expected settings of a model, got values that are nested"),
        ({"weights": "latest"}, "weights: expected a digest .*, got 'latest'"),
        ({"tokenizer": "0" * 64}, "tokenizer: expected a digest"),
    ],
)
def test_what_a_fingerprint_gets_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    assert schema.decode(json.dumps(FINGERPRINT), Fingerprint, "file") == Fingerprint(**FINGERPRINT)
    with pytest.raises(ValueError, match=f"^file: {message}"):
        schema.decode(json.dumps({**FINGERPRINT, **changes}), Fingerprint, "file")
