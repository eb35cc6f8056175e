"""Linear probes of attributes."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import attribute_probe


def test_above_chance_is_one_where_it_can_be_read_off_and_zero_where_it_cannot() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 4, size=240)
    noise = random.normal(size=(240, 6))
    assert attribute_probe.above_chance(np.eye(4)[values] + 0.01 * noise[:, :4], values) == pytest.approx(1.0)
    assert abs(attribute_probe.above_chance(noise, values)) < 0.2


def test_every_attribute_is_named_with_who_shows_it() -> None:
    measured = {("zero_shot", "fused"): [dict.fromkeys(attribute_probe.ATTRIBUTES, value) for value in (0.25, 0.75)]}
    lines = attribute_probe.table(measured, 2).splitlines()
    assert "shape (image)" in lines[2]
    assert lines[4].count("0.500 (0.25 .. 0.75)") == 6
    panels = attribute_probe.intervals(measured)
    assert len(panels) == 6
    assert panels["shape (image)"] == {"zero_shot, fused": (0.5, 0.25, 0.75)}
