"""Ranks and nearest entries against five words by hand and brute force in float64; ties, copies, blocks, precisions."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import stats
from torch.distributions import Categorical

from lens_probes.maths import vocabulary
from lens_probes.maths.vocabulary import METRICS, kept, nearest, ranks

pytestmark = pytest.mark.filterwarnings("error")

metrics = pytest.mark.parametrize("metric", METRICS)
origins = pytest.mark.parametrize("with_origin", [False, True], ids=["plain", "origin"])
HALVES = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def closeness(state: np.ndarray, entry: np.ndarray, metric: str) -> float:
    """Of one state and one entry, the larger the closer; the score, but for a distance its negative."""
    if metric == "euclidean":
        return -math.dist(state, entry)
    product = math.fsum(state * entry)
    if metric == "dot":
        return product
    lengths = math.hypot(*state) * math.hypot(*entry)
    return product / lengths if lengths else 0.0


def by_brute_force(states, entries, targets, metric, origin=None) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and scores, one state and one entry at a time in float64; equal entries are never closer.

    The data must leave no near tie, which float32 may put either way.
    """
    states, raw, targets = states.double().numpy(), entries.double().numpy(), targets.numpy()
    shifted = raw - (0.0 if origin is None else origin.double().numpy())
    rank = np.full(targets.shape, -1)
    score = np.full(targets.shape, np.nan)
    for row, state in enumerate(states):
        all_closeness = [closeness(state, entry, metric) for entry in shifted]
        for k, target in enumerate(targets[row]):
            if target >= 0:
                own = all_closeness[target]
                away = [abs(each - own) for i, each in enumerate(all_closeness) if (raw[i] != raw[target]).any()]
                assert all(not 0 < each < 1e-6 * max(1, abs(own)) for each in away), "choose another seed"
                rank[row, k] = sum(
                    each > own and not (raw[i] == raw[target]).all() for i, each in enumerate(all_closeness)
                )
                score[row, k] = -own if metric == "euclidean" else own
    return rank, score


