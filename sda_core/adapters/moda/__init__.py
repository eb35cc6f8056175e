"""MoDA, modality-disentangled adaptation, as a PEFT method of its own: config, layer, model, gate."""

from sda_core.adapters.moda.config import PEFT_TYPE, MoDAConfig
from sda_core.adapters.moda.gate import modality
from sda_core.adapters.moda.layer import MoDALayer, MoDALinear
from sda_core.adapters.moda.model import MoDAModel

__all__ = ["PEFT_TYPE", "MoDAConfig", "MoDALayer", "MoDALinear", "MoDAModel", "modality"]
