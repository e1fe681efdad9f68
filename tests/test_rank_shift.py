"""RankShift against brute force, against the model it reads, and against the work it comes from."""

import math
import sys

import jaxtyping
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from torch.nn.functional import normalize

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.probes.rank_shift import layer_overlap, null_ids
from lens_probes.testing import assert_same, check_probe
from lens_probes.text.prompts import Tokens

TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana, and nobody told the cat."]


@pytest.fixture
def as_users_run_it():
    """Without the checks of types that only tests have: a user's mistake must reach our own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def smollm2():
    return lp.load_model("smollm2-135m")


def bridge(architecture, **options):
    try:
        return tiny.bridge(architecture, **options)
    except ValueError as error:
        pytest.skip(f"this TransformerLens cannot boot it: {error}")


def brute_force_ranks(states, vocabulary, ids, metric):
    """Ranks in float64, one vocabulary entry at a time; entries closer by less than rounding are returned too."""
    states, vocabulary = states.double(), vocabulary.double()
    if metric == "cosine":
        closeness = normalize(states, dim=-1) @ normalize(vocabulary, dim=-1).T
    elif metric == "dot":
        closeness = states @ vocabulary.T
    else:
        closeness = -torch.cdist(states, vocabulary)
    own = closeness.gather(-1, ids[:, None])
    other = torch.arange(len(vocabulary)) != ids[:, None]
    scale = 1e-6 * closeness.abs().max()
    return ((closeness > own + scale) & other).sum(-1), ((closeness > own - scale) & other).sum(-1)


# Against references


@pytest.mark.parametrize(
    "metric", ["cosine", *(pytest.param(m, marks=pytest.mark.matrix) for m in ("euclidean", "dot"))]
)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_ranks_equal_a_brute_force_reference_in_float64_on_every_architecture(architecture, metric):
    model = bridge(architecture)
    result = lp.RankShift(at="resid_post", metric=metric).run(model, TEXTS, batch_size=1)
    for number, prompt in result.token.by_prompt():
        _, cache = model.run_with_cache(prompt.id[None], names_filter=lambda name: name.endswith("hook_resid_post"))
        rows = (result.token.prompt == number).nonzero().flatten()
        for layer in range(3):
            states = cache[f"blocks.{layer}.hook_resid_post"][0].detach()
            at_least, at_most = brute_force_ranks(states, model.W_E.detach(), prompt.id, metric)
            rank = result.rank[layer, rows]
            assert ((rank >= at_least) & (rank <= at_most)).all()
            assert (at_most - at_least).sum() <= 2  # rounding decides almost nowhere, or this would test nothing


def test_scores_are_the_cosine_the_product_and_the_distance_to_the_own_row():
    model = tiny.bridge("llama")
    _, cache = model.run_with_cache(torch.tensor([[5, 77, 33]]))
    states, rows = cache["blocks.1.hook_resid_mid"][0].detach(), model.W_E.detach()[[5, 77, 33]]
    expected = {
        "cosine": (states * rows).sum(-1) / (states.norm(dim=-1) * rows.norm(dim=-1)),
        "dot": (states * rows).sum(-1),
        "euclidean": (states - rows).norm(dim=-1),
    }

    for metric, score in expected.items():
        result = lp.RankShift(metric=metric, layers=[1]).run(model, [[5, 77, 33]])
        torch.testing.assert_close(result.score[0], score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.norm[0], states.norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", tiny.ENCODERS)
def test_ranks_on_an_encoder_equal_the_originals_formula_with_its_mistakes_corrected(architecture):
    model = bridge(architecture)
    result = lp.RankShift().run(model, TEXTS[0])
    states, _ = original_states(architecture, result.token.id)

    for layer, corrected in enumerate(states):
        at_least, at_most = brute_force_ranks(corrected, model.W_E.detach(), result.token.id, "cosine")
        assert ((result.rank[layer] >= at_least) & (result.rank[layer] <= at_most)).all()


@pytest.mark.parametrize("architecture", tiny.ENCODERS)
def test_the_originals_formula_as_published_gives_other_ranks(architecture):
    model = bridge(architecture)
    result = lp.RankShift().run(model, TEXTS[0])
    _, published = original_states(architecture, result.token.id)

    differing = [
        (result.rank[layer] != brute_force_ranks(state, model.W_E.detach(), result.token.id, "cosine")[0])
        .float()
        .mean()
        for layer, state in enumerate(published)
    ]
    assert min(differing) > 0.5


def test_the_originals_one_position_for_all_tokens_gives_other_ranks_than_each_tokens_own():
    model = bridge("bert")
    result = lp.RankShift(reference="embed_pos").run(model, TEXTS[0])
    states, _ = original_states("bert", result.token.id)
    first = model_embeddings("bert", position=0)

    same = brute_force_ranks(states[0], first, result.token.id, "cosine")[0] == result.rank[0]
    assert same[0]
    assert not same.all()


def original_states(architecture, ids):
    """Attention output plus residual before its norm, per layer, from Hugging Face modules; and as it was published.

    Published: the weights of value and output projection untransposed and without biases.
    """
    model = tiny.huggingface(architecture)
    body = getattr(model, architecture)
    hidden = body(ids[None], output_hidden_states=True).hidden_states
    corrected, published = [], []
    for layer, before in zip(body.encoder.layer, hidden, strict=False):
        attention = layer.attention.self
        corrected.append((layer.attention.output.dense(attention(before)[0]) + before)[0].detach())
        heads, width = attention.num_attention_heads, attention.attention_head_size
        query, key = (each(before).view(-1, heads, width) for each in (attention.query, attention.key))
        weights = torch.einsum("qhd,khd->hqk", query, key).div(width**0.5).softmax(-1)
        value = (before[0] @ attention.value.weight).view(-1, heads, width)
        context = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        published.append((context @ layer.attention.output.dense.weight + before[0]).detach())
    return corrected, published


def model_embeddings(architecture, position):
    """What the model's own embedding module gives for every id at one position, one sequence a vocabulary entry."""
    embeddings = getattr(tiny.huggingface(architecture), architecture).embeddings
    ids = torch.arange(embeddings.word_embeddings.num_embeddings)[:, None]
    return embeddings(input_ids=ids, position_ids=torch.full_like(ids, position))[:, 0].detach()


