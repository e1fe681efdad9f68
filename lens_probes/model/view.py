"""The views of models of text and of images, and which models they refuse. A view never changes its model."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes.messages import brief
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
                f"{type(self.adapter.wrapped).__name__}: pass one, such as lens_probes.examples.tiny.vit(), or give a "
                f"model of text a stem, as stem=lens_probes.stems.orthogonal(model)"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def attention(self) -> str:
        """Which patches a state may depend on."""
        return "all patches"

    @property
    def projection(self) -> tuple[Tensor, Tensor]:
        """The weight [d_model channel height width] and the bias [d_model] of the patch projection."""
        parts = (part for part in self.adapter.wrapped.modules() if isinstance(part, torch.nn.Conv2d))
        stem = next((part for part in parts if part.stride == part.kernel_size), None)
        if stem is None:
            raise ValueError(
                f"{self.name} must embed patches by one projection, a convolution whose stride is its size; got none: "
                f"use another vision transformer"
            )
        weight = stem.weight.detach().float()
        bias = weight.new_zeros(len(weight)) if stem.bias is None else stem.bias.detach().float()
        return weight, bias

    def before(self, n_tokens: int) -> int:
        """Number of tokens before the patches: the class token, on some models a second one."""
        (_, height, width), size = self.shape, self.projection[0].shape[-2:]
        return n_tokens - (height // size[0]) * (width // size[1])

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


class StemView(ModelView):
    """A model of text that reads images: a stem makes the embeddings of its tokens, one per patch.

    There is no class token, and nothing is added to the patches but what the model adds to its tokens: learned
    positions, if it has them; rotary ones act in attention. `masked=False` is the same model without its causal mask.

    >>> from lens_probes.examples import tiny
    >>> view = StemView(tiny.bridge(), lambda images: images.flatten(2).mT.repeat(1, 1, 16))
    >>> view.activation(torch.zeros(2, 2, 3, 3), view.hook("resid_post", 1)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(self, model: Any, stem: Callable[[Tensor], Tensor], *, masked: bool = True) -> None:
        super().__init__(model)
        self.stem, self.masked = stem, masked
        if not masked:
            self.check_unmasked()

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.W_E.dtype

    @property
    def attention(self) -> str:
        """Which patches a state may depend on."""
        return "its own and earlier patches" if self.masked and not self.encoder else "all patches"

    def embeddings_of(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image patch d_model"]:
        """What the stem makes of the images, checked."""
        made = self.stem(pixels.to(self.device))
        if not isinstance(made, Tensor) or made.ndim != 3 or (len(made), made.shape[-1]) != (len(pixels), self.d_model):
            raise ValueError(
                f"a stem for {self.name} must return a tensor [image patch {self.d_model}]; got {brief(made)} for "
                f"{brief(pixels)}: make one with lens_probes.stems.orthogonal(model)"
            )
        if self.n_ctx is not None and made.shape[1] > self.n_ctx:
            raise ValueError(
                f"an image for {self.name} must have at most {self.n_ctx} patches; got {made.shape[1]}: use larger "
                f"patches or smaller images"
            )
        return made

    def before(self, n_tokens: int) -> int:
        """Number of tokens before the patches: none."""
        return 0

    def activation(
        self, pixels: Float[Tensor, "image channel height width"], name: str
    ) -> Float[Tensor, "image position width_of_activation"]:
        """An activation at every patch; gradients flow to pixels that require them."""
        self.check_hooks([name])
        patches = self.embeddings_of(pixels)
        ids = torch.zeros(patches.shape[:2], dtype=torch.int64)  # any tokens: their embeddings are replaced
        how = {"masked": self.masked, "gradients": pixels.requires_grad}
        return self.from_embeddings(patches, ids, [name], **how)[0]


def _check_wrapped(model: Any) -> None:
    """Raise for a model of Hugging Face's own."""
    if hasattr(model, "base_model_prefix") and not hasattr(model, "run_with_cache"):
        raise TypeError(
            f"a Hugging Face model must be wrapped before it is read; got a {type(model).__name__}: pass "
            f"TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)"
        )
