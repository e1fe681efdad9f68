"""What the README shows, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

import lens_probes as lp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("n_blocks", [1, pytest.param(10, marks=pytest.mark.matrix)])
def test_the_python_of_the_readme_runs_from_top_to_bottom(n_blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS[:n_blocks]:
        exec(block, names)

    assert len(BLOCKS) == 10
    assert isinstance(names["result"], lp.RankShiftResult)
    if n_blocks == 10:
        both: Any = names["both"]
        assert both.layout.yaxis2.autorange == "reversed" and both.layout.xaxis.title.text == "layer (read point)"
        assert {trace.xaxis for trace in both.data} == {"x", "x2"}
    assert (tmp_path / "ranks.safetensors").is_file() == (n_blocks == 10)


def test_the_corpus_of_the_readme_runs_on_any_model_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"lp": lp, "model": lp.tiny.bridge(), "texts": lp.demo.sentences()[:4]}
    (block,) = [block for block in BLOCKS if "run_corpus" in block]
    exec(block, names)
    assert names["run"].prompts == 4 and isinstance(names["run"].results[1], lp.AttentionPatternsResult)
    assert not any((tmp_path / "runs").iterdir())


def test_the_readme_lists_every_public_probe_and_experiment():
    tables = README.split("## What it answers")[1].split("## Install")[0]
    public = [getattr(lp, name) for name in lp.__all__]
    kinds = (kind for kind in public if isinstance(kind, type) and issubclass(kind, lp.Probe | lp.Experiment))
    asked = {kind.__name__ for kind in kinds} - {"Probe", "Experiment", "TextExperiment"}
    assert set(re.findall(r"^\| `(\w+)`", tables, re.MULTILINE)) == asked


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_points_to_exists(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    named = re.findall(r"\]\(((?!http)[^)#]+)\)", text) + re.findall(r"`((?:notebooks|tests|docs)/[\w/.]+)`", text)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_walk_through_is_the_file_that_the_tests_install():
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    plugins = ROOT / "lens_probes" / "examples" / "plugins"
    file = (plugins / "token" / "token_norm.py").read_text(encoding="utf-8")
    assert f"```python\n{file}```" in shown
