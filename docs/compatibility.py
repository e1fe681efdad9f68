"""The page of model families x probes, made of docs/compatibility.json, which benchmarks/compatibility.py writes."""

import html
import re
from typing import Any

from cards import asked, folder

MARKS = {"right": ("right", "●"), "refused": ("refused", "–"), "wrong": ("wrong", "✗"), "error": ("error", "!")}
INTRO = """# Compatibility

Which probes are right on which models. `make compatibility` builds every architecture that TransformerLens names from
Hugging Face's own classes, with a tiny configuration and random weights, and runs every probe and experiment on it.

- **right** (●): the values are finite and within their declared bounds, and a padded batch gives the numbers of single
  prompts. For `LogitLens` the last layer has the log-probabilities and ranks of the model's own logits. An experiment
  has finite values within their bounds.
- **refused** (number): the probe raises before it gives numbers that it cannot promise. The number is that of the
  reason below the table.
- **error** (!): it stops with an error of a library where a refusal should stand. No number is given.
- **wrong** (✗): a number that is not what it says.

`make test-all` fails if a cell that is right here is not right any more. Random weights say nothing about language;
what must hold for every model can be tested on them. Weights are raw, and padding is on the right.
"""


def page(releases: list[dict[str, Any]]) -> str:
    """The whole page, the newest release first."""
    parts = [INTRO]
    if releases:
        names = ["transformer-lens", "transformers", "torch", "python"]
        parts.append("| TransformerLens | transformers | torch | Python | architectures |\n|---|---|---|---|---|")
        for each in releases[::-1]:
            cells = [each["versions"][name] for name in names]
            parts[-1] += f"\n| {' | '.join([*cells, str(len(each['families']))])} |"
    for release in releases[::-1]:
        versions = release["versions"]
        parts.append(f"## TransformerLens {versions['transformer-lens']}, transformers {versions['transformers']}")
        reasons: dict[str, int] = {}
        parts.append(f"```{{raw}} html\n{grid(release['families'], reasons)}\n```")
        if reasons:
            parts.append(f"### Why ({versions['transformer-lens']}, {versions['transformers']})")
            parts.append("\n".join(f"{n}. {_plain(reason)}" for reason, n in reasons.items()))
        if release["absent"]:
            parts.append(f"### Not built ({versions['transformer-lens']}, {versions['transformers']})")
            parts.append("| architecture | why |\n|---|---|")
            parts[-1] += "".join(f"\n| `{name}` | {_plain(why)} |" for name, why in release["absent"].items())
    return "\n\n".join(parts) + "\n"


def grid(families: dict[str, dict[str, str]], reasons: dict[str, int]) -> str:
    """A table in HTML: families down, probes across; reasons get numbers as they come up."""
    names = [name for name in asked() if any(name in cells for cells in families.values())]
    links = [f'<a href="{folder(asked()[name])}/{name}.html">{name}</a>' for name in names]
    head = "".join(f'<th scope="col"><span>{link}</span></th>' for link in links)
    rows = []
    for family, cells in families.items():
        shown = "".join(_cell(cells.get(name, ""), reasons) for name in names)
        rows.append(f'<tr><th scope="row">{html.escape(family)}</th>{shown}</tr>')
    body = "\n".join(rows)
    return (
        f'<div class="grid"><table><thead><tr><th scope="col">architecture</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(outcome: str, reasons: dict[str, int]) -> str:
    state, _, reason = outcome.partition(": ")
    if not outcome:
        return '<td title="not run"></td>'
    kind, mark = MARKS[state]
    if reason:
        number = reasons.setdefault(reason, len(reasons) + 1)
        mark = str(number) if kind == "refused" else f"{mark} {number}"
    title = html.escape(f"{kind}: {reason}" if reason else kind, quote=True)
    return f'<td class="{kind}" title="{title}">{mark}</td>'


def _plain(text: str) -> str:
    """One line of Markdown without marks: names in backticks stay code."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else re.sub(r"([_*\[<])", r"\\\1", part) for i, part in enumerate(parts))
