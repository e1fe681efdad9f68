"""A corpus in shards: what counts as a text, how long ones are cut, what a folder keeps, and what a kill may cost."""

import errno
import gc
import hashlib
import itertools
import json
import os
import random
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import lens_probes as lp
from lens_probes.__main__ import main
from lens_probes.corpus import folder as folders
from lens_probes.corpus import running
from lens_probes.corpus.folder import GROUP, CannotWrite, Entry, Folder, WritableFolder, joining, writing
from lens_probes.corpus.measuring import Work, cut, weights_hash
from lens_probes.corpus.texts import documents, plan, shards
from lens_probes.examples import tiny
from lens_probes.probe import Parts
from lens_probes.result import schema
from lens_probes.text.prompts import Prompt

TEXTS = [" ".join(text.split()[:5]) for text in lp.demo.sentences()[:11]]
MANY = [f"A cat saw {n}." for n in range(10)]
SUMS = [lp.ResidualMean(layers=[1]), lp.AttentionPatterns(layers=[1])]
ROWS = lp.RankShift(layers=[2])
QUIET = {"progress": False, "shard_size": 2}


def same(one, other):
    """The bits of two results, labels and provenance included."""
    assert type(one) is type(other) and one.provenance == other.provenance
    for name in schema(type(one)).axes:
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None), name
        assert first is None or torch.equal(first, second), name
    for name in schema(type(one)).tables:
        pd.testing.assert_frame_equal(getattr(one, name).to_frame(), getattr(other, name).to_frame())
    return True


