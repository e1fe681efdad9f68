"""Probes are found where they are, in our package and in others, and keep the form that the contract gives them."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lens_probes as lp
from lens_probes.new_probe import new_probe
from lens_probes.probe import Experiment, Probe
from lens_probes.registry import ENTRY_POINTS, _probes, list_probes, siblings
from lens_probes.result import FORMAT, Result

NEEDED = {
    "AttentionPair": "query, keys",
    "FeatureVisualization": "layer, units",
    "ImageReconstruction": "layer",
    "InputReconstruction": "layer",
    "LensComparison": "translators",
    "MaxActivatingTokens": "layer",
}
PACKAGE = Path(lp.__file__).parent


def written_in(folder: str, base: str) -> set[str]:
    """The classes of this base in the files of a folder, found by reading and not by importing them."""
    sources = [path.read_text() for path in (PACKAGE / folder).glob("*.py")]
    return {name for source in sources for name in re.findall(rf"^class (\w+)\({base}\b", source, re.MULTILINE)}


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINTS)


@pytest.fixture
def other_package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Somebody's package with a probe that is called like one of ours, and one that is not."""
    module = ModuleType("other_package")
    monkeypatch.setitem(sys.modules, "other_package", module)
    for name in ("ResidualUpdate", "Sideways"):
        kind = type(name, (Probe,), {"__module__": "other_package", "hooks": None, "measure": None})
        setattr(module, name, kind)
    return module


# Our own


def test_every_probe_that_a_file_of_the_folder_defines_is_found() -> None:
    own = written_in("probes", "Probe")
    assert {"RankShift", "ResidualUpdate", "ResidualMean"} <= own
    assert own <= set(list_probes())
    assert {name for name, kind in list_probes().items() if kind.__module__.startswith("lens_probes.")} == own


def test_probes_experiments_and_results_stand_in_the_package_under_their_names() -> None:
    written = {
        name
        for folder in ("probes", "experiments")
        for base in ("Probe", r"\w*Experiment", r"\w*Result")
        for name in written_in(folder, base)
    }
    assert set(siblings()) == written
    public = {name: kind for name, kind in siblings().items() if name in lp.__all__}
    assert len(public) == 60
    for name, kind in public.items():
        assert getattr(lp, name) is kind
        assert not name.startswith("_")


def test_two_files_that_define_one_name_are_refused_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding_density = import_module("lens_probes.probes.embedding_density")
    kind = type("ResidualUpdate", (Probe,), {"__module__": embedding_density.__name__})
    monkeypatch.setattr(embedding_density, "ResidualUpdate", kind, raising=False)
    with pytest.raises(
        ValueError, match=r"got ResidualUpdate of lens_probes\.probes\.\w+ and of lens_probes\.probes\."
    ):
        siblings()


@pytest.mark.parametrize("name", sorted(siblings()))
def test_every_class_is_frozen_and_has_no_subclass(name: str) -> None:
    kind: Any = siblings()[name]
    assert kind.__dataclass_params__.frozen
    assert kind.__subclasses__() == []
    assert issubclass(kind, Result) == name.endswith("Result")
    if name.endswith("Result"):
        assert not kind.__dataclass_params__.eq


def doubled(state: torch.Tensor, label: str) -> torch.Tensor:
    return 2 * state


@pytest.mark.parametrize("name", sorted(name for name in written_in("probes", "Probe")))
def test_a_probe_prints_as_the_call_that_makes_it(name: str) -> None:
    kind: Any = list_probes()[name]
    settings = {"AttentionPair": ("it", ("cat", "mat")), "LensComparison": ({"doubled": doubled},)}
    needed, known = settings.get(name, ()), {name: kind, "doubled": doubled}
    made = eval(repr(kind(*needed)), known)
    assert made == kind(*needed)
    assert repr(made) == repr(kind(*needed))
    if "layers" in kind.__dataclass_fields__:
        some = kind(*needed, layers=[0, 2])
        assert "layers=[0, 2]" in repr(some)
        assert eval(repr(some), known) == some


def test_a_probe_without_hooks_or_measure_cannot_be_made() -> None:
    class Half(Probe[Any]):
        def hooks(self, model: Any) -> list[str]:
            return []

    with pytest.raises(TypeError, match="measure"):
        Half()  # pyright: ignore[reportAbstractUsage]
    with pytest.raises(TypeError, match="run"):
        Experiment()  # pyright: ignore[reportAbstractUsage]


