"""From a local directory to a transformers model with whole weights: de-quantised, merged, on one device or several."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spd_lens.errors import SPDError, one_line
from spd_lens.models.adapter_files import check_adapter, layers_of_models
from spd_lens.models.adapters import merged_copy
from spd_lens.models.config_files import check_layers, read_settings
from spd_lens.models.decoder import refuse_encoder
from spd_lens.models.device_map import check_spread
from spd_lens.models.multimodal import auto_class, text_part
from spd_lens.models.twin import cast
from spd_lens.models.weights import of_peft


def read_checkpoint(directory: Path, dtype: torch.dtype, trust_remote_code: bool, **placed: Any) -> PreTrainedModel:
    """A checkpoint, or an adapter merged in float32 into its base, which may be an adapter's directory in its turn.

    `placed` are `device_map` and `offload_folder` of transformers, for a checkpoint whose weights stay as they are.
    """
    checkpoint, stack = layers_of_models(directory)
    if stack and placed:
        raise SPDError(
            f"{directory} is an adapter, and a model with a device_map takes none; load it on one device, or save "
            "spd_lens.load(...).hf and load that with the device_map"
        )
    if stack:
        for adapter in stack:
            check_adapter(adapter)  # before anything large is read
        twin = read_checkpoint(checkpoint, torch.float32, trust_remote_code)
        for adapter in stack:
            twin = merged_copy(twin, adapter)
        return cast(twin, dtype)
    settings = read_settings(directory)
    quantised = _quantisation(directory, settings)
    check_layers(directory, settings)
    if quantised and placed:
        raise SPDError(
            f"the weights in {directory} are quantised and would be de-quantised on one device; save "
            "spd_lens.load(...).hf and load that with the device_map"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        refuse_encoder(config, type(config).__name__.removesuffix("Config"))
        twin, report = auto_class(config).from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **placed,
        )
    except SPDError:
        raise
    except Exception as error:  # transformers and safetensors raise many types on a damaged or unknown model
        raise SPDError(f"the model in {directory} cannot be loaded: {one_line(error, 300)}") from error
    if report["missing_keys"]:  # transformers would make these up at random, with a warning
        missing = min(report["missing_keys"])
        raise SPDError(
            f"the model in {directory} cannot be loaded: its files lack {missing} "
            f"({len(report['missing_keys'])} weights in all); get a complete copy"
        )
    if not placed:
        _unmap(twin)
    return text_part(_dequantised(twin, dtype) if quantised else twin)


@torch.no_grad()
def _unmap(twin: nn.Module) -> None:
    """Give weights memory of their own. transformers leaves what it need not convert mapped to its file: whoever writes
    over the file would change the model, and a shorter file would end the process."""
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def check_whole(twin: nn.Module) -> None:
    """Refuse a model whose weights cannot be read and written in place.

    Raises:
        SPDError: they are quantised, or on the device "meta"; the embedding is offloaded; or there is an adapter on
            them.
    """
    if getattr(twin, "is_quantized", False):
        raise SPDError(
            f"the weights of {type(twin).__name__} are quantised, so no projection can be written into them; load it "
            "by name or directory with spd_lens.load, which de-quantises bitsandbytes and GGUF weights"
        )
    if any(map(of_peft, twin.modules())):
        raise SPDError(
            f"{type(twin).__name__} carries a PEFT adapter; merge it (model.merge_and_unload()), load the adapter's "
            "directory with spd_lens.load, or give the model without it and pass adapter= where you want it"
        )
    if not isinstance(twin, PreTrainedModel):
        raise SPDError(
            f"{type(twin).__name__} is not a model of transformers; give the model itself, which wrappers for several "
            "devices or processes keep as .module"
        )
    check_spread(twin)


def _quantisation(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether a checkpoint's weights are bitsandbytes'; any other quantisation is refused, before a weight is read."""
    quantisation = settings.get("quantization_config")
    if not quantisation:
        return False
    method = quantisation.get("quant_method", "") if isinstance(quantisation, dict) else str(quantisation)[:40]
    method = method or "an unnamed method"
    if method != "bitsandbytes":
        raise SPDError(
            f"the weights in {directory} are quantised with {method}, which spd_lens has not been tried with: whether "
            "gradients are right and how a projection is folded into them is not known; give the unquantised model, or "
            "one in GGUF or bitsandbytes"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SPDError(
            f"the weights in {directory} are quantised with bitsandbytes, which is needed to de-quantise them and is "
            "not installed; pip install 'spd-lens[quantised]', or give the unquantised model"
        )
    return True


def _dequantised(quantised: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The same numbers in a new model that was never quantised, with nothing of the quantiser on it."""
    wide = quantised.dequantize()
    config = copy.deepcopy(wide.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin: PreTrainedModel = type(wide)(config).to(torch.float32)
    state = wide.state_dict()
    for name, module in twin.named_modules():
        if isinstance(module, Conv1D) and isinstance(wide.get_submodule(name), nn.Linear):
            state[f"{name}.weight"] = state[f"{name}.weight"].T
    twin.load_state_dict(state)
    twin.generation_config = wide.generation_config
    return cast(twin, dtype)
