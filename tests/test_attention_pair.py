"""AttentionPair: the model's own pattern and outputs on every model, a head by hand, minimal pairs, and refusals."""

from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from reference import attention

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.testing import PROMPTS

TEXTS = ["The cat left the mat. Still tired, it slept.", "It rained. A mat kept the cat dry, so it stayed."]
KEYS = ("cat", "mat")
MAKERS = ["bridge", "hooked"] if version("transformer-lens").startswith("3.") else ["bridge"]


def whole_prompt(model, text):
    """A probe of the last token against every token of this text."""
    n = len(ModelView(model).encode(text, None)[0])
    return lp.AttentionPair(n - 1, tuple(range(n)))


def test_its_weights_are_the_models_pattern_and_terms_sum_to_them(cell):
    model = cell.build()
    view = ModelView(model)
    result = whole_prompt(model, TEXTS[0]).run(model, TEXTS[0])
    torch.testing.assert_close(result.terms.sum(-1), result.dot, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.score[:, :, 0].softmax(-1), result.weight[:, :, 0], rtol=0, atol=1e-5)
    ids = torch.tensor([view.encode(TEXTS[0], None)[0]])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    for layer in range(3):
        pattern = cache[view.hook_pattern(layer)][0, :, -1]
        torch.testing.assert_close(result.weight[layer, :, 0], pattern, rtol=0, atol=1e-5)


def test_what_all_keys_write_is_what_attention_adds(cell):
    model = cell.build()
    view = ModelView(model)
    result = whole_prompt(model, TEXTS[0]).run(model, TEXTS[0])
    ids = torch.tensor([view.encode(TEXTS[0], None)[0]])
    out = "blocks.1.attn.o.hook_out" if view.class_name == "TransformerBridge" else "blocks.1.hook_attn_out"
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    added = torch.stack([result.written(model, 1, head)[0].sum(0) for head in range(4)]).sum(0)
    bias = getattr(model.blocks[1].attn, "b_O", None)
    added = added if bias is None else added + bias.detach()
    own = cache[out][0, -1]
    if view.class_name == "HookedTransformer" and hasattr(model.blocks[1], "ln1_post"):  # its is after the norm
        own, added = own, model.blocks[1].ln1_post(added[None, None])[0, 0].detach()
    torch.testing.assert_close(added, own, rtol=0, atol=1e-4)
    norms = result.written(model, 1, 2)[0].norm(dim=-1)
    torch.testing.assert_close(norms, result.written_norm[1, 2, 0], rtol=0, atol=1e-5)


def test_scores_values_and_what_is_written_are_those_of_hugging_faces_modules(rare):
    ids = torch.tensor([5, 40, 300, 41, 7, 120, 5, 333])  # a window of GPT-Neo's local layer
    own = attention(rare.architecture, ids)
    model = rare.build()
    result = lp.AttentionPair(-1, tuple(range(len(ids)))).run(model, [ids])
    for layer, reference in enumerate(own):
        torch.testing.assert_close(result.dot[layer, :, 0], reference.dot[:, -1], rtol=0, atol=1e-4)
        torch.testing.assert_close(result.weight[layer, :, 0], reference.pattern[:, -1], rtol=0, atol=1e-5)
        written = torch.stack([result.written(model, layer, head)[0] for head in range(4)])
        torch.testing.assert_close(written.norm(dim=-1), result.written_norm[layer, :, 0], rtol=0, atol=1e-5)
        if rare.processed:  # parts that depend on no token have moved from values to b_O
            continue
        torch.testing.assert_close(result.value[layer, :, 0], reference.value.transpose(0, 1), rtol=0, atol=1e-5)
        added = written.sum((0, 1)) + reference.bias
        torch.testing.assert_close(added, reference.added[-1], rtol=0, atol=1e-5)


def test_a_window_is_that_of_the_model_and_what_is_within_it_is_read():
    ids = torch.arange(5, 17)
    reference = attention("gpt_neo", ids)[1]
    for maker in MAKERS:
        model = getattr(tiny, maker)("gpt_neo")
        result = lp.AttentionPair(-1, (4, 11), layers=[1]).run(model, [ids])
        torch.testing.assert_close(result.weight[0, :, 0], reference.pattern[:, -1, [4, 11]], rtol=0, atol=1e-5)
        with pytest.raises(
            ValueError, match="within the query's attention window in layer 1 of tiny-gpt_neo; got one before it in"
        ):
            lp.AttentionPair(-1, (3, 11)).run(model, [ids])


