"""What a release needs, and what strangers need: version, changelog, workflows, links, notebooks without a clone."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import lens_probes as lp
from lens_probes.registry import siblings

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "https://github.com/someone/lens_probes"
links = runpy.run_path(str(ROOT / "benchmarks" / "links.py"))


def workflow(name: str) -> Any:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


# The version


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a build reads for the metadata, in a folder without git."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "benchmarks/links.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def metadata(project: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "hatchling", "metadata"]
    return json.loads(subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout)


def git(project: Path, *words: str) -> None:
    who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", *who, *words], cwd=project, check=True, capture_output=True)


def test_the_version_is_the_last_tag_or_counts_from_it(project: Path) -> None:
    assert metadata(project)["version"] == "0.0+unknown"
    git(project, "init", "--initial-branch=main")
    git(project, "add", ".")
    git(project, "commit", "--message=First")
    assert re.fullmatch(r"0\.1\.dev1\+[\w.]+", metadata(project)["version"])
    git(project, "tag", "v1.2.0")
    assert metadata(project)["version"] == "1.2.0"
    git(project, "commit", "--allow-empty", "--message=Second")
    assert re.fullmatch(r"1\.2\.1\.dev1\+g\w+", metadata(project)["version"])


# The changelog


def fits(section: str, version: str) -> bool:
    """Whether a newest section may stand over this version; installed from a clone, it may be one of some time ago."""
    if section == "Unreleased":
        return True
    named = re.fullmatch(r"(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)", section)
    return named is not None and Version(named[1]) >= Version(version)


def test_the_newest_section_is_unreleased_or_that_of_this_version() -> None:
    assert fits(SECTIONS[0], lp.__version__), f"begin a section: ## Unreleased (this is {lp.__version__})"
    assert fits("0.2.0 (2027-01-31)", "0.2.0") and fits("0.2.0 (2027-01-31)", "0.1.1.dev7+g0a1b2c3")
    assert not fits("0.2.0 (2027-01-31)", "0.2.1.dev1+g0a1b2c3") and not fits("0.2.0", "0.2.0")


def test_older_sections_are_releases_in_their_order() -> None:
    released = [Version(section.split()[0]) for section in SECTIONS if section != "Unreleased"]
    assert released == sorted(released, reverse=True) and "Unreleased" not in SECTIONS[1:]


def test_the_changelog_names_every_probe_and_experiment() -> None:
    kinds = {name for name, kind in siblings().items() if issubclass(kind, lp.Probe | lp.Experiment)} | {"Summary"}
    assert len(kinds) > 20 and kinds - set(re.findall(r"`(\w+)", CHANGELOG)) == set()


# The workflows


def called(job: Any) -> Iterator[str]:
    """The targets of the Makefile that a job makes."""
    matrix = job.get("strategy", {}).get("matrix", {})
    of_matrix = [*matrix.get("target", []), *(each["target"] for each in matrix.get("include", []))]
    for step in job["steps"]:
        for target in re.findall(r"\bmake (\$\{\{ matrix\.target \}\}|[\w-]+)", step.get("run", "")):
            yield from of_matrix if "$" in target else [target]


def test_workflows_make_targets_that_there_are_and_all_that_ci_makes() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    tests, publish = (
        {target for job in workflow(name)["jobs"].values() for target in called(job)} for name in ("tests", "publish")
    )
    (all_of_them,) = re.findall(r"^test-all: (.+)$", MAKEFILE, re.MULTILINE)
    assert tests | publish <= targets
    assert {"check", "rehearse", *all_of_them.split()} <= tests and publish == {"rehearse"}


def test_workflows_run_every_python_that_is_allowed_and_others_may_fail() -> None:
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    matrix = workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]
    jobs = [*({"python": python} for python in matrix["python"]), *matrix["include"]]
    assert all(allowed.contains(job["python"]) != job.get("may_fail", False) for job in jobs)
    assert {job["python"] for job in jobs} == {"3.11", "3.12", "3.13", "3.14"}
    named = {each.split(" :: ")[-1] for each in PROJECT["project"]["classifiers"] if ":: Python :: 3" in each}
    assert named == {job["python"] for job in jobs if not job.get("may_fail")}


@pytest.mark.parametrize("name", ["tests", "publish"])
def test_workflows_may_read_only_and_publishing_is_a_job_of_its_own(name: str) -> None:
    about = workflow(name)
    assert about["permissions"] == {"contents": "read"}
    more = {job: own["permissions"] for job, own in about["jobs"].items() if "permissions" in own}
    assert more == ({"publish": {"id-token": "write"}} if name == "publish" else {})
    for job, own in about["jobs"].items():
        uses = [step["uses"] for step in own["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@((release/)?v\d+|[0-9a-f]{40})", action) for action in uses)
        if job in more:  # it runs nothing of the repository
            assert not [step for step in own["steps"] if "run" in step] and "actions/checkout" not in str(uses)
    assert about[True] == ({"push": {"tags": ["v*"]}} if name == "publish" else about[True])  # YAML reads `on` as true


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_forms_of_issues_have_all_that_the_site_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert form["name"] and form["description"] and len(set(ids)) == len(ids) >= 3
    assert all(isinstance(each, str) for each in ids) and all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


# Links


def test_the_badges_are_those_of_the_setting() -> None:
    address = links["address"]()
    assert links["under_title"](README, links["badges"](address)) == README, "run `python benchmarks/links.py`"
    assert bool(address) == ("[![tests]" in README)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_has_its_badge_and_its_set_up_cell(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = links["notebook_with_links"](text, path.stem, links["address"]())
    assert found == text, "run `python benchmarks/links.py`"


def test_an_address_gives_badges_and_without_one_they_go() -> None:
    with_badges = links["under_title"](README, links["badges"](ADDRESS))
    assert f"[![tests]({ADDRESS}/actions/workflows/tests.yml/badge.svg)]" in with_badges.splitlines()[2]
    assert "/github/someone/lens_probes/blob/main/notebooks/tour.ipynb" in with_badges.splitlines()[2]
    assert links["under_title"](with_badges, links["badges"](ADDRESS)) == with_badges
    assert links["under_title"](with_badges, "") == links["under_title"](README, "")

    text = NOTEBOOKS[0].read_text(encoding="utf-8")
    opened = links["notebook_with_links"](text, "attention", ADDRESS)
    assert "notebooks/attention.ipynb)" in "".join(json.loads(opened)["cells"][0]["source"])
    assert links["notebook_with_links"](opened, "attention", "") == links["notebook_with_links"](text, "attention", "")
    assert links["on_colab"]("https://elsewhere.example/someone/lens_probes", "tour") == ""  # Colab reads GitHub only


def test_an_index_shows_links_that_it_can_follow(project: Path) -> None:
    pyproject = project / "pyproject.toml"
    without, given = ['repository = ""'], [f'repository = "{ADDRESS}/"']
    text = re.sub(r'^repository = ".*"$', without[0], pyproject.read_text(), flags=re.MULTILINE)
    pyproject.write_text(text)
    bare = metadata(project)
    pyproject.write_text(text.replace(without[0], given[0]))
    linked = metadata(project)

    assert not bare.get("urls") and bare["readme"]["text"] == README
    assert linked["urls"]["Repository"] == ADDRESS and linked["urls"]["Issues"] == f"{ADDRESS}/issues"
    page = linked["readme"]["text"]
    assert f"]({ADDRESS}/raw/main/docs/page.png)" in page and f"]({ADDRESS}/blob/main/CONTRIBUTING.md)" in page
    assert re.findall(r"\]\((?!https?:|#)[^)]+\)", page) == []


# Notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_reads_no_file_of_the_repository(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert re.findall(r"\.\./|\b(?:benchmarks|docs|notebooks|tests)/", code) == []


def test_the_set_up_cell_does_nothing_where_the_package_is_installed() -> None:
    *lines, last = links["SET_UP"].strip().splitlines()
    assert last.strip() == '%pip install --quiet "lens-probes[demo]"'
    exec("\n".join([*lines, "    raise AssertionError"]), {})
    with pytest.raises(AssertionError):
        exec("\n".join([*lines, "    raise AssertionError"]).replace("lens_probes", "no_such_package"), {})


# What SECURITY.md says


def test_nothing_unpickles_or_evaluates_what_it_reads() -> None:
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    for path in (ROOT / "lens_probes").rglob("*.py"):
        if path.name == "testing.py" or "plugins" in path.parts:  # they evaluate a probe's repr, and a notebook
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Call):
                words = ast.unparse(node.func)
                assert words not in ("eval", "exec", "compile", "torch.load", "np.load", "__import__"), path
                assert not any(keyword.arg in ("allow_pickle", "trust_remote_code") for keyword in node.keywords), path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_of_a_notebook_do_not_show_the_machine_that_made_them(path):
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"site-packages|(?<!\w)/(root|home|tmp|work)/", json.dumps(outputs))
