"""Forward passes that leave the model as it was: activations, logits, and what follows from other embeddings."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes.model.adapters import adapter_of
from lens_probes.model.base import View
from lens_probes.model.hooks import HEADS_FIRST, LATENT, SWITCHES
from lens_probes.stopping import may_stop

FEW = 8  # tokens whose logits are compared with those that we read: they show a head that is read wrongly

Edit = Callable[[Tensor], Tensor]
"""A function of an activation that returns its replacement."""


_EVALUATED: ContextVar[frozenset[int]] = ContextVar("evaluated", default=frozenset())  # models, by id


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    """Evaluation mode inside; restores each module's own, also after an error. Modules are walked once when nested."""
    if id(model) in _EVALUATED.get():
        yield
        return
    training = [module for _, module in adapter_of(model).modules() if module.training]
    token = _EVALUATED.set(_EVALUATED.get() | {id(model)})
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        _EVALUATED.reset(token)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast inside; restores everything, also after an error."""
    with _evaluated(model), torch.no_grad(), torch.autocast(device_type=_device_type(model), enabled=False):
        yield


@contextmanager
def differentiating(model: Any) -> Iterator[None]:
    """Gradients, no inference mode and no autocast inside, regardless of the caller's mode."""
    model = model.model if isinstance(model, View) else model
    device = _device_type(model) if isinstance(model, torch.nn.Module) else "cpu"  # others are refused further on
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type=device, enabled=False):
        yield


def _device_type(model: Any) -> str:
    return next(model.parameters()).device.type


class _Reached(Exception):
    """Ends a forward pass where no more of it is needed."""


