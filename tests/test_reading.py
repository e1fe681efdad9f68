"""Batches, padding, caches and contexts change nothing: a probe sees the valid tokens of each prompt, and no more."""

from collections.abc import Callable
from dataclasses import field, fields
from importlib.metadata import version
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from jaxtyping import Float64
from torch import Tensor

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probe import Probe, names_of
from lens_probes.reading import TOKENS_PER_BATCH, Reading, pad
from lens_probes.result import Result, summed
from lens_probes.text.prompts import Table, tokenize

HAS_HOOKED = version("transformer-lens").startswith("3.")
TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana, and the cat likes none of it.", "The old man"]
PROBES = [lp.RankShift(at="resid_post"), lp.ResidualUpdate(), lp.ResidualMean(at="resid_post")]
STATE = "blocks.1.hook_resid_post"
PATTERN = "blocks.1.attn.hook_pattern"


class CountResult(Result):
    """A number of tokens."""

    count: Float64[Tensor, ""] = summed("number of tokens")

    def figure(self, **look: Any) -> go.Figure:
        return go.Figure()


class Spy(Probe[CountResult]):
    """Keeps what it is shown."""

    names: tuple[str, ...] = (STATE,)
    seen: list[Reading] = field(default_factory=list, repr=False)

    def hooks(self, model: ModelView) -> list[str]:
        return list(self.names)

    def measure(self, reading: Reading) -> CountResult:
        self.seen.append(reading)
        for name in self.names:
            if "attn" not in name:
                reading[name]
        return CountResult(count=torch.tensor(len(reading.tokens), dtype=torch.float64))


def values_of(result: Result) -> dict[str, Any]:
    """The fields of a result other than its provenance."""
    return {each.name: getattr(result, each.name) for each in fields(result) if each.name != "provenance"}


def spied(model: Any, prompts: Any, *names: str, **options: Any) -> list[Reading]:
    """The readings that a probe of these names is shown."""
    spy = Spy(names)
    spy.run(model, prompts, **{"progress": False, **options})
    return spy.seen


def assert_same(one: Result, other: Result) -> None:
    """Equal labels, floats equal to 1e-4 of the largest, ranks equal except where float32 decides between near ties.

    Such a rank may be off by one, in at most one entry of a hundred.
    """
    for name, value in values_of(one).items():
        columns = value.columns() if isinstance(value, Table) else {name: value}
        others = getattr(other, name).columns() if isinstance(value, Table) else {name: getattr(other, name)}
        for column, own in columns.items():
            if not isinstance(own, Tensor):
                assert own == others[column], (name, column)
            elif own.is_floating_point():
                scale = max(1.0, float(own.nan_to_num().abs().max()))
                torch.testing.assert_close(own, others[column], rtol=0, atol=1e-4 * scale, equal_nan=True)
            elif name in ("rank", "null_rank"):
                off = (own - others[column]).abs()
                assert off.max() <= 1, name
                assert off.double().mean() <= 0.01, name
            else:
                assert torch.equal(own, others[column]), (name, column)


# Batches and padding


def test_a_batch_of_different_lengths_gives_what_single_prompts_give(cell: Any) -> None:
    model = cell.build(padding_side="left")
    alone = [lp.run(PROBES, model, text) for text in TEXTS]
    batches = [lp.run(PROBES, model, TEXTS)]
    if not cell.processed:  # the same model with other weights: one side is enough
        batches.append(lp.run(PROBES, cell.build(padding_side="right"), TEXTS))
    for batch in batches:
        for together, *parts in zip(batch, *alone, strict=True):
            assert_same(together, Result.merge(parts))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_tokens_within_prompts_and_prompts_of_1_and_64_tokens_are_like_any_other(side: Any, raw: Any) -> None:
    # As in SmolLM2, where pad is the end-of-sequence token: a mask of `ids != pad` would lose it.
    model = raw.build(padding_side=side)
    end = ModelView(model).pad_id
    prompts = [[7, end, 8, end], [end], [9], list(range(10, 74))]
    together = lp.run(PROBES, model, prompts)
    assert together[0].token.id.tolist() == [i for prompt in prompts for i in prompt]
    for batch, single in zip(together, lp.run(PROBES, model, prompts, batch_size=1, progress=False), strict=True):
        assert_same(batch, single)


