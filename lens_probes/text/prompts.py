"""Prompts in every form that `run` accepts, and the table of tokens that everything else reads.

    prompts --read_prompts--> [Prompt] --tokenize--> Tokens

Text is tokenised as the model's class does it, beginning-of-sequence token included. Ids are used unchanged.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from numbers import Integral
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes.messages import brief
from lens_probes.text.words import Word, WordClasses, closed_class


@runtime_checkable
class Tokenizing(Protocol):
    """Turns text into token ids and back: a model with its tokenizer."""

    @property
    def name(self) -> str:
        """The model's name, for error messages."""
        ...

    @property
    def n_ctx(self) -> int | None:
        """The longest prompt, in tokens."""
        ...

    @property
    def d_vocab(self) -> int:
        """Number of token ids."""
        ...

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for no text."""
        ...

    def encode(self, text: str, prepend_bos: bool | None) -> tuple[list[int], list[tuple[int, int] | None]]:
        """The ids of a text, and the characters of each."""
        ...

    def locate(self, ids: Sequence[int]) -> tuple[str, list[tuple[int, int] | None]]:
        """The text of ids, and the characters of each."""
        ...

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """The text of each id."""
        ...


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text or token ids (one of the two), and the topic it belongs to ("" if none).

    `document`: the text, or any name, of the document that a prompt is a piece of. Pieces of one document are not
    independent, and statistics count them as one prompt. By default a prompt is a document of its own.

    For an encoder-decoder it is the source. `target` is what its decoder is given (teacher forcing): a text, or ids
    that begin with the decoder's start token.

    >>> Prompt("Fruit flies like a banana.", topic="biology").topic
    'biology'
    """

    text: str | None = None
    ids: tuple[int, ...] | None = None
    topic: str = ""
    document: str = ""
    target: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.ids is None):
            raise ValueError(
                f"a Prompt must hold either a text or ids; got Prompt(text={brief(self.text)}, ids={brief(self.ids)}): "
                f"give one of the two"
            )
        if not isinstance(self.target, str | tuple | None):
            raise ValueError(
                f"the target of a Prompt must be a text or token ids; got {brief(self.target)}: write target='...' or "
                f"target=(0, 5, 6)"
            )


Prompts = (
    str
    | Tensor
    | Prompt
    | Sequence[str]
    | Sequence[Prompt]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[Tensor]
    | Iterator[str | Prompt | Sequence[int] | Tensor]
    | pd.Series
    | Mapping[str, str | Sequence[str] | Sequence[Prompt] | Iterator[str]]
)
"""What `run` accepts: a text, texts, topic -> text(s), `Prompt`s, a matrix of ids, or one sequence of ids per prompt.

Texts, `Prompt`s and sequences of ids may also come from an iterator, which is read once, or a column of a table.
"""

Pool = Literal["mean", "last"] | int
"""Which tokens represent a prompt: the mean over all tokens that are not special, the last of them, or a position."""

