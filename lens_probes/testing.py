"""check_probe and check_experiment: the contract of every probe and experiment, checked by one call in a test.

    def test_my_probe_keeps_the_contract():
        check_probe(MyProbe())

Each promise is one function below. A broken one raises an AssertionError that names the promise and the model. Numbers
are equal if floats agree to 1e-4 of the largest and at most 2 % of whole numbers (ranks, ids) differ: float32 rounding
decides near ties, and it depends on the shape of a batch.
"""

import dataclasses
import hashlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import plotly.graph_objects as go
import torch
from torch import Tensor

import lens_probes
from lens_probes.examples import tiny
from lens_probes.messages import brief
from lens_probes.model import ImageView, ModelView, StackView, undisturbed, view_of
from lens_probes.model.passes import run_until
from lens_probes.pages import packed
from lens_probes.probe import Experiment, Hooks, Probe, names_of
from lens_probes.reading import Reading, pad
from lens_probes.result import Result, schema
from lens_probes.text.prompts import Prompt, Prompts, Table, tokenize

PROMPTS = (
    "Time flies like an arrow.",
    "Fruit flies like a banana, and the cat likes none of it.",
    "The old man the boat.",
)
TOPICS = {
    "animals": ["The cat sat on the mat.", "A dog ran home.", "Birds sing at dawn, they say.", "The horse slept."],
    "food": ["The bread rose in the oven.", "A soup boiled over.", "She ate cake.", "Salt the water before it boils."],
    "law": ["The judge left.", "A contract binds both sides.", "They sued the bank again.", "He pleaded guilty."],
}
SHARE_OF_INTEGERS = 0.02
TOLERANCE = 1e-4


def check_probe(probe: Probe[Any], models: Sequence[Any] | None = None) -> None:
    """Check the contract of a probe on some models (by default tiny ones of several architectures).

    A default model that the probe refuses is skipped. It must accept at least one.

    >>> import lens_probes as lp
    >>> check_probe(lp.ResidualUpdate(), models=[lp.tiny.bridge()])
    """
    check_declaration(probe)
    chosen = list(_default_models()) if models is None else list(models)
    refusals = [_refusal(probe, model) if models is None else "" for model in chosen]
    accepted = [model for model, refusal in zip(chosen, refusals, strict=True) if not refusal]
    assert accepted, (
        f"{brief(probe)} must accept at least one default model; it refused all "
        f"({'; '.join(dict.fromkeys(refusals))}): pass models=[...] that it reads"
    )
    for model in accepted:
        for check in PROMISES:
            with _told(f"{check.__name__} of {probe!r} on {view_of(model).name}"):
                check(probe, model)
    if models is None:
        with _told(f"check_model_classes_agree of {probe!r}"):
            check_model_classes_agree(probe)


def check_experiment(experiment: Experiment[Any], model: Any = None, prompts: Prompts = PROMPTS) -> None:
    """Check the contract of an experiment: declaration, result, seeding, and that the model is unchanged.

    For a model of images, `prompts` are images.
    """
    check_declaration(experiment)
    model = tiny.bridge() if model is None else model
    with _told(f"check_experiment of {experiment!r} on {view_of(model).name}"):
        with _unchanged(model):
            first = experiment.run(model, prompts, progress=False)
            device = next(model.parameters()).device.type
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                second = experiment.run(model, prompts, progress=False)
        assert_same(first, second, "a second run, in inference mode and autocast (is everything random seeded?)")
        check_result(first)


# The promises of a probe


