"""Runs that can be killed: each shard of a corpus is measured once, and the same call goes on with what is missing.

texts -> shards -> what is missing -> measured here or by workers -> files -> one merged result
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from lens_probes.corpus import folder as folders
from lens_probes.corpus.folder import CannotWrite, End, Entry, Folder, Manifest, WritableFolder, writing
from lens_probes.corpus.measuring import Measured, Work
from lens_probes.corpus.texts import Plan, Shard, Texts, can_be_read_twice, documents, plan, shards
from lens_probes.messages import amount, brief
from lens_probes.probe import Probe
from lens_probes.reading import TOKENS_PER_BATCH
from lens_probes.text.words import WordClasses

SHARD_SIZE = 256
ATTEMPTS = 3  # per shard
HOPELESS = 3  # shards without a result before any has one: the reason is not in the texts
REREAD = 10  # times that files may be replaced by those of groups while they are read


class Run:
    """What is done so far of a run in a folder; see `run_corpus`.

    `results` has one result per probe, merged over all shards that are done. `failures` is a table of the texts that
    were left out, `failed_shards` one of the shards that failed, each with the reason.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = Path(path)
        self._folder = Folder(path)
        self.probes = tuple(self._folder.probes)
        self._manifest = self._folder.manifest()
        self._results: list[Any] | None = None

    @property
    def results(self) -> list[Any]:
        """One merged result per probe, in order. Read once, together with the numbers of shards, prompts and tokens."""
        for _ in range(REREAD):
            if self._results is not None:
                break
            self._manifest = self._folder.manifest()
            try:
                self._results = [self._merged(number) for number in range(len(self.probes))]
            except FileNotFoundError:  # replaced since they were listed: by the file of their group
                continue
        if self._results is None:
            raise FileNotFoundError(f"the files of the run in {self.folder} must be complete: call run_corpus again")
        return self._results

    def _merged(self, probe: int) -> Any:
        measured = {shard: entry for shard, entry in self._manifest.done.items() if entry.prompts}
        if not measured:
            raise ValueError(f"the run in {self.folder} must have a shard that is done; got none so far: wait for one")
        result = self._folder.merged(probe, self._manifest.done)
        if result is None or result.provenance.n_prompts < self.prompts:
            raise FileNotFoundError
        return result

    @property
    def shards(self) -> int:
        """How many shards are done."""
        return len(self._manifest.done)

    @property
    def all_shards(self) -> int | None:
        """How many shards the corpus has; None if it streams and its end was not reached."""
        return self._manifest.end.end if self._manifest.end else None

    @property
    def prompts(self) -> int:
        """How many prompts were measured; a long text counts once per piece."""
        return sum(entry.prompts for entry in self._manifest.done.values())

    @property
    def tokens(self) -> int:
        """How many tokens were measured."""
        return sum(entry.tokens for entry in self._manifest.done.values())

    @property
    def complete(self) -> bool:
        """Whether every shard is done."""
        return self.all_shards == self.shards

    @property
    def failures(self) -> pd.DataFrame:
        """The texts that were left out: one row each, with its number in the corpus, its shard and the reason."""
        done = sorted(self._manifest.done.items())
        rows = [(text, shard, reason) for shard, entry in done for text, reason in entry.failures]
        return pd.DataFrame(rows, columns=["text", "shard", "reason"])

    @property
    def failed_shards(self) -> pd.DataFrame:
        """The shards that failed three times: one row each, with its number of texts and the reason."""
        rows = [(shard, entry.texts, entry.failed) for shard, entry in sorted(self._manifest.failed.items())]
        return pd.DataFrame(rows, columns=["shard", "texts", "reason"])

    def __repr__(self) -> str:
        of = "" if self.all_shards is None else f" of {self.all_shards:,}"
        n_failed = sum(len(entry.failures) for entry in self._manifest.done.values())
        parts = [
            f"{self.shards:,}{of} shards",
            amount(self.prompts, "prompt"),
            amount(self.tokens, "token"),
            f"{amount(n_failed, 'text')} and {amount(len(self._manifest.failed), 'shard')} failed",
        ]
        return f"Run({str(self.folder)!r}: {', '.join(parts)})"


