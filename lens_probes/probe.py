"""What a probe is, and what an experiment is."""

import abc
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

from lens_probes.model import ModelView, differentiating
from lens_probes.reading import Cache, Reading
from lens_probes.reading import from_cache as _from_cache
from lens_probes.reading import run as _run
from lens_probes.result import Result
from lens_probes.text.prompts import Prompts
from lens_probes.text.words import WordClasses

R = TypeVar("R", bound=Result)


def _with_card(kind: type) -> None:
    """The method card stands once, at the top of the file; help() of the class shows it, and where its result is."""
    card = sys.modules[kind.__module__].__doc__ or ""
    kind.__doc__ = (
        f"{card.strip()}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\nIts result: help of {kind.__name__}Result."
    )


def _by_itself(run: Callable[..., R]) -> Callable[..., R]:
    """The same whatever inference mode, gradient mode or autocast the caller is in."""

    @functools.wraps(run)
    def alone(experiment: Any, model: Any, *args: Any, **kwargs: Any) -> R:
        with differentiating(model):
            return run(experiment, model, *args, **kwargs)

    return alone


class Probe(abc.ABC, Generic[R]):
    """A question asked of a model's activations. Every probe is a final frozen dataclass; its fields are its settings.

    To write one: `hooks` names the activations, `measure` turns one batch into a result. The mathematics is a pure
    function beside the class. A probe over layers has `layers=None` (all) among its settings.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _with_card(cls)

    @abc.abstractmethod
    def hooks(self, model: ModelView) -> list[str]:
        """The activations it reads, by their TransformerLens names; none for a probe of weights and tokens."""

    @abc.abstractmethod
    def measure(self, reading: Reading) -> R:
        """One batch in, one result out. Gradients are off; nothing may be written."""

    def run(
        self,
        model: Any,
        prompts: Prompts,
        *,
        prepend_bos: bool | None = None,
        word_class: WordClasses | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> R:
        """Ask the question of a HookedTransformer or TransformerBridge; arguments as in `lens_probes.run`."""
        return _run(
            [self],
            model,
            prompts,
            prepend_bos=prepend_bos,
            word_class=word_class,
            batch_size=batch_size,
            progress=progress,
        )[0]

    def from_cache(
        self,
        model: Any,
        prompts: Prompts,
        cache: Cache,
        *,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        word_class: WordClasses | None = None,
    ) -> R:
        """Ask it of activations the user already has, from `model.run_with_cache` on the same prompts.

        `cache`: the second of the pair that `run_with_cache` returns, or a dict of tensors by name. A matrix of ids
        counts as unpadded unless `attention_mask` says which entries are tokens; texts count as padded on the
        tokenizer's side.

        Where the cache holds the token embeddings (`hook_embed`; `embed.hook_out` of an encoder), they must be those
        that this model gives these prompts, or an error is raised; leave embeddings that you edited out of the cache.
        Without them nothing can be checked: the cache of other prompts of the same shape, or of another model of the
        same size, gives a wrong result without an error. Models that share their embeddings cannot be told apart.
        """
        return _from_cache(
            self,
            model,
            prompts,
            cache,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            word_class=word_class,
        )


class Experiment(abc.ABC, Generic[R]):
    """What fits, searches, intervenes or differentiates: no hooks, no cache, no merging by batch promised.

    Also a final frozen dataclass; its result has the same tables, files and figures, and the model is as before.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _with_card(cls)
        cls.run = _by_itself(cls.run)

    @abc.abstractmethod
    def run(self, model: Any, prompts: Prompts, *, progress: bool = True) -> R:
        """Do it, and return what came out."""