def test_ids_are_padded_on_the_tokenizers_side_with_an_id_of_the_vocabulary() -> None:
    for first, mask in (([0, 0, 5], [0, 0, 1]), ([5, 0, 0], [1, 0, 0])):
        view = ModelView(tiny.bridge("gpt2", padding_side="left" if mask[2] else "right"))
        view.tokenizer.pad_token = view.tokenizer.bos_token  # id 0
        ids, valid = pad(tokenize([[5], [6, 7, 8]], view), view)
        assert ids.tolist() == [first, [6, 7, 8]]
        assert valid.tolist() == [[bool(one) for one in mask], [True] * 3]
        view.tokenizer.pad_token_id = 400  # outside, as a token that was added to the tokenizer alone
        assert pad(tokenize([[5], [6, 7, 8]], view), view)[0].max() < 400


def test_a_batch_holds_at_most_512_tokens_padding_included(gpt2: Any) -> None:
    lengths = [64] * 9 + [1] * 30 + [3, 64, 2]
    prompts = [[7] * length for length in lengths]
    seen = spied(gpt2, prompts, STATE)
    shapes = [reading._mask.shape for reading in seen]
    assert [shape[0] for shape in shapes] == [
        8,
        8,
        24,
        2,
    ]  # 8 of 64, one of 64 with 7 of 1, 23 of 1 with that of 3, the rest
    assert all(rows * width <= TOKENS_PER_BATCH == 512 for rows, width in shapes)
    assert torch.cat([reading._mask.sum(1) for reading in seen]).tolist() == lengths
    assert [len(reading._mask) for reading in spied(gpt2, [[7]] * 5, STATE, batch_size=2)] == [2, 2, 1]


