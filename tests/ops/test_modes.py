"""The operators under torch's modes: results are the same in each, or the call is refused by name."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from support.cases import call, projection
from support.compare import assert_bitwise_equal
from torch.autograd import forward_ad

from droidspeak_ops import ops
from droidspeak_ops.kernels.arguments import to_operator
from droidspeak_ops.ops import library, tuning

Call = Callable[[torch.Tensor], list[torch.Tensor]]

SLOTS = torch.arange(5)


def rms_rstd(x: torch.Tensor) -> list[torch.Tensor]:
    return [ops.rms_rstd(x, 1e-6)]


def row_norm(x: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.linspace(0.5, 2, 16)
    return [ops.row_norm(x, weight, 1e-6, norm_order=order) for order in ("llama", "gemma", "olmo")]


def project(x: torch.Tensor, norm: str, *, implementation: Callable[..., None] | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    case = projection(tokens=5, hidden=16, layers=2, q_heads=2, kv_heads=1, head_dim=8, bias=True, head_norm="each")
    weight = torch.rand(16) if norm == "hf" else None
    case = case.change(norm=norm, norm_weight=weight, hidden_states=x)
    if implementation is not None:
        implementation(*to_operator(case))
        return case.outputs
    ops.qkv_project(case[0])
    ops.kv_project_layers(case.without_q()[1:])
    return case.outputs[::2]


def kv_project_hf(x: torch.Tensor) -> list[torch.Tensor]:
    return project(x, "hf")


def kv_project_folded(x: torch.Tensor) -> list[torch.Tensor]:
    return project(x, "folded")


def kv_splice(x: torch.Tensor) -> list[torch.Tensor]:
    """Rotated and encoded, and from codes back to floating rows."""
    rows, angle = x.view(1, 2, 5, 8), torch.linspace(0, 6, 20).view(5, 4)
    codes, scales, back = (
        torch.zeros(2, 1, 2, 6, 8, dtype=torch.int8),
        torch.zeros(2, 1, 2, 6),
        torch.zeros(2, 1, 2, 6, 8),
    )
    written = dict(zip(("k_cache_scale", "v_cache_scale"), scales, strict=True))
    ops.kv_splice(rows, rows, *codes, SLOTS, cos=angle.cos(), sin=angle.sin(), **written)
    ops.kv_splice(rows, rows, *back, SLOTS, cos=angle.cos(), sin=angle.sin())
    return [codes, scales, back]


def attention_peaks(x: torch.Tensor) -> list[torch.Tensor]:
    peaks = torch.zeros(1, 5)
    ops.attention_peaks(x.view(1, 5, 2, 8), x.view(1, 1, 10, 8), SLOTS[None], SLOTS[None], peaks, scale=0.5)
    return [peaks]


def attend_rows(x: torch.Tensor) -> list[torch.Tensor]:
    out, cache = torch.zeros(1, 5, 2, 8), x.view(1, 1, 10, 8)
    ops.attend_rows(x.view(1, 5, 2, 8), cache, cache, SLOTS[None], SLOTS[None], out, scale=0.5, softcap=2.0)
    return [out]


def helpers(x: torch.Tensor) -> list[torch.Tensor]:
    rotation = ops.rotation_between(x[:, :8].cos(), x[:, :8].sin(), x[:, 8:].cos(), x[:, 8:].sin())
    return [*rotation, *(ops.fold_norm_weight(x, x[0], norm_order=order) for order in ("llama", "gemma"))]


OPERATORS: dict[str, Call] = {
    each.__name__: each
    for each in (rms_rstd, row_norm, kv_project_hf, kv_project_folded, kv_splice, attention_peaks, attend_rows)
}


def rows() -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operator", [*OPERATORS.values(), helpers])
def test_a_mode_changes_no_bit(operator: Call, mode: str) -> None:
    expected = operator(rows())
    with MODES[mode]():
        actual = operator(rows())
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise_equal(one, other)


def test_autocast_does_not_change_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("nothing is interpreted")
    monkeypatch.setattr(tuning, "target", lambda device: "sm_90")
    expected = project(rows(), "hf", implementation=library._kv_project_gpu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = project(rows(), "hf", implementation=library._kv_project_gpu)
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter_to_a_splice(dtype: torch.dtype) -> None:
    k, angle = rows().view(1, 2, 5, 8), torch.rand(5, 4)

    def spliced() -> torch.Tensor:
        caches = torch.zeros(2, 1, 2, 6, 8, dtype=torch.float32)
        ops.kv_splice(k, k, *caches, SLOTS, cos=angle.cos(), sin=angle.sin())
        return caches

    expected = spliced()
    with default_dtype(dtype):
        assert_bitwise_equal(spliced(), expected)


@pytest.mark.parametrize("operator", OPERATORS.values())
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap", "jacfwd"])
def test_transforms_of_functions_are_refused(operator: Call, transform: str) -> None:
    def scalar(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([result.float().nan_to_num().sum() for result in operator(x)]).sum()

    transforms: dict[str, Callable[[], object]] = {
        "grad": lambda: torch.func.grad(scalar)(rows()),
        "vjp": lambda: torch.func.vjp(scalar, rows()),
        "jvp": lambda: torch.func.jvp(scalar, (rows(),), (rows(),)),
        "vmap": lambda: torch.func.vmap(scalar, randomness="same")(rows()[None]),
        "jacfwd": lambda: torch.func.jacfwd(scalar, randomness="same")(rows()),
    }
    name = operator.__name__.removesuffix("_hf").removesuffix("_folded")
    with pytest.raises(ValueError, match=f"{name}: expected a call outside of torch.func's transforms .* forward only"):
        transforms[transform]()


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_tangents_are_refused(operator: Call) -> None:
    expected = operator(rows())
    with forward_ad.dual_level():
        name = {kv_splice: "k", attention_peaks: "q", attend_rows: "q"}.get(operator, "hidden_states")
        with pytest.raises(ValueError, match=f"{name}: expected no tangent, since the operators are forward only"):
            operator(forward_ad.make_dual(rows(), torch.ones(5, 16)))
        for one, other in zip(operator(rows()), expected, strict=True):  # a level alone does no harm
            assert_bitwise_equal(one, other)


def test_a_tangent_of_any_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the implementation for a GPU too."""
    case = projection(tokens=5, hidden=16, kv_heads=1, head_dim=8)
    for name, implementation in (
        ("v_weight", torch.ops.droidspeak_ops.kv_project),
        ("cos", library._kv_project_gpu),
        ("k_cache", library._kv_project_gpu),
    ):
        with forward_ad.dual_level():
            tensor = getattr(case[0], name)
            dual = case[0]._replace(**{name: forward_ad.make_dual(tensor, torch.ones_like(tensor))})
            with pytest.raises(ValueError, match=f"{name}: expected no tangent"):
                implementation(*to_operator([dual]))
    assert all(cache.isnan().all() for cache in case.caches)