def check_declaration(asked: Probe[Any] | Experiment[Any]) -> None:
    """A frozen dataclass whose repr recreates it; a module docstring with an equation and a source."""
    kind = type(asked)
    assert not kind.__subclasses__(), f"{kind.__name__} must have no subclasses: add a field or wrap it"
    assert repr(asked).startswith(f"{kind.__name__}("), f"repr must be the call that makes it; got {asked!r}"
    if "content " not in repr(asked):  # a result as a setting prints as its name and content hash
        settings = [each for value in vars(asked).values() for each in _parts(value)]
        functions = {each.__qualname__: each for each in settings if inspect.isfunction(each)}  # which print by name
        again = eval(repr(asked), {**vars(lens_probes), kind.__name__: kind, **functions})
        assert repr(again) == repr(asked), f"repr must recreate it; {asked!r} makes {again!r}"
    text = sys.modules[kind.__module__].__doc__ or ""
    equation, source = r"^ {4,}\S.*=", r"arxiv|doi\.|https?://|github\.com|\bsource\b"
    assert re.search(equation, text, re.MULTILINE), f"the docstring of {kind.__module__} must have an indented equation"
    assert re.search(source, text, re.IGNORECASE), f"the docstring of {kind.__module__} must name a source"


def _parts(setting: Any) -> list[Any]:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def check_batches(probe: Probe[Any], model: Any) -> None:
    """The result does not depend on the size of batches, hence not on padding."""
    whole = _run(probe, model, PROMPTS)
    for batch_size in (1, 2):
        assert_same(whole, _run(probe, model, PROMPTS, batch_size=batch_size), f"batches of {batch_size}")


def check_order(probe: Probe[Any], model: Any) -> None:
    """Reordering prompts renumbers them and changes nothing else."""
    whole, reverse = _run(probe, model, PROMPTS), _run(probe, model, PROMPTS[::-1])
    assert_same(whole, _with_prompts_reversed(reverse), "the prompts in reverse")


def check_from_cache(probe: Probe[Any], model: Any) -> None:
    """`from_cache` on the same activations equals `run`, with and without padding. Encoder-decoders have none."""
    if isinstance(view_of(model), StackView):
        return
    view = ModelView(model)
    for prompts in (PROMPTS[:1], PROMPTS):
        ids, mask = pad(tokenize(list(prompts), view), view)
        names, given = names_of(probe.hooks(view)), {"attention_mask": mask.to(view.device, torch.int64)}
        cache = run_until(view.model, ids.to(view.device), names, **given, **view.adapter.options(names))
        whole = _run(probe, model, prompts)
        assert_same(whole, probe.from_cache(model, list(prompts), cache), "from_cache with texts")
        ids_only = probe.from_cache(model, ids, cache, attention_mask=mask)
        assert_same(whole, ids_only, "from_cache with ids and a mask")


def check_merge(probe: Probe[Any], model: Any) -> None:
    """`merge` is associative, and equals one run over all prompts."""
    a, b, c = (_run(probe, model, [prompt]) for prompt in PROMPTS)
    whole = _run(probe, model, PROMPTS)
    assert_same(whole, Result.merge([a, b, c]), "merge of one prompt each")
    assert_same(whole, Result.merge([Result.merge([a, b]), c]), "merge from the left")
    assert_same(whole, Result.merge([a, Result.merge([b, c])]), "merge from the right")


def check_measured(probe: Probe[Any], model: Any) -> None:
    """The result is finite and in range, has its provenance, draws its figure, and can be saved and loaded."""
    result = _run(probe, model, PROMPTS)
    provenance = result.provenance
    assert provenance.n_prompts == len(PROMPTS) and provenance.probe == repr(probe), f"provenance says {provenance}"
    check_result(result)


def check_model_untouched(probe: Probe[Any], model: Any) -> None:
    """Parameters, gradients, modes, hooks and settings of the model are unchanged, also after an error."""
    with _unchanged(model):
        _run(probe, model, PROMPTS)
    with _unchanged(model):
        try:
            _run(_Failing(probe), model, PROMPTS)
        except _Deliberate:
            return
        raise AssertionError("an error in measure did not reach the caller")


PROMISES: tuple[Callable[[Probe[Any], Any], None], ...] = (
    check_model_untouched,  # first: a permanent change would not show in a later run
    check_batches,
    check_order,
    check_from_cache,
    check_merge,
    check_measured,
)