def all_same(run, results):
    return all(same(one, other) for one, other in zip(run.results, results, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that others are compared with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return lp.run_corpus([*SUMS, ROWS], tiny.bridge(), TEXTS, folder, **QUIET)


@pytest.fixture
def whole(uninterrupted):
    return uninterrupted.results


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """The folder of a run that is complete, which a test may damage."""
    return shutil.copytree(uninterrupted.folder, tmp_path / "run")


@pytest.fixture
def groups_of_four(monkeypatch):
    """Instead of 16 shards, so that few are enough to be folded."""
    monkeypatch.setattr(folders, "GROUP", 4)


def go_on(folder, model):
    return lp.run_corpus([*SUMS, ROWS], model, TEXTS, folder, **QUIET)


# Numbers


def test_a_corpus_gives_what_one_run_over_everything_gives(gpt2, whole):
    expected = lp.run([*SUMS, ROWS], gpt2, TEXTS, progress=False)
    for one, other in zip(whole, expected, strict=True):
        assert one.provenance == other.provenance
        for name in schema(type(one)).axes:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
    pd.testing.assert_frame_equal(whole[2].token.to_frame(), expected[2].token.to_frame())


def test_rows_come_in_the_order_of_the_corpus_whatever_their_lengths(gpt2, tmp_path):
    texts = ["A dog barked at the old gate all night.", "Cats sleep.", "The cat sat on the mat.", "Rain fell."]
    probes = [lp.ResidualUpdate(), lp.SourceAttribution(layers=[1])]
    got = lp.run_corpus(probes, gpt2, texts, tmp_path / "run", progress=False).results
    expected = lp.run(probes, gpt2, texts, progress=False)
    for one, other in zip(got, expected, strict=True):
        for name in schema(type(one)).tables:  # of tokens, prompts and pairs
            pd.testing.assert_frame_equal(getattr(one, name).to_frame(), getattr(other, name).to_frame())
        for name in schema(type(one)).axes:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True)


def test_topics_are_those_of_one_run_and_may_be_alone_in_a_shard(gpt2, tmp_path):
    topics = {topic: texts[:3] for topic, texts in list(lp.demo.topics().items())[:3]}
    probes = [lp.TopicActivity(), lp.HeadTopicSimilarity(keep_vectors=False)]
    got = lp.run_corpus(probes, gpt2, topics, tmp_path / "run", progress=False, shard_size=4).results
    expected = lp.run(probes, gpt2, topics, progress=False)
    for one, other in zip(got, expected, strict=True):
        assert one.topic == other.topic == tuple(topics)
        for name in schema(type(one)).axes:
            if getattr(one, name) is not None:
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_hooked_transformer_and_half_precision_are_measured(dtype, own_gpt2, tmp_path):
    model = own_gpt2 if dtype == torch.float32 else tiny.bridge("llama", dtype=dtype)
    run = lp.run_corpus([lp.ResidualMean()], model, TEXTS[:3], tmp_path / "run", **QUIET)
    assert run.results[0].provenance.dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(
        run.results[0].mean, lp.ResidualMean().run(model, TEXTS[:3], progress=False).mean, rtol=1e-4, atol=1e-4
    )


def test_numbers_do_not_depend_on_what_shares_a_batch(gpt2, tmp_path, whole):
    run = lp.run_corpus([ROWS], gpt2, TEXTS, tmp_path / "run", batch_tokens=40, progress=False, shard_size=5)
    torch.testing.assert_close(run.results[0].score, whole[2].score)
    assert (run.results[0].rank != whole[2].rank).double().mean() <= 0.02


def test_similar_lengths_share_a_batch(gpt2):
    texts = ["A dog barked at the old gate.", "Rain.", "The cat sat on the mat.", "Snow."] * 40
    work = Work([lp.ResidualMean()], gpt2)
    (shard,) = shards(documents(texts), 256)
    pieces, _ = work.pieces(shard)
    lengths = [len(piece.tokens) for piece in pieces]
    batches = work._batches(pieces, sorted(range(len(pieces)), key=lambda i: -lengths[i]))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.25 * sum(lengths) < 1.7 * sum(lengths) < 16 * len(texts)  # the last of batches in order
    assert all(len(batch) * max(lengths[i] for i in batch) <= 512 for batch in batches)


# Going on


def interrupted_after(n, monkeypatch):
    """A run that is ended after some shards, as by a signal."""
    measure, count = Work.measure, itertools.count()

    def measure_some(work, shard, *others):
        if next(count) == n:
            raise KeyboardInterrupt
        return measure(work, shard, *others)

    monkeypatch.setattr(Work, "measure", measure_some)


@pytest.mark.parametrize("n", [1, 4])
def test_a_run_that_was_interrupted_goes_on_and_has_the_bits_of_one_that_was_not(n, gpt2, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        interrupted_after(n, patch)
        run = lp.run_corpus([*SUMS, ROWS], gpt2, TEXTS, tmp_path / "run", **QUIET)
    assert run.shards == n and not run.complete and run.all_shards == 6
    so_far = lp.open_run(tmp_path / "run")
    assert so_far.results[0].provenance.n_prompts == so_far.prompts == 2 * n
    measured = []
    measure = Work.measure
    monkeypatch.setattr(
        Work, "measure", lambda work, shard, *o: measured.append(shard.number) or measure(work, shard, *o)
    )
    run = lp.run_corpus([*SUMS, ROWS], gpt2, TEXTS, tmp_path / "run", **QUIET)
    assert measured == list(range(n, 6)) and run.complete
    assert all_same(run, whole)


def test_an_interrupt_before_the_first_shard_is_passed_on(gpt2, tmp_path, monkeypatch):
    interrupted_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "run", **QUIET)


@pytest.mark.usefixtures("groups_of_four")
def test_bits_do_not_depend_on_the_order_in_which_shards_are_done(gpt2, tmp_path):
    missing = running.Recording.missing

    def shuffled(recording):
        return iter(random.Random(1).sample(own := list(missing(recording)), len(own)))

    one = lp.run_corpus(SUMS, gpt2, MANY, tmp_path / "one", progress=False, shard_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Recording, "missing", shuffled)
        other = lp.run_corpus(SUMS, gpt2, MANY, tmp_path / "other", progress=False, shard_size=1)
    assert all_same(one, other.results)
    names = [sorted(os.listdir(tmp_path / each / "0_ResidualMean")) for each in ("one", "other")]
    assert names[0] == names[1]
    assert [name for name in names[0] if "-" in name] == [
        "00000000-00000003.safetensors",
        "00000004-00000007.safetensors",
    ]
    assert len(names[0]) == 2 + 2


@pytest.mark.usefixtures("groups_of_four")
def test_folding_groups_changes_no_bit_and_rows_are_not_folded_since_their_files_get_no_smaller(
    gpt2, tmp_path, monkeypatch
):
    def files_of(run, probe):
        return len(os.listdir(tmp_path / run / probe))

    probes, how = [*SUMS, ROWS], {"progress": False, "shard_size": 1}
    folded = lp.run_corpus(probes, gpt2, MANY[:6], tmp_path / "folded", **how)
    monkeypatch.setattr(WritableFolder, "fold", lambda *_: None)
    plain = lp.run_corpus(probes, gpt2, MANY[:6], tmp_path / "plain", **how)
    assert files_of("plain", "0_ResidualMean") == files_of("plain", "2_RankShift") == 6
    assert files_of("folded", "0_ResidualMean") == 3 and files_of("folded", "2_RankShift") == 6
    assert all_same(folded, plain.results)


def test_a_group_is_large_enough_that_few_files_are_read_again():
    assert GROUP == 16


def test_parts_of_a_shard_are_merged_in_a_tree(gpt2):
    one = [lp.ResidualMean(layers=[0]).run(gpt2, text) for text in TEXTS[:7]]
    parts = Parts()
    for each in one:
        parts.add(each)
    merge = lp.Result.merge
    left, right = merge([merge(one[:2]), merge(one[2:4])]), merge([merge(one[4:6]), one[6]])
    assert same(parts.merged(), merge([left, right]))


@pytest.mark.usefixtures("groups_of_four")
def test_what_is_done_can_be_read_while_the_run_goes_on(gpt2, tmp_path):
    seen = []

    def texts():
        for n, text in enumerate(MANY):
            if n in (4, 6, 9):
                run = lp.open_run(tmp_path / "run")
                seen.append((run.shards, run.results[0].provenance.n_prompts, run.all_shards))
            yield text

    run = lp.run_corpus(SUMS, gpt2, texts(), tmp_path / "run", progress=False, shard_size=1)
    assert [shards for shards, _, _ in seen] == [4, 6, 9]
    assert all(shards == prompts and total is None for shards, prompts, total in seen) and len(seen) == 3
    assert run.complete and run.all_shards == 10


@pytest.mark.usefixtures("groups_of_four")
def test_a_group_that_replaces_files_while_they_are_read_is_read_instead(gpt2, tmp_path, monkeypatch):
    texts = MANY[:5]
    with monkeypatch.context() as patch:
        patch.setattr(WritableFolder, "fold", lambda *_: None)
        lp.run_corpus(SUMS, gpt2, texts, tmp_path / "run", progress=False, shard_size=1)
    run = lp.open_run(tmp_path / "run")
    listed = Folder.files

    def list_then_fold(folder, probe):
        found = listed(folder, probe)
        if not isinstance(folder, WritableFolder):
            WritableFolder(folder.path).fold(3, range(5))
        return found

    monkeypatch.setattr(Folder, "files", list_then_fold)
    assert run.results[0].provenance.n_prompts == 5


# Refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"probes": [lp.ResidualMean()]}, "a run must go on with the same probes; got"),
        ({"probes": [*SUMS, lp.RankShift()]}, "same probes; got RankShift(at='resid_mid', "),
        ({"model": lambda: tiny.bridge("gpt2", seed=1)}, "a run must go on with the same weights; got "),
        ({"model": lambda: tiny.bridge("llama")}, "same model; got tiny-llama, and the run in "),
        ({"model": lambda: tiny.bridge("gpt2", processed=True)}, "same processed weights; got True"),
        ({"model": lambda: tiny.bridge("gpt2", dtype=torch.bfloat16)}, "same precision; got bfloat16"),
        ({"model": lambda: tiny.bridge("gpt2", padding_side="left")}, "same tokenizer; got "),
        ({"texts": TEXTS[::-1]}, "same corpus; got others in shard 0"),
        ({"texts": [*TEXTS, "More."]}, "same corpus; got others in shard 5"),
        ({"texts": TEXTS[:-1]}, "same corpus; got 5 shards, and the run in "),
        ({"texts": TEXTS[:4]}, "same corpus; got 2 shards, and the run in "),
        ({"texts": iter(TEXTS[:4])}, "same corpus; got 2 shards, and the run in "),
        ({"texts": iter([*TEXTS[:10], "Other."])}, "same corpus; got others in shard 5"),
        ({"shard_size": 3}, "same shard_size; got 3, and the run in "),
        ({"max_tokens": 8}, "same max_tokens; got 8, and the run in "),
        ({"prepend_bos": False}, "same tokenizer; got "),
        ({"word_class": lambda text: []}, "same word_class; got "),
    ],
)
def test_another_model_probe_or_corpus_is_refused_and_named(changed, message, gpt2, uninterrupted):
    def contents():
        paths = [path for path in uninterrupted.folder.rglob("*") if path.is_file() and path.name != "lock"]
        return {path: path.read_bytes() for path in paths}

    before = contents()
    given = {"probes": [*SUMS, ROWS], "model": lambda: gpt2, "texts": TEXTS, **QUIET, **changed}
    probes, model, texts = given.pop("probes"), given.pop("model")(), given.pop("texts")
    with pytest.raises(ValueError) as refused:
        lp.run_corpus(probes, model, texts, uninterrupted.folder, **given)
    assert message in str(refused.value) and "name another folder" in str(refused.value)
    assert "\n" not in str(refused.value) and contents() == before


