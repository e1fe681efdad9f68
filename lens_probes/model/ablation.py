"""Ablation of heads or neurons: hooks that set their activations to fixed values."""

from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from lens_probes.model.view import ModelView


class Ablation:
    """Sets units (heads or neurons) to fixed values: zero ablation to zeros, mean ablation to their means.

    A unit is given by its index when the units of all layers are laid end to end.
    """

    def __init__(
        self, view: ModelView, layers: Sequence[int], component: str, to: Float[Tensor, "layer unit d"]
    ) -> None:
        hook = view.hook_z if component == "head" else view.hook_neurons
        self.hooks = [hook(layer) for layer in layers]
        self.component, self.to = component, to

    def __call__(self, places: Int[Tensor, " k"]) -> dict[str, Callable[[Tensor], Tensor]]:
        """The edits that ablate these units, by the name of the activation."""
        layer, number = places // self.to.shape[1], places % self.to.shape[1]
        return {self.hooks[i]: self._edit(i, number[layer == i]) for i in layer.unique().tolist()}

    def _edit(self, layer: int, units: Int[Tensor, " some"]) -> Callable[[Tensor], Tensor]:
        to = self.to[layer, units]

        def ablated(activation: Tensor) -> Tensor:
            changed = activation.clone()
            if self.component == "head":
                changed[..., units, :] = to.to(activation)
            else:
                changed[..., units] = to[:, 0].to(activation)
            return changed

        return ablated
