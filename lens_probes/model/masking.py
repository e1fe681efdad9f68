"""Attention to some of the tokens only: edits of the scores, and the proof that a model obeys them."""

import warnings
from collections.abc import Callable, Sequence

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from lens_probes.model.attention import unmasked
from lens_probes.model.sums import tolerance
from lens_probes.model.view import ModelView

Keep = Callable[[Bool[Tensor, "prompt query key"]], Bool[Tensor, "prompt query key"]]
"""Given which keys each query may attend to, which of them it keeps. What was masked stays masked."""

TOKENS = 8  # of the pass that proves the edits


class Masking:
    """Masks the scores of keys, in some heads of these layers, so that they get no attention.

    Making one raises for a model in which this edit does not do what it says.
    """

    def __init__(self, view: ModelView, layers: Sequence[int]) -> None:
        self.view, self.layers = view, layers
        self.hooks = [view.hook_scores(layer) for layer in layers]
        self._check()

    def edit(self, layer: int, heads: Sequence[int] | None, keep: Keep) -> dict[str, Callable[[Tensor], Tensor]]:
        """The edit of one layer, by the name of the activation; `heads` None is all of them."""

        def masked(scores: Float[Tensor, "prompt head query key"]) -> Float[Tensor, "prompt head query key"]:
            may = unmasked(scores)
            hidden = (may & ~keep(may))[:, None].repeat(1, scores.shape[1], 1, 1)
            if heads is not None:
                others = torch.ones(scores.shape[1], dtype=torch.bool)
                others[list(heads)] = False
                hidden[:, others] = False
            return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

        return {self.view.hook_scores(layer): masked}

    def _check(self) -> None:
        """Raise unless masked scores reach the outputs of the heads.

        Where TransformerLens leaves attention to Hugging Face, an edit of the scores changes nothing, silently. In one
        pass, queries keep themselves only, or one token more in turn: what every head puts out must be the softmax of
        the masked scores, times the values.
        """
        view, ids = self.view, torch.arange(TOKENS)[None] % self.view.d_vocab
        few = torch.eye(TOKENS, dtype=torch.bool, device=view.device)
        few[1::2] |= few[1::2].roll(-1, dims=1)
        edits: dict[str, Callable[[Tensor], Tensor]] = {}
        for layer in self.layers:
            edits |= self.edit(layer, None, lambda may: few.expand_as(may))
        names = [hook(each) for each in self.layers for hook in (view.hook_scores, view.hook_value, view.hook_z)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*edit is discarded")  # TransformerLens 4; an error says so here
            found = view.edited(ids, torch.ones_like(ids, dtype=torch.bool), names, edits)
        for layer in self.layers:
            scores, values, z = (found[hook(layer)][0] for hook in (view.hook_scores, view.hook_value, view.hook_z))
            pattern = scores.float().softmax(-1)
            expected = einsum(pattern, view.per_head(view.mixed(values)).float(), "head q k, k head d -> q head d")
            off, size = (z.float() - expected).norm(dim=-1), expected.norm(dim=-1)
            if not (off <= tolerance(z.dtype) * size).all():
                raise ValueError(
                    f"masking attention scores must change what the heads of layer {layer} of {view.name} put out; got "
                    f"outputs that are off by {float((off / size).nan_to_num(torch.inf).max()):.2g} of it "
                    f"(TransformerLens leaves some models' attention to Hugging Face, where edits do nothing): use "
                    f"another model"
                )