def test_more_texts_after_the_end_are_another_corpus(gpt2, tmp_path):
    lp.run_corpus(SUMS, gpt2, TEXTS[:4], tmp_path / "run", **QUIET)
    for texts in (TEXTS[:6], iter(TEXTS[:6])):
        with pytest.raises(ValueError, match=r"a run must go on with the same corpus; got (3|over 2) shards"):
            lp.run_corpus(SUMS, gpt2, texts, tmp_path / "run", **QUIET)


def test_other_versions_are_refused(gpt2, copied):
    about = copied / "run.json"
    about.write_text(about.read_text().replace(f'"version of torch": "{version("torch")}', '"version of torch": "1.0'))
    with pytest.raises(ValueError, match=r"same version of torch; got .*, and the run in .* has 1\.0"):
        go_on(copied, gpt2)


@pytest.mark.parametrize("other", [[lp.ResidualMean()], [*SUMS, lp.ResidualUpdate(layers=[1])]])
def test_a_run_in_which_nothing_is_done_may_become_another(other, gpt2, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(0, patch)
        with pytest.raises(KeyboardInterrupt):
            go_on(tmp_path / "run", gpt2)
    (tmp_path / "run" / "2_RankShift" / "00000000.safetensors").touch()  # not counted, so nobody's
    run = lp.run_corpus(other, gpt2, MANY[:3], tmp_path / "run", **QUIET)
    assert run.complete and run.prompts == 3 and run.probes == tuple(map(repr, other))
    assert not (tmp_path / "run" / "2_RankShift").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "probes": ["A()"]}', "has format 2 and this version reads format 1: update lens-probes"),
        ('{"format": 0, "probes": ["A()"]}', "has format 0 and this version reads format 1: start the run again"),
        ('{"format": "1"}', "is not of a run of lens_probes"),
        ('{"format": 1, "probes": []}', "is not of a run of lens_probes: it names no probes"),
        ("{", "is damaged"),
    ],
)
def test_a_folder_in_another_format_is_refused(content, message, gpt2, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        lp.open_run(tmp_path)
    with pytest.raises(ValueError, match=message):
        lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path, **QUIET)


def test_a_folder_with_other_files_is_refused(gpt2, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"folder must be new, empty, or that of a run; got .*, which has thesis\.tex"):
        lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path, **QUIET)
    with pytest.raises(CannotWrite, match="folder must be a folder; got the file"):
        lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "thesis.tex", **QUIET)
    with pytest.raises(FileNotFoundError, match="a run must be a folder that run_corpus made"):
        lp.open_run(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 0}, "shard_size must be a number of texts, 1 or more; got 0"),
        ({"shard_size": 1.5}, "shard_size must be a number of texts, 1 or more; got 1.5"),
        ({"max_tokens": 0}, "max_tokens must be a whole number, 1 or more; got 0"),
        ({"max_tokens": 1}, "max_tokens must leave room for text beside 1 special tokens; got 1"),
        ({"max_tokens": 65}, "max_tokens must be at most the context of tiny-gpt2, 64; got 65"),
        ({"batch_tokens": "many"}, "batch_tokens must be a whole number, 1 or more; got 'many'"),
    ],
)
def test_settings_are_checked_before_anything_is_read(settings, message, gpt2, tmp_path):
    with pytest.raises(ValueError, match=message):
        lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "run", **{"progress": False, **settings})


