"""Topics: cells are permuted whole within groups, prompts resampled within cells, and what p then says, simulated."""

from collections import Counter

import numpy as np
import pytest
import torch

from lens_probes.maths import inference
from lens_probes.maths import topics as topics_file
from lens_probes.maths.topics import TopicOrder, by_topic
from lens_probes.text.prompts import PromptTable

MOST_BY_CHANCE = 18  # of 200 trials at 5 %: the 99.4 % point of the binomial


def crossed(topics: int, groups: int, each: int) -> TopicOrder:
    """So many prompts of every topic in every group."""
    topic, group, _ = (own.ravel() for own in np.indices((topics, groups, each)))
    return TopicOrder(np.arange(topic.size), topic, group, topics)


def labels_of(draws: torch.Tensor) -> np.ndarray:
    """The topic of each prompt in each draw, each prompt being in one: [draw prompt]."""
    assert draws.sum(1).eq(1).all() and draws.max() == 1
    return draws.argmax(1).numpy()


def test_cells_move_whole_within_their_group():
    order = crossed(3, 4, 5)
    assert order.group is not None
    draws = list(order.permutations(50, seed=0))
    moved = labels_of(torch.cat(draws))
    assert moved.shape == (50, 60)
    for labels in moved:
        for group in range(4):
            of_cell = [set(labels[(order.group == group) & (order.topic == topic)]) for topic in range(3)]
            assert all(len(each) == 1 for each in of_cell)  # five prompts together
            assert set.union(*of_cell) == {0, 1, 2}  # and no topic leaves its group
    assert len({labels.tobytes() for labels in moved}) > 45
    assert len({labels[order.group == 0].tobytes() for labels in moved}) == 6
    again = labels_of(torch.cat(list(order.permutations(50, seed=0))))
    other = labels_of(torch.cat(list(order.permutations(50, seed=1))))
    assert (again == moved).all() and (other != moved).any()


def test_cells_of_unequal_size_keep_their_prompts_together(monkeypatch):
    monkeypatch.setattr(topics_file, "MOST_UNEQUAL", 4)
    topic, group = np.array([0, 0, 0, 1, 1, 2, 0, 1]), np.array([7, 7, 7, 7, 9, 9, 7, 7])
    order = TopicOrder(np.arange(8), topic, group, 3)
    moved = labels_of(torch.cat(list(order.permutations(200, seed=0))))
    first, second, third, fourth = (np.isin(np.arange(8), rows) for rows in ((0, 1, 2, 6), (3, 7), (4,), (5,)))
    found = Counter(tuple(int(labels[own][0]) for own in (first, second, third, fourth)) for labels in moved)
    assert all(len(set(labels[own])) == 1 for labels in moved for own in (first, second))
    assert set(found) == {(0, 1, 1, 2), (1, 0, 1, 2), (0, 1, 2, 1), (1, 0, 2, 1)}
    assert min(found.values()) > 25


@pytest.mark.parametrize("groups", [False, True])
def test_the_order_in_which_topics_and_prompts_came_changes_nothing_that_is_drawn(groups):
    names, label = ["c", "a", "b"], ["long", "short"]
    text = [f"{name} {group} {i}" for name in names for group in label for i in range(4)]
    drawn = []
    for topics, texts in ((names, text), (sorted(names), text[::-1])):
        n = torch.arange(len(texts))
        prompts = PromptTable(n, tuple(texts), tuple(own[0] for own in texts), n, tuple(texts))
        order = by_topic(prompts, topics, [own.split()[1] for own in texts] if groups else None)
        assert [texts[i] for i in order.order] == sorted(texts)
        by_name = [topics.index(name) for name in sorted(names)]
        draws = [torch.cat(list(some)) for some in (order.permutations(30, seed=0), order.resamples(seed=0))]
        drawn.append([some[:, by_name] for some in draws])
    for one, other in zip(*drawn, strict=True):
        assert one.equal(other)


def test_without_groups_topics_move_among_prompts():
    topic = np.repeat([0, 1], [3, 5])
    order = TopicOrder(np.arange(8), topic, None, 2)
    moved = labels_of(torch.cat(list(order.permutations(400, seed=0))))
    assert (moved.sum(1) == 5).all() and len({labels.tobytes() for labels in moved}) > 50  # of 56


