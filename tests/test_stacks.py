"""Encoder-decoders: each stack against Hugging Face, targets given and greedy, padding, and what is refused."""

from importlib.metadata import version
from typing import Any, ClassVar

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import DecoderView, EncoderView, ModelView, StackView
from lens_probes.testing import assert_same

IS_3 = version("transformer-lens").startswith("3.")
NO_T5 = pytest.mark.skipif(IS_3, reason="TransformerLens 3 cannot run T5 with transformers 5: its blocks return two")
ARCHITECTURES = [pytest.param("t5", marks=NO_T5), "bart", "marian"]
PAIRS = [
    lp.Prompt("Time flies like an arrow.", target="Fruit flies like a banana."),
    lp.Prompt("The cat", target="She baked a banana cake for the old man."),
    lp.Prompt("The old man the boat, and the cat sees him.", target="Dogs"),
]
KINDS = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


RELATIVES: dict[str, tuple[str, dict[str, Any], str]] = {  # class, what differs from the relative in tiny, its name
    "mt5": ("MT5ForConditionalGeneration", {}, "t5"),
    "longt5": ("LongT5ForConditionalGeneration", {"local_radius": 4}, "t5"),
    "longt5_global": (
        "LongT5ForConditionalGeneration",
        {"local_radius": 4, "encoder_attention_type": "transient-global", "global_block_size": 4},
        "t5",
    ),
    "mbart": ("MBartForConditionalGeneration", {"scale_embedding": True}, "bart"),
    "pegasus": ("PegasusForConditionalGeneration", {}, "marian"),
    "m2m100": ("M2M100ForConditionalGeneration", {}, "bart"),
    "blenderbot": ("BlenderbotForConditionalGeneration", {"encoder_layers": 2}, "bart"),
    "led": (
        "LEDForConditionalGeneration",
        {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        "bart",
    ),
}
IN_WINDOWS = ("led", "longt5", "longt5_global")


@pytest.fixture(
    params=[
        pytest.param(
            name, marks=[*([NO_T5] if of == "t5" else []), *([] if name in ("mbart", "led") else [pytest.mark.matrix])]
        )
        for name, (_, _, of) in RELATIVES.items()
    ]
)
def relative(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each relative of the architectures in turn, made known to `tiny` for this test."""
    name, differs, of = RELATIVES[request.param]
    monkeypatch.setitem(tiny._ENCODER_DECODERS, request.param, (name, tiny._ENCODER_DECODERS[of][1] | differs))
    for table in (tiny._TOKENIZERS, tiny._TEMPLATES):
        monkeypatch.setitem(table, request.param, table[of])
    return request.param


def with_bias(model: Any) -> Any:
    """The Hugging Face model with the bias that BART and Marian add after their unembedding, which is 0 at first."""
    if hasattr(model, "final_logits_bias"):
        torch.nn.init.normal_(model.final_logits_bias, generator=torch.Generator().manual_seed(1))
    return model


def bridge(architecture: str) -> Any:
    model = tiny.bridge(architecture)
    with_bias(model.original_model)
    return model


def reference(architecture: str, source: list[int], target: list[int]) -> Any:
    """What Hugging Face's own model gives for one pair, without padding."""
    model = with_bias(tiny.huggingface(architecture))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]), output_attentions=True)


def encoded(architecture: str, prompt: lp.Prompt) -> tuple[list[int], list[int]]:
    """Source and decoder input as Hugging Face makes them: the labels after the start token."""
    tokenizer, config = tiny.tokenizer(architecture), tiny.huggingface(architecture).config
    return tokenizer(prompt.text)["input_ids"], [
        config.decoder_start_token_id,
        *tokenizer(text_target=prompt.target)["input_ids"],
    ]


