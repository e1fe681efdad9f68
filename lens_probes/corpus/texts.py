"""The texts of a corpus from any source, one after the other, and how they are grouped into shards.

    a file, a data set, prompts --documents--> Document ... --shards--> Shard ...

Both depend on the texts and their order only, never on who measures them.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from lens_probes.messages import brief
from lens_probes.text.prompts import Prompt, is_whole

CHARACTERS_PER_PROMPT = 400  # on average, at most: a shard of long texts holds fewer of them
CHARACTERS_PER_ID = 4
NO_LINES = {".csv", ".tsv", ".json", ".arrow", ".feather", ".gz", ".bz2", ".xz", ".zst", ".zip"}  # of prompts

Texts = str | os.PathLike[str] | Iterable[Any] | Mapping[str, Iterable[Any]]
"""A file (`.jsonl`, `.parquet`, any other: one prompt per line), prompts in any form, or a data set with a `text`."""


class Document(NamedTuple):
    """One text of a corpus, or the reason why it cannot be read."""

    prompt: Prompt | None
    problem: str = ""

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits of the whole content, the same on every machine and for every part of it."""
        if self.prompt is None:
            content = f"unreadable {self.problem}"
        elif self.prompt.text is None:
            content = f"ids {self.prompt.ids}"
        else:
            content = f"text {self.prompt.text}"
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    @property
    def size(self) -> int:
        """Its length in characters; of ids by an estimate."""
        if self.prompt is None:
            return 0
        return len(self.prompt.text or "") + CHARACTERS_PER_ID * len(self.prompt.ids or ())


