"""The Jacobian lens of TransformerLens, as a translator of states."""

import os
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lens_probes.messages import brief
from lens_probes.model.view import ModelView


class JacobianTranslator:
    """Maps a state to the last layer's basis by the mean Jacobian between the two. Made by `jacobian_lens`."""

    def __init__(self, lens: Any) -> None:
        self.lens = lens
        self._labels = {f"{layer}_post": layer for layer in lens.source_layers}
        self._last = ""

    def __repr__(self) -> str:
        return f"jacobian_lens({self.lens!r})"

    def __call__(self, state: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        """The state in the last layer's basis, J @ h; unchanged for the last layer."""
        return state if label == self._last else self.lens.transport(state, self._labels[label])

    def check_model(self, model: ModelView, labels: Sequence[str]) -> None:
        """Raise unless this lens was fitted on this model, for all of these states."""
        self.lens.validate_model(model.model)
        self._last = model.label("resid_post", model.n_layers - 1)
        missing = [label for label in labels if label not in (*self._labels, self._last)]
        if missing:
            raise ValueError(
                f"states must be of the layers that this lens was fitted for, {', '.join(self._labels)}; got "
                f"{missing[0]}: use those layers, or fit more layers"
            )


def jacobian_lens(lens: Any) -> JacobianTranslator:
    """The Jacobian lens of TransformerLens as a translator: `LogitLens(translator=jacobian_lens(lens))`.

    `lens`: a `JacobianLens` of `transformer_lens.tools.analysis`, or the path of one that it saved, which it loads. It
    knows the states after layers, `3_post`, but not `0_pre`: leave layer 0 out.
    """
    if isinstance(lens, str | os.PathLike):
        from transformer_lens.tools.analysis import JacobianLens

        lens = JacobianLens.load(os.fspath(lens))
    if not hasattr(lens, "transport") or not hasattr(lens, "source_layers"):
        raise TypeError(
            f"a Jacobian lens must be a JacobianLens of TransformerLens or the path of one; got {brief(lens)}: make it "
            f"with JacobianLens.fit(model, prompts, corpus=...)"
        )
    return JacobianTranslator(lens)