def test_every_pattern_is_hugging_faces_own_and_padding_reaches_none(architecture):
    model = bridge(architecture)
    patterns = {
        "encoder": lp.AttentionPatterns(keep_patterns=True).run(EncoderView(model), PAIRS),
        "decoder": lp.AttentionPatterns(keep_patterns=True).run(model, PAIRS),
        "cross": lp.CrossAttention().run(model, PAIRS),
    }
    for number, prompt in enumerate(PAIRS):
        own = reference(architecture, *encoded(architecture, prompt))
        for kind, result in patterns.items():
            expected = torch.cat(getattr(own, KINDS[kind]))
            torch.testing.assert_close(result.pattern(number), expected, rtol=0, atol=1e-5)


def test_relatives_of_these_architectures_are_read_as_hugging_face_reads_them(relative):
    model, encodes = bridge(relative), relative not in IN_WINDOWS
    patterns = {
        "decoder": lp.AttentionPatterns(keep_patterns=True).run(model, PAIRS),
        "cross": lp.CrossAttention().run(model, PAIRS),
    }
    if encodes:
        patterns["encoder"] = lp.AttentionPatterns(keep_patterns=True).run(EncoderView(model), PAIRS)
    else:
        with pytest.raises(ValueError, match=f"one attention weight per query and key; got tiny-{relative} .*windows"):
            lp.AttentionPatterns().run(EncoderView(model), PAIRS)
    lens = lp.LogitLens().run(model, PAIRS)
    for number, prompt in enumerate(PAIRS):
        source, target = encoded(relative, prompt)
        own = reference(relative, source, target)
        for kind, result in patterns.items():
            torch.testing.assert_close(result.pattern(number), torch.cat(getattr(own, KINDS[kind])), rtol=0, atol=1e-5)
        follows = own.logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(target)[1:, None])[:, 0]
        torch.testing.assert_close(lens.log_prob[-1, lens.token.rows(number)[:-1]], follows, rtol=0, atol=1e-4)
    (found,) = lp.greedy_targets(model, ["Time flies."], max_tokens=4)
    ids = torch.tensor([tiny.tokenizer(relative)("Time flies.")["input_ids"]])
    own = with_bias(tiny.huggingface(relative)).generate(ids, max_new_tokens=4)
    assert found.target == tuple(own[0].tolist())


def test_the_last_row_of_the_lens_is_the_models_own_prediction(architecture):
    result = lp.LogitLens().run(bridge(architecture), PAIRS)
    for number, prompt in enumerate(PAIRS):
        source, target = encoded(architecture, prompt)
        rows = result.token.rows(number)
        assert result.token.id[rows].tolist() == target
        own = reference(architecture, source, target).logits[0].log_softmax(-1)
        follows = own[:-1].gather(1, torch.tensor(target)[1:, None])[:, 0]
        torch.testing.assert_close(result.log_prob[-1, rows[:-1]], follows, rtol=0, atol=1e-4)
        assert result.log_prob[:, rows[-1]].isnan().all()  # nothing is given that follows the last token
        assert result.final_id[rows].tolist() == own.argmax(-1).tolist()
        assert result.top_ids is not None and torch.equal(result.top_ids[-1, rows, 0], result.final_id[rows])


@NO_T5
@pytest.mark.parametrize("scaled", [True, False])
def test_t5_may_have_fewer_decoder_layers_and_no_factor(monkeypatch, scaled):
    name, settings = tiny._ENCODER_DECODERS["t5"]
    monkeypatch.setitem(
        tiny._ENCODER_DECODERS,
        "t5",
        (name, settings | {"num_decoder_layers": 2, "tie_word_embeddings": scaled, "scale_decoder_outputs": scaled}),
    )
    result = lp.LogitLens().run(tiny.bridge("t5"), PAIRS[:1])
    source, target = encoded("t5", PAIRS[0])
    own = reference("t5", source, target).logits[0].log_softmax(-1)
    assert result.layer == ("0_pre", "0_post", "1_post")
    follows = own[:-1].gather(1, torch.tensor(target)[1:, None])[:, 0]
    torch.testing.assert_close(result.log_prob[-1, :-1], follows, rtol=0, atol=1e-4)
    assert lp.AttentionPatterns().run(EncoderView(tiny.bridge("t5")), "A cat.").layer == ("0", "1", "2")


