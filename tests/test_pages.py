"""The page in a real browser: it follows clicks and keys, shows the results' numbers, and no text in it acts."""

import json
import os
import re
import shutil
import time
from importlib.resources import files
from urllib.parse import parse_qs
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from jaxtyping import Float
from plotly.offline import get_plotlyjs
from torch import Tensor

import lens_probes as lp
from lens_probes import LayerTokenResult, measured
from lens_probes.examples import tiny
from lens_probes.pages import document, packed, packing
from lens_probes.pages.packing import numbers

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[dev]'")

TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana.", "The cat sat on the mat and the dog ran."]
TOPICS = {"animals": ["The cat sat.", "A dog ran away.", "The cow ate."], "food": ["The bread rose.", "A soup boiled."]}
MATRIX = pytest.mark.matrix
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=2'>"
LINK = "<a href='javascript:window.hit=3'>x</a>"
NASTY = [HOSTILE, LINK, "\u2028\u2029\x00\x1b", "\u202e\u05e9\u05dc\u05d5\u05dd", "{{scripts}}", "\ud800"]


class TokenLengthResult(LayerTokenResult):
    """What somebody's own probe declares."""

    length: Float[Tensor, "layer token"] = measured("my own length", low=0)
    by_head: Float[Tensor, "layer head token"] = measured("my number per head", low=0)
    head: tuple[str, ...]


class TokenLength(lp.Probe[TokenLengthResult]):
    """Somebody's own probe."""

    def hooks(self, model):
        return model.states("resid_post", None)

    def measure(self, reading):
        length = reading.stack().norm(dim=-1)
        heads = torch.arange(1, reading.model.n_heads + 1)[:, None]
        return self.result(reading, length=length, by_head=length[:, None] * heads)


class SummedLengthResult(LayerTokenResult):
    """A result with a derived quantity, which counts how often it is computed."""

    length: Float[Tensor, "layer token"] = measured("my own length", low=0)
    times = 0

    @lp.derived("mean of it", low=0)
    def mean(self) -> Float[Tensor, " layer"]:
        """The mean length."""
        type(self).times += 1
        return self.length.mean(1)

    def findings(self) -> list[str]:
        type(self).times += 1
        return ["Everything is long."]


class SummedLength(lp.Probe[SummedLengthResult]):
    """Somebody's own probe."""

    def hooks(self, model):
        return model.states("resid_post", None)

    def measure(self, reading):
        return self.result(reading, length=reading.stack().norm(dim=-1))


@pytest.fixture(scope="module")
def results():
    model = tiny.bridge("llama")
    probes = [
        lp.RankShift(neighbours=4),
        lp.LogitLens(top_k=3),
        lp.DirectLogitAttribution(),
        lp.AttentionPatterns(keep_patterns=True),
        TokenLength(),
    ]
    return [*lp.run(probes, model, TEXTS), lp.HeadTopicSimilarity().run(model, TOPICS)]


@pytest.fixture(scope="module")
def units():
    return lp.MaxActivatingExamples(k=3, sample=6, context=2).run(tiny.bridge("llama"), TEXTS)


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("BROWSER_PATH") or shutil.which("chromium")
    if path is None:
        pytest.skip("needs a browser: install chromium, or name one in BROWSER_PATH")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    lp.page(results, path)
    return path


