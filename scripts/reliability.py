"""What survives kills, power failures, full disks and hostile input? `make reliability` writes docs/reliability.md.

    PYTHONPATH=. python scripts/reliability.py --out docs/reliability.md

Everything runs on tiny random models in temporary directories. `--only states --jobs generate` runs a part; the table
keeps the rows of earlier calls that are not made again. Exit code 0: nothing was lost; 1: something was.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import spd_lens as spd
from spd_lens.errors import SPDError
from spd_lens.files import write_text
from spd_lens.output import single_command, start
from tests.reliability.crash_states import Recording, Tree, recording, states, write
from tests.reliability.faults import fill_disk, kill, n_writes, seconds_of
from tests.reliability.jobs import JOBS, ends, results, save_model

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: written by make reliability -->", "<!-- end of measured -->"
_PART = re.compile(r" \(of \d+\)")
"""How a row says that not all was tried."""
HEAD = ("| fault | tried | same result | refused in a sentence | lost |", "| --- | --: | --: | --: | --: |")
TESTS = {
    "files": (
        "strangers' and damaged files, Python and command line",
        (
            "test_artefacts.py",
            "test_bad_input_core.py",
            "tasks/test_bad_files.py",
            "tasks/test_own.py",
            "models/test_adapter_files.py",
            "models/test_templates.py",
            "runs/test_plain_yaml.py",
            "runs/test_run_dir.py",
            "runs/test_kept.py",
            "files/test_special_files.py",
            "training/test_checkpoint_dir.py",
        ),
    ),
    "programs": (
        "hostile and forging programs",
        (
            "sandbox/test_harm.py",
            "sandbox/test_forgery.py",
            "sandbox/test_seccomp.py",
            "sandbox/test_weak_tests.py",
        ),
    ),
    "pages": (
        "hostile text in pages and on the terminal",
        ("output", "analysis/dashboard/test_page.py", "analysis/dashboard/test_playground.py"),
    ),
}
"""The rows that are tests: what they are about, and their files. A test that failed counts as lost."""


@dataclass
class Row:
    """One line of the table."""

    fault: str
    same: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    """What went wrong, in words."""

    def count(self, end: str) -> None:
        """Add one attempt, by how `jobs.ends` or `faults.fill_disk` says that it ended."""
        if end == "same":
            self.same += 1
        elif end.startswith("refused"):
            self.refused += 1
        else:
            self.lost.append(end)

    def __str__(self) -> str:
        tried = self.same + self.refused + len(self.lost)
        return f"| {self.fault} | {tried} | {self.same} | {self.refused} | {len(self.lost)} |"


@dataclass(frozen=True)
class Plan:
    """How much is tried, and who does it."""

    kills: int
    states: int
    """At most so many states of a job, evenly taken; 0: all."""
    pool: ProcessPoolExecutor

    def taken(self, n: int) -> list[int]:
        """Which of n states are tried."""
        wanted = min(self.states or n, n)
        return [place * n // wanted for place in range(wanted)]

    def tally(self, what: str, job: str, fault: Callable[..., str | None], each: Sequence[Any]) -> Row:
        """Do a fault to a job, once for each of what may go wrong, and count how the job ends when it goes on."""
        taken = [each[number] for number in self.taken(len(each))]
        row = Row(f"{what}{f' (of {len(each)})' if len(taken) < len(each) else ''}: `{job}`")
        for end in [self.pool.submit(_attempt, job, fault, argument) for argument in taken]:
            row.count(end.result())
        return row


_pair: spd.ModelPair
"""The model of a worker."""


def _begin_worker(model: str) -> None:
    """Load the model, once in every worker."""
    global _pair
    torch.set_num_threads(1)
    _pair = spd.load(model, dtype="float32", device="cpu")
    gc.freeze()  # every training collects garbage, and what imports made is none


def _attempt(job: str, fault: Callable[..., str | None], argument: Any) -> str:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory).resolve()
        problem = fault(job, _pair, place, argument)
        return f"lost: {problem}" if problem else ends(job, _pair, place, _undisturbed(job)[1])


@cache
def _undisturbed(job: str) -> tuple[Recording, Mapping[str, str | bytes]]:
    """What an undisturbed job does and makes; each worker finds out for itself, so that the recording never travels."""
    with tempfile.TemporaryDirectory() as directory:
        with recording(Path(directory)) as made:
            JOBS[job](_pair, Path(directory))
        return made, results(Path(directory))


def _kill(job: str, pair: spd.ModelPair, place: Path, share: float) -> None:
    kill(job, pair, place, share * _seconds(job))


@cache
def _seconds(job: str) -> float:
    _undisturbed(job)  # what is loaded once is loaded by now
    with tempfile.TemporaryDirectory() as directory:
        return seconds_of(job, _pair, Path(directory))


def _crash(job: str, pair: spd.ModelPair, place: Path, number: int) -> None:
    write(_states(job)[number][1], place)


@cache
def _states(job: str) -> list[tuple[str, Tree]]:
    return list(states(_undisturbed(job)[0]))


def _n_states(job: str) -> int:
    return len(_states(job))


def _n_writes(job: str) -> int:
    with tempfile.TemporaryDirectory() as directory:
        return n_writes(job, _pair, Path(directory).resolve())


def kills(plan: Plan, job: str) -> Row:
    """Kills at instants that are evenly spread over the job's processor time."""
    shares = [(number + 0.5) / plan.kills for number in range(plan.kills)]
    return replace(plan, states=0).tally("killed at any instant", job, _kill, shares)


