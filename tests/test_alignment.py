"""The adapter's training loop: it learns, it repeats itself to the bit, and it comes back from a kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sda_core.adapters import build, modality
from sda_core.alignment import StepRecord, batch_rows, learning_rate, train_adapter
from sda_core.checkpoint import load_checkpoint
from sda_core.errors import ConfigError, TrainingError
from sda_core.items import ItemSource
from sda_core.params import AdapterParams, LossParams, TrainingParams
from sda_core.processes import ALONE, Processes
from tests.tolerances import a_tenth_of_a_step, assert_gradients_equal_up_to_rounding

CPU = torch.device("cpu")
MODA = AdapterParams(
    r=4,
    lora_alpha=8.0,
    use_rslora=False,
    lora_dropout=0.1,
    variant="paper",
    num_experts=2,
    expert_rank="split",
    gate="modality",
    modality_dim=4,
    targets="language",
)
LORA = MODA.model_copy(update={"num_experts": 1, "gate": "uniform"})
LOSS = LossParams(
    variant="paper",
    teacher="mean",
    temperature=0.1,
    teacher_temperature=None,
    teacher_targets=None,
    center="none",
    keep_base=0.0,
    learn_temperature=True,
    teacher_source="adapted",
    detach_teacher=True,
    normalize=True,
    false_negatives="keep",
)
TRAINING = TrainingParams(
    seed=3,
    num_steps=12,
    batch_size=6,
    micro_batch_size=None,
    learning_rate=0.01,
    weight_decay=0.01,
    warmup_steps=3,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    sharding="none",
    check="warn",
    vision_cache="never",
    checkpoint_every=5,
    log_every=4,
)

SHARED = TRAINING.model_copy(
    update={"num_steps": 6, "batch_size": 8, "micro_batch_size": 2, "checkpoint_every": 2, "log_every": 2}
)


class Encoder:
    """A real, small encoder: a frozen two-layer network on 8 x 8 grey pictures or on letter counts."""

    def __init__(self, delay_seconds: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16)).requires_grad_(False)
        self.delay_seconds = delay_seconds

    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        assert prompt == "A picture."
        time.sleep(self.delay_seconds)
        return {
            "x": torch.stack([torch.from_numpy(np.array(image.convert("L").resize((8, 8)))).flatten() / 255 for image in images])
        }

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {
            "x": torch.stack([torch.bincount(torch.tensor([ord(c) % 64 for c in text]), minlength=64).float() for text in texts])
        }

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(inputs["x"].to(next(model.parameters()).dtype))


class Pictures:
    """Pictures in memory; item 7 has none."""

    def get(self, item_id: int) -> bytes | None:
        if item_id == 7:
            return None
        import io

        buffer = io.BytesIO()
        noise = np.random.default_rng(item_id).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        return buffer.getvalue()

    def status(self, item_id: int) -> str:
        return "missing_url" if item_id == 7 else "ok"


def items(num_items: int = 20, missing_image: Any = "text_only") -> ItemSource:
    texts = [f"item {'abcdefghij'[i % 10] * (i + 1)} of brand {i * 7919}" for i in range(num_items)]
    return ItemSource(np.arange(1, num_items + 1), texts, "A picture.", "hash", Pictures(), missing_image)


def run(
    folder: Path, training: TrainingParams = TRAINING, loss: LossParams = LOSS, adapter: AdapterParams = MODA, **options: Any
) -> tuple[nn.Module, list[StepRecord]]:
    encoder = options.get("encoder", Encoder())
    model = build(encoder.model, adapter, ["image", "text"], "0|2", 2, seed=1).to(options.get("dtype"))
    source, team = options.get("source", items()), options.get("team", ALONE)
    curve = train_adapter(encoder, model, source, training, loss, folder / "checkpoint", "inputs", CPU, team)
    return model, curve


def run_shared(folder: Path, team: Processes, encoder: Encoder, **options: Any) -> tuple[nn.Module, list[StepRecord]]:
    """In chunks whose draws do not depend on the number of processes."""
    return run(folder, SHARED, team=team, encoder=encoder, dtype=torch.float64, **options)


def run_whole(folder: Path, team: Processes) -> tuple[nn.Module, list[StepRecord]]:
    """Each process its part at once, without dropout; the base teaches."""
    training, loss = changed(SHARED, micro_batch_size=None), changed(LOSS, teacher_source="base")
    return run(folder, training, loss, adapter=changed(MODA, lora_dropout=0.0), team=team, dtype=torch.float64)


def tiny_backbone() -> Any:
    """A Qwen2.5-VL architecture of two layers."""
    from sda_core import backbones
    from sda_core.params import TinyQwen25VL

    tiny = TinyQwen25VL(
        kind="tiny_qwen2_5_vl",
        seed=0,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        vision_hidden_size=32,
        vision_depth=1,
        min_pixels=784,
        max_pixels=784,
        max_text_tokens=96,
        pooling="mean",
    )
    return backbones.build(tiny, CPU)


def run_tiny(folder: Path, team: Processes = ALONE, **changes: Any) -> tuple[nn.Module, list[StepRecord]]:
    """That architecture trained, pictures and words through its own inputs."""
    adapter = changed(MODA, targets=changes.pop("targets", "language"))
    loss = changed(LOSS, teacher_source=changes.pop("teacher_source", "adapted"))
    training = changed(TRAINING, **({"num_steps": 4, "batch_size": 4} | changes))
    backbone = tiny_backbone()
    layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
    model = build(backbone.model, adapter, ["image", "text"], *layers, seed=1)
    return model, train_adapter(backbone, model, items(), training, loss, folder / "checkpoint", "inputs", CPU, team)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".moda_" in name}


def changed(section: Any, **changes: Any) -> Any:
    return type(section)(**{**section.model_dump(), **changes})


def assert_bit_equal(first: nn.Module, second: nn.Module) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Same tensors (optimizer included) and state; the bytes of safetensors' metadata have no fixed order."""
    (one, state), (two, other) = (load_checkpoint(path, "inputs") for path in (first, second))  # type: ignore[misc]
    assert state == other
    assert one.keys() == two.keys()
    assert any(name.startswith("optimizer.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


# --------------------------------------------------------------------------------------------------- learning
def test_it_learns_and_leaves_the_base_alone(tmp_path: Path) -> None:
    untouched = Encoder().model.state_dict()
    model, curve = run(
        tmp_path, changed(TRAINING, num_steps=150, log_every=10, warmup_steps=10), changed(LOSS, learn_temperature=False)
    )
    assert [record.step for record in curve] == [*range(0, 150, 10), 149]
    assert np.mean([record.loss for record in curve[-3:]]) < 0.5 * curve[0].loss
    assert all(np.isfinite([record.loss, record.grad_norm]).all() for record in curve)
    assert {record.temperature for record in curve} == {0.1}
    state = {name.replace(".base_layer", ""): value for name, value in model.base_model.model.state_dict().items()}  # type: ignore[union-attr]
    assert all(torch.equal(state[name], value) for name, value in untouched.items())
    assert not model.training


def test_two_runs_are_one(tmp_path: Path) -> None:
    first, one = run(tmp_path / "a")
    torch.manual_seed(99)
    second, two = run(tmp_path / "b")
    assert one == two
    assert_bit_equal(first, second)
    assert_same_checkpoint(tmp_path / "a" / "checkpoint", tmp_path / "b" / "checkpoint")
    third, _ = run(tmp_path / "c", changed(TRAINING, seed=4))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(third).values(), strict=True))


