"""Provenance: which probe read which model, and with which versions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from lens_probes.messages import amount
from lens_probes.text.prompts import Tokens


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Which probe read which model, how the weights and numbers stood, and with which versions."""

    probe: str = ""
    model: str = ""
    model_class: str = ""
    processed: bool = False
    dtype: str = ""
    hooks: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    n_prompts: int = 0
    n_tokens: int = 0

    @property
    def read(self) -> str:
        """The activation that was read last, in the order of `hooks`."""
        return self.hooks[-1] if self.hooks else "an activation not named"

    def describe(self) -> str:
        """Model, state of its weights, precision and numbers, for the second line of a title."""
        weights = "processed" if self.processed else "raw"
        numbers = f", {amount(self.n_prompts, 'prompt')}, {amount(self.n_tokens, 'token')}" if self.n_prompts else ""
        return f"{self.model} ({weights} weights, {self.dtype}){numbers}"


def provenance(
    asked: object, view: Any, dtype: torch.dtype, hooks: Sequence[str] = (), tokens: Tokens | None = None
) -> Provenance:
    """Who asked, of which model (a view of it), in which precision, what was read, and of how much text."""
    return Provenance(
        probe=asked if isinstance(asked, str) else repr(asked),
        model=view.name,
        model_class=view.class_name,
        processed=view.processed,
        dtype=str(dtype).removeprefix("torch."),
        hooks=tuple(hooks),
        versions=view.versions,
        n_prompts=0 if tokens is None else len(tokens.prompt.unique()),
        n_tokens=0 if tokens is None else len(tokens),
    )


def merged_provenance(parts: Sequence[Provenance]) -> Provenance:
    """That of results laid together, which must be of one run but for the text."""
    one, *others = [dataclasses.replace(part, n_prompts=0, n_tokens=0) for part in parts]
    differ = [
        field.name
        for field in dataclasses.fields(Provenance)
        if any(getattr(one, field.name) != getattr(other, field.name) for other in others)
    ]
    if differ:
        raise ValueError(f"results of different runs cannot be merged: they differ in {', '.join(differ)}")
    return dataclasses.replace(
        one, n_prompts=sum(part.n_prompts for part in parts), n_tokens=sum(part.n_tokens for part in parts)
    )
