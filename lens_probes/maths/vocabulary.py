"""Streaming over the vocabulary: ranks, nearest entries and predictions; [layer, token, vocab] is never held at once.

Closeness of a state h to an entry w is a product plus a term of the entry alone, so that one matrix product orders the
vocabulary for every metric:

    cosine     h/|h| . w/|w|           score: the cosine, -1 to 1
    dot        h . w                   score: the product
    euclidean  h . w - |w|^2 / 2       score: the distance |h - w|, at least 0; the larger the closeness the smaller

All in float32, whatever the model's precision: in bfloat16 nearly half of all ranks are ties.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lens_probes.stopping import may_stop

Metric = Literal["cosine", "euclidean", "dot"]
METRICS: tuple[Metric, ...] = ("cosine", "euclidean", "dot")

ENTRIES = 2048  # vocabulary entries and states in one product: 8 MiB of scores, whatever the model
STATES = 1024
COLUMNS = 8  # of an entry that are hashed first: in trained models they tell nearly all entries apart

EqualEntries = tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]  # row, column, id


def ranks(
    states: Float[Tensor, "row d_model"],
    vocabulary: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "row k"],
    *,
    metric: Metric = "cosine",
    origin: Float[Tensor, " d_model"] | None = None,
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """How many vocabulary entries are strictly closer to each state than its target entries, and the targets' scores.

        rank[row, k] = #{w : closeness(h[row], w) > closeness(h[row], target[row, k])},   0 to vocab - 1

    The target itself is left out by its id, and so are entries equal to it number by number, which rounding would
    otherwise put on either side. A target of -1 gives rank -1 and score NaN, and so does a state or a target entry that
    is not finite; other entries that hold NaN are closer to no state. `origin` is subtracted from every entry.

    >>> ranks(torch.tensor([[1.0, 0.1]]), torch.eye(2), torch.tensor([[0, 1]]))[0]
    tensor([[0, 1]])
    """
    asked = _directions(states, metric)
    own = torch.empty(targets.shape, device=states.device)
    score = torch.empty_like(own) if metric == "euclidean" else own
    for first in range(0, len(asked), STATES):
        here = slice(first, first + STATES)
        entries = _entries(vocabulary[targets[here].clamp(min=0)], origin)
        own[here] = _closeness(asked[here], entries, metric)
        if metric == "euclidean":
            score[here] = _distance(states[here], entries)
    equal = _equal_entries(vocabulary, targets)

    closer = torch.zeros_like(targets)
    rooms = _rooms(2, min(STATES, len(asked)), asked)
    for start, block in _blocks(vocabulary, origin):
        key, shift = _directions(block, metric), _shift(block, metric)
        for first in range(0, len(asked), STATES):
            rows = asked[first : first + STATES]
            product, above = rooms(len(rows), len(key))
            _product(rows, key, shift, out=product)
            _count_closer(closer, own, equal, product, first, start, above)
    unknown = (targets < 0) | ~own.isfinite()
    return closer.masked_fill(unknown, -1), score.masked_fill(unknown, torch.nan)


def _count_closer(
    closer: Int[Tensor, "row k"],
    own: Float[Tensor, "row k"],
    equal: EqualEntries,
    product: Float[Tensor, "some entry"],
    first: int,
    start: int,
    above: Float[Tensor, "some entry"],
) -> None:
    """Add to `closer` the entries of a block, from `start` on, that are above `own` in the rows from `first` on.

    `above` is filled with 0 and 1: a processor compares and adds float32 faster than bool.
    """
    rows = slice(first, first + len(product))
    for k in range(closer.shape[1]):
        closer[rows, k] += torch.gt(product, own[rows, k, None], out=above).sum(-1).to(closer.dtype)
    row, column, entry = equal
    here = (entry >= start) & (entry < start + product.shape[1]) & (row >= first) & (row < rows.stop)
    r, k = row[here], column[here]
    counted = (product[r - first, entry[here] - start] > own[r, k]).to(closer.dtype)
    closer.index_put_((r, k), -counted, accumulate=True)


def nearest(
    states: Float[Tensor, "row d_model"],
    vocabulary: Float[Tensor, "vocab d_model"],
    k: int,
    *,
    metric: Metric = "cosine",
    origin: Float[Tensor, " d_model"] | None = None,
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """The k vocabulary entries closest to each state, closest first, and their scores.

    Entries that are not finite are close to no state. Where fewer than k are left, or the state itself is not finite,
    the id is -1 and the score NaN.

    >>> nearest(torch.tensor([[1.0, 0.1]]), torch.eye(2), 1)[0]
    tensor([[0]])
    """
    if not 1 <= k <= len(vocabulary):
        raise ValueError(
            f"the number of nearest entries must be 1 to {len(vocabulary)}, the size of the vocabulary; got {k}"
        )
    asked = _directions(states, metric)
    best = asked.new_full((len(asked), 0), 0.0)
    ids = torch.zeros(len(asked), 0, dtype=torch.int64, device=asked.device)
    for start, block in _blocks(vocabulary, origin):
        key, shift, unknown = _directions(block, metric), _shift(block, metric), ~block.sum(-1).isfinite()
        products = (_product(part, key, shift) for part in asked.split(STATES))
        if unknown.any():  # topk takes NaN for the largest
            products = (product.masked_fill_(unknown, -torch.inf) for product in products)
        here = [product.topk(min(k, len(block))) for product in products]
        best = torch.cat([best, torch.cat([part.values for part in here])], dim=1)
        ids = torch.cat([ids, torch.cat([part.indices for part in here]) + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]))
        ids = ids.gather(1, order)
    unknown = ~best.isfinite()
    if metric == "euclidean":
        rows = [
            _distance(states[i : i + 1], _entries(vocabulary[ids[i]], origin)[None]) for i in range(len(ids))
        ]  # one state at a time: [row, k, d_model] at once would be large
        best = torch.cat(rows) if rows else best
    return ids.masked_fill(unknown, -1), best.masked_fill(unknown, torch.nan)


class Predictions(NamedTuple):
    """What states predict over the vocabulary, and how far that is from what the last state predicts."""

    log_prob: Float[Tensor, "token layer target"]
    rank: Int[Tensor, "token layer target"]
    entropy: Float[Tensor, "token layer"]
    kl: Float[Tensor, "token layer"]
    top_ids: Int[Tensor, "token layer k"]
    top_log_prob: Float[Tensor, "token layer k"]


def predictions(
    states: Float[Tensor, "token layer d_model"],
    vocabulary: Float[Tensor, "vocab d_model"],
    bias: Float[Tensor, " vocab"],
    targets: Int[Tensor, "token target"],
    k: int,
    *,
    cap: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Predictions:
    """Read (normed) states as distributions p over the vocabulary, the last layer's as the final one, in one pass.

        logit[token, layer, v] = cap(h[token, layer] . w[v] + bias[v]),    p = softmax of it over v
        entropy  = -sum_v p log p                                          0 to log vocab, nats
        kl       = sum_v p_final (log p_final - log p)                     KL(final || layer), at least 0, nats
        log_prob = log p[target],  rank = #{v : logit[v] > logit[target]}  as in `ranks`; NaN and -1 for a target of -1

    Sums are kept relative to the largest logit so far, as a stable softmax does. `cap` acts on each logit alone and
    keeps their order. Where a state or an entry holds NaN there is no distribution: all is NaN, ranks and ids are -1.

    >>> states = torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])
    >>> read = predictions(states, torch.eye(2), torch.zeros(2), torch.tensor([[1]]), 1)
    >>> read.entropy[0, 0].exp(), read.rank[0, :, 0].tolist(), read.top_ids[0, :, 0].tolist()
    (tensor(2.), [0, 1], [0, 0])
    """
    n_tokens, n_layers, _ = states.shape
    asked, n_targets = states.float(), targets.shape[1]
    own_entries = vocabulary[targets.clamp(min=0)].float()
    own = torch.einsum("tld,tnd->tln", asked, own_entries) + bias[targets.clamp(min=0)].float()[:, None]
    own = cap(own).flatten(0, 1)
    equal = _equal_entries(vocabulary, targets.repeat_interleave(n_layers, 0), bias)
    closer = torch.zeros(n_tokens * n_layers, n_targets, dtype=torch.int64, device=asked.device)

    peak = asked.new_full((n_tokens, n_layers), -torch.inf)
    total, moment, cross = (asked.new_zeros(n_tokens, n_layers, dtype=torch.float64) for _ in range(3))
    best = asked.new_zeros(n_tokens, n_layers, 0)
    ids = torch.zeros(n_tokens, n_layers, 0, dtype=torch.int64, device=asked.device)
    at_once = max(1, STATES // n_layers)
    rooms = _rooms(2, at_once * n_layers, asked)
    for start, block in _blocks(vocabulary, None):
        shift, found = bias[start : start + len(block)].float(), []
        for first in range(0, n_tokens, at_once):
            here = slice(first, first + at_once)
            rows = asked[here].flatten(0, 1)
            logits, other = rooms(len(rows), len(block))
            logits = cap(torch.addmm(shift, rows, block.T, out=logits))
            _count_closer(closer, own, equal, logits, first * n_layers, start, other)
            logits, weights = (each.unflatten(0, (-1, n_layers)) for each in (logits, other))
            found.append(logits.topk(min(k, len(block))))
            before, peak[here] = peak[here].clone(), torch.maximum(peak[here], logits.amax(-1))
            shrink = (before - peak[here]).exp()
            torch.sub(logits, peak[here][..., None], out=weights).exp_()
            total[here] = total[here] * shrink + weights.sum(-1)
            cross[here] = cross[here] * shrink[:, -1:] + torch.einsum("tlv,tv->tl", logits, weights[:, -1])
            moment[here] = moment[here] * shrink + logits.mul_(weights).sum(-1)
        best = torch.cat([best, torch.cat([part.values for part in found])], dim=-1)
        ids = torch.cat([ids, torch.cat([part.indices for part in found]) + start], dim=-1)
        best, order = best.topk(min(k, best.shape[-1]))
        ids = ids.gather(-1, order)
    normaliser = peak + total.log()
    entropy = normaliser - moment / total
    kl = normaliser - cross / total[:, -1:] - entropy[:, -1:]
    unknown = (targets < 0)[:, None]
    log_prob = own.unflatten(0, (n_tokens, n_layers)) - normaliser[..., None]
    top_log_prob = (best - normaliser[..., None]).float()
    return Predictions(
        log_prob.clamp(max=0).float().masked_fill(unknown, torch.nan),
        closer.unflatten(0, (n_tokens, n_layers)).masked_fill(unknown | log_prob.isnan(), -1),
        entropy.clamp(min=0).float(),
        kl.clamp(min=0).float(),
        ids.masked_fill(top_log_prob.isnan(), -1),
        top_log_prob,
    )


def most_probable(
    states: Float[Tensor, "token d_model"],
    vocabulary: Float[Tensor, "vocab d_model"],
    bias: Float[Tensor, " vocab"],
    *,
    cap: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Int[Tensor, " token"]:
    """The entry that each (normed) state predicts first, as in `predictions`.

    >>> most_probable(torch.tensor([[0.0, 2.0]]), torch.eye(2), torch.zeros(2))
    tensor([1])
    """
    nothing = torch.empty(len(states), 0, dtype=torch.int64, device=states.device)
    return predictions(states[:, None], vocabulary, bias, nothing, 1, cap=cap).top_ids[:, 0, 0]


def kept(ids: Int[Tensor, "row k"], before: Int[Tensor, "row k"]) -> Float[Tensor, " row"]:
    """The share of each row's ids that are also in the same row of `before`, 0 to 1; k / vocab by chance.

    NaN where one of the ids is not known (-1).
    """
    shares = torch.stack([torch.isin(one, other).float().mean() for one, other in zip(ids, before, strict=True)])
    return shares.masked_fill((torch.minimum(ids, before) < 0).any(1), torch.nan)


def check_entries(vocabulary: Float[Tensor, "vocab d_model"], what: str) -> None:
    """Raise where an entry holds NaN or Inf, for what needs the mean or the spread of all of them."""
    unknown = (~vocabulary.isfinite().all(-1)).nonzero().flatten()
    if len(unknown):
        raise ValueError(
            f"{what} must be finite for every token id, since their mean or spread is needed here; got NaN or Inf for "
            f"{len(unknown):,} of {len(vocabulary):,}, first for id {int(unknown[0])}: check the model's weights"
        )


def _rooms(n: int, most_rows: int, like: Tensor) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Memory for n matrices of a block, taken once: fresh pages for each block would cost as much as a comparison."""
    rooms = [like.new_empty(most_rows * ENTRIES) for _ in range(n)]
    return lambda rows, entries: tuple(room[: rows * entries].view(rows, entries) for room in rooms)


