"""Forward passes of a model of text: what it computes, what it would compute of other embeddings, what it predicts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes.model.running import as_hooks, run_until, undisturbed
from lens_probes.model.weights import Weights


class Passes(Weights):
    """Activations and logits. The model is as before after every pass."""

    def activations(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The named activations of one padded batch, nothing else kept."""
        if not names:
            return {}
        mask = mask.to(self.device, torch.int64)
        with undisturbed(self.model):
            _, cache = self.model.run_with_cache(
                ids.to(self.device),
                return_type=None,
                names_filter=list(names),
                attention_mask=mask,
                **self.adapter.options(names),
            )
        found = dict(cache.items())
        for name in names:
            if found.get(name) is None:
                raise ValueError(
                    f"activation {name!r} exists in {self.name} but was not computed: it may have to be switched on, "
                    f"as model.set_use_attn_result(True) does for hook_result, and attn_implementation='eager' for "
                    f"patterns"
                )
        return {name: found[name] for name in names}

    def logits(
        self,
        ids: Int[Tensor, "prompt position"],
        mask: Bool[Tensor, "prompt position"],
        edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, "prompt position vocab"]:
        """The model's own logits of a padded batch, with some activations replaced on the way by what `edits` give."""
        edits = edits or {}
        self.check_hooks(edits)
        with undisturbed(self.model):
            return self.model.run_with_hooks(
                ids.to(self.device),
                return_type="logits",
                fwd_hooks=as_hooks(edits),
                attention_mask=mask.to(self.device, torch.int64),
            )

    # Embeddings, as a pass has them

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

    def run_until(self, ids: Int[Tensor, "prompt position"], names: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """The named activations of unpadded prompts, by a pass that ends once all are there."""
        ids = ids.to(self.device)
        # Without a mask a token that is the padding token is taken for padding.
        return run_until(self.model, ids, names, attention_mask=torch.ones_like(ids), **options)
