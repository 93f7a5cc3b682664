"""The normal equations against an independent solver, and what real rows do to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droidspeak_ops.fitting.ridge import NormalEquations

STRENGTHS = [1e-9, 0.01, 1.0]


def problem(rows: int, inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(rows, inputs) * random(inputs).exp() + random(inputs)
    return x, x @ random(inputs, outputs) + random(rows, outputs), random(rows).abs() + 0.1


def by_least_squares(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, strength: float) -> tuple:
    """The same minimum by a QR-based solver: the penalty as further rows, the bias as a column without one."""
    mean = (weights[:, None] * x).sum(0) / weights.sum()
    variance = (weights[:, None] * (x - mean) ** 2).sum(0).mean()
    root = weights.sqrt()[:, None]
    penalty = (strength * variance).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    left = torch.cat([root * torch.nn.functional.pad(x, (0, 1), value=1.0), torch.nn.functional.pad(penalty, (0, 1))])
    right = torch.cat([root * y, torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)])
    solution = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(12, 60), inputs=st.integers(1, 10), outputs=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_the_minimum_is_that_of_another_solver(rows: int, inputs: int, outputs: int, seed: int) -> None:
    x, y, weights = problem(rows, inputs, outputs, seed)
    equations = NormalEquations(inputs, outputs)
    equations.add(x, y, weights)
    for strength in STRENGTHS:
        solution = equations.solve(strength)
        weight, bias = by_least_squares(x, y, weights, strength)
        torch.testing.assert_close(solution.weight, weight, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(solution.bias, bias, rtol=1e-6, atol=1e-7)
        error = (weights * (y - x @ weight.T - bias).square().sum(-1)).sum() / weights.sum()
        assert float(equations.losses(solution).sum()) == pytest.approx(float(error), rel=1e-6)


def test_the_order_of_batches_does_not_matter() -> None:
    x, y, weights = problem(300, 20, 5, seed=1)
    solutions = []
    for order in (range(0, 300, 30), reversed(range(0, 300, 30))):
        equations = NormalEquations(20, 5)
        for start in order:
            some = slice(start, start + 30)
            equations.add(x[some], y[some], weights[some])
        solutions.append(equations.solve(0.1))
    torch.testing.assert_close(solutions[0].weight, solutions[1].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strength", [1e-6, 0.01])
def test_inputs_that_do_not_vary_or_repeat_others(strength: float) -> None:
    """Fewer directions than inputs, and fewer rows than inputs: finite, and as good as without them."""
    x, y, weights = problem(200, 6, 3, seed=2)
    equations, redundant = NormalEquations(6, 3), NormalEquations(20, 3)
    equations.add(x, y, weights)
    wide = torch.cat([x, x, torch.full((200, 8), 3.0)], dim=1)
    redundant.add(wide, y, weights)
    solution = redundant.solve(strength)
    assert solution.weight.isfinite().all()
    assert redundant.losses(solution).sum() <= 1.05 * equations.losses(equations.solve(strength)).sum()
    few = NormalEquations(50, 3)
    few.add(torch.randn(10, 50), torch.randn(10, 3))
    assert few.solve(strength).weight.isfinite().all()
    assert NormalEquations(4, 2).solve(strength).weight.eq(0).all(), "no rows at all"


def test_sums_of_parts_are_those_of_the_whole() -> None:
    x, y, weights = problem(90, 5, 2, seed=3)
    whole, parts = NormalEquations(5, 2), [NormalEquations(5, 2) for _ in range(3)]
    whole.add(x, y, weights)
    for part, rows in zip(parts, torch.arange(90).chunk(3), strict=True):
        part.add(x[rows], y[rows], weights[rows])
    torch.testing.assert_close(NormalEquations.total(parts).solve(0.1).weight, whole.solve(0.1).weight)


def test_a_strength_for_each_output() -> None:
    x, y, weights = problem(60, 5, 2, seed=5)
    equations = NormalEquations(5, 2)
    equations.add(x, y, weights)
    both = equations.solve(torch.tensor([0.01, 1.0]))
    for output, strength in enumerate((0.01, 1.0)):
        alone = equations.solve(strength)
        torch.testing.assert_close(both.weight[output], alone.weight[output])
        torch.testing.assert_close(both.bias[output], alone.bias[output])


def test_inputs_of_very_different_size() -> None:
    """A column ten thousand times the others, as a massive activation may be, leaves the rest to be fitted."""
    x, truth = torch.randn(500, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    x[:, 5] *= 1e4
    truth[:, 5] *= 1e-4
    equations = NormalEquations(12, 3)
    equations.add(x, x @ truth.T)
    torch.testing.assert_close(equations.solve(1e-15).weight, truth, rtol=1e-6, atol=1e-6)


def test_rows_that_are_huge_count_as_little_as_they_are_weighted() -> None:
    x, truth = torch.randn(500, 12), torch.randn(3, 12)
    y = x @ truth.T
    x[17], y[17] = 1e4 * x[17], -1e6
    weights = torch.ones(500)
    weights[17] = 1e-14
    equations = NormalEquations(12, 3)
    equations.add(x, y, weights)
    torch.testing.assert_close(equations.solve(1e-12).weight.float(), truth, rtol=1e-3, atol=1e-3)


def test_rows_in_float32_lose_nothing_by_being_many() -> None:
    x, y, _ = problem(4000, 8, 2, seed=4)
    exact, streamed = NormalEquations(8, 2), NormalEquations(8, 2)
    exact.add(x.float().double(), y.float().double())
    for start in range(0, 4000, 7):
        streamed.add(x[start : start + 7].float(), y[start : start + 7].float())
    torch.testing.assert_close(streamed.solve(0.01).weight, exact.solve(0.01).weight, rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(30, 80), inputs=st.integers(1, 10), seed=st.integers(0, 2**31))
def test_whitened_inputs_have_unit_variance(rows: int, inputs: int, seed: int) -> None:
    x, y, weights = problem(rows, inputs, 1, seed)
    equations = NormalEquations(inputs, 1)
    equations.add(x, y, weights)
    mean, whitening = equations.whitening(1e-9)
    left = (x - mean) @ whitening.T
    covariance = left.T @ (weights[:, None] * left) / weights.sum()
    torch.testing.assert_close(covariance, torch.eye(inputs, dtype=x.dtype), atol=1e-4, rtol=0)


def test_whitening_where_inputs_do_not_vary() -> None:
    equations = NormalEquations(3, 1)
    equations.add(torch.ones(10, 3), torch.ones(10, 1))
    mean, whitening = equations.whitening(0.01)
    assert torch.equal(mean, torch.ones(3, dtype=torch.float64))
    assert torch.isfinite(whitening).all()