def _blocks(
    vocabulary: Float[Tensor, "vocab d_model"], origin: Float[Tensor, " d_model"] | None
) -> Iterator[tuple[int, Float[Tensor, "entry d_model"]]]:
    """The vocabulary in float32, a block at a time, with the id of each block's first entry."""
    for start in range(0, len(vocabulary), ENTRIES):
        may_stop()
        yield start, _entries(vocabulary[start : start + ENTRIES], origin)


def _entries(
    rows: Float[Tensor, "... d_model"], origin: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "... d_model"]:
    return rows.float() if origin is None else rows.float() - origin.float()


def _directions(vectors: Float[Tensor, "... d_model"], metric: Metric) -> Float[Tensor, "... d_model"]:
    return normalize(vectors.float(), dim=-1) if metric == "cosine" else vectors.float()


def _product(
    asked: Float[Tensor, "row d_model"],
    key: Float[Tensor, "entry d_model"],
    shift: Float[Tensor, " entry"] | None,
    out: Float[Tensor, "row entry"] | None = None,
) -> Float[Tensor, "row entry"]:
    return torch.mm(asked, key.T, out=out) if shift is None else torch.addmm(shift, asked, key.T, out=out)


def _shift(entries: Float[Tensor, "... d_model"], metric: Metric) -> Float[Tensor, "..."] | None:
    return -entries.square().sum(-1) / 2 if metric == "euclidean" else None


