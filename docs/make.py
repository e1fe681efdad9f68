"""The site: `make docs` writes it to docs/_build/html. Warnings are errors, and all links are checked.

    docs/*.md, README, CONTRIBUTING, CHANGELOG, method cards, notebooks --stage--> docs/_build/source --Sphinx--> html

A line `{{ README: Speed and memory }}` of a page stands for that section, `{{ CHANGELOG }}` for a whole file: nothing
is written twice.
"""

import re
import shutil
import sys
from pathlib import Path

import cards
import compatibility
import conf
import gallery
import links
import plotly
from pictures import PICTURES

import lens_probes as lp

INCLUDED = re.compile(r"^\{\{ (README|CONTRIBUTING|CHANGELOG|SECURITY)(?:: (.+))? \}\}$", re.MULTILINE)
NOTEBOOKS = ("tour", "rank_shift", "logit_lens", "attention", "topics", "reconstruction", "images")
PROBES = (
    "A probe reads activations of one forward pass. `lens_probes.run` asks several of them at once, and "
    "`list_probes` finds those of installed packages too."
)
EXPERIMENTS = "An experiment fits, searches, intervenes or differentiates. It runs like a probe: `run(model, texts)`."


def stage(folder: Path) -> None:
    """Write the source of every page."""
    for name in ("howto", "probes", "experiments", "notebooks"):
        (folder / name).mkdir(parents=True)
    for file in [*cards.DOCS.glob("*.md"), *cards.DOCS.glob("*.rst"), *cards.DOCS.glob("howto/*.md")]:
        text = file.read_text(encoding="utf-8")
        (folder / file.relative_to(cards.DOCS)).write_text(filled(text), encoding="utf-8")
    for picture in cards.DOCS.glob("*.png"):
        shutil.copy(picture, folder)
    shutil.copytree(cards.DOCS / "pictures", folder / "pictures", dirs_exist_ok=True)
    for kind, title, intro in ((lp.Probe, "Probes", PROBES), (lp.Experiment, "Experiments", EXPERIMENTS)):
        own = folder / cards.folder(kind)
        (own / "index.rst").write_text(cards.index(kind, title, cards.inline(intro)), encoding="utf-8")
        for name in cards.asked(kind):
            (own / f"{name}.rst").write_text(cards.page(name, PICTURES, conf.REPOSITORY), encoding="utf-8")
    names = [*NOTEBOOKS, *sorted({file.stem for file in gallery.NOTEBOOKS.glob("*.ipynb")} - set(NOTEBOOKS))]
    for name in names:
        gallery.write(name, folder / "notebooks", conf.REPOSITORY)
    (folder / "notebooks" / "index.md").write_text(gallery.index(names), encoding="utf-8")
    (folder / "compatibility.md").write_text(compatibility.page(cards.releases()), encoding="utf-8")


def filled(text: str) -> str:
    """A page with the sections that it includes, and with links between files turned into links between pages."""

    def included(found: re.Match[str]) -> str:
        file, title = found.groups()
        whole = (cards.ROOT / f"{file}.md").read_text(encoding="utf-8")
        if title == "top":
            return whole.partition("\n## ")[0].partition("\n")[2].strip()
        return cards.section(title, whole) if title else whole.strip()

    text = INCLUDED.sub(included, text)
    text = re.sub(r"\]\((?:docs|\.)/", "](/", text)
    text = re.sub(r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb\)", r"](/notebooks/\1.md)", text)
    return re.sub(r"\]\((CONTRIBUTING|CHANGELOG|SECURITY)\.md", lambda found: f"](/{found[1].lower()}.md", text)


def llms(html: Path) -> str:
    """llms.txt: what the package is, every probe's question and every page, for programs that read."""
    lines = ["# lens_probes", "", f"> {' '.join((lp.__doc__ or '').split('.')[0].split())}.", ""]
    lines += ["```python", "import lens_probes as lp", "", 'model = lp.load_model("smollm2-135m")']
    lines += ['result = lp.RankShift().run(model, ["Time flies like an arrow."])', "result.to_frame()", "```", ""]
    for kind, title in ((lp.Probe, "Probes"), (lp.Experiment, "Experiments")):
        lines += [f"## {title}", ""]
        for name, each in cards.asked(kind).items():
            lines.append(f"- [{name}]({cards.folder(each)}/{name}.html): {cards.card(each)[0]}")
        lines.append("")
    lines += ["## Pages", ""]
    for file in sorted(html.rglob("*.html")):
        path = file.relative_to(html).as_posix()
        if path.split("/")[0] in ("probes", "experiments", "_static") or path in ("search.html", "genindex.html"):
            continue
        title = re.search(r"<title>(.*?)(?: - [^-<]*)?</title>", file.read_text(encoding="utf-8"), re.DOTALL)
        lines.append(f"- [{' '.join(title[1].split()) if title else path}]({path})")
    return "\n".join(lines) + "\n"


def main(folder: Path = cards.DOCS / "_build") -> int:
    """Pages, then HTML, then links."""
    from sphinx.cmd.build import main as sphinx

    shutil.rmtree(folder, ignore_errors=True)
    source, html = folder / "source", folder / "html"
    stage(source)
    options = ["-W", "--keep-going", "-q", "-d", str(folder / "doctrees"), "-c", str(cards.DOCS)]
    failed = sphinx([*options, str(source), str(html)])
    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", html / "_static")
    (html / "llms.txt").write_text(llms(html), encoding="utf-8")
    print(f"The site is {html / 'index.html'}: open it in a browser.")
    return failed or links.main([str(html), *(str(cards.ROOT / f"{each}.md") for each in ("README", "CONTRIBUTING"))])


if __name__ == "__main__":
    sys.exit(main())