# Invariants with the model


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "roberta"])
@pytest.mark.parametrize("processed", [False, True])
def test_with_its_own_position_every_token_ranks_first_in_the_first_state(architecture, processed):
    model = bridge(architecture, processed=processed)
    result = lp.RankShift(at="resid_pre", reference="embed_pos", layers=[0]).run(model, TEXTS)
    assert result.rank.eq(0).all()
    torch.testing.assert_close(result.score, torch.ones_like(result.score))


def test_an_embedding_that_is_copied_through_ranks_first_everywhere(idle):
    for at in ("resid_pre", "resid_mid", "resid_post"):
        result = lp.RankShift(at=at).run(idle, TEXTS)
        assert result.rank.eq(0).all()
        torch.testing.assert_close(result.score, torch.ones_like(result.score))


def test_random_states_rank_uniformly_and_so_does_their_null():
    from scipy import stats

    generator = torch.Generator().manual_seed(11)
    model = tiny.bridge("llama")
    ids = torch.randint(3, 400, (60, 20), generator=generator)
    view = lp.ModelView(model)
    cache = {view.hook("resid_mid", 0): torch.randn(60, 20, view.d_model, generator=generator)}
    result = lp.RankShift(layers=[0]).from_cache(model, ids, cache)

    for ranks in (result.rank, result.null_rank):
        ranks = ranks[ranks >= 0].double() / (view.d_vocab - 1)
        assert abs(float(ranks.mean()) - 0.5) < 3 * (1 / 12 / len(ranks)) ** 0.5
        assert stats.kstest(ranks.numpy(), "uniform").pvalue > 0.001


