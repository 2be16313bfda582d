"""What can be known to be wrong before a run directory is made or an expensive stage begins."""

from __future__ import annotations

from collections.abc import Mapping

from spd_lens.check import require_core
from spd_lens.config import SPDConfig
from spd_lens.decoding import Decoding
from spd_lens.errors import SPDError
from spd_lens.fitting import forced_texts
from spd_lens.generation import check_room
from spd_lens.models import ModelPair
from spd_lens.models.backends import choose_backends
from spd_lens.models.devices import resolve_device, resolve_dtype
from spd_lens.subspace import resolve_rank
from spd_lens.tasks import Task
from spd_lens.training import resolve_targets


def check_settings(config: SPDConfig) -> None:
    """Refuse what is wrong whatever the model: needs no model."""
    choose_backends(config.backend)
    resolve_dtype(config.dtype, resolve_device(config.device))


def check_data(config: SPDConfig, source: Task, targets: Mapping[str, Task]) -> None:
    """Refuse sizes that the data sets do not have and tasks that cannot be scored here: needs no model."""
    source.calibration(config.n_calibration, config.data_seed)
    source.train(config.n_train, config.data_seed)
    for name, task in targets.items():
        task.test(config.n_test(name), config.data_seed)
        task.check_scorable()


def check_subspace(config: SPDConfig, pair: ModelPair) -> None:
    """Refuse layers and ranks that the model does not have."""
    shape = pair.fingerprint
    for site in pair.sites(config.layers, config.kinds):
        n_heads, d_head = shape.heads_at(site)
        resolve_rank(config.rank, d_head * (1 if config.per_head else n_heads))


def check_model(config: SPDConfig, pair: ModelPair, source: Task, targets: Mapping[str, Task]) -> None:
    """Refuse settings and texts that this model cannot take: layers, ranks, LoRA targets, prompts beyond its context.

    And refuse a model for which hooks, folding and gradients are not what a run takes them for (`require_core`).
    Everything is tokenised once for this: a prompt that is too long should not come to light after the training.
    """
    check_subspace(config, pair)
    Decoding.of(pair, config.sampling)
    if config.method == "lora":
        resolve_targets(pair.hf, config.lora_targets)
    require_core(pair, config.layers, config.kinds)  # before a lens model is built, which would fail and say less
    texts = source.calibration(config.n_calibration, config.data_seed)
    longest = max(len(pair.encode(example, config.loss, config.engine).ids) for example in texts)
    if config.engine == "lens":
        pair.lens_if_any(longest)  # the one that the run uses: the record of the run names its backend
    check_room(pair, source.train(config.n_train, config.data_seed), config.max_new_tokens)
    for name, task in targets.items():
        items = task.test(config.n_test(name), config.data_seed)
        try:
            check_room(pair, items, task.max_new_tokens)
        except SPDError as error:
            raise SPDError(f"{name} cannot be evaluated (its option max_new_tokens is the limit): {error}") from error
        for text in (text for item in items for text in forced_texts(task, item)):
            pair.encode(text)