@pytest.mark.usefixtures("as_users_run_it")
def test_a_probe_that_is_no_list_and_a_layer_that_is_not_there_are_refused_before_anything_is_read(gpt2, tmp_path):
    with pytest.raises(TypeError, match="probes must be a list"):
        lp.run_corpus(lp.ResidualMean(), gpt2, TEXTS, tmp_path / "run")
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        lp.run_corpus([lp.ResidualMean(layers=[9])], gpt2, TEXTS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_are_told_apart_by_any_entry_and_by_its_place():
    model = tiny.bridge("llama")
    before = weights_hash(model)
    parameter = next(each for each in model.parameters() if each.shape == (64, 32))
    with torch.no_grad():
        parameter[3, 5] += 1e-6 + parameter[3, 5].abs() * 1e-6
        changed = weights_hash(model)
        parameter.copy_(parameter.flip(0))
    assert len({before, changed, weights_hash(model)}) == 3
    assert weights_hash(tiny.bridge("llama")) == before == weights_hash(tiny.bridge("llama"))


# Sources


LINES = ["Time flies.", "Fruit flies like a banana.", "Café au lait."]


def _data(items):
    class Streaming:
        """As a Hugging Face dataset that streams: an iterable of dicts without a length."""

        def __iter__(self):
            return iter(items)

    return Streaming()


@pytest.mark.parametrize(
    "source",
    [
        lambda folder: LINES,
        lambda folder: (line for line in LINES),
        lambda folder: [Prompt(line) for line in LINES],
        lambda folder: pd.Series(LINES),
        lambda folder: pd.DataFrame({"text": LINES, "other": 1}),
        lambda folder: [{"text": line} for line in LINES],
        lambda folder: _data([{"text": line, "id": 3} for line in LINES]),
        lambda folder: _written(folder / "a.txt", "\ufeff" + "\n\n  \n".join(LINES) + "\r\n"),
        lambda folder: str(_written(folder / "a.txt", "\n".join(LINES))),
        lambda folder: _written(folder / "a.jsonl", "\n".join(json.dumps({"text": line, "n": 1}) for line in LINES)),
        lambda folder: _written(folder / "a.jsonl", "\n".join(map(json.dumps, LINES))),
        lambda folder: _parquet(folder / "a.parquet", pd.DataFrame({"n": 1, "text": LINES})),
    ],
)
def test_every_source_gives_the_same_texts(source, tmp_path):
    assert [document.prompt.text for document in documents(source(tmp_path))] == LINES


def _written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def _parquet(path, frame):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed, which .parquet files need")
    frame.to_parquet(path)
    return path


@pytest.mark.parametrize(
    "source",
    [
        lambda folder: {"b": LINES[:1], "a": iter(LINES[1:])},
        lambda folder: {"b": LINES[0], "a": LINES[1:]},
        lambda folder: [Prompt(line, topic=topic) for line, topic in zip(LINES, "baa", strict=True)],
        lambda folder: [{"text": line, "topic": topic} for line, topic in zip(LINES, "baa", strict=True)],
        lambda folder: _parquet(folder / "a.parquet", pd.DataFrame({"topic": list("baa"), "text": LINES})),
        lambda folder: _written(
            folder / "a.jsonl",
            "\n".join(json.dumps({"text": t, "topic": topic}) for t, topic in zip(LINES, "baa", strict=True)),
        ),
    ],
)
def test_every_source_gives_topics(source, tmp_path):
    assert [document.prompt.topic for document in documents(source(tmp_path))] == ["b", "a", "a"]


@pytest.mark.parametrize(
    "source",
    [[[5, 6, 7], (8, 9)], [torch.tensor([5, 6, 7]), np.array([8, 9])], [{"text": [5, 6, 7]}, Prompt(ids=(8, 9))]],
)
def test_token_ids_are_read_as_they_are(source, gpt2, tmp_path):
    assert [document.prompt.ids for document in documents(source)] == [(5, 6, 7), (8, 9)]
    assert [document.prompt.ids for document in documents(torch.tensor([[5, 6], [7, 8]]))] == [(5, 6), (7, 8)]
    run = lp.run_corpus([ROWS], gpt2, source, tmp_path / "run", **QUIET)
    assert run.results[0].token.id.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("Time flies like an arrow.", FileNotFoundError, "texts must be a file that exists, or an iterable of prompts"),
        (Path("nowhere.jsonl"), FileNotFoundError, "got 'nowhere.jsonl'"),
        (Prompt("Time flies."), TypeError, "texts must be a file or an iterable of prompts; got Prompt"),
        ([5, 6, 7], TypeError, "pass a list, such as"),
        (torch.tensor([5, 6, 7]), TypeError, "pass a list, such as"),
        (5, TypeError, "texts must be a file or an iterable of prompts; got 5"),
        ([], ValueError, "texts must be one or more; got none"),
        (iter([]), ValueError, "texts must be one or more; got none"),
    ],
)
def test_what_is_no_corpus_is_refused(texts, error, message, gpt2, tmp_path):
    with pytest.raises(error, match=message):
        lp.run_corpus(SUMS, gpt2, texts, tmp_path / "run", progress=False)
    assert (tmp_path / "run").exists() == (error is ValueError)  # a corpus without texts is found out when it is read


def test_a_dictionary_of_data_sets_is_not_taken_for_topics(gpt2, tmp_path):
    class Split(list):
        column_names = ("text",)

    with pytest.raises(
        TypeError, match=r"texts must be one data set; got several by name, train, test: pass .*'train'"
    ):
        lp.run_corpus(SUMS, gpt2, {"train": Split(), "test": Split()}, tmp_path / "run", progress=False)


def test_a_parquet_file_without_texts_is_refused_with_its_columns(gpt2, tmp_path):
    path = _parquet(tmp_path / "a.parquet", pd.DataFrame({"sentence": LINES}))
    with pytest.raises(ValueError, match="must have a column 'text'; got sentence"):
        lp.run_corpus(SUMS, gpt2, path, tmp_path / "run", progress=False)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl.gz"])