def test_the_split_backward_gives_the_gradient_of_the_whole() -> None:
    """One backward call on one graph, by hand."""
    from sda_core import losses
    from sda_core.alignment.inputs import Chunks, InputMaker
    from sda_core.alignment.state import trained_parameters
    from sda_core.alignment.training import Step

    encoder, source = Encoder(), items()
    model = build(encoder.model, changed(MODA, lora_dropout=0.0), ["image", "text"], "0|2", 2, seed=1)
    for parameter in weights(model).values():
        nn.init.normal_(parameter, std=0.3)
    criterion = losses.build(LOSS)
    rows = np.arange(6)
    ready = list(InputMaker(encoder, source, None).stream([("image", rows), ("text", rows)]))
    trained = trained_parameters(model, criterion)
    moved = {"image": False, "text": False}
    chunks = Chunks(((0, 6),), 0)
    step = Step(0, rows, TRAINING, chunks, ALONE, encoder, model, criterion, iter(ready), None)
    value = step.backward(trained, moved)
    got = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    assert moved == {"image": True, "text": True}
    for parameter in trained.values():
        parameter.grad = None
    with modality(model, "image"):
        image_BD = encoder.encode(model, ready[0].inputs)
    with modality(model, "text"):
        text_BD = encoder.encode(model, ready[1].inputs)
    whole = criterion(image_BD, text_BD)
    whole.backward()
    assert value == pytest.approx(whole.item(), rel=1e-4)
    assert len(got) == 2 * 4 + 1
    assert_gradients_equal_up_to_rounding(got, {name: p.grad for name, p in trained.items() if p.grad is not None})