def _closeness(
    asked: Float[Tensor, "row d_model"], entries: Float[Tensor, "row k d_model"], metric: Metric
) -> Float[Tensor, "row k"]:
    product = torch.einsum("rd,rkd->rk", asked, _directions(entries, metric))
    shift = _shift(entries, metric)
    return product if shift is None else product + shift


def _distance(states: Float[Tensor, "row d_model"], entries: Float[Tensor, "row k d_model"]) -> Float[Tensor, "row k"]:
    return (states.float()[:, None] - entries).norm(dim=-1)


def _equal_entries(
    vocabulary: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "row k"],
    bias: Float[Tensor, " vocab"] | None = None,
) -> EqualEntries:
    """Every (row, k, id) such that the entry (and bias) of that id equals the target's number by number; it is one.

    Entries are compared by a 64-bit hash of their bits: two of 250,000 different ones meet once in half a billion
    vocabularies.
    """
    keys = _hashes(vocabulary)
    if bias is not None:
        keys = keys * 31 + _hash(bias[:, None])
    hashes, order = keys.sort()
    own = torch.empty_like(hashes).scatter_(0, order, hashes)[targets.clamp(min=0)].flatten()
    left, right = torch.searchsorted(hashes, own), torch.searchsorted(hashes, own, right=True)
    number = torch.where(targets.flatten() >= 0, right - left, 0)
    which = torch.arange(len(number), device=number.device).repeat_interleave(number)
    within = torch.arange(len(which), device=number.device) - (number.cumsum(0) - number)[which]
    return which // targets.shape[1], which % targets.shape[1], order[left[which] + within]


def _hashes(vocabulary: Float[Tensor, "vocab d_model"]) -> Int[Tensor, " vocab"]:
    """A number for each entry, the same for equal ones: from a few of its columns, from all where these do not tell."""
    few = _hash(vocabulary[:, :: max(1, vocabulary.shape[1] // COLUMNS)])
    _, group, size = few.unique(return_inverse=True, return_counts=True)
    alike = size[group] > 1
    return few.index_put((alike,), torch.cat([_hash(block) for block in vocabulary[alike].split(ENTRIES)]))


def _hash(rows: Float[Tensor, "entry column"]) -> Int[Tensor, " entry"]:
    random = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=random) * 2 + 1
    bits = (rows.float() + 0.0).view(torch.int32).long()  # adding 0 makes -0 the same as 0
    mixed = bits * odd.to(rows.device)
    return (mixed ^ (mixed >> 32)).sum(-1)  # numbers of few digits (1 and -1) end in zeros, which a product keeps
