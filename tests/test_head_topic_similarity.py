"""HeadTopicSimilarity: metrics and separation by hand, sums against all pairs, a planted head found, its twin not."""

import numpy as np
import pytest
import torch
from reference import attention
from torch.nn.functional import normalize

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probes.head_topic_similarity import whitened
from lens_probes.testing import TOPICS, assert_same
from lens_probes.text.prompts import pooling

METRICS = ("cosine", "scaled", "distance")
SIX = {topic: [*texts, *(f"Then {text}" for text in texts[:2])] for topic, texts in TOPICS.items()}


def by_all_pairs(result, metric, vectors=None):
    """Topic means from the similarity of every pair, one head at a time."""
    vectors = result.vector.double() if vectors is None else vectors
    n_layers, n_heads = vectors.shape[:2]
    topic = np.asarray([result.topic.index(each) for each in result.prompt.topic])
    means = np.full((n_layers, n_heads, len(result.topic), len(result.topic)), np.nan)
    for layer, head in np.ndindex(n_layers, n_heads):
        x = vectors[layer, head].numpy()
        for a, b in np.ndindex(len(result.topic), len(result.topic)):
            pairs = [(i, j) for i in np.where(topic == a)[0] for j in np.where(topic == b)[0] if i != j]
            means[layer, head, a, b] = np.mean([one_pair(x, i, j, metric) for i, j in pairs])
    return torch.from_numpy(means)


def one_pair(x, i, j, metric):
    if metric == "cosine":
        return x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j]))
    if metric == "scaled":
        return x[i] @ x[j] / max(each @ each for each in x)
    return 1 - np.linalg.norm(x[i] - x[j]) / (np.linalg.norm(x[i]) + np.linalg.norm(x[j]))


def of_vectors(vectors, topics, **fields):
    """A result with given vectors `[layer head prompt d]` and topics."""
    n_layers, n_heads, n, _ = vectors.shape
    names = tuple(dict.fromkeys(topics))
    ids = torch.arange(n)
    text = tuple(f"prompt {i}" for i in range(n))
    table = lp.PromptTable(prompt=ids, text=text, topic=tuple(topics), n_tokens=ids + 1, last_text=text)
    member = torch.tensor([[topic == name for topic in topics] for name in names]).double()
    units = normalize(vectors.double(), dim=-1)
    return lp.HeadTopicSimilarityResult(
        component="head",
        pool="mean",
        layer=tuple(map(str, range(n_layers))),
        head=tuple(f"H{i}" for i in range(n_heads)),
        topic=names,
        prompt=table,
        unit_sum=torch.einsum("tp,lhpd->lhtd", member, units),
        count=torch.einsum("tp,lhp->lht", member, (vectors.norm(dim=-1) > 0).double()),
        vector=vectors,
        **fields,
    )


# What is collected


def test_a_table_without_a_name_has_the_mean_cosine_of_every_pair_of_topics():
    result = lp.HeadTopicSimilarity(layers=[1]).run(tiny.bridge("gpt2"), TOPICS)
    table = result.to_frame()
    assert list(table) == ["layer", "head", "topic", "other_topic", "mean_cosine"]
    assert len(table) == 4 * len(TOPICS) ** 2
    torch.testing.assert_close(result.mean_cosine, result.topic_similarity())
    sums = lp.HeadTopicSimilarity(layers=[1], keep_vectors=False).run(tiny.bridge("gpt2"), TOPICS)
    assert sums.to_frame()["mean_cosine"].tolist() == pytest.approx(table["mean_cosine"].tolist(), abs=1e-5)


def test_a_heads_vector_is_the_mean_of_its_outputs_without_special_tokens(decoder):
    model = decoder.build()
    text = TOPICS["animals"][2]
    result = lp.HeadTopicSimilarity().run(model, text)
    tokens = lp.RankShift(at="resid_post").run(model, text).token
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens.id[None])
    z = cache["blocks.1.attn.hook_z"][0][~tokens.special]
    torch.testing.assert_close(result.vector[1, :, 0], z.mean(0), rtol=0, atol=1e-5)
    assert result.vector.shape[:3] == (3, 4, 1)


def test_head_outputs_are_what_hugging_faces_modules_add_to_the_stream(rare):
    ids = torch.tensor([5, 40, 300, 41, 7, 120, 5, 333])
    own = attention(rare.architecture, ids)
    result = lp.HeadTopicSimilarity(component="head_out", pool="last").run(rare.build(), [ids])
    for layer, reference in enumerate(own):
        mixed = torch.einsum("hk,khd->hd", reference.pattern[:, -1], reference.value)
        written = torch.einsum("hd,hde->he", mixed, reference.output)
        if not rare.processed:  # parts that depend on no token have moved from values to b_O
            torch.testing.assert_close(result.vector[layer, :, 0], written, rtol=0, atol=1e-5)