def test_a_base_that_teaches_does_not_move(tmp_path: Path) -> None:
    """Batches of all items: a teacher made of what is trained changes from step to step, the base's does not."""
    training = changed(TRAINING, batch_size=19, log_every=1)
    targets = {}
    for source in ("adapted", "base"):
        model, curve = run(tmp_path / source, training, changed(LOSS, teacher_source=source, learn_temperature=False))
        targets[source] = [record.teacher_targets for record in curve]
        assert not model.training
    assert targets["base"] == pytest.approx([targets["adapted"][0]] * training.num_steps, rel=1e-4)
    assert max(targets["adapted"]) - min(targets["adapted"]) > 0.1


@pytest.mark.parametrize("micro_batch_size", [2, 3])
def test_a_base_that_teaches_in_chunks(tmp_path: Path, micro_batch_size: int) -> None:
    loss, adapter = changed(LOSS, teacher_source="base"), changed(MODA, lora_dropout=0.0)
    runs = {
        size: run(tmp_path / str(size), changed(TRAINING, micro_batch_size=size), loss, adapter, dtype=torch.float64)
        for size in (None, micro_batch_size)
    }
    whole, chunks = (weights(model) for model, _ in runs.values())
    for name, value in whole.items():
        torch.testing.assert_close(chunks[name], value, rtol=0, atol=1e-9)
    own = weights(run(tmp_path / "own", adapter=adapter, dtype=torch.float64)[0])
    assert max((own[name] - value).abs().max().item() for name, value in whole.items()) > 1e-3


# ---------------------------------------------------------------------------------------------------- resuming
def test_a_run_that_was_cut_ends_as_if_it_was_not(tmp_path: Path) -> None:
    whole, curve = run(tmp_path / "whole")

    class Stop(BaseException):
        pass

    class Stopping(Encoder):
        calls = 0

        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            Stopping.calls += 1
            if Stopping.calls == 2 * 7 + 1:  # in step 7
                raise Stop
            return super().encode(model, inputs)

    with pytest.raises(Stop):
        run(tmp_path / "cut", encoder=Stopping())
    loaded = load_checkpoint(tmp_path / "cut" / "checkpoint", "inputs")
    assert loaded is not None
    assert loaded[1]["curve"][-1]["step"] == 4
    resumed, resumed_curve = run(tmp_path / "cut")
    assert resumed_curve == curve
    assert_bit_equal(resumed, whole)
    again, again_curve = run(tmp_path / "cut")  # nothing is left to do
    assert again_curve == curve
    assert_bit_equal(again, whole)


def test_a_checkpoint_of_other_inputs_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path)
    encoder = Encoder()
    model = build(encoder.model, MODA, ["image", "text"], "0|2", 2, seed=1)
    with caplog.at_level(logging.INFO):
        train_adapter(encoder, model, items(), TRAINING, LOSS, tmp_path / "checkpoint", "other inputs", CPU)
    assert "is of other inputs and is ignored; training restarts" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):  # the same fingerprint, but another adapter
        run(tmp_path, adapter=LORA)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tmp_path)
    assert "training restarts" in caplog.text


