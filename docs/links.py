"""Every link of the built site and of the Markdown files: `python docs/links.py docs/_build/html README.md`.

Links inside must lead to a file, and to an anchor in it. Of links to other sites only the form is checked: nothing is
fetched.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors and links of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what it points to, and what can be pointed to."""
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        self.links += [value for name in ("href", "src") if (value := given.get(name))]


@cache
def read(file: Path) -> Page:
    """The page in a file."""
    text = file.read_text(encoding="utf-8")
    return Page(text) if file.suffix == ".html" else markdown(text)


def markdown(text: str) -> Page:
    """The same of Markdown: links in brackets and in HTML; headings are anchors, spelled as GitHub does."""
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    page = Page(text)
    page.links += re.findall(r"\]\(([^)\s]+)\)", text)
    for words in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words).lower()
        page.anchors.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return page


def broken(files: list[Path]) -> Iterator[str]:
    """What is wrong with the links of these files, one sentence per link."""
    for file in files:
        for link in dict.fromkeys(read(file).links):
            if reason := wrong(file, link):
                yield f"{file}: {link}: {reason}"


def wrong(file: Path, link: str) -> str:
    """Why a link leads nowhere; "" if it is right."""
    if re.search(r"[\s<>{}|\\^`]", link):
        return "a link must not contain spaces or brackets"
    address = urlsplit(link)
    if address.scheme in ("http", "https"):
        host = address.hostname or ""
        return "" if re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", host) else f"no name of a site: {host!r}"
    if address.scheme in ("mailto", "data"):
        return ""
    if address.scheme or address.netloc:
        return "neither a file nor the address of a site"
    target = (file.parent / unquote(address.path)).resolve() if address.path else file
    target = target / "index.html" if target.is_dir() and file.suffix == ".html" else target
    if not target.exists():
        return "no such file"
    if address.fragment and target.suffix in (".html", ".md"):
        anchor = unquote(address.fragment)
        return "" if anchor in read(target).anchors else f"no anchor {anchor!r} there"
    return ""


def main(given: list[str]) -> int:
    """Check files, and all pages of folders; print what is wrong."""
    files = [page for name in given for page in (sorted(Path(name).rglob("*.html")) or [Path(name)])]
    problems = list(broken(files))
    print("\n".join([*problems, f"{len(files)} files, {len(problems)} wrong links"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