def test_a_file_whose_lines_are_no_prompts_is_refused(name, tmp_path):
    path = _written(tmp_path / name, "text,topic\nA cat.,x\n")
    with pytest.raises(ValueError, match=f"a file must be .jsonl, .parquet, or have one prompt per line; got {name}"):
        documents(path)


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed, which .parquet files need")
    with pytest.raises(ValueError, match=r"a\.parquet must be a \.parquet file; got another, or a part of one \("):
        list(documents(_written(tmp_path / "a.parquet", "nonsense")))


# Shards and pieces


def test_shards_depend_on_the_texts_and_their_order_only():
    texts = ["a", "b", "c", "d" * 2000, "e", "f"]
    found = list(shards(documents(texts), 3))
    assert [[document.prompt.text[0] for document in shard.documents] for shard in found] == [
        ["a", "b", "c"],
        ["d"],
        ["e", "f"],
    ]
    assert [shard.first for shard in found] == [0, 3, 4]
    assert [shard.key for shard in found] == [shard.key for shard in shards(documents(iter(texts)), 3)]
    assert plan(texts, 3).keys == tuple(shard.key for shard in found)
    content = hashlib.blake2b(b"text a", digest_size=8)  # the same in every process: old folders must be found again
    assert found[0].documents[0].key == content.hexdigest()


def test_topics_and_ids_make_other_shards():
    keys = [
        next(shards(documents(texts), 3)).key
        for texts in (["5"], [Prompt("5", topic="a")], [Prompt("5", topic="b")], [[5]], [None], [["5"]])
    ]
    assert len(set(keys)) == 6


def test_a_hundred_million_tokens_on_64_gpus_are_planned():
    text = "x" * 6400  # about 1,600 tokens
    tenth = plan((text for _ in range(6_250)), 256)
    assert tenth.texts == 6_250 and tenth.characters == 40_000_000
    n_shards = 10 * len(tenth.keys)
    assert n_shards == 3910  # shards of 16 texts, about 25,600 tokens; 61 or 62 for each of 64 GPUs
    assert (n_shards - 1).bit_length() == 12  # the depth of the tree
    entry = Entry(3906, "0" * 16, 64, 64, 25_600)
    line = len(json.dumps(entry._asdict()))
    assert line * n_shards < 1_000_000  # bytes of the manifest


def test_ten_thousand_shards_are_listed_in_a_moment(tmp_path):
    folder = WritableFolder(tmp_path)
    folder.begin({"probes": ["A()", "B(3)"]})
    for probe in range(2):
        for shard in range(10_000):
            (folder.of_probe(probe) / f"{shard:08d}.safetensors").touch()
    lines = [
        json.dumps({"shard": n, "key": "0" * 16, "texts": 256, "prompts": 256, "tokens": 9999}) for n in range(10_000)
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    begun = time.perf_counter()
    assert len(Folder(tmp_path).complete()) == 10_000
    assert time.perf_counter() - begun < 5


def test_a_long_text_is_cut_before_words_into_the_tokens_of_the_whole(gpt2):
    text = " ".join(lp.demo.sentences()[:12])
    work = Work([ROWS], gpt2, max_tokens=20)
    (shard,) = shards(documents(["A cat.", text]), 256)
    pieces, failures = work.pieces(shard)
    whole, _ = work.view.encode(text, None)
    assert not failures and [piece.text for piece in pieces] == [0, *[1] * (len(pieces) - 1)]
    document = [int(piece.tokens.document[0]) for piece in pieces]
    assert len(set(document[1:])) == 1 and document[0] != document[1]
    bos, own = whole[0], [piece.tokens.id.tolist() for piece in pieces[1:]]
    assert all(len(ids) <= 20 and ids[0] == bos and bos not in ids[1:] for ids in own)
    assert [i for ids in own for i in ids[1:]] == whole[1:]
    assert all(len(ids) > 10 for ids in own[:-1])
    for piece in pieces[2:]:  # words keep their classes, and none is cut in two
        assert set(piece.tokens.word_class) >= {"content", "function"}
    texts = ["".join(piece.tokens[~piece.tokens.special].text) for piece in pieces[1:]]
    assert "".join(texts) == text
    assert all(one[-1:].isspace() or other[:1].isspace() for one, other in itertools.pairwise(texts))


def test_an_encoder_has_its_special_tokens_in_every_piece():
    model = tiny.bridge("bert")
    work = Work([lp.ResidualMean()], model)
    text = " ".join(lp.demo.sentences()[:6])
    pieces, _ = work.pieces(next(shards(documents([text]), 1)))
    whole, _ = work.view.encode(text, None)
    own = [piece.tokens.id.tolist() for piece in pieces]
    assert len(own) > 2 and all(ids[0] == whole[0] and ids[-1] == whole[-1] and len(ids) <= 64 for ids in own)
    assert [i for ids in own for i in ids[1:-1]] == whole[1:-1]


def test_ids_are_cut_at_the_limit_and_get_nothing(gpt2):
    pieces, _ = Work([ROWS], gpt2, max_tokens=4).pieces(next(shards(documents([list(range(10, 20))]), 1)))
    assert [piece.tokens.id.tolist() for piece in pieces] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]


def test_a_long_document_without_spaces_is_cut_between_characters(gpt2):
    work = Work([ROWS], gpt2, max_tokens=8)
    pieces, failures = work.pieces(next(shards(documents(["日本語の文章は空白がない" * 4]), 1)))
    assert not failures
    ids = [i for piece in pieces for i in piece.tokens.id.tolist()[1:]]
    assert ids == work.view.encode("日本語の文章は空白がない" * 4, None)[0][1:]
    text = gpt2.tokenizer.decode(pieces[0].tokens.id.tolist()[1:])
    assert "\ufffd" not in text and text


