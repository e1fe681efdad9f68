"""What is done with a shard: long texts are cut, similar lengths share a batch, and a text that fails is left out.

    Shard --pieces--> tokens of each piece --sorted by length--> batches --probes--> results, rows in the corpus's order

It depends on the shard only, so that a shard has the same result in whichever process it is measured.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_probes.corpus.texts import Shard
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Parts, Probe, check_probes, hooks_of, measured_batch
from lens_probes.reading import TOKENS_PER_BATCH
from lens_probes.result import Result
from lens_probes.result.merging import with_prompts_in_order
from lens_probes.text.prompts import Prompt, Tokens, concatenate, tokenize
from lens_probes.text.words import WordClasses, closed_class

HOPELESS = 8  # pieces that fail before any of a shard succeeds: the reason is not in the texts
SAMPLED = 64  # weights per parameter that are hashed with their places


class Piece(NamedTuple):
    """A text, or the part of a long one that fits: the text's number in the corpus, and its tokens."""

    text: int
    tokens: Tokens


class Failure(NamedTuple):
    """A text that is left out, by its number in the corpus, and why."""

    text: int
    reason: str


class Measured(NamedTuple):
    """What came of a shard; no results if none of its texts could be read."""

    results: list[Result]
    prompts: int
    tokens: int
    failures: list[Failure]


