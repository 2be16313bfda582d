"""The null of shuffled answers: gradients of a run's calibration examples, each with another example's answer."""

from __future__ import annotations

from spd_lens.analysis.common.subject import Subject
from spd_lens.files import is_made
from spd_lens.subspaces import GradientMoments, extract, shuffled_answers


def shuffled_moments(subject: Subject, moments: GradientMoments, seed: int = 0) -> GradientMoments:
    """Moments of the run's calibration examples with shuffled answers: extracted once, kept in `analysis/`."""
    path = subject.folder / f"moments-shuffled-{seed}.safetensors"
    if not is_made(path, GradientMoments.load):
        config = subject.run.config
        layers = sorted({site.layer for site in moments.sites})
        wrong = subject.task.kept("calibration", shuffled_answers(subject.calibration(), seed))
        extract(
            subject.pair, wrong, layers=layers, kinds=config.kinds, loss=config.loss, engine=config.engine,
            progress=subject.progress,
        ).save(path)  # fmt: skip
    return GradientMoments.load(path)
