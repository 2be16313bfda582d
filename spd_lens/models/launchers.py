"""What launchers and accelerate leave in a process: variables and shared state that its libraries read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from accelerate.state import AcceleratorState, GradientState, PartialState

_PREFIXES = (
    "ACCELERATE_", "DEEPSPEED_", "FP8_", "FSDP_", "MEGATRON_LM_", "MV2_", "OMPI_", "PARALLELISM_CONFIG_", "PMI_", "SM_",
    "SMDATAPARALLEL_", "TORCHELASTIC_", "XLA_",
)  # fmt: skip
_NAMES = {
    "FORK_LAUNCHED", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK",
    "WORLD_SIZE",
}  # fmt: skip


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """While open, no variable says that this process is one of several, or how accelerate is to train in it.

    Without this, `ACCELERATE_MIXED_PRECISION` would train in another precision, `ACCELERATE_USE_FSDP` load no weights
    in most processes, and `LOCAL_RANK` wait for processes that do not come. Afterwards variables and accelerate's
    state are as they were, for the caller's own training.
    """
    own = dict(os.environ)
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    try:
        for name in own:
            if name in _NAMES or name.startswith(_PREFIXES):
                del os.environ[name]
        for state in states:
            state.clear()
        yield
    finally:
        for name in os.environ.keys() - own.keys():
            del os.environ[name]
        for name, value in own.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        for state, content in zip(states, kept, strict=True):
            state.clear()
            state.update(content)
