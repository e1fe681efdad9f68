"""The package as others get it: what a wheel and an sdist hold, and what importing it costs."""

import os
import platform
import re
import subprocess
import sys
import tarfile
import warnings
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import lens_probes as lp

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_a_wheel_carries_the_package_with_its_types_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lens_probes").rglob("*.py")}
    page = {str(path.relative_to(ROOT)) for path in (ROOT / "lens_probes/pages/browser").iterdir()}
    plugins = {
        f"lens_probes/examples/plugins/package/{name}" for name in ("README.md", "pyproject.toml", "token_norm.ipynb")
    }
    assert modules <= set(names) and len(page) >= 14 and page <= set(names) and plugins <= set(names)
    saved = {str(path.relative_to(ROOT)) for path in (ROOT / "lens_probes/examples/saved").iterdir()}
    assert len(saved) > 20 and saved <= set(names)
    assert {"lens_probes/py.typed", "lens_probes/examples/topics.tsv"} <= set(names)
    assert all(name.startswith(("lens_probes/", "lens_probes-")) for name in names)


def test_an_sdist_carries_the_tests_and_no_environment(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    read_by_tests = {"docs/claims.md", "notebooks/tour.ipynb", ".github/workflows/tests.yml", "SECURITY.md", "Makefile"}
    assert {"README.md", "LICENSE", "pyproject.toml", "tests/test_package.py", *read_by_tests} <= set(names)
    assert not [name for name in names if name.startswith(".venv") or "/site-packages/" in name]


def test_an_installed_wheel_imports_from_anywhere_without_transformerlens(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        f"import lens_probes as lp; assert lp.__file__.startswith({str(target)!r}), lp.__file__\n"
        "assert 'transformer_lens' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(lp.__version__, sorted(lp.list_probes()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    version_of_wheel = wheel.name.split("-")[1]
    assert run.stdout.startswith(f"{version_of_wheel} ['AttentionPair', 'AttentionPatterns'")


def test_every_public_name_is_there_and_has_a_docstring():
    for name in lp.__all__:
        assert getattr(lp, name).__doc__, name
    assert callable(lp.run)


def test_a_name_of_the_package_hides_no_folder_of_it():
    import lens_probes.probes.residual_update

    assert lens_probes.probes.residual_update.ResidualUpdate is lp.ResidualUpdate


def test_a_wheel_from_an_sdist_has_its_version_without_git(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert sdist.name == f"lens_probes-{wheel.name.split('-')[1]}.tar.gz"


def test_a_warning_is_an_error_in_these_tests():
    with pytest.raises(UserWarning, match="deliberate"):
        warnings.warn("deliberate", stacklevel=1)


@pytest.mark.matrix
def test_tests_that_fail_name_the_releases_they_ran_with(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", os.devnull, "test_it.py"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    header, *_, footer = [line for line in run.stdout.splitlines() if "with transformer-lens" in line]
    for line in (header, footer):
        for package in ("transformer-lens", "transformers", "torch", "pandas", "plotly"):
            assert f"{package} {version(package)}" in line
    assert footer.startswith("failed with") and footer.endswith(f"Python {platform.python_version()}")


def test_limits_of_time_are_for_what_hangs_and_not_for_a_busy_machine():
    limits = re.findall(r"timeout=(\d+)", (ROOT / "Makefile").read_text())
    assert limits and all(int(seconds) >= 3600 for seconds in limits)
