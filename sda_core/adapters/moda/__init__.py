"""MoDA, modality-disentangled adaptation, as a PEFT method; ``layer.py`` holds the complete forward pass."""

from sda_core.adapters.moda.config import PEFT_TYPE, MoDAConfig
from sda_core.adapters.moda.layer import MoDALayer, MoDALinear
from sda_core.adapters.moda.modality import checkpoint_contexts, modality
from sda_core.adapters.moda.model import MoDAModel

__all__ = ["PEFT_TYPE", "MoDAConfig", "MoDALayer", "MoDALinear", "MoDAModel", "checkpoint_contexts", "modality"]
