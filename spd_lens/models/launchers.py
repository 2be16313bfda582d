"""What launchers and accelerate leave in a process: variables and shared state that its libraries read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from spd_lens.errors import SPDError

_PREFIXES = (
    "ACCELERATE_", "DEEPSPEED_", "FP8_", "FSDP_", "MEGATRON_LM_", "MV2_", "OMPI_", "PARALLELISM_CONFIG_", "PMI_", "SM_",
    "SMDATAPARALLEL_", "TORCHELASTIC_", "XLA_",
)  # fmt: skip
_NAMES = {
    "FORK_LAUNCHED", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK",
    "WORLD_SIZE",
}  # fmt: skip


_STATES = (PartialState, AcceleratorState, GradientState)
_NUMBERS = ("ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_", "ACCELERATE_MIXED_PRECISION", "FP8_")
"""Variables by which a launcher's configuration would change what is computed, and not only where."""


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """While open, no variable says that this process is one of several, or how accelerate is to train in it.

    Without this, `ACCELERATE_MIXED_PRECISION` would train in another precision, `ACCELERATE_USE_FSDP` load no weights
    in most processes, and `LOCAL_RANK` wait for processes that do not come. Afterwards variables and accelerate's
    state are as they were, for the caller's own training.
    """
    with _kept():
        for name in list(os.environ):
            if name in _NAMES or name.startswith(_PREFIXES):
                del os.environ[name]
        for state in _STATES:
            state._shared_state.clear()
        yield


@contextlib.contextmanager
def several_processes(device: torch.device) -> Iterator[PartialState]:
    """While open, this process and the others that its launcher started are one group, which accelerate trains in.

    The launcher says how many there are and which engine they train with; precision and accumulation are left to the
    caller's settings. Variables, accelerate's state and, where all went well, the group are afterwards as they were.

    Args:
        device: Where this process computes: on a CPU the group talks through gloo, else through NCCL.

    Raises:
        SPDError: no launcher has started this process, or the device is not the one that it was given.
    """
    with _kept():
        for name in list(os.environ):
            if name.startswith(_NUMBERS):
                del os.environ[name]
        had_group = torch.distributed.is_initialized()
        for state in _STATES:
            state._shared_state.clear()
        state = PartialState(cpu=device.type == "cpu")
        if state.distributed_type == DistributedType.NO:
            raise SPDError(
                "training in parallel needs processes that a launcher starts, and this one was started alone; use "
                "accelerate launch --config_file FILE -m spd_lens finetune --parallel ... (docs/parallel-training.md)"
            )
        if device.type == "cuda" and device != state.device:
            raise SPDError(
                f"the model of process {state.process_index} is on {device}, and the launcher gave that process "
                f"{state.device}; load it with device='{state.device}'"
            )
        yield state
        if not had_group:
            torch.distributed.destroy_process_group()


def own_device(name: str) -> str:
    """Which GPU `auto` and `cuda` mean in one of a launcher's processes: the one that the launcher gives to it."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return name


def fails_first() -> bool:
    """Whether no other process of the same launcher has asked this before: of several that fail, one says why.

    True in a process that stands alone, and where the launcher's store cannot be reached.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store, _, _ = next(iter(torch.distributed.rendezvous("env://")))
        return bool(store.add("spd_lens/failed", 1) == 1)
    except (RuntimeError, ValueError):  # torch's own errors of the network are RuntimeErrors
        return True


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Put variables and accelerate's state back afterwards."""
    own = dict(os.environ)
    kept = [dict(state._shared_state) for state in _STATES]
    try:
        yield
    finally:
        for name in os.environ.keys() - own.keys():
            del os.environ[name]
        for name, value in own.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        for state, content in zip(_STATES, kept, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)
