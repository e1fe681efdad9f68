"""The folder of a run: what stands in it, who may write to it, and how shards become one result.

    run.json         format, model, probes and options: another run is refused
    manifest.jsonl   one line per shard that is done or failed, and one with the number of all
    lock             held by every process that writes
    0_RankShift/     of each probe one file per shard, 00000012.safetensors; where results are sums, one per full group
                     of 16 shards instead, then of 256, of 4,096, ..., 00000000-00000015.safetensors

Results are merged in one binary tree by the number of their shards, whoever measured them and in whatever order, so
that sums have the same bits. A file appears whole or not at all, and before the line that counts it. Nothing in a
folder is executed: JSON and safetensors only.
"""

import bisect
import errno
import json
import os
import re
import socket
import time
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lens_probes.result import Result, load, schema
from lens_probes.result.files import replace_by
from lens_probes.settings import fits

FORMAT = 1
GROUP = 16  # shards, or groups, that one file replaces: sixteen times less to read than in pairs
SHARDS = 10**8
ENDING = 10  # seconds that workers have to end
RUN, MANIFEST, LOCK = "run.json", "manifest.jsonl", "lock"
NAME = re.compile(r"(\d{8})(?:-(\d{8}))?\.safetensors")
UNWRITABLE = {
    errno.ENOSPC: "is on a full disk: make room",
    errno.EDQUOT: "is over your quota: make room",
    errno.EROFS: "is on a read-only disk: name one that you may write to",
    errno.EACCES: "must be one that you may write to: name another",
    errno.EPERM: "must be one that you may write to: name another",
}
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


class CannotWrite(OSError):
    """A folder that cannot be written, in one sentence: no shard of it can be saved."""


class Entry(NamedTuple):
    """A line of the manifest: a shard that is done, or one that failed, with the reason."""

    shard: int
    key: str
    texts: int
    prompts: int = 0
    tokens: int = 0
    failures: tuple[tuple[int, str], ...] = ()
    failed: str = ""


class End(NamedTuple):
    """The line of the manifest that says how many shards and texts the corpus has, and its key."""

    end: int
    texts: int
    corpus: str


class Manifest(NamedTuple):
    """What is known of every shard; the last line about one counts."""

    done: dict[int, Entry]
    failed: dict[int, Entry]
    end: End | None


