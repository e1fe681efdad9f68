"""What text and image models have in common: a name, layers, and names of activations."""

import difflib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, KeysView, Sequence, Set
from functools import cache, cached_property, partialmethod
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import torch

from lens_probes.messages import brief
from lens_probes.model.adapters import adapter_of
from lens_probes.model.hooks import READ_POINTS, ReadPoint


class View:
    """The common interface of all models."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.adapter = adapter_of(model)

    # What the model is

    @property
    def name(self) -> str:
        """The name under which the model was loaded; for a path, the name of its folder."""
        name = str(getattr(self.model.cfg, "model_name", "unnamed"))
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def class_name(self) -> str:
        """HookedTransformer or TransformerBridge."""
        return type(self.model).__name__

    @property
    def processed(self) -> bool:
        """Whether norms were folded and weights centred (the default of HookedTransformer.from_pretrained)."""
        return self.adapter.processed

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def device(self) -> torch.device:
        """The device of the first weights, where inputs must be."""
        return next(self.model.parameters()).device

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """Versions of the packages that the numbers depend on."""
        return _versions()

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Every module by name; on a Bridge also those of the Hugging Face model that it wraps."""
        return self.adapter.modules()

    # Layers and units

    def layers(self, layers: Iterable[int] | slice | None) -> tuple[int, ...]:
        """Layer numbers, in the given order. `None` is all layers; negative numbers count from the end.

        A slice applies to all layers. The layers of a set are sorted.
        """
        if isinstance(layers, Integral) and not isinstance(layers, bool):
            raise TypeError(f"layers must be a list; got one number: write layers=[{layers}], or None for all layers")
        every = range(self.n_layers)
        asked: Any = every if layers is None else every[layers] if isinstance(layers, slice) else layers
        asked = asked.tolist() if hasattr(asked, "tolist") else asked  # of arrays and tensors
        if not isinstance(asked, Sequence | Set) or isinstance(asked, str):  # an iterator is empty the second time
            raise TypeError(f"layers must be a list of layer numbers, as layers=[0, 3]; got layers={brief(layers)}")
        for layer in asked:
            if not isinstance(layer, Integral) or isinstance(layer, bool):
                raise TypeError(f"layers must be whole numbers, counted from 0; got {brief(layer)}")
            if not -self.n_layers <= int(layer) < self.n_layers:
                raise ValueError(f"layer {layer} is out of range: {self.name} has layers 0 to {self.n_layers - 1}")
        numbers = [int(layer) % self.n_layers for layer in asked]
        numbers = sorted(numbers) if isinstance(asked, Set) else numbers
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"layers must name one layer or more, each once; got {brief(layers)}: list each layer once"
            )
        return tuple(numbers)

    def units(self, asked: Sequence[int], hook: str, width: int) -> list[int]:
        """Unit numbers, checked against the width of their activation."""
        if not isinstance(asked, Sequence) or any(type(number) is not int for number in asked):
            raise TypeError(
                f"units must be a list of whole numbers; got {brief(asked)}: write units=[3] or units=range(8)"
            )
        for number in asked:
            if not 0 <= number < width:
                raise ValueError(f"unit {number} is out of range: {hook} of {self.name} has units 0 to {width - 1}")
        if not len(asked) or len(set(asked)) < len(asked):
            raise ValueError(f"units must name one unit or more, each once; got {brief(asked)}: list each unit once")
        return list(asked)

    # Names of activations

    @cached_property
    def _hooks(self) -> dict[str, torch.nn.Module]:
        """Every hook by each of its names: a Bridge searches its modules for them."""
        return dict(self.model.hook_dict)

    @property
    def hook_names(self) -> KeysView[str]:
        """The names of all activations that the model has."""
        return self._hooks.keys()

    def hook(self, at: ReadPoint, layer: int) -> str:
        """The name of the activation at a read point of a block.

        On post-norm encoders `resid_mid` is the sum of attention output and residual, before its norm, and `attn_out`
        is what attention adds to that sum.
        """
        if at not in READ_POINTS:
            raise ValueError(f"a read point must be one of {', '.join(READ_POINTS)}; got {brief(at)}")
        (layer,) = self.layers([layer])
        present = [point for point in READ_POINTS if self._hook(point, layer) in self.hook_names]
        if at not in present:
            raise ValueError(
                f"read point {at!r} does not exist in {self.name} (blocks whose attention and MLP run in parallel have "
                f"no state between them): use one of {', '.join(present)}"
            )
        return self._hook(at, layer)

    def hook_units(self, at: Literal["neuron", "head"] | ReadPoint, layer: int) -> str:
        """The activation that holds a layer's neurons, its heads' mixed values, or the units of a read point."""
        if at not in ("neuron", "head", *READ_POINTS):
            raise ValueError(f"at must be one of neuron, head, {', '.join(READ_POINTS)}; got {brief(at)}")
        (layer,) = self.layers([layer])
        of_units = {"neuron": self.hook_neurons, "head": self.hook_z}.get(at)
        return self.hook(cast(ReadPoint, at), layer) if of_units is None else of_units(layer)

    def hook_neurons(self, layer: int) -> str:
        """The activation that holds a layer's neurons; raises where it is the output of the MLP."""
        name = self._hook("neuron", layer)
        if (hook := self._hooks.get(name)) is not None and hook is self._hooks.get(self._hook("whole_mlp", layer)):
            raise ValueError(
                f"the neurons of layer {layer} of {self.name} must have an activation; got {name}, which is the output "
                f"of the whole MLP there, as in a mixture of experts: leave the layer out, or read mlp_out"
            )
        return name

    def _hook(self, what: str, layer: int = 0) -> str:
        return self.adapter.hooks[what].format(layer=layer)

    hook_plain_key = partialmethod(_hook, "key")
    hook_value = partialmethod(_hook, "value")
    hook_scores = partialmethod(_hook, "scores")
    hook_pattern = partialmethod(_hook, "pattern")
    hook_z = partialmethod(_hook, "z")

    @property
    def hook_token_embed(self) -> str:
        """The activation that holds the token embeddings, rows of W_E."""
        return self._hook("token_embed")

    def states(self, at: ReadPoint, layers: Iterable[int] | slice | None) -> dict[str, str]:
        """One read point of these layers: label (such as `3_post`) -> activation."""
        return {self.label(at, layer): self.hook(at, layer) for layer in self.layers(layers)}

    def stream(self, layers: Iterable[int] | slice | None, *, incl_mid: bool = False) -> dict[str, str]:
        """The residual stream of these layers: label -> activation, in the order of computation.

        Layer 0 includes the embeddings, `0_pre`.
        """
        points: dict[str, str] = {}
        for layer in sorted(self.layers(layers)):
            first: list[ReadPoint] = ["resid_pre"] if layer == 0 else []
            middle: list[ReadPoint] = ["resid_mid"] if incl_mid else []
            for at in (*first, *middle, "resid_post"):
                points[self.label(at, layer)] = self.hook(at, layer)
        return points

    def label(self, at: ReadPoint, layer: int) -> str:
        """The label of a state on a layer axis: `0_pre`, `3_mid`, `3_post`, `3_attn_out`."""
        return f"{layer}_{at.removeprefix('resid_')}"

    def check_hooks(self, names: Iterable[str]) -> None:
        """Raise for a name that the model does not have: TransformerLens ignores unknown names beside known ones."""
        for name in names:
            if name not in self.hook_names:
                close = difflib.get_close_matches(name, self.hook_names, n=3)
                hint = f"did you mean {', '.join(close)}?" if close else "see list(model.hook_dict)"
                raise ValueError(f"activation {name!r} does not exist in {self.name} ({self.class_name}): {hint}")


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    packages = ("lens-probes", "transformer-lens", "transformers", "torch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    # Ours without the commit: a run goes on after the next one, and an editable install tells that of its installation.
    versions["lens-probes"] = re.sub(r"\.dev\d+.*", ".dev0", versions["lens-probes"])
    return tuple(versions.items())
