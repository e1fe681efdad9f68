"""The search token by token, where states are a linear map of sums of embeddings: what is found, given and given up."""

import pytest
import torch

from lens_probes.maths.token_search import Following, one_by_one

RANDOM = torch.Generator().manual_seed(0)
VOCABULARY, A = torch.randn(500, 12, generator=RANDOM), torch.randn(12, 12, generator=RANDOM)
DIRECTIONS = torch.randn(16, 12, generator=RANDOM)
IDS = torch.tensor([7, 499, 0, 31])
GOAL = VOCABULARY[IDS].cumsum(0) @ A


def after(prefix):
    """A state is a map of the sum of a token's embedding and those before it."""
    before = VOCABULARY[prefix].sum(0)
    return Following(lambda ids: (before + VOCABULARY[ids]) @ A, lambda embeddings: (before + embeddings) @ A)


def search(given, goal=GOAL, max_candidates=500):
    return one_by_one(after, torch.tensor(given), goal, VOCABULARY, DIRECTIONS, 1e-4, max_candidates)


def test_every_token_is_found_after_those_found_before_it():
    found, tried, gradients = search([-1, -1, -1, -1])
    assert torch.equal(found, IDS) and tried.tolist() == [32] * 4 and gradients == 4


def test_tokens_that_are_given_are_taken_and_not_searched_for():
    found, tried, gradients = search([7, -1, 0, -1])
    assert torch.equal(found, IDS) and tried.tolist() == [-1, 32, -1, 32] and gradients == 2


def test_the_search_ends_where_a_token_is_not_found():
    goal = GOAL.clone()
    goal[1] += 5.0  # of no token
    found, tried, gradients = search([-1, -1, -1, 31], goal)
    assert found.tolist() == [7, -1, -1, -1] and tried.tolist() == [32, 500, -1, -1]
    assert gradients == 1 + 16  # 500 candidates are 15 batches of 32 and one of 20


@pytest.mark.parametrize("most", [1, 33])
def test_no_more_candidates_are_checked_than_allowed(most):
    assert search([-1] * 4, GOAL + 5.0, most)[1].tolist() == [most, -1, -1, -1]
