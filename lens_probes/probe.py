"""The contract: what a probe and an experiment are, and how they are run.

prompts -> tokens -> batches -> activations -> Reading -> probe.measure -> merged result
"""

import abc
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypedDict, TypeVar, dataclass_transform, get_args

from torch import Tensor
from tqdm.auto import tqdm

from lens_probes.messages import amount, brief
from lens_probes.model import ModelView, StackView, differentiating, text_view, undisturbed
from lens_probes.reading import Cache, Reading, batches, cached, pad
from lens_probes.result import Provenance, Result, provenance, schema
from lens_probes.settings import Plain, check_settings, show_plain_fields, show_plain_types
from lens_probes.stopping import may_stop
from lens_probes.text.prompts import Prompts, Tokens, prompt_table, tokenize
from lens_probes.text.words import WordClasses

R = TypeVar("R", bound=Result)
X = TypeVar("X")
Y = TypeVar("Y")

Hooks = Sequence[str] | Mapping[str, str]
"""The activations that a probe reads by their TransformerLens names; or label -> name, the label naming the layer."""


def result_class(kind: type) -> Any:
    """The result that a probe or experiment says it returns, in the brackets behind its base."""
    return next(
        (
            argument
            for base in getattr(kind, "__orig_bases__", ())
            for argument in get_args(base)
            if isinstance(argument, type) and issubclass(argument, Result)
        ),
        None,
    )


NAMED = {Prompts: "Prompts", WordClasses | None: "WordClasses | None"}  # pyright: ignore[reportOperatorIssue]
"""Types that help() shows by name."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Asked(abc.ABC):  # noqa: B024  (its children have abstract methods)
    """A question about a model. Subclasses are frozen dataclasses; their fields are settings, checked on creation."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True, repr=False)(cls)
        show_plain_fields(cls)
        for name in ("run", "from_cache", "hook_names"):
            if inspect.isfunction(method := vars(cls).get(name)):
                setattr(cls, name, _OfOne(method))
        # The method card stands once, at the top of the file; help() of the class shows it.
        card, own = sys.modules[cls.__module__].__doc__ or "", inspect.cleandoc(cls.__doc__ or "")
        result = result_class(cls)
        if isinstance(result, type):
            if "layers" in vars(cls)["__dataclass_fields__"]:
                own += "\n\n`layers`: a list of layer numbers such as [0, -1], a slice, or None for all."
            cls.__doc__ = f"{card.strip()}\n\n{own}\n\nSee `{result.__name__}`."

    def __repr__(self) -> str:
        settings = ", ".join(f"{each.name}={_shown(getattr(self, each.name))}" for each in fields(self) if each.repr)  # pyright: ignore[reportArgumentType]
        return f"{type(self).__name__}({settings})"

    if not TYPE_CHECKING:  # a type checker would take the return type for that of the constructor

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """Settings are checked before anything else is done with them."""
            check_settings(cls, args, kwargs)
            return super().__new__(cls)


class _OfOne:
    """A method that asks a question. Called on the class, whose settings are not known yet, it says so by name."""

    def __init__(self, method: Callable[..., Any]) -> None:
        show_plain_types(method, method.__annotations__, NAMED)
        self.method = method
        functools.update_wrapper(self, method)  # pyright: ignore[reportArgumentType]

    def __get__(self, one: Any, kind: type) -> Callable[..., Any]:
        if one is not None:
            return self.method.__get__(one, kind)

        @functools.wraps(self.method)
        def refused(*given: Any, **named: Any) -> NoReturn:
            raise TypeError(
                f"{kind.__name__} must be made before it is asked; got the class: write "
                f"{kind.__name__}({_needed(kind)}).{self.method.__name__}(...)"
            )

        shown = inspect.signature(self.method)  # help() of the class shows its own result
        if shown.return_annotation == "R" and (result := result_class(kind)):
            shown = shown.replace(return_annotation=Plain(result.__name__))
        refused.__signature__ = shown  # pyright: ignore[reportAttributeAccessIssue]
        return refused