KILLED = """
import sys
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("alignment_helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
sys.modules["alignment_helpers"] = helpers
spec.loader.exec_module(helpers)
import torch
torch.set_num_threads(1)
helpers.run(Path(sys.argv[2]), encoder=helpers.Encoder(delay_seconds=float(sys.argv[3])))
"""


def test_sigkill_and_again(tmp_path: Path, repository: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    checkpoint = tmp_path / "killed" / "checkpoint"
    whole, curve = run(tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).resolve()), str(tmp_path / "killed")]
    process = subprocess.Popen([*command, "0.3"], cwd=repository, env=environment)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    loaded = load_checkpoint(checkpoint, "inputs")
    assert loaded is not None
    assert loaded[1]["curve"][-1]["step"] < 11
    resumed, resumed_curve = run(tmp_path / "killed")
    torch.set_num_threads(threads)
    assert resumed_curve == curve
    assert_bit_equal(resumed, whole)
    assert_same_checkpoint(checkpoint, tmp_path / "whole" / "checkpoint")


# ------------------------------------------------------------------------------------------- parts and options
def test_learning_rate_rises_and_stays() -> None:
    assert [learning_rate(step, TRAINING) for step in range(5)] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01])
    assert learning_rate(0, changed(TRAINING, warmup_steps=0)) == 0.01


def test_an_epoch_shows_every_item_once_and_batches_are_full() -> None:
    rows = np.array([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377])
    batches = [batch_rows(rows, step, TRAINING) for step in range(4)]
    assert all(len(batch) == 6 for batch in batches)
    for epoch in (batches[:2], batches[2:]):
        shown = np.concatenate(epoch)
        assert len(set(shown)) == 12
        assert set(shown) <= set(rows)
    assert not np.array_equal(np.concatenate(batches[:2]), np.concatenate(batches[2:]))


@pytest.mark.parametrize(("missing_image", "shown"), [("text_only", False), ("placeholder", True)])
def test_items_without_a_picture(tmp_path: Path, missing_image: str, shown: bool) -> None:
    seen: set[int] = set()

    class Watching(ItemSource):
        def images(self, rows: np.ndarray) -> list[Image.Image | None]:
            seen.update(self.item_ids[rows].tolist())
            return super().images(rows)

    plain = items(missing_image=missing_image)
    source = Watching(plain.item_ids, plain.texts(np.arange(20)), "A picture.", "hash", Pictures(), missing_image)  # type: ignore[arg-type]
    run(tmp_path, source=source)
    assert (7 in seen) == shown
    assert len(seen) >= 18


def test_too_few_items(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"batch_size: should be at most 19, .*that show an image \(got 20\)"):
        run(tmp_path, changed(TRAINING, batch_size=20))


def test_nothing_to_train(tmp_path: Path) -> None:
    encoder = Encoder()
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        train_adapter(encoder, encoder.model, items(), TRAINING, LOSS, tmp_path / "checkpoint", "inputs", CPU)


def test_a_loss_that_is_not_finite_names_step_and_items(tmp_path: Path) -> None:
    class Broken(Encoder):
        calls = 0

        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            Broken.calls += 1
            return super().encode(model, inputs) * (torch.nan if Broken.calls == 2 * 3 + 2 else 1.0)

    expected = ", ".join(str(i) for i in items().item_ids[batch_rows(np.flatnonzero(items().shows_image), 3, TRAINING)])
    with pytest.raises(TrainingError, match=rf"train_adapter, step 3: loss nan .* \(items {expected}\)"):
        run(tmp_path, encoder=Broken())


def test_no_steps(tmp_path: Path) -> None:
    model, curve = run(tmp_path, changed(TRAINING, num_steps=0))
    assert curve == []
    assert not any(parameter.any() for name, parameter in weights(model).items() if "moda_B" in name)


def test_plain_lora_trains_too(tmp_path: Path) -> None:
    model, curve = run(tmp_path, adapter=LORA, loss=changed(LOSS, teacher="none"))
    assert len(curve) == 4
    assert any(parameter.any() for name, parameter in weights(model).items() if "moda_B" in name)


def test_gradient_checkpointing_needs_a_model_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"gradient_checkpointing: is true, but a .* has no such switch"):
        run(tmp_path, changed(TRAINING, gradient_checkpointing=True))