def test_two_heads_by_hand():
    model = tiny.bridge("gpt2")
    view = ModelView(model)
    result = lp.AttentionPair("it", KEYS).run(model, TEXTS[0])
    ids = view.encode(TEXTS[0], None)[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
    query, cat = int(result.query_position), int(result.key_position[0, 0])
    assert [view.token_texts(ids)[i].strip()[-1] for i in (query, cat)] == ["t", "t"]
    for head in (0, 3):
        q, k = cache["blocks.2.attn.hook_q"][0, :, head], cache["blocks.2.attn.hook_k"][0, :, head]
        scores = [float(q[query] @ k[i]) / 8**0.5 for i in range(query + 1)]
        shares = np.exp(scores) / np.exp(scores).sum()
        assert float(result.dot[2, head, 0, 0]) == pytest.approx(scores[cat], abs=1e-5)
        assert float(result.weight[2, head, 0, 0]) == pytest.approx(shares[cat], abs=1e-5)
        value = cache["blocks.2.attn.hook_v"][0, cat, head]
        assert float(result.value_norm[2, head, 0, 0]) == pytest.approx(float(value.norm()), abs=1e-5)


def test_left_padding_and_company_change_nothing(raw):
    architecture = raw.architecture
    left = getattr(tiny, raw.maker)(architecture, padding_side="left")
    alone = lp.AttentionPair("it", KEYS).run(raw.build(), TEXTS[0])
    longer = TEXTS[0].replace("slept", "slept for an hour or two in the old house")
    together = lp.AttentionPair("it", KEYS).run(left, [TEXTS[0], longer], batch_size=2)
    torch.testing.assert_close(alone.score, together.score[:, :, :1], rtol=0, atol=1e-4)
    if not ModelView(left).encoder:  # what comes later changes nothing
        torch.testing.assert_close(alone.score, together.score[:, :, 1:], rtol=0, atol=1e-4)


def test_in_half_precision_the_weights_are_those_of_the_model():
    result = lp.AttentionPair("it", KEYS).run(tiny.bridge("llama", dtype=torch.bfloat16), TEXTS[0])
    assert result.weight.dtype == torch.float32 and result.provenance.dtype == "bfloat16"
    full = lp.AttentionPair("it", KEYS).run(tiny.bridge("llama"), TEXTS[0])
    torch.testing.assert_close(result.weight, full.weight, rtol=0, atol=0.1)


def test_a_model_that_adds_something_to_its_scores_is_refused():
    model = tiny.bridge("gpt2")
    model.blocks[1].attn.original_component.scaling = 0.9  # a scale that only the attributes claim
    with pytest.raises(
        ValueError,
        match=r"softmax\(q.k\) must reproduce the attention pattern of layer 1 of tiny-gpt2; got weights that",
    ):
        lp.AttentionPair("it", KEYS).run(model, TEXTS[0])


def test_a_wrong_scale_is_found_at_a_query_that_sees_one_token():
    model = tiny.bridge("gpt2")
    model.blocks[1].attn.original_component.scaling = 1.0
    with pytest.raises(
        ValueError,
        match=r"softmax\(q.k\) must reproduce the attention pattern of layer 1 of tiny-gpt2; got weights that",
    ):
        lp.AttentionPair(0, (0,)).run(model, TEXTS[0])


def test_scores_that_nothing_can_check_are_refused():
    for probe in (lp.AttentionPair(0, (0,)), lp.AttentionPair(-1, (0,), layers=[1])):
        with pytest.raises(ValueError, match=r"a query that spreads.*layer [01].*in '#' got a weight of 1 on"):
            probe.run(tiny.bridge("gpt2"), [torch.tensor([5])])


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gptj"])
def test_values_that_heads_do_not_mix_and_writing_that_does_not_arrive_are_refused(architecture):
    model, probe = tiny.bridge(architecture), lp.AttentionPair(9, (1, 8), layers=[1])
    view, ids = ModelView(model), torch.arange(5, 15)[None]
    cache = view.activations(ids, torch.ones(1, 10, dtype=torch.bool), probe.hooks(view))
    probe.from_cache(model, ids, cache)
    clipped = {name: x.clamp(-0.3, 0.3) if name == view.hook_value(1) else x for name, x in cache.items()}
    with pytest.raises(
        ValueError, match=rf"values must sum to the outputs of the heads of layer 1 of tiny-{architecture}"
    ):
        probe.from_cache(model, ids, clipped)
    after = view.hooks_written(1)[2]
    half = {name: x / 2 + cache[view.hook("resid_pre", 1)] / 2 if name == after else x for name, x in cache.items()}
    with pytest.raises(
        ValueError, match=rf"outputs of the heads of layer 1 of tiny-{architecture} must add up to what attention"
    ):
        probe.from_cache(model, ids, half)


def test_in_half_precision_nothing_right_is_refused(raw):
    model = getattr(tiny, raw.maker)(raw.architecture, dtype=torch.bfloat16)
    whole_prompt(model, TEXTS[0]).run(model, TEXTS[0])


# Minimal pairs


def planted(seed, shift, pairs=24, heads=6):
    """Scores of noise; in head 2 the cue moves the difference of the two keys by `shift` deviations."""
    model = tiny.bridge("gpt2")
    texts = [f"{text} {i}" for i in range(pairs) for text in ("The cat left the mat, it", "The cat left the mat, it")]
    result = lp.AttentionPair("it", KEYS, layers=[0]).run(model, texts[:2])
    n = 2 * pairs
    random = torch.Generator().manual_seed(seed)
    score = torch.randn(1, heads, n, 2, generator=random)
    score[0, 2 % heads, ::2, 0] += shift
    table = lp.PromptTable(torch.arange(n), tuple(texts), ("",) * n, torch.full((n,), 6), ("it",) * n)
    return replace(
        result,
        prompt=table,
        head=tuple(f"H{i}" for i in range(heads)),
        query_position=torch.full((n,), 5),
        key_position=torch.tensor([[1, 4]]).expand(n, -1),
        terms=torch.zeros(1, heads, n, 2, 8),
        value=torch.zeros(1, heads, n, 2, 8),
        dot=score,
        score=score,
        weight=score.softmax(-1) / 2,
        written_norm=score.abs(),
    )


def test_the_contrast_by_hand():
    result = planted(0, 0.0, pairs=2, heads=1)
    score = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 0.0], [-1.0, 0.0]])[None, None]
    table = replace(result, score=score, dot=score).contrast(permutations=9)
    assert table["effect"].tolist() == [pytest.approx(((2 - -1) + (0 - -1)) / 2)]
    assert np.isnan(table["low"][0]) and table["pairs"][0] == 2  # two pairs have no interval
    assert table["attention_on_keys"][0] == pytest.approx(0.5)


