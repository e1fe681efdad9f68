"""Encoder-decoders such as T5, BART and Marian: a view of each of their two stacks, and of which model which view is.

A prompt has a source, which the encoder reads, and a target, which the decoder is given. Sources and targets are padded
on the right: BART and Marian count positions from the first column, padding or not.
"""

import copy
import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lens_probes.messages import brief
from lens_probes.model.adapters import DecoderStack, EncoderStack, Images
from lens_probes.model.base import View
from lens_probes.model.hooks import ReadPoint
from lens_probes.model.sums import tolerance
from lens_probes.model.tokenizer import Spans
from lens_probes.model.view import ImageView, ModelView
from lens_probes.text.prompts import Prompt, Prompts, Tokens, is_whole, read_prompts, tokenize
from lens_probes.text.words import WordClasses

MAX_TOKENS = 64  # of a target that the model writes itself


class StackView(ModelView):
    """One stack of an encoder-decoder. Each pass that reads patterns checks that pattern times values is the output."""

    text_argument: ClassVar[str]  # of the tokenizer

    def __init__(self, model: Any) -> None:
        model = model.model if isinstance(model, ModelView) else model
        if hasattr(model, "original_model") and not hasattr(model, "decoder_blocks"):
            raise TypeError(
                f"a model must be an encoder-decoder, such as T5, BART or Marian, as a TransformerBridge; got "
                f"{View(model).name}, which has one stack: pass the model itself"
            )
        super().__init__(model)
        if hasattr(self.config, "relative_attention_num_buckets") and _transformerlens() == "3":
            raise TypeError(
                f"T5 needs TransformerLens 4; got version 3, which cannot run {self.name} with these transformers: "
                f"install transformer-lens>=4"
            )

    @property
    def name(self) -> str:
        """The model's name, and which of its stacks this is."""
        return f"{super().name} ({self.stack.removesuffix('_blocks')})"

    @property
    def n_layers(self) -> int:
        """Number of blocks of this stack."""
        return len(getattr(self.model, self.stack))

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.adapter.wrapped.config

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """Right, whatever the tokenizer says."""
        return "right"

    @property
    def start_id(self) -> int:
        """The token with which every target begins."""
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError(f"{self.name} must have a decoder_start_token_id; got None: set it in its configuration")
        return int(start)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a target."""
        end = self.config.eos_token_id
        return frozenset([] if end is None else [end] if is_whole(end) else end)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokenizer's, and the start and end of targets."""
        return super().special_ids | {self.start_id} | self.end_ids

    def hook(self, at: ReadPoint, layer: int) -> str:
        """The name of the activation at a read point of a block: before or after it, or what a part adds."""
        if at == "resid_mid":
            raise ValueError(
                f"{self.name} is read before and after its blocks; got read point 'resid_mid', which other "
                f"architectures have in other places: use resid_pre or resid_post"
            )
        return super().hook(at, layer)

    def seen(
        self, layer: int, ids: Int[Tensor, " token"], pattern: Float[Tensor, "head query key"]
    ) -> Bool[Tensor, "query key"]:
        """Which tokens each query may attend to: no stack has a window."""
        return self.adapter.seen(len(ids), pattern.device)

    def activations(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The named activations of one padded batch; raises if a pattern times the values is not the heads' output."""
        return self._checked(super().activations(ids, mask, self._with_values(names)), names)

    def activations_and_logits(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "few vocab"]]:
        """The same, and the model's own logits of the first few tokens."""
        found, logits = super().activations_and_logits(ids, mask, self._with_values(names))
        return self._checked(found, names), logits

    def _with_values(self, names: Sequence[str]) -> list[str]:
        patterns = [name.removesuffix("pattern") for name in names if name.endswith(".hook_pattern")]
        return list(dict.fromkeys([*names, *(f"{name}{what}" for name in patterns for what in "vz")]))

    def _checked(self, found: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        for name in names:
            if name.endswith(".hook_pattern"):
                value, z = (found[f"{name.removesuffix('pattern')}{what}"] for what in "vz")
                self._check_mixed(name, found[name], value, z)
        return {name: found[name] for name in names}

    def _check_mixed(self, name: str, pattern: Tensor, value: Tensor, z: Tensor) -> None:
        (prompts, heads, queries, keys), size = pattern.shape, value.shape[-1]
        wrong = value.shape != (prompts, keys, heads, size) or z.shape != (prompts, queries, heads, size)
        if not wrong:
            mixed = einsum(pattern.float(), value.float(), "b head query key, b key head d -> b query head d")
            off, length = (mixed - z.float()).norm(dim=-1), z.float().norm(dim=-1)
            wrong = bool((off > tolerance(z.dtype) * length + 1e-6).any())  # NaN is told apart where it is read
        if wrong:
            raise ValueError(
                f"a head's output must be its attention pattern times its values; got another for {name} of "
                f"{self.name}: use another model"
            )

    def _ids_and_spans(self, text: str, special: bool) -> tuple[list[int], Spans]:
        """Targets may have a vocabulary or marks of their own; tokenizers in Python (Marian's) know no spans."""
        fast = bool(getattr(self.tokenizer, "is_fast", True))
        options: dict[str, Any] = {"add_special_tokens": special, "verbose": False}
        encoded = self.tokenizer(**{self.text_argument: text}, return_offsets_mapping=fast, **options)
        ids = list(encoded["input_ids"])
        spans = encoded["offset_mapping"] if fast else [None] * len(ids)
        return ids, [
            None if span is None or i in self.special_ids else (int(span[0]), int(span[1]))
            for i, span in zip(ids, spans, strict=True)
        ]


class EncoderView(StackView):
    """The encoder of an encoder-decoder: `lp.AttentionPatterns().run(lp.EncoderView(model), sources)`.

    >>> from lens_probes.examples import tiny
    >>> EncoderView(tiny.bridge("bart")).name
    'tiny-bart (encoder)'
    """

    stack = "encoder_blocks"
    text_argument = "text"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.adapter = EncoderStack(self.model)

    def hook_pattern(self, layer: int) -> str:
        """The activation that holds the attention pattern; raises for encoders that attend in windows or blocks."""
        if hasattr(self.config, "attention_window") or hasattr(self.config, "encoder_attention_type"):
            raise ValueError(
                f"an encoder must have one attention weight per query and key; got {self.name}, which attends in "
                f"windows (LED, LongT5): read its decoder, without EncoderView"
            )
        return super().hook_pattern(layer)

    def given(self, prompts: Prompts, word_class: WordClasses | None = None) -> tuple[ModelView, Prompts]:
        """The sources: the encoder reads no target."""
        return self, [replace(prompt, target=None) for prompt in read_prompts(prompts)]

    def _inputs(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"]
    ) -> tuple[Int[Tensor, "prompt any"], dict[str, Any]]:
        given, options = super()._inputs(ids, mask)
        return given, {**options, "decoder_input": given.new_full((len(ids), 1), self.start_id)}


class DecoderView(StackView):
    """The decoder of an encoder-decoder, with the sources that it attends to.

    >>> from lens_probes.examples import tiny
    >>> view, targets = DecoderView(tiny.bridge("bart")).given("Time flies.")
    >>> view.sources.text[-1], targets[0].ids[0] == view.start_id
    ('</s>', True)
    """

    stack = "decoder_blocks"
    text_argument = "text_target"

    def hook_cross_pattern(self, layer: int) -> str:
        """The activation that holds the attention to the source."""
        return self.hook_pattern(layer).replace("self_attn", "cross_attn")

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocab"]:
        """The unembedding bias, and what BART and Marian add to the logits after it."""
        added = getattr(self.adapter.wrapped, "final_logits_bias", None)
        return super().unembedding_bias if added is None else super().unembedding_bias + added[0]

    # Sources and targets

    def encode(self, text: str, prepend_bos: bool | None) -> tuple[list[int], Spans]:
        """The ids of a target and the span of each: the start token, and what the tokenizer gives, its end included."""
        self._check_tokenizer()
        ids, spans = self._ids_and_spans(text, special=True)
        return [self.start_id, *ids], [None, *spans]

    def given(
        self, prompts: Prompts, word_class: WordClasses | None = None, max_tokens: int = MAX_TOKENS
    ) -> tuple["DecoderView", list[Prompt]]:
        """This view with the sources of some prompts, and their targets as prompts: greedy ones where none is given."""
        read, own = read_prompts(prompts), copy.copy(self)
        encoder = EncoderView(self)
        own.sources = tokenize(encoder.given(read)[1], encoder, word_class=word_class)
        return own, [own._target(number, prompt, max_tokens) for number, prompt in enumerate(read)]

    def _target(self, number: int, prompt: Prompt, max_tokens: int) -> Prompt:
        if isinstance(prompt.target, str):
            return Prompt(prompt.target, topic=prompt.topic)
        if prompt.target is None:
            return Prompt(ids=self._greedy(number, max_tokens), topic=prompt.topic)
        (target,) = read_prompts([prompt.target])
        if target.ids is None or target.ids[:1] != (self.start_id,):
            raise ValueError(
                f"the ids of a target must begin with {self.start_id}, the start token of {self.name}; got "
                f"{brief(prompt.target)} in prompt {number}: put it in front, or pass a text"
            )
        return replace(target, topic=prompt.topic)

    def _greedy(self, number: int, max_tokens: int) -> tuple[int, ...]:
        """The start token and the most probable next tokens, until an end token. Each prompt has passes of its own."""
        own = self._of_prompts([number])
        ids, longest = [self.start_id], min(max_tokens, (self.n_ctx or max_tokens + 1) - 1)
        while len(ids) <= longest:
            given = torch.tensor([ids])
            logits = own.logits(given, torch.ones_like(given, dtype=torch.bool))[0, -1]
            if not logits.isfinite().any() or logits.isnan().any():
                raise ValueError(f"the logits of {self.name} must be finite; got NaN or Inf: check the model's weights")
            ids.append(int(logits.argmax()))
            if ids[-1] in self.end_ids:
                break
        return tuple(ids)

    def of_batch(self, tokens: Tokens) -> "DecoderView":
        """This view with the sources of a batch of targets, numbered from 0."""
        return self._of_prompts(tokens.prompt.unique().tolist())

    def _of_prompts(self, numbers: Sequence[int]) -> "DecoderView":
        own, sources = copy.copy(self), self._sources()
        kept = sources[(sources.prompt >= numbers[0]) & (sources.prompt <= numbers[-1])]
        own.sources = replace(kept, prompt=kept.prompt - numbers[0])
        return own

    def _sources(self) -> Tokens:
        if self.sources is None:
            raise ValueError(f"{self.name} needs sources; got none: pass prompts to the run of a probe")
        return self.sources

    def _inputs(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"]
    ) -> tuple[Int[Tensor, "prompt any"], dict[str, Any]]:
        targets, options = super()._inputs(ids, mask)
        rows = [part.id for _, part in self._sources().by_prompt()]
        source = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        valid = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return source.to(self.device), {
            "attention_mask": valid.to(self.device),
            "decoder_input": targets,
            "decoder_attention_mask": options["attention_mask"],
        }


def greedy_targets(model: Any, prompts: Prompts, *, max_tokens: int = MAX_TOKENS) -> list[Prompt]:
    """The prompts with the targets that an encoder-decoder writes itself, where they have none.

    The most probable next token each time, until an end token or `max_tokens`: no beams, penalties or forced tokens. It
    takes one forward pass per token and prompt. A run without targets does this with 64 tokens at most.

    >>> from lens_probes.examples import tiny
    >>> [len(prompt.target) for prompt in greedy_targets(tiny.bridge("bart"), ["Time flies."], max_tokens=3)]
    [4]
    """
    if not is_whole(max_tokens) or max_tokens < 1:
        raise ValueError(f"greedy_targets(max_tokens=...) must be a whole number, 1 or more; got {brief(max_tokens)}")
    view = model if isinstance(model, DecoderView) else DecoderView(model)
    read = read_prompts(prompts)
    missing = [replace(prompt, topic="") for prompt in read if prompt.target is None]
    made = iter(view.given(missing, max_tokens=max_tokens)[1] if missing else [])
    return [prompt if prompt.target is not None else replace(prompt, target=next(made).ids) for prompt in read]


def text_view(model: Any) -> ModelView:
    """The view of a model of text; of an encoder-decoder, that of its decoder."""
    if isinstance(model, ModelView):
        return model
    return DecoderView(model) if hasattr(model, "decoder_blocks") else ModelView(model)


def view_of(model: Any) -> View:
    """The view of a model of text or of images."""
    if isinstance(model, ModelView):
        return model
    adapter = View(model).adapter
    if isinstance(adapter, Images):
        return ImageView(model)
    return DecoderView(model) if isinstance(adapter, DecoderStack) else ModelView(model)


def _transformerlens() -> str:
    """The first number of the version of TransformerLens."""
    return importlib.metadata.version("transformer-lens").split(".")[0]