def test_runs_that_changed_nothing_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Deaf(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            vectors = super().encode(model, inputs)
            return vectors.detach() if float(inputs["x"].max()) > 1 else vectors  # letter counts exceed 1, grey values do not

    run(tmp_path / "deaf", encoder=Deaf())
    assert "the text pass never gave a gradient" in caplog.text
    assert "image pass" not in caplog.text
    assert "still zero" not in caplog.text
    caplog.clear()

    class Cut(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            return super().encode(model, inputs).detach()

    run(tmp_path / "cut", encoder=Cut())
    assert "the adapter is still zero" in caplog.text
    assert "image pass" in caplog.text
    caplog.clear()
    run(tmp_path / "good")
    assert caplog.text == ""


def test_weight_decay_spares_gate_and_temperature(tmp_path: Path) -> None:
    """With no gradient worth speaking of, only what decays moves."""
    training = changed(TRAINING, num_steps=3, weight_decay=0.5, learning_rate=1e-3)
    encoder = Encoder()
    start = weights(build(Encoder().model, MODA, ["image", "text"], "0|2", 2, seed=1))

    class Cut(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            return super().encode(model, inputs) * 1e-30

    model, _ = run(tmp_path, training, changed(LOSS, normalize=False, learn_temperature=False), encoder=Cut())
    assert encoder is not None
    for name, value in weights(model).items():
        if "moda_gate" in name or "moda_embedding" in name:
            assert torch.equal(value, start[name]), name
        elif "moda_A" in name:
            assert value.norm() < start[name].norm(), name


def test_a_real_backbone_with_and_without_gradient_checkpointing(tmp_path: Path) -> None:
    """A Qwen2.5-VL architecture, pictures and words through its own inputs; recomputing changes nothing but time."""
    plain_model, curve = run_tiny(tmp_path / "plain")
    again_model, recomputed_curve = run_tiny(tmp_path / "recomputed", gradient_checkpointing=True)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again_model.modules())
    assert [record.loss for record in recomputed_curve] == pytest.approx([record.loss for record in curve], rel=1e-3)
    plain, recomputed = weights(plain_model), weights(again_model)
    assert len(plain) == 2 * 7 * 4
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, **a_tenth_of_a_step(TRAINING.learning_rate))
        assert value.any(), name


# ------------------------------------------------------------------------------------------------ vision cache
def test_a_vision_cache_changes_nothing_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sda_core.backbones.qwen2_5_vl import Qwen25VLBackbone

    shown: list[int] = []
    features = Qwen25VLBackbone.vision_features

    def counting(self: Any, images: Any) -> Any:
        shown.append(len(images))
        return features(self, images)

    monkeypatch.setattr(Qwen25VLBackbone, "vision_features", counting)
    plain, curve = run_tiny(tmp_path / "plain")
    assert not shown
    cached, cached_curve = run_tiny(tmp_path / "cached", vision_cache="always")
    assert sum(shown) == 19
    assert [record.loss for record in cached_curve] == pytest.approx([record.loss for record in curve], rel=1e-3)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], value, **a_tenth_of_a_step(TRAINING.learning_rate))
    (tmp_path / "cached" / "checkpoint").unlink()
    shown.clear()
    again, again_curve = run_tiny(tmp_path / "cached", vision_cache="always")
    assert sum(shown) == 0
    assert again_curve == cached_curve
    assert_bit_equal(again, cached)
    (block,) = (tmp_path / "cached").glob("vision-*.safetensors")
    whole = block.read_bytes()
    (tmp_path / "cached" / "checkpoint").unlink()
    block.write_bytes(whole[: len(whole) // 2])
    run_tiny(tmp_path / "cached", vision_cache="always", num_steps=1)
    assert sum(shown) == 19  # a torn block is made anew
    assert block.read_bytes() == whole


def test_auto_makes_a_vision_cache_where_it_pays() -> None:
    from sda_core.alignment.vision_cache import open_cache

    backbone, source = tiny_backbone(), items()
    rows = np.flatnonzero(source.shows_image)

    def asked(**changes: Any) -> bool:
        training = changed(TRAINING, **({"vision_cache": "auto", "num_steps": 10, "batch_size": 4} | changes))
        return open_cache(backbone, source, rows, training, Path(), "inputs") is not None

    assert asked()  # 40 shows of 19 items
    assert not asked(num_steps=9)
    assert asked(num_steps=9, vision_cache="always")
    assert not asked(vision_cache="never")
    assert not asked(sharding="fsdp")
    build(backbone.model, MODA, ["image", "text"], backbone.adapter_pattern("language"), 14, seed=1)
    assert asked()
    backbone = tiny_backbone()
    num_layers = backbone.num_adapter_layers("language_and_vision")
    build(backbone.model, MODA, ["image", "text"], backbone.adapter_pattern("language_and_vision"), num_layers, seed=1)
    assert not asked()  # the tower learns


def test_a_vision_cache_that_cannot_be_had(tmp_path: Path) -> None:
    message = "vision_cache: is 'always', and a Encoder has no frozen vision tower"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, changed(TRAINING, vision_cache="always"))
    with pytest.raises(ConfigError, match="has no frozen vision tower"):
        run_tiny(tmp_path, vision_cache="always", targets="language_and_vision")
    with pytest.raises(ConfigError, match="sharding: is 'fsdp', which cuts the model over several processes"):
        run_tiny(tmp_path, sharding="fsdp")


# ------------------------------------------------------------------------------------------------------ health
def test_vectors_that_become_alike_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Narrow(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            found = super().encode(model, inputs)
            adapted = any(parameter.requires_grad for parameter in model.parameters()) and not model.training
            off = any(getattr(module, "_disable_adapters", False) for module in model.modules())
            return found * (1.0 if off or not adapted else 1e-3) + (0.0 if off or not adapted else 1.0)

    run(tmp_path, encoder=Narrow())
    assert "all image embeddings have become alike" in caplog.text
    assert "all text embeddings have become alike" in caplog.text


@pytest.mark.parametrize(
    ("first", "last", "vague"), [(1.3, 26.8, True), (1.3, 15.0, False), (21.9, 31.0, False), (1.0, 1.0, False)]
)
def test_a_teacher_that_grows_vague_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: float, last: float, vague: bool
) -> None:
    from sda_core.alignment import health

    model, _ = run(tmp_path)
    vectors = {name: torch.eye(3) for name in ("image", "text")}
    caplog.clear()
    health.warn(model, {"image": True, "text": True}, health.GateWatch(), vectors, vectors, (first, last), 32)
    assert ("teacher_source to base" in caplog.text) == vague
    assert (f"{last:.3g} of 32 effective targets, {first:.2g} in the first step" in caplog.text) == vague


def test_pictures_and_words_that_do_not_belong_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Noise has no words: a teacher made of the trained vectors ends at naming everything, the base's does not."""
    training = changed(TRAINING, num_steps=100, batch_size=19, learning_rate=0.02)
    ends = {}
    for teacher_source in ("adapted", "base"):
        caplog.clear()
        loss = changed(LOSS, learn_temperature=False, temperature=0.01, teacher_temperature=0.02, teacher_source=teacher_source)
        _, curve = run(tmp_path / teacher_source, training, loss)
        ends[teacher_source] = curve[0].teacher_targets, curve[-1].teacher_targets
        assert ("set the loss's teacher_source to base" in caplog.text) == (teacher_source == "adapted")
    assert ends["adapted"][0] == pytest.approx(ends["base"][0], rel=1e-4)
    assert ends["adapted"] == pytest.approx((1.0, 19.0), abs=0.5)
    assert ends["base"][1] == pytest.approx(ends["base"][0], rel=1e-4)


def test_gates_that_swing_are_counted() -> None:
    from sda_core.alignment.health import GateWatch

    model = build(Encoder().model, MODA, ["image", "text"], "0|2", 2, seed=1)
    watch = GateWatch()
    embedding = next(parameter for name, parameter in model.named_parameters() if "moda_embedding" in name)
    start = embedding.detach().clone()
    for sign in (1.0, -1.0, 1.0, -1.0):
        with torch.no_grad():
            embedding.copy_(20 * sign * start)
        watch.look(model)
    assert list(watch.swings.values()) == [2, 0]