def test_bfloat16_states_are_ranked_in_float32():
    model = tiny.bridge("llama", dtype=torch.bfloat16)
    result = lp.RankShift(at="resid_post").run(model, TEXTS[0])
    _, cache = model.run_with_cache(result.token.id[None])
    vocabulary = model.W_E.detach()
    halves = normalize(vocabulary, dim=-1)

    changed = []
    for layer in range(3):
        states = cache[f"blocks.{layer}.hook_resid_post"][0].detach()
        at_least, at_most = brute_force_ranks(states, vocabulary, result.token.id, "cosine")
        assert ((result.rank[layer] >= at_least) & (result.rank[layer] <= at_most)).all()
        in_halves = normalize(states, dim=-1) @ halves.T
        own = in_halves.gather(1, result.token.id[:, None])
        changed.append(((in_halves > own).sum(1) != result.rank[layer]).float().mean())
    assert result.provenance.dtype == "bfloat16"
    assert max(changed) > 0.1  # so it would have mattered


@pytest.mark.parametrize("reference", ["unembed", "embed"])
def test_the_reference_is_the_unembedding_or_the_embedding_where_they_differ(reference):
    model = tiny.bridge("llama")  # untied
    result = lp.RankShift(reference=reference, at="resid_post").run(model, [[9, 8, 7]])
    _, cache = model.run_with_cache(torch.tensor([[9, 8, 7]]))
    vocabulary = model.W_U.detach().T if reference == "unembed" else model.W_E.detach()
    at_least, at_most = brute_force_ranks(
        cache["blocks.2.hook_resid_post"][0].detach(), vocabulary, torch.tensor([9, 8, 7]), "cosine"
    )
    assert ((result.rank[2] >= at_least) & (result.rank[2] <= at_most)).all()


@pytest.mark.matrix
def test_it_keeps_the_contract_when_centred():
    for architecture in ("gpt2", "bert"):
        model = tiny.bridge(architecture)
        mean = lp.ResidualMean(at="resid_mid").run(model, TEXTS)
        check_probe(lp.RankShift(center=mean), models=[model])


def test_only_the_layers_asked_for_are_read_in_the_order_asked():
    model = tiny.bridge("gpt2")
    whole = lp.RankShift().run(model, TEXTS)
    some = lp.RankShift(layers=[-1, 0]).run(model, TEXTS)
    assert some.layer == ("2_mid", "0_mid")
    assert some.rank.equal(whole.rank[[2, 0]])
    assert some.provenance.hooks == ("blocks.2.hook_resid_mid", "blocks.0.hook_resid_mid")


def test_a_few_layers_at_a_time_give_the_same_as_all_at_once(monkeypatch):
    model = tiny.bridge("gpt2")
    whole = lp.RankShift(neighbours=2, overlap=3).run(model, TEXTS)
    monkeypatch.setattr(sys.modules[lp.RankShift.__module__], "STATES_AT_ONCE", 1)
    assert_same(whole, lp.RankShift(neighbours=2, overlap=3).run(model, TEXTS), "one layer at a time")


# Centring


def test_centring_removes_the_mean_state_and_the_mean_embedding():
    model = tiny.bridge("gpt2")
    mean = lp.ResidualMean(at="resid_post").run(model, TEXTS)
    result = lp.RankShift(at="resid_post", center=mean).run(model, TEXTS[0])
    _, cache = model.run_with_cache(result.token.id[None])
    vocabulary = model.W_E.detach() - model.W_E.detach().mean(0)

    for layer in range(3):
        states = cache[f"blocks.{layer}.hook_resid_post"][0].detach() - mean.mean[layer]
        at_least, at_most = brute_force_ranks(states, vocabulary, result.token.id, "cosine")
        assert ((result.rank[layer] >= at_least) & (result.rank[layer] <= at_most)).all()


def test_centring_takes_a_shared_direction_out_of_the_states():
    model = tiny.bridge("gpt2")
    raw = lp.RankShift().run(model, TEXTS)
    centred = lp.RankShift(center=lp.ResidualMean().run(model, TEXTS)).run(model, TEXTS)
    assert (raw.anisotropy > 0.2).all()
    assert (centred.anisotropy.abs() < 0.1).all()


