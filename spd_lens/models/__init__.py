"""Models: a Hugging Face twin, its TransformerLens counterpart, and the weights between them."""

from spd_lens.models.adapter_files import adapter_digest, first_adapted_layer
from spd_lens.models.adapter_inventory import TRAINING_LOG, adapter_damage, trained_files
from spd_lens.models.adapters import adapted, merged_copy
from spd_lens.models.architectures import (
    ARCHITECTURES,
    Architecture,
    angles_change_beyond,
    architecture,
    n_kv_heads,
    takes_slots,
)
from spd_lens.models.attention import attention_received, fastest_attention, one_query_at_a_time
from spd_lens.models.backends import choose_backends, lens_logits
from spd_lens.models.batches import batches_by_length, right_pad
from spd_lens.models.checkpoint import check_whole
from spd_lens.models.device_map import is_spread, refuse_spread, stored_weights, writable
from spd_lens.models.devices import dtype_name, free_memory, out_of_memory, resolve_device, resolve_dtype
from spd_lens.models.distributed import Processes, launched, processes
from spd_lens.models.drawing import draw, drawn_tokens, row_uniforms
from spd_lens.models.fingerprint import Fingerprint, weights_digest
from spd_lens.models.hooks import LensHook, run_only, unembed_only
from spd_lens.models.launchers import fails_first, own_device, several_processes, single_process
from spd_lens.models.load import load
from spd_lens.models.losses import token_losses
from spd_lens.models.matrix_rates import MatrixRates, matrix_rates
from spd_lens.models.neutral import neutral, neutrally, ordinary_buffers, random_kept, refuse_compiled, without_autocast
from spd_lens.models.onednn import available, fast_products, packed, recomputed_alike
from spd_lens.models.pair import ModelPair
from spd_lens.models.parity import CHECK_TEXTS, TOLERANCE, Parity, kl_divergence, relative_error
from spd_lens.models.probe import probe
from spd_lens.models.processed import refuse_processed
from spd_lens.models.prompts import Encoded, JointText, Loss, PromptFormat, SpanRule, overlapping
from spd_lens.models.stored_layers import StoredLayer, StoredLayers
from spd_lens.models.tokenizer import load_tokenizer, text_ids
from spd_lens.models.torch_private import onednn_packed, onednn_product, own_memory, sync_trained_alone
from spd_lens.models.transformers_private import (
    attention_implementation,
    default_generation_settings,
    logits_processors,
)
from spd_lens.models.twin import check_saveable, named_outputs, run_twin
from spd_lens.models.untouched import untouched
from spd_lens.models.weights import SiteLayer, positionwise_in_last_block, site_layer, twin_hook

__all__ = [
    "ARCHITECTURES", "Architecture",
    "CHECK_TEXTS", "Encoded", "Fingerprint", "JointText", "LensHook", "Loss", "MatrixRates", "ModelPair", "Parity",
    "PromptFormat", "SiteLayer", "SpanRule", "StoredLayer", "StoredLayers", "TOLERANCE", "TRAINING_LOG", "adapted",
    "adapter_damage", "adapter_digest", "angles_change_beyond",
    "architecture", "attention_implementation", "attention_received", "available", "batches_by_length",
    "check_saveable", "check_whole", "choose_backends", "default_generation_settings", "draw", "drawn_tokens",
    "dtype_name", "fails_first", "fast_products", "fastest_attention", "first_adapted_layer", "free_memory",
    "kl_divergence", "lens_logits", "load", "load_tokenizer", "logits_processors", "matrix_rates", "merged_copy",
    "n_kv_heads",
    "named_outputs", "neutral", "neutrally", "one_query_at_a_time", "onednn_packed", "onednn_product",
    "ordinary_buffers", "out_of_memory", "overlapping", "own_device", "own_memory", "packed",
    "positionwise_in_last_block", "probe",
    "random_kept", "recomputed_alike", "refuse_compiled", "refuse_processed", "relative_error", "resolve_device",
    "resolve_dtype", "right_pad", "row_uniforms", "run_only", "run_twin", "several_processes", "single_process",
    "site_layer", "sync_trained_alone", "takes_slots", "text_ids", "token_losses", "trained_files",
    "twin_hook", "unembed_only", "untouched", "weights_digest", "without_autocast",
    "Processes", "launched", "processes",
    "is_spread", "refuse_spread", "stored_weights", "writable",
]  # fmt: skip