def open_run(folder: str | os.PathLike[str]) -> Run:
    """What is done so far of a run, also while it goes on elsewhere."""
    return Run(folder)


def delete_run(folder: str | os.PathLike[str]) -> None:
    """Delete the files of a run; other files in its folder stay."""
    folders.delete(folder)


def run_corpus(
    probes: Sequence[Probe[Any]],
    model: Any,
    texts: Texts,
    folder: str | os.PathLike[str],
    *,
    shard_size: int = SHARD_SIZE,
    max_tokens: int | None = None,
    batch_tokens: int = TOKENS_PER_BATCH,
    prepend_bos: bool | None = None,
    word_class: WordClasses | None = None,
    progress: bool = True,
) -> Run:
    """Run probes over a corpus in this process. Killed, it loses one shard: the same call goes on with the others.

    `texts`: a file (`.jsonl` with `text` and perhaps `topic`, `.parquet` with such columns, any other with one prompt
    per line), prompts in any form that `run` takes, topic -> texts, or a data set of dicts with `text`, streaming or
    not. It must give the same texts in the same order every time.

    `folder`: where results are kept, one file per probe and shard. It belongs to one set of probes, model and texts:
    others are refused.

    `shard_size`: texts per shard, fewer if they have over 400 characters on average. Small shards lose less when
    killed, large ones write less. Sums stay small however long the corpus; a result with rows holds all of them in
    memory when it is read.

    `max_tokens`: the longest piece (None: the model's context). A longer text is cut into consecutive pieces, before a
    word where one begins in the second half of a piece; every piece has the special tokens of a text.

    `batch_tokens`: tokens per forward pass, padding included; more on a GPU. Texts of similar length share a batch. The
    numbers do not depend on it but for rounding; with equal batches, threads and device their bits do not depend on who
    measured which shard, when, or how often a run was killed.

    A text that cannot be read, tokenised or measured is left out and recorded. A shard that fails three times is
    recorded, and measured again by the next call. Interrupted, it gives what is done.

    >>> import lens_probes as lp, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> texts = ["Time flies like an arrow.", "Fruit flies like a banana."]
    >>> run = lp.run_corpus([lp.ResidualMean()], lp.tiny.bridge(), texts, folder, progress=False)
    >>> run.complete, run.prompts, run.results[0].provenance.n_prompts
    (True, 2, 2)
    """
    work = Work(probes, model, prepend_bos, word_class, max_tokens, batch_tokens)
    documents(texts)  # raises for what is no corpus, before a folder is made
    with writing(folder) as own, Recording(own, texts, shard_size, progress).until_interrupted() as recording:
        recording.begin(work.fingerprint())
        for shard in recording.missing():
            reason = ""
            for _ in range(ATTEMPTS):
                try:
                    measured = work.measure(shard, recording.show)
                    own.save(shard.number, measured.results)
                except CannotWrite:
                    raise
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                else:
                    recording.done(shard, measured)
                    break
            else:
                recording.failed(shard, reason)
    return open_run(folder)


