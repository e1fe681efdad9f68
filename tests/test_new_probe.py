"""`python -m lens_probes new-probe`: a package whose own tests pass, or one sentence."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lens_probes.__main__ import main
from lens_probes.new_probe import EXAMPLES, check_name, new_probe, spellings

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("per", ["token", pytest.param("head", marks=pytest.mark.matrix)])
def test_the_tests_of_a_new_package_pass_the_moment_it_is_made(per, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-probe", "StateLength", "--per", per]) == 0
    printed = capsys.readouterr().out
    assert "cd lens-probes-state-length && python -m pip install -e '.[test]'" in printed
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path / "lens-probes-state-length",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "7 passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("per", ["token", "head"])
def test_a_new_package_has_every_part_under_its_own_name(per, tmp_path):
    folder = new_probe("KLDivergence2", per, tmp_path)
    names = {"kl_divergence2.py", "test_kl_divergence2.py", "kl_divergence2.ipynb"}
    assert folder == tmp_path / "lens-probes-kl-divergence2"
    assert {path.name for path in folder.iterdir()} == {*names, "README.md", "pyproject.toml", "test_package.py"}
    text = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert not re.search("|".join(word for example in EXAMPLES for word in spellings(example)), text)
    assert 'KLDivergence2 = "kl_divergence2:KLDivergence2"' in text and 'name = "lens-probes-kl-divergence2"' in text
    assert "class KLDivergence2Result(" in text


def test_a_name_may_hold_that_of_an_example(tmp_path):
    text = (new_probe("MyHeadNorm", "token", tmp_path) / "my_head_norm.py").read_text(encoding="utf-8")
    assert "class MyHeadNorm(Probe[MyHeadNormResult])" in text and "MyMy" not in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("token_norm", "must be that of a class, in letters and digits, such as TokenNorm; got 'token_norm'"),
        ("tokenNorm", "must be that of a class"),
        ("ALLCAPS", "must be that of a class"),
        ("Größe", "must be that of a class"),
        ("../Escape", "must be that of a class"),
        ("None", "must be that of a class"),
        ("", "must be that of a class"),
        ("TestNorm", "must not begin with Test"),
        ("RankShift", "must be new; got RankShift, and RankShift exists"),
        ("TunedLens", "must be new; got TunedLens, and TunedLens exists"),
        ("LayerToken", "must be new; got LayerToken, and LayerTokenResult exists"),
        ("Reading", "must be new; got Reading"),
        ("Tensor", "must be new; got Tensor"),
        ("Json", "the module of a probe must be new; got json for Json"),
        ("Class", "the module of a probe must be new; got class for Class"),
        ("LensProbes", "the module of a probe must be new; got lens_probes for LensProbes"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_one_sentence(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-probe", name]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lens_probes: ") and message in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_the_examples_are_free():
    for name in EXAMPLES:
        check_name(name)


def test_nothing_is_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "lens-probes-state-length" / "state_length.py"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert main(["new-probe", "StateLength"]) == 2
    assert "lens-probes-state-length must be a new folder; got one that exists: move it" in capsys.readouterr().err
    assert kept.read_text() == "mine" and list(kept.parent.iterdir()) == [kept]


def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    def refuse(path, *options, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)  # a mode would not keep root from writing
    assert main(["new-probe", "StateLength"]) == 2
    error = capsys.readouterr().err.strip()
    assert "cannot be written (Read-only file system): go to a folder that you may write to" in error
    assert "\n" not in error
