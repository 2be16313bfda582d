"""SPD with the subspace of another estimator: one method for each that is registered, found when methods are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from spd_lens import estimators
from spd_lens.methods.base import Method
from spd_lens.methods.registry import family
from spd_lens.methods.spd import SelfPolicyDistillation
from spd_lens.runs import Experiment, SPDConfig
from spd_lens.subspaces import Subspace


class Estimated(SelfPolicyDistillation):
    """Generate under the projection onto an estimator's subspace."""

    estimator: ClassVar[str]
    """The estimator's name."""

    def check(self, config: SPDConfig) -> None:
        estimators.get(self.estimator).check(config.shape)

    def subspace(self, experiment: Experiment) -> Subspace:
        return experiment.subspace(estimator=self.estimator)


@family
def estimated() -> Iterator[type[Method]]:
    """`spd-NAME` for every estimator; those of the paper and of random directions are `spd` and `spd-random`."""
    for name in estimators.names():
        if name not in ("paper", "random"):
            found = estimators.get(name)
            own = {
                "name": f"spd-{name}", "says": f"SPD with the estimator {name}: {found.says}", "estimator": name,
                "needs": found.needs, "is_control": found.is_control,
            }  # fmt: skip
            yield type("Estimated", (Estimated,), own)