@pytest.mark.trials
def test_a_cue_that_moves_a_head_is_found_and_no_cue_is_found_as_often_as_chance_allows(monkeypatch):
    monkeypatch.setattr(lp.inference, "RESAMPLES", 5)
    found = sum(bool(planted(seed, 2.0).contrast(permutations=999, seed=seed)["q"][2] < 0.05) for seed in range(60))
    assert found >= 57
    null = (planted(seed, 0.0).contrast(permutations=99, seed=seed)["p"][2] for seed in range(500, 700))
    false = sum(bool(p < 0.05) for p in null)
    assert false <= 18


def test_pairs_whose_words_stand_elsewhere_do_not_count():
    result = planted(0, 1.0, pairs=6)
    moved = result.key_position.clone()
    moved[1] += 1
    table = replace(result, key_position=moved).contrast(permutations=9)
    assert table["pairs"][0] == 5 and table["pairs_given"][0] == 6
    with pytest.raises(ValueError, match="must have the same positions in both prompts of a pair; got 6 pairs, none"):
        replace(result, key_position=result.key_position + torch.arange(12)[:, None]).contrast()


@pytest.mark.parametrize("architecture", tiny.DECODERS)
def test_a_cue_behind_the_pronoun_moves_no_decoder(architecture):
    pairs = lp.demo.pronoun_pairs()
    result = lp.AttentionPair(pairs.query, pairs.keys).run(tiny.bridge(architecture), pairs.cue_after[:12])
    assert (result.score[:, :, ::2] - result.score[:, :, 1::2]).abs().max() < 1e-5
    table = result.contrast(permutations=49)
    assert table["effect"].abs().max() < 1e-5 and (table["p"] == 1).all()