def test_anisotropy_is_the_mean_cosine_over_all_pairs_of_ordinary_tokens():
    model = tiny.bridge("gpt2")
    result = lp.RankShift(layers=[1]).run(model, TEXTS[0])
    _, cache = model.run_with_cache(result.token.id[None])
    units = normalize(cache["blocks.1.hook_resid_mid"][0].detach()[~result.token.special].double(), dim=-1)
    cosines = units @ units.T
    n = len(units)
    assert result.token.special.any()
    assert float(result.anisotropy[0]) == pytest.approx(float((cosines.sum() - n) / (n * (n - 1))), abs=1e-5)


@pytest.mark.parametrize(
    ("center", "asked", "message"),
    [
        (
            lambda: lp.ResidualMean(at="resid_post").run(tiny.bridge("gpt2"), TEXTS),
            "gpt2",
            "center must have mean states at resid_mid .*; got resid_post",
        ),
        (
            lambda: lp.ResidualMean(layers=[0]).run(tiny.bridge("gpt2"), TEXTS),
            "gpt2",
            "center must have mean states at resid_mid .*2_mid.*; got resid_mid",
        ),
        (
            lambda: lp.ResidualMean().run(tiny.bridge("gpt2", seed=1), TEXTS),
            "gpt2",
            "center must come from tiny-gpt2 .*; got one of tiny-gpt2",
        ),
        (lambda: lp.ResidualMean().run(tiny.bridge("gpt2", processed=True), TEXTS), "gpt2", r"\(processed weights\)"),
        (
            lambda: lp.ResidualMean().run(tiny.bridge("llama"), TEXTS),
            "gpt2",
            "center must come from tiny-gpt2 .*; got one of tiny-llama",
        ),
    ],
)
def test_a_mean_of_another_model_or_read_point_is_refused_before_the_forward_pass(center, asked, message, monkeypatch):
    mean, model = center(), tiny.bridge(asked)
    monkeypatch.setattr(type(model), "run_with_cache", None)
    with pytest.raises(ValueError, match=message):
        lp.RankShift(center=mean).run(model, TEXTS)


# The null


def tokens(ids, word_class, special=None):
    n = len(ids)
    return Tokens(
        prompt=torch.zeros(n, dtype=torch.int64),
        position=torch.arange(n),
        id=torch.tensor(ids),
        text=tuple(map(str, ids)),
        word=torch.arange(n),
        word_class=tuple(word_class),
        special=torch.tensor(special or [False] * n),
        topic=("",) * n,
        document=torch.zeros(n, dtype=torch.int64),
    )


def test_the_null_is_another_token_of_the_class_with_another_id_and_not_the_next_token():
    table = tokens([10, 20, 30, 40, 10], ["content", "function", "content", "function", "content"])
    # 10: only 30 is content with another id. 20: the next is 30, so 40. 30: 10. 40: 20. The last 10: 30.
    assert null_ids(table, seed=0).tolist() == [30, 40, 10, 20, 30]


def test_a_token_whose_only_peer_comes_next_or_that_stands_alone_has_no_null():
    table = tokens([1, 10, 20, 5], ["", "content", "content", "function"], special=[True, False, False, False])
    # 10's only peer is 20, the next token; 20 has 10; the special token and the function word stand alone.
    assert null_ids(table, seed=0).tolist() == [-1, -1, 10, -1]


def test_the_next_tokens_id_is_left_out_wherever_it_stands():
    table = tokens([10, 20, 30, 20], ["content"] * 4)
    draws = {null_ids(table, seed=seed)[0].item() for seed in range(50)}
    assert draws == {30}


def test_the_null_is_drawn_evenly_and_by_the_seed():
    table = tokens(list(range(100, 108)), ["content"] * 8)
    draws = np.stack([null_ids(table, seed=seed).numpy() for seed in range(2000)])
    assert not (draws[0] == draws[1]).all()
    for position in range(7):
        values, times = np.unique(draws[:, position], return_counts=True)
        assert len(values) == 6  # neither itself nor the next
        assert (abs(times - 2000 / 6) < 5 * (2000 / 6) ** 0.5).all()


