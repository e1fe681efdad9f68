"""Search for tokens by their states, one after the other. Gradients give the order in which candidates are checked.

Two orders alternate. With J the derivative of the state at an embedding e0, h its state and h* the goal:

    downhill[v]  = (J^T (h - h*)) . e[v] / |e[v]|           the gradient of the squared error, along embeddings
                                                            of equal length: norms before layers keep the direction only
    predicted[v] = sum over r of (r . (h - h* + J (e[v] - e0)))^2         the error that Gauss and Newton predict,
                                                                          in a few random directions r

Both divide each dimension of the state by its spread over the candidates seen: otherwise a few huge dimensions would
outweigh all others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BATCH = 32  # candidates checked between two gradients
SPREAD_OF = 512  # number of latest candidates over which the spread of a dimension is computed


class Following(NamedTuple):
    """The state of the next token after a prefix: of token ids, and of embeddings, through which gradients flow."""

    states: Callable[[Int[Tensor, " candidate"]], Float[Tensor, "candidate d"]]
    soft: Callable[[Float[Tensor, "copy d_model"]], Float[Tensor, "copy d"]]


class Search(NamedTuple):
    """The result of a search for one token: its id (-1 if it gave up), candidates checked, gradients computed."""

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

    `after` returns the `Following` of a prefix. Ids of `given` other than -1 are known and kept. The search ends at
    the first token that is not found: it and all later tokens are -1.
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
    """The closest token of the first batch in which a state lies within tolerance * |goal| of the goal.

    The first gradient is computed at the mean embedding. Later ones alternate between the latest batch's closest
    candidate and the closest candidate so far.
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
        start = best if gradients % 2 else latest  # from the best alone, a search gets stuck among dense states
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
    """`predicted` and `downhill` of every entry at one embedding; small values are promising."""
    at = start.expand(len(directions) + 1, -1).clone().requires_grad_()
    reached = soft(at)
    error = (reached[0] - goal).detach()
    along = torch.cat([directions * weight, (error * weight**2)[None]])
    (slopes,) = torch.autograd.grad((reached * along).sum(), at)  # along J, one row per direction
    change = vocabulary @ slopes.T
    predicted = (change + (along @ error - slopes @ start))[:, :-1].square().sum(-1)
    return torch.stack([predicted, change[:, -1] / lengths])


def _first(orders: Float[Tensor, "order vocab"], untried: Bool[Tensor, " vocab"], n: int) -> Int[Tensor, " candidate"]:
    """The first n untried entries, taken alternately from the orders."""
    firsts = orders.masked_fill(~untried, torch.inf).topk(n, largest=False).indices
    return torch.tensor(list(dict.fromkeys(firsts.T.flatten().tolist()))[:n])