def test_an_encoder_sees_the_cue_behind_the_pronoun():
    pairs = lp.demo.pronoun_pairs()
    result = lp.AttentionPair(pairs.query, pairs.keys).run(tiny.bridge("bert"), pairs.cue_after[:4])
    assert (result.score[:, :, ::2] - result.score[:, :, 1::2]).abs().max() > 1e-3


def test_the_pronoun_pairs_are_minimal_and_matched_in_tokens():
    pairs = lp.demo.pronoun_pairs()
    assert len(pairs.texts) == len(pairs.cue_after) == 52 and len(set(pairs.texts)) == 52
    for one, other in zip(pairs.texts[::2], pairs.texts[1::2], strict=True):
        assert sum(a != b for a, b in zip(one.split(), other.split(), strict=True)) == 1
    subjects = [text.split()[1] for text in pairs.texts[::2]]
    first = ["animal" if subject in pairs.keys["animal"] else "thing" for subject in subjects]
    assert first.count("animal") == first.count("thing") == 13


# Refusals and figures


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    model = tiny.bridge("gpt2")
    with pytest.raises(
        ValueError, match=r"AttentionPair\(keys=...\) must be a list of different keys, or name -> key; .*; got 'cat'"
    ):
        lp.AttentionPair("it", "cat")
    with pytest.raises(
        ValueError, match=r"the word 'dog' once; got it 0 times in 'The cat left.*slept.': name one word"
    ):
        lp.AttentionPair("it", ("dog",)).run(model, TEXTS[0])
    with pytest.raises(ValueError, match=r"got it 2 times in 'It rained.*': name one word that every prompt has once"):
        lp.AttentionPair("it", KEYS).run(model, TEXTS)
    with pytest.raises(
        ValueError, match=r"keys must precede the query, since tiny-gpt2 .*; got a later key in 'The cat"
    ):
        lp.AttentionPair("cat", ("mat",)).run(model, TEXTS[0])
    with pytest.raises(ValueError, match="a position must be within every prompt; got 99, and 'The cat"):
        lp.AttentionPair(99, (0,)).run(model, TEXTS[0])
    with pytest.raises(ValueError, match=r"must be a list of different keys, .*; got \('cat', 'cat'\)"):
        lp.AttentionPair("it", ("cat", "cat"))
    result = lp.AttentionPair(-1, (0, 1), layers=[1]).run(model, PROMPTS)
    with pytest.raises(ValueError, match="layer must be one of 1, by label or number; got 0"):
        result.written(model, 0, 0)
    with pytest.raises(ValueError, match="head must be one of H0, H1, H2, H3, by label or number; got 4"):
        result.figure_terms(1, 4)
    with pytest.raises(ValueError, match="prompt 3 is out of range: this result has prompts 0 to 2"):
        result.figure_terms(1, 0, prompt=3)
    with pytest.raises(ValueError, match="two per pair; got 2 keys and 3 prompts"):
        result.contrast()
    with pytest.raises(ValueError, match="quantity must be 'score' or 'weight'; got 'dot'"):
        result.contrast(quantity="dot")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError,
        match=r"needs the model of this result, tiny-gpt2 \(raw weights.*; got tiny-llama \(raw weights\): pass",
    ):
        result.written(tiny.bridge("llama"), 0, 0)


