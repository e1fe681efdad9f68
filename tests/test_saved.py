"""Saved results: whatever is changed in a file, it loads and is drawn, or is refused in a sentence that names it."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import lens_probes as lp
from lens_probes.result import FORMAT, Result
from lens_probes.testing import TOPICS

TEXT = "Time flies like an arrow."
SAVED = lp.demo.saved()

pytestmark = pytest.mark.usefixtures("as_users_run_it")

ASKED: dict[str, Callable[[Any], Any]] = {
    "RankShift": lambda model: lp.RankShift(neighbours=2, overlap=2).run(model, TEXT),
    "LogitLens": lambda model: lp.LogitLens(target=[3, 4], layers=[2]).run(model, TEXT),
    "DirectLogitAttribution": lambda model: lp.DirectLogitAttribution().run(model, TEXT),
    "AttentionPatterns": lambda model: lp.AttentionPatterns(keep_patterns=True).run(model, TEXT),
    "HeadTopicSimilarity": lambda model: lp.HeadTopicSimilarity(keep_vectors=False).run(model, TOPICS),
    "TopicActivity": lambda model: lp.TopicActivity().run(model, TOPICS),
    "TopicAblation": lambda model: lp.TopicAblation(k=2, draws=2).run(model, TOPICS, progress=False),
    "InputReconstruction": lambda model: lp.InputReconstruction(1, steps=2).run(model, TEXT, progress=False),
    "PositionReach": lambda model: lp.PositionReach(projections=2).run(model, TEXT, progress=False),
    "MaxActivatingTokens": lambda model: lp.MaxActivatingTokens(1, [2], steps=2).run(model, TEXT, progress=False),
    "read_vector": lambda model: lp.read_vector(model, torch.eye(32)[:2], bottom_k=2),
}


class Parts:
    """What a file of a result holds, to be written again with changes."""

    def __init__(self, result: Result, path: Path) -> None:
        result.save(path)
        self.path = path
        with safe_open(path, "pt") as file:
            self.metadata: dict[str, str] = file.metadata()
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.plain: dict[str, Any] = json.loads(self.metadata["plain"])

    def write(self, **changes: Any) -> None:
        """The file anew; a change is to a tensor, or to a label."""
        tensors = self.tensors | {name: each for name, each in changes.items() if isinstance(each, Tensor)}
        plain = self.plain | {name: each for name, each in changes.items() if not isinstance(each, Tensor)}
        self.write_text(json.dumps(plain), tensors)

    def write_text(self, plain: str, tensors: dict[str, Tensor] | None = None) -> None:
        """The file anew with this text for its labels."""
        save_file(tensors or self.tensors, self.path, metadata=self.metadata | {"plain": plain})


@pytest.fixture
def ranks(gpt2: Any, tmp_path: Path) -> Parts:
    return Parts(ASKED["RankShift"](gpt2), tmp_path / "ranks.safetensors")


def changed_labels(plain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every label of another kind, of another number, or with another text in its first place."""
    for name, value in plain.items():
        yield from ({name: wrong} for wrong in (None, 5, True, "abc", [], [1], ["a", "b", "c"], {"a": 1}))
        if isinstance(value, list) and value:
            yield {name: value[:-1]}
            yield {name: value + value[:1]}
            yield {name: ["other" if isinstance(value[0], str) else 10**6, *value[1:]]}
            yield {name: list(range(len(value)))}
        if isinstance(value, dict):
            yield from ({name: value | {each: wrong}} for each in value for wrong in (None, [], 3.5, ["a"]))


