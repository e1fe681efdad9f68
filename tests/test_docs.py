"""The site: every probe has a page, every how-to runs, every link leads somewhere; and what the pages are made with."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import lens_probes as lp

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOWTOS = sorted((DOCS / "howto").glob("*.md"))
KB = 1000


@pytest.fixture(scope="module")
def site() -> Any:
    """The modules of docs/, which are no package."""
    sys.path.insert(0, str(DOCS))
    try:
        names = ("cards", "gallery", "links", "compatibility", "pictures", "conf", "make")
        yield type("Site", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(DOCS))


# Pages


def test_every_public_probe_and_experiment_has_a_page_with_its_card(site):
    for name, kind in site.cards.asked().items():
        page = site.cards.page(name, site.pictures.PICTURES)
        question, rest = site.cards.card(kind)
        assert page.startswith(f"{name}\n{'=' * len(name)}\n") and question.endswith("?") and rest
        assert f".. autoclass:: lens_probes.{name}" in page
        for setting in (each.name for each in dataclasses.fields(kind)):
            assert f"   * - ``{setting}``\n" in page, (name, setting)
    assert len(site.cards.asked()) == len(site.cards.asked(lp.Probe)) + len(site.cards.asked(lp.Experiment)) >= 26


def test_a_page_has_settings_quantities_nulls_limits_costs_and_notebooks(site):
    page = site.cards.page("RankShift", site.pictures.PICTURES)
    for words in (
        "``'embed'``",  # a default
        "``rank`` ``[layer token]``",
        "``null_rank``",
        "it has no learned positions",  # what is refused
        "text to result; tokens 113; against forward pass",  # what it costs
        ":doc:`/notebooks/rank_shift`",
        ".. image:: /pictures/RankShift.png",
        "lp.RankShift(center=mean)",
    ):
        assert words in page, words
    assert "must be given" in site.cards.page("AttentionPair", {"AttentionPair": ""})
    assert "nats, at most 0" in site.cards.page("LogitLens", {"LogitLens": ""})


def test_a_picture_is_small_and_stands_with_the_code_that_draws_it(site):
    assert set(site.pictures.PICTURES) <= set(site.cards.asked())
    assert {file.stem for file in (DOCS / "pictures").glob("*.png")} == set(site.pictures.PICTURES)
    for name, code in site.pictures.PICTURES.items():
        file = DOCS / "pictures" / f"{name}.png"
        assert file.is_file() and file.stat().st_size < 60 * KB, name
        compile(code, name, "exec")


def test_every_public_name_is_in_the_reference(site):
    text = (DOCS / "api.rst").read_text(encoding="utf-8")
    entry = r"^\.\. (?:auto\w+|py:data):: lens_probes\.(?:result\.|cluster\.)?(\w+)$"
    documented = set(re.findall(entry, text, re.MULTILINE))
    pages = set(site.cards.asked()) | {site.cards.result_class(kind).__name__ for kind in site.cards.asked().values()}
    modules = {name for name in lp.__all__ if type(getattr(lp, name)) is type(lp)}
    assert set(lp.__all__) - documented - pages - modules == set()
    for name in modules - {"cluster"}:
        assert f".. automodule:: {getattr(lp, name).__name__}\n" in text, name


def test_a_section_that_is_not_there_is_an_error_and_not_an_empty_page(site):
    assert site.make.filled("{{ README: Licence }}").startswith("MIT.")
    with pytest.raises(ValueError, match=r"must have a section 'No such'"):
        site.make.filled("{{ README: No such }}")
    for file in DOCS.rglob("*.md"):
        if "_build" not in file.parts:
            assert not re.search(r"^\{\{", site.make.filled(file.read_text(encoding="utf-8")), re.MULTILINE), file


def test_links_between_files_become_links_between_pages(site):
    text = "![a](docs/page.png) [b](docs/claims.md) [c](CONTRIBUTING.md) [s](SECURITY.md) [d](../notebooks/tour.ipynb) [e](https://a.org)"
    expected = "![a](/page.png) [b](/claims.md) [c](/contributing.md) [s](/security.md) [d](/notebooks/tour.md) [e](https://a.org)"
    assert site.make.filled(text) == expected


def test_links_to_the_source_follow_from_one_setting(site):
    address = "https://github.com/a/b"
    assert site.conf.repository({"project": {}}) == ""
    assert site.conf.repository({"project": {"urls": {"Repository": f"{address}.git"}}}) == address
    assert site.conf.repository({"project": {}, "tool": {"lens-probes": {"repository": f"{address}/"}}}) == address
    page = site.cards.page("LogitLens", {"LogitLens": ""}, address)
    assert f"`Source code <{address}/blob/main/lens_probes/probes/logit_lens.py>`__" in page
    assert "Source code" not in site.cards.page("LogitLens", {"LogitLens": ""})


# Plain text to reStructuredText


def test_equations_examples_lists_and_arguments_keep_their_form(site):
    text = "Of x:\n\n    y = x * 2\n\n    z = |y|\n\nA `LogitLens` and `top_k`s.\n\n- one\n  more\n- two\n\n>>> 1\n1\n"
    text += "\nArgs:\n    name: What it\n        is.\n"
    assert site.cards.rst(text).split("\n\n") == [
        "Of x:",
        ".. code-block:: text",
        "    y = x * 2",
        "    z = |y|",
        "A :py:obj:`LogitLens <lens_probes.LogitLens>` and ``top_k``\\ s.",
        "- one more\n- two",
        ">>> 1\n1",
        "**Args**",
        "- ``name``: What it is.",
    ]


def test_sources_become_links_and_marks_are_escaped(site):
    assert site.cards.inline("arXiv 2303.08112, h*, a_b") == (
        "`arXiv 2303.08112 <https://arxiv.org/abs/2303.08112>`__, h\\*, a\\_b"
    )
    assert site.cards.inline("See doi.org/10.2307/2005662.") == (
        "See `doi.org/10.2307/2005662 <https://doi.org/10.2307/2005662>`__."
    )
    assert site.cards.inline("e.g. blocks.0.hook_out") == "e.g. blocks.0.hook\\_out"


# Notebooks


def test_a_notebook_is_shown_with_its_verdicts_first_and_its_stored_figures(site, tmp_path):
    site.gallery.write("attention", tmp_path, "https://github.com/a/b")
    text = (tmp_path / "attention.md").read_text(encoding="utf-8")
    assert text.startswith("# ") and text.index("## Verdicts") < text.index("import lens_probes as lp")
    assert "colab.research.google.com/github/a/b/blob/main/notebooks/attention.ipynb" in text
    assert all((tmp_path / name).is_file() for name in re.findall(r"\{image\} (\S+)", text))
    site.gallery.write("attention", tmp_path)
    assert "colab" not in (tmp_path / "attention.md").read_text(encoding="utf-8")


def test_figures_without_a_stored_picture_are_drawn_and_outputs_are_not_run(site, tmp_path):
    plotly = {"data": [{"y": [1, 2]}], "layout": {"title": {"text": "Loss <b>of</b> </script>"}, "height": 300}}
    shown = site.gallery.shown({"data": {"application/vnd.plotly.v1+json": plotly}}, tmp_path, "x-1-0")
    assert "Plotly.newPlot('x-1-0'" in shown and shown.count("</script>") == 2 and 'aria-label="Loss of"' in shown
    assert site.gallery.shown({"text": ["a\n"]}, tmp_path, "x") == "``````text\na\n``````"
    assert site.gallery.shown({"name": "stderr", "text": ["a\n"]}, tmp_path, "x") == ""
    assert "<style" not in site.gallery.shown({"data": {"text/html": "<style>a</style><p>b</p>"}}, tmp_path, "x")


def test_every_notebook_is_in_the_gallery(site):
    assert {file.stem for file in site.gallery.NOTEBOOKS.glob("*.ipynb")} >= set(site.make.NOTEBOOKS)
    index = site.gallery.index(list(site.make.NOTEBOOKS))
    assert "walks back a little later. *SmolLM2: holds; MiniLM: does not hold*" in index and index.count("## [") == len(
        site.make.NOTEBOOKS
    )


# Compatibility


def test_the_grid_numbers_each_reason_once(site):
    families = {"A": {"RankShift": "right", "LogitLens": "refused: no head"}}
    families["B"] = {"RankShift": "wrong: NaN", "LogitLens": "refused: no head"}
    versions = {"transformer-lens": "4.3.0", "transformers": "5", "torch": "2", "python": "3"}
    page = site.compatibility.page([{"versions": versions, "families": families, "absent": {"C": "no class"}}])
    assert page.count('<td class="refused" title="refused: no head">1</td>') == 2
    assert '<td class="wrong" title="wrong: NaN">✗ 2</td>' in page and "\n1. no head\n2. NaN\n" in page
    assert "| `C` | no class |" in page


# How-tos


@pytest.mark.parametrize("file", HOWTOS, ids=lambda file: file.stem)
def test_the_python_of_a_how_to_runs_from_top_to_bottom(file, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    load = lp.load_model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lp, "load_model", lambda name, **boot: load(name, **boot) if boot else lp.tiny.bridge("llama"))
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert blocks or file.stem == "index"


def test_what_runs_elsewhere_is_python_too():
    for file in [*HOWTOS, DOCS / "idea.md", DOCS / "start.md"]:
        for block in re.findall(r"```py(?:thon)?\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            compile(block, str(file), "exec")


# Links


def test_links_of_the_readme_and_of_the_pages_lead_somewhere(site):
    pages = [DOCS / "claims.md", *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))]
    assert list(site.links.broken(pages)) == []


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("b.md", ""),
        ("b.md#two-words", ""),
        ("#here", ""),
        ("https://a.org/x#y", ""),
        ("b.md#no", "no anchor 'no' there"),
        ("#no", "no anchor 'no' there"),
        ("c.md", "no such file"),
        ("https://localhost/x", "no name of a site: 'localhost'"),
        ("htps://a.org", "neither a file nor the address of a site"),
        ("a b.md", "a link must not contain spaces or brackets"),
    ],
)
def test_a_link_is_wrong_if_it_leads_nowhere(site, tmp_path, link, reason):
    (tmp_path / "a.md").write_text("# Here\n")
    (tmp_path / "b.md").write_text("# `Two` words!\n")
    site.links.read.cache_clear()
    assert site.links.wrong(tmp_path / "a.md", link) == reason


def test_links_of_html_are_found_in_href_and_src(site, tmp_path, capsys):
    (tmp_path / "index.html").write_text('<h1 id="x">a</h1><a href="#x"></a><img src="no.png"><a href="sub"></a>')
    (tmp_path / "sub").mkdir()
    assert site.links.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "no.png: no such file" in said and "sub: no such file" in said and "1 files, 2 wrong links" in said


# The whole


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # those of Sphinx's extensions about each other; its own are errors by -W
def test_the_site_is_built_without_warnings_and_its_links_lead_somewhere(site, tmp_path):
    pytest.importorskip("furo", reason="the site needs lens-probes[docs]")
    assert site.make.main(tmp_path) == 0
    said = (tmp_path / "html" / "llms.txt").read_text(encoding="utf-8")
    for name in site.cards.asked():
        assert f"/{name}.html): " in said
    assert all((tmp_path / "html" / path).is_file() for path in re.findall(r"\]\((\S+?)\)", said))