T = TypeVar("T", bound="Table")


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length, one row per token (or prompt, or pair of tokens); each a tensor or a tuple of texts.

    A column named `prompt` holds the number of the prompt, local to the table; `concatenate` renumbers it.
    """

    def __post_init__(self) -> None:
        sizes = {name: len(column) for name, column in self.columns().items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the columns of a {type(self).__name__} must have equal lengths; got {sizes}")

    def columns(self) -> dict[str, Any]:
        """The columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        return len(next(iter(self.columns().values())))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows: {', '.join(self.columns())})"

    def __getitem__(self: T, rows: Tensor | slice) -> T:
        """The rows of a boolean mask, of an index in that order, or of a slice."""
        if isinstance(rows, slice):
            return type(self)(**{name: column[rows] for name, column in self.columns().items()})
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return type(self)(
            **{
                name: column[index] if isinstance(column, Tensor) else tuple(column[i] for i in index.tolist())
                for name, column in self.columns().items()
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """The same table in pandas."""
        return pd.DataFrame(
            {
                name: column.numpy() if isinstance(column, Tensor) else list(column)
                for name, column in self.columns().items()
            }
        )


def concatenate(tables: Sequence[T], first_prompts: Sequence[int]) -> T:
    """The rows of all tables in order; the prompts of table i are numbered from `first_prompts[i]`."""
    columns: dict[str, Any] = {}
    for name, column in tables[0].columns().items():
        parts = [getattr(table, name) for table in tables]
        if name == "prompt":
            parts = [part + first for part, first in zip(parts, first_prompts, strict=True)]
        columns[name] = torch.cat(parts) if isinstance(column, Tensor) else tuple(chain.from_iterable(parts))
    return type(tables[0])(**columns)


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(Table):
    """The table of tokens: one row per token, prompts end to end.

    `word` is the number of the token's word within its prompt, or -1 if it belongs to none. `special` marks the tokens
    that tokenizers add (beginning of sequence, separators). Statistics exclude them by default. `document` is a number
    made from the content of the token's document, the same in every run: statistics count equal documents once.
    """

    prompt: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    id: Int[Tensor, " token"]
    text: tuple[str, ...]
    word: Int[Tensor, " token"]
    word_class: tuple[str, ...]
    special: Bool[Tensor, " token"]
    topic: tuple[str, ...]
    document: Int[Tensor, " token"]

    def by_prompt(self) -> Iterator[tuple[int, "Tokens"]]:
        """The number and the rows of each prompt that has rows, in order."""
        numbers, sizes = self.prompt.unique_consecutive(return_counts=True)
        start = 0
        for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            yield number, self[start : start + size]
            start += size

    def prompt_keys(self) -> Int[Tensor, " token"]:
        """A number for each token, made from the ids of its prompt: what is random is seeded by it."""
        numbers = [content_number(as_bytes(own.id)) for _, own in self.by_prompt()]
        sizes = self.prompt.unique_consecutive(return_counts=True)[1]
        return torch.tensor(numbers, dtype=torch.int64).repeat_interleave(sizes)

    def check_text(self) -> None:
        """Raise if a prompt has special tokens only."""
        for number, own in self.by_prompt():
            if own.special.all():
                raise ValueError(
                    f"every prompt must have a token that is not special; got special tokens only in prompt {number}: "
                    f"pass text"
                )

    def rows(self, prompt: int) -> list[int]:
        """The row numbers of a prompt."""
        whole_number("prompt", prompt)
        first, after = torch.searchsorted(self.prompt, torch.tensor([prompt, prompt + 1])).tolist()
        if first == after:
            raise ValueError(f"prompt {prompt} is out of range: this result has prompts 0 to {int(self.prompt.max())}")
        return list(range(first, after))

    def row(self, prompt: int, token: int | str) -> int:
        """The row number of a token of a prompt: by position (-1 is the last), or the last token of a word.

        The word must occur exactly once in the prompt.
        """
        rows = self.rows(prompt)
        if isinstance(token, str):
            words: dict[int, str] = {}
            for row in rows:
                words[int(self.word[row])] = words.get(int(self.word[row]), "") + self.text[row]
            found = [number for number, text in words.items() if number >= 0 and text.strip() == token.strip()]
            if len(found) != 1:
                raise ValueError(
                    f"token must be a position, or a word that the prompt has once; got {token!r}, which prompt "
                    f"{prompt} has {len(found)} times: pass a position, 0 to {len(rows) - 1}"
                )
            return max(row for row in rows if int(self.word[row]) == found[0])
        whole_number("token", token)
        position = self.position[rows].tolist()
        if token < 0 and -len(rows) <= token:
            return rows[token]
        if token not in position:
            known = f"{position[0]} to {position[-1]}" if len(rows) > 1 else f"{position[0]} only"
            raise ValueError(f"token {token} is out of range: prompt {prompt} has tokens {known}")
        return rows[position.index(token)]

    def of_class(self, word_class: str) -> Bool[Tensor, " token"]:
        """Which tokens are of this word class. Special tokens are of none."""
        return torch.tensor([own == word_class for own in self.word_class], dtype=torch.bool) & ~self.special


@dataclass(frozen=True, eq=False, repr=False)
class PromptTable(Table):
    """The labels of a `prompt` axis, one row per prompt: its text is the texts of its tokens, end to end.

    `n_tokens` is its number of tokens and `last_text` the text of its last token, special tokens excluded. Prompts of
    different topics should agree in both.
    """

    prompt: Int[Tensor, " prompt"]
    text: tuple[str, ...]
    topic: tuple[str, ...]
    n_tokens: Int[Tensor, " prompt"]
    last_text: tuple[str, ...]

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics in the order in which they first occur; one, "", for prompts without topics."""
        return tuple(dict.fromkeys(self.topic))

    def check_topics(self, topics: Sequence[str]) -> None:
        """Raise if a prompt has a topic that is not one of these."""
        for topic in self.topics:
            if topic not in topics:
                raise ValueError(
                    f"the topic of each prompt must be one of {', '.join(map(repr, topics))}; got {topic!r}"
                )


@dataclass(frozen=True, eq=False, repr=False)
class PairTable(Table):
    """The labels of a `pair` axis: the positions of a query token and a key token of one prompt."""

    prompt: Int[Tensor, " pair"]
    query: Int[Tensor, " pair"]
    key: Int[Tensor, " pair"]

    def check_positions(self, tokens: Tokens, keys: Tokens) -> None:
        """Raise if a query is not a position of its prompt in `tokens`, or a key one in `keys`."""
        queries, of_keys = self._sizes(tokens), self._sizes(keys)
        outside = (torch.minimum(self.query, self.key) < 0) | (self.query >= queries) | (self.key >= of_keys)
        if outside.any():
            row = int(outside.nonzero()[0])
            sizes = dict.fromkeys([int(queries[row]), int(of_keys[row])])
            raise ValueError(
                f"query and key must be positions of their prompt; got query {int(self.query[row])} and key "
                f"{int(self.key[row])} in prompt {int(self.prompt[row])}, which has {' and '.join(map(str, sizes))} "
                f"tokens"
            )

    def _sizes(self, tokens: Tokens) -> Int[Tensor, " pair"]:
        """The number of tokens of each pair's prompt."""
        first, after = (torch.searchsorted(tokens.prompt, self.prompt, right=right) for right in (False, True))
        return after - first


def prompt_table(tokens: Tokens) -> PromptTable:
    """The prompts of a table of tokens."""
    parts = list(tokens.by_prompt())
    texts = [part[~part.special].text for _, part in parts]
    return PromptTable(
        prompt=torch.tensor([number for number, _ in parts], dtype=torch.int64),
        text=tuple("".join(text).strip() for text in texts),
        topic=tuple(part.topic[0] for _, part in parts),
        n_tokens=torch.tensor([len(text) for text in texts], dtype=torch.int64),
        last_text=tuple(text[-1] if text else "" for text in texts),
    )


def as_prompts(tokens: Tokens) -> list[Prompt]:
    """The prompts of a table of tokens, to run them again."""
    return [Prompt(ids=tuple(own.id.tolist()), topic=own.topic[0]) for _, own in tokens.by_prompt()]


def first_part(tokens: Tokens, fraction: float) -> Bool[Tensor, " token"]:
    """Which tokens belong to the prompts to fit on. Prompts are split by a hash of their token ids, not by order."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, the share of the prompts to fit on; got {fraction}")
    prompts = {number: zlib.crc32(own.id.numpy().tobytes()) for number, own in tokens.by_prompt()}
    different = sorted(set(prompts.values()))  # equal prompts go to the same part
    if len(different) < 2:
        raise ValueError(
            f"prompts must include two different ones, to fit on some and measure on others; got {len(different)}: "
            f"pass more prompts"
        )
    chosen = set(different[: min(max(1, round(fraction * len(different))), len(different) - 1)])
    return torch.isin(tokens.prompt, torch.tensor([number for number, own in prompts.items() if own in chosen]))


def pooling(tokens: Tokens, pool: Pool) -> Float[Tensor, "prompt token"]:
    """The weight of each token in its prompt's vector: equal weights, special tokens excluded, or 1 for one token."""
    rows = []
    for number, prompt in tokens.by_prompt():
        own = tokens.prompt == number
        counted = own & ~tokens.special
        if not counted.any():
            raise ValueError(
                f"every prompt must have a token that is not special; got special tokens only in prompt {number} of a "
                f"batch: pass prompts with text"
            )
        if pool == "mean":
            rows.append(counted / counted.sum())
            continue
        places = counted.nonzero().flatten() if pool == "last" else own.nonzero().flatten()
        at = -1 if pool == "last" else int(pool)
        if not -len(places) <= at < len(places):
            raise ValueError(
                f"pool={at} must be a position of every prompt; got a prompt of {len(prompt)} tokens: use pool='mean' "
                f"or pool='last'"
            )
        rows.append(torch.nn.functional.one_hot(places[at], len(tokens)))
    return torch.stack(rows).float()


def pooled(pool: Pool) -> str:
    """`pool` in words, for the title of a figure.

    >>> pooled("mean"), pooled("last"), pooled(3)
    ('mean over tokens', 'last token', 'token 3')
    """
    return {"mean": "mean over tokens", "last": "last token"}.get(str(pool), f"token {pool}")


def read_prompts(prompts: Prompts) -> list[Prompt]:
    """Prompts in any accepted form, as a list of `Prompt`.

    >>> [prompt.topic for prompt in read_prompts({"chess": ["e4 e5", "Nf3"], "law": ["I object.", "Sustained."]})]
    ['chess', 'chess', 'law', 'law']
    >>> read_prompts([[1, 2], [3]])[1].ids
    (3,)
    """
    if isinstance(prompts, Iterator | pd.Series):
        prompts = list(prompts)
    if isinstance(prompts, Mapping):
        read = [replace(prompt, topic=str(topic)) for topic, texts in prompts.items() for prompt in read_prompts(texts)]
    elif isinstance(prompts, Tensor) and prompts.ndim == 2:
        read = [_read_one(row) for row in prompts]
    elif isinstance(prompts, str | Prompt | Tensor) or _is_ids(prompts):
        read = [_read_one(prompts)]
    elif isinstance(prompts, Sequence) and not isinstance(prompts, bytes):
        read = [_read_one(prompt) for prompt in prompts]
    else:
        hints = {
            "columns": ": pass the column that holds the texts, as table['text']",
            "tolist": ": pass its .tolist()",
            "decode": ": decode it",
            "__iter__": ": pass them as a list",
        }
        hint = next((hint for attribute, hint in hints.items() if hasattr(prompts, attribute)), "")
        raise TypeError(
            f"prompts must be a text, texts, topic -> texts, lp.Prompt objects or token ids; got "
            f"{type(prompts).__name__}{hint}"
        )
    if not read:
        raise ValueError("prompts must be one or more; got none: pass a text or a sequence of token ids")
    for topic, number in Counter(prompt.topic for prompt in read if prompt.topic).items():
        if number < 2:
            raise ValueError(
                f"every topic must have two prompts or more; got {number} for {topic!r}: add a prompt, or pass the "
                f"prompts without topics"
            )
    return read


def _is_ids(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes)
        and len(prompt) > 0
        and all(is_whole(i) for i in prompt)
    )


def whole_number(name: str, asked: object) -> None:
    """Raise unless a value (the number of a prompt, token, layer or head) is a whole number."""
    if not is_whole(asked):
        raise TypeError(f"{name} must be a whole number; got {asked!r:.80}")


def is_whole(i: object) -> bool:
    """Whether a value is a whole number, which True is not."""
    return isinstance(i, Integral) and not isinstance(i, bool)  # True would be read as id 1


def _read_one(prompt: Any) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(prompt)
    if isinstance(prompt, Tensor) and prompt.ndim == 1:
        if prompt.is_floating_point() or prompt.dtype == torch.bool:
            raise TypeError(f"token ids must be whole numbers; got a tensor of {prompt.dtype}: pass ids as integers")
        return Prompt(ids=tuple(prompt.tolist()))
    if _is_ids(prompt) or (isinstance(prompt, Sequence) and not len(prompt)):
        return Prompt(ids=tuple(int(i) for i in prompt))
    raise TypeError(
        f"a prompt must be a text, an lp.Prompt, or a 1-d sequence of token ids; got "
        f"{f'a {prompt.ndim}-d tensor' if isinstance(prompt, Tensor) else brief(prompt)}"
    )


def tokenize(
    prompts: Prompts,
    model: Tokenizing,
    *,
    prepend_bos: bool | None = None,
    word_class: WordClasses | None = None,
) -> Tokens:
    """All prompts as one table of tokens. Each prompt is checked against the model's vocabulary and context length.

    `prepend_bos` applies to text only (`None`: the default of the model's class). `word_class` finds the words of a
    text (by default `words.closed_class`). Token ids have words only where encoding their text gives the same ids.
    """
    read = read_prompts(prompts)
    for number, prompt in enumerate(read):
        if prompt.target is not None:
            raise ValueError(
                f"a prompt with a target needs an encoder-decoder; got prompt {number} with target "
                f"{brief(prompt.target)} for {model.name}: leave the target out"
            )
    parts = [
        _tokenize_one(prompt, number, model, prepend_bos, word_class or closed_class)
        for number, prompt in enumerate(read)
    ]
    return concatenate(parts, [0] * len(parts))


def _tokenize_one(
    prompt: Prompt, number: int, model: Tokenizing, prepend_bos: bool | None, word_class: WordClasses
) -> Tokens:
    if prompt.ids is None:
        text = prompt.text or ""
        ids, spans = model.encode(text, prepend_bos)
    else:
        ids = list(prompt.ids)
        _check_ids(ids, number, model.d_vocab)
        text, spans = model.locate(ids)
    if not ids or (prompt.ids is None and not text.strip() and not any(spans)):  # special tokens at most
        given = [] if prompt.text is None else prompt.text
        raise ValueError(f"prompt {number} must not be empty; got {given!r}: give it a text or ids, or leave it out")
    if model.n_ctx is not None and len(ids) > model.n_ctx:
        raise ValueError(
            f"a prompt for {model.name} must have at most {model.n_ctx} tokens; got {len(ids)} in prompt {number}: "
            f"shorten or split it"
        )
    word, classes = _own_words(text, spans, word_class)
    return Tokens(
        prompt=torch.full((len(ids),), number),
        position=torch.arange(len(ids)),
        id=torch.tensor(ids),
        text=tuple(model.token_texts(ids)),
        word=torch.tensor(word),
        word_class=tuple(classes),
        special=torch.tensor([i in model.special_ids for i in ids]),
        topic=(prompt.topic,) * len(ids),
        document=torch.full((len(ids),), content_number(prompt.document.encode() or as_bytes(torch.tensor(ids)))),
    )


def content_number(content: bytes) -> int:
    """A number made from some content: equal content has the same, in every process and release.

    >>> content_number(b"one"), content_number(b"one") == content_number(b"other")
    (-3957126355335908812, False)
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def as_bytes(ids: Int[Tensor, " token"]) -> bytes:
    """Ids as bytes, the same on every machine."""
    return ids.numpy().astype("<i8").tobytes()


def _check_ids(ids: Sequence[int], number: int, d_vocab: int) -> None:
    for i in ids:
        if not is_whole(i):
            raise TypeError(f"token ids must be whole numbers; got {brief(i)} in prompt {number}: pass ids as integers")
    outside = [i for i in ids if not 0 <= i < d_vocab]
    if outside:
        raise ValueError(
            f"token ids of this model must be 0 to {d_vocab - 1}; got {outside[0]} in prompt {number}: pass ids made "
            f"by this model's tokenizer"
        )


def _own_words(
    text: str, spans: Sequence[tuple[int, int] | None], word_class: WordClasses
) -> tuple[list[int], list[str]]:
    """The word of each token, found by the token's first character that is not a space, and the class of that word."""
    owner = [-1] * len(text)
    words = word_class(text)
    if not isinstance(words, list) or not all(isinstance(word, Word) for word in words):
        raise TypeError(
            f"word_class must take a text and return a list of lens_probes.text.words.Word(start, end, word_class); "
            f"got {brief(words)} for {text[:40]!r}"
        )
    for number, (start, end, _) in enumerate(words):
        owner[start:end] = [number] * (end - start)
    numbers = []
    for span in spans:
        visible = [i for i in range(*span) if not text[i].isspace()] if span else []
        numbers.append(owner[visible[0]] if visible else -1)
    return numbers, [words[number].word_class if number >= 0 else "" for number in numbers]