def changed_tensors(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Every tensor of another shape or kind, and whole numbers far outside of what they count."""
    for name, tensor in tensors.items():
        yield {name: tensor[None].contiguous()}
        yield {name: tensor > 0 if tensor.dtype != torch.bool else tensor.float()}
        if tensor.ndim and len(tensor):
            yield {name: tensor[1:].clone()}
        if tensor.dtype == torch.int64 and tensor.numel():
            for wrong in (-1, 10**6, -(10**6), 2**62):
                first = tensor.clone()
                first.view(-1)[0] = wrong
                yield {name: first}
                yield {name: torch.full_like(tensor, wrong)}


@pytest.mark.parametrize(
    "asked",
    [
        each if each in ("LogitLens", "TopicActivity") else pytest.param(each, marks=pytest.mark.matrix)
        for each in ASKED
    ],
)
def test_a_changed_file_can_be_drawn_or_is_refused_by_its_name(asked, gpt2, tmp_path):
    parts = Parts(ASKED[asked](gpt2), tmp_path / "changed.safetensors")
    refused = 0
    for change in (*changed_labels(parts.plain), *changed_tensors(parts.tensors)):
        parts.write(**change)
        try:
            result = Result.load(parts.path)
        except ValueError as error:
            refused += 1
            if "changed.safetensors" not in str(error):
                raise
            continue
        result.to_frame()
        with only_sentences():
            result.figure()
    assert refused > 50


@contextmanager
def only_sentences() -> Iterator[None]:
    """Let pass what our own code refuses, by a statement that raises, and nothing else."""
    try:
        yield
    except ValueError as error:
        *_, last = walked(error)
        if "lens_probes" not in last.f_code.co_filename:
            raise


def walked(error: BaseException) -> Iterator[Any]:
    """The frames that an error came through."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def test_a_file_cut_or_scrambled_anywhere_loads_or_is_refused_by_its_name(ranks):
    whole = ranks.path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        garbled = bytearray(whole)
        for place in random.integers(0, len(whole) // 4, 3):  # the header, mostly
            garbled[place] = int(random.integers(256))
        ranks.path.write_bytes(bytes(garbled))
        try:
            Result.load(ranks.path)
        except ValueError as error:
            if "ranks.safetensors" not in str(error):
                raise


@pytest.mark.parametrize("deep", ["[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 100_000, '{"layer": ' + "[" * 5000])
def test_labels_in_a_thousand_brackets_are_refused(deep, ranks):
    ranks.write_text(deep)
    with pytest.raises(
        ValueError, match=r"ranks.safetensors (is not a lens_probes result|does not fit a RankShiftRes)"
    ):
        Result.load(ranks.path)


@pytest.mark.parametrize("plain", ["[]", "5", "null", '"text"', "NaN", "9" * 10_000])
def test_labels_that_are_no_table_are_refused(plain, ranks):
    ranks.write_text(plain)
    with pytest.raises(
        ValueError, match=r"ranks.safetensors (is not a lens_probes result|does not fit a RankShiftRes)"
    ):
        Result.load(ranks.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "abc"}, "layer cannot be 'abc'"),
        ({"layer": [0, 1, 2]}, r"layer cannot be \(0, 1, 2\)"),
        ({"layer": ["0_mid", "1_mid"]}, "rank has 3 entries on axis 'layer', and the labels .* have 2"),
        ({"token.text": list(range(18))}, r"token\.text cannot be \(0, 1, "),
        ({"at": "resid"}, "at cannot be 'resid'"),
        ({"n_vocab": 400.0}, r"n_vocab cannot be 400\.0"),
        ({"n_vocab": True}, "n_vocab cannot be True"),
        ({"centered": 1}, "centered cannot be 1"),
        ({"provenance": {"model": 5}}, "model cannot be 5"),
        ({"vocab": {}}, "neighbour_ids has the entry .*, and vocab has no text for it"),
        ({"vocab": []}, r"vocab cannot be \(\)"),
        ({"vocab": {"x": "a"}}, "invalid literal for int"),
        ({"vocab": {"5": 5}}, r"vocab cannot be \{5: 5\}"),
        ({"rank": torch.zeros(3, 18)}, r"rank cannot be a tensor \(3, 18\) of torch\.float32"),
        (
            {"token.id": torch.zeros(18, 1, dtype=torch.int64)},
            r"token\.id cannot be a tensor \(18, 1\) of torch\.int64",
        ),
        ({"neighbour_ids": torch.full((3, 18, 2), 400)}, "neighbour_ids has the entry 400, and vocab has no text for"),
        ({"neighbour_ids": torch.full((3, 18, 2), -2)}, "neighbour_ids has the entry -2"),
        ({"token.prompt": torch.arange(18).flip(0)}, "the tokens of its prompts are not end to end"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_labels_of_another_kind_or_number_and_ids_outside_the_vocabulary_are_refused(change, message, ranks):
    ranks.write(**change)
    with pytest.raises(ValueError, match=f"ranks.safetensors does not fit a RankShiftResult .*{message}"):
        Result.load(ranks.path)


@pytest.mark.parametrize(
    ("asked", "change", "message"),
    [
        ("DirectLogitAttribution", {"head": ["a", "b"]}, "component for every head, .* L0a is missing"),
        ("DirectLogitAttribution", {"layer": []}, "component for every head, .* every one is missing"),
        ("LogitLens", {"target": [3, 400]}, r"vocabulary of 400; got texts of \d+ ids and target \(3, 400\)"),
        ("LogitLens", {"n_vocab": 3}, r"vocabulary of 3; got texts of \d+ ids"),
        (
            "HeadTopicSimilarity",
            {"topic": ["animals", "food", "x"]},
            "the topic of each prompt must be one of 'animals', 'food'.*got 'law'",
        ),
        (
            "TopicAblation",
            {"chosen_layer": torch.full((3, 2), 3)},
            "chosen_layer goes from 3 to 3, and layer has 3 ent",
        ),
        ("InputReconstruction", {"found_text.text": ["a"]}, "a text for every token; got 1 texts for 18 tokens"),
        ("PositionReach", {"pair.key": torch.full((171,), 18)}, "and key 18 in prompt 0, which has 18 tokens"),
        (
            "AttentionPatterns",
            {"pair.query": torch.full((171,), -1)},
            "got query -1 and key 0 in prompt 0",
        ),
        (
            "InputReconstruction",
            {"token.prompt": torch.ones(18, dtype=torch.int64)},
            "token is of prompt 1, and the pr",
        ),
    ],
)
def test_labels_that_do_not_go_together_are_refused(asked, change, message, gpt2, tmp_path):
    parts = Parts(ASKED[asked](gpt2), tmp_path / "changed.safetensors")
    parts.write(**change)
    with pytest.raises(ValueError, match=f"changed.safetensors does not fit a .*{message}"):
        Result.load(parts.path)


def test_a_result_without_provenance_is_drawn(gpt2, tmp_path):
    for asked in ("InputReconstruction", "MaxActivatingTokens"):
        parts = Parts(ASKED[asked](gpt2), tmp_path / "changed.safetensors")
        parts.write(provenance={})
        assert "an activation not named" in Result.load(parts.path).figure().layout.title.text


# The format, and who may read a file


def test_a_newer_format_is_refused_and_one_is_told_to_update(ranks):
    save_file({"unknown": torch.zeros(1)}, ranks.path, metadata=ranks.metadata | {"format": "lens_probes result 12"})
    message = rf"ranks.safetensors has format 12 and this version reads format {FORMAT}: update lens-probes"
    with pytest.raises(ValueError, match=message):
        Result.load(ranks.path)


def test_an_older_format_is_refused_and_one_is_told_what_to_do(ranks):
    save_file({"unknown": torch.zeros(1)}, ranks.path, metadata=ranks.metadata | {"format": "lens_probes result 1"})
    with pytest.raises(ValueError, match=rf"has format 1 and this version reads format {FORMAT}: run the probe again"):
        Result.load(ranks.path)


@pytest.mark.parametrize(
    "says", ["lens_probes result 0", "lens_probes result -1", "lens_probes result", "result 1", "1"]
)
def test_what_is_no_format_of_ours_is_refused(says, ranks):
    save_file(ranks.tensors, ranks.path, metadata=ranks.metadata | {"format": says})
    with pytest.raises(ValueError, match=f"is not a lens_probes result: its format is '{says}'"):
        Result.load(ranks.path)


def test_all_saved_files_of_this_format_load_and_are_drawn():
    files = sorted(SAVED.glob("*.safetensors"))
    assert len(files) >= 20
    for file in files:
        Result.load(file).figure()


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_saved_file_has_the_permissions_of_any_new_file(mask, expected, ranks, tmp_path):
    result = Result.load(ranks.path)
    before = os.umask(mask)
    try:
        for path in (tmp_path / "new", ranks.path):  # a new file, and one that is replaced
            result.save(path)
            assert stat.S_IMODE(path.stat().st_mode) == expected
    finally:
        os.umask(before)