def check_model_classes_agree(probe: Probe[Any]) -> None:
    """On TransformerLens 3.x, HookedTransformer and TransformerBridge give the same numbers, raw and processed."""
    for architecture in ("gpt2", "llama"):
        for processed in (False, True):
            try:
                hooked = tiny.hooked(architecture, processed=processed)
            except ImportError:
                return  # TransformerLens 4 has one class
            bridge = tiny.bridge(architecture, processed=processed)
            if not _refusal(probe, hooked) and not _refusal(probe, bridge):
                other = f"a TransformerBridge of {architecture}, {'processed' if processed else 'raw'}"
                assert_same(_run(probe, hooked, PROMPTS), _run(probe, bridge, PROMPTS), other)


# The promises of a result


def check_values(result: Result) -> None:
    """Every tensor is finite and in its declared range."""
    for name in schema(type(result)).axes:
        tensor, quantity = getattr(result, name), result.quantity(name)
        assert quantity.says != name, (
            f"field {name!r} must have a description that is not its name: declare it with measured(...) or summed(...)"
        )
        if tensor is not None:
            assert not torch.isinf(tensor).any(), f"{name!r} must be finite; it contains Inf"
            known = torch.from_numpy(result.known(name)).flatten()
            known = known[~known.isnan()]
            assert ((known >= quantity.low - TOLERANCE) & (known <= quantity.high + TOLERANCE)).all(), (
                f"{name!r} must be {quantity.low} to {quantity.high}, its declared range; got {known.min():g} to "
                f"{known.max():g}"
            )


def check_result(result: Result) -> None:
    """Finite and in its declared range; figure, table and file need only what is stored."""
    check_values(result)
    with mock.patch("torch.nn.Module.__call__", side_effect=AssertionError("figure() ran a module")):
        drawn = result.figure()
    assert isinstance(drawn, go.Figure), f"figure() gave a {type(drawn).__name__}"
    assert len(result.to_frame()), "to_frame() is empty"
    data = packed(result)
    assert json.loads(json.dumps(data, allow_nan=False)) == data, "a page of it is no JSON"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        result.save(path)
        loaded = type(result).load(path)
    assert_same(result, loaded, "its own file", tolerance=0.0)
    assert loaded.provenance == result.provenance, "the provenance was not kept in the file"
    assert loaded.figure().to_json() == drawn.to_json(), "a loaded result draws another figure"


def assert_same(
    one: Result,
    other: Result,
    what: str,
    *,
    tolerance: float = TOLERANCE,
    integers: float = SHARE_OF_INTEGERS,
) -> None:
    """Two results have the same labels and numbers, up to rounding; provenance is ignored.

    `integers`: the share of whole numbers that may differ; none where `tolerance` is 0.
    """
    assert type(one) is type(other), f"{type(one).__name__} against {type(other).__name__}"
    for name in (field.name for field in dataclasses.fields(one) if field.name != "provenance"):
        _assert_same_value(
            f"{type(one).__name__}.{name} differs from that of {what}",
            getattr(one, name),
            getattr(other, name),
            tolerance,
            integers,
        )


def _assert_same_value(message: str, one: Any, other: Any, tolerance: float, integers: float) -> None:
    if isinstance(one, Table):
        for name, column in one.columns().items():
            _assert_same_value(f"{message} in column {name!r}", column, other.columns()[name], 0.0, integers)
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype, f"{message}: {one.shape} and {other.shape}"
        if one.is_floating_point():
            scale = max(1.0, float(one.nan_to_num().abs().max())) if one.numel() else 1.0
            apart = int((one.isnan() != other.isnan()).sum())
            assert not apart, f"{message}: {apart} values are missing in one and not in the other"
            assert torch.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True), (
                f"{message}: by up to {(one - other).nan_to_num().abs().max():g}"
            )
        elif one.numel():
            share = float((one != other).double().mean())
            assert share <= (integers if tolerance else 0.0), f"{message}: in {share:.1%} of its entries"
    else:
        assert one == other, f"{message}: {one!r} and {other!r}"


