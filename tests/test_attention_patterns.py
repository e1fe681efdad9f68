"""AttentionPatterns: statistics by hand and against the plain pattern, a planted induction head, chance, pictures."""

import re
from dataclasses import replace
from importlib.metadata import version
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probe import names_of
from lens_probes.probes.attention_patterns import STATISTICS, Statistic, statistics_of
from lens_probes.result import added, spread
from lens_probes.testing import PROMPTS

TEXT = "The cat saw the cat and the dog."
MAKERS = ["bridge", "hooked"] if version("transformer-lens").startswith("3.") else ["bridge"]


def by_name(values):
    return dict(zip(STATISTICS, values, strict=True))


def test_one_query_by_hand():
    # Tokens a b a: the last one looks half at the first a, a quarter at b, a quarter at itself.
    pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]).double()[None, None]
    values, even, counts = statistics_of(pattern, torch.ones(3, 3).tril().bool(), torch.tensor([7, 8, 7]))
    last = by_name(values[:, 0, 0, 2].tolist())
    assert last["entropy"] == pytest.approx(1.5 * np.log(2) / np.log(3))
    assert (last["max"], last["distance"]) == (0.5, 0.5 * 2 + 0.25)
    assert (last["first_token"], last["previous_token"], last["self"]) == (0.5, 0.25, 0.25)
    assert (last["duplicate_token"], last["induction"]) == (0.5, 0.25)  # b came after the first a
    chance = by_name(even[:, 2].tolist())
    assert chance == pytest.approx(
        {
            "entropy": 1,
            "max": 1 / 3,
            "distance": 1,
            "first_token": 1 / 3,
            "previous_token": 1 / 3,
            "self": 1 / 3,
            "duplicate_token": 1 / 3,
            "induction": 1 / 3,
        }
    )
    assert by_name(counts.tolist()) == {
        "entropy": [True] * 3,
        "max": [True] * 3,
        "distance": [True] * 3,
        "first_token": [True] * 3,
        "previous_token": [False, True, True],
        "self": [True] * 3,
        "duplicate_token": [False, False, True],
        "induction": [False, False, True],
    }


def test_means_are_those_of_the_models_pattern(raw):
    model = raw.build()
    view = ModelView(model)
    result = lp.AttentionPatterns().run(model, TEXT)
    ids = torch.tensor([view.encode(TEXT, None)[0]])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    pattern = cache[view.hook_pattern(1)][0, 2]
    ordinary = [i for i in range(1, ids.shape[1]) if int(ids[0, i]) not in view.special_ids]
    if view.encoder and int(ids[0, 0]) not in view.special_ids:
        ordinary = [0, *ordinary]
    n = [ids.shape[1] if view.encoder else i + 1 for i in ordinary]
    nats = [float(-(pattern[i].clamp(min=1e-30).log() * pattern[i]).sum()) for i in ordinary]
    entropy = np.array(nats) / np.log(n)
    assert float(result.mean_of("entropy")[1, 2]) == pytest.approx(np.mean(entropy), abs=1e-5)
    assert float(result.mean_of("first_token")[1, 2]) == pytest.approx(
        np.mean([float(pattern[i, 0]) for i in ordinary]), abs=1e-6
    )
    previous = [float(pattern[i, i - 1]) for i in ordinary if i]
    assert float(result.mean_of("previous_token")[1, 2]) == pytest.approx(np.mean(previous), abs=1e-6)
    assert float(result.mean_of("max")[1, 2]) == pytest.approx(
        np.mean([float(pattern[i].max()) for i in ordinary]), abs=1e-6
    )
    assert float(result.uniform[list(STATISTICS).index("max")]) == pytest.approx(np.mean([1 / k for k in n]))


def test_the_statistics_are_declared_once():
    assert tuple(STATISTICS) == get_args(Statistic)
    assert all(np.isfinite(each.high) or each.unit == "tokens" for each in STATISTICS.values())


def test_word_classes_share_out_all_attention():
    result = lp.AttentionPatterns().run(tiny.bridge("llama"), PROMPTS)
    table = result.by_word_class()
    sums = table.groupby(["layer", "head", "query_class"])[["attention", "uniform"]].sum()
    assert np.allclose(sums, 1, atol=1e-6)
    assert set(table["query_class"]) == {"content", "function", "punctuation"}
    assert "special" in set(table["key_class"])


