"""Methods of results that are asked with the wrong kind of thing say in one sentence what they want."""

import inspect
import traceback
from typing import Any

import pytest
import torch

import lens_probes as lp
from lens_probes.result import Result

TEXT = "Time flies like an arrow, not like a banana."
WRONG = ("nowhere", None, 1.5, [0], True, -1, 99, torch.tensor([0, 1]), {}, object())
GOOD = {"token": 1, "layer": 1, "head": 1, "prompt": 0, "unit": 2, "k": 3, "heads": [(1, 1)], "first": 0}
GOOD |= {"statistic": "first", "of": "log_prob", "metric": "cosine", "component": "L1H1"}
ASKED = {
    "ranks": lambda model: lp.RankShift(neighbours=2).run(model, TEXT),
    "lens": lambda model: lp.LogitLens().run(model, TEXT),
    "components": lambda model: lp.DirectLogitAttribution().run(model, TEXT),
    "attention": lambda model: lp.AttentionPatterns(keep_patterns=True).run(model, TEXT),
    "similarity": lambda model: lp.HeadTopicSimilarity().run(model, [TEXT, "The old man."]),
    "pair": lambda model: lp.AttentionPair(-1, [1, 2]).run(model, TEXT),
    "reconstruction": lambda model: lp.InputReconstruction(1, steps=2).run(model, TEXT, progress=False),
    "reach": lambda model: lp.PositionReach(projections=2).run(model, TEXT, progress=False),
    "features": lambda model: lp.MaxActivatingTokens(1, [2], steps=2).run(model, TEXT, progress=False),
    "vectors": lambda model: lp.read_vector(model, torch.eye(32)[:2]),
}
METHODS = ("figure", "top", "embedding_path", "square", "similarity", "tokens_of_interest", "of_component")

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture
def ranks(gpt2: Any) -> Any:
    return ASKED["ranks"](gpt2)


@pytest.mark.parametrize("asked", ASKED)
def test_a_wrong_kind_of_argument_is_refused_by_us_and_not_by_a_library(asked, gpt2):
    result, refused = ASKED[asked](gpt2), 0
    for name, method in inspect.getmembers(result, inspect.ismethod):
        if name.startswith(METHODS):
            known = {each: GOOD[each] for each in inspect.signature(method).parameters if each in GOOD}
            for each in known:
                for wrong in WRONG:
                    try:
                        method(**known | {each: wrong})
                    except (TypeError, ValueError) as error:
                        refused += 1
                        at = traceback.extract_tb(error.__traceback__)[-1]
                        if "lens_probes" not in at.filename or not (at.line or "").startswith("raise"):
                            raise
    assert refused >= 6


@pytest.mark.parametrize(
    ("asked", "arguments", "message"),
    [
        ("figure_paths", {"token": 1.5}, r"token must be a whole number; got 1\.5$"),
        ("figure_paths", {"prompt": "arrow"}, "prompt must be a whole number; got 'arrow'$"),
        ("figure_paths", {"token": True}, "token must be a whole number; got True$"),
        ("figure_neighbours", {"token": [0]}, r"token must be a whole number; got \[0\]$"),
        ("to_frame", {"name": ["rank"]}, r"to_frame takes the name of one tensor, such as 'rank'; got \['rank'\]$"),
    ],
)
def test_what_is_no_whole_number_or_no_name_is_refused_with_what_came(asked, arguments, message, ranks):
    with pytest.raises(TypeError, match=message):
        getattr(ranks, asked)(**arguments)


def test_one_result_is_not_merged_and_one_is_told_how_to_merge_two(ranks):
    message = r"takes a list of results; got one RankShiftResult: write RankShiftResult\.merge\(\[result, other\]\)"
    for merge in (ranks.merge, lp.RankShiftResult.merge):
        with pytest.raises(TypeError, match=message):
            merge(ranks)
    with pytest.raises(TypeError, match="takes a list of results; got one int"):
        Result.merge(5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"merge takes results of one kind, Result; got str"):
        Result.merge("ab")  # pyright: ignore[reportArgumentType]
    several: Any = (each for each in [ranks, ranks])
    assert len(lp.RankShiftResult.merge(several).token) == 2 * len(ranks.token)


def test_layers_and_heads_are_named_by_number_or_label_and_titles_name_them_once(gpt2):
    attention, similarity, pair = (ASKED[name](gpt2) for name in ("attention", "similarity", "pair"))
    draws = (
        (attention.figure_head, "of L1H2, prompt 0"),
        (similarity.figure_topics, "two topics, L1H2"),
        (similarity.figure_prompts, "(cosine), L1H2"),
        (similarity.figure_values, "of L1H2 per prompt"),
        (pair.figure_terms, "L1H2, prompt 0"),
    )
    for draw, named in draws:
        first, *others = (draw(layer, head) for layer, head in ((1, 2), ("1", "H2"), ("1", 2), (1, "2")))
        assert named in first.layout.title.text and all(each == first for each in others)
    assert attention.figure_heads([(1, "H2"), ("2", 3)]).layout.annotations[1].text == "L2H3"
    assert torch.equal(pair.written(gpt2, "1", "H2"), pair.written(gpt2, 1, 2))


# A word in place of a position


def test_a_word_that_a_prompt_has_once_stands_for_its_last_token(ranks):
    token = ranks.token
    last = [i for i, text in enumerate(token.text) if token.word[i] == token.word[token.text.index(" f")]][-1]
    assert "".join(token.text[i] for i in range(len(token)) if token.word[i] == token.word[last]).strip() == "flies"
    assert token.row(0, "flies") == last
    assert ranks.figure_paths(token="flies") == ranks.figure_paths(token=last)
    assert ranks.figure_neighbours("flies").data == ranks.figure_neighbours(last).data


def test_figures_of_all_probes_of_tokens_take_a_word(gpt2):
    for asked in ("lens", "components", "attention"):
        result = ASKED[asked](gpt2)
        at = result.token.row(0, "flies")
        draw = result.figure_trajectories if asked == "lens" else result.figure_token
        layer = {"layer": 1} if asked == "attention" else {}
        one, other = (draw(token=token, **layer) for token in ("flies", at))
        assert [trace.to_json() for trace in one.data] == [trace.to_json() for trace in other.data]


@pytest.mark.parametrize(("word", "times"), [("nowhere", 0), ("like", 2), ("", 0), ("fl", 0)])
def test_a_word_that_a_prompt_lacks_or_has_twice_is_refused_with_the_positions(word, times, ranks):
    message = (
        f"token must be a position, or a word that the prompt has once; got '{word}', which prompt 0 has {times} times"
    )
    with pytest.raises(ValueError, match=f"{message}: pass a position, 0 to {len(ranks.token) - 1}"):
        ranks.figure_paths(token=word)
