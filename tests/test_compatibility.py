"""Model families x probes: what the table says is measured, and nothing that was right is not right any more."""

import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import lens_probes as lp

ROOT = Path(__file__).parent.parent
made = runpy.run_path(str(ROOT / "benchmarks" / "compatibility.py"))
STORED = made["nearest"](made["read"]())
FAMILIES = sorted(STORED["families"]) if STORED else []


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return lp.tiny.bridge()


def test_every_probe_and_experiment_is_asked_of_a_family(gpt2):
    found = {name: made["outcome"](name, gpt2) for name in ("RankShift", "LogitLens", "CrossAttention", "TunedLens")}
    assert found.pop("CrossAttention").startswith("refused: cross-attention needs an encoder-decoder")
    assert set(found.values()) == {"right"}
    assert set(made["ASKED"]) <= set(made["names"]()) and len(made["names"]()) >= 26


def test_a_cell_is_wrong_where_a_number_is(gpt2):
    whole = lp.ResidualUpdate.measure

    def spoiled(value):
        def measure(probe, reading):
            result = whole(probe, reading)
            result.cosine[...] = value(reading)
            return result

        return mock.patch.object(lp.ResidualUpdate, "measure", measure)

    with spoiled(lambda reading: 1.5):
        assert made["outcome"]("ResidualUpdate", gpt2).startswith("wrong: 'cosine' must be -1")
    with spoiled(lambda reading: torch.inf):
        assert made["outcome"]("ResidualUpdate", gpt2).startswith("wrong: 'cosine' must be finite")
    with spoiled(lambda reading: 1 / len(reading.tokens)):  # it depends on the batch
        assert "differs from that of single prompts" in made["outcome"]("ResidualUpdate", gpt2)


def test_a_cell_is_wrong_where_the_last_layer_is_not_the_models_own(gpt2):
    lens = lp.LogitLens().run(gpt2, "Time flies like an arrow.")
    made["agrees_with_logits"](lens, gpt2)
    lens.log_prob[-1] -= 0.1
    with pytest.raises(AssertionError, match=r"own log-probabilities; they differ by 0\.1"):
        made["agrees_with_logits"](lens, gpt2)
    lens.log_prob[-1] += 0.1
    lens.rank[-1] += 1
    with pytest.raises(AssertionError, match="own ranks; 100% differ"):
        made["agrees_with_logits"](lens, gpt2)


def test_an_error_that_is_not_ours_is_no_refusal(gpt2):
    def fails(error):
        def hooks(probe, model):
            raise error

        return mock.patch.object(lp.ResidualUpdate, "hooks", hooks)

    with fails(ValueError("of this test")):  # raised in this file, outside of the package
        assert made["outcome"]("ResidualUpdate", gpt2) == "error: ValueError: of this test"
    with fails(KeyError("blocks.0")):
        assert made["outcome"]("ResidualUpdate", gpt2) == "error: KeyError: 'blocks.0'"


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("AttentionWindow", "DeepseekV2ForCausalLM", "right"),
        ("HeadAblation", "DeepseekV3ForCausalLM", "right"),
        ("TiedKeyValue", "Glm4MoeLiteForCausalLM", "refused: the attention of layer 0 of this model must have one W_K"),
        (
            "TiedKeyValue",
            "JambaForCausalLM",
            "refused: the attention of layer 0 of this model must have one W_K per head",
        ),
        ("MaxActivatingTokens", "BambaForCausalLM", "right"),
        (
            "TopicAblation",
            "Ernie4_5_MoeForCausalLM",
            "refused: the neurons of layer 1 of this model must have an activation",
        ),
        ("AttentionPair", "Llama4ForCausalLM", "refused: this model must rotate queries and keys as GPT-NeoX or GPT-J"),
        ("AttentionPair", "AfmoeForCausalLM", "refused: softmax(q.k) must reproduce the attention pattern of layer 0"),
    ],
)
def test_what_is_rare_in_a_family_is_right_or_refused(name, family, expected):
    assert made["asked_of"](family, made["build"](family), [name], progress=False)[name].startswith(expected)


def test_a_cell_gets_worse_if_it_was_right_or_turns_from_refused_to_wrong():
    before = {"A": "right", "B": "right", "C": "refused: x", "D": "refused: x", "E": "error: y"}
    now = {"A": "right", "B": "refused: z", "C": "right", "D": "error: z", "E": "error: z", "New": "error: z"}
    assert list(made["worse"](before, now)) == ["B was right, is refused: z", "D was refused: x, is error: z"]


def test_a_run_is_held_against_the_same_releases_or_the_last_of_its_line():
    own = made["versions"]()
    line = own["transformer-lens"][0]
    runs = [{"versions": own | {"transformers": "1"}}, {"versions": own}, {"versions": own | {"transformers": "99"}}]
    assert made["nearest"](runs) is runs[1]
    assert made["nearest"](runs[::2]) is runs[2]
    assert made["nearest"]([{"versions": own | {"transformer-lens": f"{int(line) + 1}.0"}}]) is None


def test_every_family_of_the_table_has_a_right_cell_or_says_why_not():
    for release in made["read"]():
        for family, cells in release["families"].items():
            assert cells and all(cell == "right" or ": " in cell for cell in cells.values()), family


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_no_cell_is_worse_than_in_the_table(family):
    before = STORED["families"][family]
    now = made["asked_of"](family, made["build"](family), progress=False)
    assert list(made["worse"](before, now)) == []