def test_cutting_goes_back_to_a_word_in_the_second_half_only():
    text = "ab cdef"
    letters = [(i, i + 1) for i in range(len(text))]
    assert cut(letters, text, 5) == [slice(0, 3), slice(3, 7)]  # before c, which follows white space
    assert cut(letters, text, 6) == [slice(0, 6), slice(6, 7)]  # c is in the first half
    assert cut([None, *letters], text, 20) == [slice(0, 8)]


def test_a_text_of_any_length_is_cut_at_the_context(gpt2, tmp_path):
    run = lp.run_corpus([ROWS], gpt2, ["word " * 130], tmp_path / "run", progress=False)
    counts = run.results[0].token.prompt.bincount()
    assert run.complete and len(counts) == run.prompts and counts.max() <= 64


# Failures


def test_a_text_that_cannot_be_read_is_recorded_and_left_out(gpt2, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "A cat."}\n{"text": \n\xff\xfe\n{"body": "A dog."}\n'
        b'{"text": null}\n{"text": ""}\n{"text": "A cow."}\n'
    )
    run = lp.run_corpus([ROWS], gpt2, path, tmp_path / "run", **QUIET)
    assert run.complete and run.prompts == 2
    table = run.failures.set_index("text")["reason"]
    assert list(table.index) == [1, 2, 3, 4, 5]
    assert table[1].startswith("line 2 is not JSON") and table[2].startswith("line 3 is not JSON")
    assert table[3] == "it must have a 'text'; got the fields body"
    assert table[4] == "it must be a text, an lp.Prompt or token ids; got None"
    assert "must not be empty" in table[5]
    assert "2 prompts" in repr(run) and "5 texts and 0 shards failed" in repr(run)
    same(run.results[0], lp.run_corpus([ROWS], gpt2, path, tmp_path / "run", **QUIET).results[0])


def test_a_line_that_is_not_utf_8_is_recorded(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"A cat.\n\xe9t\xe9\nA cow.\n")
    found = list(documents(path))
    assert found[1].prompt is None and found[1].problem.startswith("line 2 is not UTF-8")


def _measure_fussily(probe, reading):
    if (reading.tokens.id == 77).any():
        raise ValueError("no token may be\n77")
    return _MEASURE(probe, reading)


_MEASURE = lp.ResidualMean.measure


def test_a_text_that_cannot_be_measured_is_found_in_its_batch_and_left_out(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(lp.ResidualMean, "measure", _measure_fussily)
    texts = [[5, 6, n] for n in range(70, 90)]
    run = lp.run_corpus([lp.ResidualMean()], gpt2, texts, tmp_path / "run", progress=False, shard_size=20)
    assert run.complete and run.prompts == 19
    assert run.failures.values.tolist() == [[7, 0, "ValueError: no token may be 77"]]
    monkeypatch.undo()
    expected = lp.ResidualMean().run(gpt2, [text for text in texts if 77 not in text], progress=False)
    torch.testing.assert_close(run.results[0].mean, expected.mean)


def test_a_shard_that_fails_three_times_is_reported_and_the_rest_goes_on(gpt2, tmp_path, monkeypatch):
    measure, tries = Work.measure, []

    def measure_but_one(work, shard, *others):
        if shard.number == 3:
            tries.append(shard.number)
            raise MemoryError("too little\nmemory")
        return measure(work, shard, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "measure", measure_but_one)
        run = lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "run", **QUIET)
    assert tries == [3, 3, 3] and run.shards == 5 and run.all_shards == 6 and not run.complete
    assert run.failed_shards.values.tolist() == [[3, 2, "MemoryError: too little memory"]]
    assert "1 shard failed" in repr(run) and run.results[0].provenance.n_prompts == 9
    run = lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "run", **QUIET)  # which tries it again
    assert run.complete and not len(run.failed_shards)


def test_a_shard_that_fails_at_first_is_tried_again(gpt2, tmp_path, monkeypatch, whole):
    measure, tries = Work.measure, itertools.count()

    def measure_at_last(work, shard, *others):
        if shard.number == 3 and next(tries) < 2:
            raise MemoryError
        return measure(work, shard, *others)

    monkeypatch.setattr(Work, "measure", measure_at_last)
    assert all_same(lp.run_corpus([*SUMS, ROWS], gpt2, TEXTS, tmp_path / "run", **QUIET), whole)


def test_where_nothing_can_be_measured_the_run_ends_early(gpt2, tmp_path, monkeypatch):
    passes = []

    def fail(probe, reading):
        passes.append(1)
        raise TypeError("a mistake in a probe")

    monkeypatch.setattr(lp.ResidualMean, "measure", fail)
    monkeypatch.setattr(running, "ATTEMPTS", 1)
    texts = [[5, 6, n] for n in range(10, 90)]
    with pytest.raises(RuntimeError, match=r"got none so far \((ValueError: )?TypeError: a mistake"):
        lp.run_corpus([lp.ResidualMean()], gpt2, texts, tmp_path / "run", progress=False, shard_size=10)
    assert len(passes) == 3 * 16  # of three shards: of the whole, of halves and so on, until eight texts have failed


def test_where_nothing_can_be_read_the_run_ends_early(gpt2, tmp_path):
    with pytest.raises(RuntimeError, match=r"got none so far \(it must have a 'text'; got the fields sentence"):
        lp.run_corpus(SUMS, gpt2, [{"sentence": "A cat."}] * 1000, tmp_path / "run", progress=False)


# The folder


def test_a_last_line_that_was_cut_short_is_left_out(gpt2, copied, whole):
    manifest = copied / "manifest.jsonl"
    lines = manifest.read_bytes()
    for torn in (1, len(lines.splitlines()[-1])):
        manifest.write_bytes(lines[:-torn])
        assert lp.open_run(copied).shards == 5
        assert all_same(go_on(copied, gpt2), whole)
        assert manifest.read_bytes().count(b"\n") == lines.count(b"\n")


