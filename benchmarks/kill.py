"""A corpus that is killed again and again: `python benchmarks/kill.py --kills 20 --ray 3`.

The serial run, then Ray's driver, then Ray's workers are ended with SIGKILL at random moments. After every kill the
same call goes on. Three things must hold: the results have the bits of a run that nobody killed, no shard that was
complete when a call began is measured again, and no temporary file is left. A tiny model; about a minute without Ray,
and half a minute per kill with it.
"""

import argparse
import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lens_probes as lp
from lens_probes.corpus.folder import Folder
from lens_probes.corpus.measuring import Work
from lens_probes.result import schema

PROBES = [lp.ResidualMean(), lp.RankShift(layers=[1])]  # sums, and rows
TEXTS = lp.demo.sentences()[:70]
SHARD_SIZE = 2
LONGEST = 300  # seconds that a call may take
SLOW = 1.0  # seconds per shard where workers are killed


def load(log: Path, pause: float) -> Any:
    """The model, in a process that writes down which shards it measures."""
    measure = Work.measure

    def measure_and_tell(work: Work, shard: Any, *others: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{shard.number} {os.getpid()}\n")
        time.sleep(pause)
        return measure(work, shard, *others)

    setattr(Work, "measure", measure_and_tell)  # noqa: B010  (another signature)
    return lp.tiny.bridge()


def told(log: Path) -> list[tuple[int, int]]:
    """The shards that were begun, and by which process."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(shard), int(process)) for shard, process in map(str.split, lines)]


def serial(folder: Path, log: Path) -> object:
    return lp.run_corpus(PROBES, load(log, 0.0), TEXTS, folder, shard_size=SHARD_SIZE, progress=False)


def with_ray(folder: Path, log: Path, pause: float = 0.1) -> object:
    made = functools.partial(load, log, pause)
    return lp.cluster.run_corpus(PROBES, made, TEXTS, folder, workers=2, shard_size=SHARD_SIZE, progress=False)


def started(run: Callable[[Path, Path], object], folder: Path, log: Path) -> int:
    """The same call in a process of its own, which need not import everything again."""
    process = os.fork()
    if process:
        return process
    try:
        output = os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run(folder, log)
    except RuntimeError as error:
        if "one call at a time" not in str(error):
            raise
        os._exit(3)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(process: int, seconds: float) -> int | None:
    """The exit code of a process that ends within some seconds, or None."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def finish(run: Callable[[Path, Path], object], folder: Path, log: Path) -> int:
    """Go on until the end; returns how often another process still held the folder."""
    refused, until = 0, time.monotonic() + LONGEST
    while time.monotonic() < until:
        code = ended(started(run, folder, log), LONGEST)
        if code == 0:
            return refused
        if code != 3:
            sys.exit(f"a call ended with {code}:\n{log.with_suffix('.err').read_text()[-3000:]}")
        refused += 1
        time.sleep(0.2)
    sys.exit("the folder stays locked")


class Checked:
    """A folder whose run is killed, and what must hold of it."""

    def __init__(self, own: Path, reference: list[Any]) -> None:
        self.folder, self.log, self.reference = own / "run", own / "log", reference

    def begin(self) -> None:
        """A call begins: what is complete must not be measured again."""
        done = Folder(self.folder).complete() if (self.folder / "run.json").exists() else {}
        self.complete, self.seen = set(done), len(told(self.log))

    def check_measured(self) -> None:
        again = self.complete & {shard for shard, _ in told(self.log)[self.seen :]}
        assert not again, f"measured again: {sorted(again)}"

    def check_end(self) -> None:
        self.check_measured()
        run = lp.open_run(self.folder)
        assert run.complete and not len(run.failures) and not len(run.failed_shards), run
        left = [path for path in self.folder.rglob("*") if path.name.startswith(".")]
        assert not left, left
        for one, other in zip(run.results, self.reference, strict=True):
            assert same(one, other), "other bits"


def same(one: Any, other: Any) -> bool:
    """Whether two results have the same bits."""
    names = [name for name in schema(type(one)).axes if getattr(one, name) is not None]
    tables = [one.token.to_frame().equals(other.token.to_frame())] if hasattr(one, "token") else []
    equal = [torch.equal(getattr(one, name), getattr(other, name)) for name in names]
    return all(equal + tables) and one.provenance == other.provenance


def kill_driver(run: Callable[[Path, Path], object], kills: int, reference: list[Any], limit: float) -> None:
    """Kill the process that runs, at random moments of what is left to do, and go on."""
    killed, refused, runs, until = 0, 0, 0, time.monotonic() + limit
    whole: float | None = None
    while killed < kills and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as own:
            each, runs = Checked(Path(own), reference), runs + 1
            complete = False
            while not complete and killed < kills and time.monotonic() < until and whole is not None:
                each.begin()
                process = started(run, each.folder, each.log)
                code = ended(process, random.uniform(0, whole))
                if code is None:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    killed += 1
                elif code == 3:
                    refused += 1
                    time.sleep(0.2)
                complete = code == 0
                if code not in (0, 3, None):
                    sys.exit(f"a call ended with {code}:\n{each.log.with_suffix('.err').read_text()[-3000:]}")
                each.check_measured()
            begun = time.monotonic()
            each.begin()
            refused += finish(run, each.folder, each.log)
            each.check_end()
            whole = whole or time.monotonic() - begun
    print(f"| {run.__name__}, the driver | {killed} | {runs} | {refused} |", flush=True)


def kill_workers(kills: int, reference: list[Any], limit: float) -> None:
    """Kill workers while they measure, as many in each run as it lasts for; the driver goes on.

    A worker takes some ten seconds to be replaced, which is when the other one is alone. So shards are slow here: then
    one start of Ray is enough for several kills.
    """
    killed, runs, until = 0, 0, time.monotonic() + limit
    slowly = functools.partial(with_ray, pause=SLOW)
    while killed < kills and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as own:
            each, runs = Checked(Path(own), reference), runs + 1
            each.begin()
            process, victims, code = started(slowly, each.folder, each.log), set[int](), None
            while killed < kills and code is None and time.monotonic() < until:
                code = ended(process, random.uniform(0, 3 * SLOW))
                alive = sorted({worker for _, worker in told(each.log)} - victims)
                if alive and code is None:
                    victims.add(victim := random.choice(alive))
                    try:
                        os.kill(victim, signal.SIGKILL)
                        killed += 1
                    except ProcessLookupError:  # it ended before
                        continue
            code = ended(process, LONGEST) if code is None else code
            assert code == 0, f"a call ended with {code}: {each.log.with_suffix('.err').read_text()[-3000:]}"
            each.begin()
            finish(with_ray if runs == 1 else serial, each.folder, each.log)
            each.check_end()
    print(f"| with_ray, a worker | {killed} | {runs} | 0 |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--kills", type=int, default=20, help="of the serial run")
    parser.add_argument("--ray", type=int, default=0, help="of Ray's driver, and as many of its workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each row of the table")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        print("| killed | times | runs that ended with the right bits | refused while another held the folder |")
        print("|---|---|---|---|", flush=True)
        model = lp.tiny.bridge()
        run = lp.run_corpus(PROBES, model, TEXTS, Path(own) / "run", shard_size=SHARD_SIZE, progress=False)
        reference = run.results
        if options.kills:
            kill_driver(serial, options.kills, reference, options.limit)
        if options.ray:
            kill_driver(with_ray, options.ray, reference, options.limit)
            kill_workers(options.ray, reference, options.limit)


if __name__ == "__main__":
    main()
