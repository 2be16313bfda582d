"""The null of shuffled answers: gradients of a run's calibration examples, each with another example's answer."""

from __future__ import annotations

from spd_lens.capture import extract
from spd_lens.controls import shuffled_answers
from spd_lens.moments import GradientMoments
from spd_lens.storage import is_made

from .inputs import Subject


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