@dataclass(frozen=True)
class Work:
    """The probes, the model and the way to read texts: what every shard is measured with."""

    probes: Sequence[Probe[Any]]
    model: Any
    prepend_bos: bool | None = None
    word_class: WordClasses | None = None
    max_tokens: int | None = None
    batch_tokens: int = TOKENS_PER_BATCH

    def __post_init__(self) -> None:
        check_probes(self.probes)
        check_options(self.max_tokens, self.batch_tokens)
        if self.limit is not None and self.limit <= sum(map(len, self._frame)):
            raise ValueError(
                f"max_tokens must leave room for text beside {sum(map(len, self._frame))} special tokens; got "
                f"{self.limit}: raise it"
            )
        if self.view.n_ctx is not None and (self.max_tokens or 0) > self.view.n_ctx:
            raise ValueError(
                f"max_tokens must be at most the context of {self.view.name}, {self.view.n_ctx}; got {self.max_tokens}"
            )
        _ = self.names

    @cached_property
    def view(self) -> ModelView:
        """What the probes see of the model."""
        return ModelView(self.model)

    @cached_property
    def names(self) -> list[str]:
        """The activations that the probes read."""
        return hooks_of(self.probes, self.view)

    @property
    def limit(self) -> int | None:
        """The longest piece, in tokens."""
        return self.max_tokens or self.view.n_ctx

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        if self.view.tokenizer is None:
            return [], []
        ids, spans = self.view.encode("a", self.prepend_bos)
        inside = [i for i, span in enumerate(spans) if span is not None] or [len(ids)]
        return ids[: inside[0]], ids[inside[-1] + 1 :]

    def fingerprint(self) -> dict[str, Any]:
        """All that the numbers depend on besides the texts, as plain JSON."""
        view, word_class = self.view, self.word_class or closed_class
        text = (
            None if view.tokenizer is None else view.encode("Naïve tokens, don't you?  42 of them.", self.prepend_bos)
        )
        tokenizer = json.dumps([text, sorted(view.special_ids), view.padding_side, view.pad_id])
        return {
            "probes": [repr(probe) for probe in self.probes],
            "model": view.name,
            "class of the model": view.class_name,
            "processed weights": view.processed,
            "precision": str(view.W_E.dtype).removeprefix("torch."),
            "weights": weights_hash(self.model),
            "tokenizer": hashlib.blake2b(tokenizer.encode(), digest_size=8).hexdigest(),
            "prepend_bos": self.prepend_bos,
            "word_class": getattr(word_class, "__qualname__", type(word_class).__qualname__),
            "max_tokens": self.max_tokens,
            **{f"version of {package}": version for package, version in view.versions},
        }

    def measure(self, shard: Shard, each_batch: Callable[[int], object] = lambda tokens: None) -> Measured:
        """The result of each probe on a shard; `each_batch` is told the tokens of every batch.

        Raises if no text that could be read could be measured: then the reason is not in one of them.
        """
        pieces, failures = self.pieces(shard)
        if not pieces:
            return Measured([], 0, 0, failures)
        # Long ones first: who runs out of memory does so at once. Equal lengths keep their order.
        by_length = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].tokens))
        waiting, order, parts = self._batches(pieces, by_length), list[int](), [Parts() for _ in self.probes]
        failed: list[Failure] = []
        while waiting:
            batch = waiting.pop(0)
            try:
                tokens = concatenate([pieces[i].tokens for i in batch], range(len(batch)))
                results = measured_batch(self.probes, self.view, tokens, self.names, parts)
            except Exception as error:
                if len(batch) > 1:  # each half by itself, until the text is found
                    waiting[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                    continue
                failed.append(Failure(pieces[batch[0]].text, _reason(error)))
                if not order and (len(failed) == HOPELESS or not waiting):
                    raise
            else:
                order += batch
                for done, result in zip(parts, results, strict=True):
                    done.add(result)
                each_batch(len(tokens))
        if not order:
            raise ValueError(failed[0].reason)
        topics = list(dict.fromkeys(pieces[i].tokens.topic[0] for i in sorted(order)))
        found = [with_prompts_in_order(done.merged(), order, topics) for done in parts]
        n_tokens = sum(len(pieces[i].tokens) for i in order)
        return Measured(found, len(order), n_tokens, sorted(failures + failed))

    def _batches(self, pieces: Sequence[Piece], order: Sequence[int]) -> list[list[int]]:
        """Pieces in this order, which is by length, at most `batch_tokens` padded tokens in a batch, or one piece."""
        batches: list[list[int]] = []
        for i in order:
            longest = len(pieces[batches[-1][0]].tokens) if batches else 0
            if not batches or (len(batches[-1]) + 1) * longest > self.batch_tokens:
                batches.append([])
            batches[-1].append(i)
        return batches

    def pieces(self, shard: Shard) -> tuple[list[Piece], list[Failure]]:
        """The texts of a shard as tokens, long ones in several pieces, and those that cannot be read."""
        found: list[Piece] = []
        failures: list[Failure] = []
        for number, document in enumerate(shard.documents, shard.first):
            if document.prompt is None:
                failures.append(Failure(number, document.problem))
                continue
            try:
                whole = document.prompt.document or document.key
                found += [Piece(number, tokens) for tokens in self._tokens(document.prompt, whole)]
            except Exception as error:
                failures.append(Failure(number, _reason(error)))
        return found, failures

    def _tokens(self, prompt: Prompt, whole: str) -> list[Tokens]:
        """The tokens of a prompt; a long one in consecutive pieces, which are pieces of the document `whole`.

        Text is cut before a word where one begins in the second half of a piece. Every piece has the special tokens
        that a text has, and without them the pieces are the tokens of the whole. Ids are cut at the limit.
        """
        each = [replace(prompt, topic="")]  # a topic may be alone in a shard
        if self.limit is not None and prompt.ids is not None and len(prompt.ids) > self.limit:
            each = [
                Prompt(ids=prompt.ids[at : at + self.limit], document=whole)
                for at in range(0, len(prompt.ids), self.limit)
            ]
        # A token has a byte or more, so that most texts need not be encoded to be seen to fit.
        elif self.limit is not None and prompt.text is not None and len(prompt.text.encode()) > self.limit // 2:
            ids, spans = self.view.encode(prompt.text, self.prepend_bos)
            if len(ids) > self.limit:
                before, after = self._frame
                inside = slice(len(before), len(ids) - len(after))
                ids, spans = ids[inside], spans[inside]
                cuts = cut(spans, prompt.text, self.limit - len(before) - len(after))
                each = [Prompt(ids=(*before, *ids[part], *after), document=whole) for part in cuts]
        tokens = [
            tokenize([part], self.view, prepend_bos=self.prepend_bos, word_class=self.word_class) for part in each
        ]
        return [replace(own, topic=(prompt.topic,) * len(own)) for own in tokens]


def check_options(max_tokens: Any, batch_tokens: Any) -> None:
    """Raise unless numbers of tokens are 1 or more."""
    for name, given in (("max_tokens", max_tokens), ("batch_tokens", batch_tokens)):
        whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
        if not whole and not (name == "max_tokens" and given is None):
            raise ValueError(f"{name} must be a whole number, 1 or more; got {brief(given)}")


def cut(spans: Sequence[tuple[int, int] | None], text: str, most: int) -> list[slice]:
    """Consecutive parts of a row of tokens, at most `most` each, cut before a word in the second half where one begins.

    Otherwise as late as can be, and never inside a character of several tokens, unless it takes over half a part.

    >>> cut([(0, 3), (3, 5), (5, 9), (9, 11)], "one's two's", 3)
    [slice(0, 2, None), slice(2, 4, None)]
    """
    parts, start = [], 0
    while start + most < len(spans):
        places = range(start + most, start + most // 2, -1)
        stop = next((at for at in places if _begins_word(spans, text, at)), None)
        stop = stop or next((at for at in places if _begins_character(spans, at)), start + most)
        parts.append(slice(start, stop))
        start = stop
    return [*parts, slice(start, len(spans))]


def _begins_character(spans: Sequence[tuple[int, int] | None], at: int) -> bool:
    here, before = spans[at], spans[at - 1]
    return here is None or before is None or here[0] >= before[1]


def _begins_word(spans: Sequence[tuple[int, int] | None], text: str, at: int) -> bool:
    """Whether white space stands before a token, or begins it."""
    here = spans[at]
    if here is None or not _begins_character(spans, at):
        return here is None
    return text[here[0] : here[0] + 1].isspace() or text[max(0, here[0] - 1) : here[0]].isspace()


def weights_hash(model: Any) -> str:
    """Sixteen hexadecimal digits of all weights: their shapes, the sum of their bits, and a sample with its places.

    The sum is over whole numbers, so that it is the same on every device; it costs one reading of the weights.
    """
    digest = hashlib.blake2b(digest_size=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            bits = None if parameter.is_meta else _bits(parameter.detach())
            sampled = [] if bits is None else bits[:: max(1, len(bits) // SAMPLED)].tolist()
            total = 0 if bits is None else int(bits.sum(dtype=torch.int64))
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total} {sampled}".encode())
    return digest.hexdigest()


def _bits(weights: Tensor) -> Tensor:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    return weights.contiguous().view(-1).view(whole)


def _reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
