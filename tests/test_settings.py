"""Settings are checked from their annotations: what each allows, in which words it refuses, and all of all probes."""

import dataclasses
import math
import pickle
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_type_hints

import pytest
import torch

import lens_probes as lp
from lens_probes.probe import Probe
from lens_probes.registry import siblings
from lens_probes.settings import (
    Count,
    Positive,
    Rate,
    Seed,
    Share,
    allows,
    at_least,
    described,
    fits,
    says,
)


def _doubled(state: torch.Tensor, label: str) -> torch.Tensor:
    return 2 * state


NEEDED: dict[str, tuple[Any, ...]] = {
    "AttentionPair": ("it", ("cat", "mat")),
    "ImageReconstruction": (1,),
    "LensComparison": ({"doubled": _doubled},),
    "InputReconstruction": (1,),
    "MaxActivatingTokens": (1,),
    "FeatureVisualization": (1, [2]),
}
ASKED = {name: kind for name, kind in siblings().items() if issubclass(kind, lp.Probe | lp.Experiment)}
WRONG = ("nowhere", -1, True, 1.5, math.nan, math.inf, None, [0.5], object(), torch.zeros(2, 3), "", 10**9)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Count, [0, 7], [-1, True, 0.5, 2.0, "1", None, math.nan]),
        (Positive, [1, 7], [0, -1, False, 1.0, None]),
        (Seed, [0], [-1, "0", None]),
        (Rate, [1, 0.5, 1e-30], [0, -1, math.nan, math.inf, True, "1"]),
        (Share, [0.5, 0.01], [0, 1, 0.0, 1.0, math.nan, -0.1, 1.1]),
        (Literal["a", "b"], ["a"], ["c", "", None, 1, ["a"]]),
        (Literal["mean"] | int, ["mean", 3, -1], ["last", 1.5, None, True]),
        (bool, [True, False], [0, 1, "yes", None]),
        (Positive | None, [None, 3], [0, "3"]),
        (tuple[int, ...], [(), (1, 2)], [[1], (1, "a"), 1]),
        (Callable[[int], int], [len], [3, "len"]),
        (Any, [None, 3, "x"], []),
        (Annotated[dict | None, described("a table of pairs")], [None, {}], [[]]),
    ],
)
def test_an_annotation_allows_what_it_says(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not allows(hint, value)] == []
    assert [value for value in bad if allows(hint, value)] == []


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Count, "a whole number, 0 or more"),
        (Annotated[int, at_least(2)], "a whole number, 2 or more"),
        (Rate, "a number above 0"),
        (Share, "a number between 0 and 1"),
        (Literal["a", "b", "c"], "'a', 'b' or 'c'"),
        (Literal["mean", "last"] | int, "'mean' or 'last' or a whole number"),
        (bool, "True or False"),
        (Count | None, "a whole number, 0 or more, or None"),
        (Annotated[dict, described("a table of pairs")] | None, "a table of pairs or None"),
    ],
)
def test_an_annotation_is_told_in_words(hint: Any, words: str) -> None:
    assert says(hint) == words


def test_a_value_is_of_a_kind_to_the_letter() -> None:
    assert fits(1, float) and not fits(1.0, int) and not fits(True, float)
    assert fits((1, "a"), tuple[int, str]) and not fits((1, "a", 2), tuple[int, str])
    assert fits(None, int | None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lp.LogitLens(top_k=-1), r"LogitLens\(top_k=\.\.\.\) must be a whole number, 0 or more; got -1$"),
        (lambda: lp.RankShift("resid"), r"RankShift\(at=\.\.\.\) must be 'resid_pre', .* or 'mlp_out'; got 'resid'$"),
        (
            lambda: lp.EmbeddingDensity(True),
            r"EmbeddingDensity\(k=\.\.\.\) must be a whole number, 1 or more; got True$",
        ),
    ],
)
def test_a_refusal_has_one_form(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_settings_are_refused_with_those_that_exist_and_missing_ones_by_python() -> None:
    with pytest.raises(TypeError, match=r"RankShift takes at, .*, layers; got 'neighbors': did you mean neighbours?"):
        lp.RankShift(neighbors=3)
    with pytest.raises(TypeError, match=r"missing .* argument: 'layer'"):
        lp.InputReconstruction()


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", sorted(ASKED))
def test_every_setting_refuses_wrong_values_in_one_sentence(name: str) -> None:
    """Whatever is passed for any setting: it is taken, or refused by its name, what must hold, and what came."""
    kind, refused = ASKED[name], 0
    hints = get_type_hints(kind, include_extras=True)
    settings = [field.name for field in dataclasses.fields(kind)]
    given = dict(zip(settings, NEEDED.get(name, ()), strict=False))
    for setting in settings:
        for wrong in WRONG:
            try:
                kind(**given | {setting: wrong})
            except (TypeError, ValueError) as error:
                refused += 1
                told = str(error)
                assert "\n" not in told and len(told) < 400, told
                assert re.search(rf"{setting}\b", told), told
            else:
                assert setting == "layers" or allows(hints[setting], wrong), (setting, wrong)
    assert refused or settings == ["layers"]


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_probe_survives_pickling_and_prints_as_its_call(name: str) -> None:
    made = ASKED[name](*NEEDED.get(name, ()))
    assert repr(pickle.loads(pickle.dumps(made))) == repr(made)


def test_a_setting_without_an_annotation_that_restricts_it_takes_everything() -> None:
    class Open(Probe[Any]):
        """Takes anything."""

        anything: Any = None

        def hooks(self, model: Any) -> list[str]:
            return []

        def measure(self, reading: Any) -> Any:
            return None

    assert Open(wrong := object()).anything is wrong