@pytest.mark.usefixtures("as_users_run_it")
def test_places_are_words_or_single_positions():
    for query, keys, setting, got in (
        ([5, 6], [1], "query", r"\[5, 6\]"),
        (5, [[1, 2]], "keys", r"\[\[1, 2\]\]"),
        (5, {"first": [1, 2]}, "keys", r"{'first': \[1, 2\]}"),
        ([], [1], "query", r"\[\]"),
        (5, [[]], "keys", r"\[\[\]\]"),
        (5, [], "keys", r"\[\]"),
        (None, [1], "query", "None"),
        (5, [1.5], "keys", r"\[1.5\]"),
        (5, [True], "keys", r"\[True\]"),
        (5, np.array([1, 2]), "keys", r"<ndarray of shape \(2,\)>"),
        (5, iter([1]), "keys", "<list_iterator"),
        (5, None, "keys", "None"),
    ):
        message = rf"AttentionPair\({setting}=...\) must be .*a word, a position, or several words of .*; got {got}"
        with pytest.raises(ValueError, match=message):
            lp.AttentionPair(query, keys)
    model = tiny.bridge("gpt2")
    plain = lp.AttentionPair(5, [1, 2]).run(model, TEXTS[0])
    of_numpy = lp.AttentionPair(np.int64(5), list(np.array([1, 2]))).run(model, TEXTS[0])
    assert torch.equal(plain.weight, of_numpy.weight) and of_numpy.key == ("1", "2")


@pytest.mark.parametrize("maker", MAKERS)
def test_a_key_beyond_the_window_of_a_layer_is_refused(monkeypatch, maker):
    name, settings = tiny._MODELS["gemma2"]
    monkeypatch.setitem(tiny._MODELS, "gemma2", (name, settings | {"sliding_window": 4}))  # layers 0 and 2
    model, ids = getattr(tiny, maker)("gemma2"), [torch.arange(5, 15)]
    with pytest.raises(
        ValueError, match="within the query's attention window in layer 2 of tiny-gemma2; got one before it"
    ):
        lp.AttentionPair(9, (5, 8), layers=[1, 2]).run(model, ids)
    inside = lp.AttentionPair(9, (6, 7, 8, 9)).run(model, ids)
    torch.testing.assert_close(inside.weight[[0, 2]].sum(-1), torch.ones(2, 4, 1))


@pytest.mark.parametrize("architecture", ["cohere", "gptj", "opt"])
def test_a_weight_too_small_for_the_precision_is_no_window(architecture):
    model = tiny.bridge(architecture)
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn.q, block.attn.k):
                part.original_component.weight *= 12
    result = whole_prompt(model, TEXTS[0]).run(model, TEXTS[0])
    assert (result.weight == 0).all(1).any()  # in all heads of a layer
    assert result.score.isfinite().all()
    torch.testing.assert_close(result.score.softmax(-1), result.weight, rtol=0, atol=1e-3)


def test_words_may_be_alternatives_and_of_several_tokens():
    model = tiny.bridge("gpt2")
    result = lp.AttentionPair("It", {"animal": ["dog", "Cat"], "thing": ("mat", "sofa")}).run(model, TEXTS[0])
    plain = lp.AttentionPair("it", KEYS).run(model, TEXTS[0])
    assert result.key == ("animal", "thing") and torch.equal(result.weight, plain.weight)
    tokens = lp.RankShift(at="resid_post").run(model, TEXTS[0]).token
    word = tokens.word[int(plain.query_position)]
    assert int(plain.query_position) == int((tokens.word == word).nonzero().max())


def test_figures_show_what_is_stored():
    result = planted(0, 3.0)
    grids = result.figure().data
    assert [list(row) for row in grids[0].z] == result.weight[:, :, :, 0].mean(2).tolist()
    table = result.contrast()
    (grid,) = result.figure_contrast().data
    assert [each for row in grid.z for each in row] == table["effect"].tolist() and grid.text is None
    tested = result.figure_test(table)
    assert list(tested.data[0].text[0]) == ["", "", "*", "", "", ""]
    assert tested.data[0].z == grid.z and "effect (nats)" in tested.data[0].colorbar.title.text.lower()
    assert "query “it”, keys “cat”, “mat”; tiny-gpt2" in result.figure().layout.title.text
    (terms,) = lp.AttentionPair("it", KEYS).run(tiny.bridge("gpt2"), TEXTS[0]).figure_terms(0, 1).data
    assert np.asarray(terms.z).shape == (2, 8)
