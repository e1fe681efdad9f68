"""Pages of the site that are made of the package itself: one per probe and experiment. No model is loaded.

method card (plain text) --rst--> reStructuredText;  declarations --page--> tables of settings and quantities
"""

import dataclasses
import inspect
import json
import re
import runpy
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import lens_probes as lp
from lens_probes.probe import result_class
from lens_probes.result.schema import Quantity, schema
from lens_probes.settings import plain_type, says

DOCS = Path(__file__).parent
ROOT = DOCS.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASES = ("Probe", "Experiment", "TextExperiment")
RESULTS = ("PairResult", "PatternResult", "TopicResult")  # bases of results that are documented, but not in `lp`


def asked(kind: type = lp.Probe | lp.Experiment) -> dict[str, Any]:  # pyright: ignore[reportArgumentType]
    """Every public probe and experiment by name, or those of one of the two."""
    found = {name: getattr(lp, name) for name in lp.__all__ if name not in BASES}
    return {name: each for name, each in found.items() if isinstance(each, type) and issubclass(each, kind)}


def folder(kind: type) -> str:
    """The folder of a page."""
    return "probes" if issubclass(kind, lp.Probe) else "experiments"


def card(kind: type) -> tuple[str, str]:
    """The question of a method card, and all that follows it."""
    first, _, rest = (sys.modules[kind.__module__].__doc__ or "").strip().partition("\n\n")
    question = " ".join(first.partition(": ")[2].split())
    return question[:1].upper() + question[1:], rest


def own_text(kind: type) -> str:
    """What the docstring of the class adds to the card: its settings and an example."""
    text = inspect.cleandoc(kind.__doc__ or "").removeprefix((sys.modules[kind.__module__].__doc__ or "").strip())
    text = re.sub(r"\n\nSee `\w+`\.$", "", text)
    return re.sub(r"\n\n`layers`: a list of layer numbers.*$", "", text).strip()  # the table of settings says so


def called(kind: type) -> inspect.Signature:
    """How it is made: its settings with their defaults."""
    made = inspect.signature(kind.__init__)
    shown = [each for each in made.parameters.values() if each.name != "self"]
    return made.replace(parameters=shown, return_annotation=inspect.Signature.empty)


# Plain text to reStructuredText

SPAN = re.compile(r"``(.+?)``|`([^`]+)`", re.DOTALL)
LINK = re.compile(
    r"arXiv\s+(?P<paper>\d{4}\.\d{4,5})|(?<![\w/.@-])(?:https?://)?(?P<site>(?:[a-z0-9-]+\.)+(?:com|org|io|pub)\b(?:/[^\s,;)\]]*)?)"
)
BEFORE, AFTER = re.compile(r"[\s\-:/'\"<(\[{]$"), re.compile(r"^[\s'\")\]}>\-/\\:.,;!?]")


def rst(text: str) -> str:
    """A plain text of the package: paragraphs, indented equations, examples, lists, and arguments by name."""
    parts: list[str] = []
    for block in re.split(r"\n[ \t]*\n", inspect.cleandoc(text)):
        first = block.split("\n", 1)[0]
        if first.startswith("    "):
            if parts and parts[-1].startswith(".. code-block:: text"):
                parts[-1] += f"\n\n{block}"
            else:
                parts.append(f".. code-block:: text\n\n{block}")
        elif first.startswith(">>>"):
            parts.append(block)
        elif first in ("Args:", "Returns:", "Raises:"):
            parts.append(f"**{first.rstrip(':')}**")
            items = re.split(r"\n    (?=\S)", f"\n{block.partition(chr(10))[2]}")[1:]
            parts += [_item(each, named=first == "Args:") for each in items]
        elif first.startswith("- "):
            parts.append("\n".join(_item(each) for each in re.split(r"(?:^|\n)- ", block)[1:]))
        else:
            lines = block.split("\n")
            n = next((i for i, line in enumerate(lines) if line.startswith("    ")), len(lines))
            parts.append(inline(" ".join(" ".join(lines[:n]).split())))
            if lines[n:]:
                parts.append(".. code-block:: text\n\n" + "\n".join(lines[n:]))
    return "\n\n".join(parts)