def test_results_of_many_batches_are_folded_on_the_way_and_stay_the_same(gpt2: Any) -> None:
    prompts = [[7, 8 + i % 300] for i in range(67)]
    many = lp.run(PROBES[1:], gpt2, prompts, batch_size=1, progress=False)
    one = lp.run(PROBES[1:], gpt2, prompts, batch_size=len(prompts), progress=False)
    for batches, whole in zip(many, one, strict=True):
        assert_same(batches, whole)
        assert batches.provenance == whole.provenance
    assert many[0].token.prompt.tolist() == [i // 2 for i in range(2 * len(prompts))]


# One forward pass


@pytest.fixture
def passes(own_gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the activations that each forward pass of `own_gpt2` was asked for."""
    asked: list[list[str]] = []
    run_with_hooks = type(own_gpt2).run_with_hooks

    def counted(model: Any, *inputs: Any, fwd_hooks: list[tuple[str, Any]], **options: Any) -> Any:
        asked.append([name for name, _ in fwd_hooks])
        return run_with_hooks(model, *inputs, fwd_hooks=fwd_hooks, **options)

    monkeypatch.setattr(type(own_gpt2), "run_with_hooks", counted)
    return asked


def test_several_probes_share_one_forward_pass_a_batch_and_answer_in_order(
    own_gpt2: Any, passes: list[list[str]]
) -> None:
    probes = [
        lp.ResidualUpdate(),
        lp.EmbeddingDensity(),
        lp.RankShift(at="resid_post"),
        lp.RankShift(at="resid_pre"),
        lp.ResidualUpdate(),
    ]
    results = lp.run(probes, own_gpt2, TEXTS, batch_size=2, progress=False)
    assert len(passes) == 2
    assert [result.provenance.probe for result in results] == [repr(probe) for probe in probes]
    assert sorted(passes[0]) == sorted({f"blocks.{i}.hook_resid_{at}" for i in range(3) for at in ("pre", "post")})
    assert [result.provenance.hooks for result in results] == [
        tuple(names_of(probe.hooks(ModelView(own_gpt2)))) for probe in probes
    ]
    for probe, result in zip(probes, results, strict=True):
        assert_same(result, probe.run(own_gpt2, TEXTS))


def test_a_probe_without_hooks_needs_no_forward_pass(own_gpt2: Any, passes: list[list[str]]) -> None:
    assert len(lp.EmbeddingDensity().run(own_gpt2, TEXTS).token) > 10
    assert passes == []


def test_only_the_named_activations_are_kept_and_shown(own_gpt2: Any, passes: list[list[str]]) -> None:
    (reading,) = spied(own_gpt2, TEXTS, STATE)
    assert passes == [[STATE]]
    assert list(reading._cache) == [STATE]
    with pytest.raises(
        ValueError, match=rf"named by the probe's hooks; got 'blocks\.0\.hook_resid_pre', and they name {STATE}"
    ):
        reading["blocks.0.hook_resid_pre"]
    with pytest.raises(ValueError, match=r"must be named by the probe's hooks; got .*, and they name none"):
        spied(own_gpt2, TEXTS)[0][STATE]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: lp.ResidualUpdate(layers=[3]).run(model, "one"), "layer 3 is out of range"),
        (lambda model: Spy(("blocks.9.hook_resid_pre",)).run(model, "one"), r"'blocks\.9\.hook_resid_pre' does not"),
        (lambda model: lp.ResidualUpdate().run(model, []), "prompts must be one or more; got none: pass a text"),
        (
            lambda model: lp.ResidualUpdate().run(model, [[1], [1] * 65]),
            "must have at most 64 tokens; got 65 in prompt 1",
        ),
        (lambda model: lp.ResidualUpdate().run(model, [[1], [400]]), "must be 0 to 399; got 400 in prompt 1"),
        (
            lambda model: lp.ResidualUpdate().run(model, {"one": "text"}),
            "must have two prompts or more; got 1 for 'one'",
        ),
        (
            lambda model: lp.ResidualUpdate().run(model, "one", batch_size=0),
            "must be a number of prompts, 1 or more; got 0",
        ),
        (lambda model: lp.run([], model, "one"), "probes must be one or more; got none: pass a list"),
        (
            lambda model: lp.run(lp.ResidualUpdate(), model, "one"),
            r"got one probe, ResidualUpdate\(component='layer', layers=None\): write run\(\[",
        ),
        (
            lambda model: lp.run({"a": lp.ResidualUpdate()}, model, "one"),  # pyright: ignore[reportArgumentType]
            r"must be a list and come first; got \{'a': ResidualUpdate\(",
        ),
    ],
)
def test_a_mistake_is_refused_before_the_forward_pass(
    ask: Callable[[Any], Any], message: str, own_gpt2: Any, passes: list[list[str]]
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ask(own_gpt2)
    assert passes == []


def test_run_hands_on_how_to_read_texts(gpt2: Any) -> None:
    def one_word(text: str) -> list[lp.words.Word]:
        return [lp.words.Word(0, len(text), "all")]

    for ask in (lp.ResidualUpdate().run, lambda *given, **options: lp.run([lp.ResidualUpdate()], *given, **options)[0]):
        with_bos, without = (ask(gpt2, TEXTS, prepend_bos=flag, word_class=one_word).token for flag in (True, False))
        assert len(with_bos) == len(without) + 3
        assert set(with_bos.word_class) == {"all", ""}


# What a probe sees


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reading_holds_the_valid_tokens_end_to_end_and_by_prompt(side: Any, cell: Any) -> None:
    model = cell.build(padding_side=side)
    (reading,) = spied(model, TEXTS, STATE)
    singles = [spied(model, text, STATE)[0] for text in TEXTS]
    assert reading[STATE].shape == (len(reading.tokens), 32)
    torch.testing.assert_close(reading[STATE], torch.cat([one[STATE] for one in singles]), rtol=0, atol=1e-5)
    parts = list(reading.by_prompt())
    assert [part.tokens.prompt.unique().tolist() for part in parts] == [[0], [1], [2]]
    for part, single in zip(parts, singles, strict=True):
        assert part.tokens.id.tolist() == single.tokens.id.tolist()
        assert part.tokens.text == single.tokens.text
        torch.testing.assert_close(part[STATE], single[STATE], rtol=0, atol=1e-5)


def test_prompts_are_numbered_from_zero_in_a_reading_and_through_in_the_result(gpt2: Any) -> None:
    readings = spied(gpt2, [[7, 8], [9], [10]], STATE, batch_size=2)
    assert [reading.tokens.prompt.tolist() for reading in readings] == [[0, 0, 1], [0]]
    assert lp.ResidualUpdate().run(gpt2, [[7, 8], [9], [10]], batch_size=2).prompt.prompt.tolist() == [0, 1, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_square_of_attention_is_one_prompts_own_and_its_rows_sum_to_one(side: Any, raw: Any) -> None:
    model = raw.build(padding_side=side)
    (reading,) = spied(model, TEXTS, PATTERN)
    for part, text in zip(reading.by_prompt(), TEXTS, strict=True):
        pattern = part.pattern(PATTERN)
        n = len(part.tokens)
        assert pattern.shape == (4, n, n)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(4, n), rtol=0, atol=1e-5)
        future = pattern.triu(diagonal=1)
        assert bool(future.any()) == (raw.architecture in tiny.ENCODERS)
        torch.testing.assert_close(pattern, spied(model, text, PATTERN)[0].pattern(PATTERN), rtol=0, atol=1e-5)


def test_what_is_square_is_not_given_end_to_end_and_one_square_is_of_one_prompt(gpt2: Any) -> None:
    (reading,) = spied(gpt2, TEXTS, PATTERN)
    with pytest.raises(ValueError, match=r"hook_pattern' of shape \(3, 4, \d+, \d+\) has no token axis .*by_prompt"):
        reading[PATTERN]
    with pytest.raises(ValueError, match=r"pattern\('blocks\.1\.attn\.hook_pattern'\) is about one prompt; .* has 3"):
        reading.pattern(PATTERN)


def test_what_a_probe_changes_in_a_reading_does_not_reach_the_next_probe(gpt2: Any) -> None:
    (reading,) = spied(gpt2, TEXTS, STATE)
    before = reading[STATE].clone()
    reading[STATE].zero_()
    assert torch.equal(reading[STATE], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_name(value: float, own_gpt2: Any) -> None:
    with torch.no_grad():
        for parameter in own_gpt2.blocks[1].parameters():
            parameter.fill_(value)
    with pytest.raises(ValueError, match=r"activation 'blocks\.1\.hook_resid_post' must be finite; got NaN or Inf"):
        lp.RankShift(at="resid_post").run(own_gpt2, TEXTS)
    assert lp.RankShift(at="resid_post", layers=[0]).run(own_gpt2, TEXTS).layer == ("0_post",)


def test_an_attention_pattern_of_nan_is_refused_by_name_and_masked_scores_are_not(own_gpt2: Any) -> None:
    scores = "blocks.1.attn.hook_attn_scores"  # -inf or the like where attention may not look
    (reading,) = spied(own_gpt2, "one two", scores, PATTERN)
    assert reading.pattern(scores).min() < -1e30
    reading._cache[PATTERN][0, 2, 1, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"activation '{PATTERN}' must be finite; got NaN or Inf"):
        reading.pattern(PATTERN)


# A cache that the user has


def own_cache(model: Any, ids: Tensor, mask: Tensor | None = None, names: list[str] | None = None) -> Any:
    """As a user makes it."""
    mask = torch.ones_like(ids) if mask is None else mask.long()
    return model.run_with_cache(ids, attention_mask=mask, names_filter=names)[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_of_ids_and_their_mask_gives_what_run_gives(side: Any, raw: Any) -> None:
    model = raw.build(padding_side=side)
    view = ModelView(model)
    ids, mask = pad(tokenize(TEXTS, view), view)
    cache = own_cache(model, ids, mask)
    as_dict = {name: cache[name] for name in cache.keys()}  # noqa: SIM118  (an ActivationCache is no dict)
    for probe, whole in zip(PROBES, lp.run(PROBES, model, TEXTS), strict=True):
        found = probe.from_cache(model, ids, cache, attention_mask=mask)
        assert_same(whole, found)
        assert found.provenance == whole.provenance
    probe, whole = lp.ResidualMean(at="resid_post"), lp.ResidualMean(at="resid_post").run(model, TEXTS)
    assert_same(whole, probe.from_cache(model, ids, as_dict, attention_mask=mask.long()))
    assert_same(whole, probe.from_cache(model, TEXTS, cache))
    assert_same(whole, probe.from_cache(model, TEXTS, as_dict, attention_mask=mask))


def test_a_mask_on_the_other_side_than_the_tokenizers_is_heeded(gpt2: Any) -> None:
    ids = torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]])  # padded left, and this tokenizer pads right
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for probe in PROBES:
        whole = probe.run(gpt2, [[7, 8], [9, 10, 11, 12]])
        assert_same(whole, probe.from_cache(gpt2, ids, own_cache(gpt2, ids, mask), attention_mask=mask))


def test_a_matrix_of_ids_without_a_mask_counts_as_unpadded(raw: Any) -> None:
    model = raw.build()
    pads = torch.tensor([[7, 8, 9], [10, 11, ModelView(model).pad_id]])
    cache = own_cache(model, pads)
    for probe, whole in zip(PROBES, lp.run(PROBES, model, pads), strict=True):
        found = probe.from_cache(model, pads, cache)
        assert_same(whole, found)
        assert found.provenance.n_tokens == 6


def test_a_cache_without_its_batch_axis_gives_what_run_gives(raw: Any) -> None:
    model = raw.build()
    ids = tokenize(TEXTS[0], ModelView(model)).id
    names = [name for probe in PROBES for name in names_of(probe.hooks(ModelView(model)))]
    _, cache = model.run_with_cache(ids[None], names_filter=names, remove_batch_dim=True)
    assert cache[STATE].shape == (len(ids), 32)
    for probe, whole in zip(PROBES, lp.run(PROBES, model, TEXTS[0]), strict=True):
        for prompts in (TEXTS[0], ids, ids[None], ids.tolist()):
            assert_same(whole, probe.from_cache(model, prompts, cache))


def test_a_cache_of_texts_that_the_model_tokenised_gives_what_run_gives(raw: Any) -> None:
    model = raw.build()
    # RoBERTa's own to_tokens leaves </s> away from a single text, and TransformerLens 3 reads BERT's padding: the first
    # cache is refused, the second cannot be known to be wrong, and is not made here.
    if raw.architecture == "roberta":
        with pytest.raises(ValueError, match="pass the token ids that the model was run with"):
            PROBES[0].from_cache(model, TEXTS[0], model.run_with_cache(TEXTS[0])[1])
    padded_is_right = not (HAS_HOOKED and raw.architecture == "bert")
    for texts in [TEXTS] if raw.architecture == "roberta" else [TEXTS[:1], TEXTS] if padded_is_right else [TEXTS[:1]]:
        _, cache = model.run_with_cache(texts)
        for probe, whole in zip(PROBES, lp.run(PROBES, model, texts), strict=True):
            assert_same(whole, probe.from_cache(model, texts, cache))
    if raw.architecture in tiny.DECODERS:
        _, cache = model.run_with_cache(TEXTS, prepend_bos=False)
        whole = PROBES[1].run(model, TEXTS, prepend_bos=False)
        assert_same(whole, PROBES[1].from_cache(model, TEXTS, cache, prepend_bos=False))


def test_a_cache_with_gradients_gives_a_result_without(gpt2: Any) -> None:
    ids, names = (
        torch.tensor([[7, 8, 9]]),
        [name for probe in PROBES for name in names_of(probe.hooks(ModelView(gpt2)))],
    )
    cache = {name: value.clone().requires_grad_() for name, value in own_cache(gpt2, ids, names=names).items()}
    for probe in PROBES:
        for value in values_of(probe.from_cache(gpt2, ids, cache)).values():
            assert not (isinstance(value, Tensor) and value.requires_grad)


def test_a_square_of_a_users_cache_is_that_of_a_run(gpt2: Any) -> None:
    view = ModelView(gpt2)
    ids, mask = pad(tokenize(TEXTS, view), view)
    spy = Spy((PATTERN,))
    spy.from_cache(gpt2, ids, own_cache(gpt2, ids, mask), attention_mask=mask)
    (ran,) = spied(gpt2, TEXTS, PATTERN)
    for one, other in zip(spy.seen[0].by_prompt(), ran.by_prompt(), strict=True):
        torch.testing.assert_close(one.pattern(PATTERN), other.pattern(PATTERN), rtol=0, atol=1e-5)


IDS = torch.tensor([[7, 8, 9], [10, 11, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        (IDS, MASK[:, :2], r"attention_mask has shape \(2, 2\) and the ids \(2, 3\): they must be equal"),
        (IDS, MASK[0], r"attention_mask has shape \(3,\) and the ids \(2, 3\)"),
        ([[7, 8], [10, 11]], MASK, r"marks \[3, 2\] tokens a prompt and the prompts have \[2, 2\]: pass the mask"),
        ([[7, 8, 9], [10, 11]], MASK[0], "marks 3 tokens a prompt and the prompts have"),
        ([[7, 8, 9], [10, 11]], MASK[:1], r"marks \[3\] tokens a prompt and the prompts have \[3, 2\]"),
        (IDS, torch.zeros_like(MASK), "prompt 0 must not be empty"),
        (IDS[:1], None, r"of \(1, 3\): pass the token ids that the model was run with"),
        (IDS[:, :2], None, r"in the cache has shape \(2, 3, 32\) and the prompts make a batch of \(2, 2\): pass the"),
        ([[7, 8, 9]] * 3, None, r"make a batch of \(3, 3\)"),
        ([[7] * 32, [8] * 32], None, r"make a batch of \(2, 32\)|has no token axis"),  # 32 is also d_model
        ([[7, 8, 400], [1, 2, 3]], None, "must be 0 to 399; got 400 in prompt 0"),
        ("a text of other length than the cache", None, "pass the token ids that the model was run with"),
    ],
)
def test_a_cache_of_other_prompts_is_refused(prompts: Any, mask: Tensor | None, message: str, gpt2: Any) -> None:
    cache = own_cache(gpt2, IDS, MASK)
    with pytest.raises(ValueError, match=message):
        lp.ResidualUpdate().from_cache(gpt2, prompts, cache, attention_mask=mask)


def test_a_cache_of_other_ids_of_the_same_shape_is_refused_by_their_embeddings(model: Any) -> None:
    view = ModelView(model)
    ids = torch.tensor([[7, 8, 9], [10, 11, 12]])
    cache = own_cache(model, ids)
    other = ids.clone()
    other[1, 2] = 13
    for held in (cache, {name: cache[name] for name in cache.keys()}):  # noqa: SIM118
        PROBES[1].from_cache(model, ids, held)
        message = (
            r"same tokens and model; got another embedding at token 2 of prompt 1 than tiny-.*: pass the ids and the m"
        )
        with pytest.raises(ValueError, match=message):
            PROBES[1].from_cache(model, other, held)
        with pytest.raises(ValueError, match="at token 0 of prompt 0"):
            PROBES[1].from_cache(model, ids.flip(0), held)
    # Without the embeddings nothing tells: the docstring says so.
    without = {name: cache[name] for name in PROBES[1].hooks(view)}
    PROBES[1].from_cache(model, other, without)


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_are_compared_at_tokens_only_whatever_the_side_of_padding(side: Any, raw: Any) -> None:
    model = raw.build(padding_side=side)
    ids, mask = pad(tokenize(TEXTS, ModelView(model)), ModelView(model))
    cache = own_cache(model, ids, mask)
    PROBES[1].from_cache(model, torch.where(mask, ids, 5), cache, attention_mask=mask)
    ids[1, int(mask[1].nonzero()[-1])] = 5
    with pytest.raises(ValueError, match=f"another embedding at token {int(mask[1].sum()) - 1} of prompt 1"):
        PROBES[1].from_cache(model, ids, cache, attention_mask=mask)


def test_embeddings_are_compared_to_the_coarser_precision(raw: Any) -> None:
    ids = torch.tensor([[7, 8, 9]])
    for made_in, read_in in (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")):
        made, read = (raw.build(dtype=getattr(torch, dtype)) for dtype in (made_in, read_in))
        cache = own_cache(made, ids)
        lp.ResidualUpdate().from_cache(read, ids, cache)
        with pytest.raises(ValueError, match="at token 2 of prompt 0"):
            lp.ResidualUpdate().from_cache(read, [[7, 8, 10]], cache)
    model = raw.build()
    cache = own_cache(model, ids)
    halved = {name: cache[name].half() for name in cache.keys()}  # noqa: SIM118  (to save memory)
    lp.ResidualUpdate().from_cache(model, ids, halved)


def test_a_cache_of_another_model_is_refused_by_its_embeddings(gpt2: Any) -> None:
    ids = torch.tensor([[7, 8, 9]])
    for other in (tiny.bridge("gpt2", seed=1), tiny.bridge("gpt2", processed=True)):
        with pytest.raises(ValueError, match=r"at token 0 of prompt 0 than tiny-gpt2 gives .*: pass the ids and"):
            lp.RankShift().from_cache(gpt2, ids, own_cache(other, ids))
    wider = {name: own_cache(gpt2, ids)[name].repeat(1, 1, 2) for name in ("hook_embed", "blocks.0.hook_resid_post")}
    with pytest.raises(ValueError, match="same tokens and model"):
        lp.ResidualMean(at="resid_post", layers=[0]).from_cache(gpt2, ids, wider)


@pytest.mark.usefixtures("as_users_run_it")
def test_the_pair_that_run_with_cache_returns_and_what_is_no_cache_are_refused(gpt2: Any) -> None:
    pair = gpt2.run_with_cache(IDS)
    with pytest.raises(TypeError, match=r"pair \(logits, cache\) that run_with_cache returns: pass its second part"):
        lp.ResidualUpdate().from_cache(gpt2, IDS, pair)
    with pytest.raises(
        TypeError, match=r"got <Tensor of shape \(2, 3, 400\)>: write from_cache\(model, prompts, cache"
    ):
        lp.ResidualUpdate().from_cache(gpt2, IDS, pair[0])
    lp.ResidualUpdate().from_cache(gpt2, IDS, pair[1])


@pytest.mark.usefixtures("as_users_run_it")
def test_arguments_in_the_wrong_order_get_one_short_sentence(gpt2: Any) -> None:
    with pytest.raises(TypeError, match=r"got <TransformerBridge>: write run\(\[probe\], model, prompts\)$"):
        lp.run(gpt2, [lp.ResidualUpdate()], "one")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError,
        match=r"^probes must be a list of probes; got <TransformerBridge>: write run\(\[probe\], model, prompts\)",
    ):
        lp.run([gpt2], gpt2, "one")
    with pytest.raises(
        TypeError, match=r"list of probes; got TunedLens\(.*: write .* or experiment\.run\(model, prompts\)"
    ):
        lp.run([lp.TunedLens()], gpt2, "one")


def test_a_cache_that_lacks_an_activation_is_refused_with_which_and_how_to_make_one(gpt2: Any) -> None:
    cache = own_cache(gpt2, IDS, names=["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"])
    reads = r"ResidualUpdate\(component='layer', layers=None\) reads blocks\.0\.hook_resid_pre, .*"
    lacks = r"and the cache lacks blocks\.1\.hook_resid_pre: run the model with names_filter=probe\.hook_names"
    with pytest.raises(ValueError, match=f"{reads} {lacks}"):
        lp.ResidualUpdate().from_cache(gpt2, IDS, cache)
    assert lp.ResidualUpdate(layers=[0]).from_cache(gpt2, IDS, cache).layer == ("0",)


def test_a_cache_that_is_not_finite_is_refused_but_for_its_padding(gpt2: Any) -> None:
    cache = {name: own_cache(gpt2, IDS, MASK)[name].clone() for name in lp.ResidualUpdate().hooks(ModelView(gpt2))}
    cache[STATE][1, 2] = torch.nan
    lp.ResidualUpdate().from_cache(gpt2, IDS, cache, attention_mask=MASK)
    with pytest.raises(ValueError, match=f"'{STATE}' must be finite; got NaN or Inf"):
        lp.ResidualUpdate().from_cache(gpt2, IDS, cache)


# Precision, and what surrounds a run


def test_provenance_says_what_was_read_in_which_precision(raw: Any) -> None:
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        model = raw.build(dtype=dtype)
        for result in lp.run([*PROBES, lp.EmbeddingDensity()], model, TEXTS, progress=False):
            assert result.provenance.dtype == name
            assert (result.provenance.model, result.provenance.processed) == (f"tiny-{raw.architecture}", False)
            assert result.provenance.n_prompts == 3
            assert result.provenance.n_tokens == len(tokenize(TEXTS, ModelView(model)))
            floats = {v.dtype for v in values_of(result).values() if isinstance(v, Tensor) and v.is_floating_point()}
            assert floats <= {torch.float32, torch.float64}


def test_a_bar_is_shown_for_several_batches_and_can_be_turned_off(gpt2: Any, capsys: pytest.CaptureFixture) -> None:
    for batch_size, progress, shown in ((1, True, True), (1, False, False), (None, True, False)):
        lp.ResidualUpdate().run(gpt2, TEXTS, batch_size=batch_size, progress=progress)
        printed = capsys.readouterr()
        assert ("reading: 100%" in printed.err) == shown
        assert bool(printed.err) == shown
        assert printed.out == ""


def test_hooks_of_the_user_stay_fire_during_the_run_and_fire_afterwards(own_gpt2: Any) -> None:
    fired = []
    own_gpt2.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: fired.append("once") or tensor + 1)
    own_gpt2.add_hook(STATE, lambda tensor, hook: fired.append("kept"), is_permanent=True)
    with_hook = lp.ResidualUpdate().run(own_gpt2, TEXTS)
    assert fired == ["once", "kept"]
    own_gpt2(torch.tensor([[7, 8]]))
    assert fired == ["once", "kept"] * 2
    own_gpt2.reset_hooks(including_permanent=True)
    assert not torch.allclose(with_hook.norm, lp.ResidualUpdate().run(own_gpt2, TEXTS).norm)  # it did what it was to do


def test_a_run_inside_the_users_own_hooks_leaves_them_in_place(own_gpt2: Any) -> None:
    fired = []
    with own_gpt2.hooks(fwd_hooks=[(STATE, lambda tensor, hook: fired.append(1))]):
        lp.ResidualUpdate().run(own_gpt2, TEXTS)
        own_gpt2(torch.tensor([[7, 8]]))
    assert len(fired) == 2
    own_gpt2(torch.tensor([[7, 8]]))
    assert len(fired) == 2


def test_gradients_and_parameters_are_as_before(own_gpt2: Any) -> None:
    parameters = dict(own_gpt2.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    some = list(parameters)[::2]
    for name in some:
        parameters[name].grad = torch.full_like(before[name], 0.5)
    parameters[some[0]].requires_grad_(False)
    lp.run([*PROBES, lp.EmbeddingDensity()], own_gpt2, TEXTS, progress=False)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]), name
        assert (parameter.grad is not None) == (name in some), name
        assert parameter.grad is None or bool((parameter.grad == 0.5).all()), name
        assert parameter.requires_grad == (name != some[0]), name


def test_the_context_of_the_caller_changes_no_number(raw: Any) -> None:
    model, probes = raw.build(), [*PROBES, lp.EmbeddingDensity()]
    expected = lp.run(probes, model, TEXTS)
    for context in (
        torch.no_grad(),
        torch.enable_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        with context:
            found = lp.run(probes, model, TEXTS)
        for one, other in zip(expected, found, strict=True):
            assert one.content_hash() == other.content_hash()
            assert one.provenance == other.provenance


def test_a_result_from_inference_mode_serves_outside_of_it(gpt2: Any, tmp_path: Any) -> None:
    with torch.inference_mode():
        mean = lp.ResidualMean(at="resid_post").run(gpt2, TEXTS)
    result = lp.RankShift(at="resid_post", center=mean).run(gpt2, TEXTS)
    assert result.centered
    mean.save(tmp_path / "mean.safetensors")
    both = lp.ResidualMean(at="resid_post").run(gpt2, TEXTS)
    assert torch.equal(Result.merge([mean, both]).count, 2 * both.count)  # pyright: ignore