def test_greedy_targets_are_those_of_hugging_face_and_end_where_it_ends(architecture):
    model, own = bridge(architecture), with_bias(tiny.huggingface(architecture))
    texts = [str(prompt.text) for prompt in PAIRS]
    found = lp.greedy_targets(model, texts, max_tokens=12)
    ids = [own.generate(torch.tensor([encoded(architecture, prompt)[0]]), max_new_tokens=12)[0] for prompt in PAIRS]
    assert [prompt.target for prompt in found] == [tuple(each.tolist()) for each in ids]
    assert [prompt.text for prompt in found] == texts
    # The same with the first word that the model writes as its end.
    end = int(ids[0][3])
    model.original_model.config.eos_token_id = [end, 399]
    (stopped,) = lp.greedy_targets(model, texts[:1], max_tokens=12)
    assert stopped.target == tuple(ids[0].tolist())[: 1 + ids[0][1:].tolist().index(end) + 1]


def test_a_run_without_targets_has_greedy_ones_and_keeps_those_that_are_given():
    model = bridge("bart")
    mixed = [PAIRS[0], lp.Prompt(PAIRS[1].text)]
    result = lp.CrossAttention().run(model, mixed)
    written = lp.greedy_targets(model, mixed)
    assert written[0] == PAIRS[0]
    assert result.token.id[result.token.rows(1)].tolist() == list(written[1].target or ())
    assert len(written[1].target or ()) == 64  # the context of the tiny models, and none of them ends
    assert_same(result, lp.CrossAttention().run(model, written), "a run with these targets")
    topics = {"a": PAIRS[:2], "b": [PAIRS[2], PAIRS[0]]}
    assert lp.LogitLens().run(model, topics).token.topic[-1] == "b"


@pytest.mark.parametrize("probe", [lp.CrossAttention(), lp.LogitLens(), lp.AttentionPatterns()])
def test_batches_and_the_padding_side_of_the_tokenizer_change_nothing(architecture, probe):
    whole = probe.run(bridge(architecture), PAIRS)
    left = tiny.bridge(architecture, padding_side="left")
    with_bias(left.original_model)
    for batch_size in (1, 2, 3):
        assert_same(whole, probe.run(left, PAIRS, batch_size=batch_size), f"batches of {batch_size}")
    one = probe.run(left, PAIRS[1:2])
    assert_same(type(whole).merge([probe.run(left, PAIRS[:1]), one, probe.run(left, PAIRS[2:])]), whole, "single ones")


def test_long_sources_count_in_the_size_of_a_batch():
    tokens = lp.LogitLens().run(tiny.bridge("bart"), [lp.Prompt("a " * 20, target="b")] * 3).token
    sources = EncoderView(tiny.bridge("bart"))
    long = lp.text.prompts.tokenize(["a " * 20] * 3, sources)
    assert [len(part) for part in lp.reading.batches(tokens, None, long)] == [len(tokens)]
    many = lp.text.prompts.concatenate([tokens] * 20, [3 * n for n in range(20)])
    whole = lp.text.prompts.concatenate([long] * 20, [3 * n for n in range(20)])
    assert len(lp.reading.batches(many)) < len(lp.reading.batches(many, None, whole))


