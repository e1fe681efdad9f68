"""Running a model so that it stays as it is, and only as far as an answer needs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from lens_probes.model.adapters import adapter_of


def device_type(model: Any) -> str:
    """The kind of device, as autocast wants it."""
    return next(model.parameters()).device.type


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast inside; everything as before afterwards, also after an error."""
    training = {module: module.training for _, module in adapter_of(model).modules()}
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.autocast(device_type=device_type(model), enabled=False):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


class _Reached(Exception):
    """Ends a forward pass where no more of it is needed."""


def run_until(
    model: Any,
    given: Tensor,
    names: Collection[str],
    *,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    gradients: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The named activations, by a pass that ends once all are there. `edits` replace activations on the way."""
    found: dict[str, Tensor] = {}
    wanted = set(names)

    def keep(name: str) -> Callable[..., None]:
        def hook_function(activation: Tensor, hook: Any) -> None:
            found[name] = activation
            if len(found) == len(wanted):
                raise _Reached

        return hook_function

    hooks = [*as_hooks(edits or {}), *((name, keep(name)) for name in wanted)]
    with undisturbed(model), torch.set_grad_enabled(gradients), suppress(_Reached):
        model.run_with_hooks(given, return_type=None, fwd_hooks=hooks, **options)
    return found


def as_hooks(edits: Mapping[str, Callable[[Tensor], Tensor]]) -> list[tuple[str, Callable[..., Tensor]]]:
    """Edits in the form that TransformerLens calls: a function of the activation and its hook."""

    def hook_function(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda activation, hook: edit(activation)

    return [(name, hook_function(edit)) for name, edit in edits.items()]