def origin_of(entries: torch.Tensor, with_origin: bool) -> torch.Tensor | None:
    return entries.float().mean(0) + 0.1 if with_origin else None


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks of entries and of states, the last of each cut short."""
    monkeypatch.setattr(vocabulary, "ENTRIES", 7)
    monkeypatch.setattr(vocabulary, "STATES", 5)


# Five words by hand

FIVE = torch.tensor([[3.0, 4.0], [0.8, 0.6], [0.0, 5.0], [3.0, -4.0], [0.0, 0.0]])
BY_HAND = {
    # The state is (1, 0). Words 0 and 3 are mirror images of each other: always a tie.
    ("cosine", False): ([1, 0, 3, 1, 3], [0.6, 0.8, 0.0, 0.6, 0.0]),
    ("dot", False): ([0, 2, 3, 0, 3], [3.0, 0.8, 0.0, 3.0, 0.0]),
    ("euclidean", False): ([2, 0, 4, 2, 1], [math.sqrt(20), math.sqrt(0.4), math.sqrt(26), math.sqrt(20), 1.0]),
    # Less (3, 0) the words are (0, 4), (-2.2, 0.6), (-3, 5), (0, -4), (-3, 0).
    ("cosine", True): ([0, 3, 2, 0, 4], [0.0, -2.2 / math.sqrt(5.2), -3 / math.sqrt(34), 0.0, -1.0]),
    ("dot", True): ([0, 2, 3, 0, 3], [0.0, -2.2, -3.0, 0.0, -3.0]),
    ("euclidean", True): ([2, 0, 4, 2, 1], [math.sqrt(17), math.sqrt(10.6), math.sqrt(41), math.sqrt(17), 4.0]),
}


@metrics
@origins
@pytest.mark.parametrize("entries", [1, 2, 3, 100])
def test_ranks_and_scores_of_five_words_are_as_by_hand(metric, with_origin, entries, monkeypatch):
    monkeypatch.setattr(vocabulary, "ENTRIES", entries)
    expected_rank, expected_score = BY_HAND[metric, with_origin]
    origin = torch.tensor([3.0, 0.0]) if with_origin else None
    rank, score = ranks(torch.tensor([[1.0, 0.0]]), FIVE, torch.arange(5)[None], metric=metric, origin=origin)
    assert rank.tolist() == [expected_rank]
    np.testing.assert_allclose(score[0], expected_score, atol=1e-6)
    # A state twice as far has the same order by cosine and product.
    if metric != "euclidean":
        rank, _ = ranks(torch.tensor([[2.0, 0.0]]), FIVE, torch.arange(5)[None], metric=metric, origin=origin)
        assert rank.tolist() == [expected_rank]


@metrics
@origins
def test_the_nearest_of_five_words_are_as_by_hand(metric, with_origin):
    rank, score = BY_HAND[metric, with_origin]
    origin = torch.tensor([3.0, 0.0]) if with_origin else None
    ids, found = nearest(torch.tensor([[1.0, 0.0]]), FIVE, 5, metric=metric, origin=origin)
    assert sorted(ids[0].tolist()) == list(range(5))
    assert [rank[i] for i in ids[0]] == sorted(rank)
    np.testing.assert_allclose(found[0], [score[i] for i in ids[0]], atol=1e-6)


# Brute force


@metrics
@origins
def test_ranks_are_those_of_brute_force_in_float64(metric, with_origin, small_blocks):
    states, entries = normal(23, 16, seed=1), normal(151, 16, seed=2) * (1 + drawn(4, 151, 1)) + 0.3
    targets = drawn(151, 23, 3, seed=3)
    targets[::4, 1] = -1
    origin = origin_of(entries, with_origin)
    rank, score = ranks(states, entries, targets, metric=metric, origin=origin)
    expected_rank, expected_score = by_brute_force(states, entries, targets, metric, origin)
    np.testing.assert_array_equal(rank, expected_rank)
    np.testing.assert_allclose(score, expected_score, rtol=1e-4, atol=1e-5)
    assert rank.dtype == torch.int64 and score.dtype == torch.float32


@metrics
@origins
@pytest.mark.parametrize(("entries_at_once", "states_at_once"), [(7, 5), (1, 1), (150, 23), (151, 22), (64, 1000)])
def test_the_size_of_blocks_changes_no_rank(metric, with_origin, entries_at_once, states_at_once, monkeypatch):
    states, entries = normal(23, 8, seed=1), normal(151, 8, seed=2)
    entries[60], entries[149] = entries[3], entries[3]
    targets = drawn(151, 23, 2, seed=3)
    targets[:4, 0] = torch.tensor([3, 60, 149, -1])
    origin = origin_of(entries, with_origin)
    whole = ranks(states, entries, targets, metric=metric, origin=origin)
    whole_nearest = nearest(states, entries, 9, metric=metric, origin=origin)
    monkeypatch.setattr(vocabulary, "ENTRIES", entries_at_once)
    monkeypatch.setattr(vocabulary, "STATES", states_at_once)
    rank, score = ranks(states, entries, targets, metric=metric, origin=origin)
    assert torch.equal(rank, whole[0])
    torch.testing.assert_close(score, whole[1], equal_nan=True)
    ids, best = nearest(states, entries, 9, metric=metric, origin=origin)
    copy = torch.isin(ids, torch.tensor([3, 60, 149]))  # copies come in any order
    assert torch.equal(ids.masked_fill(copy, -1), whole_nearest[0].masked_fill(copy, -1))
    torch.testing.assert_close(best, whole_nearest[1])


# Own entry and copies of it


@metrics
@origins
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_copies_of_the_own_entry_are_never_closer(metric, with_origin, dtype, small_blocks):
    # A hundred copies of one entry in all blocks: rounding would put many of them before or after each other.
    entries = normal(190, 24, seed=5)
    copies = torch.randperm(190, generator=torch.Generator().manual_seed(6))[:100]
    entries[copies] = entries[copies[0]].clone()
    entries = entries.to(dtype)
    states = normal(12, 24, seed=7)
    states[:4] = entries[copies[0]].float() + 0.1 * normal(4, 24, seed=8)
    targets = torch.cat([copies[:36].view(12, 3), drawn(190, 12, 1, seed=9)], dim=1)
    origin = origin_of(entries, with_origin)
    rank, _ = ranks(states, entries, targets, metric=metric, origin=origin)
    expected, _ = by_brute_force(states, entries, targets, metric, origin)
    np.testing.assert_array_equal(rank, expected)
    assert (rank[:, 0] == rank[:, 1]).all() and (rank[:, 0] == rank[:, 2]).all()


@metrics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_minus_zero_is_zero_in_a_copy(metric, dtype, small_blocks):
    entries = normal(40, 24, seed=5).to(dtype)
    zero = torch.arange(0, 24, 3)
    entries[:20, zero] = 0.0
    entries[20:] = entries[:20]
    entries[20:, zero] = -0.0
    assert torch.equal(entries[:20], entries[20:]) and entries[20:, zero].signbit().all()
    states, targets = normal(60, 24, seed=6), torch.arange(40).repeat(60, 1)
    rank, _ = ranks(states, entries, targets, metric=metric)
    assert torch.equal(rank[:, :20], rank[:, 20:])
    # Twenty different entries, two of each: the places 0, 2, 4, ...
    assert (rank[:, :20].sort(dim=1).values == 2 * torch.arange(20)).all()


def test_entries_that_float32_cannot_tell_apart_are_copies():
    entries = normal(40, 24, seed=5).double().repeat_interleave(2, 0)
    entries[1::2] *= 1 + 1e-12
    assert not torch.equal(entries[0], entries[1])
    rank, _ = ranks(normal(60, 24, seed=6), entries, torch.arange(80).repeat(60, 1))
    assert (rank.sort(dim=1).values == 2 * (torch.arange(80) // 2)).all()


def test_different_entries_are_not_taken_for_copies():
    # Vectors of signs: the bits of 1 and -1 differ in one place only, where a weak hash mixes up about four pairs.
    signs = drawn(2, 2**18, 40).float() * 2 - 1
    row, column, entry = vocabulary._equal_entries(signs, torch.arange(len(signs))[:, None])
    assert len(signs.unique(dim=0)) == len(signs)
    assert torch.equal(row, torch.arange(len(signs))) and torch.equal(entry, row) and not column.any()
    # Permuted entries, and entries with two numbers exchanged, are different too.
    one = torch.arange(1.0, 7.0).bfloat16()
    permuted = torch.stack([one, one.flip(0), one[[1, 0, 2, 3, 4, 5]], -one, one * 2])
    assert vocabulary._equal_entries(permuted, torch.arange(5)[:, None])[2].tolist() == list(range(5))


def test_entries_that_differ_in_one_number_only_are_not_taken_for_copies():
    alike = normal(1, 100, seed=5).repeat(200, 1)
    alike[torch.arange(100), torch.arange(100)] += 1.0  # a hundred entries, each different in another column
    entry = vocabulary._equal_entries(alike, torch.arange(100)[:, None])[2]
    assert torch.equal(entry, torch.arange(100))
    row, _, entry = vocabulary._equal_entries(alike, torch.tensor([[150]]))
    assert not row.any() and sorted(entry.tolist()) == list(range(100, 200))


def test_equal_entries_are_found_for_every_row_and_column(small_blocks):
    entries = torch.tensor([[1.0], [2.0], [1.0], [3.0], [1.0], [2.0]])
    targets = torch.tensor([[0, -1], [3, 5], [-1, -1], [4, 0]])
    row, column, entry = vocabulary._equal_entries(entries, targets)
    found = sorted(zip(row.tolist(), column.tolist(), entry.tolist(), strict=True))
    own = {0: [0, 2, 4], 3: [3], 5: [1, 5], 4: [0, 2, 4]}
    expected = [(r, c, i) for r, c in ((0, 0), (1, 0), (1, 1), (3, 0), (3, 1)) for i in own[int(targets[r, c])]]
    assert found == expected


@metrics
def test_a_target_of_minus_one_has_no_rank_and_no_score(metric, small_blocks):
    states, entries, targets = normal(11, 6, seed=1), normal(30, 6, seed=2), drawn(30, 11, 3, seed=3)
    whole = ranks(states, entries, targets, metric=metric)
    missing = drawn(2, 11, 3, seed=4).bool()
    rank, score = ranks(states, entries, targets.masked_fill(missing, -1), metric=metric)
    assert torch.equal(rank, whole[0].masked_fill(missing, -1))
    assert torch.equal(score.nan_to_num(9e9), whole[1].masked_fill(missing, 9e9))


@metrics
def test_the_targets_of_a_row_do_not_change_each_others_ranks(metric):
    states, entries, targets = normal(11, 6, seed=1), normal(30, 6, seed=2), drawn(30, 11, 4, seed=3)
    together, _ = ranks(states, entries, targets, metric=metric)
    for k in range(4):
        assert torch.equal(ranks(states, entries, targets[:, k : k + 1], metric=metric)[0][:, 0], together[:, k])
    every, _ = ranks(states, entries, torch.arange(30).repeat(11, 1), metric=metric)
    assert (every.sort(dim=1).values == torch.arange(30)).all()


# What must hold for any vocabulary


@metrics
@origins
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gives_the_ranks_of_its_float32_copy(metric, with_origin, dtype):
    states, entries = normal(40, 32, seed=1), (normal(500, 32, seed=2) + 1).to(dtype)
    targets, origin = drawn(500, 40, 2, seed=3), origin_of(entries, with_origin)
    for own in (states, states.to(dtype)):
        rank, score = ranks(own, entries, targets, metric=metric, origin=origin)
        expected, expected_score = ranks(own.float(), entries.float(), targets, metric=metric, origin=origin)
        assert torch.equal(rank, expected) and torch.equal(score, expected_score)
        ids, best = nearest(own, entries, 5, metric=metric, origin=origin)
        expected, expected_score = nearest(own.float(), entries.float(), 5, metric=metric, origin=origin)
        assert torch.equal(ids, expected) and torch.equal(best, expected_score)
        assert score.dtype == best.dtype == torch.float32


@metrics
@origins
def test_random_states_rank_random_words_evenly(metric, with_origin):
    # Entries of very different lengths, all leaning one way; the words asked for are drawn without looking.
    entries = (normal(1000, 16, seed=11) + 2) * torch.linspace(0.1, 3, 1000)[drawn(1000, 1000, 1, seed=12)]
    states, targets = normal(4000, 16, seed=13), drawn(1000, 4000, 1, seed=14)
    rank, _ = ranks(states, entries, targets, metric=metric, origin=origin_of(entries, with_origin))
    assert rank.min() >= 0 and rank.max() <= 999
    assert stats.chisquare(np.bincount(rank[:, 0] // 50, minlength=20)).pvalue > 0.001
    assert abs(rank.double().mean() - 999 / 2) < 4 * 1000 / math.sqrt(12 * 4000)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@origins
def test_a_copied_embedding_has_rank_zero(metric, with_origin):
    entries = normal(3000, 16, seed=1) * 3 + 1
    origin = origin_of(entries, with_origin)
    states = entries if origin is None else entries - origin
    targets = torch.arange(3000)[:, None]
    rank, score = ranks(states, entries, targets, metric=metric, origin=origin)
    assert not rank.any()
    torch.testing.assert_close(score, torch.full_like(score, 1.0 if metric == "cosine" else 0.0))
    ids, _ = nearest(states, entries, 1, metric=metric, origin=origin)
    assert torch.equal(ids, targets)


def test_the_length_of_a_state_changes_ranks_by_distance_only():
    states, entries, targets = normal(30, 8, seed=1), normal(200, 8, seed=2), drawn(200, 30, 1, seed=3)
    for metric in METRICS:
        near, far = (ranks(states * scale, entries, targets, metric=metric)[0] for scale in (1, 4))
        assert torch.equal(near, far) == (metric != "euclidean")


@metrics
@origins
def test_vectors_of_zeros_give_numbers(metric, with_origin):
    entries = normal(20, 6, seed=2)
    entries[4] = entries[9] = 0.0
    states = normal(5, 6, seed=1)
    states[2] = 0.0
    targets, origin = torch.arange(20).repeat(5, 1), origin_of(entries, with_origin)
    rank, score = ranks(states, entries, targets, metric=metric, origin=origin)
    expected_rank, expected_score = by_brute_force(states, entries, targets, metric, origin)
    np.testing.assert_array_equal(rank, expected_rank)
    np.testing.assert_allclose(score, expected_score, atol=1e-5)
    assert nearest(states, entries, 20, metric=metric, origin=origin)[1].isfinite().all()
    if metric != "euclidean":
        assert not rank[2].any()  # nothing is strictly closer to nothing


@metrics
@origins
def test_a_transposed_vocabulary_is_read_like_any_other(metric, with_origin, small_blocks):
    columns = normal(12, 40, seed=2)
    columns[:, 30] = columns[:, 3]
    states, targets = normal(9, 12, seed=1), torch.arange(36).view(9, 4)
    origin = origin_of(columns.T, with_origin)
    for dtype in (torch.float32, torch.bfloat16):
        turned, straight = columns.to(dtype).T, columns.to(dtype).T.contiguous()
        one, other = (ranks(states, each, targets, metric=metric, origin=origin) for each in (turned, straight))
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one[1], other[1])


@metrics
@origins
def test_reading_never_writes(metric, with_origin):
    states, entries, targets = normal(9, 6, seed=1), normal(40, 6, seed=2), drawn(40, 9, 2, seed=3) - 1
    origin = origin_of(entries, with_origin)
    given = [states, entries, targets, *([origin] if origin is not None else [])]
    before = [each.clone() for each in given]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    ranks(states, entries, targets, metric=metric, origin=origin)
    nearest(states, entries, 3, metric=metric, origin=origin)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@metrics
def test_no_states_have_no_ranks(metric):
    entries = normal(10, 6, seed=1)
    rank, score = ranks(torch.zeros(0, 6), entries, torch.zeros(0, 2, dtype=torch.int64), metric=metric)
    assert rank.shape == score.shape == (0, 2)
    ids, best = nearest(torch.zeros(0, 6), entries, 3, metric=metric)
    assert ids.shape == best.shape == (0, 3)
    rank, score = ranks(normal(4, 6), entries, torch.zeros(4, 0, dtype=torch.int64), metric=metric)
    assert rank.shape == score.shape == (4, 0)


def test_an_unknown_metric_is_refused_by_its_type():
    with pytest.raises(TypeCheckError):
        ranks(normal(2, 3), normal(5, 3), drawn(5, 2, 1), metric="manhattan")  # pyright: ignore[reportArgumentType]


# Nearest entries


@metrics
@origins
@pytest.mark.parametrize("k", [1, 6, 8, 40])
def test_the_nearest_are_the_first_of_the_full_product(metric, with_origin, k, small_blocks):
    states, entries = normal(13, 10, seed=1), normal(40, 10, seed=2) * (1 + drawn(3, 40, 1, seed=3))
    origin = origin_of(entries, with_origin)
    ids, score = nearest(states, entries, k, metric=metric, origin=origin)
    shifted = (entries if origin is None else entries - origin).double()
    if metric == "euclidean":
        full = torch.cdist(states.double(), shifted)
    elif metric == "dot":
        full = states.double() @ shifted.T
    else:
        full = torch.cosine_similarity(states.double()[:, None], shifted[None], dim=-1)
    expected = full.topk(k, largest=metric != "euclidean")
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(score.double(), expected.values, rtol=1e-5, atol=1e-5)


@metrics
@origins
def test_the_nearest_have_the_ranks_from_zero_on(metric, with_origin):
    states, entries = normal(13, 10, seed=1), normal(300, 10, seed=2)
    origin = origin_of(entries, with_origin)
    ids, score = nearest(states, entries, 12, metric=metric, origin=origin)
    rank, own = ranks(states, entries, ids, metric=metric, origin=origin)
    assert (rank == torch.arange(12)).all()
    torch.testing.assert_close(own, score)


@pytest.mark.parametrize("k", [0, -1, 6, 100])
def test_more_nearest_entries_than_there_are_or_none_are_refused(k):
    with pytest.raises(ValueError, match=f"must be 1 to 5, the size of the vocabulary; got {k}"):
        nearest(torch.tensor([[1.0, 0.0]]), FIVE, k)


# What is kept of them


def test_the_share_kept_is_as_by_hand():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4], [9, 8, 7, 6]])
    before = torch.tensor([[4, 3, 2, 1], [1, 2, 3, 4], [9, 9, 1, 8], [6, 0, 9, 1]])
    assert kept(ids, before).tolist() == [1.0, 0.0, 0.25, 0.5]


def test_the_share_kept_by_chance_is_k_of_the_vocabulary():
    random = np.random.default_rng(0)
    one, other = (torch.from_numpy(np.stack([random.permutation(50)[:10] for _ in range(2000)])) for _ in range(2))
    # The number kept is hypergeometric.
    expected, spread = 10 / 50, stats.hypergeom(50, 10, 10).std() / 10
    assert abs(kept(one, other).mean() - expected) < 4 * spread / math.sqrt(2000)


# Predictions


def distributions(states, entries, bias, cap):
    """Float64 logits of the whole vocabulary at once."""
    logits = states.double() @ entries.double().T + bias.double()
    return Categorical(logits=cap(logits))


@pytest.mark.parametrize(("block", "at_once"), [(7, 5), (7, 1000), (1000, 1), (50, 12)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0], ids=["flat", "plain", "peaked"])
def test_predictions_are_those_of_the_whole_vocabulary_at_once_however_it_is_cut(block, at_once, scale, monkeypatch):
    monkeypatch.setattr(vocabulary, "ENTRIES", block)
    monkeypatch.setattr(vocabulary, "STATES", at_once)
    states, entries, bias = scale * normal(6, 4, 8), normal(50, 8, seed=1), normal(50, seed=2)
    targets = drawn(50, 6, 2)
    targets[3, 1] = -1
    read = vocabulary.predictions(states, entries, bias, targets, 9)
    whole = distributions(states, entries, bias, lambda logits: logits)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5 * max(1.0, scale), equal_nan=True)
    close(read.entropy.double(), whole.entropy())
    final = whole.logits[:, -1:]  # torch's kl_divergence is infinite where a probability underflows
    close(read.kl.double(), (final.exp() * (final - whole.logits)).sum(-1))
    asked = targets[:, None].expand(-1, 4, -1)
    log_prob = whole.logits.gather(-1, asked.clamp(min=0))
    rank = (whole.logits[..., None, :] > log_prob[..., None]).sum(-1)
    close(read.log_prob.double(), log_prob.masked_fill(asked < 0, math.nan))
    assert torch.equal(read.rank, rank.masked_fill(asked < 0, -1))
    best = whole.logits.topk(9)
    assert torch.equal(read.top_ids, best.indices)
    close(read.top_log_prob.double(), best.values)


def test_predictions_know_a_cap_and_precise_numbers_come_from_half_precision_weights():
    states, entries, bias = normal(5, 3, 8), normal(40, 8, seed=1).bfloat16(), normal(40, seed=2).bfloat16()

    def cap(logits):
        return 2 * torch.tanh(logits / 2)

    read = vocabulary.predictions(states, entries, bias, drawn(40, 5, 1), 3, cap=cap)
    whole = distributions(states, entries.float(), bias.float(), cap)
    torch.testing.assert_close(read.entropy.double(), whole.entropy(), rtol=0, atol=1e-5)
    torch.testing.assert_close(read.top_log_prob.double(), whole.logits.topk(3).values, rtol=0, atol=1e-5)


def test_a_target_is_not_outranked_by_an_entry_that_equals_it():
    entries = normal(30, 8)
    entries[[4, 11, 29]] = entries[17].clone()
    read = vocabulary.predictions(normal(50, 2, 8, seed=1), entries, torch.zeros(30), torch.full((50, 1), 17), 1)
    without = torch.ones(30, dtype=torch.bool)
    without[[4, 11, 29]] = False
    alone = vocabulary.predictions(
        normal(50, 2, 8, seed=1), entries[without], torch.zeros(27), torch.full((50, 1), 15), 1
    )
    assert torch.equal(read.rank, alone.rank)


def test_an_equal_entry_with_another_bias_is_another_entry():
    entries, bias = normal(30, 8), normal(30, seed=2)
    entries[20:] = 0.0
    states, targets = normal(40, 2, 8, seed=1), torch.full((40, 1), 25)
    read = vocabulary.predictions(states, entries, bias, targets, 1)
    logits = states @ entries.T + bias
    assert torch.equal(read.rank[..., 0], (logits > logits[..., 25:26]).sum(-1))


def test_a_log_probability_is_never_above_0():
    entries = 40 * normal(50, 8)
    states = normal(500, 2, 8, seed=1)
    best = (states[:, -1] @ entries.T).argmax(-1, keepdim=True)
    assert vocabulary.predictions(states, entries, torch.zeros(50), best, 1).log_prob.max() <= 0


def test_of_no_target_and_no_top_entries_the_rest_is_known():
    read = vocabulary.predictions(
        normal(3, 2, 8), normal(20, 8), torch.zeros(20), torch.empty(3, 0, dtype=torch.int64), 0
    )
    assert read.rank.shape == (3, 2, 0) and read.top_ids.shape == (3, 2, 0)
    assert read.entropy.isfinite().all()
