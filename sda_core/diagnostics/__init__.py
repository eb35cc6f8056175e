"""Diagnostics of a trained adapter, measured on a model and a batch without changing either."""

from __future__ import annotations

from sda_core.diagnostics.gates import GateMass, gate_mass, gate_similarity
from sda_core.diagnostics.gradients import GradientProducts, gradient_products

__all__ = ["GateMass", "GradientProducts", "gate_mass", "gate_similarity", "gradient_products"]