def _item(text: str, *, named: bool = False) -> str:
    text = " ".join(text.split())
    name, colon, rest = text.partition(": ")
    return f"- ``{name}``: {inline(rest)}" if named and colon else f"- {inline(text)}"


def inline(text: str) -> str:
    """One paragraph: names in backticks become code or links, sources become links, all else is plain."""
    parts, last = [], 0
    for found in SPAN.finditer(text):
        parts.append(_linked(text[last : found.start()]))
        code = " ".join((found[1] or found[2]).split())
        name = code.removeprefix("lp.")
        known = (name in lp.__all__ and not inspect.ismodule(getattr(lp, name))) and name not in RESULTS
        shown = f":py:obj:`{code} <lens_probes.{name}>`" if known else f"``{code}``"
        before, after = text[: found.start()], text[found.end() :]
        shown = shown if not before or BEFORE.search(before) else f"\\ {shown}"
        parts.append(shown if not after or AFTER.match(after) else f"{shown}\\ ")
        last = found.end()
    return "".join([*parts, _linked(text[last:])])


def _linked(text: str) -> str:
    parts, last = [], 0
    for found in LINK.finditer(text):
        shown = found[0].rstrip(".:")
        address = f"arxiv.org/abs/{found['paper']}" if found["paper"] else found["site"].rstrip(".:")
        parts += [_escaped(text[last : found.start()]), f"`{_escaped(' '.join(shown.split()))} <https://{address}>`__"]
        last = found.start() + len(shown)
    return "".join([*parts, _escaped(text[last:])])


def _escaped(text: str) -> str:
    return re.sub(r"([\\*|_])", r"\\\1", text)


def heading(text: str, underline: str = "-") -> str:
    """A heading of a page."""
    return f"{text}\n{underline * len(text)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are one line each."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (header, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(row)]
    return "\n".join(lines)


# The page of a probe or experiment


def page(name: str, pictures: dict[str, str], repository: str = "") -> str:
    """Question, figure, card, settings, quantities, limits, costs, models and notebooks of one probe or experiment."""
    kind = asked()[name]
    result = result_class(kind)
    parts = [heading(name, "="), f"**{inline(card(kind)[0])}**"]
    if (DOCS / "pictures" / f"{name}.png").is_file():
        parts += [
            f".. image:: /pictures/{name}.png\n   :alt: The figure of {name}\n   :class: figure",
            ".. code-block:: python\n\n" + "\n".join(f"    {line}" for line in pictures[name].splitlines()),
        ]
    overrides = [method for method in ("run", "from_cache") if method in vars(kind)]
    members = f"\n   :members: {', '.join(overrides)}" if overrides else ""
    parts += [heading("Method card"), f".. autoclass:: lens_probes.{name}{members}"]
    if dataclasses.fields(kind):
        parts += [heading("Settings"), table(["setting", "type", "may be", "default"], settings(kind))]
    parts += [
        heading("Quantities"),
        "Axes stand in brackets. Missing is NaN, in whole numbers -1. The null is the quantity that figures and tables "
        "show beside this one.",
        table(["quantity", "what it is", "unit and range", "null"], quantities(result)),
        heading("Result"),
        f".. autoclass:: {documented(result)}\n   :members:",
        inherited(result),
    ]
    for title, rows in (
        ("Refused, and limits", limits(name)),
        ("Cost", costs(name)),
        ("Models", models(name)),
        ("Notebooks", notebooks(name)),
    ):
        if rows:
            parts += [heading(title), "\n".join(f"- {row}" for row in rows)]
    if repository:
        path = Path(inspect.getfile(kind)).relative_to(ROOT).as_posix()
        parts.append(f"`Source code <{repository}/blob/main/{path}>`__")
    return "\n\n".join(parts) + "\n"


def settings(kind: type) -> list[list[str]]:
    """One row per setting: name, type, what is allowed, default."""
    hints = get_type_hints(kind, include_extras=True)
    rows = []
    for each in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        words = says(hints[each.name])
        if words == "layers":
            words = "layer numbers (negative ones count from the end), a slice, or None for all layers"
        must = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        default = "must be given" if must else f"``{each.default!r}``"
        rows.append([f"``{each.name}``", f"``{plain_type(hints[each.name])}``", inline(words), default])
    return rows