def test_head_outputs_that_are_not_what_attention_adds_are_refused():
    model, probe = tiny.bridge("gpt2"), lp.HeadTopicSimilarity(component="head_out", layers=[1])
    view, ids = ModelView(model), torch.arange(5, 15)[None]
    cache = view.activations(ids, torch.ones(1, 10, dtype=torch.bool), probe.hooks(view))
    half = cache | {view.hook_z(1): cache[view.hook_z(1)] / 2}
    with pytest.raises(
        ValueError, match=r"outputs of the heads of layer 1 of tiny-gpt2 must add up.*off by 0\.\d+ of it: use"
    ):
        probe.from_cache(model, ids, half)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "bert", "granite"])
def test_head_outputs_add_up_to_what_attention_adds(architecture):
    model = tiny.bridge(architecture)
    heads = lp.HeadTopicSimilarity(component="head_out").run(model, TOPICS)
    block = lp.HeadTopicSimilarity(component="attn_out").run(model, TOPICS)
    b_O = getattr(model.blocks[1].attn, "b_O", None)
    total = heads.vector[1].sum(0) + (0 if b_O is None else b_O.detach())
    torch.testing.assert_close(total, block.vector[1, 0], rtol=0, atol=1e-4)
    assert block.head == ("block",) and heads.head == ("H0", "H1", "H2", "H3")


def test_pooling_takes_all_ordinary_tokens_or_one():
    tokens = lp.LogitLens(top_k=0).run(tiny.bridge("gpt2"), [[0, 5, 6], [7, 8]]).token  # id 0 is special
    assert pooling(tokens, "mean").tolist() == [[0, 0.5, 0.5, 0, 0], [0, 0, 0, 0.5, 0.5]]
    assert pooling(tokens, "last").tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert pooling(tokens, 1).tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="pool=2 must be a position of every prompt; got a prompt of 2 tokens"):
        pooling(tokens, 2)
    with pytest.raises(ValueError, match="must have a token that is not special; got special tokens only"):
        lp.HeadTopicSimilarity().run(tiny.bridge("gpt2"), [[0]])


# Similarities


@pytest.mark.parametrize(
    ("metric", "zeros", "same", "opposite"), [("cosine", None, 1, -1), ("scaled", None, 1, -1), ("distance", 1, 1, 0)]
)
def test_the_known_values_of_each_metric(metric, zeros, same, opposite):
    x = torch.tensor([3.0, 4.0])
    table = of_vectors(torch.stack([x, x, -x])[None, None], ["a", "a", "b"]).similarity(0, metric=metric)
    assert float(table[0, 1]) == pytest.approx(same) and float(table[0, 2]) == pytest.approx(opposite)
    nothing = of_vectors(torch.zeros(1, 1, 2, 2), ["a", "b"]).similarity(0, metric=metric)
    assert float(nothing[0, 1]) == zeros if zeros else nothing.isnan().all()


def test_the_separation_of_four_vectors_by_hand():
    # Topic a: east, north-east; topic b: north, north. Within: cos 45 and 1; between: 0, 0, cos 45, cos 45.
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 5.0]])[None, None]
    result = of_vectors(vectors, ["a", "a", "b", "b"])
    half = 0.5**0.5
    assert result.topic_similarity()[0, 0].tolist() == [
        pytest.approx([half, half / 2], abs=1e-6),
        pytest.approx([half / 2, 1.0], abs=1e-6),
    ]
    assert float(result.separation()) == pytest.approx((half + 1) / 2 - half / 2)


