"""Tokens found by their states, one after the other: candidates are checked in an order that gradients give.

Two orders take turns. With J the derivative of the state at an embedding e0, h its state and h* the goal:

    downhill[v]  = (J^T (h - h*)) . e[v] / |e[v]|           the gradient of the squared error, along embeddings
                                                            of equal length: norms before layers keep the direction only
    predicted[v] = sum over r of (r . (h - h* + J (e[v] - e0)))^2         the error that Gauss and Newton predict,
                                                                          in a few random directions r

Both divide the state's dimensions by their spread over the candidates seen: a few huge ones would outweigh all others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BATCH = 32  # candidates checked between two gradients
SPREAD_OF = 512  # the latest candidates, over which the spread of dimensions is taken


class Following(NamedTuple):
    """What follows a prefix: the states of tokens, and those of embeddings, through which gradients flow."""

    states: Callable[[Int[Tensor, " candidate"]], Float[Tensor, "candidate d"]]
    soft: Callable[[Float[Tensor, "copy d_model"]], Float[Tensor, "copy d"]]


class Search(NamedTuple):
    """What a search for one token came to: its id (-1: it gave up), candidates checked, gradients computed."""

    found: int
    tried: int
    gradients: int


def one_by_one(
    after: Callable[[Int[Tensor, " prefix"]], Following],
    given: Int[Tensor, " token"],
    goal: Float[Tensor, "token d"],
    vocabulary: Float[Tensor, "vocab d_model"],
    directions: Float[Tensor, "direction d"],
    tolerance: float,
    max_candidates: int,
) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"], int]:
    """The ids found, the candidates checked for each (-1 where there was no search), and the gradients computed.

    `after` gives what follows a prefix. Tokens of `given` that are no -1 are taken as they are. The search ends with
    the first token that is not found: this and those after it are -1.
    """
    found, tried, gradients = torch.full_like(given, -1), torch.full_like(given, -1), 0
    for t, known in enumerate(given.tolist()):
        if known >= 0:
            found[t] = known
            continue
        following = after(found[:t])
        search = first_within(following, goal[t], vocabulary, directions, tolerance, max_candidates)
        found[t], tried[t] = search.found, search.tried
        gradients += search.gradients
        if search.found < 0:
            break
    return found, tried, gradients


def first_within(
    following: Following,
    goal: Float[Tensor, " d"],
    vocabulary: Float[Tensor, "vocab d_model"],
    directions: Float[Tensor, "direction d"],
    tolerance: float,
    max_candidates: int,
) -> Search:
    """The closest token of the first batch that has one whose state is within tolerance |goal| of the goal.

    The first gradient is taken at the mean embedding, the next ones at the latest batch's closest candidate and at the
    closest so far, in turns.
    """
    untried = torch.ones(len(vocabulary), dtype=torch.bool, device=vocabulary.device)
    lengths = vocabulary.norm(dim=-1).clamp(min=1e-12)
    start = best = vocabulary.mean(0)
    weight, seen = torch.ones_like(goal), goal.new_empty(0, len(goal))
    closest, tried, gradients = torch.inf, 0, 0
    while tried < max_candidates and untried.any():
        orders = _orders(following.soft, start, goal, vocabulary, lengths, directions, weight)
        candidates = _first(orders, untried, min(BATCH, max_candidates - tried, int(untried.sum())))
        untried[candidates] = False
        gradients, tried = gradients + 1, tried + len(candidates)
        checked = following.states(candidates)
        distances = (checked - goal).norm(dim=-1)
        nearest = int(distances.argmin())
        if distances[nearest] <= tolerance * goal.norm():
            return Search(int(candidates[nearest]), tried, gradients)
        latest = vocabulary[candidates[nearest]]
        if distances[nearest] < closest:
            closest, best = float(distances[nearest]), latest
        start = best if gradients % 2 else latest  # the best alone is a trap where states lie dense
        seen = torch.cat([seen, checked])[-SPREAD_OF:]
        if len(seen) > 1:
            spread = seen.std(0)
            weight = 1 / (spread + 1e-3 * spread.mean()).clamp(min=1e-12)
    return Search(-1, tried, gradients)


def _orders(
    soft: Callable[[Float[Tensor, "copy d_model"]], Float[Tensor, "copy d"]],
    start: Float[Tensor, " d_model"],
    goal: Float[Tensor, " d"],
    vocabulary: Float[Tensor, "vocab d_model"],
    lengths: Float[Tensor, " vocab"],
    directions: Float[Tensor, "direction d"],
    weight: Float[Tensor, " d"],
) -> Float[Tensor, "order vocab"]:
    """`predicted` and `downhill` of every entry at one embedding: the smaller, the more promising."""
    at = start.expand(len(directions) + 1, -1).clone().requires_grad_()
    reached = soft(at)
    error = (reached[0] - goal).detach()
    along = torch.cat([directions * weight, (error * weight**2)[None]])
    (slopes,) = torch.autograd.grad((reached * along).sum(), at)  # along J, one row per direction
    change = vocabulary @ slopes.T
    predicted = (change + (along @ error - slopes @ start))[:, :-1].square().sum(-1)
    return torch.stack([predicted, change[:, -1] / lengths])


def _first(orders: Float[Tensor, "order vocab"], untried: Bool[Tensor, " vocab"], n: int) -> Int[Tensor, " candidate"]:
    """The first n untried entries, one order after the other having its turn."""
    firsts = orders.masked_fill(~untried, torch.inf).topk(n, largest=False).indices
    return torch.tensor(list(dict.fromkeys(firsts.T.flatten().tolist()))[:n])