class Shard(NamedTuple):
    """Consecutive texts of a corpus; `first` is the number of the first of them."""

    number: int
    first: int
    documents: tuple[Document, ...]

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits of its texts and their topics, in order."""
        topics = [each.prompt.topic if each.prompt else "" for each in self.documents]
        content = json.dumps([[each.key, topic] for each, topic in zip(self.documents, topics, strict=True)])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def size(self) -> int:
        """Its length in characters."""
        return sum(each.size for each in self.documents)


class Plan(NamedTuple):
    """What a whole corpus comes to: the keys of its shards, and its numbers of texts and characters."""

    keys: tuple[str, ...]
    texts: int
    characters: int


def shards(documents: Iterable[Document], shard_size: int) -> Iterator[Shard]:
    """Consecutive texts: `shard_size` of them, or fewer once they have 400 characters per prompt of a full shard.

    >>> [len(shard.documents) for shard in shards(documents(["a", "b", "c" * 900, "d"]), 2)]
    [2, 1, 1]
    """
    number, first, own, size = 0, 0, [], 0
    for document in documents:
        own.append(document)
        size += document.size
        if len(own) == shard_size or size >= shard_size * CHARACTERS_PER_PROMPT:
            yield Shard(number, first, tuple(own))
            number, first, own, size = number + 1, first + len(own), [], 0
    if own:
        yield Shard(number, first, tuple(own))


def plan(texts: Texts, shard_size: int) -> Plan:
    """Go through a corpus once without a model."""
    keys, n_texts, characters = [], 0, 0
    for shard in shards(documents(texts), shard_size):
        keys.append(shard.key)
        n_texts += len(shard.documents)
        characters += shard.size
    return Plan(tuple(keys), n_texts, characters)


def can_be_read_twice(texts: Texts) -> bool:
    """Whether a corpus can be planned before it is measured: files and what has a length, not what streams."""
    if isinstance(texts, Mapping):
        return all(can_be_read_twice(own) for own in texts.values())
    return isinstance(texts, str | os.PathLike) or hasattr(texts, "__len__")


def documents(texts: Texts) -> Iterator[Document]:
    """Every text of a corpus in order. What cannot be read is a Document with a problem; a missing file raises.

    >>> [document.prompt.text for document in documents(["Time flies.", {"text": "Fruit flies.", "topic": "biology"}])]
    ['Time flies.', 'Fruit flies.']
    """
    if isinstance(texts, str | os.PathLike):
        return _of_file(Path(texts))
    if isinstance(texts, Mapping):
        return _of_topics(texts)
    if isinstance(texts, pd.DataFrame):
        texts = texts.to_dict("records")
    one = isinstance(texts, Prompt | bytes) or _is_ids(texts) or (isinstance(texts, Tensor) and texts.ndim < 2)
    if one or not isinstance(texts, Iterable):
        raise TypeError(
            f"texts must be a file or an iterable of prompts; got {brief(texts)}: pass a list, such as [prompt]"
        )
    return map(_document, texts)


def _of_file(path: Path) -> Iterator[Document]:
    if not path.is_file():
        raise FileNotFoundError(
            f"texts must be a file that exists, or an iterable of prompts; got {str(path)!r:.80}: pass a list for a "
            f"single text"
        )
    kinds, suffix = {".jsonl": _of_jsonl, ".parquet": _of_parquet}, path.suffix.lower()
    if suffix in NO_LINES:
        raise ValueError(
            f"a file must be .jsonl, .parquet, or have one prompt per line; got {path.name}: write it as .jsonl, or "
            f"pass its texts, such as pandas.read_csv(path)"
        )
    return kinds.get(suffix, _of_lines)(path)


def _of_topics(texts: Mapping[str, Iterable[Any]]) -> Iterator[Document]:
    for topic, own in texts.items():
        if hasattr(own, "column_names"):
            raise TypeError(
                f"texts must be one data set; got several by name, {', '.join(map(str, texts))}: pass one of them, as "
                f"data[{topic!r}]"
            )
        for each in [own] if isinstance(own, str | Prompt) else own:
            document = _document(each)
            if document.prompt is not None:
                document = Document(replace(document.prompt, topic=str(topic)))
            yield document


def _lines(path: Path) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, error
            else:
                if text:
                    yield number, text


def _of_lines(path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        if isinstance(line, str):
            yield Document(Prompt(line))
        else:
            yield Document(None, f"line {number} is not UTF-8 ({line.reason})")


def _of_jsonl(path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        try:
            if not isinstance(line, str):
                raise line
            yield _document(json.loads(line))
        except (ValueError, RecursionError) as error:
            yield Document(None, f"line {number} is not JSON ({error})"[:200])


def _of_parquet(path: Path) -> Iterator[Document]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("a .parquet file needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} must be a .parquet file; got another, or a part of one ({error!s:.80})") from error
    with file:
        columns = [name for name in ("text", "topic") if name in file.schema_arrow.names]
        if "text" not in columns:
            raise ValueError(
                f"a .parquet file must have a column 'text'; got {', '.join(file.schema_arrow.names)}: rename one"
            )
        for rows in file.iter_batches(columns=columns, batch_size=1024):
            yield from map(_document, rows.to_pylist())


def _document(given: Any) -> Document:
    """One item of a source as a Document."""
    topic = ""
    if isinstance(given, Mapping):
        if "text" not in given:
            return Document(None, f"it must have a 'text'; got the fields {', '.join(map(str, given))}"[:200])
        topic, given = given.get("topic"), given["text"]
    if isinstance(given, Prompt):
        return Document(given)
    topic = "" if topic is None else str(topic)
    if isinstance(given, str):
        return Document(Prompt(given, topic=topic))
    if getattr(given, "ndim", 0) == 1 and hasattr(given, "tolist"):  # a tensor or an array
        given = given.tolist()
    if _is_ids(given):
        return Document(Prompt(ids=tuple(int(i) for i in given), topic=topic))
    return Document(None, f"it must be a text, an lp.Prompt or token ids; got {brief(given)}")


def _is_ids(given: Any) -> bool:
    return (
        isinstance(given, Sequence) and not isinstance(given, str | bytes) and bool(given) and all(map(is_whole, given))
    )