def test_a_probes_own_run_takes_what_run_takes() -> None:
    def settings(function: Any) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    assert settings(Probe.run) == settings(lp.run)
    assert list(settings(Probe.from_cache)) == ["attention_mask", "prepend_bos", "word_class"]
    assert settings(lp.TextExperiment.run) == {"prepend_bos": None, "word_class": None, "progress": True}
    assert settings(Probe.run) == {"prepend_bos": None, "word_class": None, "batch_size": None, "progress": True}


@pytest.mark.parametrize("name", sorted(name for name, kind in siblings().items() if not issubclass(kind, Result)))
def test_a_class_that_is_run_as_if_it_were_made_is_told_how_to_make_it(name: str) -> None:
    kind: Any = siblings()[name]
    needed = NEEDED.get(name, "")
    methods = ("run", "from_cache", "hook_names") if issubclass(kind, Probe) else ("run",)
    for method in methods:
        for given in ((), ("model",), ("model", "text")):
            with pytest.raises(
                TypeError,
                match=re.escape(
                    f"{name} must be made before it is asked; got the class: write {name}({needed}).{method}(...)"
                ),
            ):
                getattr(kind, method)(*given)


# Those of others


def test_a_probe_of_another_package_is_found_beside_ours(other_package: ModuleType) -> None:
    found = _probes([entry("sideways", "other_package:Sideways")])
    assert found["Sideways"] is other_package.Sideways
    assert set(found) == {*written_in("probes", "Probe"), "Sideways"}


def test_a_probe_that_two_entry_points_name_is_one_probe(other_package: ModuleType) -> None:
    twice: Sequence[EntryPoint] = [entry(name, "other_package:Sideways") for name in ("one", "two")]
    assert _probes(twice)["Sideways"] is other_package.Sideways
    assert _probes([entry("ours", "lens_probes:ResidualUpdate")])["ResidualUpdate"] is lp.ResidualUpdate


def test_two_probes_of_one_name_are_refused_with_both_modules(other_package: ModuleType) -> None:
    with pytest.raises(
        ValueError,
        match=r"got ResidualUpdate of lens_probes\.probes\.residual_update and of other_package: rename",
    ):
        _probes([entry("update", "other_package:ResidualUpdate")])


@pytest.mark.parametrize("value", ["json:loads", "lens_probes.result:Result", "lens_probes:Experiment", "lens_probes"])
def test_an_entry_point_that_is_no_probe_is_refused_by_name(value: str) -> None:
    with pytest.raises(TypeError, match=rf"lens_probes\.probes must be a Probe class; got {value} for 'wrong'"):
        _probes([entry("wrong", value)])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package installed in it, as pip installs it, without a network."""
    made, target = (tmp_path_factory.mktemp(name) for name in ("made", "target"))
    source = new_probe("TokenNorm", where=made)
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_the_example_package_is_found_keeps_the_contract_and_its_results_load(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
import torch
import lens_probes as lp
from lens_probes.testing import check_probe

kind = lp.list_probes()["TokenNorm"]
print(kind.__module__, sys.modules[kind.__module__].__file__)
model = lp.tiny.bridge("gpt2")
check_probe(kind(), models=[model, lp.tiny.bridge("bert")])
result = kind().run(model, "Time flies like an arrow.")
_, cache = model.run_with_cache("Time flies like an arrow.")
by_hand = cache["blocks.1.hook_resid_post"][0].norm(dim=-1) / cache["blocks.0.hook_resid_pre"][0].norm(dim=-1)
torch.testing.assert_close(result.ratio[1], by_hand.detach())
result.save(sys.argv[1])
print(lp.Result.load(sys.argv[1]))
"""
    path = os.pathsep.join([str(installed), str(PACKAGE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "norm")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"token_norm {installed / 'token_norm.py'}"
    assert second.startswith("TokenNormResult(layer 3, token ")


def test_without_the_package_its_results_are_refused_with_what_to_import(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    metadata = {"format": f"lens_probes result {FORMAT}", "result": "TokenNormsResult", "plain": "{}"}
    save_file({}, tmp_path / "norm", metadata=metadata)
    with pytest.raises(ValueError, match=r"holds a TokenNormsResult .* import the package that defines it first"):
        Result.load(tmp_path / "norm")
