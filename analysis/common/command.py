"""What all analysis commands share: they open the runs, log or are quiet, and show what was found.

An analysis is a function of a `Subject` (or of all of them) and of its own options, which returns `Findings`. Its name
and its question are listed in `analysis/index`, which is read without importing it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from spd_lens.analysis.common.subject import subjects
from spd_lens.errors import SPDError
from spd_lens.output import Console, set_up_logging

Quiet = Annotated[bool, typer.Option(help="Show warnings only: no log, and no progress bars.")]


@dataclass(frozen=True)
class Findings:
    """What an analysis found, for the terminal."""

    table: Table
    says: str
    """What the numbers mean, in sentences."""
    files: Sequence[Path] = ()
    label: Literal["written", "Figures"] = "written"

    def show(self) -> None:
        """Print the table, the sentences and where the files are."""
        console = Console()
        console.print(self.table)
        console.print(self.says, highlight=False, markup=False)
        if self.files:
            files = ", ".join(map(str, self.files))
            console.print(f"{self.label}: {files}", highlight=False, markup=False, soft_wrap=True)


def analysis(
    *, runs: str = "Run directories.", together: str = ""
) -> Callable[[Callable[..., Findings | None]], Callable[..., None]]:
    """Make a command of a function: its first parameter becomes the argument `runs`, and it also gets `--quiet`.

    Args:
        runs: Help text of the run directories.
        together: Where the function takes two runs or more at once: what a reader is told who names only one.
            Otherwise the function is called for one run after the other.
    """

    def decorate(work: Callable[..., Findings | None]) -> Callable[..., None]:
        def command(runs: Sequence[str | Path], quiet: bool = False, **options: Any) -> None:
            set_up_logging(quiet)
            if together and len(runs) < 2:
                raise SPDError(together)
            found = subjects(runs, progress=not quiet)
            for subject in [found] if together else found:
                findings = work(subject, **options)
                if findings is not None:
                    for one in found:
                        one.record(findings.files)
                    findings.show()

        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        paths = Annotated[list[Path], typer.Argument(help=runs)]
        parameters = [
            inspect.Parameter("runs", kind[0], annotation=paths), *own,
            inspect.Parameter("quiet", kind[1], annotation=Quiet, default=False),
        ]  # fmt: skip
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        command.__doc__, command.__name__, command.__module__ = work.__doc__, work.__name__, work.__module__
        return command

    return decorate