def test_a_group_of_one_topic_cannot_be_permuted_and_several_topics_in_one_group_can():
    topic = np.array([0, 0, 1, 1, 0, 1])
    with pytest.raises(ValueError, match="must have prompts of several topics; got one topic per group"):
        next(TopicOrder(np.arange(6), topic, topic, 2).permutations(9, seed=0))
    some = np.array([0, 0, 1, 1, 2, 2])
    moved = labels_of(next(TopicOrder(np.arange(6), topic, some, 2).permutations(9, seed=0)))
    assert (moved[:, :4] == topic[:4]).all() and set(moved[:, 4]) == {0, 1}


def test_resamples_stay_within_cells():
    order = crossed(2, 3, 4)
    drawn = torch.cat(list(order.resamples(seed=0)))
    assert drawn.shape == (inference.RESAMPLES, 2, 24)
    assert (drawn * (1 - order.members)).eq(0).all()
    times = drawn.sum(1).numpy()
    for cell in np.unique(order.cell):
        assert (times[:, order.cell == cell].sum(1) == 4).all()
    assert len(np.unique(order.cell)) == 6 and times.max() > 2


@pytest.mark.parametrize(("each", "groups", "known"), [(1, 6, False), (2, 2, False), (2, 3, True), (5, 1, True)])
def test_four_prompts_of_a_topic_or_a_cell_of_one_have_no_resamples(each, groups, known):
    assert bool(list(crossed(2, groups, each).resamples(seed=0))) == known


def test_bounds_count_the_smallest_cell_and_the_degrees_of_all():
    topic, group = np.array([0] * 3 + [0] * 4 + [1] * 5), np.array([0] * 3 + [1] * 4 + [0] * 5)
    of_drawn = np.random.default_rng(0).normal(size=(999, 2))
    found = TopicOrder(np.arange(12), topic, group, 2).bounds(of_drawn)
    np.testing.assert_array_equal(found, inference.bounds(of_drawn, 3, degrees=2 + 3 + 4))


def first_against_others(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    means = weights @ values / weights.sum(-1)
    return means[..., 0] - means[..., 1:].mean(-1)


def test_an_interaction_of_topic_and_template_is_no_finding_about_topics():
    order, found, within_prompts, power = crossed(4, 5, 5), 0, 0, 0
    assert order.group is not None
    members = order.members.numpy()
    for trial in range(200):
        random = np.random.default_rng([7, trial])
        values = random.normal(size=100) + random.normal(size=20)[order.cell] + random.normal(size=5)[order.group]
        null = torch.cat(list(order.permutations(99, seed=trial))).numpy()
        for shift in (0.0, 2.0):
            moved = values + shift * (order.topic == 0)
            observed, permuted = first_against_others(members, moved)[None], first_against_others(null, moved)[:, None]
            below = bool(inference.permutation_p(observed, permuted)[0] < 0.05)
            found, power = found + (below and shift == 0), power + (below and shift > 0)
        # The simulation can tell: prompts moved within templates, one by one, take the interaction for a finding.
        alone = inference.permuted(order.topic, order.group, 99, seed=trial)
        one_by_one = (alone[:, None] == np.arange(4)[:, None]).astype(float)
        permuted = first_against_others(one_by_one, values)[:, None]
        within_prompts += bool(inference.permutation_p(first_against_others(members, values)[None], permuted)[0] < 0.05)
    assert 0 < found <= MOST_BY_CHANCE < within_prompts
    assert power > 150


def test_topics_that_have_far_fewer_prompts_in_every_group_are_refused():
    sizes = [2, 20] * 10
    topic, group = (np.repeat(own, sizes) for own in (np.tile([0, 1], 10), np.repeat(np.arange(10), 2)))
    order = TopicOrder(np.arange(len(topic)), topic, group, 2)
    with pytest.raises(ValueError, match=r"about equally many prompts per group; got 2\.0 to 20\.0 on average"):
        next(order.permutations(9, seed=0))
    without = TopicOrder(np.arange(len(topic)), topic, None, 2)
    assert next(without.permutations(9, seed=0)).shape == (9, 2, len(topic))
    balanced = np.where(group % 2 == 0, topic, 1 - topic)
    assert next(TopicOrder(np.arange(len(topic)), balanced, group, 2).permutations(9, seed=0)).shape[0] == 9