@pytest.mark.parametrize("metric", METRICS)
def test_means_from_sums_equal_those_of_all_pairs(metric):
    result = lp.HeadTopicSimilarity().run(tiny.bridge("llama"), TOPICS)
    expected = by_all_pairs(result, metric)
    torch.testing.assert_close(result.topic_similarity(metric=metric).double(), expected, rtol=0, atol=1e-6)
    centred = result.vector.double() - result.vector.double().mean(2, keepdim=True)
    expected = by_all_pairs(result, metric, centred)
    found = result.topic_similarity(metric=metric, center=True).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sums_alone_give_the_same_cosines_and_ask_for_vectors_otherwise():
    model = tiny.bridge("gpt2")
    kept, sums = (lp.HeadTopicSimilarity(keep_vectors=keep).run(model, TOPICS) for keep in (True, False))
    torch.testing.assert_close(sums.topic_similarity(), kept.topic_similarity(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sums.separation(), kept.separation(), rtol=0, atol=1e-6)
    for ask in (
        lambda: sums.similarity(0),
        lambda: sums.separation(center=True),
        lambda: sums.separation(metric="distance"),
        lambda: sums.separation(basis="pca"),
        sums.test,
        sums.held_out,
        lambda: sums.brightness,
    ):
        with pytest.raises(ValueError, match=r"run HeadTopicSimilarity\(keep_vectors=True\)"):
            ask()


def test_zero_vectors_are_left_out_of_cosines():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])[None, None]
    result = of_vectors(vectors, ["a", "a", "a", "b", "b"])
    assert result.topic_similarity()[0, 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert result.count.tolist() == [[[2.0, 2.0]]]


def test_principal_directions_have_unit_variance_and_are_stated():
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 1, 40, 8, generator=random).double() * torch.arange(1, 9)
    result = of_vectors(vectors.float(), ["a", "b"] * 20)
    assert result.pca_rank == 4
    along = whitened(vectors, vectors, 4)
    covariance = along[0, 0].T @ along[0, 0] / 40
    torch.testing.assert_close(covariance, torch.eye(4).double(), rtol=0, atol=1e-6)
    assert result.topic_similarity(basis="pca").isfinite().all()


def test_brightness_is_the_share_of_the_brightest_dimension():
    vectors = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, -1.0]]]])
    result = of_vectors(vectors, ["a", "b"])
    assert result.brightness.tolist() == [[pytest.approx(0.9), 0.5]]
    assert result.brightest[0, 0] == 0


# Tests


def planted(seed, strength, prompts=20, heads=4, width=16):
    """Noise of unit length a head, and in head 2 each topic's own direction at `strength` of that length."""
    random = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(1, heads, 3 * prompts, width, generator=random), dim=-1)
    topics = [name for name in "abc" for _ in range(prompts)]
    directions = normalize(torch.randn(3, width, generator=random), dim=-1)
    vectors[0, 2] += strength * directions[[ord(topic) - ord("a") for topic in topics]]
    return of_vectors(vectors, topics)


@pytest.fixture
def few_resamples(monkeypatch):
    """For tests of p-values, which need no intervals."""
    monkeypatch.setattr(lp.inference, "RESAMPLES", 5)


@pytest.mark.usefixtures("few_resamples")
def test_a_planted_topic_direction_is_found():
    found = 0
    for seed in range(100):
        table = planted(seed, 0.5).test(permutations=99, seed=seed)
        found += bool((table["q"] < 0.05).tolist() == [False, False, True, False] or table["q"][2] < 0.05)
    assert found >= 95


@pytest.mark.trials
@pytest.mark.usefixtures("few_resamples")
def test_without_it_a_head_is_found_as_often_as_chance_allows():
    false = sum(planted(seed, 0.0).test(permutations=99, seed=seed)["p"][2] < 0.05 for seed in range(1000, 1200))
    assert false <= 18


@pytest.mark.trials
@pytest.mark.usefixtures("few_resamples")
def test_the_largest_head_is_judged_against_the_largest_of_all():
    false = sum((planted(seed, 0.0).test(permutations=99)["p_max"] < 0.05).any() for seed in range(2000, 2200))
    assert false <= 18
    assert planted(0, 0.7).test(permutations=199)["p_max"][2] < 0.05


def test_topics_that_are_templates_in_disguise_are_no_topics_within_templates():
    random = torch.Generator().manual_seed(0)
    template = [str(i % 2) for i in range(40)]
    topics = ["ab"[(i % 2) ^ (i % 5 == 0)] for i in range(40)]  # four in five of a topic have the same template
    shift = torch.tensor([[8.0 * int(name) - 4.0, 0.0, 0.0] for name in template])
    vectors = (torch.randn(40, 3, generator=random) + shift)[None, None]
    result = of_vectors(vectors, topics)
    assert result.test(permutations=199)["p"][0] < 0.05
    assert result.test(permutations=199, groups=template)["p"][0] > 0.05
    with pytest.raises(ValueError, match="at least one group must have prompts of several topics"):
        result.test(groups=topics)
    with pytest.raises(ValueError, match="groups must have one label per prompt, 40; got 3"):
        result.test(groups=["a", "b", "c"])


