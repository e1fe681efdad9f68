"""What the page costs in a browser: `python benchmarks/page.py` prints ratios, all from this one run, and sizes.

Needs Playwright and Chromium (`BROWSER_PATH` names another browser). The page is of sixteen sentences of about 15
tokens of SmolLM2 with all probes of texts, the yardstick a file with one plain Plotly figure: the logit lens of its
first sentence, the grid that the page shows too. Rounds alternate both. A page is there when all in sight is drawn.

    first paint   from the address to the first frame with it, against the same of the figure
    a click       on a token, to the first frame in which all panels in sight show it, against drawing the figure anew
                  with other numbers
    an arrow key  the same, from the token to the next
                  (with the processor slowed down, since both would be done within one frame)
    size          of the page without Plotly's script; at most 4 MB
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from plotly.offline import get_plotlyjs

import lens_probes as lp
from lens_probes.__main__ import _probes

ROUNDS = 9
SENTENCES = 16
SIZE = {"width": 1300, "height": 900}
SLOWER = 20  # times, for clicks and keys

# Asked in every frame, so that both sides are timed alike: from the address to the first frame in which it holds.
DRAWN = {
    "page": "document.body?.dataset.ready && !document.body.dataset.drawing && document.querySelector('.panel svg')",
    "figure": "document.querySelector('.heatmaplayer image')",
}
WATCH = """
const watch = () => {
  if (%s) globalThis.drawnAt = performance.now();
  else requestAnimationFrame(watch);
};
watch();
"""
FRAMES = """
async (act) => {
  const frame = () => new Promise(requestAnimationFrame), start = performance.now();
  await (%s)(act);
  do await frame(); while (document.body.dataset.drawing);
  return performance.now() - start;
}
"""
ACTS = {
    "click": "(number) => document.getElementById(`token-${number}`).click()",
    "key": """(number) => document.getElementById("strip")
        .dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }))""",
    "redraw": """async (number) => {
        const chart = document.querySelector(".js-plotly-plot"), [trace] = chart.data;
        const z = trace.z.map((row) => [...row].map((value) => value - number));
        await Plotly.react(chart, [{ ...trace, z }], chart.layout);
    }""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    model = lp.load_model("smollm2-135m")
    texts = lp.demo.sentences()[:SENTENCES]
    of_topics = (lp.HeadTopicSimilarity, lp.TopicActivity)
    probes = [probe for probe in _probes(lp.ModelView(model), texts) if not isinstance(probe, of_topics)]
    results = lp.run(probes, model, texts)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.html" for name in DRAWN}
        written = lp.page(results, files["page"])
        lens = next(each for each in results if isinstance(each, lp.LogitLensResult))
        lens.figure().write_html(files["figure"])
        seconds = timed(files, rounds)
    tokens = len(results[0].token) / SENTENCES
    size = (len(written.html.encode()) - len(get_plotlyjs().encode())) / 1e6
    print(
        f"{SENTENCES} sentences of {tokens:.0f} tokens, {len(results)} results: {size:.1f} MB beside Plotly's script\n"
    )
    print("| measured | against | ratio | range | target |")
    print("|---|---|---|---|---|")
    told("first paint", "that of the figure", seconds["page"], seconds["figure"], 2)
    for act in ("click", "key"):
        told(act, "drawing the figure anew", seconds[act], seconds["redraw"], 0.5)


def timed(files: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round."""
    found: dict[str, list[float]] = {name: [] for name in (*DRAWN, *ACTS)}
    with sync_playwright() as playwright:
        path = os.environ.get("BROWSER_PATH") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for number in range(rounds + 1):
            for name, file in files.items():
                context = browser.new_context(viewport=SIZE, offline=True)  # pyright: ignore[reportArgumentType]
                tab = context.new_page()
                took = opened(tab, name, file)
                acts = ("click", "key") if name == "page" else ("redraw",)
                context.new_cdp_session(tab).send("Emulation.setCPUThrottlingRate", {"rate": SLOWER})
                own = {name: took} | {act: done(tab, act) for act in acts}
                context.close()
                if number:  # the first round warms up
                    for each, milliseconds in own.items():
                        found[each].append(milliseconds)
        browser.close()
    return found


def opened(tab: Page, name: str, file: Path) -> float:
    """From the address to the first frame in which all is drawn."""
    tab.add_init_script(WATCH % DRAWN[name])
    tab.goto(f"file://{file}")
    while not (milliseconds := tab.evaluate("globalThis.drawnAt ?? 0")):  # wait_for_function needs eval
        time.sleep(0.1)
    return float(milliseconds)


def done(tab: Page, act: str) -> float:
    """The median of a few acts of a kind."""
    times: list[Any] = [tab.evaluate(FRAMES % ACTS[act], number) for number in range(1, 6)]
    return statistics.median(times)


def told(what: str, against: str, own: list[float], other: list[float], target: float) -> None:
    ratios = [one / two for one, two in zip(own, other, strict=True)]
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"| {what} | {against} | {statistics.median(ratios):.2f} | {span} | at most {target} |")


if __name__ == "__main__":
    main()
