"""`projected`, `folded` and `fold_to`: one projection, as hooks to look with and as weights to run with (Eq. 12)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError, caution
from spd_lens.files import filling, is_free, write_json
from spd_lens.models import (
    Fingerprint,
    LensHook,
    SiteLayer,
    check_saveable,
    check_whole,
    neutral,
    refuse_compiled,
    refuse_processed,
    site_layer,
    twin_hook,
    weights_digest,
    writable,
)
from spd_lens.sites import Site
from spd_lens.subspaces.lora import ORIGIN
from spd_lens.subspaces.subspace import Subspace, check_strength


class Projection:
    """A projection in force on a lens model: which sites, how strong, how often it has fired."""

    def __init__(self, subspace: Subspace, strength: float) -> None:
        self.subspace = subspace
        self.strength = strength
        self.firings: dict[Site, int] = dict.fromkeys(subspace.sites, 0)
        """Forward passes that went through each site's hook."""

    def at(self, site: Site, activation: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        self.firings[site] += 1
        return self.subspace(activation, site, self.strength)

    def __repr__(self) -> str:
        firings = ", ".join(f"{site}: {n}" for site, n in self.firings.items())
        return f"Projection(strength {self.strength}, firings {{{firings}}})"


@contextlib.contextmanager
def projected(lens: Any, subspace: Subspace, strength: float = 1.0) -> Iterator[Projection]:
    """Project the lens model's activations at every token while the context is open (Eq. 12).

    Applies `(1 - s) x + s P x` per block at each site of the subspace. The hooks come off again always. Contexts
    nest: an inner projection sees what the outer one left. Hooks added inside see projected activations.

    Args:
        lens: A HookedTransformer or TransformerBridge.
        subspace: The directions to keep.
        strength: How strongly to project, from 0 (identity, exactly) to 1 (the paper's projection).

    Raises:
        SPDError: the subspace belongs to another model; or something inside, such as `reset_hooks()`, removed the
            hooks, so that what ran afterwards was not projected.

    Warns:
        UserWarning: no forward pass went through one of the sites.
    """
    strength = check_strength(strength)
    subspace.check(lens)
    refuse_compiled(lens)
    refuse_processed(lens, subspace.sites)
    projection = Projection(subspace, strength)
    hooks: list[LensHook] = []
    try:
        for site in subspace.sites:
            hooks.append(LensHook(lens, site, partial(projection.at, site)))
        yield projection
        if not all(hook.attached for hook in hooks):
            raise SPDError(
                "the projection's hooks were removed inside `with projected(...)`, by reset_hooks() for instance: what "
                "ran after that was not projected; call reset_hooks() outside the context"
            )
        silent = [str(site) for site, n in projection.firings.items() if n == 0]
        if silent:
            caution(f"the projection never fired at {', '.join(silent)}: no forward pass went there", stacklevel=4)
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def folded(hf: nn.Module, subspace: Subspace | None, strength: float = 1.0) -> Iterator[nn.Module]:
    """The same projection written into the twin's projection weights while the context is open.

    `x W -> x W M + c` with the map `M`, `c` of `Subspace.affine`, computed in float64 and then cast. The weights' own
    bits come back always. A model with a LoRA adapter on is folded exactly too: the map goes into the base weight and
    into the adapter's `B` (of `z`, which a layer reads, its `A`). What no weight can hold, see `Subspace.foldable`, or
    what an adapter of another kind computes, see `SiteLayer.is_linear`, gets a hook on the twin while the context is
    open. None leaves the model as it is.

    Raises:
        SPDError: the subspace belongs to another model, or the architecture has no separate projection layers.
    """
    strength = check_strength(strength)
    if subspace is None:
        yield hf
        return
    with contextlib.ExitStack() as stack:
        with neutral():
            subspace.check(hf)
            for site in subspace.sites if strength else ():
                layer = site_layer(hf, site)
                if subspace.foldable(site) and layer.is_linear:
                    stack.enter_context(_folded_site(layer, subspace, site, strength))
                else:
                    stack.callback(_hooked_site(hf, subspace, site, strength).remove)
        yield hf


@contextlib.contextmanager
def projected_twin(hf: nn.Module, subspace: Subspace, strength: float = 1.0) -> Iterator[nn.Module]:
    """The projection as hooks on the twin: what `folded` is compared with where there is no lens model.

    Raises:
        SPDError: the subspace belongs to another model, or the architecture has no separate projection layers.
    """
    strength = check_strength(strength)
    with contextlib.ExitStack() as stack:
        with neutral():
            subspace.check(hf)
            for site in subspace.sites:
                stack.callback(_hooked_site(hf, subspace, site, strength).remove)
        yield hf


@neutral()
def fold_to(
    hf: PreTrainedModel, subspace: Subspace, directory: str | Path, strength: float = 1.0, *, tokenizer: Any = None
) -> Path:
    """Write a standalone checkpoint of the projected model, for any engine that reads Hugging Face models.

    Args:
        hf: The twin; left as it was.
        subspace: The directions to keep.
        directory: The checkpoint's directory, which must be empty or not there yet.
        strength: How strongly to project, from 0 to 1.
        tokenizer: A tokenizer to save beside the weights.

    Returns:
        `directory`, with the checkpoint and `projection.json`, which says what it was made of.

    Raises:
        SPDError: the directory is not empty; the model carries an adapter; or the subspace is centred and the
            architecture has no bias to hold the mean.
    """
    check_whole(hf)
    directory = Path(directory)
    if not is_free(directory):
        raise SPDError(f"{directory} is not empty; give a new directory for the folded checkpoint")
    check_saveable(hf)
    subspace.check_foldable("a checkpoint")
    for site in subspace.offset:
        if site_layer(hf, site).base.bias is None:
            raise SPDError(
                f"a centred projection needs a bias, and {type(hf).__name__} has none at site {site}, so a checkpoint "
                "cannot hold it; use folded() or projected(), or a subspace without centring"
            )
    with filling(directory) as scratch:
        with folded(hf, subspace, strength):
            hf.save_pretrained(scratch)
        made = {"subspace": subspace.digest(), "model": hf.name_or_path, "weights": weights_digest(hf)}
        write_json(scratch / ORIGIN, {**made, "strength": check_strength(strength)})
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return directory


def _hooked_site(hf: nn.Module, subspace: Subspace, site: Site, strength: float) -> Any:
    refuse_compiled(hf)
    n_heads, d_head = Fingerprint.of(hf).heads_at(site)

    def project(activation: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        split = activation if site.kind == "resid" else activation.unflatten(-1, (n_heads, d_head))
        return subspace(split, site, strength).reshape(activation.shape)

    return twin_hook(hf, site, project)


@contextlib.contextmanager
def _folded_site(layer: SiteLayer, subspace: Subspace, site: Site, strength: float) -> Iterator[None]:
    base, adapters = layer.base, getattr(layer.module, "lora_A" if layer.reads else "lora_B", {})
    outer = [adapter for name, adapter in adapters.items() if name in layer.module.active_adapters]
    matrix, constant = subspace.affine(site, strength)
    own_bias = base.bias
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(writable(base))
        changed = [*own.values(), *(adapter.weight for adapter in outer)]
        changed += [adapter.bias for adapter in outer if adapter.bias is not None]
        for parameter in changed:
            stack.callback(_put_back, parameter, parameter.detach().clone())
        stack.callback(setattr, base, "bias", own_bias)
        with torch.no_grad():
            _map_features(own["weight"], layer, matrix, turned=layer.transposed)
            for adapter in outer:
                _map_features(adapter.weight, layer, matrix)
                if adapter.bias is not None and not layer.reads:
                    _map_features(adapter.bias[:, None], layer, matrix)
            if own_bias is not None and not layer.reads:
                _map_features(own["bias"][:, None], layer, matrix, constant)
            elif site in subspace.offset:
                # in an architecture without biases it lasts as long as the projection
                bias = torch.zeros(own["weight"].shape[0]).to(own["weight"])
                features = slice(None) if layer.features is None else layer.features
                bias[features] = constant.flatten().to(bias)
                base.bias = nn.Parameter(bias, requires_grad=False)
                own["bias"] = bias  # which an offloaded layer takes from here
        yield


@torch.no_grad()
def _put_back(parameter: Tensor, bits: Tensor) -> None:
    parameter.copy_(bits)


def _map_features(
    weight: Float[Tensor, "d_out d_in"],
    layer: SiteLayer,
    matrix: Float[Tensor, "block width width"],
    constant: Float[Tensor, "block width"] | None = None,
    *,
    turned: bool = False,
) -> None:
    """Apply `x -> x M + c` in place to a site's output features, in float64: they are rows of a linear layer's weight.

    `M` is symmetric, so on a transposed weight the same maps what the layer reads. `turned`: the weight is stored as
    `[d_in, d_out]`.
    """
    if turned != layer.reads:
        weight = weight.T  # a view: writing to it writes to the weight
    features = slice(None) if layer.features is None else layer.features.to(weight.device)
    rows = rearrange(weight[features].double(), "(block width) d_in -> block width d_in", block=matrix.shape[0])
    mapped = einsum(matrix.to(rows.device), rows, "block i j, block i d_in -> block j d_in")
    if constant is not None:
        mapped = mapped + constant.to(rows.device)[:, :, None]
    weight[features] = rearrange(mapped, "block width d_in -> (block width) d_in").to(weight.dtype)