def _needed(kind: type) -> str:
    """The settings that must be given."""
    parameters = inspect.signature(kind).parameters.values()
    return ", ".join(each.name for each in parameters if each.default is each.empty)


def _shown(setting: Any) -> str:
    """A setting in a repr, which must be the same in every process: tensors by content, functions by name."""
    if isinstance(setting, Tensor):
        numbers = setting.detach().float().cpu().numpy().tobytes()
        return f"<content {hashlib.blake2b(numbers, digest_size=4).hexdigest()}>"
    if isinstance(setting, Mapping):
        return f"{{{', '.join(f'{key!r}: {_shown(value)}' for key, value in setting.items())}}}"
    if not inspect.isfunction(setting):
        return repr(setting)
    if setting.__name__ != "<lambda>":
        return setting.__qualname__
    code = setting.__code__  # the name of a lambda says nothing, so what it does must
    does = (code.co_code, code.co_names, [each for each in code.co_consts if not inspect.iscode(each)])
    return f"{setting.__qualname__} {hashlib.blake2b(repr(does).encode(), digest_size=4).hexdigest()}"


class Probe(Asked, Generic[R]):
    """A question asked of a model's activations.

    To write one: `hooks` names the activations, `measure` turns one batch into a result. The mathematics is a pure
    function beside the class. A probe over layers has `layers: Layers = None` (all) among its settings. One that reads
    states as logits sets `reads_head`, and calls `reading.check_head()`. One that is right on each stack of an
    encoder-decoder sets `reads_stacks`.
    """

    reads_head: ClassVar[bool] = False
    reads_stacks: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if callable(vars(cls).get("hooks")):
            setattr(cls, "hooks", _of_any_model(cls.hooks))  # noqa: B010  (the type stays that of the view)

    @abc.abstractmethod
    def hooks(self, model: ModelView) -> Hooks:
        """The activations it reads, by their TransformerLens names; none for a probe of weights and tokens.

        A mapping gives each a label, which `reading.layer` and the result's `layer` axis then have. It is written for
        the view of a model, and may be called with a model.
        """

    def hook_names(self, model: Any) -> list[str]:
        """The names of the activations it reads of a model, each once: for `model.run_with_cache(names_filter=...)`."""
        return names_of(self.hooks(model))

    @abc.abstractmethod
    def measure(self, reading: Reading) -> R:
        """One batch in, one result out. Gradients are off; nothing may be written."""

    def measure_after(self, reading: Reading, before: R) -> R:
        """The same, but what a merge would drop anyway, of `before` and this batch, may be left out at once.

        `before` is the result of some earlier batches of the same run.
        """
        return self.measure(reading)

    def result(self, reading: Reading, **values: Any) -> R:
        """The result of these quantities; labels that are known are filled in.

        Those are `layer` (where hooks are a mapping), `token`, `prompt`, `topic`, `head`, `kv_head`, and settings of
        this probe that the result has under the same name.
        """
        kind, model = result_class(type(self)), reading.model
        known: dict[str, Callable[[], Any]] = {
            "layer": lambda: reading.layer or _no_labels(type(self)),
            "token": lambda: reading.tokens,
            "prompt": lambda: prompt_table(reading.tokens),
            "topic": lambda: prompt_table(reading.tokens).topics,
            "head": lambda: tuple(f"H{head}" for head in range(model.n_heads)),
            "kv_head": lambda: tuple(f"KV{head}" for head in range(model.n_kv_heads)),
        }
        settings, declared = {each.name for each in fields(self)}, [each.name for each in fields(kind)]
        if unknown := set(values).difference(declared):
            raise TypeError(
                f"{kind.__name__} has the fields {', '.join(declared)}; got {min(unknown)!r}: declare it, or rename it"
            )
        for name, axes in schema(kind).axes.items():
            for axis in {"layer", "head", "kv_head"}.intersection(axes).difference(declared):
                raise TypeError(
                    f"{kind.__name__}.{name} [{' '.join(axes)}] must have labels for {axis!r}; got none: declare "
                    f"{axis}: tuple[str, ...]"
                )
        for name in (each for each in declared if each not in values):
            if name in settings:
                values[name] = getattr(self, name)
            elif name in known:
                values[name] = known[name]()
        return kind(**values)

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
        return run(
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
        view = _view([self], model)
        if isinstance(view, StackView):
            raise ValueError(
                f"from_cache reads models of one stack; got {view.name}: use run, which checks that the sources belong "
                f"to the targets"
            )
        names = hooks_of([self], view)
        reading = cached(
            view,
            names,
            prompts,
            cache,
            asked=brief(self),
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            word_class=word_class,
        )
        return _measured(self, reading)


def _of_any_model(hooks: Callable[[Any, ModelView], Hooks]) -> Callable[[Any, Any], Hooks]:
    @functools.wraps(hooks)
    def of_any(probe: Any, model: Any) -> Hooks:
        return hooks(probe, model if isinstance(model, ModelView) else _view([probe], model))

    return of_any


def _view(probes: Sequence[Probe[Any]], model: Any) -> ModelView:
    """The view of a model that all of these probes can read."""
    return text_view(model) if all(probe.reads_stacks for probe in probes) else ModelView(model)


def _no_labels(kind: type) -> NoReturn:
    raise ValueError(
        f"the layers of a {kind.__name__} must have labels; got a plain list of hooks: return label -> hook from "
        f"hooks, such as model.states(at, layers), or pass layer= to self.result"
    )


def run(
    probes: Sequence[Probe[Any]],
    model: Any,
    prompts: Prompts,
    *,
    prepend_bos: bool | None = None,
    word_class: WordClasses | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Any]:
    """Run several probes on one forward pass; returns their results in the order of the probes.

    `prompts`: a text, texts (a list, a generator, a column of a table), topic -> texts, `Prompt`s, or token ids.
    `prepend_bos` is about text (None: the model's default). `word_class` names the words of a text. `batch_size` is in
    prompts (None: about 512 tokens per batch); the numbers do not depend on it. `progress` shows a bar for several
    batches.

    For an encoder-decoder, such as T5, BART or Marian, prompts are sources. `Prompt(source, target=...)` gives the
    decoder a target; without one it is the model's own greedy output, see `greedy_targets`.

    >>> import lens_probes as lp
    >>> shift, update = lp.run([lp.RankShift(), lp.ResidualUpdate()], lp.tiny.bridge(), "Time flies like an arrow.")
    >>> shift.rank.shape == update.length.shape
    True
    """
    check_probes(probes)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be a number of prompts, 1 or more; got {batch_size}")
    view = _view(probes, model)
    names = hooks_of(probes, view)
    view, read = view.given(prompts, word_class)
    tokens = tokenize(read, view, prepend_bos=prepend_bos, word_class=word_class)
    of_run = batches(tokens, batch_size, view.sources)
    parts = [Parts() for _ in probes]
    with undisturbed(view.model):
        for batch in tqdm(of_run, desc="reading", unit="batch", disable=not progress or len(of_run) < 2):
            for done, part in zip(parts, measured_batch(probes, view, batch, names, parts), strict=True):
                done.add(part)
    return [done.merged() for done in parts]


class Parts:
    """Results that are merged in a fixed binary tree while they come: few are held, and none is copied often."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Result]] = []  # with their numbers of parts, which fall

    @property
    def first(self) -> Result | None:
        """The first of them, merged as far as they are, or None before there is one."""
        return self._parts[0][1] if self._parts else None

    def add(self, result: Result) -> None:
        """The next one."""
        size = 1
        while self._parts and self._parts[-1][0] == size:
            size, result = 2 * size, Result.merge([self._parts.pop()[1], result])
        self._parts.append((size, result))

    def merged(self) -> Result:
        """All of them in one."""
        *others, (_, result) = self._parts
        for _, part in reversed(others):
            result = Result.merge([part, result])
        return result


def measured_batch(
    probes: Sequence[Probe[Any]], view: ModelView, batch: Tokens, names: Sequence[str], before: Sequence[Parts]
) -> list[Result]:
    """The result of each probe on one batch, from one forward pass; `names` are the hooks of all of them.

    `before`: what each has measured until now.
    """
    may_stop("forward pass")
    reading = _read(view.of_batch(batch), batch, names, reads_head=any(probe.reads_head for probe in probes))
    results = []
    for probe, own in zip(probes, before, strict=True):
        may_stop(type(probe).__name__)
        results.append(_measured(probe, reading, own.first))
    return results


def _read(view: ModelView, batch: Tokens, names: Sequence[str], *, reads_head: bool) -> Reading:
    """One forward pass."""
    ids, mask = pad(batch, view)
    if not reads_head:
        return Reading(view, batch, view.activations(ids, mask, names), mask)
    found, logits = view.activations_and_logits(ids, mask, names)
    return Reading(view, batch, found, mask, _logits=logits)


show_plain_types(run, run.__annotations__, NAMED)


def check_probes(probes: Any) -> None:
    """Raise unless these are a list of probes that are made."""
    if hasattr(probes, "measure"):
        raise TypeError(f"probes must be a list; got one probe, {brief(probes)}: write run([probe], model, prompts)")
    if not isinstance(probes, Sequence) or isinstance(probes, str):
        raise TypeError(
            f"probes must be a list and come first; got {brief(probes)}: write run([probe], model, prompts)"
        )
    if not probes:
        raise ValueError("probes must be one or more; got none: pass a list such as [lens_probes.RankShift()]")
    for probe in probes:
        if isinstance(probe, type):
            raise TypeError(f"a probe must be made before it is run; got its class: write {probe.__name__}()")
        if not hasattr(probe, "measure"):  # a model has hooks too
            raise TypeError(
                f"probes must be a list of probes; got {brief(probe)}: write run([probe], model, prompts), or "
                f"experiment.run(model, prompts) for an experiment such as TunedLens"
            )


def hooks_of(probes: Sequence[Probe[Any]], view: ModelView) -> list[str]:
    """The hooks of all probes, each once, all of them known to the model."""
    names = list(dict.fromkeys(name for probe in probes for name in names_of(probe.hooks(view))))
    view.check_hooks(names)
    return names


def names_of(hooks: Hooks) -> list[str]:
    """The names of the activations, without their labels."""
    return list(dict.fromkeys(hooks.values() if isinstance(hooks, Mapping) else hooks))


def _measured(probe: Probe[Any], reading: Reading, before: Result | None = None) -> Any:
    """A probe's result on one batch, with its provenance, numbers of prompts local to the batch."""
    view, hooks = reading.model, probe.hooks(reading.model)
    first = int(reading.tokens.prompt[0])
    tokens = replace(reading.tokens, prompt=reading.tokens.prompt - first)
    points = hooks if isinstance(hooks, Mapping) else {}
    with undisturbed(view.model):
        own = replace(reading, tokens=tokens, points=points)
        result = probe.measure(own) if before is None else probe.measure_after(own, before)
    names = names_of(hooks)
    dtype = reading.dtype(names[0]) if names else view.W_E.dtype  # cfg.dtype says float32 for a bfloat16 model
    return replace(result, provenance=provenance(probe, view, dtype, names, tokens))


class Experiment(Asked, Generic[R]):
    """What fits, searches, intervenes or differentiates: no hooks, no cache, no merging by batch promised.

    Its result has the same tables, files and figures, and the model is as before. It runs the same whatever inference
    mode, gradient mode or autocast the caller is in.
    """

    def __init_subclass__(cls) -> None:
        if "run" in vars(cls):
            cls.run = _by_itself(cls.run)
        super().__init_subclass__()

    @abc.abstractmethod
    def run(self, model: Any, prompts: Any, *, progress: bool = True) -> R:
        """Run it on a model and return its result."""


def _by_itself(run: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(run)
    def alone(experiment: Any, model: Any, *args: Any, **kwargs: Any) -> R:
        with differentiating(model):
            return run(experiment, model, *args, **kwargs)

    return alone


class Options(TypedDict, total=False):
    """The options of a run on text; see `lens_probes.run`."""

    prepend_bos: bool | None
    word_class: WordClasses | None
    progress: bool


class TextExperiment(Experiment[R]):
    """An experiment on a model of text. To write one: `perform` turns a `Study` into a result."""

    @abc.abstractmethod
    def perform(self, study: "Study") -> R:
        """Do it, on the tokens of the study."""

    def run(
        self,
        model: Any,
        prompts: Prompts,
        *,
        prepend_bos: bool | None = None,
        word_class: WordClasses | None = None,
        progress: bool = True,
    ) -> R:
        """Do it on these prompts; they, `prepend_bos` and `word_class` are as in `lens_probes.run`."""
        options: Options = {"prepend_bos": prepend_bos, "word_class": word_class, "progress": progress}
        return self.perform(Study.of(self, model, prompts, **options))


@dataclass(frozen=True, eq=False)
class Study:
    """What an experiment is given: a view of the model, the table of tokens, and how to go through its work."""

    asked: Experiment[Any]
    view: ModelView
    tokens: Tokens
    progress: bool

    @classmethod
    def of(
        cls,
        asked: Experiment[Any],
        model: Any,
        prompts: Prompts,
        *,
        prepend_bos: bool | None = None,
        word_class: WordClasses | None = None,
        progress: bool = True,
    ) -> "Study":
        """The model's own tokens of these prompts."""
        view = ModelView(model)
        return cls(asked, view, tokenize(prompts, view, prepend_bos=prepend_bos, word_class=word_class), progress)

    def each(self, do: Callable[[X], Y], items: Iterable[X], *, doing: str, unit: str, least: int = 1) -> list[Y]:
        """What comes of each item, in order, with a bar; see `each_of`."""
        return each_of(do, items, doing=doing, unit=unit, progress=self.progress, least=least)

    def by_prompt(self, do: Callable[[Tokens], R], *, doing: str) -> R:
        """The results of single prompts, merged; after an interrupt, of those that are done."""
        prompts = [replace(own, prompt=own.prompt - number) for number, own in self.tokens.by_prompt()]
        parts = self.each(do, prompts, doing=doing, unit="prompt")
        return type(parts[0]).merge(parts)

    def provenance(self, hooks: Sequence[str], tokens: Tokens | None = None) -> Provenance:
        """Of a result that read these activations, of all tokens unless others are given."""
        return provenance(self.asked, self.view, self.view.W_E.dtype, hooks, self.tokens if tokens is None else tokens)


def each_of(
    do: Callable[[X], Y], items: Iterable[X], *, doing: str, unit: str, progress: bool = True, least: int = 1
) -> list[Y]:
    """What comes of each item, in order. Interrupted, it gives those that are done, unless they are fewer than `least`.

    >>> each_of(lambda n: n + 1, [1, 2], doing="adding", unit="number", progress=False)
    [2, 3]
    """
    items, done = list(items), []
    try:
        for item in tqdm(items, desc=doing, unit=unit, disable=not progress or len(items) < 2):
            done.append(do(item))
    except KeyboardInterrupt:
        if len(done) < least:
            raise
        tqdm.write(f"interrupted after {len(done)} of {amount(len(items), unit)}")
    return done