class Folder:
    """The files of a run, to read; `writing` gives one to write."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._grows: dict[int, bool] = {}

    # What it is

    def about(self) -> dict[str, Any]:
        """The content of run.json."""
        path = self.path / RUN
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"a run must be a folder that run_corpus made; got {self.path} without {RUN}: start it there first"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and start the run again") from error
        if not isinstance(about, dict) or not fits(about.get("format"), int):
            raise ValueError(f"{path} is not of a run of lens_probes: name another folder")
        if about["format"] != FORMAT:
            todo = "update lens-probes" if about["format"] > FORMAT else "start the run again in another folder"
            raise ValueError(f"{path} has format {about['format']} and this version reads format {FORMAT}: {todo}")
        probes = about.get("probes")
        if not isinstance(probes, list) or not probes or not all(isinstance(each, str) for each in probes):
            raise ValueError(f"{path} is not of a run of lens_probes: it names no probes")
        return about

    @cached_property
    def probes(self) -> list[str]:
        """The probes as they print."""
        return self.about()["probes"]

    def manifest(self) -> Manifest:
        """What is known of every shard. A last line that was cut short is left out."""
        done: dict[int, Entry] = {}
        failed: dict[int, Entry] = {}
        end = None
        with suppress(FileNotFoundError):
            *lines, _ = (self.path / MANIFEST).read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                entry = _entry(line, f"line {number} of {self.path / MANIFEST}")
                if isinstance(entry, End):
                    end = entry
                    continue
                done.pop(entry.shard, None)
                failed.pop(entry.shard, None)
                (failed if entry.failed else done)[entry.shard] = entry
        return Manifest(done, failed, end)

    def of_probe(self, probe: int) -> Path:
        """Where the results of a probe are."""
        name = re.match(r"\w+", self.probes[probe])
        return self.path / f"{probe}_{name[0] if name else 'probe'}"

    def files(self, probe: int) -> set[tuple[int, int]]:
        """The first and last shard of every file of a probe."""
        try:
            names = os.listdir(self.of_probe(probe))
        except FileNotFoundError:
            return set()
        found = [match for name in names if (match := NAME.fullmatch(name))]
        return {(int(match[1]), int(match[2] or match[1])) for match in found}

    def complete(self) -> dict[int, Entry]:
        """The shards that are done and whose files are there."""
        done = self.manifest().done
        lacking: set[int] = set()
        for probe in range(len(self.probes)):
            files = self.files(probe)
            covered = {shard for first, last in files for shard in range(first, last + 1)}
            lacking |= {shard for shard, entry in done.items() if entry.prompts and shard not in covered}
        return {shard: entry for shard, entry in done.items() if shard not in lacking}

    # What it holds

    def merged(self, probe: int, done: Collection[int]) -> Result | None:
        """The result of a probe over these shards; raises FileNotFoundError where a file was replaced meanwhile."""
        size = 1
        while size <= max(done, default=0):
            size *= 2
        return self._merged(probe, 0, size, self.files(probe), sorted(done))

    def _merged(
        self, probe: int, first: int, size: int, files: Collection[tuple[int, int]], done: Sequence[int]
    ) -> Result | None:
        """That of `size` shards, a node of the tree: from its file, or of its two halves."""
        n_done = bisect.bisect_left(done, first + size) - bisect.bisect_left(done, first)
        if n_done == size and (first, first + size - 1) in files:
            return load(self.of_probe(probe) / _name(first, size))
        if not n_done or size == 1:
            return None
        halves = [self._merged(probe, at, size // 2, files, done) for at in (first, first + size // 2)]
        parts = [half for half in halves if half is not None]
        return Result.merge(parts) if parts else None


class WritableFolder(Folder):
    """The files of a run, for a process that holds its lock."""

    def begin(self, asked: dict[str, Any]) -> None:
        """Say what this run is, or refuse to go on with another, once a shard of that is done or has failed."""
        if (self.path / RUN).is_file() and not any(self.manifest()[:2]):
            self.clear()
        if not (self.path / RUN).is_file():
            with writable(self.path):
                temporary = self.path / f".{RUN}.part"
                temporary.write_text(json.dumps({"format": FORMAT, **asked}, indent=1), encoding="utf-8")
                replace_by(temporary, self.path / RUN)
        about = self.about()
        for name, value in json.loads(json.dumps(asked)).items():
            if about.get(name) != value:
                raise self.other(name, about.get(name), value)
        with writable(self.path):
            for probe in range(len(self.probes)):
                self.of_probe(probe).mkdir(exist_ok=True)

    def other(self, what: str, was: Any, got: Any) -> ValueError:
        """The error that refuses another model, probe or corpus."""
        if isinstance(was, list) and isinstance(got, list) and len(was) == len(got):
            was, got = next((one, other) for one, other in zip(was, got, strict=True) if one != other)
        return ValueError(
            f"a run must go on with the same {what}; got {got!s:.300}, and the run in {self.path} has {was!s:.300}: "
            f"name another folder, or delete that run with lens_probes.delete_run"
        )

    def save(self, shard: int, results: Sequence[Result]) -> None:
        """Write what was measured of a shard; `add` counts it."""
        with writable(self.path):
            for probe, result in enumerate(results):
                result.save(self.of_probe(probe) / _name(shard, 1))

    def add(self, entry: Entry | End) -> None:
        """Write a line of the manifest."""
        line = json.dumps({name: value for name, value in entry._asdict().items() if value not in ((), "")})
        with writable(self.path), open(self.path / MANIFEST, "ab") as manifest:
            start = manifest.seek(0, os.SEEK_END)
            try:
                manifest.write(f"{line}\n".encode())
                manifest.flush()
                os.fsync(manifest.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path / MANIFEST, start)
                raise

    def fold(self, shard: int, done: Container[int]) -> None:
        """Replace the files of sums of a group by one, if this shard was the last of its group."""
        size = GROUP
        while all(each in done for each in range(shard // size * size, (shard // size + 1) * size)):
            for probe in range(len(self.probes)):
                self._fold(probe, shard // size * size, size)
            size *= GROUP

    def _fold(self, probe: int, first: int, size: int) -> None:
        files = self.files(probe)
        inside = {each for each in files if first <= each[0] and each[1] < first + size}
        if not inside or (first, first + size - 1) in files or self._has_rows(probe, min(inside)):
            return
        result = self._merged(probe, first, size, files, range(first, first + size))
        if result is not None:
            with writable(self.path):
                result.save(self.of_probe(probe) / _name(first, size))
                self._delete(probe, inside)

    def _has_rows(self, probe: int, file: tuple[int, int]) -> bool:
        """Whether a probe's results grow with the corpus: a file of a group would be no smaller than its parts."""
        if probe not in self._grows:
            kind = schema(type(load(self.of_probe(probe) / _name(file[0], file[1] - file[0] + 1))))
            self._grows[probe] = bool(kind.tables) or "rows" in kind.kind.values()
        return self._grows[probe]

    def _delete(self, probe: int, files: Collection[tuple[int, int]]) -> None:
        for first, last in files:
            (self.of_probe(probe) / _name(first, last - first + 1)).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all files of the run but the lock."""
        with writable(self.path):
            for probe in range(len(self.probes)):
                self._delete(probe, self.files(probe))
                with suppress(OSError):
                    self.of_probe(probe).rmdir()
            for name in (MANIFEST, RUN):
                (self.path / name).unlink(missing_ok=True)
        self._grows.clear()
        del self.probes  # read again

    def tidy(self) -> None:
        """Remove what processes that died left: to be called while no other process holds the lock."""
        with writable(self.path):
            for left in self.path.glob(".*.part"):
                left.unlink(missing_ok=True)
            with suppress(FileNotFoundError), open(self.path / MANIFEST, "r+b") as manifest:
                content = manifest.read()
                manifest.truncate(content.rfind(b"\n") + 1)
            if not (self.path / RUN).is_file():
                return
            for probe in range(len(self.probes)):
                with suppress(FileNotFoundError):
                    for name in os.listdir(self.of_probe(probe)):
                        if name.startswith("."):
                            (self.of_probe(probe) / name).unlink(missing_ok=True)
                files = self.files(probe)
                groups = [each for each in files if each[1] > each[0]]
                self._delete(
                    probe,
                    {
                        each
                        for each in files
                        if any(each != group and group[0] <= each[0] and each[1] <= group[1] for group in groups)
                    },
                )


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[WritableFolder]:
    """The folder of a run to write to, tidied; raises if another process writes to it."""
    path = Path(path)
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
    strangers = [each for each in sorted(os.listdir(path)) if each != LOCK and not each.startswith(f".{RUN}")]
    if strangers and not (path / RUN).is_file():
        raise ValueError(
            f"folder must be new, empty, or that of a run; got {path}, which has {strangers[0]}: name another"
        )
    with _locked(path, alone=True) as lock:
        folder = WritableFolder(path)
        folder.tidy()
        _lock(lock, path, alone=False)  # shared with the workers, which must hold it too
        try:
            yield folder
        finally:
            _tidy_after_workers(lock, folder)


def _tidy_after_workers(lock: int, folder: WritableFolder) -> None:
    """Remove what was left, once the workers that were ended are gone, so that the next call finds the folder free."""
    until = time.monotonic() + ENDING
    with suppress(CannotWrite):
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                _lock(lock, folder.path, alone=True)
                return folder.tidy()
            time.sleep(0.02)


@contextmanager
def joining(path: Path) -> Iterator[WritableFolder]:
    """The folder of a run, for a worker of a process that writes to it."""
    if not (path / LOCK).is_file():
        raise CannotWrite(
            f"the folder of a run must be on a disk that all workers share; {socket.gethostname()} has no {path}: name "
            f"one that every machine sees"
        )
    with _locked(path, alone=False):
        yield WritableFolder(path)


@contextmanager
def _locked(path: Path, *, alone: bool) -> Iterator[int]:
    # Who opens the lock once more in the same process, and closes it, gives it up on some network disks.
    with writable(path):
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            _lock(lock, path, alone=alone)
        except BlockingIOError as error:
            holder = os.pread(lock, 200, 0).decode("utf-8", "replace").strip() or "unknown"
            raise RuntimeError(
                f"the run in {path} must be written by one call at a time; got a second one, while {holder} or its "
                f"workers go on: wait for its end, or end it"
            ) from error
        if alone:
            with writable(path):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} of {socket.gethostname()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _lock(lock: int, path: Path, *, alone: bool) -> None:
    """Hold a lock alone or with others; BlockingIOError if that cannot be now."""
    try:
        import fcntl
    except ImportError as error:
        raise CannotWrite("a corpus needs file locks, which Windows has not: run it on Linux or macOS") from error
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            raise CannotWrite(
                f"folder must be on a disk with file locks; got {path}: name another, or mount it so"
            ) from error
        raise


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the system's errors about a disk into a sentence about the folder."""
    try:
        yield
    except CannotWrite:
        raise
    except FileExistsError as error:
        raise CannotWrite(f"folder must be a folder; got the file {path}: name another") from error
    except OSError as error:
        says = UNWRITABLE.get(error.errno or 0, f"cannot be written ({error.strerror or error}): name another")
        raise CannotWrite(f"folder {path} {says}; what is done is kept, and the same call goes on") from error


def delete(path: str | os.PathLike[str]) -> None:
    """Delete the files of a run, and its folder if nothing else is in it."""
    folder = Folder(path)
    folder.about()
    with writing(path) as own:
        own.clear()
        with writable(own.path):
            (own.path / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        folder.path.rmdir()


def _name(first: int, size: int) -> str:
    return f"{first:08d}.safetensors" if size == 1 else f"{first:08d}-{first + size - 1:08d}.safetensors"


def _entry(line: bytes, where: str) -> Entry | End:
    try:
        given = json.loads(line)
        kind = End if "end" in given else Entry
        if kind is Entry:
            given["failures"] = tuple((number, reason) for number, reason in given.get("failures", ()))
        entry = kind(**given)
        wrong = [name for name, hint in kind.__annotations__.items() if not fits(getattr(entry, name), hint)]
        if isinstance(entry, Entry) and not 0 <= entry.shard < SHARDS:
            raise ValueError(f"shard cannot be {entry.shard}")
        if wrong:
            raise ValueError(f"{wrong[0]} cannot be {getattr(entry, wrong[0])!r:.40}")
        return entry
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}): delete this line, and its shard is measured again") from error