# The kit's own parts


def _default_models() -> Iterator[Any]:
    yield tiny.bridge("gpt2")
    yield tiny.bridge("gpt2", processed=True)
    yield tiny.bridge("llama", padding_side="left")
    yield tiny.bridge("bert")


def _refusal(probe: Probe[Any], model: Any) -> str:
    """The error with which a probe refuses a model; "" if it accepts it."""
    try:
        names_of(probe.hooks(model))
    except (ValueError, TypeError) as error:
        return str(error) or type(error).__name__
    return ""


def _run(probe: Probe[Any], model: Any, prompts: Sequence[str], batch_size: int = len(PROMPTS)) -> Any:
    given: Any = list(prompts)
    if isinstance(view_of(model), StackView):  # in the model's own words a target takes a pass per token
        given = [Prompt(prompt, target=prompt[4:]) for prompt in prompts]
    return probe.run(model, given, batch_size=batch_size, progress=False)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Adds to errors a note that names the promise and the model."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {what}")
        raise


def _with_prompts_reversed(result: Result) -> Result:
    """The result as if its prompts had been given in reverse order."""
    n = result.provenance.n_prompts
    changed: dict[str, Any] = {}
    order: dict[str, Tensor] = {}
    for name in schema(type(result)).tables:
        table = getattr(result, name)
        if "prompt" in table.columns():
            number = n - 1 - table.columns()["prompt"]
            order[name] = number.argsort(stable=True)
            changed[name] = dataclasses.replace(table, prompt=number)[order[name]]
    for name, dims in schema(type(result)).axes.items():
        tensor = getattr(result, name)
        for dim, axis in enumerate(dims):
            if axis in order and tensor is not None:
                changed[name] = tensor = tensor.index_select(dim, order[axis])
    return dataclasses.replace(result, **changed)


class _Deliberate(Exception):
    """Raised by `_Failing`; distinct from all other errors."""


class _Failing(Probe[Any]):
    """Reads the same activations as a probe, then fails."""

    reads_stacks = True
    probe: Probe[Any]

    def hooks(self, model: ModelView) -> Hooks:
        """Those of the probe."""
        return self.probe.hooks(model)

    def measure(self, reading: Reading) -> Any:
        """Fail."""
        raise _Deliberate


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """The visible state of the model, and of torch, is the same afterwards."""
    with undisturbed(model):  # a Bridge registers hooks of its own on its first run
        model.run_with_cache(_example(model))
    before = _seen(model)
    yield
    after = _seen(model)
    changed = [name for name, value in before.items() if after.get(name) != value]
    assert before.keys() == after.keys() and not changed, f"the model was changed: {', '.join(changed[:3])}"


def _example(model: Any) -> Tensor:
    """The smallest input of the model."""
    view = view_of(model)
    if isinstance(view, ImageView):
        return torch.zeros(1, *view.shape, device=view.device, dtype=view.dtype)
    return torch.zeros(1, 1, dtype=torch.int64, device=view.model.W_E.device)


def _seen(model: Any) -> dict[str, Any]:
    view = view_of(model)
    seen: dict[str, Any] = {"gradient mode": torch.is_grad_enabled(), "cfg": repr(model.cfg)}
    if isinstance(view, ModelView):
        seen["padding side"] = view.padding_side
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen[f"tensor {name}"] = (_digest(tensor), tensor.requires_grad)
        seen[f"gradient of {name}"] = None if tensor.grad is None else _digest(tensor.grad)
    for name, module in view.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        seen[f"mode and hooks of {name}"] = (module.training, *map(len, hooks))
    return seen


def _digest(tensor: Tensor) -> str:
    """A hash of a tensor's bits, so that no copy is kept."""
    bits = tensor.detach().cpu().flatten().contiguous().view(torch.uint8)
    return hashlib.blake2b(bits.numpy().tobytes()).hexdigest()
