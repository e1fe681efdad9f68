"""Every form of prompts becomes one table of tokens: the ids the model's class gives, and words checked by hand."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import normalizers

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths import inference
from lens_probes.model import ModelView
from lens_probes.text.prompts import (
    Prompt,
    PromptTable,
    Tokens,
    concatenate,
    prompt_table,
    read_prompts,
    tokenize,
)
from lens_probes.text.targets import following
from lens_probes.text.words import Word

TEXT = "The unexpected lighthouse, it shines; 12 ships don't."
AWKWARD = [
    "naïve café, cafe\u0301 and 東京",
    "a 🙂 and a 👩‍👩‍👧 smile",
    "<script>alert('x')</script> & more",
    "two  spaces\n\tand a tab ",
    "the end<|eos|> of </s> a [SEP] text <s>",
]


@pytest.fixture
def view(gpt2: Any) -> ModelView:
    return ModelView(gpt2)


def reference_words(text: str) -> list[tuple[int, int]]:
    """The words of a plain English text by a regular expression of our own: letters and apostrophes, or punctuation."""
    return [match.span() for match in re.finditer(r"[A-Za-z0-9']+|[^A-Za-z0-9'\s]+", text)]


# The forms


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("one text", [Prompt("one text")]),
        (Prompt(ids=(4, 5)), [Prompt(ids=(4, 5))]),
        (["one", "two"], [Prompt("one"), Prompt("two")]),
        (("one", "two"), [Prompt("one"), Prompt("two")]),
        ([Prompt("one", topic="t"), Prompt("two", topic="t")], [Prompt("one", topic="t"), Prompt("two", topic="t")]),
        ({"t": ["one", "two"]}, [Prompt("one", topic="t"), Prompt("two", topic="t")]),
        ({"": "one", "t": ("two", "three")}, [Prompt("one"), Prompt("two", topic="t"), Prompt("three", topic="t")]),
        ({"t": [[4, 5], [6]]}, [Prompt(ids=(4, 5), topic="t"), Prompt(ids=(6,), topic="t")]),
        ([4, 5, 6], [Prompt(ids=(4, 5, 6))]),
        (range(4, 7), [Prompt(ids=(4, 5, 6))]),
        (list(np.array([4, 5])), [Prompt(ids=(4, 5))]),
        ([[4, 5], [6]], [Prompt(ids=(4, 5)), Prompt(ids=(6,))]),
        ([(4, 5), (6,)], [Prompt(ids=(4, 5)), Prompt(ids=(6,))]),
        (torch.tensor([4, 5, 6]), [Prompt(ids=(4, 5, 6))]),
        (torch.tensor([4, 5, 6], dtype=torch.uint8), [Prompt(ids=(4, 5, 6))]),
        (torch.tensor([[4, 5], [6, 7]], dtype=torch.int32), [Prompt(ids=(4, 5)), Prompt(ids=(6, 7))]),
        ([torch.tensor([4, 5]), torch.tensor([6])], [Prompt(ids=(4, 5)), Prompt(ids=(6,))]),
        (
            ["one", [4, 5], torch.tensor([6]), Prompt("two")],
            [Prompt("one"), Prompt(ids=(4, 5)), Prompt(ids=(6,)), Prompt("two")],
        ),
        (pd.Series(["one", "two"], index=[7, 3]), [Prompt("one"), Prompt("two")]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.usefixtures("as_users_run_it")
def test_every_form_is_read_as_a_list_of_prompts(prompts: Any, expected: Any) -> None:
    read = read_prompts(prompts)
    assert read == expected
    assert all(type(i) is int for prompt in read for i in prompt.ids or ())


@pytest.mark.usefixtures("as_users_run_it")
def test_texts_from_a_generator_are_those_of_the_list_and_it_is_read_once(gpt2: Any) -> None:
    texts = ["Time flies.", "Fruit flies like a banana."]
    read = []

    def lines() -> Any:
        for text in texts:
            read.append(text)
            yield text

    assert read_prompts({"a": lines(), "b": map(str.upper, texts)}) == read_prompts(
        {"a": texts, "b": [text.upper() for text in texts]}
    )
    read.clear()
    of_generator = lp.ResidualUpdate().run(gpt2, lines(), batch_size=1, progress=False)
    assert read == texts
    assert (
        of_generator.content_hash() == lp.ResidualUpdate().run(gpt2, texts, batch_size=1, progress=False).content_hash()
    )
    with pytest.raises(ValueError, match="prompts must be one or more; got none"):
        read_prompts(iter([]))


@pytest.mark.parametrize("prompts", [[], (), {}, torch.empty(0, 5, dtype=torch.int64)], ids=repr)
def test_no_prompts_are_refused(prompts: Any) -> None:
    with pytest.raises(
        ValueError, match="prompts must be one or more; got none: pass a text or a sequence of token ids"
    ):
        read_prompts(prompts)


@pytest.mark.parametrize(
    ("prompts", "got"),
    [
        (3, "int"),
        (2.5, "float"),
        (None, "NoneType"),
        (np.array([4, 5]), "ndarray"),
        pytest.param({"one", "two"}, "set", id="set"),
        pytest.param({"a": "one", "b": "two"}.values(), "dict_values", id="dict_values"),
        (b"one", "bytes"),
        pytest.param(pd.DataFrame({"text": ["one", "two"]}), "DataFrame", id="DataFrame"),
        ([float("nan")], "nan"),  # an empty cell of a column
        ([1.0, 2.0], "1.0"),
        ([[1.0, 2.0]], r"\[1.0, 2.0\]"),
        ([True, False], "True"),
        ([[True, False]], r"\[True, False\]"),
        ([1, True], "1"),
        ([None], "None"),
        ([["nested"]], r"\['nested'\]"),
        ([[[1]]], r"\[\[1\]\]"),
        (torch.tensor([1.0, 2.0]), "torch.float32"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([[0.5]]), "torch.float32"),
        (torch.tensor(3), "a 0-d tensor"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "a 3-d tensor"),
        ([torch.zeros(1, 2, dtype=torch.int64)], "a 2-d tensor"),
        ({"t": [1.0]}, "1.0"),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_neither_text_nor_ids_is_refused_with_what_was_got(prompts: Any, got: str, view: ModelView) -> None:
    with pytest.raises(TypeError, match=rf"; got (a tensor of )?{got}") as caught:
        tokenize(prompts, view)
    assert re.search("token ids", str(caught.value))
    assert ("pass its .tolist()" in str(caught.value)) == isinstance(prompts, np.ndarray)
    hints = {"DataFrame": "pass the column that holds the texts", "set": "pass them as a list", "bytes": "decode it"}
    assert hints.get(got, "") in str(caught.value)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_model_among_prompts_or_probes_is_named_and_not_printed(own_gpt2: Any) -> None:
    kind = type(own_gpt2).__name__
    for ask in (
        lambda: read_prompts([own_gpt2]),
        lambda: read_prompts(own_gpt2),
        lambda: Prompt("one", own_gpt2),
        lambda: tokenize([Prompt(ids=(own_gpt2,))], ModelView(own_gpt2)),
        lambda: tokenize("one", ModelView(own_gpt2), word_class=lambda text: own_gpt2),
        lambda: lp.run(own_gpt2, [lp.ResidualUpdate()], "one"),  # pyright: ignore[reportArgumentType]
        lambda: lp.run([own_gpt2], own_gpt2, "one"),
        lambda: lp.ResidualUpdate().from_cache(own_gpt2, "one", own_gpt2),
        lambda: lp.AttentionPair(own_gpt2, [1]),
        lambda: lp.AttentionPair(1, own_gpt2),
        lambda: lp.MaxActivatingTokens(0, units=own_gpt2).run(own_gpt2, "one"),
    ):
        with pytest.raises((TypeError, ValueError), match=kind) as caught:
            ask()
        assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_a_prompt_holds_a_text_or_ids_and_not_both_or_neither() -> None:
    with pytest.raises(ValueError, match="either a text or ids; got Prompt"):
        Prompt()
    with pytest.raises(ValueError, match="one of the two"):
        Prompt("one", ids=(1,))


def test_a_topic_of_one_prompt_is_refused_by_name() -> None:
    for prompts in ({"chess": ["e4", "d4"], "law": "I object."}, [Prompt("e4"), Prompt("I object.", topic="law")]):
        with pytest.raises(ValueError, match=r"topic must have two prompts or more; got 1 for 'law': add a prompt"):
            read_prompts(prompts)


# Text to ids


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_a_decoders_text_gets_the_ids_that_its_class_gives(prepend_bos: bool | None, decoder: Any) -> None:
    model = decoder.build()
    for text in [TEXT, *AWKWARD]:
        expected = model.to_tokens(text, prepend_bos=prepend_bos)[0].tolist()
        assert tokenize(text, ModelView(model), prepend_bos=prepend_bos).id.tolist() == expected


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_an_encoders_text_always_gets_both_marks_of_its_tokenizer(prepend_bos: bool | None, encoder: Any) -> None:
    # TransformerLens' to_tokens takes RoBERTa's </s> away, as if it were a decoder's end of text, and with
    # prepend_bos=False the first mark too; the models were trained with both, and Hugging Face gives both.
    first, last = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}[encoder.architecture]
    view = ModelView(encoder.build())
    for text in [TEXT, *AWKWARD]:
        tokens = tokenize(text, view, prepend_bos=prepend_bos)
        assert tokens.id.tolist() == tiny.tokenizer(encoder.architecture)(text).input_ids
        assert (tokens.text[0], tokens.text[-1]) == (first, last)
        assert (tokens.special[0], tokens.special[-1]) == (True, True)


def test_prepend_bos_is_about_text_and_leaves_ids_as_they_are(view: ModelView) -> None:
    for prepend_bos in (None, True, False):
        assert tokenize([[7, 8], [9]], view, prepend_bos=prepend_bos).id.tolist() == [7, 8, 9]


def test_bos_is_asked_for_in_vain_where_the_tokenizer_has_none(own_gpt2: Any) -> None:
    own_gpt2.tokenizer.bos_token = None
    view = ModelView(own_gpt2)
    with pytest.raises(ValueError, match=r"prepend_bos=True needs a .* token; got none in the tokenizer of tiny-gpt2"):
        tokenize("one", view, prepend_bos=True)
    assert tokenize("one", view).text == tokenize("one", view, prepend_bos=False).text
    assert not tokenize("one", view).special.any()


def test_text_needs_a_tokenizer_and_ids_do_not(own_gpt2: Any) -> None:
    own_gpt2.tokenizer = None
    view = ModelView(own_gpt2)
    with pytest.raises(ValueError, match="text needs a tokenizer; got tiny-gpt2 without one: pass token ids"):
        tokenize("one", view)
    tokens = tokenize([5, 399], view)
    assert tokens.text == ("5", "399")
    assert tokens.word.tolist() == [-1, -1]
    assert not tokens.special.any()


# Refusals that need the model


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
@pytest.mark.parametrize("prepend_bos", [None, False])
@pytest.mark.parametrize(
    ("prompts", "number", "got"),
    [
        ("", 0, "''"),
        (["one", ""], 1, "''"),
        ([Prompt(ids=())], 0, r"\[\]"),
        ([[4], []], 1, r"\[\]"),
        ([[]], 0, r"\[\]"),
        (torch.empty(2, 0, dtype=torch.int64), 0, r"\[\]"),
    ],
    ids=repr,
)
def test_a_prompt_without_tokens_is_refused_by_number_whatever_would_mark_its_beginning(
    prompts: Any, number: int, got: str, prepend_bos: bool | None, architecture: str
) -> None:
    message = f"prompt {number} must not be empty; got {got}: give it a text or ids, or leave it out"
    with pytest.raises(ValueError, match=message):
        tokenize(prompts, ModelView(tiny.bridge(architecture)), prepend_bos=prepend_bos)


def test_white_space_is_text_where_the_tokenizer_keeps_it(view: ModelView) -> None:
    assert "".join(tokenize("  ", view, prepend_bos=False).text) == "  "
    stripping = ModelView(tiny.bridge("bert"))
    stripping.tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # as the real BERT's does
    with pytest.raises(ValueError, match="prompt 0 must not be empty; got '  '"):
        tokenize("  ", stripping)


def test_the_mark_of_a_beginning_alone_is_asked_for_by_its_id(view: ModelView) -> None:
    tokens = tokenize([[view.tokenizer.bos_token_id]], view)
    assert tokens.text == ("<|bos|>",)
    assert tokens.special.tolist() == [True]
    assert tokens.word.tolist() == [-1]


@pytest.mark.parametrize("outside", [-1, 400, 10**6])
def test_ids_outside_the_vocabulary_are_refused_with_where_it_ends(outside: int, view: ModelView) -> None:
    assert tokenize([0, 399], view).id.tolist() == [0, 399]
    with pytest.raises(ValueError, match=f"must be 0 to 399; got {outside} in prompt 1: pass ids"):
        tokenize([[1, 2], [3, outside]], view)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("ids", [(1.5, 2), (True, 2), ("1",)], ids=repr)
def test_ids_of_a_prompt_that_are_no_whole_numbers_are_refused(ids: Any, view: ModelView) -> None:
    with pytest.raises(TypeError, match="token ids"):
        tokenize([Prompt(ids=ids)], view)


def test_a_prompt_may_fill_the_context_and_not_exceed_it(view: ModelView) -> None:
    assert len(tokenize([7] * tiny.CONTEXT, view)) == 64
    with pytest.raises(
        ValueError, match="tiny-gpt2 must have at most 64 tokens; got 65 in prompt 1: shorten or split it"
    ):
        tokenize([[7], [7] * 65], view)
    with pytest.raises(ValueError, match="got 65 in prompt 0"):  # the marks count
        tokenize("a" * 64, view, prepend_bos=True)


# Words


def test_the_pieces_of_a_word_share_its_number_and_its_class(view: ModelView) -> None:
    tokens = tokenize(TEXT, view, prepend_bos=False)
    assert "".join(tokens.text) == TEXT
    spans = reference_words(TEXT)
    assert len(tokens) > len(spans) + 5  # some words have pieces, or there is nothing to see
    start = 0
    for text, number in zip(tokens.text, tokens.word.tolist(), strict=True):
        first = start + len(text) - len(text.lstrip())
        start += len(text)
        if not text.strip():
            assert number == -1
            continue
        assert spans[number][0] <= first < spans[number][1], text
    classes = dict(zip(tokens.word.tolist(), tokens.word_class, strict=True))
    words = [TEXT[slice(*span)] for span in spans]
    by_hand = {"The": "function", "unexpected": "content", ",": "punctuation", "it": "function", "12": "number"}
    by_hand |= {"lighthouse": "content", "shines": "content", ";": "punctuation", "ships": "content"}
    by_hand |= {"don't": "function", ".": "punctuation"}
    assert [classes[number] for number in range(len(words))] == [by_hand[word] for word in words]
    assert tokens.word_class == tuple(classes[number] for number in tokens.word.tolist())


def test_white_space_alone_belongs_to_no_word(view: ModelView) -> None:
    tokens = tokenize("a \n\n\t b", view, prepend_bos=False)
    assert {text.strip(): word for text, word in zip(tokens.text, tokens.word.tolist(), strict=True)} == {
        "a": 0,
        "": -1,
        "b": 1,
    }
    assert all(bool(own) == bool(text.strip()) for text, own in zip(tokens.text, tokens.word_class, strict=True))


def test_special_tokens_are_marked_and_belong_to_no_word(view: ModelView) -> None:
    # One typed into a text is the same token to the tokenizer, and to us.
    tokens = tokenize("the end<|eos|> of it", view, prepend_bos=True)
    marked = [text for text, special in zip(tokens.text, tokens.special.tolist(), strict=True) if special]
    assert marked == ["<|bos|>", "<|eos|>"]
    assert tokens.special.tolist() == [text.startswith("<|") for text in tokens.text]
    assert (tokens.word[tokens.special] == -1).all()
    assert (tokens.word[~tokens.special] >= 0).all()
    assert all((own == "") == special for own, special in zip(tokens.word_class, tokens.special.tolist(), strict=True))


@pytest.mark.parametrize("text", [TEXT, *AWKWARD[:-1]])
def test_ids_that_decode_to_a_text_have_the_words_of_that_text(text: str, view: ModelView) -> None:
    from_text = tokenize(text, view)
    from_ids = tokenize(from_text.id, view)
    for name, column in from_text.columns().items():
        other = from_ids.columns()[name]
        assert torch.equal(column, other) if isinstance(column, torch.Tensor) else column == other, name
    assert (from_ids.word >= 0).any()


def test_ids_that_no_text_encodes_to_have_no_words(view: ModelView) -> None:
    (the,) = view.encode(" the", prepend_bos=False)[0]
    spelled = view.tokenizer.convert_tokens_to_ids(["Ġ", "t", "h", "e"])
    assert tokenize([the], view).word_class == ("function",)
    tokens = tokenize(spelled, view)
    assert "".join(tokens.text) == " the"
    assert tokens.word.tolist() == [-1] * 4
    assert tokens.word_class == ("",) * 4


def test_a_lone_piece_of_a_character_has_a_name_and_no_word(view: ModelView) -> None:
    tokens = tokenize("🙂", view, prepend_bos=False)
    assert len(tokens) == 4  # four bytes in UTF-8, none of them a character
    assert tokens.text == ("ð", "Ł", "Ļ", "Ĥ")
    assert tokens.word.tolist() == [0] * 4
    assert tokens.word_class == ("punctuation",) * 4
    assert tokenize(tokens.id[:1], view).word.tolist() == [-1]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_keep_one_text_a_token_and_one_class_a_word(text: str, raw: Any) -> None:
    tokens = tokenize(text, ModelView(raw.build()))
    assert all(tokens.text)
    assert not any("\ufffd" in own for own in tokens.text)
    pairs = set(zip(tokens.word.tolist(), tokens.word_class, strict=True))
    assert len(pairs) == len({number for number, _ in pairs})
    for own, word, special in zip(tokens.text, tokens.word.tolist(), tokens.special.tolist(), strict=True):
        assert (word >= 0) == bool(own.strip() and not special), own


def test_accents_belong_to_their_word_in_one_character_or_two(view: ModelView) -> None:
    for word in ("café", "cafe\u0301"):
        tokens = tokenize(f"a {word} here", view, prepend_bos=False)
        owned = [(int(number), own) for number, own in zip(tokens.word, tokens.word_class, strict=True) if number >= 0]
        assert sorted(set(owned)) == [(0, "function"), (1, "content"), (2, "content")]
        assert [number for number, _ in owned].count(1) == len(
            f" {word}".encode()
        ) - 2  # a token a byte, but " ca" is one


def test_the_users_own_words_are_asked_about_the_text_and_used(view: ModelView) -> None:
    asked = []

    def halves(text: str) -> list[Word]:
        asked.append(text)
        return [Word(0, 4, "first"), Word(7, len(text), "last")]

    ids = Prompt(ids=tuple(tokenize("four five six", view).id.tolist()))
    tokens = tokenize([Prompt("one  two three"), ids], view, word_class=halves)
    assert asked == ["one  two three", "four five six"]
    for number, own, text in zip(tokens.word.tolist(), tokens.word_class, tokens.text, strict=True):
        assert own == {0: "first", 1: "last", -1: ""}[number], text
    assert {0, 1, -1} <= set(tokens.word.tolist())
    assert set(tokenize("one", view, word_class=lambda text: []).word.tolist()) == {-1}


def test_a_token_of_two_words_belongs_to_that_of_its_first_visible_character(view: ModelView) -> None:
    def letters(text: str) -> list[Word]:
        return [Word(i, i + 1, letter) for i, letter in enumerate(text) if not letter.isspace()]

    tokens = tokenize(TEXT, view, prepend_bos=False, word_class=letters)
    assert tokens.word_class == tuple(text.strip()[:1] for text in tokens.text)
    assert max(len(text.strip()) for text in tokens.text) > 2


# The table


def test_prompts_lie_end_to_end_each_with_its_topic_and_positions_from_zero(view: ModelView) -> None:
    ids = {(4, 5, 6): "t", (7,): "t", (8, 9): "", (10,): "t"}
    prompts = [Prompt(ids=own, topic=topic) for own, topic in ids.items()]
    tokens = tokenize(prompts, view)
    assert tokens.prompt.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert tokens.position.tolist() == [0, 1, 2, 0, 0, 1, 0]
    assert tokens.id.tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert tokens.topic == ("t", "t", "t", "t", "", "", "t")
    assert {column.dtype for column in tokens.columns().values() if isinstance(column, torch.Tensor)} == {
        torch.int64,
        torch.bool,
    }


@pytest.fixture
def table() -> Tokens:
    """Three prompts numbered 0, 2 and 3: prompt 1 has no rows."""
    return Tokens(
        prompt=torch.tensor([0, 0, 2, 3]),
        position=torch.tensor([0, 1, 0, 0]),
        id=torch.tensor([9, 8, 7, 6]),
        text=("<s>", " b", " c", "d"),
        word=torch.tensor([-1, 0, 0, 0]),
        word_class=("content", "content", "function", "content"),
        special=torch.tensor([True, False, False, False]),
        topic=("t", "t", "", "u"),
        document=torch.tensor([10, 10, 20, 30]),
    )


def test_columns_of_different_length_are_refused(table: Tokens) -> None:
    with pytest.raises(ValueError, match=r"columns of a PromptTable must have equal lengths; got .*'text': 1"):
        PromptTable(
            prompt=torch.tensor([0, 1]),
            text=("one",),
            topic=("", ""),
            n_tokens=torch.ones(2, dtype=torch.int64),
            last_text=("", ""),
        )


def test_rows_are_taken_by_mask_and_by_index_in_its_order(table: Tokens) -> None:
    chosen = table[torch.tensor([False, True, False, True])]
    assert (chosen.text, chosen.id.tolist(), chosen.prompt.tolist()) == ((" b", "d"), [8, 6], [0, 3])
    again = table[torch.tensor([3, 1, 1])]
    assert (again.text, again.id.tolist(), again.topic) == (("d", " b", " b"), [6, 8, 8], ("u", "t", "t"))
    assert len(table[torch.zeros(4, dtype=torch.bool)]) == 0
    assert isinstance(again, Tokens)


def test_a_table_prints_its_size_and_columns_and_becomes_a_frame(table: Tokens) -> None:
    assert repr(table) == "Tokens(4 rows: prompt, position, id, text, word, word_class, special, topic, document)"
    pd.testing.assert_frame_equal(
        table.to_frame().filter(["prompt", "text", "special"]),
        pd.DataFrame(
            {"prompt": [0, 0, 2, 3], "text": ["<s>", " b", " c", "d"], "special": [True, False, False, False]}
        ),
    )


def test_by_prompt_gives_each_prompt_that_has_rows(table: Tokens) -> None:
    assert [(number, part.text) for number, part in table.by_prompt()] == [
        (0, ("<s>", " b")),
        (2, (" c",)),
        (3, ("d",)),
    ]


def test_special_tokens_are_of_no_class(table: Tokens) -> None:
    assert table.of_class("content").tolist() == [False, True, False, True]
    assert table.of_class("function").tolist() == [False, False, True, False]
    assert not table.of_class("verb").any()


def test_concatenated_tables_number_their_prompts_from_where_they_are_told(table: Tokens) -> None:
    both = concatenate([table, table], [0, 4])
    assert both.prompt.tolist() == [0, 0, 2, 3, 4, 4, 6, 7]
    assert both.position.tolist() == [0, 1, 0, 0] * 2
    assert both.text == table.text * 2
    assert table.prompt.tolist() == [0, 0, 2, 3]


def test_the_table_of_prompts_has_their_texts_without_special_tokens(table: Tokens) -> None:
    prompts = prompt_table(table)
    assert prompts.prompt.tolist() == [0, 2, 3]
    assert prompts.text == ("b", "c", "d")
    assert prompts.topic == ("t", "", "u")


# What follows


def test_the_token_that_follows_brings_its_text_word_and_class():
    tokens = Tokens(
        prompt=torch.tensor([0, 0, 0, 0, 3, 3]),
        position=torch.tensor([0, 1, 2, 3, 0, 1]),
        id=torch.tensor([1, 20, 21, 22, 20, 23]),
        text=("<s>", " The", " light", "house", " The", " sea"),
        word=torch.tensor([-1, 0, 1, 1, 0, 1]),
        word_class=("", "function", "content", "content", "function", "content"),
        special=torch.tensor([True, False, False, False, False, False]),
        topic=("",) * 6,
        document=torch.tensor([10, 10, 10, 10, 20, 20]),
    )
    after = following(tokens)
    assert after.text[:3] == (" The", " light", "house") and after.text[4] == " sea"
    assert after.id.tolist() == [20, 21, 22, 1, 23, 20]
    assert after.word.tolist() == [0, 1, 1, -1, 1, -1]
    assert after.word_class == ("", "content", "content", "", "content", "")
    assert after.position.tolist() == tokens.position.tolist() and after.prompt.tolist() == tokens.prompt.tolist()
    # Types of what follows are whole words: the pieces of " lighthouse" are one, and " The" before it is none.
    assert inference.forms(after)[1:3] == ("lighthouse", "lighthouse")
    assert inference.forms(after)[4] == "sea"
