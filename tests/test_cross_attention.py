"""CrossAttention: statistics by hand and against Hugging Face, alignments that a model had to learn, pictures."""

from dataclasses import replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from test_stacks import ARCHITECTURES, PAIRS, bridge, encoded, reference

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.probes.cross_attention import STATISTICS, Statistic, statistics_of
from lens_probes.testing import assert_same


def by_name(values):
    return dict(zip(STATISTICS, values, strict=True))


def test_one_query_by_hand():
    # Source a b a end, target start b a end: the first query predicts b, the second a, the third the end.
    pattern = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.5, 0.0, 0.25, 0.25]] + 2 * [[0.25] * 4]).double()[None, None]
    asks = torch.tensor([True, True, False, False])
    special = torch.tensor([False, False, False, True])
    values, counts = statistics_of(pattern, torch.tensor([8, 7, 1, 0]), asks, torch.tensor([7, 8, 7, 1]), special)
    # Places of b and a in the target are 1/4 and 3/4; of a, b, a in the source 1/6, 1/2, 5/6.
    second = by_name(values[:, 0, 0, 1].tolist())
    assert second == pytest.approx(
        {
            "special": 0.25,
            "same_token": 0.75,
            "entropy": 1.5 * np.log(2) / np.log(4),
            "max": 0.5,
            "distance": (0.5 * (3 / 4 - 1 / 6) + 0.25 * (5 / 6 - 3 / 4)) / 0.75,
        }
    )
    first = by_name(values[:, 0, 0, 0].tolist())
    assert (first["special"], first["same_token"], first["max"]) == pytest.approx((0.2, 0.6, 0.6))
    assert by_name(counts.tolist()) == {
        "special": [True, True, False, False],
        "same_token": [True, True, False, False],
        "entropy": [True, True, False, False],
        "max": [True, True, False, False],
        "distance": [True, True, False, False],
    }


def test_what_has_no_value_counts_in_no_mean():
    # No copy in the source; nothing in the source but its end; one source token, of which there is no entropy.
    model = bridge("marian")
    result = lp.CrossAttention().run(model, [lp.Prompt(ids=(5, 6, 1), target=(0, 7, 8, 1))])
    assert by_name(result.queries.tolist()) == dict.fromkeys(STATISTICS, 2) | {"same_token": 0}
    assert result.mean_of("same_token").isnan().all() and result.mean_of("max").isfinite().all()
    ends = lp.CrossAttention().run(model, [lp.Prompt(ids=(1,), target=(0, 7, 8, 1))])
    assert by_name(ends.queries.tolist()) == {"special": 2, "same_token": 0, "entropy": 0, "max": 2, "distance": 0}
    torch.testing.assert_close(ends.mean_of("special"), torch.ones(3, 4))
    several = [lp.Prompt(ids=(1,), target=(0, 7, 8, 1)), lp.Prompt(ids=(5, 6, 1), target=(0, 7, 8, 1))]
    both = lp.CrossAttention().run(model, several)  # what one prompt lacks leaves the value of the other
    for name in ("entropy", "distance"):
        torch.testing.assert_close(both.mean_of(name), result.mean_of(name))
        assert by_name(both.uniform.tolist())[name] == pytest.approx(by_name(result.uniform.tolist())[name])
    empty = lp.CrossAttention().run(model, [lp.Prompt(ids=(5, 1), target=(0, 1))])
    assert not empty.queries.any() and empty.mean.isnan().all() and empty.alignment(layer=0, head=0).empty


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_means_are_those_of_hugging_faces_pattern(architecture):
    result = lp.CrossAttention(layers=[-1, 0]).run(bridge(architecture), PAIRS)
    special = set(tiny.tokenizer(architecture).all_special_ids)
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    even: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for prompt in PAIRS:
        source, target = encoded(architecture, prompt)
        pattern = reference(architecture, source, target).cross_attentions[2][0, 1].double()
        keys = [k for k, i in enumerate(source) if i not in special]
        places = [n for n, i in enumerate(target) if n and i not in special]
        for j, position in enumerate(places):
            for row, into in ((pattern[position - 1], found), (torch.full((len(source),), 1 / len(source)), even)):
                weights = row.tolist()
                copies = [w for w, i in zip(weights, source, strict=True) if i == target[position]]
                apart = [
                    abs((j + 0.5) / len(places) - (k + 0.5) / len(keys)) * weights[at] for k, at in enumerate(keys)
                ]
                into["special"].append(sum(w for w, i in zip(weights, source, strict=True) if i in special))
                into["same_token"] += [sum(copies)] if copies else []
                into["entropy"].append(-sum(w * np.log(w) for w in weights) / np.log(len(source)))
                into["max"].append(max(weights[k] for k in keys))
                into["distance"].append(sum(apart) / sum(weights[k] for k in keys))
    assert result.layer == ("2", "0")
    assert by_name(result.mean[:, 0, 1].tolist()) == pytest.approx({k: np.mean(v) for k, v in found.items()}, abs=1e-5)
    assert by_name(result.uniform.tolist()) == pytest.approx({k: np.mean(v) for k, v in even.items()}, abs=1e-6)
    assert by_name(result.queries.tolist()) == {name: len(values) for name, values in found.items()}


