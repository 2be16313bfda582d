"""Copies in place of all that a twin holds, so that whoever writes to it never writes to its own weights."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from spd_lens.errors import SPDError
from spd_lens.models.neutral import neutral
from spd_lens.models.torch_private import is_lazy, lazy_copy, own_memory, times_written


@contextlib.contextmanager
def untouched(twin: PreTrainedModel, *, writable: bool = True) -> Iterator[None]:
    """While open, the twin's modules hold copies: of parameters, buffers, configs, and of their tables of these.

    Parameters are `lazy_copy`, which takes memory only for what is written to. Whatever is put on the twin meanwhile,
    written into it or taken away from it is done to the copies; afterwards each module has its own attributes again.
    Submodules are not copied, so that references to them stay good. With `writable=False` weights and buffers are not
    copied either: what is done inside only adds to them.

    Raises:
        SPDError: afterwards the twin is not what it was: something inside wrote to weights that it held from before.
    """
    plain = [parameter for parameter in twin.parameters() if not is_lazy(parameter)]
    own_memory(twin)
    held = [(module, dict(vars(module))) for module in twin.modules()]
    gradients = [(parameter, parameter.grad) for parameter in twin.parameters()]
    before = state_digest(twin)
    copies: dict[int, Any] = {} if writable else {id(own): own for own in (*twin.parameters(), *twin.buffers())}
    try:
        with neutral():  # in inference mode they would be inference tensors, which nothing else takes
            for module, attributes in held:
                vars(module).update({name: _copied(value, copies) for name, value in attributes.items()})
        yield
    finally:
        for module, attributes in held:
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, gradient in gradients:  # which a training clears
            parameter.grad = gradient
        copies.clear()
        for parameter in plain:
            parameter.data_ptr()  # asked for as if to write: a storage that nobody shares any more is ordinary again
    if state_digest(twin) != before:
        raise SPDError(
            f"the weights of {type(twin).__name__} were changed while an adapter was on, by something that held them "
            "from before; load the model again, and change a model with pair.sync(to='twin') or before it is a pair"
        )


def state_digest(twin: PreTrainedModel) -> str:
    """Tells in about two milliseconds whether a twin is what it was: modules, configs and weights.

    Of weights it sees how often torch wrote to them, and about 16 entries of each.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in twin.named_modules():
        digest.update(f"{name} {id(module)} {module.training}".encode())
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        flat = tensor.detach().flatten()
        some = flat[:: max(flat.numel() // 16, 1)].clone().cpu().view(torch.uint8)  # numpy would end lazy sharing
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {times_written(tensor)} {tensor.requires_grad}".encode()
        )
        digest.update(some.numpy().tobytes())
    for config in (twin.config, twin.generation_config):
        digest.update(repr(None if config is None else sorted(config.to_dict().items(), key=str)).encode())
    return digest.hexdigest()


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of a value that can be written to, the same for the same object; tables are copied with their content."""
    if isinstance(value, (Tensor, PretrainedConfig, GenerationConfig)):
        if id(value) not in copies:
            copies[id(value)] = copy.deepcopy(value, copies) if not isinstance(value, Tensor) else _tensor(value)
        return copies[id(value)]
    if isinstance(value, dict):
        table = copy.copy(value)  # of its own kind: handles of hooks refer weakly to an OrderedDict
        table.update({key: _copied(entry, copies) for key, entry in value.items()})
        return table
    return copy.copy(value) if isinstance(value, (list, set)) else value


def _tensor(own: Tensor) -> Tensor:
    copied = lazy_copy(own)
    return nn.Parameter(copied, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else copied
