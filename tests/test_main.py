"""`python -m lens_probes`: the table, the page, and one sentence where it cannot."""

import errno
import json
import os
import subprocess
import sys
import tempfile

import pytest

import lens_probes as lp
from lens_probes.__main__ import _probes, main
from lens_probes.examples import tiny


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(lp, "load_model", lambda name: tiny.bridge(name))


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", pytest.param("neox", marks=pytest.mark.matrix), pytest.param("bert", marks=pytest.mark.matrix)],
)
@pytest.mark.usefixtures("tiny_model")
def test_it_prints_the_medians_and_writes_a_page_of_all_probes(architecture, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["--model", architecture, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.replace(str(out), "page.html").splitlines())) <= 100
    printed = " ".join(printed.split())
    assert "Median rank of a token's own embedding" in printed
    assert "0_mid" in printed or (architecture == "neox" and "0_post" in printed)
    assert "The null: values do not depend on the class of a word type" in printed
    assert "heads tell 10 topics apart (q < 0.05, 100 prompts)" in printed
    names = [each["name"] for each in _data(out)["results"]]
    decoders_only = {"DirectLogitAttribution", "HeadValueRank", "SourceAttribution"}
    drawn = (
        set(lp.list_probes())
        - {"CrossAttention", "LensComparison"}
        - (decoders_only if architecture == "bert" else set())
    )
    assert set(names) == drawn and len(names) == len(drawn) + 1  # RankShift twice, the second centred


@pytest.mark.usefixtures("tiny_model")
def test_it_reads_a_text_file_one_prompt_a_line(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("The cat sat on the mat.\n\nA dog chased the <b>cat</b>.\n", encoding="utf-8")
    assert main(["--model", "gpt2", "--text-file", str(texts), "--out", str(tmp_path / "page.html")]) == 0
    assert "2 texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text-file", "nowhere.txt"], "nowhere.txt"),
        (["--out", "nowhere/page.html"], "--out must be in a folder that exists; got nowhere/page.html"),
        (["--model", "./no-such-folder"], "no-such-folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lens_probes: ") and message in error and "\n" not in error


@pytest.mark.usefixtures("tiny_model")
def test_an_empty_text_file_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert main(["--text-file", str(empty)]) == 2
    assert "must contain text; got none: write one prompt per line" in capsys.readouterr().err


def test_help_comes_without_importing_transformerlens():
    code = (
        "import sys, runpy; sys.argv = ['lens_probes', '--help']\n"
        "try: runpy.run_module('lens_probes', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'transformer_lens' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--model", "--text-file", "--out", "gpt2", "SmolLM2"):
        assert option in run.stdout


@pytest.mark.matrix
@pytest.mark.usefixtures("tiny_model")
def test_a_text_without_function_words_is_drawn_and_not_compared(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("Hello\n", encoding="utf-8")
    out = tmp_path / "page.html"
    assert main(["--model", "gpt2", "--text-file", str(texts), "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "were not compared: a token of each class must have a value; got none of class 'function'" in printed
    assert "(under 5 prompts)" in printed
    assert out.is_file()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("a folder/page.html", "a folder/page.html cannot be written (Read-only file system): name a file in a folder"),
        ("n" * 300 + ".html", "cannot be written (File name too long): name a file in a folder"),
        ("pipe", "--out pipe is a device or a pipe, which a page would replace: name a file"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(out, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    os.mkfifo("pipe")
    made = tempfile.NamedTemporaryFile

    def on_a_read_only_disk(*, prefix, dir):
        if dir.name == "a folder":  # a mode would not keep root, which containers run tests as, from writing
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return made(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", on_a_read_only_disk)
    monkeypatch.setattr(lp, "load_model", None)  # would fail with another message
    assert main(["--out", out]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lens_probes: --out ") and message in error and "\n" not in error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a folder", "pipe"]


@pytest.mark.usefixtures("tiny_model")
def test_trying_the_page_leaves_nothing_behind_where_the_model_cannot_be_loaded(tmp_path, monkeypatch):
    def refuse(name):
        raise OSError("no such model")

    monkeypatch.setattr(lp, "load_model", refuse)
    assert main(["--out", str(tmp_path / "page.html")]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_model")
def test_a_page_that_does_not_fit_in_the_end_is_said_in_one_sentence(tmp_path, capsys, monkeypatch):
    def full(page, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lp.Page, "write", full)
    assert main(["--model", "gpt2", "--text-file", _text(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert "page.html was not written (No space left on device): name another file" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_model")
def test_an_installed_probe_that_needs_settings_is_left_out_and_named(tmp_path, capsys, monkeypatch):
    class Needy(lp.Probe):
        """Cannot be made without a word."""

        word: str

        def hooks(self, model):
            return []

        def measure(self, reading):
            raise NotImplementedError

    ours = lp.list_probes()
    monkeypatch.setattr(lp, "list_probes", lambda: {**ours, "Needy": Needy})
    out = tmp_path / "page.html"
    assert main(["--model", "gpt2", "--text-file", _text(tmp_path), "--out", str(out)]) == 0
    error = capsys.readouterr().err
    assert "without Needy: it needs settings (word)" in error and "AttentionPair" not in error
    names = [each["name"] for each in _data(out)["results"]]
    assert "ResidualUpdate" in names and "AttentionPair" in names and "Needy" not in names


def _data(page):
    """What a page was given to show."""
    text = page.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def _text(folder):
    path = folder / "texts.txt"
    path.write_text("The cat sat on the mat.\nA dog chased the cat.\n", encoding="utf-8")
    return str(path)


def test_a_folder_is_no_page(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err


def test_of_a_long_text_attention_and_sources_are_those_of_one_layer(gpt2):
    view = lp.ModelView(gpt2)

    def asked(*texts):
        probes = {type(probe).__name__: probe for probe in _probes(view, texts)}
        assert probes["MassiveActivations"].layers == probes["SourceAttribution"].layers
        return probes["AttentionPatterns"], probes["SourceAttribution"].layers

    short, many, long = asked("Time flies."), asked(*["Time flies. " * 20] * 200), asked("Time flies. " * 2000)
    assert (short[0].keep_patterns, short[0].layers, short[1]) == (True, None, None)
    assert (many[0].keep_patterns, many[0].layers, many[1]) == (False, None, None)
    assert (long[0].keep_patterns, long[0].layers, long[1]) == (True, [1], [1])
