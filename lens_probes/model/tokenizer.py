"""Text to token ids and back, with the model's own tokenizer."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from lens_probes.model.weights import Weights

Spans = list[tuple[int, int] | None]


class Tokenizer(Weights):
    """The tokenizer, and the text of every token id."""

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """The side on which the tokenizer pads."""
        return "left" if getattr(self.tokenizer, "padding_side", "right") == "left" else "right"

    @property
    def pad_id(self) -> int:
        """The id that pads a batch. It is masked, but must be in the vocabulary."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad < self.d_vocab else 0

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: beginning of sequence, separators, padding."""
        return frozenset(self.tokenizer.all_special_ids) if self.tokenizer is not None else frozenset()

    def encode(self, text: str, prepend_bos: bool | None) -> tuple[list[int], Spans]:
        """The ids of a text and the span of characters of each (None for special tokens).

        A decoder's text gets one beginning-of-sequence token if `prepend_bos` (None: the default of the model's class).
        An encoder's text gets the special tokens that its tokenizer adds.
        """
        self._check_tokenizer()
        ids, spans = self._ids_and_spans(text, special=self.adapter.encoder)
        bos = self.tokenizer.bos_token_id
        if prepend_bos is None:
            prepend_bos = bool(getattr(self.model.cfg, "default_prepend_bos", True)) and bos is not None
        if self.adapter.encoder or not prepend_bos:
            return ids, spans
        if bos is None:
            raise ValueError(
                f"prepend_bos=True needs a beginning-of-sequence token; got none in the tokenizer of {self.name}: "
                f"leave it out"
            )
        return [bos, *ids], [None, *spans]

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError(f"text needs a tokenizer; got {self.name} without one: pass token ids instead")

    def locate(self, ids: Sequence[int]) -> tuple[str, Spans]:
        """The text of ids and the span of each, if encoding that text gives the ids back; otherwise no spans."""
        nowhere: Spans = [None] * len(ids)
        plain = [i for i in ids if i not in self.special_ids]
        if self.tokenizer is None or not plain:
            return "", nowhere
        text = self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        again, spans = self._ids_and_spans(text, special=False)
        if again != plain:
            return "", nowhere
        remaining = iter(spans)
        return text, [None if i in self.special_ids else next(remaining) for i in ids]

    def _ids_and_spans(self, text: str, special: bool) -> tuple[list[int], Spans]:
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        return ids, [
            None if i in self.special_ids else (start, end)
            for i, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]

    def texts_of(self, *ids: Int[Tensor, "..."]) -> dict[int, str]:
        """The text of each token id that is in these tensors, in the order of ids; -1 stands for none."""
        known = sorted({i for some in ids for i in some.unique().tolist()} - {-1})
        return dict(zip(known, self.token_texts(known), strict=True))

    @cached_property
    def vocabulary_texts(self) -> tuple[str, ...]:
        """The text of every token id."""
        return tuple(self.token_texts(range(self.d_vocab)))

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """The text of each id, with its leading space; for part of a character, its name in the vocabulary."""
        ids = list(ids)
        if not ids:
            return []
        if self.tokenizer is None:
            return [str(i) for i in ids]
        pieces = self.tokenizer.convert_ids_to_tokens(ids)
        texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        return [_token_text(i, piece, text) for i, piece, text in zip(ids, pieces, texts, strict=True)]


def _token_text(i: int, piece: str | None, text: str) -> str:
    if piece is None:  # a row of the embedding that the tokenizer never uses
        return f"<{i}>"
    if not text or "\ufffd" in text:
        return piece
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