def test_an_interval_covers_the_separation_and_does_not_depend_on_the_order_of_prompts():
    assert lp.HeadTopicSimilarity().run(tiny.bridge("gpt2"), TOPICS).test(permutations=9)["low"].isna().all()  # four
    result = lp.HeadTopicSimilarity().run(tiny.bridge("gpt2"), SIX)
    table = result.test(permutations=99)
    assert (table["low"] <= table["effect"] + 0.2).all() and (table["low"] < table["high"]).all()
    turned = {topic: texts[::-1] for topic, texts in reversed(SIX.items())}
    again = lp.HeadTopicSimilarity().run(tiny.bridge("gpt2"), turned).test(permutations=99)
    for column in ("effect", "low", "high", "p", "q", "p_max"):
        assert table[column].tolist() == pytest.approx(again[column].tolist(), abs=1e-4), column


def test_an_interval_within_templates_covers_the_separation_however_alike_templates_make_prompts(monkeypatch):
    monkeypatch.setattr(lp.inference, "RESAMPLES", 200)
    topics = [f"topic {i}" for i in range(5) for _ in range(15)]
    templates = [f"template {i}" for _ in range(5) for i in range(3) for _ in range(5)]
    of_topic, of_template = (torch.tensor([int(name[-1]) for name in names]) for names in (topics, templates))
    random = torch.Generator().manual_seed(0)
    subjects, frames = torch.randn(5, 12, generator=random), 2 * torch.randn(3, 12, generator=random)
    expected = subjects[of_topic] + frames[of_template]
    tables = [
        of_vectors((expected + torch.randn(75, 12, generator=random))[None, None], topics)
        .test(groups=templates, permutations=1)
        .iloc[0]
        for _ in range(60)
    ]
    truth = np.mean([table["effect"] for table in tables])  # the estimate has no bias
    covered = sum(table["low"] <= truth <= table["high"] for table in tables)
    assert covered >= 51  # of 60: an interval of 95 % holds it in 57, and in fewer than 51 in one of 300 such tests