def test_a_planted_induction_head_has_the_largest_share_after_earlier_copies():
    model = tiny.bridge("gpt2")
    ids = [0, *range(10, 30), *range(10, 30)]
    view = ModelView(model)
    probe = lp.AttentionPatterns()
    hooks = names_of(probe.hooks(view))
    cache = view.activations(torch.tensor([ids]), torch.ones(1, 41, dtype=torch.bool), hooks)
    name = view.hook_pattern(1)
    induction = torch.zeros(41, 41)
    for query in range(41):
        induction[query, query - 19 if query > 20 else 0] = 1.0
    cache[name] = cache[name].clone()
    cache[name][0, 3] = induction
    result = probe.from_cache(model, [ids], cache)
    scores = result.mean_of("induction")
    assert float(scores[1, 3]) == 1.0
    assert int(scores.flatten().argmax()) == 1 * 4 + 3 and float(scores.flatten().topk(2).values[1]) < 0.5
    assert float(result.uniform[list(STATISTICS).index("induction")]) < 0.05


def test_the_interval_of_a_mean_is_that_of_its_differences_between_prompts(gpt2):
    texts = [*lp.demo.sentences()[:6], TEXT, "Go"]
    result = lp.AttentionPatterns().run(gpt2, texts, batch_size=2, progress=False)
    alone = [lp.AttentionPatterns().run(gpt2, text) for text in texts]
    for at, name in enumerate(result.statistic):
        n = np.array([each.queries[at].sum() for each in alone])
        total = np.stack([each.total[at].sum(0).numpy() for each in alone])[n > 0]
        n, mean = n[n > 0], total.sum(0) / n.sum()
        apart = sum((own - k * mean) ** 2 for own, k in zip(total, n, strict=True))
        reach = (
            stats.t.ppf(0.975, len(n) - 1) * np.sqrt(apart * len(n) / (len(n) - 1)) / n.sum() if len(n) > 4 else np.nan
        )
        assert result.prompts[at] == len(n)
        expected = np.clip([mean - reach, mean + reach], STATISTICS[name].low, STATISTICS[name].high)
        np.testing.assert_allclose(result.interval_of(name), expected, atol=1e-9)
    heads = result.by_head("first_token")
    assert (
        heads["mean"].is_monotonic_decreasing and len(heads) == 12 and set(heads["null"]) == {float(result.uniform[0])}
    )
    first, (low, high) = heads.iloc[0], result.interval_of("first_token")
    at = result.index_of("layer", first["layer"]), result.index_of("head", first["head"])
    assert (first["mean"], first["low"], first["high"]) == (result.mean[0][at], low[at], high[at])
    assert result.prompts[result.statistic.index("duplicate_token")] == 7  # "Go" repeats nothing
    assert np.isnan(alone[0].interval_of("max")).all()
    assert re.search(r"with 0\.\d\d \(95 % interval 0\.\d\d to .*; \d+ queries of 8 prompts\)", *result.findings())
    assert "no interval: it needs five prompts" in alone[0].findings()[0]


def test_the_interval_of_a_mean_ends_where_its_statistic_does(gpt2):
    result = lp.AttentionPatterns().run(gpt2, lp.demo.sentences()[:6], progress=False)
    apart = replace(result, total_square=100 * result.total_square)
    for name, (low, high) in {"max": (0, 1), "entropy": (0, 1), "distance": (0, np.inf)}.items():
        found = apart.interval_of(name)
        assert (found[0] == low).all() and (found[1] == high).all() == np.isfinite(high)
        assert (found[1] >= apart.mean_of(name).numpy()).all()


@pytest.mark.trials
def test_the_interval_of_a_mean_covers_it_where_prompts_differ(gpt2):
    random, any_run = np.random.default_rng(0), lp.AttentionPatterns().run(gpt2, TEXT)
    covered = []
    for _ in range(300):
        sums = []
        for n in random.integers(3, 30, size=8):  # of eight prompts; each has a level of its own in every head
            level = 0.5 + 0.2 * random.standard_normal(any_run.mean.shape)
            total = torch.from_numpy(n * level + 0.3 * random.standard_normal(level.shape) * n**0.5)
            queries = torch.full((len(total),), float(n), dtype=torch.float64)
            sums.append({"queries": queries, "total": total} | spread(queries, total))
        all_sums = added(sums)
        by_class = {name: torch.zeros_like(getattr(any_run, name)) for name in ("queries", "total")}
        for name, of_all in by_class.items():
            of_all[:, 0] = all_sums.pop(name)
        low, high = replace(any_run, **by_class, **all_sums).interval_of("max")
        covered.append((low < 0.5) & (high > 0.5))
    assert 0.92 < np.mean(covered) < 0.97


def test_kept_patterns_are_the_models_own_and_encoders_look_both_ways():
    for architecture in ("qwen3", "bert"):
        model = tiny.bridge(architecture)
        view = ModelView(model)
        result = lp.AttentionPatterns(keep_patterns=True).run(model, PROMPTS)
        ids = torch.tensor([view.encode(PROMPTS[1], None)[0]])
        with torch.no_grad():
            _, cache = model.run_with_cache(ids)
        torch.testing.assert_close(result.pattern(1)[2], cache[view.hook_pattern(2)][0], rtol=0, atol=1e-5)
    assert float(result.pattern(1)[0, 0].triu(1).sum()) > 0.1