def crashes(plan: Plan, job: str) -> Row:
    """What a kill between two file operations or a power failure may leave on the disk."""
    n = plan.pool.submit(_n_states, job).result()
    return plan.tally("crash states of the disk", job, _crash, range(n))


def full_disks(plan: Plan, job: str) -> Row:
    """No room left from some write on; the sentence must name the file, and the job go on once there is room."""
    n = plan.pool.submit(_n_writes, job).result()
    return plan.tally("disk full from some write on", job, fill_disk, range(n))


FAULTS = {"kills": kills, "states": crashes, "disk": full_disks}
"""The rows that are made for each job."""
PARTS = (*FAULTS, "flips", *TESTS)


def tested(name: str) -> Row:
    """A row of tests."""
    fault, files = TESTS[name]
    row = Row(f"{fault} (tests)")
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junit-xml={report}"]
        subprocess.run([*command, *(f"tests/{file}" for file in files)], cwd=ROOT, stdout=subprocess.DEVNULL)
        for case in ET.parse(report).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                row.lost.append(f"{case.get('classname')}::{case.get('name')}")
            elif case.find("skipped") is None:
                row.refused += 1
    return row


def damaged(n: int) -> Iterator[Row]:
    """One kind of file after another, damaged and read as it is used."""
    from tests.reliability import flips

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "run"
        readers = flips.make(folder)
        for what, fault, times in (
            ("one bit flipped", "flip", n),
            ("cut off", "cut", n // 10),
            ("bytes appended", "append", n // 20),
        ):
            row = Row(f"{what}: {len(readers)} kinds of file")
            for name, read in readers.items():
                found = flips.tried(folder, name, read, fault, times)
                row.same += found.same
                row.refused += found.refused
                row.lost += found.wrong
            yield row


def document(text: str, rows: Iterable[Row]) -> str:
    """The page with the table between its two markers; rows that were not made again stay as they are."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = [line for line in old.splitlines() if line.startswith("|") and line not in HEAD]
    lines = {_PART.sub("", line.split(" | ")[0]): line for line in kept}
    lines |= {_PART.sub("", f"| {row.fault}"): str(row) for row in rows}
    return "\n".join([before + BEGIN, *HEAD, *lines.values(), END + after])


def main(
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(PARTS)}, with commas between.")] = "",
    jobs: Annotated[str, typer.Option(help=f"Some of {', '.join(JOBS)}, with commas between.")] = "",
    n_kills: Annotated[int, typer.Option("--kills", min=1, help="Kills of each job.")] = 50,
    n_states: Annotated[int, typer.Option("--states", help="Crash states and full disks of each job; 0: all.")] = 0,
    n_flips: Annotated[int, typer.Option("--flips", min=20, help="Flipped bits in each kind of file.")] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that try at the same time.")] = os.cpu_count() or 1,
    out: Annotated[Path | None, typer.Option(help="Page to write the table into: docs/reliability.md.")] = None,
) -> None:
    """Try every fault, and print what survived."""
    chosen = _chosen(only, PARTS)
    rows = list[Row]()

    def add(row: Row) -> None:
        rows.append(row)
        print(row, *row.lost, sep="\n", flush=True)
        if out is not None:  # what was measured survives an interruption
            write_text(out, document(out.read_text(encoding="utf-8"), rows))

    print(*HEAD, sep="\n")
    with tempfile.TemporaryDirectory() as model:
        save_model(Path(model))
        pool = ProcessPoolExecutor(workers, get_context("forkserver"), _begin_worker, (model,))
        with pool:
            plan = Plan(n_kills, n_states, pool)
            for name, job in itertools.product(chosen, _chosen(jobs, JOBS)):
                if name in FAULTS:
                    add(FAULTS[name](plan, job))
    for name in chosen:
        for row in damaged(n_flips) if name == "flips" else [tested(name)] if name in TESTS else []:
            add(row)
    if any(row.lost for row in rows):
        raise typer.Exit(1)


def _chosen(text: str, known: Iterable[str]) -> list[str]:
    chosen = [name.strip() for name in text.split(",")] if text else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise SPDError(f"unknown part {unknown[0]!r}; choose from {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    start(single_command(main), on_interrupt="the table holds what was done")
