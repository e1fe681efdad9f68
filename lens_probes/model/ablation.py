"""Ablating heads or neurons: what hooks do so that they carry nothing of the prompt."""

from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from lens_probes.model.view import ModelView


class Ablation:
    """Sets units to fixed values: zero ablation sets them to zeros, mean ablation to their means.

    A unit is given by its index when the units of all layers are laid end to end.
    """

    def __init__(self, view: ModelView, layers: Sequence[int], of: str, to: Float[Tensor, "layer unit d"]) -> None:
        hook = view.hook_z if of == "head" else view.hook_neurons
        self.hooks = [hook(layer) for layer in layers]
        self.of, self.to = of, to

    def __call__(self, places: Int[Tensor, " k"]) -> dict[str, Callable[[Tensor], Tensor]]:
        """The edits, by the name of the activation, that ablate these units."""
        layer, number = places // self.to.shape[1], places % self.to.shape[1]
        return {self.hooks[i]: self._edit(i, number[layer == i]) for i in layer.unique().tolist()}

    def _edit(self, layer: int, units: Int[Tensor, " some"]) -> Callable[[Tensor], Tensor]:
        to = self.to[layer, units]

        def ablated(activation: Tensor) -> Tensor:
            changed = activation.clone()
            if self.of == "head":
                changed[..., units, :] = to.to(activation)
            else:
                changed[..., units] = to[:, 0].to(activation)
            return changed

        return ablated
