"""Checks that the outputs of a block's parts add up to what the block adds to the residual stream."""

from collections.abc import Callable, Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lens_probes.model.hooks import ADDED, Part
from lens_probes.model.passes import undisturbed
from lens_probes.model.weights import Weights

EXACT = 1e-3  # relative, in float32 and float64
HALF = 0.03  # in half precision


def tolerance(dtype: torch.dtype) -> float:
    """The largest allowed relative difference between two computations of the same tensor."""
    return EXACT if dtype in (torch.float32, torch.float64) else HALF


class Sums(Weights):
    """Checks that weights times activations give what a block adds."""

    def hooks_written(self, layer: int) -> list[str]:
        """The activations that `check_written` compares: heads, and the stream before and after attention."""
        return [self.hook_z(layer), *self.hooks_added("attention", layer)]

    def check_written(self, layer: int, activation: Callable[[str], Float[Tensor, "token ..."]]) -> None:
        """Raise unless the outputs of the heads, plus the bias, add up to what attention adds to the stream."""
        z, *stream = (activation(name) for name in self.hooks_written(layer))
        written = einsum(z.float(), self.W_O(layer).float(), "token head d_head, head d_head d_model -> token d_model")
        self._check_added(written + self.output_bias(layer), stream, layer, "heads", "attention", "ln1_post")

    def check_values(
        self,
        layer: int,
        states: Float[Tensor, "token d_model"],
        values: Float[Tensor, "token kv_head d_head"],
    ) -> None:
        """Raise unless the values of a layer's heads are W_V and b_V of the states before it, normed."""
        own = self.values(layer, states).float()
        off, size = (own - values.float()).flatten(1).norm(dim=-1), values.float().flatten(1).norm(dim=-1)
        wrong = ~(off <= tolerance(values.dtype) * size)
        if wrong.any():
            raise ValueError(
                f"the values of layer {layer} of {self.name} must be W_V of its normed input; got values that are off "
                f"by {float((off / size)[wrong].max()):.2g} of it: use another model"
            )

    def check_neurons(self, layer: int) -> None:
        """Raise unless, on a few tokens, the outputs of the neurons, plus the bias, add up to what the MLP adds."""
        names = [self.hook_neurons(layer), *self.hooks_added("mlp", layer)]
        ids = torch.arange(8)[None] % self.d_vocab
        found = self.run_until(ids, names)
        value, *stream = (found[name].reshape(8, -1) for name in names)  # OPT's MLP lays prompts end to end
        written = value.float() @ self.W_out(layer).float() + self.neuron_bias(layer)
        self._check_added(written, stream, layer, "neurons", "the MLP", "ln2_post")

    def hooks_added(self, part: Part, layer: int) -> list[str]:
        """The stream before and after a layer or a part of it, and what else is added between the two."""
        parallel = self._hook("resid_mid") not in self.hook_names
        return [self._hook(at, layer) for at in ADDED[part, parallel]]

    def _check_added(
        self,
        written: Float[Tensor, "token d_model"],
        stream: Sequence[Float[Tensor, "token d_model"]],
        layer: int,
        parts: str,
        block: str,
        norm_after: str,
    ) -> None:
        """Raise unless `written` is the stream after minus the stream before, minus what else is added between."""
        before, after, *others = stream
        if (norm := getattr(self.model.blocks[layer], norm_after, None)) is not None:
            with undisturbed(self.model):
                written = norm(written.to(self.W_E.dtype)[None])[0].float()
        added = after.float() - before.float() - sum(other.float() for other in others)
        size, off = added.norm(dim=-1), (written - added).norm(dim=-1)
        # A difference has the rounding errors of its terms.
        rounding = torch.finfo(after.dtype).eps * torch.stack(list(stream)).float().norm(dim=-1).amax(0)
        wrong = ~(off <= tolerance(after.dtype) * size + 2 * rounding)
        if wrong.any():
            raise ValueError(
                f"the outputs of the {parts} of layer {layer} of {self.name} must add up to what {block} adds to the "
                f"residual stream; got sums that are off by {float((off / size)[wrong].max()):.2g} of it: use another "
                f"model"
            )