@pytest.mark.parametrize("basis", ["own", "pca"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_head_that_gives_nothing_is_no_finding_and_no_maximum(value, basis):
    result = planted(0, 0.5)
    vectors = torch.cat([result.vector, result.vector[:, :1]], dim=1)
    vectors[:, 1] = value
    pruned = of_vectors(vectors, result.prompt.topic)
    rest = of_vectors(vectors[:, [0, 2, 3, 4]], result.prompt.topic)
    if value != value and basis == "pca":
        pytest.skip("principal directions of NaN are refused by torch itself")
    table, expected = (each.test(permutations=99, basis=basis) for each in (pruned, rest))
    assert table.loc[1, ["effect", "p", "q", "p_max"]].isna().all()
    for column in ("effect", "low", "high", "p", "q", "p_max"):
        assert table[column].drop(1).tolist() == pytest.approx(expected[column].tolist()), column
    assert expected["q"][1] < 0.05
    held = pruned.held_out(k=5, basis=basis)
    assert held["head"].tolist()[-1] == "H1" and held["rank_held_out"].isna().tolist() == [False] * 4 + [True]
    assert held["rank_held_out"][0] == 0
    assert pruned.figure_test(table).data[0].text[0][1] == ""
    assert pruned.figure().data[0].z[0][1] is None


def test_what_was_chosen_on_one_half_is_told_on_the_other():
    table = planted(5, 1.0).held_out(k=2, seed=1)
    assert table.iloc[0][["layer", "head"]].tolist() == ["0", "H2"]
    assert table["rank_held_out"][0] == 0 and table["held_out"][0] > 0.2
    noise = [planted(seed, 0.0).held_out(k=1, seed=seed).iloc[0] for seed in range(60)]
    assert np.mean([row["chosen"] for row in noise]) > 0.005  # what was picked looks good where it was picked
    assert abs(np.mean([row["held_out"] for row in noise])) < 0.003  # and is nothing elsewhere
    groups = [str(i % 4) for i in range(60)]
    whole = planted(5, 1.0).held_out(groups=groups, basis="pca")
    assert whole["prompts_chosen"][0] == 30 and whole["prompts_held_out"][0] == 30
    with pytest.raises(ValueError, match="parts of the prompts must have two prompts or more per topic; got 0"):
        planted(5, 1.0).held_out(fraction=0.02)
    with pytest.raises(
        ValueError, match=r"fraction must be between 0 and 1, the share of the prompts to choose on; got 1\.5"
    ):
        planted(5, 1.0).held_out(fraction=1.5)


def test_shards_merge_to_one_run():
    model = tiny.bridge("qwen3")
    whole = lp.HeadTopicSimilarity().run(model, TOPICS)
    first = {topic: texts[:2] for topic, texts in TOPICS.items()}
    second = {topic: texts[2:] for topic, texts in TOPICS.items()}
    merged = lp.HeadTopicSimilarityResult.merge([lp.HeadTopicSimilarity().run(model, part) for part in (first, second)])
    torch.testing.assert_close(merged.separation(), whole.separation(), rtol=0, atol=1e-6)
    one_topic = [lp.HeadTopicSimilarity().run(model, {topic: texts}) for topic, texts in TOPICS.items()]
    assert_same(lp.Result.merge(one_topic), whole, "one run", tolerance=1e-6)


# Refusals and figures


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match=r"component=...\) must be 'head', 'head_out', 'attn_out'.*; got 'heads'"):
        lp.HeadTopicSimilarity(component="heads")
    with pytest.raises(ValueError, match="must be 'mean' or 'last' or a whole number; got 'max'"):
        lp.HeadTopicSimilarity(pool="max")
    plain = lp.HeadTopicSimilarity().run(tiny.bridge("gpt2"), ["One text.", "Another text."])
    with pytest.raises(ValueError, match="prompts must have two topics or more to compare; got 1: pass them as"):
        plain.separation()
    topics = lp.HeadTopicSimilarity().run(tiny.bridge("gpt2"), TOPICS)
    with pytest.raises(ValueError, match="metric must be one of cosine, scaled, distance; got 'dot'"):
        topics.separation(metric="dot")
    with pytest.raises(ValueError, match="basis must be one of own, pca; got 'ica'"):
        topics.separation(basis="ica")


def test_the_figure_draws_the_separation_around_zero_and_runs_no_test(monkeypatch):
    monkeypatch.setattr(lp.HeadTopicSimilarityResult, "test", lambda *args, **options: pytest.fail("a test ran"))
    result = planted(3, 1.0)
    (grid,) = result.figure().data
    assert [list(row) for row in grid.z] == result.separation().tolist() and grid.text is None
    assert grid.zmax == -grid.zmin == pytest.approx(float(result.separation().abs().max()))
    (table,) = result.figure_topics(0, 2).data
    assert [list(row) for row in table.z] == result.topic_similarity()[0, 2].tolist()
    hostile = of_vectors(torch.randn(1, 1, 4, 3), ["<script>a", "<script>a", "</b>", "</b>"])
    assert "<script" not in str(hostile.figure_topics(0).to_json())


def test_the_table_of_a_test_draws_itself_and_marks_what_is_found():
    result = planted(3, 1.0)
    table = result.test(permutations=99)
    (grid,) = result.figure_test(table).data
    assert list(grid.z[0]) == table["effect"].tolist() and list(grid.text[0]) == ["", "", "*", ""]


def test_a_head_to_which_a_topic_is_less_alike_is_counted_below_0():
    result = planted(0, 3.0)
    table = result.test(permutations=19).assign(q=0.001, effect=[0.2, -0.2, 0.3, -0.1])
    figure = result.figure_test(table)
    assert "q &lt; 0.05 (2 positive and 2 negative of 4)" in figure.layout.title.text
    assert list(figure.data[0].text[0]) == ["*"] * 4


def test_the_null_mean_is_what_templates_alone_give():
    # A prompt has one prompt fewer of its template in its own topic: without any topic, the separation is below 0.
    random = torch.Generator().manual_seed(0)
    topics, templates = ["ab"[i // 20] for i in range(40)], [str(i % 4) for i in range(40)]
    of_template = 3 * torch.randn(4, 8, generator=random)[torch.arange(40) % 4]
    result = of_vectors((of_template + torch.randn(40, 8, generator=random))[None, None], topics)
    table = result.test(permutations=199, groups=templates)
    assert table["null_mean"][0] < -0.01 and abs(table["effect"][0] - table["null_mean"][0]) < 0.02
    assert abs(result.test(permutations=199)["null_mean"][0]) < abs(table["null_mean"][0])


def test_prompts_stand_by_topic_with_borders_between():
    result = of_vectors(torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(0)), ["b", "a", "b", "a", "b"])
    figure = result.figure_prompts(0, 1)
    order = [0, 2, 4, 1, 3]
    expected = result.similarity(0, 1)[order][:, order]
    torch.testing.assert_close(torch.tensor([list(row) for row in figure.data[0].z]), expected)
    assert list(figure.layout.xaxis.ticktext) == ["b", "a"] and list(figure.layout.xaxis.tickvals) == [1.0, 3.5]
    assert sorted((shape.x0, shape.y0) for shape in figure.layout.shapes) == [(0, 2.5), (2.5, 0)]
    values = result.figure_values(0, 1)
    assert [list(row) for row in values.data[0].z] == result.vector[0, 1][order].double().T.tolist()
    assert len(values.layout.shapes) == 1
