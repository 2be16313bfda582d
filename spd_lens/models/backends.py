"""The two generations of TransformerLens behind one small interface: build, run, read weights, write weights."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError, one_line
from spd_lens.models.tokenizer import text_ids
from spd_lens.models.torch_private import lazy_copy, own_memory

BACKENDS = ("auto", "hooked", "bridge")

# Buffers that a converted state dict does not carry: HookedTransformer computes them when it is built.
_COMPUTED = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
# TransformerLens picks an architecture by name for paths that hold one of these words, and then misreads the config.
_MISLEADING = ("llama", "gemma", "medgemma")


class NoLens(SPDError):
    """TransformerLens has no lens model that agrees with the twin."""

    def __init__(self, reason: str, instead: str) -> None:
        super().__init__(f"{reason}; {instead}")
        self.reason = reason
        """The first half of the message, without what to do about it."""


class Backend(ABC):
    """What the library needs of a TransformerLens generation."""

    name: str
    lens_class: str
    """What its lens models are called."""
    instead: str
    """What to do where it does not take a model."""

    @abstractmethod
    def build(self, twin: PreTrainedModel, tokenizer: Any) -> nn.Module:
        """A lens model with the twin's weights, unprocessed, in the twin's dtype and on its device."""

    @abstractmethod
    def write(self, lens: Any, twin: PreTrainedModel) -> None:
        """Give the lens model the twin's weights, as `lazy_copy`."""

    @abstractmethod
    def read(self, lens: Any, twin: PreTrainedModel) -> dict[str, Tensor]:
        """The lens model's weights under the twin's parameter names and in its shapes."""

    def _refusal(self, fault: str) -> NoLens:
        return NoLens(f"transformer-lens {importlib.metadata.version('transformer-lens')} {fault}", self.instead)


def choose_backends(name: str) -> list[Backend]:
    """The backends to try, in turn. `"auto"`: HookedTransformer where transformer-lens has it (before 4.0), then
    TransformerBridge."""
    if name not in BACKENDS:
        raise SPDError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    try:
        version = Version(importlib.metadata.version("transformer-lens"))
    except importlib.metadata.PackageNotFoundError:  # the twin works alone, and who asks for a lens model is told
        version = Version("4")
    has_hooked = version < Version("4")
    if name == "hooked" and not has_hooked:
        raise SPDError(
            f"backend 'hooked' needs HookedTransformer, which transformer-lens {version} no longer has; "
            "install the extra 'hooked' (pip install 'transformer-lens>=3.9,<4') or use backend='bridge'"
        )
    if name == "auto":
        return [HookedBackend(), BridgeBackend()] if has_hooked else [BridgeBackend()]
    return [HookedBackend() if name == "hooked" else BridgeBackend()]