def run_until(
    model: Any,
    given: Tensor,
    names: Collection[str],
    edits: Mapping[str, Edit] | None = None,
    gradients: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The named activations, by a pass that ends once all are there."""
    found: dict[str, Tensor] = {}
    wanted = len(set(names))

    def stop() -> None:
        if len(found) == wanted:
            raise _Reached

    hooks = [*_as_hooks(edits or {}), *_keeping(names, found, stop)]
    with undisturbed(model), torch.set_grad_enabled(gradients), suppress(_Reached):
        model.run_with_hooks(given, return_type=None, fwd_hooks=hooks, **options)
    return found


def _keeping(
    names: Iterable[str], found: dict[str, Tensor], then: Callable[[], None] = lambda: None
) -> list[tuple[str, Callable[..., None]]]:
    """Hooks that keep these activations by name, and call `then` after each."""

    def hook_function(name: str) -> Callable[..., None]:
        def keep(activation: Any, hook: Any) -> None:
            may_stop()
            found[name] = activation[0] if isinstance(activation, tuple) else activation
            then()

        return keep

    return [(name, hook_function(name)) for name in dict.fromkeys(names)]


def _as_hooks(edits: Mapping[str, Edit]) -> list[tuple[str, Callable[..., Any]]]:
    """Edits as TransformerLens calls them, with the activation and its hook."""

    def hook_function(edit: Edit) -> Callable[..., Any]:
        def replace(activation: Any, hook: Any) -> Any:
            if isinstance(activation, tuple):  # the block of some models returns its state and more
                return (edit(activation[0]), *activation[1:])
            return edit(activation)

        return replace

    return [(name, hook_function(edit)) for name, edit in edits.items()]


class Passes(View):
    """Forward passes of a model of text."""

    def activations(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The named activations of one padded batch, by a pass that ends once all are there."""
        if not names:
            return {}
        self.check_hooks(names)
        with self._switched_on():
            given, options = self._inputs(ids, mask)
            found = run_until(self.model, given, names, **options, **self.adapter.options(names))
        return self._named(names, found)

    def activations_and_logits(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "few vocab"]]:
        """The named activations, and the model's own logits of the first few tokens, from one pass."""
        found: dict[str, Tensor] = {}
        given, options = self._inputs(ids, mask)
        hooks, options = _keeping(names, found), {**options, **self.adapter.options(names)}
        with undisturbed(self.model), self._switched_on():
            logits = self.model.run_with_hooks(given, return_type="logits", fwd_hooks=hooks, **options)
        prompt, position = mask.nonzero()[:FEW].T.to(logits.device)
        return self._named(names, found), logits[prompt, position].float()

    def _inputs(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"]
    ) -> tuple[Int[Tensor, "prompt any"], dict[str, Any]]:
        """What the model is called with for these tokens, and the options that belong to it."""
        return ids.to(self.device), {"attention_mask": mask.to(self.device, torch.int64)}

    @contextmanager
    def _switched_on(self) -> Iterator[None]:
        """TransformerLens refuses a hook that is switched off with an error of its own, on each class another."""
        try:
            yield
        except (AssertionError, ValueError) as error:
            if off := re.match("Cannot add hook (\\S+)", str(error)):
                raise self._not_computed(off[1]) from error
            raise

    def _not_computed(self, name: str) -> ValueError:
        ways = (way for end, way in SWITCHES.items() if name.endswith(end))
        todo = next(ways, "use another read point, or another model")
        return ValueError(f"activation {name!r} must be computed by {self.name}; got none: {todo}")

    def _named(self, names: Sequence[str], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The activations in the order of their names; raises unless all of them were computed."""
        for name in names:
            if found.get(name) is None:
                raise self._not_computed(name)
        return {name: self.by_head(name, found[name]) for name in names}

    def by_head(self, name: str, activation: Tensor) -> Tensor:
        """An activation; those of heads as [prompt position head d] in latent attention too.

        There, a Bridge has queries, keys and values as [prompt head position d], and splits the outputs of heads by a
        width that need not be theirs.
        """
        if not self._is_latent(name):
            return activation
        if name.endswith(HEADS_FIRST):
            return activation.transpose(1, 2)
        return activation.reshape(*activation.shape[:2], int(self.model.cfg.n_heads), -1)

    def _is_latent(self, name: str) -> bool:
        """Whether an activation is one of those that latent attention has in another form."""
        where, _, _ = name.rpartition(".")
        return name.endswith((*HEADS_FIRST, ".hook_z")) and f"{where}.{LATENT}" in self.hook_names

    def _in_their_form(self, edits: Mapping[str, Edit]) -> dict[str, Edit]:
        """Edits of activations as `by_head` gives them, as edits of those that the model has."""

        def in_its_form(name: str, edit: Edit) -> Edit:
            def edited(own: Tensor) -> Tensor:
                changed = edit(self.by_head(name, own))
                return changed.transpose(1, 2) if name.endswith(HEADS_FIRST) else changed.reshape(own.shape)

            return edited if self._is_latent(name) else edit

        return {name: in_its_form(name, edit) for name, edit in edits.items()}

    def edited(
        self,
        ids: Int[Tensor, "prompt position"],
        mask: Bool[Tensor, "prompt position"],
        names: Sequence[str],
        edits: Mapping[str, Edit],
    ) -> dict[str, Tensor]:
        """The named activations of one padded batch, those that are edited as they are after the edit."""
        self.check_hooks([*names, *edits])
        given, options = self._inputs(ids, mask)
        with self._switched_on():
            found = run_until(
                self.model, given, names, self._in_their_form(edits), **options, **self.adapter.options(names)
            )
        return self._named(names, found)

    def logits(
        self,
        ids: Int[Tensor, "prompt position"],
        mask: Bool[Tensor, "prompt position"],
        edits: Mapping[str, Edit] | None = None,
    ) -> Float[Tensor, "prompt position vocab"]:
        """The model's own logits of a padded batch, with some activations replaced on the way."""
        edits = self._in_their_form(edits or {})
        self.check_hooks(edits)
        given, options = self._inputs(ids, mask)
        with undisturbed(self.model):
            return self.model.run_with_hooks(given, return_type="logits", fwd_hooks=_as_hooks(edits), **options)

    def run_until(self, ids: Int[Tensor, "prompt position"], names: Sequence[str], **how: Any) -> dict[str, Tensor]:
        """The named activations of unpadded prompts, by a pass that ends once all are there."""
        self.check_hooks(names)
        ids = ids.to(self.device)
        # Without a mask, tokens that are the padding token are taken for padding.
        return run_until(self.model, ids, names, attention_mask=torch.ones_like(ids), **how)

    # Embeddings, as a pass has them

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The embedding, one row per token id (on Gemma without the factor sqrt(d_model) on a Bridge)."""
        return self.model.W_E.detach()

    @property
    def d_vocab(self) -> int:
        """Number of rows of the embedding."""
        return int(self.W_E.shape[0])

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
        *,
        masked: bool = True,
        gradients: bool = True,
    ) -> list[Tensor]:
        """Activations of tokens that have these embeddings; the model adds positions. Gradients flow to them.

        `ids` are the tokens in whose places they stand: RoBERTa gives positions to those that are no padding.
        `masked=False`: every token attends to every other, later ones too (see `check_unmasked`).
        """
        edits = {
            self.hook_token_embed: lambda given: embeddings.to(given).contiguous()
        }  # HookedTransformer asks for it
        if masked:
            found = self.run_until(ids, names, edits=edits, gradients=gradients)
        else:
            with self.adapter.unmasked(embeddings.to(self.device, self.W_E.dtype)) as options:
                found = run_until(self.model, ids.to(self.device), names, edits, gradients, **options)
        known = self._named(names, found)
        return [known[name] for name in names]

    def check_unmasked(self) -> None:
        """Raise unless `from_embeddings(masked=False)` lets the state of a first token depend on a second one."""
        hook, ids = self.hook("resid_post", 0), torch.zeros(2, 2, dtype=torch.int64)
        pairs = self.token_embeddings[torch.tensor([[0, 0], [0, 1]], device=self.device)]
        try:
            (states,) = self.from_embeddings(pairs, ids, [hook], masked=False, gradients=False)
        except (TypeError, ValueError, RuntimeError):  # takes no mask with one row per query
            states = torch.zeros(2, 2, 1)
        if torch.equal(states[0, 0], states[1, 0]):
            raise ValueError(
                f"a model without its mask must let tokens attend to later ones; got {self.name} ({self.class_name}), "
                f"which masks in a way of its own: leave masked=True, or use another model"
            )
