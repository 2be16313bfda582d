"""Which heads carry the gradient energy, and what does projecting one head do?"""

from spd_lens.analysis.heads.ablation import head_effects
from spd_lens.analysis.heads.command import effect_map, energy_map, head_energy, say

__all__ = ["effect_map", "energy_map", "head_effects", "head_energy", "say"]