@pytest.mark.parametrize(
    "line",
    ["not JSON", "[]", '{"shard": "1"}', '{"shard": -1, "key": "", "texts": 1}', '{"shard": 1, "key": 2, "texts": 1}'],
)
def test_a_damaged_line_is_named(line, copied):
    manifest = copied / "manifest.jsonl"
    manifest.write_text(f"{line}\n{manifest.read_text()}")
    with pytest.raises(
        ValueError, match=r"line 1 of .* is damaged .*: delete this line, and its shard is measured again"
    ):
        lp.open_run(copied)


def test_a_result_that_was_deleted_is_measured_again(gpt2, copied, whole):
    (copied / "2_RankShift" / "00000004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the files of the run in .* must be complete: call run_corpus again"):
        _ = lp.open_run(copied).results
    assert all_same(go_on(copied, gpt2), whole)


def test_a_file_that_no_line_counts_is_not_read(copied, uninterrupted):
    manifest = copied / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))  # killed before it was written
    so_far = lp.open_run(copied)
    assert so_far.shards == uninterrupted.shards - 1
    assert so_far.results[0].provenance.n_prompts == so_far.prompts == uninterrupted.prompts - 1


@pytest.mark.usefixtures("groups_of_four")
def test_what_dead_processes_left_is_removed_by_the_next_run_and_what_groups_replace_too(gpt2, tmp_path):
    folder = tmp_path / "run"
    texts = MANY[:5]
    run = lp.run_corpus(SUMS, gpt2, texts, folder, progress=False, shard_size=1)
    before = sorted(path.name for path in folder.rglob("*"))
    for name in (".run.json.part", "0_ResidualMean/.00000003.safetensors.99.part", "0_ResidualMean/.tmpAb12Cd"):
        (folder / name).write_text("half")
    (folder / "0_ResidualMean" / "00000003.safetensors").write_text("the group has it")
    assert lp.open_run(folder).results[0].provenance.n_prompts == 5
    again = lp.run_corpus(SUMS, gpt2, texts, folder, progress=False, shard_size=1)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert all_same(run, again.results)


def test_a_folder_in_use_is_refused_and_what_lives_in_it_stays(gpt2, copied):
    folder = copied
    with writing(folder):
        alive = folder / "0_ResidualMean" / ".00000009.safetensors.1.part"
        alive.write_text("half")
        with pytest.raises(
            RuntimeError, match=f"one call at a time; got a second one, while process {os.getpid()} of "
        ):
            go_on(folder, gpt2)
        with pytest.raises(RuntimeError, match="one call at a time"):
            lp.delete_run(folder)
        assert alive.exists() and lp.open_run(folder).complete
    assert not alive.exists()


def test_a_worker_that_outlives_its_driver_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ENDING", 0)  # as if the driver were killed
    (begin, told_to_begin), (joined, told_joined), (end, told_to_end) = os.pipe(), os.pipe(), os.pipe()
    worker = os.fork()
    if not worker:
        os.read(begin, 1)
        with joining(tmp_path):
            os.write(told_joined, b"!")
            os.read(end, 1)
        os._exit(0)
    with writing(tmp_path):
        os.write(told_to_begin, b"!")
        os.read(joined, 1)
        left = tmp_path / ".run.json.part"
        left.touch()
    assert left.exists()  # it may be the worker's
    with pytest.raises(RuntimeError, match="one call at a time"), writing(tmp_path):
        pass
    os.write(told_to_end, b"!")
    os.waitpid(worker, 0)
    with writing(tmp_path):
        assert not left.exists()
    for each in (begin, told_to_begin, joined, told_joined, end, told_to_end):
        os.close(each)


def test_a_call_waits_for_the_workers_that_it_ends_so_that_the_next_finds_the_folder_free(tmp_path):
    begin, told_to_begin = os.pipe()
    worker = os.fork()
    if not worker:
        os.read(begin, 1)
        with joining(tmp_path):
            time.sleep(0.3)
        os._exit(0)
    with writing(tmp_path):
        os.write(told_to_begin, b"!")
        time.sleep(0.1)
    with writing(tmp_path):
        pass
    os.waitpid(worker, 0)
    os.close(begin)
    os.close(told_to_begin)


def test_a_full_disk_is_said_in_one_sentence_and_nothing_is_lost(gpt2, tmp_path, monkeypatch, whole):
    write, count = Path.write_bytes, itertools.count()

    def write_some(path, content):
        if next(count) >= 10:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_some)
        with pytest.raises(
            OSError, match=r"folder .* is on a full disk: make room; what is done is kept, and the same"
        ) as full:
            lp.run_corpus([*SUMS, ROWS], gpt2, TEXTS, tmp_path / "run", **QUIET)
        assert "\n" not in str(full.value)
    assert lp.open_run(tmp_path / "run").shards == 3
    assert not list((tmp_path / "run").rglob(".*"))
    assert all_same(lp.run_corpus([*SUMS, ROWS], gpt2, TEXTS, tmp_path / "run", **QUIET), whole)