@pytest.mark.filterwarnings("ignore:A hook on .* returned a modified tensor")
@pytest.mark.parametrize("kind", ["encoder", "self", "cross"])
def test_a_pattern_that_does_not_make_the_heads_output_is_refused(kind):
    model = tiny.bridge("bart")
    part = {"encoder": model.encoder_blocks[1].attn}.get(kind) or getattr(model.decoder_blocks[1], f"{kind}_attn")
    probe = lp.CrossAttention() if kind == "cross" else lp.AttentionPatterns()
    part.hook_pattern.add_hook(lambda pattern, hook: pattern.flip(-1), is_permanent=True)
    with pytest.raises(ValueError, match=r"head's output must be its attention pattern times its values; got another"):
        probe.run(EncoderView(model) if kind == "encoder" else model, PAIRS)


def test_a_head_that_is_read_wrongly_is_refused(monkeypatch):
    model = bridge("bart")
    monkeypatch.setattr(DecoderView, "unembedding_bias", ModelView.unembedding_bias)
    with pytest.raises(ValueError, match="must be its final norm, unembedding and soft cap alone"):
        lp.LogitLens().run(model, PAIRS)


def test_half_precision_is_read_and_not_finite_weights_are_refused():
    model = tiny.bridge("bart", dtype=torch.bfloat16)
    half, full = (lp.CrossAttention().run(each, PAIRS) for each in (model, tiny.bridge("bart")))
    assert half.provenance.dtype == "bfloat16"
    torch.testing.assert_close(half.mean, full.mean, rtol=0, atol=0.05)
    assert lp.LogitLens().run(model, PAIRS).log_prob.dtype == torch.float32
    with torch.no_grad():
        model.decoder_blocks[1].cross_attn.q.original_component.weight[0, 0] = torch.nan
    for probe in (lp.CrossAttention(), lp.LogitLens()):
        with pytest.raises(ValueError, match="must be finite; got NaN or Inf"):
            probe.run(model, PAIRS)
    with pytest.raises(ValueError, match=r"logits of tiny-bart \(decoder\) must be finite; got NaN or Inf"):
        lp.greedy_targets(model, "A cat.")


def test_without_a_tokenizer_ids_are_read():
    model, pair = tiny.bridge("bart"), encoded("bart", PAIRS[0])
    model.tokenizer = None
    prompt = lp.Prompt(ids=tuple(pair[0]), target=tuple(pair[1]))
    result = lp.CrossAttention().run(model, [prompt])
    assert torch.equal(result.attention, lp.CrossAttention().run(tiny.bridge("bart"), PAIRS[:1]).attention)
    assert result.token.special.tolist()[0] and result.source.special.tolist()[-1]  # start and end, as configured
    with pytest.raises(ValueError, match="text needs a tokenizer; got tiny-bart"):
        lp.CrossAttention().run(model, PAIRS)