def lens_logits(
    lens: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of either lens model on token ids, with padding masked out."""
    return lens(tokens, attention_mask=mask, return_type="logits")


class HookedBackend(Backend):
    """`HookedTransformer` (transformer-lens 3.9)."""

    name = "hooked"
    lens_class = "HookedTransformer"
    instead = "use backend='bridge' or engine='twin'"

    def build(self, twin: PreTrainedModel, tokenizer: Any) -> Any:
        from transformer_lens import HookedTransformer

        cfg = self._config(twin)
        # follow the twin: prepend BOS to text only where the tokenizer itself does
        cfg.default_prepend_bos = text_ids(tokenizer, "a")[:1] == [tokenizer.bos_token_id]
        with _quiet(), _readable(tokenizer) as own:
            lens = HookedTransformer(cfg, own, move_to_device=False)
            lens.to(twin.device)
        lens.eval().requires_grad_(False)
        own_memory(twin)
        self.write(lens, twin)
        return lens

    def write(self, lens: Any, twin: PreTrainedModel) -> None:
        state = self._converted(twin, lens.cfg)
        own = lens.state_dict()
        for key in own:  # some conversions leave out biases that the architecture does not have
            if key.rsplit(".", 1)[-1].startswith("b_") and key not in state:
                state[key] = torch.zeros_like(own[key])
        shapes = {key: value.shape for key, value in own.items() if key.rsplit(".", 1)[-1] not in _COMPUTED}
        wrong = [key for key, shape in shapes.items() if key not in state or state[key].shape != shape]
        wrong += [key for key in state if key not in shapes]
        if wrong:
            raise self._refusal(f"does not convert all weights of {type(twin).__name__} (e.g. {wrong[0]})")
        _give(lens.state_dict(keep_vars=True), state)

    def read(self, lens: Any, twin: PreTrainedModel) -> dict[str, Tensor]:
        cfg = copy.deepcopy(lens.cfg)
        cfg.dtype, cfg.device = torch.float64, "cpu"
        return _read_back(lambda places: self._converted(places, cfg), lens.state_dict(), twin)

    def _config(self, twin: PreTrainedModel) -> Any:
        from transformer_lens import loading_from_pretrained as loading

        with _quiet(), _config_directory(twin) as directory:
            try:
                return loading.get_pretrained_model_config(
                    directory, dtype=twin.dtype, device=str(twin.device), fold_ln=False
                )
            except (NotImplementedError, KeyError, AttributeError, TypeError) as error:
                reason = one_line(error, 100)
                raise self._refusal(
                    f"cannot convert {type(twin).__name__} to a HookedTransformer ({reason})"
                ) from error

    def _converted(self, twin: PreTrainedModel, cfg: Any) -> dict[str, Tensor]:
        from transformer_lens import loading_from_pretrained as loading

        with _quiet(), _config_directory(twin) as directory, torch.no_grad():
            return loading.get_pretrained_state_dict(directory, cfg, hf_model=twin)


class BridgeBackend(Backend):
    """`TransformerBridge` (transformer-lens 3.9 and 4): wraps a Hugging Face model of its own."""

    name = "bridge"
    lens_class = "TransformerBridge"
    instead = "work on the twin alone (engine='twin', folded)"

    def build(self, twin: PreTrainedModel, tokenizer: Any) -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        own_memory(twin)
        # the bridge rewires the model it is given, so the twin must stay out of it
        weights = {id(p): nn.Parameter(lazy_copy(p), requires_grad=False) for p in twin.parameters()}
        inner = copy.deepcopy(twin, weights)
        inner.config.architectures = [type(twin).__name__]  # a model made in memory does not name it
        inner.config.return_dict = True  # as in `run_twin`
        inner.config.output_attentions = inner.config.output_hidden_states = False
        name = getattr(twin.config, "_name_or_path", "") or type(twin).__name__
        try:
            with _quiet(), _readable(tokenizer) as own:
                lens = TransformerBridge.boot_transformers(
                    name, hf_model=inner, tokenizer=own, device=twin.device, dtype=twin.dtype
                )
        except (ValueError, NotImplementedError, RuntimeError) as error:
            reason = one_line(error, 100)
            raise self._refusal(f"has no TransformerBridge for {type(twin).__name__} ({reason})") from error
        lens.eval()
        for parameter in lens.original_model.parameters():
            parameter.requires_grad_(False)
        return lens

    def write(self, lens: Any, twin: PreTrainedModel) -> None:
        mine = self._named(lens)
        source = dict(twin.named_parameters())
        if not source.keys() <= mine.keys():  # split or renamed, as fused QKV is: let another bridge do that again
            source = self._named(self.build(twin, lens.tokenizer))
        _give(mine, source)

    def read(self, lens: Any, twin: PreTrainedModel) -> dict[str, Tensor]:
        mine = self._named(lens)
        if all(key in mine for key, _ in twin.named_parameters()):
            return {key: mine[key].detach().clone() for key, _ in twin.named_parameters()}
        # the fused matrix is kept beside its parts, which are what is computed with
        parts = {key: parameter for key, parameter in mine.items() if ".qkv." not in key}
        return _read_back(lambda places: dict(self._named(self.build(places, lens.tokenizer))), parts, twin)

    def _named(self, lens: Any) -> dict[str, nn.Parameter]:
        """The bridge's own parameters under the twin's names as far as it only adds wrappers to the path."""
        return {key.replace("._original_component", ""): p for key, p in lens.original_model.named_parameters()}


def _give(mine: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Give each of `weights` to the parameter of its name, which stays the same object."""
    lacking = weights.keys() - mine.keys()
    if lacking:
        raise SPDError(
            f"the lens model has no {min(lacking)} of its own, since it ties its embeddings, and these weights are not "
            "tied; make a pair of the model that has them (spd_lens.load of an adapter's directory merges it)"
        )
    for key, weight in weights.items():
        mine[key].data = lazy_copy(weight.to(mine[key]))


def _read_back(
    convert: Callable[[PreTrainedModel], Mapping[str, Tensor]],
    lens_state: Mapping[str, Tensor],
    twin: PreTrainedModel,
) -> dict[str, Tensor]:
    """Invert a conversion from twin to lens: convert running indices and read off where each weight went."""
    places = copy.deepcopy(twin).to(device="cpu", dtype=torch.float64)  # float64 counts exactly to 2^53
    sizes: dict[str, tuple[int, int]] = {}
    first = 1  # 0 marks what the conversion makes up, such as the zero biases of a bias-free model
    with torch.no_grad():
        for key, parameter in places.named_parameters():  # tied parameters appear once
            end = first + parameter.numel()
            parameter.copy_(torch.arange(first, end, dtype=torch.float64).view_as(parameter))
            sizes[key] = (first, end)
            first = end
    index = {key: value.detach().round().long() for key, value in convert(places).items()}
    flat = torch.full((first,), torch.nan, dtype=torch.float64)
    weights = {key: value.detach().double().cpu() for key, value in lens_state.items() if key in index}
    flat[0] = 0.0
    for key, value in weights.items():
        flat[index[key].flatten()] = value.flatten()
    flat[0] = 0.0  # made-up entries all wrote here
    for key, value in weights.items():  # two lens tensors of one tied parameter, or an edited made-up bias
        if not torch.equal(flat[index[key]], value):
            raise SPDError(
                f"the lens model's {key} cannot be brought to {type(twin).__name__}, which has no such free "
                "parameter (a bias it lacks, or embeddings it ties); undo that edit or untie the twin"
            )
    parameters = dict(twin.named_parameters())
    read = {key: flat[low:high].view(parameters[key].shape) for key, (low, high) in sizes.items()}
    return {key: value for key, value in read.items() if not torch.isnan(value).any()}


@contextlib.contextmanager
def _config_directory(twin: PreTrainedModel) -> Iterator[str]:
    """A directory with the twin's config alone: TransformerLens reads a config only from a path or a listed name."""
    with tempfile.TemporaryDirectory(prefix="spd_") as directory:
        if any(word in directory.lower() for word in _MISLEADING):
            raise SPDError(
                f"the temporary directory {directory} has a model family in its name, by which transformer-lens would "
                "misjudge the architecture; set TMPDIR to another path"
            )
        config = copy.deepcopy(twin.config)
        config.architectures = [type(twin).__name__]
        config.save_pretrained(Path(directory))
        yield directory


@contextlib.contextmanager
def _readable(tokenizer: Any) -> Iterator[Any]:
    """A copy for the lens model. TransformerLens reads a tokenizer a second time from where it came from, which for one
    made in memory is nowhere, and otherwise may be the hub."""
    own = copy.deepcopy(tokenizer)
    with tempfile.TemporaryDirectory(prefix="spd_") as directory:
        if not (Path(own.init_kwargs.get("name_or_path", "")) / "tokenizer.json").is_file():
            tokenizer.save_pretrained(directory)
            own.init_kwargs["name_or_path"] = directory
        yield own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TransformerLens prints, and advises what is not done here on purpose: process weights, use the bridge."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            yield
    finally:
        root.setLevel(level)
