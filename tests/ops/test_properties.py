"""Properties that hold for any shapes, strides, slots and layouts, searched by hypothesis."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import Attention, Case, kv_project_ref, poisoned, projection
from support.compare import assert_bitwise_equal, assert_close

from droidspeak_ops import ops
from droidspeak_ops.kernels.attend_rows import attend_rows
from droidspeak_ops.kernels.attention_peaks import attention_peaks
from droidspeak_ops.kernels.kv_splice import kv_splice
from droidspeak_ops.kernels.project_splice import project_splice
from droidspeak_ops.kernels.project_splice_config import ProjectSpliceConfig
from droidspeak_ops.ops import reference
from droidspeak_ops.ops.checks import _is_nested, _overlap, check_separate

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
searched = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
cheap = settings(searched, max_examples=200)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    head_dim = draw(st.sampled_from([4, 16, 20, 34]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return projection(
        tokens=draw(st.integers(0, 24)),
        hidden=draw(st.integers(1, 24)),
        layers=draw(st.integers(1, 3)),
        q_heads=draw(st.integers(0, 3)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(0, head_dim // 2)),
        dtype=draw(DTYPES),
        rstd=draw(st.booleans()),
        bias=draw(st.booleans()),
        head_norm=draw(st.sampled_from([None, "each", "all"])),
        norm_order=draw(st.sampled_from(["llama", "gemma", "olmo"])),
        positions=draw(st.booleans()),
        layout=draw(st.sampled_from(["dense", "NHD", "HND", "strided"])),
        scattered=draw(st.booleans()),
        fused=draw(st.booleans()),
        strided=draw(st.booleans()),
    )


@searched
@given(problems())
def test_the_projection_kernel_is_its_reference(case: Case) -> None:
    expected = case.with_new_outputs()
    project_splice(case, ProjectSpliceConfig(16, 32, 16, 4, 2))
    kv_project_ref(expected)
    for actual, wanted in zip(case.outputs, expected.outputs, strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert_close(actual.nan_to_num(), wanted.nan_to_num(), operations=2)


@searched
@given(problems(), st.randoms())
def test_order_and_grouping_of_tokens_do_not_matter(case: Case, random) -> None:
    """All at once, or in two calls of shuffled tokens: each row is what it is."""
    together, tokens = case.with_new_outputs(), case[0].hidden_states.shape[0]
    config = ProjectSpliceConfig(16, 32, 16, 4, 2)
    project_splice(together, config)
    order = random.sample(range(tokens), tokens)
    cut = random.randint(0, tokens)
    for some in (order[:cut], order[cut:]):
        names = ["hidden_states", "rstd", "cos", "sin"] if case[0].positions is None else ["hidden_states", "rstd"]
        part = case.change(
            lambda layer, names=names, some=some: {
                name: value[some] for name in names if (value := getattr(layer, name)) is not None
            },
            positions=None if case[0].positions is None else case[0].positions[some],
            slot_mapping=case[0].slot_mapping[some],
        )
        if case[0].q is not None:
            part = part.change(lambda layer, some=some: {"q": torch.empty_like(layer.q[: len(some)])})
        project_splice(part, config)
        for piece, whole in zip(part.tensors("q"), together.tensors("q"), strict=True):
            compare(piece, whole[some])
    for one, other in zip(case.caches, together.caches, strict=True):
        compare(one, other)


def compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bitwise, or in float32 up to what BLAS, which the interpreter multiplies with, makes of a row's place in a tile."""
    assert torch.equal(actual.isnan(), expected.isnan())
    if expected.dtype == torch.float32:
        assert_close(actual.nan_to_num(), expected.nan_to_num())
    else:
        assert_bitwise_equal(actual, expected)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """NaN of a shape, with its dimensions in any order in memory, gaps between them, and room in front."""
    order = draw(st.permutations(range(len(shape) - 1)))
    padded = [size + draw(st.integers(0, 2)) for size in shape]
    memory = poisoned(tuple(padded[d] for d in order) + (padded[-1],), torch.float32, "cpu")
    inverse = [order.index(d) for d in range(len(shape) - 1)]
    return memory.permute(*inverse, len(shape) - 1)[tuple(slice(0, size) for size in shape)]


