"""check_probe lets good probes pass, and says of a broken one which promise it breaks.

    norm[token] = |h[token]|

Source: none but this file; each toy breaks one promise of the contract.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from types import ModuleType
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probe import Experiment, Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured, summed
from lens_probes.testing import assert_same, check_declaration, check_experiment, check_order, check_probe, check_result
from lens_probes.text.prompts import Tokens, tokenize

HAS_HOOKED = version("transformer-lens").startswith("3.")
HOOK = "blocks.1.hook_resid_post"


class NormResult(Result):
    """Lengths of states."""

    fault: str
    token: Tokens
    norm: Float[Tensor, " token"] = measured("length", low=0, high=1000)
    total: Float64[Tensor, ""] = summed("sum of lengths")
    constant: Float[Tensor, ""] = measured("the same for all batches")

    def figure(self, **look: Any) -> go.Figure:
        if self.fault == "figure runs a module":
            torch.nn.Linear(1, 1)(torch.zeros(1))
        nothing: Any = None
        return nothing if self.fault == "no figure" else go.Figure(go.Bar(y=self.norm.tolist()))


def norm_result(reading: Reading, fault: str) -> NormResult:
    """Lengths of states, spoiled by one fault."""
    spoiled = FAULTS.get(fault, lambda norm, reading: norm)(reading[HOOK].norm(dim=-1), reading)
    return NormResult(
        fault=fault,
        token=reading.tokens,
        norm=spoiled,
        total=spoiled.double().sum(),
        constant=torch.tensor(float(len(spoiled)) if fault == "constant" else 1.0),
    )


class Norm(Probe[NormResult]):
    """Lengths of states, with one fault or none."""

    fault: str = ""

    def hooks(self, model: ModelView) -> list[str]:
        return [HOOK]

    def measure(self, reading: Reading) -> NormResult:
        return norm_result(reading, self.fault)


def writing(norm: Tensor, do: Callable[[Tensor], Any], reading: Reading) -> Tensor:
    """Lengths, after something was done to weights that no state of a block feels."""
    do(reading.model.model.ln_final.weight)
    return norm


FAULTS: dict[str, Callable[[Tensor, Reading], Tensor]] = {
    "batch": lambda norm, reading: norm / norm.max(),
    "padding": lambda norm, reading: norm + reading._mask.shape[1],
    "number of the prompt": lambda norm, reading: norm + reading.tokens.prompt,
    "random": lambda norm, reading: norm + torch.rand(len(norm)),
    "seed of the batch": lambda norm, reading: norm + torch.rand(len(norm), generator=torch.manual_seed(0)),
    "below": lambda norm, reading: -norm,
    "above": lambda norm, reading: norm + 1000,
    "infinite": lambda norm, reading: norm / 0,
    "class": lambda norm, reading: norm + (reading.model.class_name == "TransformerBridge"),
    "weights": lambda norm, reading: writing(norm, lambda weight: weight.add_(1), reading),
    "weights swapped": lambda norm, reading: writing(norm, lambda weight: weight.copy_(weight.roll(1)), reading),
    "weights zeroed": lambda norm, reading: writing(norm, lambda weight: weight.zero_(), reading),
    "weights frozen": lambda norm, reading: writing(norm, lambda weight: weight.requires_grad_(False), reading),
    "gradient": lambda norm, reading: writing(
        norm, lambda weight: setattr(weight, "grad", torch.ones_like(weight)), reading
    ),
    "hook": lambda norm, reading: [norm, reading.model.model.blocks[0].register_forward_hook(lambda *_: None)][0],
    "hook point": lambda norm, reading: [norm, reading.model.model.add_hook(HOOK, lambda *_, **__: None)][0],
    "setting": lambda norm, reading: [norm, setattr(reading.model.model.cfg, "use_attn_result", True)][0],
    "padding side": lambda norm, reading: [norm, setattr(reading.model.tokenizer, "padding_side", "left")][0],
}


# Probes


def test_the_toy_without_a_fault_passes(own_gpt2: Any) -> None:
    check_probe(Norm(), models=[own_gpt2])


@pytest.mark.parametrize(
    ("fault", "promise", "message"),
    [
        ("batch", "check_batches", "NormResult.norm differs from that of batches of 1: by up to"),
        ("padding", "check_batches", "NormResult.norm differs from that of batches of 1"),
        ("number of the prompt", "check_batches", "NormResult.norm differs from that of batches of 1"),
        ("random", "check_batches", "NormResult.norm differs from that of batches of 1"),
        ("seed of the batch", "check_batches", "NormResult.norm differs from that of batches of 1"),
        ("constant", "check_batches", "results that differ in 'constant' cannot be merged"),
        ("below", "check_measured", "'norm' must be 0 to 1000, its declared range; got -"),
        ("above", "check_measured", "'norm' must be 0 to 1000, its declared range; got .* to 10"),
        ("infinite", "check_measured", "'norm' must be finite; it contains Inf"),
        ("figure runs a module", "check_measured", r"figure\(\) ran a module"),
        ("no figure", "check_measured", r"figure\(\) gave a NoneType"),
        ("weights", "check_model_untouched", r"the model was changed: tensor \S*ln_f"),
        ("weights swapped", "check_model_untouched", r"the model was changed: tensor \S*ln_f"),
        ("weights zeroed", "check_model_untouched", r"the model was changed: tensor \S*ln_f"),
        ("weights frozen", "check_model_untouched", r"the model was changed: tensor \S*ln_f"),
        ("gradient", "check_model_untouched", r"the model was changed: gradient of \S*ln_f"),
        ("hook", "check_model_untouched", r"the model was changed: mode and hooks of blocks\.0"),
        ("hook point", "check_model_untouched", r"the model was changed: mode and hooks of blocks\.1\.hook_out"),
        ("setting", "check_model_untouched", "the model was changed: cfg"),
        ("padding side", "check_model_untouched", "the model was changed: padding side"),
    ],
)
def test_a_broken_promise_is_named(fault: str, promise: str, message: str) -> None:
    with pytest.raises((AssertionError, ValueError), match=message) as caught:
        check_probe(Norm(fault), models=[tiny.bridge("gpt2")])
    assert caught.value.__notes__ == [f"in {promise} of Norm(fault={fault!r}) on tiny-gpt2"]


def test_a_probe_that_heeds_the_order_of_prompts_is_named_as_such(gpt2: Any) -> None:
    check_order(Norm(), gpt2)
    with pytest.raises(AssertionError, match=r"NormResult\.norm differs from that of the prompts in reverse: by up to"):
        check_order(Norm("number of the prompt"), gpt2)


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has one class of models")
def test_a_probe_that_heeds_the_class_of_the_model_is_named_as_such() -> None:
    message = r"NormResult\.norm differs from that of a TransformerBridge of gpt2, raw"
    with pytest.raises(AssertionError, match=message) as caught:
        check_probe(Norm("class"))
    assert caught.value.__notes__ == ["in check_model_classes_agree of Norm(fault='class')"]


class Nowhere(Probe[Any]):
    """Refuses every model."""

    def hooks(self, model: ModelView) -> list[str]:
        raise ValueError("not this one")

    def measure(self, reading: Reading) -> Any:
        raise NotImplementedError


def test_a_probe_that_refuses_every_default_model_is_not_passed_over() -> None:
    message = r"Nowhere\(\) must accept at least one default model; it refused all \(not this one\): pass models="
    with pytest.raises(AssertionError, match=message):
        check_probe(Nowhere())
    with pytest.raises(ValueError, match="not this one"):
        check_probe(Nowhere(), models=[tiny.bridge()])


class Misspelt(Probe[Any]):
    """Asks for a read point that there is not, or for an activation of that name."""

    by_name: bool

    def hooks(self, model: ModelView) -> list[str]:
        at: Any = "resid_mdi"
        return [f"blocks.0.hook_{at}"] if self.by_name else [model.hook(at, 0)]

    def measure(self, reading: Reading) -> Any:
        raise NotImplementedError


@pytest.mark.usefixtures("as_users_run_it")
def test_a_wrong_read_point_or_hook_name_is_said_once_with_those_there_are() -> None:
    with pytest.raises(
        AssertionError, match=r"refused all \(a read point must be one of resid_pre, .*; got 'resid_mdi'\)"
    ):
        check_probe(Misspelt(by_name=False))
    with pytest.raises(
        ValueError, match=r"'blocks\.0\.hook_resid_mdi' does not exist .* did you mean blocks\.0\.hook_resid_mid"
    ):
        check_probe(Misspelt(by_name=True))


# Declarations


def in_module(docstring: str | None, monkeypatch: pytest.MonkeyPatch) -> Probe[Any]:
    """A good probe in a module with this docstring."""
    module = ModuleType("somewhere", docstring)
    monkeypatch.setitem(sys.modules, "somewhere", module)
    kind: Any = type("Elsewhere", (Probe,), {"hooks": Norm.hooks, "measure": Norm.measure})
    kind.__module__ = "somewhere"
    return kind()


@pytest.mark.parametrize(
    ("docstring", "message"),
    [
        (None, "the docstring of somewhere must have an indented equation"),
        ("Says nothing. Source: arXiv 1234.5678", "the docstring of somewhere must have an indented equation"),
        ("An x = y in the text.\n\nSource: arXiv", "the docstring of somewhere must have an indented equation"),
        ("Says it.\n\n    x = y\n\nAnd not whence.", "the docstring of somewhere must name a source"),
        ("Says it.\n\n    x = y\n\nAs in arXiv 1234.5678.", ""),
        ("Says it.\n\n    x[layer] = y\n\nSource: own.", ""),
    ],
)
def test_the_docstring_of_a_module_has_an_equation_and_a_source(
    docstring: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = in_module(docstring, monkeypatch)
    if message:
        with pytest.raises(AssertionError, match=message):
            check_probe(probe, models=[])
    else:
        check_declaration(probe)


class Plain(Probe[Any]):
    """Reads nothing."""

    def hooks(self, model: ModelView) -> list[str]:
        return []

    def measure(self, reading: Reading) -> Any:
        raise NotImplementedError


class Mute(Plain):
    """Does not print as its call."""

    def __repr__(self) -> str:
        return "<Mute>"


class Forgetful(Plain):
    """Prints as the call of another."""

    setting: int = 0

    def __repr__(self) -> str:
        return "Forgetful()" if self.setting else "Forgetful(setting=0)"


class Parent(Plain):
    """Has a child."""


class Child(Parent):
    """And is one."""


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (Mute(), "repr must be the call that makes it; got <Mute>"),
        (Forgetful(1), r"Forgetful\(\) makes Forgetful\(setting=0\)"),
        (Parent(), "Parent must have no subclasses: add a field or wrap it"),
    ],
)
def test_what_is_not_final_or_does_not_print_as_its_call_is_named(probe: Probe[Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_probe(probe)


def test_a_setting_that_is_data_may_print_as_its_hash(gpt2: Any) -> None:
    mean = lp.ResidualMean(at="resid_post").run(gpt2, ["one two", "three"])
    check_declaration(lp.RankShift(at="resid_post", center=mean))


# Results


def test_a_field_that_does_not_say_its_unit_is_named(gpt2: Any) -> None:
    class BareResult(Result):
        """A field without metadata."""

        token: Tokens
        bare: Float[Tensor, " token"]

        def figure(self, **look: Any) -> go.Figure:
            return go.Figure()

    tokens = tokenize("one", ModelView(gpt2))
    with pytest.raises(
        AssertionError, match=r"field 'bare' must have a description that is not its name: declare it with mea"
    ):
        check_result(BareResult(token=tokens, bare=torch.zeros(len(tokens))))


class PairResult(Result):
    """A float and a whole number a row."""

    row: tuple[str, ...]
    value: Float[Tensor, " row"] = measured("value")
    whole: Int[Tensor, " row"] = measured("whole number")

    def figure(self, **look: Any) -> go.Figure:
        return go.Figure()


def test_the_same_is_floats_to_1e_4_of_the_largest_and_whole_numbers_but_for_2_percent() -> None:
    value, whole = torch.linspace(0, 50, 100), torch.arange(100)
    value[3] = torch.nan
    one = PairResult(row=tuple(map(str, range(100))), value=value, whole=whole)
    assert_same(one, replace(one, value=value + 0.0049, whole=whole + (torch.arange(100) < 2)), "near")
    for changes, message in (
        ({"value": value + 0.0051}, "PairResult.value differs from that of far: by up to 0.0051"),
        ({"value": value.nan_to_num()}, "PairResult.value differs"),
        ({"whole": whole + (torch.arange(100) < 3)}, r"PairResult.whole differs from that of far: in 3.0% of its"),
        ({"row": tuple(map(str, range(1, 101)))}, "PairResult.row differs"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_same(one, replace(one, **changes), "far")
    with pytest.raises(AssertionError, match=r"PairResult\.value differs"):
        assert_same(one, replace(one, value=value + 1e-6), "exactly", tolerance=0.0)
    with pytest.raises(AssertionError, match=r"in 1\.0%"):
        assert_same(one, replace(one, whole=whole + (torch.arange(100) < 1)), "exactly", tolerance=0.0)


# Experiments


class Trial(Experiment[NormResult]):
    """Reads the lengths of states its own way, with one fault or none."""

    fault: str = ""

    def run(self, model: Any, prompts: Any, *, progress: bool = True) -> NormResult:
        return Norm(self.fault).run(model, prompts, progress=progress)


def test_a_good_experiment_passes(own_gpt2: Any) -> None:
    check_experiment(Trial())
    check_experiment(Trial(), own_gpt2, prompts=["one", "two three"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "random",
            r"NormResult.norm differs from that of a second run, .* \(is everything random seeded\?\)",
        ),
        ("below", "'norm' must be 0 to 1000, its declared range"),
        ("figure runs a module", r"figure\(\) ran a module"),
        ("weights swapped", r"the model was changed: tensor \S*ln_f"),
        ("hook point", r"the model was changed: mode and hooks of blocks\.1\.hook_out"),
        ("gradient", r"the model was changed: gradient of \S*ln_f"),
    ],
)
def test_a_broken_promise_of_an_experiment_is_named(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        check_experiment(Trial(fault), tiny.bridge())
    assert caught.value.__notes__ == [f"in check_experiment of Trial(fault={fault!r}) on tiny-gpt2"]
