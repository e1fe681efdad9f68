"""HeadNorm: how much does each head write into the residual stream?

    share[layer, head] = mean over tokens of |z[layer, head, token] W_O[layer, head]| / |h_pre[layer, token]|

It is 0 or more; at 1 a head writes a vector as long as the state h_pre that the layer reads. z are the values that the
head has mixed. Special tokens are left out: their states are outliers. The null is the mean over the layer's heads.
Raises for a model whose heads' outputs do not add up to what attention adds to the stream.

Source: the lengths of what attention writes are from Kobayashi et al. 2020, "Attention is Not Only a Weight: Analyzing
Transformers with Vector Norms", arXiv 2004.10102; there they are of single tokens, summed over heads.
"""

import torch
from einops import einsum
from jaxtyping import Float, Float64
from torch import Tensor

from lens_probes import Layers, ModelView, Probe, Reading, Result, derived, summed


class HeadNormResult(Result):
    """Sums over tokens. Its size does not depend on their number."""

    layer: tuple[str, ...]
    head: tuple[str, ...]
    total: Float64[Tensor, "layer head"] = summed("sum over tokens of the length written / length of the state")
    count: Float64[Tensor, ""] = summed("number of tokens")

    @derived("mean length written / length of the state", low=0, null="even")
    def share(self) -> Float[Tensor, "layer head"]:
        """The mean over tokens; NaN if there are none."""
        return (self.total / self.count).float()

    @derived("mean over the layer's heads", low=0)
    def even(self) -> Float[Tensor, " layer"]:
        """What each head would write if all wrote alike."""
        return self.share.mean(1)

    def findings(self) -> list[str]:
        """What the page begins with: the head that writes most."""
        if not self.share.isfinite().any():
            return []
        layer, head = divmod(int(self.share.nan_to_num(-1).argmax()), len(self.head))
        return [
            f"L{self.layer[layer]}{self.head[head]} writes most: on average over {int(self.count)} tokens "
            f"{self.share[layer, head]:.2f} of the state's length; the mean of its layer is {self.even[layer]:.2f}."
        ]


class HeadNorm(Probe[HeadNormResult]):
    """The length of what each head writes relative to the state that its layer reads.

    >>> import lens_probes as lp
    >>> result = HeadNorm(layers=[0, 2]).run(lp.tiny.bridge(), "Time flies like an arrow.")
    >>> result.layer, result.head
    (('0', '2'), ('H0', 'H1', 'H2', 'H3'))
    """

    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """What heads mix, the state before, and what attention adds, for a check."""
        layers = model.layers(self.layers)
        names = (name for layer in layers for name in (*model.hooks_written(layer), model.hook("resid_pre", layer)))
        return list(dict.fromkeys(names))

    def measure(self, reading: Reading) -> HeadNormResult:
        """Sums over the batch, layer by layer."""
        model, own = reading.model, ~reading.tokens.special
        layers, total = model.layers(self.layers), []
        for layer in layers:
            model.check_written(layer, reading.__getitem__)
            length = lengths(reading[model.hook_z(layer)].float(), model.W_O(layer).float())
            state = reading[model.hook("resid_pre", layer)].float()
            total.append((length / state.norm(dim=-1)[:, None]).cpu()[own].double().sum(0))
        labels, count = tuple(map(str, layers)), own.sum().double()
        return self.result(reading, layer=labels, total=torch.stack(total), count=count)


def lengths(
    z: Float[Tensor, "token head d_head"], weights: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "token head"]:
    """The length of what each head writes for each token: its mixed values times its part of W_O."""
    return einsum(z, weights, "token head d_head, head d_head d_model -> token head d_model").norm(dim=-1)