def test_a_tokenizer_without_spans_gives_tokens_without_words(monkeypatch):
    class Slow:
        """As Marian's own, which is written in Python and has two vocabularies."""

        is_fast, all_special_ids, bos_token_id, pad_token_id = False, [0, 1], None, 0
        asked: ClassVar[list[str]] = []

        def __call__(self, return_offsets_mapping: bool = False, verbose: bool = True, **given: Any) -> Any:
            assert not return_offsets_mapping
            given.pop("add_special_tokens")
            ((kind, text),) = given.items()
            self.asked.append(kind)
            return {"input_ids": [5 + len(word) for word in text.split()] + [1]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"▁{i}" for i in ids]

        def batch_decode(self, ids: list[list[int]], **options: Any) -> list[str]:
            return [str(i) for (i,) in ids]

    model = tiny.bridge("marian")
    monkeypatch.setattr(StackView, "tokenizer", Slow())
    result = lp.CrossAttention().run(model, [lp.Prompt("one two three", target="four five")])
    assert result.source.id.tolist() == [8, 8, 10, 1] and result.token.id.tolist() == [0, 9, 9, 1]
    assert Slow.asked == ["text", "text_target"] and set(result.token.word_class) == {""}


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_of_an_encoder_decoder_is_said():
    model, decoder = tiny.bridge("bart"), tiny.bridge("gpt2")
    stacks = (
        r"one stack of blocks over text tokens; got tiny-bart .*AttentionPatterns, CrossAttention and LogitLens read"
    )
    for asked in (model, EncoderView(model)):
        with pytest.raises(TypeError, match=stacks):
            lp.RankShift().run(asked, PAIRS)
    with pytest.raises(TypeError, match=stacks):
        lp.run([lp.LogitLens(), lp.ResidualUpdate()], model, PAIRS)
    with pytest.raises(TypeError, match=stacks):
        lp.TunedLens(steps=2).run(model, ["A cat.", "A dog."])
    with pytest.raises(ValueError, match=r"head; got tiny-bart \(encoder\), which has none"):
        lp.LogitLens().run(EncoderView(model), "A cat.")
    with pytest.raises(ValueError, match="before and after its blocks; got read point 'resid_mid'"):
        lp.LogitLens(incl_mid=True).run(model, PAIRS)
    with pytest.raises(ValueError, match=r"from_cache reads models of one stack; got tiny-bart \(decoder\): use run"):
        lp.CrossAttention().from_cache(model, "A cat.", {})
    with pytest.raises(ValueError, match="needs an encoder-decoder; got prompt 1 with target 'A' for tiny-gpt2: leave"):
        lp.LogitLens().run(decoder, ["A cat.", lp.Prompt("A cat.", target="A")])
    with pytest.raises(TypeError, match=r"must be an encoder-decoder, .*; got tiny-gpt2, which has one stack"):
        EncoderView(decoder)
    with pytest.raises(TypeError, match=r"must be an encoder-decoder, .*; got tiny-gpt2, which has one stack"):
        lp.greedy_targets(decoder, "A cat.")
    with pytest.raises(
        ValueError, match=r"must begin with 2, the start token of tiny-bart .*; got \(5, 6\) in prompt 0"
    ):
        lp.LogitLens().run(model, [lp.Prompt("A cat.", target=(5, 6))])
    with pytest.raises(ValueError, match="token ids of this model must be 0 to 399; got 400 in prompt 0"):
        lp.LogitLens().run(model, [lp.Prompt("A cat.", target=(2, 400))])
    with pytest.raises(ValueError, match="target of a Prompt must be a text or token ids; got 5: write target="):
        lp.Prompt("A cat.", target=5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"greedy_targets\(max_tokens=...\) must be a whole number, 1 or more; got 0"):
        lp.greedy_targets(model, "A cat.", max_tokens=0)
    with pytest.raises(ValueError, match=r"must have at most 64 tokens; got \d+ in prompt 0: shorten or split it"):
        lp.LogitLens().run(model, [lp.Prompt("A cat. " * 40, target="A")])
    with pytest.raises(ValueError, match="needs sources; got none: pass prompts to the run of a probe"):
        DecoderView(model).activations(torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), ["unembed.hook_out"])
    model.original_model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"tiny-bart \(encoder\) must have a decoder_start_token_id; got None: set it"):
        lp.CrossAttention().run(model, PAIRS)


@pytest.mark.skipif(not IS_3, reason="TransformerLens 4 runs T5")
def test_t5_is_refused_where_transformerlens_cannot_run_it():
    with pytest.raises(TypeError, match="T5 needs TransformerLens 4; got version 3, which cannot run tiny-t5"):
        lp.CrossAttention().run(tiny.bridge("t5"), PAIRS)


def test_both_views_are_views_of_one_stack():
    model = tiny.bridge("marian")
    encoder, decoder = EncoderView(model), DecoderView(model)
    assert all(isinstance(view, StackView) for view in (encoder, decoder, EncoderView(decoder)))
    assert (encoder.encoder, decoder.encoder) == (True, False)
    assert encoder.hook("resid_post", -1) == "encoder_blocks.2.hook_resid_post"
    assert decoder.hook_cross_pattern(1) == "decoder_blocks.1.cross_attn.hook_pattern"