def test_a_disk_that_is_full_at_the_manifest_leaves_no_half_line(gpt2, tmp_path, monkeypatch):
    sync, count = os.fsync, itertools.count()

    def sync_some(opened):
        if "manifest" in os.readlink(f"/proc/self/fd/{opened}") and next(count) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(opened)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync_some)
        with pytest.raises(OSError, match="is on a full disk"):
            lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "run", **QUIET)
    assert lp.open_run(tmp_path / "run").shards == 2
    assert lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "run", **QUIET).complete


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "is on a read-only disk: name one that you may write to"),
        (errno.EACCES, "must be one that you may"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(number, message, gpt2, copied, monkeypatch):
    opened = os.open

    def refuse(path, flags, *others, **more):
        if flags & (os.O_RDWR | os.O_WRONLY) and str(path).startswith(str(copied)):
            raise OSError(number, os.strerror(number))
        return opened(path, flags, *others, **more)

    monkeypatch.setattr(os, "open", refuse)  # a mode would not keep root, which containers run tests as, from writing
    with pytest.raises(OSError, match=message) as refused:
        go_on(copied, gpt2)
    assert "\n" not in str(refused.value)
    assert lp.open_run(copied).complete


def test_a_disk_without_locks_is_refused(gpt2, tmp_path, monkeypatch):
    import fcntl

    def refuse(opened, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="folder must be on a disk with file locks; got"):
        lp.run_corpus(SUMS, gpt2, TEXTS, tmp_path / "run", **QUIET)


def test_a_run_is_deleted_with_nothing_else(uninterrupted, tmp_path):
    for stranger in (False, True):
        shutil.copytree(uninterrupted.folder, tmp_path / "run")
        if stranger:
            (tmp_path / "run" / "notes.txt").write_text("mine")
        lp.delete_run(tmp_path / "run")
        assert (tmp_path / "run").exists() == stranger
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["notes.txt"]
    with pytest.raises(FileNotFoundError, match="a run must be a folder that run_corpus made"):
        lp.delete_run(tmp_path)


def test_a_run_without_a_result_says_so(gpt2, tmp_path):
    folder = WritableFolder(tmp_path)
    folder.begin({"probes": ["ResidualMean()"]})
    run = lp.open_run(tmp_path)
    assert run.shards == run.prompts == 0 and run.all_shards is None and not run.complete
    with pytest.raises(ValueError, match="must have a shard that is done; got none so far"):
        _ = run.results


def test_what_is_held_does_not_grow_with_the_corpus(gpt2, tmp_path):
    held = []
    gc.freeze()  # so that only new objects are gone through

    def texts():
        for i in range(1, 101):
            if i % 20 == 0:
                gc.collect()
                held.append(sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor))
            yield f"A cat saw {100 + i}."

    lp.run_corpus([lp.ResidualMean()], gpt2, texts(), tmp_path / "run", progress=False, shard_size=10)
    gc.unfreeze()
    assert max(held[2:]) < held[2] + 10_000  # bytes; a result has 2,000


def test_a_bar_shows_tokens_and_can_be_turned_off(gpt2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(running, "tqdm", lambda tqdm=running.tqdm, **how: tqdm(**{**how, "delay": 0, "mininterval": 0}))
    lp.run_corpus(SUMS, gpt2, TEXTS[:4], tmp_path / "one", shard_size=2)
    shown = capsys.readouterr().err
    assert "token/s" in shown and "100%" in shown
    lp.run_corpus(SUMS, gpt2, TEXTS[:4], tmp_path / "two", **QUIET)
    assert capsys.readouterr().err == ""


# The command


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(lp, "load_model", lambda name, device: tiny.bridge(name))


def _command(tmp_path, *more):
    probes = ["--probe", "RankShift(layers=[0, -1], metric='dot')", "--probe", "ResidualMean"]
    return ["corpus", str(tmp_path / "a.jsonl"), "--folder", str(tmp_path / "run"), "--model", "gpt2", *probes, *more]


@pytest.mark.usefixtures("tiny_model")
def test_the_command_measures_a_corpus_and_its_exit_code_tells_of_failures(tmp_path, capsys):
    path = _written(tmp_path / "a.jsonl", '{"text": "A cat."}\n{"text": "A dog barked."}\n')
    assert main(_command(tmp_path, "--shard-size", "1")) == 0
    printed = capsys.readouterr()
    assert "2 of 2 shards, 2 prompts" in printed.out and "open_run(" in printed.out
    ranks, _ = lp.open_run(tmp_path / "run").results
    assert ranks.provenance.probe == repr(lp.RankShift(layers=[0, -1], metric="dot"))
    assert main(_command(tmp_path, "--shard-size", "2")) == 2
    assert "same shard_size; got 2" in capsys.readouterr().err
    lp.delete_run(tmp_path / "run")
    path.write_text('{"text": "A cat."}\n{"body": "A dog barked."}\n')
    assert main(_command(tmp_path)) == 1
    assert "it must have a 'text'" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_model")
def test_an_interrupted_command_has_an_exit_code_of_its_own(tmp_path, capsys, monkeypatch):
    _written(tmp_path / "a.jsonl", '{"text": "A cat."}\n{"text": "A dog barked."}\n')
    for n, message in ((0, "interrupted before the first shard"), (1, "interrupted after 1 shard:")):
        with monkeypatch.context() as patch:
            interrupted_after(n, patch)
            assert main(_command(tmp_path, "--shard-size", "1")) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("NoSuchProbe", "--probe must be one of AttentionPair, "),
        ("print('x')", "--probe must be one of AttentionPair, "),
        ("__import__('os').system('true')", "--probe must be one of AttentionPair, "),
        ("RankShift(", "--probe must be a name or a call such as LogitLens(top_k=0)"),
        ("RankShift(neighbours=-1)", "RankShift(neighbours=...) must be a whole number, 0 or more; got -1"),
        ("RankShift(neighbors=1)", "did you mean neighbours?"),
        ("Summary", "--probe must have all its settings; got 'Summary' ("),
    ],
)
def test_a_probe_of_the_command_is_a_probe_and_nothing_else(probe, message, tmp_path, capsys):
    assert main(["corpus", "a.txt", "--folder", str(tmp_path / "run"), "--probe", probe]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lens_probes: ") and message in error and "\n" not in error


def test_the_help_of_the_command_says_what_its_exit_codes_mean(capsys):
    with pytest.raises(SystemExit):
        main(["corpus", "--help"])
    assert "Exit code 0: every text was measured" in " ".join(capsys.readouterr().out.split())
