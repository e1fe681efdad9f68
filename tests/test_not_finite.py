"""NaN in one weight: what cannot be known is missing, what can be known stays as it was, and the rest is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths.similarity import pairwise
from lens_probes.maths.vocabulary import METRICS, nearest, predictions, ranks
from lens_probes.model import ModelView
from lens_probes.probes.head_topic_similarity import whitened
from lens_probes.probes.key_value_overlap import principal_cosines
from lens_probes.probes.rank_shift import layer_overlap
from lens_probes.testing import PROMPTS, TOPICS

TEXT = "The old man the boat."
NAN = float("nan")
metrics = pytest.mark.parametrize("metric", METRICS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spoilt(architecture: str, weight: str, *at: int) -> Any:
    """A tiny model with NaN at one place of one weight."""
    model = tiny.bridge(architecture)
    part, name = weight.rsplit(".", 1)
    with torch.no_grad():
        getattr(model.get_submodule(part).original_component, name)[at] = NAN
    return model


def unused(model: Any, *texts: str) -> int:
    """A token id that is in none of the texts."""
    said = {i for text in texts for i in ModelView(model).encode(text, None)[0]}
    return next(i for i in range(300, 400) if i not in said)


# The vocabulary


@metrics
def test_an_entry_of_nan_is_left_out_of_all_ranks_and_has_none_itself(metric):
    states, entries, targets = normal(6, 8), normal(50, 8, seed=1), torch.tensor([[3, 20], [0, 49]] * 3)
    gone = 17
    rest = torch.cat([entries[:gone], entries[gone + 1 :]])
    expected = ranks(states, rest, targets - (targets > gone).long(), metric=metric)
    entries[gone, 2] = NAN
    found = ranks(states, entries, torch.cat([targets, torch.full((6, 1), gone)], dim=1), metric=metric)
    assert found[0][:, :2].equal(expected[0])
    torch.testing.assert_close(found[1][:, :2], expected[1])
    assert found[0][:, 2].eq(-1).all() and found[1][:, 2].isnan().all()


@metrics
def test_a_state_of_nan_has_no_rank_and_nothing_near_and_other_states_keep_theirs(metric):
    states, entries, targets = normal(6, 8), normal(50, 8, seed=1), torch.arange(6)[:, None]
    whole, near = ranks(states, entries, targets, metric=metric), nearest(states, entries, 4, metric=metric)
    states[2, 5] = NAN
    others = torch.tensor([0, 1, 3, 4, 5])
    rank, score = ranks(states, entries, targets, metric=metric)
    assert rank[others].equal(whole[0][others]) and rank[2] == -1 and score[2].isnan()
    ids, close = nearest(states, entries, 4, metric=metric)
    assert ids[others].equal(near[0][others]) and ids[2].eq(-1).all() and close[2].isnan().all()


@metrics
def test_nearest_entries_leave_out_those_of_nan_and_are_missing_where_too_few_are_left(metric):
    states, entries = normal(6, 8), normal(5, 8, seed=1)
    kept = torch.tensor([0, 2, 4])
    expected = nearest(states, entries[kept], 3, metric=metric)
    entries[1, 0], entries[3, 7] = NAN, torch.inf
    ids, close = nearest(states, entries, 5, metric=metric)
    assert ids[:, :3].equal(kept[expected[0]])
    torch.testing.assert_close(close[:, :3], expected[1])
    assert ids[:, 3:].eq(-1).all() and close[:, 3:].isnan().all()


def test_without_a_distribution_all_that_is_read_of_it_is_missing():
    states, entries, targets = normal(4, 2, 8), normal(50, 8, seed=1), torch.tensor([[3], [4], [5], [-1]])
    whole = predictions(states, entries, torch.zeros(50), targets, 3)
    states[1, 0, 0] = NAN
    read = predictions(states, entries, torch.zeros(50), targets, 3)
    missing = torch.zeros(4, 2, dtype=torch.bool)
    missing[1, 0] = True
    for name in ("entropy", "log_prob", "rank", "top_ids", "top_log_prob"):
        own, before = getattr(read, name), getattr(whole, name)
        none = own == -1 if name in ("rank", "top_ids") else own.isnan()
        assert none[missing].all()
        torch.testing.assert_close(own[~missing], before[~missing], equal_nan=True)
    entries[7] = NAN  # the whole distribution has no sum
    read = predictions(states, entries, torch.zeros(50), targets, 3)
    assert read.log_prob.isnan().all() and read.rank.eq(-1).all() and read.top_ids.eq(-1).all()


def test_the_overlap_of_neighbours_that_are_not_known_is_missing():
    ids = torch.tensor([[[1, 2], [1, 2]], [[1, -1], [2, 3]]])
    assert layer_overlap(ids)[1].isnan().tolist() == [True, False]


# Probes


def test_rank_shift_keeps_its_neighbours_where_an_entry_is_nan():
    model = tiny.bridge("llama")
    gone = unused(model, TEXT)
    probe = lp.RankShift(neighbours=5, overlap=5, at="resid_post")
    whole = probe.run(model, TEXT)
    result = probe.run(spoilt("llama", "embed.weight", gone, 3), TEXT)
    has = (whole.neighbour_ids == gone).any(-1)
    assert result.neighbour_ids[~has].equal(whole.neighbour_ids[~has])
    assert (result.neighbour_ids != gone).all() and not result.neighbour_score.isnan().any()
    assert ((whole.rank - result.rank >= 0) & (whole.rank - result.rank <= 1)).all()


def test_a_token_whose_entry_is_nan_has_no_rank_in_tables_and_figures_and_others_have_theirs():
    model = tiny.bridge("llama")
    probe = lp.RankShift(reference="unembed", neighbours=2)
    whole = probe.run(model, TEXT)
    own = int(whole.token.id[2])
    result = probe.run(spoilt("llama", "unembed.weight", own, 3), TEXT)
    unknown = whole.token.id == own
    assert result.rank[:, unknown].eq(-1).all() and result.rank[:, ~unknown].ge(0).all()
    assert result.score.isnan().any(0).equal(unknown)
    assert result.shift[:, unknown].isnan().all() and not result.shift[:, ~unknown].isnan().any()
    table = result.by_word_class()
    assert (table.loc[table["quantity"] == "rank", "median"] >= 0).all()
    lines = result.figure_paths(token=2).data
    assert any(all(y != y for y in line.y) for line in lines) and not any(-1 in line.y for line in lines)
    result.figure()
    assert "nan" in str(result.figure_neighbours(2).data[0].cells.values[1])


def test_density_is_missing_for_a_token_of_nan_and_right_for_all_others():
    model = tiny.bridge("gpt2")
    whole = lp.EmbeddingDensity(k=3).run(model, TEXT)
    ids = whole.token.id
    other = lp.EmbeddingDensity(k=3).run(spoilt("gpt2", "embed.weight", unused(model, TEXT), 3), TEXT)
    assert not other.density.isnan().any()
    result = lp.EmbeddingDensity(k=3).run(spoilt("gpt2", "embed.weight", int(ids[2]), 3), TEXT)
    assert result.density.isnan().equal(ids == ids[2])
    rest = [i for i in range(400) if i != int(ids[2])]  # by hand, without that entry
    unit = torch.nn.functional.normalize(model.W_E.detach()[rest].double(), dim=-1)
    for row, i in enumerate(ids.tolist()):
        if i in rest:
            cosines = unit @ unit[rest.index(i)]
            assert float(result.density[row]) == pytest.approx(float(cosines.topk(4).values[1:].mean()), abs=1e-5)


def test_the_overlap_of_a_head_with_nan_is_missing_and_that_of_other_heads_stays():
    whole = lp.KeyValueOverlap().run(tiny.bridge("llama"), TEXT)
    n = whole.cosine.shape[-1]
    keys = lp.KeyValueOverlap().run(_spoilt_kv("k"), TEXT)
    values = lp.KeyValueOverlap().run(_spoilt_kv("v"), TEXT)
    for result, others in ((keys, [0]), (values, [1])):  # keys of one head, or what all others are compared with
        missing = torch.zeros(3, 2, dtype=torch.bool)
        missing[1, 0] = True
        assert result.cosine.isnan().equal(missing[..., None].expand(-1, -1, n))
        torch.testing.assert_close(result.cosine[~missing], whole.cosine[~missing])
        assert result.other_head.isnan().nonzero().tolist() == [[1, head] for head in others]
        result.figure()


def _spoilt_kv(which: str) -> Any:
    """A tiny Llama whose first key/value head of layer 1 holds NaN in W_K or W_V."""
    return spoilt("llama", f"blocks.1.attn.{which}.weight", 2, 5)


def test_principal_angles_of_columns_with_nan_are_missing():
    one, others = normal(6, 2), normal(3, 6, 2, seed=1)
    whole = principal_cosines(one, others)
    others[1, 4, 0] = NAN
    found = principal_cosines(one, others)
    assert found.isnan().any(1).tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])


def test_a_head_whose_vectors_are_nan_has_no_similarity_and_other_heads_keep_theirs():
    whole = lp.HeadTopicSimilarity().run(tiny.bridge("gpt2"), TOPICS)
    vectors = whole.vector.clone()
    vectors[2, 0, :, 3] = NAN
    result = replace(whole, vector=vectors)
    for options in ({}, {"metric": "distance"}, {"metric": "scaled"}, {"basis": "pca"}):
        found, before = result.separation(**options), whole.separation(**options)
        assert found.isnan().nonzero().tolist() == [[2, 0]], options
        known = ~found.isnan()
        torch.testing.assert_close(found[known], before[known])
    assert (result.brightest == -1).nonzero().tolist() == [[2, 0]]


def test_vectors_of_nan_are_not_alike_and_have_no_principal_directions():
    vectors = normal(1, 4, 3).double()
    vectors[0, 1, 2] = NAN
    for metric in ("distance", "cosine"):
        assert pairwise(vectors, metric)[0, 1, [0, 2, 3]].isnan().all()
        assert not pairwise(vectors, metric)[0, 0, [2, 3]].isnan().any()
    two = torch.stack([vectors, normal(1, 4, 3, seed=1).double()], dim=1)
    assert whitened(two, two, 2).isnan().flatten(2).all(-1).tolist() == [[True, False]]


# What needs finite weights says so


@pytest.mark.parametrize(
    "asked",
    [
        lp.InputReconstruction(1, steps=2),
        lp.InputReconstruction(1, method="sequential"),
        lp.MaxActivatingTokens(1, units=[2], steps=2),
        lp.MaxActivatingTokens(1, units=[2], steps=2, position=None),
    ],
    ids=["descent", "search", "features", "features at all places"],
)
def test_a_search_over_the_vocabulary_names_the_entry_of_nan(asked):
    gone = unused(tiny.bridge("llama"), TEXT)
    message = f"embedding of tiny-llama must be finite .* 1 of 400, first for id {gone}: check the model's weights"
    with pytest.raises(ValueError, match=message):
        asked.run(spoilt("llama", "embed.weight", gone, 3), TEXT, progress=False)


def test_a_fitted_lens_and_centring_name_the_entry_of_nan():
    gone = unused(tiny.bridge("llama"), *PROMPTS)
    model = spoilt("llama", "embed.weight", gone, 3)
    with pytest.raises(ValueError, match=f"embedding of tiny-llama must be finite .* first for id {gone}"):
        lp.TunedLens(steps=2).run(model, list(PROMPTS), progress=False)
    mean = lp.ResidualMean().run(model, list(PROMPTS))
    assert mean.mean.isfinite().all()
    with pytest.raises(ValueError, match=f"reference vectors of tiny-llama must be finite .* first for id {gone}"):
        lp.RankShift(center=mean).run(model, list(PROMPTS))
    model = spoilt("llama", "unembed.weight", gone, 3)
    mean = lp.ResidualMean().run(model, list(PROMPTS))
    lp.RankShift(center=mean).run(model, list(PROMPTS))
    with pytest.raises(ValueError, match="reference vectors of tiny-llama must be finite"):
        lp.RankShift(center=mean, reference="unembed").run(model, list(PROMPTS))


def test_keys_or_values_of_nan_are_not_tied():
    for which in ("k", "v"):
        with pytest.raises(ValueError, match=rf"activation 'blocks\.1\.attn\.hook_{which}' must be finite; got NaN"):
            lp.TiedKeyValue().run(_spoilt_kv(which), list(PROMPTS), progress=False)


@pytest.mark.parametrize(
    "asked", [lp.AttentionPair(-1, [1, 2]), lp.HeadTopicSimilarity(component="head_out")], ids=repr
)
def test_what_heads_write_names_the_layer_of_nan(asked):
    model = spoilt("gpt2", "blocks.2.attn.o.weight", 3, 5)
    with pytest.raises(ValueError, match=r"activation 'blocks\.2\.hook_resid_mid' must be finite; got NaN or Inf"):
        asked.run(model, TOPICS, progress=False)


def test_reach_names_the_layer_of_nan():
    model = spoilt("gpt2", "blocks.1.mlp.out.weight", 3, 5)
    with pytest.raises(ValueError, match=r"activation 'blocks\.1\.hook_resid_post' must be finite; got NaN or Inf"):
        lp.PositionReach(projections=2).run(model, TEXT, progress=False)


def test_pixels_name_the_layer_of_nan():
    model = tiny.vit()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "mlp" in name)[3] = NAN
    images = normal(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"activation 'blocks\.2\.hook_resid_post' must be finite; got NaN or Inf"):
        lp.FeatureVisualization(2, units=[3], at="resid_post", steps=2).run(model, images, progress=False)


def test_directions_of_a_head_with_nan_are_refused_and_those_of_others_given():
    model = spoilt("gpt2", "blocks.1.attn.o.weight", 3, 5)
    with pytest.raises(ValueError, match=r"head 0 in layer 1 of tiny-gpt2 must be finite; got NaN or Inf: check the m"):
        lp.ov_vectors(model, 1, 0)
    assert lp.ov_vectors(model, 1, 1).isfinite().all()


@pytest.mark.parametrize(
    ("asked", "prompts"),
    [
        (lp.TiedKeyValue(layers=[0]), list(PROMPTS)),
        (lp.HeadAblation(steps=2, draws=2), list(PROMPTS)),
        (lp.TopicAblation(k=2, draws=2), TOPICS),
        (lp.AttentionWindow(radii=[2]), list(PROMPTS)),
    ],
    ids=["ties", "heads", "topics", "window"],
)
def test_a_loss_that_is_nan_is_refused_by_its_prompt(asked, prompts):
    model = spoilt("gpt2", "blocks.2.mlp.out.weight", 3, 5)
    with pytest.raises(ValueError, match=r"the loss of prompt \d+ must be finite; got nan: check the model's weights"):
        asked.run(model, prompts, progress=False)


def test_every_refusal_of_a_weight_of_nan_is_one_sentence():
    """Whatever holds NaN, whatever is asked: a result, or an error of ours."""
    told: list[str] = []
    asked = {
        name: lp.EmbeddingDensity(k=3) if name == "EmbeddingDensity" else getattr(lp, name)()
        for name in _WITHOUT_SETTINGS
    }
    for weight in ("embed.weight", "blocks.1.attn.k.weight", "blocks.1.attn.v.weight", "blocks.1.mlp.out.weight"):
        model = spoilt("llama", weight, 3, 5)
        for probe in asked.values():
            try:
                probe.run(model, list(PROMPTS), progress=False).figure()
            except ValueError as error:
                told.append(str(error))
    assert told and all("finite" in each for each in told)


_WITHOUT_SETTINGS = (
    "RankShift",
    "ResidualMean",
    "ResidualUpdate",
    "EmbeddingDensity",
    "LogitLens",
    "DirectLogitAttribution",
    "AttentionPatterns",
    "HeadValueRank",
)