def quantities(result: type) -> list[list[str]]:
    """One row per declared quantity: name and axes, words, unit and range, null."""
    known = schema(result)
    optional = {each.name for each in dataclasses.fields(result) if each.default is None}  # pyright: ignore[reportArgumentType]
    rows = []
    for name, axes in known.every.items():
        quantity = known.quantities[name]
        words = quantity.says + ("; if asked for" if name in optional else "")
        kind = "summed" if quantity.is_sum else notes(quantity)
        null = f"``{quantity.null}``" if quantity.null else ""
        rows.append([f"``{name}`` ``[{' '.join(axes)}]``", inline(words), _escaped(kind), null])
    return rows


def notes(quantity: Quantity) -> str:
    """Unit and range, as figures say them."""
    return quantity.title[len(quantity.says) :].strip()[1:-1]


def documented(result: type) -> str:
    """The name under which a result is documented."""
    return f"lens_probes.{result.__name__}"


def inherited(result: type) -> str:
    """Where the methods are that a result has from its base."""
    base = next(each for each in result.__mro__[1:] if each.__module__.startswith("lens_probes.result"))
    path = f"lens_probes.{'result.' if base.__name__ in RESULTS else ''}{base.__name__}"
    return f"It has the methods of :py:obj:`{base.__name__} <{path}>` too: tables, comparisons, figures, files."


# What other texts say of it


def section(title: str, text: str = README) -> str:
    """The text of a section of README, without its heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md must have a section {title!r}; got none: change the page that includes it")
    return found[1].strip()


def tables(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of every table of a Markdown text."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        header, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.strip().splitlines()
        ]
        found.append((header, rows))
    return found


def about(name: str, cell: str) -> bool:
    """Whether a cell names this probe: as it is, or with settings."""
    return bool(re.search(rf"`(?:lp\.)?{name}(?:\(|`|\.)", cell))


def limits(name: str) -> list[str]:
    """What is refused, by README's table."""
    rows = [row for _, rows in tables(section("What it refuses, and limits")) for row in rows]
    return [f"{inline(question)}: {inline(answer)}" for question, answer in rows if about(name, question + answer)]


def costs(name: str) -> list[str]:
    """What it costs, by README's tables."""
    found = []
    for header, rows in tables(section("Speed and memory")):
        for row in rows:
            if about(name, row[0]):
                cells = [f"{head} {cell}" for head, cell in zip(header[1:], row[1:], strict=True) if cell]
                found.append(inline("; ".join([row[0], *cells])))
    return found


@cache
def releases() -> list[dict[str, Any]]:
    """The runs of benchmarks/compatibility.py, oldest release first."""
    return runpy.run_path(str(ROOT / "benchmarks" / "compatibility.py"))["read"]()


def models(name: str) -> list[str]:
    """For each release, on how many architectures it is right and refused."""
    rows = []
    for release in releases():
        cells = [cells.get(name, "") for cells in release["families"].values()]
        right, refused = (sum(cell.startswith(word) for cell in cells) for word in ("right", "refused"))
        if right + refused:
            lens = release["versions"]["transformer-lens"]
            rows.append(
                f"TransformerLens {lens}, transformers {release['versions']['transformers']}: right on {right} "
                f"architectures, refused on {refused}; see :doc:`/compatibility`"
            )
    return rows


def notebooks(name: str) -> list[str]:
    """The notebooks whose code uses it."""
    rows = []
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        if re.search(rf"\blp\.{name}\(", code):
            rows.append(f":doc:`/notebooks/{file.stem}`")
    return rows


def index(kind: type, title: str, intro: str) -> str:
    """The list of all probes or experiments with their questions."""
    rows = [f"- :doc:`{name}`: {inline(card(each)[0])}" for name, each in asked(kind).items()]
    toc = ".. toctree::\n   :hidden:\n\n" + "\n".join(f"   {name}" for name in asked(kind))
    return "\n\n".join([heading(title, "="), intro, "\n".join(rows), toc]) + "\n"