@pytest.mark.parametrize("architecture", ["gpt_neo", "gemma2"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_window_shorter_than_the_prompt_is_refused(monkeypatch, maker, architecture):
    name, settings = tiny._MODELS["gemma2"]
    full = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    monkeypatch.setitem(tiny._MODELS, "gemma2", (name, settings | full | {"sliding_window": 8}))
    model, ids = getattr(tiny, maker)(architecture), torch.arange(5, 14)
    with pytest.raises(ValueError, match=f"got 9 tokens, more than the window of layer 1 of tiny-{architecture}: use"):
        lp.AttentionPatterns().run(model, [ids[:5], ids])
    assert lp.AttentionPatterns().run(model, [ids[:8]]).mean.isfinite().any()
    assert lp.AttentionPatterns(layers=[0, 2]).run(model, [ids]).layer == ("0", "2")


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "cohere"])
def test_weights_too_small_for_the_precision_are_no_window_and_the_mask_is_asked_for_once(
    monkeypatch, maker, architecture
):
    if maker == "hooked" and architecture == "cohere":
        pytest.skip("TransformerLens 3 has no HookedTransformer of Cohere")
    model = getattr(tiny, maker)(architecture)
    with torch.no_grad():
        for attention in (block.attn for block in model.blocks):
            hooked = maker == "hooked"
            for weights in (attention.W_Q, attention.W_K) if hooked else (attention.q.weight, attention.k.weight):
                weights *= 12
    asked = []
    masked = ModelView._masked
    monkeypatch.setattr(ModelView, "_masked", lambda view, layer, ids: asked.append(layer) or masked(view, layer, ids))
    ids = torch.arange(5, 25)
    result = lp.AttentionPatterns(keep_patterns=True).run(model, [ids, ids.flip(0)[:18]])
    assert (result.pattern(0) == 0).all(1)[:, *torch.ones(20, 20).tril().nonzero(as_tuple=True)].any()
    assert result.mean[[0, 1, 2, 5, 6, 7]].isfinite().all()
    assert len(asked) == len(set(asked)) <= 3  # a shorter prompt has the longer one's mask


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said(monkeypatch):
    model = tiny.bridge("gpt2")
    sums = lp.AttentionPatterns().run(model, PROMPTS)
    with pytest.raises(ValueError, match=r"run AttentionPatterns\(keep_patterns=True\)"):
        sums.pattern(0)
    with pytest.raises(ValueError, match=r"statistic must be one of first_token, self.*; got 'sink'"):
        sums.mean_of("sink")
    kept = lp.AttentionPatterns(keep_patterns=True).run(model, PROMPTS)
    with pytest.raises(ValueError, match=r"heads must be \(layer, head\) pairs, such as .*; got \[1\]"):
        kept.figure_heads([1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="quantity must be one of attention; got 'total'"):
        lp.result.PairResult.pattern(kept, 0, "total")
    with pytest.raises(ValueError, match="pass prompts of two tokens or more"):
        lp.AttentionPatterns().run(model, [[5]]).by_word_class()
    monkeypatch.setattr(lp.result.pairs, "LIMIT", 1e4)
    with pytest.raises(ValueError, match="patterns must take at most"):
        lp.AttentionPatterns(keep_patterns=True).run(model, PROMPTS)


def test_figures_draw_every_token_and_equal_ones_apart():
    result = lp.AttentionPatterns(keep_patterns=True).run(tiny.bridge("gpt2"), [TEXT, "<b> a " * 8])
    (grid,) = result.figure("previous_token").data
    assert [list(row[:-1]) for row in grid.z] == result.mean_of("previous_token").tolist()
    uniform = float(result.uniform[list(STATISTICS).index("previous_token")])
    assert [row[-1] for row in grid.z] == [uniform] * 3 and grid.x[-1] == "null"
    two = result.figure_heads([(0, 1), (2, 3)])
    assert [np.asarray(panel.z).shape for panel in two.data] == [(n := len(result.token.rows(0)), n)] * 2
    assert np.allclose(np.asarray(two.data[1].z), result.pattern(0)[2, 3])
    one = result.figure_token(1, 3)
    assert np.allclose(np.asarray(one.data[0].z), result.pattern(0)[1, :, 3])
    texts = [figure.layout.title.text for figure in (result.figure("distance"), two, one)]
    queries = int(result.queries[list(STATISTICS).index("distance")].sum())
    assert texts[0].startswith("<b>Mean distance from query to key (null: uniform attention, ")
    assert f"; {queries:,} queries)" in texts[0] and "Attention of L0H1, L2H3, prompt 0" in texts[1]
    assert "Attention of ' ca', token 3 of prompt 0, in layer 1" in texts[2]
    hostile = result.figure_head(0, 0, prompt=1)
    assert not any("<b>" in text for text in hostile.data[0].x)
