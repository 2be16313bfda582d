"""Which device and dtype a model is loaded to, from their names, and how much memory the device has left."""

from __future__ import annotations

import psutil
import torch

from spd_lens.errors import SPDError
from spd_lens.models.torch_private import onednn_takes_bfloat16

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def resolve_device(name: str) -> torch.device:
    """`"auto"` is CUDA if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SPDError(f"unknown device {name!r}; write 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise SPDError(
            f"device {name!r} was asked for, but this machine has {torch.cuda.device_count()} CUDA devices; "
            "use device='cpu'"
        )
    try:
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise SPDError(f"device {name!r} cannot be used here ({reason}); use device='cpu'") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`"auto"` is bfloat16 where the hardware has matrix instructions for it and may use them, else float32."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        has_instructions = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if has_instructions and onednn_takes(torch.bfloat16) else torch.float32
    if name not in _DTYPES:
        raise SPDError(f"unknown dtype {name!r}; choose 'auto', {', '.join(map(repr, _DTYPES))}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` and the like, as `resolve_dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype on this processor.

    In bfloat16 it asks for AVX-512 or its like, which the environment may also have switched off
    (`ONEDNN_MAX_CPU_ISA=AVX2`). PyTorch's own products take every dtype everywhere.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn_takes_bfloat16())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory: on CUDA it has a type of its own, on a CPU only a message."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
