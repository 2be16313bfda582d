"""Gradients, their moments, the subspaces that follow from them, and projections onto these."""

from spd_lens.subspaces.bases import random_basis, squared_cosines, upright
from spd_lens.subspaces.controls import shuffled_answers, with_answers
from spd_lens.subspaces.detection import Detection, Match, detect
from spd_lens.subspaces.extract import TokenGradients, check_texts, extract, token_gradients
from spd_lens.subspaces.findings import FINDINGS, adapter_grade, read_findings, write_findings
from spd_lens.subspaces.lora import vllm_note
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.policy import Policy
from spd_lens.subspaces.projection import fold_to, folded, projected, projected_twin
from spd_lens.subspaces.sharing import copy_from_hub, from_hub, push_to_hub
from spd_lens.subspaces.spectrum import BlockSpectrum, diagonal_blocks, energies_of, rank_holding
from spd_lens.subspaces.subspace import Rank, Subspace, resolve_rank
from spd_lens.subspaces.sums import moments_size

__all__ = [
    "BlockSpectrum", "Detection", "FINDINGS", "GradientMoments", "Match", "Policy", "Rank", "Subspace",
    "TokenGradients", "adapter_grade",
    "check_texts", "copy_from_hub", "detect", "diagonal_blocks", "energies_of", "extract", "fold_to", "folded",
    "from_hub", "moments_size",
    "projected", "push_to_hub",
    "projected_twin", "random_basis", "rank_holding", "read_findings", "resolve_rank", "shuffled_answers",
    "squared_cosines", "token_gradients", "upright", "vllm_note", "with_answers", "write_findings",
]  # fmt: skip
