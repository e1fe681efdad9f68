"""The table of published claims, against the notebooks that compute it."""

import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
claims = runpy.run_path(str(ROOT / "benchmarks" / "claims.py"))
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_notebooks_say():
    assert claims["page"]() == PAGE, "run `python benchmarks/claims.py`"


def test_every_numbered_claim_has_one_row():
    found = re.findall(r"^\| ([A-Z]\d+) \|", PAGE, re.MULTILINE)
    asked = [f"{letter}{i}" for letter, last in (("C", 9), ("T", 11), ("V", 4)) for i in range(1, last + 1)]
    assert [each for each in found if each[0] in "CTV"] == [*asked[:9], *asked[20:], *asked[9:20]]
    assert len(found) == len(set(found)) and {"W1", "F1", "F2", "A1"} <= set(found)


def test_every_row_has_all_cells_and_says_how_it_was_tested_or_why_not():
    for row in re.findall(r"^\| [A-Z]\d+ \|.*\|$", PAGE, re.MULTILINE):
        claim, words, verdict, *rest = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert claim and words and verdict and len(rest) == 4, row
        assert all(rest) != verdict.startswith("not tested, because "), row


def test_every_notebook_that_the_page_links_to_exists():
    linked = re.findall(r"\]\(\.\./(notebooks/\w+\.ipynb)\)", PAGE)
    assert len(set(linked)) == 5
    assert all((ROOT / name).is_file() for name in linked)


def notebook_with(folder, html):
    """A notebook with one output."""
    cell = {"cell_type": "code", "outputs": [{"output_type": "execute_result", "data": {"text/html": [html]}}]}
    (folder / "one.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown"}, cell]}))
    return folder / "one.ipynb"


def test_the_table_is_read_as_pandas_displays_it(tmp_path):
    row = dict(zip(claims["COLUMNS"], ("C1", "tiny", "p < 0.05 & q | r", "0.5", "3", "0"), strict=True))
    with pd.option_context("display.max_colwidth", None):
        html = pd.DataFrame([row])._repr_html_()
    assert claims["rows_of"](notebook_with(tmp_path, html)) == [row | {"notebook": "one"}]
    assert claims["joined"]([row["verdict"], row["verdict"], "b"]) == "p < 0.05 & q \\| r<br>b"


def test_another_table_with_a_column_of_claims_is_left_alone(tmp_path):
    assert claims["rows_of"](notebook_with(tmp_path, pd.DataFrame([{"claim": "C1"}])._repr_html_())) == []


@pytest.mark.parametrize(("claim", "reason"), [("C1", "tested, and in the list"), ("C99", "no such claim")])
def test_a_claim_is_tested_or_listed_as_not_tested_and_never_both(monkeypatch, claim, reason):
    monkeypatch.setitem(claims["NOT_TESTED"], claim, reason)
    with pytest.raises(ValueError, match=r"in a notebook or in NOT_TESTED, not in both; got .*: run the notebooks"):
        claims["page"]()