def test_a_missing_null_is_minus_one_and_counts_nowhere():
    result = lp.RankShift(layers=[0]).run(tiny.bridge("gpt2"), "Time flies.")
    assert result.token.special[0] and result.null_rank[0, 0] == -1
    table = result.by_word_class()
    assert (table["median"] >= 0).all() or (table.loc[table["median"] < 0, "quantity"] == "score").all()


# Neighbours and overlap


def test_neighbours_are_the_closest_entries_and_their_scores():
    model = tiny.bridge("gpt2")
    result = lp.RankShift(neighbours=4).run(model, TEXTS[0])
    _, cache = model.run_with_cache(result.token.id[None])
    cosines = normalize(cache["blocks.2.hook_resid_mid"][0].detach(), dim=-1) @ normalize(model.W_E.detach(), dim=-1).T
    expected = cosines.topk(4)
    assert result.neighbour_ids[2].equal(expected.indices)
    torch.testing.assert_close(result.neighbour_score[2], expected.values)
    ids = sorted(result.neighbour_ids.unique().tolist())
    assert result.vocab == dict(zip(ids, lp.ModelView(model).token_texts(ids), strict=True))


def test_overlap_is_the_share_of_the_nearest_kept_from_the_layer_before():
    ids = torch.tensor([[[1, 2, 3, 4]], [[4, 3, 9, 8]], [[8, 9, 3, 4]]])
    overlap = layer_overlap(ids)
    assert overlap[0].isnan().all()
    assert overlap[1:].flatten().tolist() == [0.5, 1.0]


# What the result answers


def test_shift_counts_from_the_first_layer():
    result = lp.RankShift().run(tiny.bridge("gpt2"), TEXTS)
    assert result.shift[0].eq(0).all()
    assert result.shift[2].equal(result.rank[2] - result.rank[0])


