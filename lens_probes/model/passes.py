"""Forward passes that leave the model as it was: activations, logits, and what follows from other embeddings."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes.model.adapters import adapter_of
from lens_probes.model.base import View

Edit = Callable[[Tensor], Tensor]
"""A function of an activation that returns its replacement."""


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast inside; restores everything, also after an error."""
    training = {module: module.training for _, module in adapter_of(model).modules()}
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.autocast(device_type=_device_type(model), enabled=False):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def differentiating(model: Any) -> Iterator[None]:
    """Gradients, no inference mode and no autocast inside, regardless of the caller's mode."""
    model = model.model if isinstance(model, View) else model
    device = _device_type(model) if isinstance(model, torch.nn.Module) else "cpu"  # others are refused further on
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type=device, enabled=False):
        yield


def _device_type(model: Any) -> str:
    return next(model.parameters()).device.type


class _Reached(Exception):
    """Ends a forward pass where no more of it is needed."""


def run_until(
    model: Any,
    given: Tensor,
    names: Collection[str],
    edits: Mapping[str, Edit] | None = None,
    gradients: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The named activations, by a pass that ends once all are there."""
    found: dict[str, Tensor] = {}
    wanted = set(names)

    def keep(name: str) -> Callable[..., None]:
        def hook_function(activation: Tensor, hook: Any) -> None:
            found[name] = activation
            if len(found) == len(wanted):
                raise _Reached

        return hook_function

    hooks = [*_as_hooks(edits or {}), *((name, keep(name)) for name in wanted)]
    with undisturbed(model), torch.set_grad_enabled(gradients), suppress(_Reached):
        model.run_with_hooks(given, return_type=None, fwd_hooks=hooks, **options)
    return found


def _as_hooks(edits: Mapping[str, Edit]) -> list[tuple[str, Callable[..., Tensor]]]:
    """Edits as TransformerLens calls them, with the activation and its hook."""

    def hook_function(edit: Edit) -> Callable[..., Tensor]:
        return lambda activation, hook: edit(activation)

    return [(name, hook_function(edit)) for name, edit in edits.items()]


class Passes(View):
    """Forward passes of a model of text."""

    def activations(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The named activations of one padded batch, nothing else kept."""
        if not names:
            return {}
        options = {"return_type": None, "attention_mask": mask.to(self.device, torch.int64)}
        options |= self.adapter.options(names)
        with undisturbed(self.model):
            _, cache = self.model.run_with_cache(ids.to(self.device), names_filter=list(names), **options)
        found = dict(cache.items())
        for name in names:
            if found.get(name) is None:
                raise ValueError(
                    f"activation {name!r} must be computed by {self.name}; got none: switch it on, with "
                    f"model.set_use_attn_result(True) for hook_result, or attn_implementation='eager' for patterns"
                )
        return {name: found[name] for name in names}

    def logits(
        self,
        ids: Int[Tensor, "prompt position"],
        mask: Bool[Tensor, "prompt position"],
        edits: Mapping[str, Edit] | None = None,
    ) -> Float[Tensor, "prompt position vocab"]:
        """The model's own logits of a padded batch, with some activations replaced on the way."""
        edits = edits or {}
        self.check_hooks(edits)
        options = {"return_type": "logits", "attention_mask": mask.to(self.device, torch.int64)}
        with undisturbed(self.model):
            return self.model.run_with_hooks(ids.to(self.device), fwd_hooks=_as_hooks(edits), **options)

    def run_until(self, ids: Int[Tensor, "prompt position"], names: Sequence[str], **how: Any) -> dict[str, Tensor]:
        """The named activations of unpadded prompts, by a pass that ends once all are there."""
        ids = ids.to(self.device)
        # Without a mask, tokens that are the padding token are taken for padding.
        return run_until(self.model, ids, names, attention_mask=torch.ones_like(ids), **how)

    # Embeddings, as a pass has them

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The embedding, one row per token id (on Gemma without the factor sqrt(d_model) on a Bridge)."""
        return self.model.W_E.detach()

    @property
    def d_vocab(self) -> int:
        """Number of rows of the embedding."""
        return int(self.W_E.shape[0])

    @cached_property
    def token_embeddings(self) -> Float[Tensor, "vocab d_model"]:
        """What `hook_token_embed` holds for each token id: W_E, on a Bridge of Gemma times sqrt(d_model)."""
        rows = self.embedded(torch.arange(self.d_vocab))
        return self.W_E if torch.equal(rows, self.W_E) else rows

    def embedded(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """What `hook_token_embed` holds for these token ids, by a pass that ends there."""
        return self.run_until(ids[:, None], [self.hook_token_embed])[self.hook_token_embed][:, 0]

    def differentiable(
        self, ids: Int[Tensor, "prompt position"], names: Sequence[str]
    ) -> tuple[Float[Tensor, "prompt position d_model"], list[Tensor]]:
        """Token embeddings and activations that depend on them, for `torch.autograd.grad`; no parameter gets a grad."""
        start = self.token_embeddings[ids.to(self.device)].clone().requires_grad_()
        return start, self.from_embeddings(start, ids, names)

    def from_embeddings(
        self,
        embeddings: Float[Tensor, "prompt position d_model"],
        ids: Int[Tensor, "prompt position"],
        names: Sequence[str],
    ) -> list[Tensor]:
        """Activations of tokens that have these embeddings; the model adds positions. Gradients flow to them.

        `ids` are the tokens in whose places they stand: RoBERTa gives positions to those that are no padding.
        """
        edits = {self.hook_token_embed: lambda given: embeddings.to(given)}
        found = self.run_until(ids, names, edits=edits, gradients=True)
        return [found[name] for name in names]