def test_the_statistics_are_declared_once_and_need_no_patterns():
    assert tuple(STATISTICS) == get_args(Statistic)
    model = tiny.bridge("bart")
    kept, sums = lp.CrossAttention().run(model, PAIRS), lp.CrossAttention(keep_patterns=False).run(model, PAIRS)
    assert torch.equal(kept.mean, sums.mean) and sums.attention is None and not len(sums.token) and not len(sums.source)
    halves = [lp.CrossAttention(keep_patterns=False).run(model, part) for part in (PAIRS[:1], PAIRS[1:])]
    assert_same(sums, lp.CrossAttentionResult.merge(halves), "two runs")


def test_an_alignment_by_hand_leaves_special_tokens_out():
    model = tiny.bridge("bart")
    result = lp.CrossAttention(layers=[2]).run(model, PAIRS[1:2])
    weights = torch.linspace(0.1, 0.2, len(result.source))
    weights[-1], weights[2] = 0.9, 0.4  # the end of the source, and a token
    given = replace(result, attention=weights.repeat(1, 4, len(result.token)))
    table = given.alignment(layer=2, head=3)
    assert len(table) == int((~result.token.special).sum()) and set(table["source_position"]) == {2}
    assert table["weight"].to_numpy() == pytest.approx(0.4)
    assert table["uniform"].to_numpy() == pytest.approx(1 / len(result.source))
    layer, head = result.sharpest()
    assert layer == 2 and head == int(result.mean_of("max")[0].argmax())
    table = result.alignment()
    own = result.pattern()[0, head, torch.tensor(table["position"] - 1), 1:-1]
    assert table["source_position"].tolist() == (own.argmax(-1) + 1).tolist()