class Recording:
    """A run that goes on: which shards are missing, and what came of each."""

    def __init__(self, own: WritableFolder, texts: Texts, shard_size: int, progress: bool) -> None:
        if not isinstance(shard_size, int) or isinstance(shard_size, bool) or shard_size < 1:
            raise ValueError(f"shard_size must be a number of texts, 1 or more; got {brief(shard_size)}")
        self._own, self._texts, self._size = own, texts, shard_size
        self._plan: Plan | None = None
        self._manifest = Manifest({}, {}, None)
        self._empty = 0  # shards of this call without a result
        self._tokens, self._characters, self._shown = 0, 0, 0
        self._bar: Any = tqdm(desc="reading", unit=" token", unit_scale=True, disable=not progress, delay=1)

    @contextmanager
    def until_interrupted(self) -> Iterator["Recording"]:
        """Ends well when interrupted, once something is done."""
        try:
            yield self
        except KeyboardInterrupt:
            if not self._manifest.done:
                raise
            self._bar.close()
            done = amount(len(self._manifest.done), "shard")
            tqdm.write(f"interrupted after {done}: the same call goes on", file=sys.stderr)
        finally:
            self._bar.close()

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Check that it is the same run, and the same corpus as far as that can be known; raises if not."""
        self._own.begin({**fingerprint, "shard_size": self._size})
        self._manifest = Manifest(self._own.complete(), *self._own.manifest()[1:])
        if can_be_read_twice(self._texts):
            self._plan = plan(self._texts, self._size)
            known = {**self._manifest.done, **self._manifest.failed}
            for number, key in enumerate(self._plan.keys):
                if number in known:
                    self._check(number, known[number].key, key)
            self._check_end(End(len(self._plan.keys), self._plan.texts, _key(self._plan.keys)), max(known, default=-1))
        done = self._manifest.done
        self._tokens = sum(entry.tokens for entry in done.values())
        self.show(self._tokens)
        self._bar.initial = self._shown

    def _check(self, number: int, was: str, got: str) -> None:
        if was != got:
            raise self._own.other("corpus", f"texts with the hash {was} there", f"others in shard {number} ({got})")

    def _check_end(self, end: End, last: int) -> None:
        """The corpus ends here: as it did before, and not before what is done."""
        was = self._manifest.end
        if end.end <= last:
            raise self._own.other("corpus", f"{last + 1} or more", f"{end.end} shards")
        if was and was != end:
            numbers = [f"{each.end} shards with the hash {each.corpus}" for each in (was, end)]
            raise self._own.other("corpus", *numbers)
        if not was:
            if not end.texts:
                raise ValueError("texts must be one or more; got none: check the file, or what the iterator gives")
            self._own.add(end)
            self._manifest = self._manifest._replace(end=end)

    def missing(self) -> Iterator[Shard]:
        """Every shard that is not done, in order; each is checked to be the one that was there before."""
        known = {**self._manifest.done, **self._manifest.failed}
        keys, texts, last = [], 0, max(known, default=-1)
        for shard in shards(documents(self._texts), self._size):
            key = shard.key
            if shard.number in known:
                self._check(shard.number, known[shard.number].key, key)
            elif self._manifest.end and shard.number >= self._manifest.end.end:
                raise self._own.other("corpus", f"{self._manifest.end.end}", f"over {shard.number} shards")
            keys.append(key)
            texts += len(shard.documents)
            if shard.number in self._manifest.done:
                self._characters += shard.size
            else:
                yield shard
        self._check_end(End(len(keys), texts, _key(keys)), last)

    def show(self, tokens: int) -> None:
        """Move the bar by tokens that were measured."""
        self._shown += tokens
        self._bar.update(tokens)

    def done(self, shard: Shard, measured: Measured) -> None:
        """Count a shard whose files are written, and fold its group if it is the last of one."""
        texts = len(shard.documents)
        failures = tuple((text, reason) for text, reason in measured.failures)
        entry = Entry(shard.number, shard.key, texts, measured.prompts, measured.tokens, failures)
        self._own.add(entry)
        self._manifest.done[shard.number] = entry
        self._manifest.failed.pop(shard.number, None)
        self._own.fold(shard.number, self._manifest.done)
        self._tokens += measured.tokens
        self._characters += shard.size
        if self._plan and self._characters:  # time left, by the tokens per character until now
            self._bar.total = round(self._tokens * max(1, self._plan.characters / self._characters))
        self.show(self._tokens - self._shown)
        if not measured.prompts:
            self._check_hope(failures[0][1] if failures else "")

    def failed(self, shard: Shard, reason: str) -> None:
        """Record a shard that failed three times."""
        reason = " ".join(reason.split())[:300]
        entry = Entry(shard.number, shard.key, len(shard.documents), failed=reason)
        self._own.add(entry)
        self._manifest.failed[shard.number] = entry
        self._characters += shard.size
        self._check_hope(reason)

    def _check_hope(self, reason: str) -> None:
        """Raise where no shard has a result: a corpus of thousands would fail like the first few."""
        self._empty += 1
        every = self._manifest.end and self._empty >= self._manifest.end.end
        if not self._tokens and (self._empty == HOPELESS or every):
            raise RuntimeError(f"the first texts must be ones that can be measured; got none so far ({reason})")


def _key(keys: Sequence[str]) -> str:
    return hashlib.blake2b("".join(keys).encode(), digest_size=8).hexdigest()
