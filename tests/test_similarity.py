"""Mean cosines from sums against all pairs, one pair at a time."""

import math
from itertools import combinations

import pytest
import torch
from torch.nn.functional import normalize

from lens_probes.maths.similarity import mean_pairwise_cosine

pytestmark = pytest.mark.filterwarnings("error")


def unit_vectors(n: int, d_model: int = 7, *, lean: float = 0.0, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(drawn + lean, dim=-1)


def over_all_pairs(vectors: torch.Tensor) -> float:
    cosines = [math.fsum((a * b).tolist()) for a, b in combinations(vectors, 2)]
    return math.fsum(cosines) / len(cosines)


@pytest.mark.parametrize("n", [2, 3, 4, 17, 60])
@pytest.mark.parametrize("lean", [0.0, 0.5, 20.0])
def test_the_mean_cosine_is_that_over_all_pairs(n, lean):
    vectors = unit_vectors(n, lean=lean)
    found = mean_pairwise_cosine(vectors.sum(0), torch.tensor(n))
    assert found.item() == pytest.approx(over_all_pairs(vectors), abs=1e-12)


def test_every_unit_has_its_own_mean_and_number():
    numbers = torch.tensor([[2, 5, 1], [9, 0, 3]])
    sums = torch.zeros(2, 3, 7, dtype=torch.float64)
    expected = torch.full((2, 3), torch.nan, dtype=torch.float64)
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        n = int(numbers[row, column])
        vectors = unit_vectors(n, lean=0.3, seed=3 * row + column)
        sums[row, column] = vectors.sum(0)
        if n > 1:
            expected[row, column] = over_all_pairs(vectors)
    torch.testing.assert_close(mean_pairwise_cosine(sums, numbers), expected, equal_nan=True, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_vectors_have_no_mean(n):
    assert math.isnan(mean_pairwise_cosine(unit_vectors(n).sum(0), torch.tensor(n)).item())


def test_the_mean_cosine_of_cases_by_hand():
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for vectors, expected in (
        ([right, right], 1.0),
        ([right, -right], -1.0),
        ([right, up], 0.0),
        ([right, right, up], 1 / 3),  # of three pairs one is equal
        ([right, up, -right, -up], -1 / 3),  # the least that four can have
    ):
        found = mean_pairwise_cosine(torch.stack(vectors).sum(0), torch.tensor(len(vectors)))
        assert found.item() == pytest.approx(expected, abs=1e-12)


def test_float32_sums_and_many_vectors_stay_in_range():
    for n in (10**6, 10**9):  # n (n - 1) is far beyond 32 bits
        all_alike = mean_pairwise_cosine(torch.tensor([float(n), 0.0]), torch.tensor(n))
        none_left = mean_pairwise_cosine(torch.tensor([0.0, 0.0]), torch.tensor(n))
        assert all_alike.item() == pytest.approx(1.0, abs=1e-12)
        assert none_left.item() == pytest.approx(-1 / (n - 1), rel=1e-9)
        assert all_alike.dtype == torch.float64


def test_random_directions_have_a_mean_near_zero():
    n, d_model = 400, 64
    vectors = unit_vectors(n, d_model)
    found = mean_pairwise_cosine(vectors.sum(0), torch.tensor(n)).item()
    # A cosine of random directions has variance 1 / d_model, and those of different pairs are uncorrelated.
    assert abs(found) < 4 / math.sqrt(d_model * n * (n - 1) / 2)