def test_what_requires_a_gradient_is_read_without_one() -> None:
    """A plain model's parameters, with and without torch.no_grad, and what they make of its inputs."""
    case = projection(tokens=9)
    expected = case.with_new_outputs()
    call(expected)
    changes = {name: torch.nn.Parameter(getattr(case[0], name)) for name in ("k_weight", "v_weight")}
    changes["hidden_states"] = case[0].hidden_states.clone().requires_grad_() * 1
    call(case, **changes)
    for cache, wanted in zip(case.caches, expected.caches, strict=True):
        assert not cache.requires_grad
        assert_bitwise_equal(cache, wanted)


@pytest.mark.parametrize("leaf", [True, False])
def test_outputs_that_require_a_gradient_are_refused(leaf: bool) -> None:
    """A graph would go on with what was there before; torch.no_grad says that none is meant."""
    case = projection(tokens=9)
    k_cache = case[0].k_cache.clone().requires_grad_()
    if not leaf:
        k_cache = k_cache * 1
    with pytest.raises(ValueError, match="k_cache: expected a tensor to write to that requires no gradient"):
        call(case, k_cache=k_cache)
    assert k_cache.isnan().all()
    with torch.no_grad():
        call(case, k_cache=k_cache)
    assert k_cache[:, :, :9].isfinite().all()


def test_caches_made_in_inference_mode_are_written_outside_of_it() -> None:
    case = projection(tokens=9)
    with torch.inference_mode():
        made = case.with_new_outputs()
    call(case)
    call(made)
    for one, other in zip(made.caches, case.caches, strict=True):
        assert one.is_inference()
        assert_bitwise_equal(one, other)


def test_autograd_knows_that_a_kernel_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value saved for backward before a write is not taken for what is there now."""
    if torch.cuda.is_available():
        pytest.skip("nothing is interpreted")
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: None)
    monkeypatch.setattr(tuning, "target", lambda device: "sm_90")
    case = projection(tokens=9, q_heads=2)
    versions = [output._version for output in case.outputs]
    weight = torch.ones(1, requires_grad=True)
    product = (weight * case[0].k_cache).sum()
    library._kv_project_gpu(*to_operator(case))
    assert [output._version for output in case.outputs] == [version + 1 for version in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
