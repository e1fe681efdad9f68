"""The views of models of text and of images, and which models they refuse. A view never changes its model."""

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes.model.adapters import Images
from lens_probes.model.attention import Attention
from lens_probes.model.base import View
from lens_probes.model.head import Head
from lens_probes.model.passes import run_until
from lens_probes.model.sums import Sums
from lens_probes.model.tokenizer import Tokenizer
from lens_probes.text.prompts import Prompts, Tokens
from lens_probes.text.words import WordClasses


@runtime_checkable
class Origin(Protocol):
    """Which model data came from: a result's provenance says so."""

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    @property
    def processed(self) -> bool:
        """Whether its weights were processed."""
        ...


class ModelView(Attention, Head, Sums, Tokenizer):
    """A `HookedTransformer` or a `TransformerBridge`, raw or processed, decoder or post-norm encoder.

    >>> from lens_probes.examples import tiny
    >>> view = ModelView(tiny.bridge("gpt2"))
    >>> view.hook("resid_mid", 1), view.label("resid_mid", 1), tuple(view.W_E.shape) == (view.d_vocab, view.d_model)
    ('blocks.1.hook_resid_mid', '1_mid', True)
    """

    stack: ClassVar[str] = "blocks"
    sources: Tokens | None = None
    """Of an encoder-decoder: the tokens that its encoder reads, one row per token."""

    def __init__(self, model: Any) -> None:
        if isinstance(model, ModelView):
            model = model.model
        _check_wrapped(model)
        if not hasattr(model, "run_with_cache") or not hasattr(model, "cfg"):
            raise TypeError(
                f"a model must be a HookedTransformer or a TransformerBridge of TransformerLens; got "
                f"{type(model).__name__}: load one with lens_probes.load_model(name)"
            )
        super().__init__(model)
        self.continues_prefixes = True  # until a key/value cache breaks its promise
        if (
            not hasattr(model, self.stack)
            or self._hook("resid_pre") not in self.hook_names
            or not hasattr(model, "W_E")
        ):
            raise TypeError(
                f"a model must have one stack of blocks over text tokens; got {self.name} ({type(model).__name__}): "
                f"use a decoder, or BERT or RoBERTa as a TransformerBridge (AttentionPatterns, CrossAttention and "
                f"LogitLens read encoder-decoders, FeatureVisualization models of images)"
            )
        self.adapter.check()

    @property
    def encoder(self) -> bool:
        """Whether attention goes both ways and norms stand after the residual sum: BERT and RoBERTa."""
        return self.adapter.encoder

    def given(self, prompts: Prompts, word_class: WordClasses | None = None) -> tuple["ModelView", Prompts]:
        """This view for a run on these prompts, and the prompts it reads: of a decoder with sources, the targets."""
        return self, prompts

    def of_batch(self, tokens: Tokens) -> "ModelView":
        """This view for a pass over these tokens of a run."""
        return self

    def refuse_other(self, what: str, origin: Origin, embed_mean: Float[Tensor, " d_model"]) -> None:
        """Raise unless data of this origin and this mean embedding came from this model."""
        own = self.embed_mean
        same = embed_mean.shape == own.shape and (embed_mean - own).norm() <= 1e-3 * own.norm()
        if not same or origin.processed != self.processed or origin.model != self.name:
            raise ValueError(
                f"{what} must come from {self.name} ({'processed' if self.processed else 'raw'} weights); got one of "
                f"{origin.model} ({'processed' if origin.processed else 'raw'} weights): make it with the same model"
            )


class ImageView(View):
    """A vision transformer as a `TransformerBridge`.

    >>> from lens_probes.examples import tiny
    >>> view = ImageView(tiny.vit())
    >>> view.activation(torch.zeros(2, *view.shape), view.hook("resid_post", 1)).shape
    torch.Size([2, 17, 32])
    """

    def __init__(self, model: Any) -> None:
        _check_wrapped(model)
        super().__init__(model)
        if not isinstance(self.adapter, Images) or not hasattr(model, "blocks"):
            raise TypeError(
                f"a model of images must be a TransformerBridge of a vision transformer; got {type(model).__name__} of "
                f"{type(self.adapter.wrapped).__name__}: lens_probes.examples.tiny.vit() makes one"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        config = self.adapter.wrapped.config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.num_channels, height, width

    def activation(
        self, pixels: Float[Tensor, "image channel height width"], name: str
    ) -> Float[Tensor, "image position width_of_activation"]:
        """An activation at the class token and every patch; gradients flow to pixels that require them."""
        self.check_hooks([name])
        given = pixels.to(self.device, self.dtype)
        return run_until(self.model, given, [name], gradients=pixels.requires_grad)[name]


def _check_wrapped(model: Any) -> None:
    """Raise for a model of Hugging Face's own."""
    if hasattr(model, "base_model_prefix") and not hasattr(model, "run_with_cache"):
        raise TypeError(
            f"a Hugging Face model must be wrapped before it is read; got a {type(model).__name__}: pass "
            f"TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)"
        )
