"""The HTML file: the template, the style sheet, the scripts and the data, and a policy that allows nothing else.

The content security policy names each script by its hash and allows no network. Styles stand inline, for Plotly sets
them. Data stand in a block that is no script, with every character escaped that could end it.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lens_probes.pages.packing import Keep, packed
from lens_probes.result import Result
from lens_probes.result.files import replace_by

# In this order: each uses those before it.
SCRIPTS = (
    "text",
    "data",
    "state",
    "colours",
    "table",
    "export",
    "grid",
    "chart",
    "strip",
    "compare",
    "panels",
    "units",
    "entries",
    "pairs",
    "examples",
    "general",
    "page",
)
FRAME = 760  # pixels, in a notebook


class Page:
    """A page of results. In a notebook it shows itself, in a frame that can do nothing outside itself."""

    def __init__(self, html: str, n_results: int) -> None:
        self.html = html
        self.n_results = n_results

    def __repr__(self) -> str:
        return f"Page({self.n_results} results, {len(self.html.encode()) / 1e6:.1f} MB)"

    def _repr_html_(self) -> str:
        # In ASCII, so that the scripts have their hashes whatever the encoding of the document around the frame.
        own = html.escape(self.html).encode("ascii", "xmlcharrefreplace").decode()
        return (
            f'<iframe srcdoc="{own}" sandbox="allow-scripts allow-downloads" title="lens_probes" '
            f'style="width:100%;height:{FRAME}px;border:1px solid #999"></iframe>'
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.part")
        try:
            temporary.write_text(self.html, encoding="utf-8")
            replace_by(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def page(
    results: Result | Sequence[Result],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
    keep: Keep = (),
) -> Page:
    """A page of one result or several, to look at in a browser without a network; written to `path` if given.

    Results of the same prompts follow one selection of token, layer and head. In a notebook the page shows itself.
    Where all heads or units would be too many numbers, such as attention in a long text, the page holds some and says
    which; `keep` names those that it must hold, such as [(5, "H3")].

    >>> import lens_probes as lp
    >>> results = lp.run([lp.RankShift(), lp.LogitLens()], lp.tiny.bridge(), "Time flies like an arrow.")
    >>> lp.page(results)  # doctest: +ELLIPSIS
    Page(2 results, ... MB)
    """
    made = [results] if isinstance(results, Result) else list(results)
    built = Page(document(packed(made, title, keep=keep)), len(made))
    if path is not None:
        built.write(path)
    return built


def document(data: dict[str, Any] | None, *, connect: str = "'none'", more: Sequence[str] = ()) -> str:
    """The HTML file of packed data; without data, one that waits for `lensProbes.show(data)`.

    `connect`: where its scripts may send questions; nowhere unless a server says otherwise. `more`: what a server adds
    to the page, each a script and a style sheet of `browser/`.
    """
    folder = files("lens_probes.pages").joinpath("browser")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    own = "\n".join(read(f"{name}.js") for name in (*SCRIPTS, *more))
    scripts = [get_plotlyjs(), f'(() => {{\n"use strict";\n{own}\n}})();\n']
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape((data or {}).get("title", "lens_probes")),
        "style": "".join(read(f"{name}.css") for name in ("page", *more)),
        "data": embedded(data),
        "scripts": "".join(f"<script>{script}</script>\n" for script in scripts),
    }
    # One pass over the template: what is put in is not read again.
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], read("page.html"))


def embedded(data: Any) -> str:
    """JSON in which nothing can end the block it stands in.

    >>> embedded("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    # Escapes all that is not ASCII, so also line separators; surrogates that stand alone survive.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