@cache
def trained(task: str) -> Any:
    """A BART of one layer that copies or reverses seven symbols, trained in about four seconds.

    Of one length only: with several, the end of the source holds symbols too, and attention to it is right as well.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in SIZES.items()}
    marks = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    settings: dict[str, Any] = sizes | marks | {"vocab_size": 24, "d_model": 32, "max_position_embeddings": 16}
    name = "BartForConditionalGeneration"
    config = BartConfig(**settings, dropout=0.0, forced_eos_token_id=None, architectures=[name])
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = BartForConditionalGeneration(config).train()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=32**-0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for step in range(STEPS):
            symbols = torch.randint(4, 24, (64, 7), generator=generator)
            end = torch.full((64, 1), 2)
            written = symbols if task == "copy" else symbols.flip(1)
            logits = model(
                input_ids=torch.cat([symbols, end], 1), decoder_input_ids=torch.cat([end, written], 1)
            ).logits
            optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat([written, end], 1).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().set_attn_implementation("eager")
    return TransformerBridge.boot_transformers(
        f"tiny-{task}", hf_model=model, tokenizer=tiny.tokenizer("bart"), device="cpu"
    )


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
STEPS = 300
SYMBOLS = [(4, 9, 14, 5, 18, 7, 21), (7, 6, 20, 13, 11, 22, 9), (19, 12, 8, 17, 15, 10, 23)]


@pytest.mark.parametrize("task", ["reverse", pytest.param("copy", marks=pytest.mark.matrix)])
def test_the_alignment_that_a_model_had_to_learn_is_found_and_uniform_attention_has_none(task):
    # Copying aligns target place n with source place n, reversing with the n-th from the end.
    sources = [lp.Prompt(ids=(*symbols, 2)) for symbols in SYMBOLS]
    model = trained(task)
    result = lp.CrossAttention().run(model, sources)  # its own, greedy output
    for prompt, symbols in enumerate(SYMBOLS):
        places = list(range(len(symbols))) if task == "copy" else list(range(len(symbols)))[::-1]
        written = result.token.id[result.token.rows(prompt)].tolist()
        assert written == [2, *(symbols[place] for place in places), 2]
        table = result.alignment(prompt)
        assert table["source_position"].tolist() == places
        assert (table["weight"] > 3 * table["uniform"]).all()
        assert table["target"].tolist() == table["source"].tolist()
        flat = torch.full((len(symbols) + 1, len(symbols) + 1), 1 / (len(symbols) + 1))
        assert float((flat.argmax(-1)[: len(symbols)] == torch.tensor(places)).double().mean()) < 0.3
    layer, head = result.sharpest()
    found, uniform = (by_name(each.tolist()) for each in (result.mean[:, layer, head], result.uniform))
    assert found["max"] > 0.8 and found["same_token"] > 0.8 and found["entropy"] < 0.4
    assert uniform["max"] < 0.2 and uniform["same_token"] < 0.2 and uniform["entropy"] == pytest.approx(1)
    assert uniform["distance"] == pytest.approx(1 / 3, abs=0.03)  # of two uniform places
    assert found["distance"] < 0.1 if task == "copy" else found["distance"] > 0.4


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said(monkeypatch):
    model = tiny.bridge("bart")
    sums, kept = lp.CrossAttention(keep_patterns=False).run(model, PAIRS), lp.CrossAttention().run(model, PAIRS)
    with pytest.raises(ValueError, match=r"pattern needs stored patterns; got sums only: run CrossAttention\(\)"):
        sums.figure_alignment()
    with pytest.raises(ValueError, match="got layer=1 and head=None: give both, or none for the sharpest"):
        kept.alignment(layer=1)
    with pytest.raises(ValueError, match=r"statistic must be one of special, same_token.*; got 'sink'"):
        kept.mean_of("sink")
    with pytest.raises(ValueError, match="head must be one of H0, H1, H2, H3, by label or number; got 4"):
        kept.figure_alignment(layer=0, head=4)
    with pytest.raises(ValueError, match="prompt 3 is out of range: this result has prompts 0 to 2"):
        kept.figure_alignment(3)
    with pytest.raises(ValueError, match="a target must have a token that is not special; got none that has: pass"):
        lp.CrossAttention().run(model, [lp.Prompt("A", target=(2, 2))]).sharpest()
    with pytest.raises(ValueError, match="a source must have a token that is not special; got none in prompt 0: pass"):
        lp.CrossAttention().run(model, [lp.Prompt(ids=(2,), target="A cat")]).alignment(0, layer=0, head=0)
    for other in (lp.EncoderView(model), tiny.bridge("gpt2")):
        with pytest.raises(
            ValueError, match=r"cross-attention needs an encoder-decoder, .*; got tiny-.*: use Attention"
        ):
            lp.CrossAttention().run(other, "A cat.")
    monkeypatch.setattr(lp.result.pairs, "LIMIT", 1e3)
    with pytest.raises(ValueError, match=r"patterns must take at most .*run CrossAttention\(keep_patterns=False\)"):
        lp.CrossAttention().run(model, PAIRS)


def test_figures_show_source_tokens_by_the_target_tokens_they_predict():
    result = lp.CrossAttention().run(tiny.bridge("bart"), [*PAIRS, lp.Prompt("<b> a", target="<i> b")])
    layer, head = result.sharpest()
    figure = result.figure_alignment(1)
    (grid,) = figure.data
    assert np.allclose(np.asarray(grid.z), result.pattern(1)[layer, head, :-1])
    assert [text.rsplit(" ", 1)[1] for text in grid.y] == [str(n) for n in range(1, len(result.token.rows(1)))]
    assert grid.y[1] == "S 2" and grid.x[1] == "T 1" and grid.y[-1].startswith("&lt;/s&gt;")
    assert f"Cross-attention of L{layer}H{head}, the sharpest head, prompt 1" in figure.layout.title.text
    one = result.figure_alignment(0, layer=2, head="H3")
    assert np.allclose(np.asarray(one.data[0].z), result.pattern(0)[2, 3, :-1])
    assert one.layout.title.text.startswith("<b>Cross-attention of L2H3, prompt 0</b>")
    mean, every = result.figure_mean(0, layer=1), result.figure_mean(0)
    assert np.allclose(np.asarray(mean.data[0].z), result.pattern(0)[1].mean(0)[:-1])
    assert np.allclose(np.asarray(every.data[0].z), result.pattern(0).mean((0, 1))[:-1])
    assert "mean over the heads of layer 1, prompt 0" in mean.layout.title.text
    assert mean.data[0].zmax == pytest.approx(float(result.pattern(0)[1].mean(0).max()))
    (values,) = result.figure("distance").data
    assert [list(row[:-1]) for row in values.z] == result.mean_of("distance").tolist()
    assert [row[-1] for row in values.z] == [float(result.uniform[result.statistic.index("distance")])] * 3
    (hostile,) = result.figure_mean(3).data
    assert not any("<b>" in text or "<i>" in text for text in (*hostile.x, *hostile.y))
