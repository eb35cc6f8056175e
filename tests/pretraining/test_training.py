"""The training loop on a made-up corpus: resumed equals uninterrupted, and the losses mean what they say."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pretraining.common import settings
from pretraining.train import augmented, contrastive, plain, rate, relational, spearman, train


@pytest.fixture(scope="module")
def params():
    chosen = settings()
    chosen["model"] |= {"num_layers": 1, "intermediate_size": 64, "vision_depth": 2, "vision_intermediate_size": 64}
    chosen["train"] |= {
        "num_threads": 1, "num_steps": 6, "num_warmup_steps": 2, "num_images": 6, "num_texts": 6,
        "image_teacher_first_step": 2,
        "num_other_captions": 8, "log_every": 2, "validate_every": 6, "save_every": 2, "half_precision": False,
        "image_shares": {"emoji": 1.0}, "text_shares": {"word": 1.0, "caption": 1.0},
        "first_image_sizes_pixels": [[56, 56]], "last_image_sizes_pixels": [[84, 56]],
    }  # fmt: skip
    return chosen


def test_a_resumed_run_equals_an_uninterrupted_one(corpus_folder, params, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for work in (whole, broken):
        shutil.copytree(corpus_folder, work)
    train(whole, params)
    train(broken, params, stop_after=3)
    stopped = load_file(broken / "training.safetensors")
    train(broken, params)
    first, second = load_file(whole / "training.safetensors"), load_file(broken / "training.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-6), name
    name = "model.model.visual.merger.mlp.0.weight"
    assert (stopped[name] - second[name]).abs().max() > 1e-4
    assert len((whole / "curve.tsv").read_text(encoding="utf-8").splitlines()) == 4


def test_the_rate_rises_stays_and_falls():
    section = {"num_steps": 100, "num_warmup_steps": 10, "decay_share": 0.3}
    rates = [rate(step, section) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:71]) == {1.0}
    assert np.all(np.diff(rates[70:]) < 0)
    assert rates[-1] == pytest.approx(1 / 30)
    # what comes before the fall does not depend on when it comes
    assert rates[:70] == [rate(step, section | {"num_steps": 1000}) for step in range(70)]


def test_losses_are_least_where_student_is_teacher():
    generator = torch.Generator().manual_seed(0)
    teacher = F.normalize(torch.randn(8, 16, generator=generator), dim=-1)
    other = F.normalize(torch.randn(8, 16, generator=generator), dim=-1)
    rows, squares = relational(teacher, teacher, 0.05)
    assert rows.item() == pytest.approx(0.0, abs=1e-4)  # float32, and cosines are divided by 0.05
    assert squares.item() == pytest.approx(0.0, abs=1e-6)
    rows, squares = relational(other, teacher, 0.05)
    assert rows > 0.1
    assert squares > 0.01


def test_contrastive_is_cross_entropy_over_all_captions_but_the_own_copy():
    generator = torch.Generator().manual_seed(1)
    images, captions, others = (F.normalize(torch.randn(count, 16, generator=generator), dim=-1) for count in (6, 6, 9))
    scale, none = torch.tensor(20.0), torch.zeros(6, 9, dtype=torch.bool)
    own = torch.arange(6)
    forth = F.cross_entropy(scale * images @ torch.cat([captions, others]).T, own)
    back = F.cross_entropy(scale * captions @ images.T, own)
    loss = contrastive(images, captions, others, none, scale, 0.0)
    assert loss.item() == pytest.approx((forth + back).item() / 2, rel=1e-4)
    copied = torch.cat([others[:-1], captions[:1]])
    copy = none.clone()
    copy[0, -1] = True
    # an image that found its caption must not be told to leave the caption's copy
    assert (
        contrastive(captions, captions, copied, none, scale, 0.3)
        > contrastive(captions, captions, copied, copy, scale, 0.3) + 0.03
    )
    assert contrastive(images[:1], captions[:1], copied, copy[:1], scale, 0.3).item() == pytest.approx(
        contrastive(images[:1], captions[:1], others[:-1], none[:1, :-1], scale, 0.3).item(), rel=1e-4
    )
    assert contrastive(captions, captions, others, none, scale, 0.3) < contrastive(
        captions.flip(0), captions, others, none, scale, 0.3
    )


def test_augmented_images_stay_what_they_are():
    rgba = np.zeros((5, 60, 60, 4), np.uint8)
    rgba[:, 15:45, 15:45] = (220, 30, 30, 255)
    flags = np.zeros(5, bool)
    rgb = augmented(rgba, flags, ~flags, 56, 84, np.random.default_rng(0))
    assert rgb.shape == (5, 3, 56, 84)
    assert rgb.min() >= 0
    assert rgb.max() <= 1
    red, green, blue = rgb[:, :, 28, 42].unbind(1)
    assert torch.all((red > green + 0.4) & (red > blue + 0.4))
    assert (rgb[0] - rgb[1]).abs().max() > 0.1
    seen = plain(rgba, np.array([True, False, False, False, False]), 56)
    assert seen[0, :, 0, 0].tolist() == pytest.approx([0.5] * 3)
    assert seen[1, :, 0, 0].tolist() == pytest.approx([1.0] * 3)


def test_spearman_is_the_correlation_of_positions():
    assert spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.4, 0.5])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2.0, 9.0]), np.array([5.0, 4.0, 3.0])) == pytest.approx(-1.0)