def test_by_word_class_gives_the_medians_of_ordinary_tokens():
    result = lp.RankShift().run(tiny.bridge("gpt2"), TEXTS)
    table = result.by_word_class().set_index(["quantity", "word_class", "layer"])
    by_token = result.by_word_class(weigh="tokens").set_index(["quantity", "word_class", "layer"])
    content = np.asarray(result.token.word_class) == "content"
    values, form = result.rank[1].numpy()[content], np.asarray(lp.inference.forms(result.token))[content].tolist()
    assert by_token.loc[("rank", "content", "1_mid"), "median"] == np.median(values)
    times = [math.lcm(*map(form.count, form)) // form.count(each) for each in form]  # so that types weigh equally
    assert len(set(times)) > 1
    assert table.loc[("rank", "content", "1_mid"), "median"] == np.median(np.repeat(values, times))
    assert table.loc[("score", "content", "1_mid"), "tokens"] == content.sum()
    assert "special" not in table.index.get_level_values("word_class")
    assert "special" in set(result.by_word_class(special=True)["word_class"])


def test_compare_agrees_with_counting_pairs_and_takes_strata_of_merge_order():
    model = tiny.bridge("gpt2")
    result = lp.RankShift().run(model, lp.demo.sentences()[:8])
    label = np.asarray(result.token.word_class)
    one, other = (result.rank[0].numpy()[label == each] for each in ("content", "function"))
    wins = (one[:, None] > other) + (one[:, None] == other) / 2
    frame = result.compare(permutations=99)
    assert result.compare(permutations=99, weigh="tokens")["effect"][0] == pytest.approx(wins.mean())
    form = list(zip(lp.inference.forms(result.token), result.token.word_class, strict=True))
    weight = np.array([1 / form.count(each) for each in form])
    weights = np.outer(weight[label == "content"], weight[label == "function"])
    assert frame["effect"][0] == pytest.approx(np.average(wins, weights=weights))
    assert frame["layer"].tolist() == list(result.layer)

    order = lp.words.merge_order(model.tokenizer)[result.token.id]
    matched = result.compare(strata=order, permutations=99)
    assert (matched["strata"] + matched["strata_with_one_class"] <= 10).all()
    with pytest.raises(ValueError, match="must be one of rank, score, norm, null_rank, shift; got 'anisotropy'"):
        result.compare(quantity="anisotropy")


def test_on_a_real_model_content_words_stay_nearer_to_their_embedding_than_function_words(smollm2):
    texts = lp.demo.sentences()[30:42]
    raw = lp.RankShift(layers=[15, 29]).run(smollm2, texts)
    centred = lp.RankShift(layers=[29], center=lp.ResidualMean().run(smollm2, texts)).run(smollm2, texts)

    def median(result, word_class, layer):
        member = np.asarray(result.token.word_class) == word_class
        return float(np.median(result.rank[result.layer.index(layer)].numpy()[member]))

    # The known figures: 20,000 and 47,000 in the middle, 14,000 and 38,000 at the end, centred 1,800 and 41,000.
    assert 8_000 < median(raw, "content", "15_mid") < 32_000 < median(raw, "function", "15_mid")
    assert 7_000 < median(raw, "content", "29_mid") < 28_000 < median(raw, "function", "29_mid")
    assert 500 < median(centred, "content", "29_mid") < 6_000
    assert 25_000 < median(centred, "function", "29_mid") < 49_152
    comparison = centred.compare(permutations=199)
    assert comparison["effect"][0] < 0.3 and comparison["q"][0] < 0.05


# Figures


def test_the_main_figure_shows_medians_intervals_and_the_null():
    result = lp.RankShift().run(tiny.bridge("gpt2"), lp.demo.sentences()[:6])
    figure = result.figure()
    names = [trace.name for trace in figure.data if trace.name]
    content = next(trace for trace in figure.data if trace.name and trace.name.startswith("content"))
    table = result.by_word_class()
    expected = table[(table["quantity"] == "rank") & (table["word_class"] == "content")]["median"]
    assert list(content.y) == list(expected)
    assert "content: rank of another token of the prompt and class" in names
    assert sum(trace.fill == "toself" for trace in figure.data) >= 4
    assert figure.layout.yaxis.title.text == "rank of the token's own entry (0 to 399)"
    assert "resid_mid against embed, cosine; tiny-gpt2 (raw weights, float32), 6 prompts" in figure.layout.title.text


def test_paths_draw_every_token_once_and_one_of_them_bold():
    result = lp.RankShift().run(tiny.bridge("gpt2"), TEXTS)
    figure = result.figure_paths(prompt=1, token=3)
    drawn = [trace for trace in figure.data if trace.x[0] is not None]
    rows = (result.token.prompt == 1).nonzero().flatten()
    assert len(drawn) == len(rows)
    assert [trace.line.width for trace in drawn].count(4) == 1
    assert list(drawn[-1].y) == result.rank[:, rows[3]].tolist()
    assert [any("<b>" in text for text in trace.text or ()) for trace in drawn].count(True) == 1


def test_neighbours_are_drawn_as_a_table_with_the_own_entry_shaded():
    result = lp.RankShift(at="resid_pre", neighbours=3).run(tiny.bridge("llama"), TEXTS[0])
    table = result.figure_neighbours(token=2).data[0]
    assert len(table.cells["values"]) == 5
    assert table.cells["values"][1][0] == "0"  # without positions, the first state is the embedding
    assert table.cells["fill"]["color"][2][0] != "white"


HOSTILE = "<script>alert(1)</script> </b><img src=x onerror=alert(2)> &lt;"


def test_nothing_in_a_tokens_text_can_act_as_html():
    model = tiny.bridge("gpt2")
    result = lp.RankShift(neighbours=2).run(model, [HOSTILE, "A plain text."])
    object.__setattr__(result.token, "text", tuple(HOSTILE for _ in result.token.text))
    object.__setattr__(result, "vocab", dict.fromkeys(result.vocab, HOSTILE))
    object.__setattr__(result.provenance, "model", HOSTILE)
    figures = [result.figure(), result.figure_paths(0, 1), result.figure_neighbours(1)]
    for figure in figures:
        text = figure.to_json()
        assert "<script" not in text and "<img" not in text and "onerror=alert(2)>" not in text
        assert "</b>\\u003cimg" not in text
    assert "<script>alert" not in result._repr_html_()


def test_figures_ask_for_what_they_lack():
    result = lp.RankShift().run(tiny.bridge("gpt2"), TEXTS)
    with pytest.raises(ValueError, match=r"run RankShift\(neighbours=10\)"):
        result.figure_neighbours(0)
    with pytest.raises(ValueError, match="prompt 2 is out of range: this result has prompts 0 to 1"):
        result.figure_paths(prompt=2)
    with pytest.raises(ValueError, match="token 99 is out of range: prompt 0 has tokens 0 to"):
        result.figure_paths(token=99)
    assert isinstance(lp.RankShift(layers=[0]).run(tiny.bridge("gpt2"), [[5]]).figure_paths(), go.Figure)


# Refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"at": "resid_end"}, r"RankShift\(at=\.\.\.\) must be 'resid_pre', .*; got 'resid_end'"),
        ({"reference": "embedding"}, "must be 'embed', 'embed_pos' or 'unembed'; got 'embedding'"),
        ({"metric": "cos"}, "must be 'cosine', 'euclidean' or 'dot'; got 'cos'"),
        ({"neighbours": -1}, "must be a whole number, 0 or more; got -1"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_setting_that_does_not_exist_is_refused_when_the_probe_is_made(setting, message):
    with pytest.raises(ValueError, match=message):
        lp.RankShift(**setting)


@pytest.mark.parametrize(
    ("probe", "architecture", "message"),
    [
        (
            lp.RankShift(),
            "neox",
            "read point 'resid_mid' does not exist in tiny-neox .* use one of resid_pre, resid_post",
        ),
        (
            lp.RankShift(reference="embed_pos"),
            "llama",
            "needs learned absolute positions; got tiny-llama, which has none: use 'embed'",
        ),
        (lp.RankShift(neighbours=401), "gpt2", "must be at most 400, the size of the vocabulary; got 401"),
        (lp.RankShift(layers=[3]), "gpt2", "layer 3 is out of range: tiny-gpt2 has layers 0 to 2"),
        (lp.RankShift(layers=[0, -3]), "gpt2", "must name one layer or more, each once"),
    ],
)
def test_what_a_model_lacks_is_refused_before_the_forward_pass(probe, architecture, message, monkeypatch):
    model = tiny.bridge(architecture)
    monkeypatch.setattr(type(model), "run_with_cache", None)
    with pytest.raises(ValueError, match=message):
        probe.run(model, TEXTS)


@pytest.mark.usefixtures("as_users_run_it")
def test_plausible_slips_are_answered_with_what_to_write_instead():
    model = tiny.bridge("gpt2")
    empty = lp.ResidualMean().run(model, [[model.tokenizer.bos_token_id]])
    with pytest.raises(ValueError, match="center must have states; got special tokens only"):
        lp.RankShift(center=empty).run(model, TEXTS)
    with pytest.raises(TypeError, match=r"must be the result of ResidualMean\(\).run.*; got <Tensor of shape"):
        lp.RankShift(center=torch.zeros(3, 32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"write layers=\[1\]"):
        lp.RankShift(layers=1).run(model, TEXTS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"write RankShift\(\)"):
        lp.run([lp.RankShift], model, TEXTS)
    for returned in ("long", [(0, 4, "x")], None):
        with pytest.raises(TypeError, match=r"return a list of lens_probes\.text\.words\.Word"):
            lp.RankShift().run(model, TEXTS, word_class=lambda text, returned=returned: returned)


def test_help_of_a_probe_is_its_method_card():
    card = lp.RankShift.__doc__
    assert "rank[layer, token]" in card and "Source:" in card and "`metric`" in card