@st.composite
def splices(draw: st.DrawFn) -> dict:
    batch, heads, tokens, blocks, block_size = (draw(st.integers(1, top)) for top in (2, 3, 9, 4, 7))
    head_dim = 2 * draw(st.integers(1, 20))
    half = draw(st.integers(0, head_dim // 2))
    slots = draw(st.permutations(range(-batch * tokens, blocks * block_size)))[: batch * tokens]
    torch.manual_seed(draw(st.integers(0, 1000)))
    sources = [draw(tensors((batch, heads, tokens, head_dim))) for _ in "kv"]
    for source in sources:
        source.normal_()
    angles = torch.rand(batch * tokens, half) * 6
    return {
        "sources": sources,
        "caches": [draw(tensors((blocks, heads, block_size, head_dim))) for _ in "kv"],
        "slots": torch.tensor([max(slot, -1) for slot in slots]),
        "rotation": (angles.cos(), angles.sin()) if half else (None, None),
    }


@searched
@given(splices())
def test_a_splice_puts_each_row_in_its_slot_and_nothing_elsewhere(case: dict) -> None:
    """The kernel and the operator against loops over tokens and heads."""
    (k, v), (k_cache, v_cache), slots = case["sources"], case["caches"], case["slots"]
    cos, sin = case["rotation"]
    by_kernel = [cache.clone() for cache in (k_cache, v_cache)]
    kv_splice(k, v, None, None, cos, sin, slots, False, *by_kernel, None, None)
    ops.kv_splice(k, v, k_cache, v_cache, slots, cos=cos, sin=sin)
    expected = [torch.full_like(cache, float("nan")) for cache in (k_cache, v_cache)]
    block_size, tokens = k_cache.shape[2], k.shape[2]
    for index, slot in enumerate(slots.tolist()):
        for head in range(k.shape[1]) if slot >= 0 else ():
            row = k[index // tokens, head, index % tokens].clone()
            if cos is not None:
                half = cos.shape[1]
                first, second = row[:half].clone(), row[half : 2 * half].clone()
                row[:half] = first * cos[index] - second * sin[index]
                row[half : 2 * half] = second * cos[index] + first * sin[index]
            expected[0][slot // block_size, head, slot % block_size] = row
            expected[1][slot // block_size, head, slot % block_size] = v[index // tokens, head, index % tokens]
    for actual in ((k_cache, v_cache), by_kernel):
        assert torch.equal(actual[0].isnan(), expected[0].isnan())
        assert_close(actual[0].nan_to_num(), expected[0].nan_to_num())
        assert_bitwise_equal(actual[1].contiguous(), expected[1].contiguous())


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    batch, rows, keys, kv_heads, group, blocks, block_size = (
        draw(st.integers(1, top)) for top in (2, 9, 24, 2, 3, 4, 9)
    )
    head_dim, total = 2 * draw(st.integers(1, 20)), blocks * block_size
    torch.manual_seed(draw(st.integers(0, 1000)))
    q, *caches = (
        draw(tensors(shape)).normal_()
        for shape in ((batch, rows, kv_heads * group, head_dim), *[(blocks, kv_heads, block_size, head_dim)] * 2)
    )
    return Attention(
        q, *caches,
        key_slots=torch.randint(-1, total, (batch, keys)), positions=torch.randint(-1, keys + 2, (batch, rows)),
        scale=draw(st.sampled_from([0.1, 1.0])), window=draw(st.sampled_from([None, 1, 7])),
        softcap=draw(st.sampled_from([None, 2.0])), sinks=torch.randn(kv_heads * group) if draw(st.booleans()) else None,
    )  # fmt: skip


@settings(searched, max_examples=10)
@given(attentions())
def test_the_attention_kernels_are_their_references(case: Attention) -> None:
    """Caches have any strides, and slots that several positions share."""
    for of, kernel, expected, fresh in (
        (case.peaks_of, attention_peaks, reference.attention_peaks_ref, case.new_peaks),
        (case.rows_of, attend_rows, reference.attend_rows_ref, case.new_rows),
    ):
        assert_close(of(partial(kernel, "sm_90"), fresh()), of(expected, fresh()), operations=2)


@cheap
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 5), st.booleans())
def test_packed_slots_are_those_of_a_loop(lengths: list[int], padding: int, block_size: int, paged: bool) -> None:
    pages = -(-max(lengths) // block_size) or 1
    table = torch.randperm(len(lengths) * pages).view(len(lengths), pages) if paged else None
    rows = block_size if paged else max(*lengths, 1, block_size)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions, slots = ops.packed_slots(cu_seqlens, sum(lengths) + padding, rows, table)
    expected = []
    for sequence, length in enumerate(lengths):
        for position in range(length):
            block = sequence if table is None else int(table[sequence, position // rows])
            expected.append((position, block * rows + (position if table is None else position % rows)))
    expected += [(0, -1)] * padding
    assert list(zip(positions.tolist(), slots.tolist(), strict=True)) == expected
    assert positions.dtype == slots.dtype == torch.int64


@cheap
@given(st.data())
def test_views_overlap_when_they_share_an_element(data: st.DataObject) -> None:
    """Two views of the same strides, nested as those of real caches are or any others: exactly."""
    whole = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    strides, step = [], 1
    for size in reversed(whole):
        step *= data.draw(st.integers(1, 3))
        strides.insert(0, step)
        step *= size
    if data.draw(st.booleans()):
        strides = [data.draw(st.integers(0, 12)) for _ in whole]
    memory = torch.zeros(1500)
    views, touched = [], []
    for _ in range(2):
        shape, offset = tuple(data.draw(st.integers(1, size)) for size in whole), data.draw(st.integers(0, 60))
        views.append(torch.as_strided(memory, shape, tuple(strides), offset))
        places = itertools.product(*(range(size) for size in shape))
        touched.append({offset + sum(i * s for i, s in zip(place, strides, strict=True)) for place in places})
    assert _overlap(*views) == bool(touched[0] & touched[1])


@cheap
@given(st.data())
def test_each_element_is_its_own_where_strides_are_nested(data: st.DataObject) -> None:
    """Never otherwise; layouts that are not nested are refused, though some of them have their elements apart."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    strides = tuple(data.draw(st.integers(0, 12)) for _ in shape)
    elements = torch.arange(200).as_strided(shape, strides)
    if _is_nested(elements):
        assert len(elements.unique()) == elements.numel()
    dense = torch.empty(shape).permute(data.draw(st.permutations(range(len(shape)))))
    assert _is_nested(dense)
    assert _is_nested(dense[..., :1])


@cheap
@given(st.data())
def test_tensors_are_separate_where_no_element_that_is_written_is_anothers(data: st.DataObject) -> None:
    """Blocks of a grid, which may lie side by side, as one or several layers of a few arguments."""
    grid = torch.arange(100.0).view(10, 10)
    arguments: dict[bool, list[tuple[str, list[torch.Tensor]]]] = {}
    for is_written in (False, True):
        shapes = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=2))
        arguments[is_written] = []
        for rows, columns in shapes:
            corners = st.tuples(st.integers(0, 10 - rows), st.integers(0, 10 - columns))
            layers = [
                grid[row:, column:][:rows, :columns]
                for row, column in data.draw(st.lists(corners, min_size=1, max_size=2))
            ]
            arguments[is_written].append((f"argument {len(arguments[is_written])}", layers))
    read, written = (
        [set(tensor.flatten().tolist()) for _, tensors in arguments[is_written] for tensor in tensors]
        for is_written in (False, True)
    )
    pairs = (*itertools.combinations(written, 2), *itertools.product(read, written))
    if any(one & other for one, other in pairs):
        with pytest.raises(ValueError, match="argument .: expected memory of its own, got some of"):
            check_separate(arguments[False], arguments[True])
    else:
        check_separate(arguments[False], arguments[True])
