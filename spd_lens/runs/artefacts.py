"""`Artefacts`: the files that one training leaves, in a run directory or in a cell of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from spd_lens.evaluation import EvalResult, ForcedItem
from spd_lens.files import is_made, read_json, write_json
from spd_lens.generation import Corpus
from spd_lens.subspaces import Subspace
from spd_lens.training import is_finished


class Artefacts:
    """Where the files are, what they hold, and whether they exist. A damaged file counts as missing."""

    path: Path

    @property
    def subspace_path(self) -> Path:
        return self.path / "subspace.safetensors"

    @property
    def subspace(self) -> Subspace:
        return Subspace.load(self.subspace_path)

    @property
    def has_subspace(self) -> bool:
        return is_made(self.subspace_path, Subspace.load)

    @property
    def corpus_path(self) -> Path:
        return self.path / "corpus.jsonl"

    @property
    def corpus(self) -> Corpus:
        return Corpus.load(self.corpus_path)

    @property
    def has_corpus(self) -> bool:
        """Whether there is a completion of every prompt."""
        return Corpus.is_finished(self.corpus_path)

    @property
    def adapter(self) -> Path:
        """The PEFT adapter, or a whole checkpoint."""
        return self.path / "adapter"

    @property
    def is_trained(self) -> bool:
        return is_finished(self.path / "adapter")

    def effects_path(self, task: str, *, side: bool = False) -> Path:
        """The file of teacher-forced effects on a task, or on a set of texts that show side effects."""
        return self.path / ("side_effects" if side else "effects") / f"{task}.json"

    def effects(self, task: str, *, side: bool = False) -> dict[str, list[ForcedItem]]:
        """Teacher-forced effects by policy: in a run `base`, `projected`, `spd`, `random-0`, ...

        In a cell of a study they are `trained`, and `projected` where the method projects.
        """
        return read_json(self.effects_path(task, side=side), dict[str, list[ForcedItem]])

    def has_effects(self, task: str, *, side: bool = False) -> bool:
        return is_made(self.effects_path(task, side=side), lambda path: read_json(path, dict[str, list[ForcedItem]]))

    def write_effects(self, task: str, effects: Mapping[str, Sequence[ForcedItem]], *, side: bool = False) -> None:
        """Keep teacher-forced effects by policy."""
        record = {policy: [item.to_dict() for item in items] for policy, items in effects.items()}
        write_json(self.effects_path(task, side=side), record)

    def result_path(self, task: str, policy: str) -> Path:
        """The file of the scored completions of a task's test items."""
        return self.path / "eval" / task / f"{policy}.json"

    def has_result(self, task: str, policy: str) -> bool:
        return is_made(self.result_path(task, policy), EvalResult.load)
