"""The notebooks as pages: their verdicts first, then cells and outputs as they are stored. Nothing is run."""

import base64
import html
import json
import re
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
CLAIMS = runpy.run_path(str(ROOT / "benchmarks" / "claims.py"))
FENCE = "`" * 6


def write(name: str, folder: Path, repository: str = "") -> None:
    """The page of one notebook, and its figures beside it."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    title, rest = title_of(cells[0])
    parts = [f"# {title}", *badge(name, repository), *verdicts(name), rest]
    for number, cell in enumerate(cells[1:], start=1):
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(f"{FENCE}python\n{source}\n{FENCE}")
            parts += [shown(each, folder, f"{name}-{number}-{i}") for i, each in enumerate(cell["outputs"])]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def title_of(cell: dict[str, Any]) -> tuple[str, str]:
    """The title of a notebook, and what its first cell says below it."""
    first, _, rest = "".join(cell["source"]).strip().partition("\n")
    if cell["cell_type"] != "markdown" or not first.startswith("# "):
        raise ValueError(f"a notebook must begin with its title, '# ...'; got {first!r}: add one")
    return first.removeprefix("# "), rest.strip()


def badge(name: str, repository: str) -> list[str]:
    """A link that opens the notebook in Colab, if the repository is on GitHub and its address is known."""
    if "github.com/" not in repository:
        return []
    path = repository.partition("github.com/")[2].strip("/")
    address = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}.ipynb"
    return [f"[Open in Colab]({address})"]


def verdicts(name: str) -> list[str]:
    """The claims that the notebook tests, with verdict, number, n and null."""
    rows = CLAIMS["rows_of"](NOTEBOOKS / f"{name}.ipynb")
    if not rows:
        return []
    lines = ["| claim | model | verdict | measured | n | null |", "|---|---|---|---|---|---|"]
    for row in rows:
        words = f"{row['claim']}: {CLAIMS['CLAIMS'][row['claim']]}"
        cells = [words, *(row[column] for column in CLAIMS["COLUMNS"][1:])]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return ["## Verdicts", "\n".join(lines)]


def shown(output: dict[str, Any], folder: Path, name: str) -> str:
    """One output: a figure as its stored PNG, or drawn by Plotly in the browser; a table; or text."""
    if output.get("name") == "stderr":  # progress and warnings of the machine that ran it
        return ""
    data = output.get("data", {})
    plotly = data.get("application/vnd.plotly.v1+json")
    if "image/png" in data:
        (folder / f"{name}.png").write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"```{{image}} {name}.png\n:alt: {figure_title(plotly)}\n:class: figure\n```"
    if plotly:
        figure = json.dumps({"data": plotly["data"], "layout": plotly["layout"]}).replace("</", "<\\/")
        height = plotly["layout"].get("height", 500)
        return (
            f'{FENCE}{{raw}} html\n<div class="plotly" id="{name}" role="img" aria-label="{figure_title(plotly)}" '
            f'style="min-height: {height}px"></div>\n<script src="../_static/plotly.min.js"></script>\n'
            f"<script>(figure => Plotly.newPlot('{name}', figure.data, figure.layout, {{displaylogo: false}}))"
            f"({figure})</script>\n{FENCE}"
        )
    if "text/html" in data:
        text = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
        text = "\n".join(line for line in text.splitlines() if line.strip())
        return f'{FENCE}{{raw}} html\n<div class="output">{text}</div>\n{FENCE}'
    text = "".join(data.get("text/plain") or output.get("text") or []).rstrip()
    return f"{FENCE}text\n{text}\n{FENCE}" if text else ""


def figure_title(plotly: dict[str, Any] | None) -> str:
    """What a figure shows, in one line."""
    title = ((plotly or {}).get("layout", {}).get("title") or {}).get("text") or "figure"
    words = html.unescape(re.sub(r"<[^>]*>", " ", title)).split()
    return html.escape(" ".join(words), quote=True)


def index(names: list[str]) -> str:
    """The gallery: each notebook with what it asks and its verdicts."""
    parts = [
        "# Notebooks",
        "Each notebook follows one question to its verdicts, which are reported regardless of the outcome. Outputs are "
        "those of the stored run. [One table has all claims](/claims.md).",
    ]
    for name in names:
        title, rest = title_of(json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0])
        rows = CLAIMS["rows_of"](NOTEBOOKS / f"{name}.ipynb")
        parts += [f"## [{title}]({name}.md)", rest.split("\n\n")[0]]
        if rows:
            found: dict[str, list[str]] = {}
            for row in rows:
                found.setdefault(row["claim"], []).append(f"{row['model']}: {row['verdict']}")
            lines = [f"- **{id_}** {CLAIMS['CLAIMS'][id_]} *{'; '.join(own)}*" for id_, own in found.items()]
            parts.append("\n".join(lines))
    parts.append("```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```")
    return "\n\n".join(parts) + "\n"