@pytest.fixture(scope="module")
def window(browser):
    """One window for all tests: loading the drawing library takes longest. What goes wrong in it is collected."""
    # No smooth scrolling: what is clicked must not move.
    context = browser.new_context(viewport={"width": 1300, "height": 900}, offline=True, reduced_motion="reduce")
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    tab.wrong = []
    tab.on("console", lambda message: tab.wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
    tab.on("request", lambda asked: tab.wrong.append(asked.url) if not asked.url.startswith(LOCAL) else None)
    yield tab
    context.close()


LOCAL = ("file:", "data:", "blob:", "about:")


@pytest.fixture
def open_page(window, file):
    """Opens the page anew with a selection in its address; nothing may have gone wrong by the end."""
    window.wrong.clear()
    window.set_viewport_size({"width": 1300, "height": 900})

    def opened(fragment="", path=file):
        window.goto("about:blank")
        window.goto(f"file://{path}#{fragment}")
        window.wait_for_selector("body[data-ready]")
        return window

    yield opened
    assert window.wrong == []


def settled(page):
    """Waits until the page has noticed what is in sight, which takes it a frame, and has drawn it."""
    page.evaluate("() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(go))))")
    page.locator("body:not([data-drawing])").wait_for()


def panel(page, result, title):
    """A panel by the name of its result and its title, in sight and drawn."""
    found = page.get_by_role("article", name=f"{result}: {title}", exact=True)
    found.scroll_into_view_if_needed()
    settled(page)
    found.locator(".body > *").first.wait_for()
    return found


def click_cell(found, cell):
    """Clicks a cell of a panel's grid, by number, in the middle of the window: nothing lies over it there."""
    place = found.locator("svg rect").nth(cell)
    place.evaluate("cell => cell.scrollIntoView({ block: 'center', behavior: 'instant' })")
    settled(found.page)
    place.click(position={"x": 4, "y": 4}, force=True)
    settled(found.page)


def in_sight_one_after_the_other(page):
    """Scrolls through the whole page, so that every panel is drawn."""
    for top in range(0, page.evaluate("document.documentElement.scrollHeight"), 800):
        page.evaluate("top => scrollTo({ top, behavior: 'instant' })", top)
        settled(page)


def table(found):
    """What a panel shows, as its table: rows of texts."""
    settled(found.page)
    if found.locator("details.numbers").get_attribute("open") is None:
        found.locator("summary").click()
    found.locator("details table").first.wait_for()
    return found.locator("details table").evaluate(
        "table => [...table.querySelectorAll('tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )


def _soon(holds):
    """Whether something holds within five seconds."""
    return any(holds() or time.sleep(0.05) for _ in range(100))


def number(text):
    return float(text.replace(",", "").replace("−", "-")) if text != "—" else np.nan


def chosen(page, name):
    """The state of the selection, from the address."""
    return parse_qs(kept(page)).get(name, [""])[0]


def kept(page):
    """The address's fragment, once the page has written it."""
    page.locator("body:not([data-writing])").wait_for()
    return page.evaluate("location.hash").lstrip("#")


# What is written


def test_rounded_numbers_are_within_half_a_step_and_others_exact():
    random = np.random.default_rng(0)
    for values, coarse in ((random.normal(size=50_000), False), (random.random(5000), True)):
        values[7] = np.nan
        sent = numbers(values, coarse=coarse)
        codes = _unpacked(sent)
        assert codes[7] == sent["missing"] and np.isnan(values[7])
        (low,), (step,) = sent["low"], sent["step"]
        assert np.nanmax(np.abs(np.delete(low + step * codes - values, 7))) <= step / 2 * 1.001
        span = np.nanmax(values) - np.nanmin(values)
        assert step == pytest.approx(span / (254 if coarse else 65534), rel=1e-2)
    few, whole = random.normal(size=100), np.array([0.0, 70_000.0, np.nan, -5.0])
    assert _unpacked(numbers(few)).tolist() == few.astype("float32").tolist()
    assert _unpacked(numbers(whole)).tolist() == [0, 70_000, -(2**31), -5]


def test_heads_are_rounded_in_steps_of_their_own():
    values = np.stack([np.linspace(0, 1, 70), np.linspace(-500, 500, 70), np.full(70, np.nan)])
    sent = numbers(values, coarse=True, groups=3)
    back = np.array(sent["low"])[:, None] + np.array(sent["step"])[:, None] * _unpacked(sent).reshape(3, 70)
    assert sent["step"][:2] == pytest.approx([1 / 254, 1000 / 254]) and (_unpacked(sent)[140:] == 255).all()
    assert np.abs(back - values)[0].max() <= 1 / 508 * 1.001 and np.abs(back - values)[1].max() <= 1000 / 508 * 1.001


def _unpacked(sent):
    import base64
    import zlib

    return np.frombuffer(zlib.decompress(base64.b64decode(sent["data"])), np.dtype(sent["type"]).newbyteorder("<"))


def test_packed_data_are_json_and_name_what_is_not_drawn(results):
    data = packed(results)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    by_name = {each["name"]: each for each in data["results"]}
    assert [each["name"] for each in by_name["TokenLength"]["quantities"]] == ["length", "by_head"]
    assert len(data["texts"]) == 1 and len(data["texts"][0]["text"]) == len(results[0].token)
    mean = lp.ResidualMean().run(tiny.bridge("llama"), TEXTS)
    assert packed(mean)["results"][0]["left_out"][0].startswith("embed_mean [d_model]: no labels for d_model")


def test_tokens_of_a_part_of_the_prompts_places_stand_in_the_whole(results):
    last = lp.LogitLens(positions=[-1]).run(tiny.bridge("llama"), TEXTS)
    for given in ([results[0], last], [last, results[0]]):
        data = packed(given)
        (text,) = data["texts"]
        own = next(each for each in data["results"] if each["name"] == "LogitLens")["tokens"]["token"]
        assert [text["id"][row] for row in own["rows"]] == last.token.id.tolist()
        assert [text["position"][row] for row in own["rows"]] == last.token.position.tolist()


def test_a_page_computes_derived_quantities_and_findings_once():
    result = SummedLength().run(tiny.bridge("llama"), TEXTS)
    SummedLengthResult.times = 0
    assert packed(result)["results"][0]["findings"] == ["Everything is long."]
    result.page()
    assert SummedLengthResult.times == 3  # the derived one for each of the two pages, findings once


def pairs_of(result, prompt):
    return (result.pair.prompt == prompt).nonzero().flatten()


@pytest.fixture
def few_pairs(results, monkeypatch):
    """Room for the attention of two heads."""
    monkeypatch.setattr(packing, "MOST_PAIRS", 2 * results[3].attention.shape[-1] + 1)


def test_of_too_many_heads_a_page_holds_those_asked_for_and_those_with_the_highest_means(results, few_pairs):
    attention = results[3]
    sink = divmod(int(attention.mean_of("first_token").argmax()), len(attention.head))
    for keep, expected in ((), {sink}), ([(1, "H2")], {(1, 2), sink}), ([(0, 3), ("2", 0)], {(0, 3), (2, 0)}):
        (sent,) = packed(attention, keep=keep)["results"]
        cells = list(map(tuple, sent["cells"]))
        assert len(cells) == 2 and cells == sorted(cells) and expected <= set(cells)
        (own,) = [each for each in sent["quantities"] if each["name"] == "attention"]
        assert own["in_cells"] and own["shape"] == list(attention.attention.shape)
        codes = _unpacked(own["values"]).reshape(2, -1)
        assert len(own["values"]["low"]) == 2  # steps of its own for each head
        back = np.array(own["values"]["low"])[:, None] + np.array(own["values"]["step"])[:, None] * codes
        held = np.stack([attention.attention[cell].numpy() for cell in cells])
        assert np.abs(back - held).max() <= 1 / 500
    assert not packed(attention)["results"][0]["left_out"]
    others = [each for each in sent["quantities"] if each["name"] != "attention"]
    assert others and not any(each["in_cells"] for each in others)


@pytest.mark.parametrize("keep", [[(9, 0)], [(0, "H9")], [("0_post", "x")]])
def test_heads_that_no_result_has_are_refused(keep, results):
    with pytest.raises(ValueError, match=r"keep must be \(layer, head\) or \(layer, unit\) pairs of the results; got "):
        packed(results[3], keep=keep)


def test_where_not_even_one_head_fits_nothing_is_drawn_and_the_page_says_so(results, monkeypatch):
    monkeypatch.setattr(packing, "MOST_PAIRS", 10)
    (sent,) = packed(results[3])["results"]
    assert sent["left_out"][0].startswith("attention [layer head pair]: ") and "too many for a page" in str(sent)
    assert "attention" not in [each["name"] for each in sent["quantities"]]


def test_examples_of_some_units_keep_their_contexts(units, monkeypatch):
    whole = packed(units)["results"][0]
    assert whole["cells"] == []
    monkeypatch.setattr(packing, "MOST", 4 * 64 + 1)  # the histograms of four units
    (sent,) = packed(units, keep=[(1, "N7")])["results"]
    assert len(sent["cells"]) == 4 and [1, 7] in sent["cells"]
    by_name = {each["name"]: each for each in sent["quantities"]}
    example = _unpacked(by_name["example"]["values"]).reshape(4, 3)
    context = _unpacked(by_name["context"]["values"]).reshape(-1, 5).astype(int)
    position = _unpacked(by_name["position"]["values"])
    assert len(context) < len(units.context)
    for (layer, unit), numbers_ in zip(sent["cells"], example.astype(int), strict=True):
        own = units.example[layer, unit]
        assert context[numbers_].tolist() == units.context[own].masked_fill(units.context[own] < 0, 65535).tolist()
        assert position[numbers_].tolist() == units.position[own].tolist()


def test_no_line_of_the_scripts_is_longer_than_120_characters():
    scripts = list(files("lens_probes.pages").joinpath("browser").glob("*.js"))
    assert len(scripts) > 10
    for script in scripts:
        assert [line for line in script.read_text(encoding="utf-8").splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("wrong", [[], None, ["text"], [3]])
def test_what_is_no_result_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=r"a page must (be of results|have a result)|Type-check error"):
        lp.page(wrong)


def test_a_page_is_written_whole_or_not_at_all(results, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    made = results[4].page(path)
    assert path.read_text(encoding="utf-8") == made.html and [each.name for each in tmp_path.iterdir()] == ["page.html"]
    monkeypatch.setattr("os.replace", lambda one, to: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        results[0].page(path)
    assert path.read_text(encoding="utf-8") == made.html and [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_the_policy_allows_the_pages_own_scripts_and_no_network(results):
    page = document(packed(results[4]))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy
    assert "connect-src 'none'" in policy
    ours = page.replace(get_plotlyjs(), "")
    assert "src=" not in ours and "http://" not in ours.replace("http://www.w3.org", "") and "innerHTML" not in ours


# What one sees and does


def test_the_grid_of_the_lens_shows_the_results_numbers(open_page, results):
    page = open_page("prompt=1&token=2")
    lens, rows = results[1], results[1].token.rows(1)
    head, *cells = table(panel(page, "LogitLens", "By layer and token"))
    assert head[:3] == ["layer", "token", "log-probability of the target (nats, at most 0)"]
    shown = np.array([number(cell[2]) for cell in cells]).reshape(len(lens.layer), len(rows))
    assert shown == pytest.approx(lens.log_prob[:, rows].numpy(), rel=1e-3, nan_ok=True)
    top = [[lp.figures.spelled(lens.vocab[int(i)], 12) for i in layer] for layer in lens.top_ids[:, rows, 0]]
    assert [cell[3] for cell in cells] == [text for layer in top for text in layer]


def test_a_click_on_a_token_moves_every_panel(open_page, results):
    page = open_page()
    shift, lens = results[0], results[1]
    page.locator("#token-3").click()
    assert page.locator("#token-3").get_attribute("aria-selected") == "true"
    row = shift.token.rows(0)[3]
    _, *cells = table(panel(page, "RankShift", "The picked token through the layers"))
    assert [number(cell[-1]) for cell in cells] == shift.rank[:, row].tolist()
    _, *cells = table(panel(page, "LogitLens", "Entries at the picked token, by layer"))
    first = lp.figures.spelled(lens.vocab[int(lens.top_ids[-1, row, 0])])
    probability = float(lens.top_log_prob[-1, row, 0].exp())
    assert cells[-1][:3] == [lens.layer[-1], f"{int(lens.rank[-1, row]):,}", f"{first} {probability:.3f}"]


def test_arrow_keys_move_the_token_and_the_layer(open_page, results):
    page = open_page("token=1")
    page.locator("#strip").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert chosen(page, "token") == "3"
    page.keyboard.press("End")
    assert chosen(page, "token") == str(len(results[0].token.rows(0)) - 1)
    before = chosen(page, "layer")
    page.keyboard.press("ArrowUp")
    layers = list(results[1].layer)
    assert layers.index(chosen(page, "layer")) == layers.index(before) - 1
    grid = panel(page, "LogitLens", "By layer and token").locator(".scroll").first
    grid.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert chosen(page, "token") == str(len(results[0].token.rows(0)) - 2)
    assert layers.index(chosen(page, "layer")) == layers.index(before) - 2


@pytest.mark.matrix
def test_a_pinned_entry_is_followed_and_kept_in_the_address(open_page, results):
    page = open_page("token=2")
    lens, row = results[1], results[1].token.rows(0)[2]
    entry = panel(page, "LogitLens", "Entries at the picked token, by layer").locator("button.entry").first
    entry.click()
    settled(page)
    pinned = int(lens.top_ids[0, row, 0])
    assert chosen(page, "pins") == str(pinned)
    head, *cells = table(panel(page, "LogitLens", "Entries followed through layers and tokens"))
    assert len(head) == 2 and head[1].startswith(lp.figures.spelled(lens.vocab[pinned]))
    for layer, cell in enumerate(cells):
        places = (lens.top_ids[layer, row] == pinned).nonzero().flatten().tolist()
        expected = float(lens.top_log_prob[layer, row, places[0]].exp()) if places else np.nan
        assert number(cell[1]) == pytest.approx(expected, rel=2e-3, nan_ok=True)


def test_runs_of_one_probe_are_told_apart_and_each_shows_its_own_nearest_entries(open_page):
    settings = [{"metric": "cosine"}, {"metric": "euclidean"}, {"metric": "dot"}, {"reference": "embed_pos"}]
    runs = lp.run(
        [lp.RankShift("resid_pre", neighbours=3, **each) for each in settings], tiny.bridge("gpt2"), TEXTS[:1]
    )
    page = open_page("token=2")
    page.evaluate("data => lensProbes.show(data)", packed(runs))
    headings = [f"RankShift {n} ({run.conditions()})" for n, run in enumerate(runs, 1)]
    assert page.locator("#contents > li > button").all_text_contents() == headings
    colours = page.get_by_label("colour").locator("option").all_text_contents()
    assert len(set(colours)) == len(colours) and colours[0] == f"{headings[0]}: rank of the token's own entry"
    row, places = runs[0].token.rows(0)[2], set()
    for heading, run in zip(headings, runs, strict=True):
        found = panel(page, heading, "Entries at the picked token, by layer")
        head, *rows = table(found)
        assert head == ["layer", "rank of own token", "1", "2", "3", "own token"]
        assert found.locator("table.entries tbody tr:has(td.own)").count() == len(run.layer)
        own, text = int(run.token.id[row]), lp.figures.spelled(run.token.text[row])
        for layer, cells in enumerate(rows):
            ids, scores = run.neighbour_ids[layer, row].tolist(), run.neighbour_score[layer, row].tolist()
            nearest = [f"{lp.figures.spelled(run.vocab[i])} {score:.3f}" for i, score in zip(ids, scores, strict=True)]
            assert cells[:5] == [run.layer[layer], f"{int(run.rank[layer, row]):,}", *nearest]
            score, rank = cells[5].removeprefix(text).split(", rank ") if cells[5] else ("", "")
            assert (own in ids) == (cells[5] == "")
            if cells[5]:
                assert number(score) == pytest.approx(float(run.score[layer, row]), rel=1e-3)
                assert number(rank) == int(run.rank[layer, row])
            places.add(own in ids)
    assert places == {True, False}
    mean = lp.ResidualMean("resid_pre").run(tiny.bridge("gpt2"), TEXTS[:1], progress=False)
    centred = lp.RankShift("resid_pre", center=mean).run(tiny.bridge("gpt2"), TEXTS[:1], progress=False)
    page.evaluate("data => lensProbes.show(data)", packed([runs[0], centred]))
    assert page.locator("#results h2").all_text_contents() == ["RankShift 1", "RankShift 2 (centred)"]


def test_a_pinned_entry_is_followed_through_the_tokens_too(open_page, results):
    lens, rows = results[1], results[1].token.rows(0)
    pinned = int(lens.top_ids[2, rows[2], 0])
    page = open_page(f"token=2&layer={lens.layer[2]}&pins={pinned}")
    found = panel(page, "LogitLens", "Entries followed through layers and tokens")
    found.get_by_label("over", exact=True).select_option("tokens")
    head, *cells = table(found)
    assert head[0] == "token" and len(cells) == len(rows)
    for row, cell in zip(rows, cells, strict=True):
        places = (lens.top_ids[2, row] == pinned).nonzero().flatten().tolist()
        expected = float(lens.top_log_prob[2, row, places[0]].exp()) if places else np.nan
        assert number(cell[1]) == pytest.approx(expected, rel=2e-3, nan_ok=True)


@pytest.mark.parametrize("position", [1, 4])
def test_the_null_of_a_path_has_the_band_of_the_tokens_of_its_class(position, open_page, results):
    shift, row = results[0], results[0].token.rows(0)[position]
    page = open_page(f"token={position}")
    found = panel(page, "RankShift", "The picked token through the layers")
    head, *cells = table(found)
    shown = {
        end: [number(cell[i]) for cell in cells]
        for end in ("low", "high")
        for i, name in enumerate(head)
        if name.startswith(f"{end} of null: ")
    }
    classes = np.asarray(shift.token.word_class)
    alike = (classes == classes[row]) & (shift.token.special == shift.token.special[row]).numpy()
    null = shift.known("null_rank")[:, alike]
    null = np.sort(null[:, np.isfinite(null[0])])
    n = null.shape[1]
    tail = 0.0 if n < 20 else 0.05
    assert shown["low"] == null[:, int(tail * (n - 1) + 0.5)].tolist()
    assert shown["high"] == null[:, int((1 - tail) * (n - 1) + 0.5)].tolist()
    assert f"the null of {n} {classes[row]} tokens." in found.locator(".caption").inner_text()


def test_a_click_on_a_head_shows_its_attention(open_page, results):
    page = open_page("token=3&head=H0")
    found = panel(page, "AttentionPatterns", "By layer and head")
    click_cell(found, 2 * 4 + 3)  # layer 2 of 4 heads, head 3
    assert chosen(page, "head") == "H3" and chosen(page, "layer").startswith("2")
    attention = panel(page, "AttentionPatterns", "From token to token, in the picked head")
    assert "L2H3" in attention.locator(".caption").inner_text()
    _, *cells = table(attention)
    square = results[3].pattern(0)[2, 3]
    n = len(square)
    shown = {(cell[0], cell[1].removesuffix(" ◆")): number(cell[2]) for cell in cells}
    assert len(shown) == n * (n + 1) // 2
    names = [f"{lp.figures.spelled(results[3].token.text[i], 14)} {i}" for i in range(n)]
    for query in range(n):
        for key in range(query + 1):
            assert shown[names[query], names[key]] == pytest.approx(float(square[query, key]), abs=1 / 254)


@pytest.mark.matrix
def test_direct_logit_attribution_shows_each_part(open_page, results):
    page = open_page("prompt=2&token=4")
    result = results[2]
    row = result.token.rows(2)[4]
    found = panel(page, "DirectLogitAttribution", "Heads and MLPs at the picked token")
    _, *cells = table(found)
    shown = {(cell[0], cell[1]): number(cell[2]) for cell in cells}
    for layer in result.layer:
        assert shown[layer, "H1"] == pytest.approx(float(result.of_component(f"L{layer}H1")[row]), rel=2e-3, abs=1e-4)
        assert shown[layer, "MLP"] == pytest.approx(
            float(result.of_component(f"L{layer}_mlp")[row]), rel=2e-3, abs=1e-4
        )
    assert "in all" in found.locator(".caption").inner_text()


def test_a_contributed_probe_appears_by_itself(open_page, results):
    page = open_page("token=2")
    own, row = results[4], results[4].token.rows(0)[2]
    head, *cells = table(panel(page, "TokenLength", "The picked token through the layers"))
    assert head[-1].endswith("my own length")
    assert [number(cell[-1]) for cell in cells] == pytest.approx(own.length[:, row].tolist(), rel=1e-3)
    _, *cells = table(panel(page, "TokenLength", "My number per head"))
    shown = np.array([number(cell[2]) for cell in cells]).reshape(len(own.layer), -1)
    assert shown == pytest.approx(own.by_head[:, :, row].numpy(), rel=1e-3)


@pytest.mark.matrix
def test_topics_show_separation_and_the_similarity_of_prompts_in_the_picked_head(open_page, results):
    page = open_page("layer=1_post&head=H2")
    topics = results[5]
    _, *cells = table(panel(page, "HeadTopicSimilarity", "By layer and head"))
    shown = np.array([number(cell[2]) for cell in cells]).reshape(len(topics.layer), -1)
    assert shown == pytest.approx(topics.separation().numpy(), abs=2e-4)
    _, *cells = table(panel(page, "HeadTopicSimilarity", "Cosine between two prompts"))
    shown = np.array([number(cell[2]) for cell in cells]).reshape(5, 5)
    assert shown == pytest.approx(topics.similarity(1, 2).numpy(), abs=2 / 254)


def test_the_pickers_change_prompt_and_colour(open_page, results):
    page = open_page()
    page.get_by_label("prompt", exact=True).select_option("0.2")
    settled(page)
    assert page.locator("#strip .token").count() == len(results[0].token.rows(2))
    assert chosen(page, "prompt") == "2"
    before = page.locator("#token-3").evaluate("token => token.style.background")
    page.get_by_label("colour").select_option(label="LogitLens: entropy of the prediction")
    assert page.locator("#token-3").evaluate("token => token.style.background") != before
    entropy = results[1].entropy[-1, results[1].token.rows(2)[3]]
    said = page.locator("#token-3").get_attribute("title")
    assert said.startswith("entropy of the prediction, 2_post: ")
    assert number(said.split(": ")[1]) == pytest.approx(float(entropy), rel=1e-3)
    page.get_by_label("colour").select_option(label="TokenLength: my number per head")
    for head in (2, 1):  # of the picked head
        page.get_by_label("head", exact=True).select_option(f"H{head}")
        settled(page)
        said = page.locator("#token-3").get_attribute("title").removeprefix(f"my number per head, 2_post H{head}: ")
        expected = results[4].by_head[-1, head, results[4].token.rows(2)[3]]
        assert number(said) == pytest.approx(float(expected), rel=1e-3)


def test_two_prompts_stand_side_by_side_with_their_difference(open_page, results):
    page = open_page("prompt=0&token=2&other=1")
    found = panel(page, "LogitLens", "By layer and token")
    assert found.locator("h4").all_inner_texts() == [
        "this prompt",
        "the other prompt",
        "the other minus this one, by position",
    ]
    lens, (one, other) = results[1], (results[1].token.rows(0)[2], results[1].token.rows(1)[2])
    apart = float(lens.log_prob[0, other] - lens.log_prob[0, one])
    found.locator("svg").nth(2).locator("rect").nth(2).hover()
    page.locator("#tip").wait_for()
    said = page.locator("#tip").inner_text().splitlines()[-1]
    assert number(said.removeprefix("difference: ")) == pytest.approx(apart, rel=2e-3)


@pytest.mark.matrix
def test_attention_paths_and_entries_of_two_prompts_are_compared(open_page, results):
    page = open_page("prompt=0&token=2&other=1&layer=1_post&head=H1")
    shift, lens, attention = results[0], results[1], results[3]
    one, other = lens.token.rows(0)[2], lens.token.rows(1)[2]
    *_, last = table(panel(page, "RankShift", "The picked token through the layers"))
    assert [number(last[1]), number(last[-1])] == [
        float(shift.rank[-1, other] - shift.rank[-1, one]),
        float(shift.rank[-1, one]),
    ]
    rows = table(panel(page, "LogitLens", "Entries at the picked token, by layer"))
    shared = set(lens.top_ids[-1, one].tolist()) & set(lens.top_ids[-1, other].tolist())
    assert rows[-1][:3] == ["the other prompt", lens.layer[-1], str(len(shared))]
    found = panel(page, "AttentionPatterns", "From token to token, in the picked head")
    rows = [row for row in table(found) if row[0] == "the other minus this one, by position"]
    squares = [attention.pattern(prompt)[1, 1] for prompt in (0, 1)]
    n = min(map(len, squares))
    assert len(rows) > 10 and found.locator("svg").count() == 3  # the table has the first 400 rows
    apart = (squares[1][:n, :n] - squares[0][:n, :n])[np.tril_indices(n)].tolist()
    assert [number(row[3]) for row in rows] == pytest.approx(apart[: len(rows)], abs=2 / 254)


def test_of_a_head_that_the_page_does_not_hold_it_names_those_that_it_holds(open_page, results, few_pairs):
    page = open_page("head=H2&layer=0_post&token=2")
    page.evaluate("data => lensProbes.show(data)", packed([results[1], results[3]], keep=[(2, "H3"), (1, "H0")]))
    found = panel(page, "AttentionPatterns", "From token to token, in the picked head")
    assert "The page does not hold L0H2. It holds:" in found.locator(".body").inner_text()
    assert found.locator(".body button").all_inner_texts() == ["L1H0", "L2H3"]
    assert "it holds 2 of 12 heads" in found.locator(".caption").inner_text()
    found.get_by_role("button", name="L2H3").click()
    settled(page)
    assert chosen(page, "head") == "H3" and chosen(page, "layer") == "2_post"
    _, *cells = table(found)
    square = results[3].pattern(0)[2, 3]
    expected = square[np.tril_indices(len(square))].tolist()
    assert [number(cell[2]) for cell in cells] == pytest.approx(expected, abs=1 / 254)


@pytest.mark.matrix
def test_a_text_of_1500_tokens_is_shown_in_windows(open_page, monkeypatch):
    model = tiny.bridge("llama")
    model.cfg.n_ctx = 4096
    ids = torch.randint(4, 200, (1, 1500), generator=torch.Generator().manual_seed(0))
    probes = [lp.LogitLens(top_k=3), lp.RankShift(neighbours=8), lp.AttentionPatterns(layers=[1], keep_patterns=True)]
    lens, _, attention = results = lp.run(probes, model, ids)
    page = open_page()
    data = packed(results)
    assert [each["left_out"] for each in data["results"]] == [[], [], []]
    assert 1 <= len(data["results"][2]["cells"]) < 4
    page.evaluate("data => lensProbes.show(data)", data)
    page.locator("#token-1400").click()
    found = panel(page, "LogitLens", "By layer and token")
    assert "Tokens 1370 to 1429 of 1500" in found.locator(".caption").inner_text()
    _, *cells = table(found)
    assert [number(cell[2]) for cell in cells[:60]] == pytest.approx(lens.log_prob[0, 1370:1430].tolist(), rel=2e-3)
    cell = data["results"][2]["cells"][0][1]
    page.get_by_label("head", exact=True).select_option(f"H{cell}")
    found = panel(page, "AttentionPatterns", "From token to token, in the picked head")
    _, *cells = table(found)
    written = {label.split()[-1] for label in found.locator("svg text[transform]").all_text_contents()}
    assert "1400" in written and not {"1399", "1401"} & written  # the picked one's label has room
    square = attention.pattern(0)[0, cell, 1370:1430, 1370:1430]
    assert [number(each[2]) for each in cells[:60]] == pytest.approx(
        square[np.tril_indices(60)][:60].tolist(), abs=1 / 254
    )
    click = """async (number) => {
      const start = performance.now();
      document.getElementById(`token-${number}`).click();
      while (document.body.dataset.drawing) await new Promise(requestAnimationFrame);
      return performance.now() - start;
    }"""
    assert min(page.evaluate(click, number) for number in (1401, 1402, 1403)) < 2000  # milliseconds, on a busy machine


def test_any_entry_that_the_file_holds_can_be_pinned_by_its_text(open_page, results):
    page = open_page("token=2")
    lens, row = results[1], results[1].token.rows(0)[2]
    pinned = int(lens.top_ids[1, row, 2])  # neither first nor of the last layer
    found = panel(page, "LogitLens", "Entries followed through layers and tokens")
    box = found.get_by_label("pin an entry")
    box.fill("no such entry")
    box.press("Enter")
    found.get_by_role("status").get_by_text("None of the").wait_for()
    box.fill(f"#{pinned}")
    box.press("Enter")
    settled(page)
    assert chosen(page, "pins") == str(pinned)
    head, *cells = table(found)
    assert head[1].startswith(lp.figures.spelled(lens.vocab[pinned]))
    assert number(cells[1][1]) == pytest.approx(float(lens.top_log_prob[1, row, 2].exp()), rel=2e-3)
    text = lens.vocab[int(lens.top_ids[-1, row, 0])]
    found.get_by_label("pin an entry").fill(text)
    found.get_by_label("pin an entry").press("Enter")
    settled(page)
    assert chosen(page, "pins").split(",")[1] == str(int(lens.top_ids[-1, row, 0]))
    found.get_by_role("button", name="let go of").first.click()
    settled(page)
    assert chosen(page, "pins") == str(int(lens.top_ids[-1, row, 0]))


def test_the_examples_of_a_unit_stand_beside_random_tokens(open_page, units):
    page = open_page()
    page.evaluate("data => lensProbes.show(data)", packed(units))
    grid = panel(page, "MaxActivatingExamples", units.quantity("share_above").heading)
    click_cell(grid, 1 * min(64, len(units.unit)) + 5)  # layer 1, unit 5
    assert chosen(page, "unit") == "N5"
    found = panel(page, "MaxActivatingExamples", "Examples of the picked unit")
    assert found.get_by_label("unit", exact=True).input_value() == "N5"
    _, *rows = table(found)
    for title, expected in (("the largest", units.examples(1, "N5")), ("random", units.random_examples(1, "N5"))):
        own = [row for row in rows if row[0].startswith(title)]
        assert [number(row[1]) for row in own] == pytest.approx(expected["activation"].tolist(), abs=0.02)
        assert [number(row[2]) for row in own] == expected["position"].tolist()
        assert [row[4] for row in own] == [lp.figures.spelled(text).replace("·", " ") for text in expected["token"]]
    marked = found.locator("mark").first.text_content()
    assert marked == next(row for row in rows if row[0].startswith("the largest"))[4]
    bars = found.locator(".chart").evaluate("chart => chart.data[0].y")
    assert [n for n in bars if n] == [n for n in units.histogram[1, 5].tolist() if n]


def test_a_click_picks_a_unit_and_a_token_and_the_strip_shows_its_activations(open_page):
    result = lp.UnitActivation(layers=[1]).run(tiny.bridge("llama"), TEXTS)
    page = open_page()
    page.evaluate("data => lensProbes.show(data)", packed(result))
    found = panel(page, "UnitActivation", "Units of the picked layer by token")
    _, *rows = table(found)  # unit, token, number: of the first units
    at, own = 2, result.token.rows(0)
    names, cells = [row[0] for row in rows[:: len(own)]], [number(row[2]) for row in rows[at * len(own) :][: len(own)]]
    assert names[:20] == list(result.figure(1).data[0].y)
    click_cell(found, at * len(own) + 3)
    unit = result.index_of("unit", names[at])
    assert (chosen(page, "unit"), chosen(page, "token")) == (names[at], "3")
    expected = result.activation[0, unit, own].tolist()
    assert cells == pytest.approx(expected, abs=1e-3)
    strip = page.locator("#strip .token").evaluate_all("tokens => tokens.map((token) => token.title)")
    for title, value in zip(strip, expected, strict=True):
        says, _, written = title.rpartition(": ")
        assert says == f"activation of the unit, 1 {names[at]}" and number(written) == pytest.approx(value, abs=1e-3)


def fills(found):
    """The colours of a panel's cells."""
    return (
        found.locator("svg g").first.locator("rect").evaluate_all("all => all.map((one) => one.getAttribute('fill'))")
    )


def test_the_row_of_a_unit_that_does_not_stand_out_has_its_own_colours(open_page):
    result = lp.UnitActivation(layers=[1]).run(tiny.bridge("llama"), TEXTS)
    page, own = open_page(), result.activation[0][:, result.token.rows(0)[1:]]
    page.evaluate("data => lensProbes.show(data)", packed(result))
    found = panel(page, "UnitActivation", "Units of the picked layer by token")
    order = ((own.amax(1) - own.mean(1)) / own.std(1)).argsort(descending=True)
    for name in (result.unit[unit] for unit in order[-2:]):  # of which forty are shown
        found.get_by_label("unit", exact=True).select_option(name)
        settled(page)
        shown = fills(found)
        for _ in range(2):  # all cells are drawn anew in other colours
            page.locator("#theme").click()
            settled(page)
        assert fills(found) == shown and found.locator("svg text[font-weight=bold]").first.text_content() == name


def test_units_of_a_long_text_keep_their_order_and_their_colours_end_at_ordinary_tokens(open_page):
    result = lp.UnitActivation(at="resid_post", layers=[1]).run(tiny.bridge("llama"), [[0, *range(5, 68)]])
    result.activation[..., result.token.special] = 1e5
    result.activation[0, 5, 1] = result.activation[0, 6, 62] = 9.0  # in no window are both
    page = open_page()
    page.evaluate("data => lensProbes.show(data)", packed(result))
    found = panel(page, "UnitActivation", "Units of the picked layer by token")
    for token in (0, 63):
        page.locator("#strip .token").nth(token).click()
        settled(page)
        rows = [row[0] for row in table(found)[1:]][::60]
        assert len(rows) > 5 and rows == list(result.figure(1).data[0].y)[: len(rows)]
    ends = [number(each) for each in found.locator("svg > text").all_text_contents()]
    assert max(ends) <= float(result.activation[..., ~result.token.special].abs().max()) + 1e-3


def test_an_address_keeps_a_unit_of_the_result_that_has_fewer(open_page):
    model = tiny.bridge("llama")
    both = lp.run([lp.UnitActivation(layers=[1]), lp.UnitActivation(at="head", layers=[1])], model, TEXTS)
    page = open_page("unit=H2")
    page.evaluate("data => lensProbes.show(data)", packed(both))
    found = panel(page, "UnitActivation 2 (head)", "Units of the picked layer by token")
    assert found.get_by_label("unit", exact=True).input_value() == "H2"


@pytest.mark.matrix
def test_a_click_on_a_head_shows_its_output_on_each_prompt(open_page, results):
    page = open_page()
    topics = results[5]
    click_cell(panel(page, "HeadTopicSimilarity", "By layer and head"), 1 * 4 + 2)  # layer 1, head 2
    found = panel(page, "HeadTopicSimilarity", "Output of a head on a prompt")
    assert "in L1H2" in found.locator(".caption").inner_text()
    _, *cells = table(found)
    expected = topics.vector[1, 2].flatten()
    step = float(expected.max() - expected.min()) / 254
    assert [number(cell[2]) for cell in cells] == pytest.approx(expected.tolist(), abs=step)


def test_the_strip_is_in_sight_however_many_findings_there_are(open_page, results):
    page = open_page()
    data = packed(results)
    for each in data["results"]:
        each["findings"] = ["A finding of many words. " * 20] * 3
    page.evaluate("data => lensProbes.show(data)", data)
    assert page.locator("#strip").bounding_box()["y"] + page.locator("#token-0").bounding_box()["height"] < 900
    assert page.locator("#findings li").count() == 2
    folded = page.locator("#more-findings")
    assert folded.locator("summary").inner_text() == f"{3 * len(results) - 2} more"
    assert not folded.locator("li").first.is_visible()
    folded.locator("summary").click()
    folded.locator("li").first.wait_for()


def test_an_address_brings_the_selection_back(open_page):
    page = open_page()
    page.locator("#token-4").click()
    page.get_by_label("head", exact=True).select_option("H2")
    found = panel(page, "RankShift", "The picked token through the layers")
    found.get_by_label("beside").select_option("tokens")
    settled(page)
    address = kept(page)
    page = open_page(address)
    assert page.locator("#token-4").get_attribute("aria-selected") == "true"
    assert page.get_by_label("head", exact=True).input_value() == "H2"
    found = panel(page, "RankShift", "The picked token through the layers")
    assert found.get_by_label("beside").input_value() == "tokens"


def test_a_key_that_is_held_down_does_not_outrun_what_browsers_allow(open_page):
    page = open_page("token=1")
    page.evaluate("""() => {
        const write = history.replaceState.bind(history);
        globalThis.writes = 0;
        history.replaceState = (...given) => { writes += 1; write(...given); };
    }""")
    page.locator("#strip").focus()
    begun = time.monotonic()
    for key in ("ArrowRight", "ArrowLeft") * 30 + ("ArrowRight",):
        page.keyboard.press(key)
    took = time.monotonic() - begun
    assert chosen(page, "token") == "2"
    assert 1 <= page.evaluate("writes") <= 2 + took / 0.3  # Safari allows 100 in 30 seconds


@pytest.mark.matrix
@pytest.mark.parametrize(
    "fragment",
    ["prompt=99&token=77&layer=x&head=y&other=z&colour=q&pins=a,b&text=9", "token=-1", "v.r0-grid.q=no", "%zz"],
)
def test_an_address_of_other_data_does_no_harm(fragment, open_page):
    page = open_page(fragment)
    assert page.locator(".token.picked").count() == 1
    assert panel(page, "LogitLens", "By layer and token").locator("svg").count() == 1


def test_new_data_replace_everything_that_was_shown(open_page, results):
    page = open_page("token=2")
    other = packed(lp.RankShift().run(tiny.bridge("llama"), "Another text."), "Another title")
    page.evaluate("data => lensProbes.show(data)", other)
    page.get_by_role("heading", name="Another title").wait_for()
    assert page.locator("#results > section").count() == 1
    assert page.locator("#strip").inner_text().count("Another") == 1
    page.evaluate("data => lensProbes.show(data)", packed(results[5]))  # a result without tokens
    assert page.locator("#strip").is_hidden()


def test_a_corpus_shows_its_word_classes_over_layers(open_page):
    summary = lp.Summary(lp.RankShift()).run(tiny.bridge("llama"), lp.demo.sentences()[:12])
    page = open_page()
    page.evaluate("data => lensProbes.show(data)", packed(summary))
    head, *cells = table(panel(page, "Summary", "Word classes through the layers"))
    medians = summary.by_word_class().query("quantity == 'rank' and word_class == 'content'")["median"]
    (column,) = [i for i, name in enumerate(head) if name.startswith("content (")]
    assert [number(cell[column]) for cell in cells] == pytest.approx(medians.tolist(), rel=1e-3)
    nulls = summary.by_word_class().query("quantity == 'null_rank' and word_class == 'content'")["median"]
    (column,) = [i for i, name in enumerate(head) if name.startswith("content: null")]
    assert [number(cell[column]) for cell in cells] == pytest.approx(nulls.tolist(), rel=1e-3)


@pytest.mark.parametrize("width", [360, pytest.param(768, marks=MATRIX), pytest.param(1300, marks=MATRIX), 2560])
def test_the_page_is_never_wider_than_its_window(width, open_page):
    page = open_page("other=1")
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    page.wait_for_timeout(200)  # the page waits for the end of resizing
    in_sight_one_after_the_other(page)
    assert _soon(lambda: page.evaluate("document.documentElement.scrollWidth") <= width)

    def outside():
        return page.evaluate(
            """() => [...document.querySelectorAll('.panel, .panel header, .controls, .caption, select, .chart')]
            .filter((each) => each.offsetParent && each.getBoundingClientRect().right > innerWidth + 1)
            .map((each) => each.className)"""
        )

    assert _soon(lambda: outside() == []), outside()


def test_dark_follows_the_system_and_a_button(open_page):
    page = open_page()
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    assert _soon(lambda: page.evaluate(ground) != light)
    page.get_by_role("button", name="Light or dark").click()
    assert _soon(lambda: page.evaluate(ground) == light) and chosen(page, "theme") == "light"
    page.emulate_media(color_scheme="light")


def test_every_panel_can_be_saved_as_csv_png_and_svg(open_page, results):
    page = open_page("token=2")
    for title in ("By layer and token", "The picked token through the layers"):
        found = panel(page, "RankShift", title)
        for kind, begins in (("CSV", b"\xef\xbb\xbf"), ("PNG", b"\x89PNG"), ("SVG", b"<svg")):
            with page.expect_download() as saved:
                found.get_by_role("button", name=f"{kind} of").click()
            content = saved.value.path().read_bytes()
            assert content.startswith(begins) and saved.value.suggested_filename.endswith(f".{kind.lower()}")
    _, *rows = table(panel(page, "RankShift", "By layer and token"))
    with page.expect_download() as saved:
        panel(page, "RankShift", "By layer and token").get_by_role("button", name="CSV of").click()
    lines = saved.value.path().read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) == len(rows) + 1 and lines[0].startswith('"layer","token"')


def saved_picture(page, found):
    """A panel as SVG, and the texts in it."""
    with page.expect_download() as saved:
        found.get_by_role("button", name="SVG of").click()
    picture = ElementTree.parse(saved.value.path())
    return picture, ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]


def test_a_panel_that_is_a_table_is_saved_as_a_picture_too(open_page, results, units):
    page = open_page("token=2")
    found = panel(page, "LogitLens", "Entries at the picked token, by layer")
    _, texts = saved_picture(page, found)
    rows = table(found)
    assert (
        texts[0].startswith("LogitLens: ")
        and "Click" not in " ".join(texts)
        and {cell for row in rows for cell in row} <= {"", *texts}
    )
    with page.expect_download() as saved:
        found.get_by_role("button", name="PNG of").click()
    assert saved.value.path().read_bytes().startswith(b"\x89PNG")
    page.get_by_label("compare with").select_option("1")
    _, texts = saved_picture(page, panel(page, "LogitLens", "By layer and token"))
    assert {"this prompt", "the other prompt", "the other minus this one, by position"} <= set(texts)
    page.evaluate("data => lensProbes.show(data)", packed(units))
    found = panel(page, "MaxActivatingExamples", "Examples of the picked unit")
    picture, texts = saved_picture(page, found)
    assert table(found)[1][4] in texts
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}path"))) > 3  # the bars


@pytest.mark.matrix
def test_every_panel_that_shows_something_has_all_three_buttons(open_page):
    page = open_page("token=2")
    for found in page.get_by_role("article").all():
        found.scroll_into_view_if_needed()
        settled(page)
        shown = found.locator(".saves button:visible").all_inner_texts()
        assert shown == ["CSV", "PNG", "SVG"] or found.locator(".nothing").count() == 1
        if "SVG" in shown:
            _, texts = saved_picture(page, found)
            assert len(texts) > 2 and ": " in texts[0]


def test_findings_come_first_with_n_interval_and_null(open_page):
    page = open_page()
    assert page.locator("main > section").first.locator("h2").inner_text() == "Findings"
    said = page.locator("#findings").inner_text()
    assert re.search(r"probability 0\.\d\d \((95 % interval|no interval).*content words.*The null: ", said)
    page.get_by_text("Contents").click()
    page.locator("#contents").get_by_role("button", name="DirectLogitAttribution").click()
    assert page.evaluate("document.activeElement.textContent") == "DirectLogitAttribution"
    page.evaluate("scrollTo({ top: 0 })")
    page.evaluate("document.getElementById('strip').style.minHeight = '230px'")  # as of a long text
    page.locator("#contents").get_by_role("button", name="By layer and head").first.click()
    settled(page)
    strip, title = (page.locator(each).bounding_box() for each in ("#strip", "h3:focus"))
    assert title["y"] >= strip["y"] + strip["height"]


def test_a_link_of_the_contents_arrives_although_panels_on_the_way_are_drawn(open_page):
    page = open_page()
    page.get_by_text("Contents").click()
    page.locator("#contents").get_by_role("button", name="AttentionPatterns", exact=True).click()
    assert _soon(lambda: page.evaluate("!document.body.dataset.drawing"))
    page.wait_for_timeout(600)
    strip, title = (page.locator(each).bounding_box() for each in ("#strip", "h2:focus"))
    assert 0 <= title["y"] - strip["y"] - strip["height"] < 60
    page.mouse.wheel(0, -2000)  # the reader is free to go on
    assert _soon(lambda: page.locator("h2:focus").bounding_box()["y"] > title["y"] + 500)


def test_a_chart_keeps_its_height_and_takes_the_new_width_when_the_window_changes(open_page):
    page = open_page()
    found = panel(page, "RankShift", "The picked token through the layers")
    found.locator(".chart svg").first.wait_for()
    page.set_viewport_size({"width": 400, "height": 800})
    sizes = """panel => {
        const [box, body] = [panel.querySelector('.chart'), panel.querySelector('.body')];
        const drawn = box.querySelector('svg').getBoundingClientRect();
        return box.offsetHeight > 300 && drawn.height === box.offsetHeight && drawn.width === body.clientWidth;
    }"""
    found.scroll_into_view_if_needed()
    assert _soon(lambda: found.evaluate(sizes))
    page.wait_for_timeout(400)
    assert found.evaluate(sizes)


def test_no_text_of_a_prompt_model_or_vocabulary_acts(window, tmp_path):
    results = lp.run(
        [lp.RankShift(neighbours=3), lp.LogitLens(top_k=3), lp.AttentionPatterns(keep_patterns=True)],
        tiny.bridge("llama"),
        TEXTS,
    )
    results.append(
        lp.HeadTopicSimilarity().run(tiny.bridge("llama"), {HOSTILE: TOPICS["food"], NASTY[1]: TOPICS["animals"]})
    )
    results.append(lp.UnitActivation(layers=[1], units=[0, 1]).run(tiny.bridge("llama"), TEXTS))
    results.append(lp.MaxActivatingExamples(layers=[1], units=[0, 1], k=9, sample=9).run(tiny.bridge("llama"), TEXTS))
    for result in results:
        if "token" in vars(result):
            n = len(result.token)
            object.__setattr__(result.token, "text", tuple(NASTY[i % len(NASTY)] for i in range(n)))
            object.__setattr__(result.token, "word_class", (HOSTILE,) * n)
        if "vocab" in vars(result):
            object.__setattr__(result, "vocab", {i: NASTY[i % len(NASTY)] for i in result.vocab})
        object.__setattr__(result.provenance, "model", HOSTILE)
        object.__setattr__(result.provenance, "probe", NASTY[1])
    path = tmp_path / "hostile.html"
    page = lp.page(results, path, title=HOSTILE)
    assert "<script>window.hit" not in page.html and "<img src=x" not in page.html
    window.wrong.clear()
    window.goto(f"file://{path}#other=1")
    window.wait_for_selector("body[data-ready]")
    for found in window.get_by_role("article").all():
        found.scroll_into_view_if_needed()
        found.locator(".body > *").first.wait_for()
        found.locator("summary").click()
    for box in window.get_by_label("pin an entry").all():
        box.fill("img")
    for token in window.locator("#strip .token").all()[:6]:
        token.click()
    window.locator("button.entry").first.click()
    window.locator(".panel svg").first.hover()
    assert window.evaluate("window.hit") is None
    assert window.locator("#results img, #results a, main script").count() == 0
    strip = window.locator("#strip").inner_text()
    assert "</script>" in strip.replace("·", " ") and "\\u2028" in strip and "\\u202e" in strip and "\\u0000" in strip
    assert window.wrong == []


@pytest.mark.matrix
def test_a_page_shows_itself_in_a_notebooks_frame(window, results, tmp_path):
    shown = lp.page([results[0], results[4]])._repr_html_()
    assert shown.startswith('<iframe srcdoc="') and 'sandbox="allow-scripts allow-downloads"' in shown
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><title>notebook</title>{shown}", encoding="utf-8")
    window.wrong.clear()
    window.goto(f"file://{path}")
    frame = window.frame_locator("iframe")
    frame.locator("#token-2").click()
    frame.locator("#token-2[aria-selected=true]").wait_for()
    assert window.wrong == []


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=MATRIX)])
def test_axe_finds_nothing_serious(scheme, open_page):
    axe = files(pytest.importorskip("axe_playwright_python")).joinpath("axe.min.js").read_text(encoding="utf-8")
    page = open_page(f"theme={scheme}")
    in_sight_one_after_the_other(page)
    page.evaluate(axe)
    found = page.evaluate("axe.run().then((found) => found.violations)")
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [
        (each["id"], each["nodes"][0]["html"][:200], each["nodes"][0]["failureSummary"][:300]) for each in serious
    ] == []
