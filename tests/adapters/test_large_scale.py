"""What large models are trained and served with: sharded parameters, compiled graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from sda_core.adapters import MoDALinear, merge_modality, merged_modality, modality
from sda_core.adapters.moda.modality import current_block
from sda_core.errors import TrainingError
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[..., peft.PeftModel]
Gradients = Callable[[nn.Module], dict[str, Tensor]]


def batch() -> Tensor:
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def joint_loss(model: nn.Module) -> Tensor:
    with modality(model, "image"):
        image = model(batch())
    with modality(model, [0, 1, 1]):
        mixed = model(batch())
    return (image * mixed).sum()


def test_parameters_are_plain_ones_in_dictionaries(make_stack: Make) -> None:
    """What FSDP, optimisers and checkpoint formats go through."""
    for module in make_stack().modules():
        if isinstance(module, MoDALinear):
            for name in ("moda_A", "moda_B", "moda_embedding", "moda_gate"):
                assert type(getattr(module, name)) is nn.ParameterDict
                assert type(getattr(module, name)["default"]) is nn.Parameter
            assert not list(module.buffers())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of one process: parameters are sharded as on many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "checkpointed"])
def test_sharded_gradients_are_those_of_the_whole_model(
    make_stack: Make, gradients: Gradients, mesh: DeviceMesh, use_reentrant: bool | None
) -> None:
    from torch.distributed.fsdp import fully_shard

    model = make_stack(depth=2)
    whole = copy.deepcopy(model)
    joint_loss(whole).backward()
    expected = gradients(whole)
    for block in model.base_model.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.base_model.model.use_reentrant = use_reentrant
    joint_loss(model).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), expected[name], rtol=1e-12, atol=1e-12)
    with pytest.raises(TrainingError, match="cannot merge into a base weight of type DTensor"):
        merge_modality(model, "image")


def test_a_sharded_model_computes_no_gates_ahead(make_stack: Make, gradients: Gradients, mesh: DeviceMesh) -> None:
    """One unit stays whole after its first pass; gates computed for all layers then would have their gradients too late."""
    from torch.distributed.fsdp import fully_shard

    model = make_stack(depth=2)
    whole = copy.deepcopy(model)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    found = []
    for one in (whole, model):
        with modality(one, "image"):
            image = one(batch())
        with modality(one.base_model.model, "text"):  # a part, in which nothing says that it is sharded
            text = one(batch())
            block = current_block(one.base_model.model.blocks[0].up.moda_owner)
        (image * text).sum().backward()
        found.append(gradients(one))
        assert block is not None
        assert (block.factors.pop_or_compute(one.base_model.model.blocks[0].up, "default") is None) == (one is model)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), found[0][name], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own, about its input
def test_compiled_passes_keep_their_modality(make_stack: Make) -> None:
    """Unmerged, every gate is a break in the graph; merged, the graph is the base model's, whole."""
    model = make_stack(depth=1).eval()
    compiled = torch.compile(model, backend="eager")
    for value in ("image", "text", [0, 1, 1], "image"):
        with modality(model, value):
            y = compiled(batch())
            assert_equal_up_to_rounding(y, model(batch()))
    with torch.no_grad():
        for name in ("image", "text"):
            with modality(model, name):
                expected = model(batch())
            with merged_modality(model, name):
                whole = torch.compile(model, backend="eager", fullgraph=True)
                torch.testing.assert_close(whole(batch()), expected, rtol=1e-12, atol=1e-12)
    uniform = make_stack(depth=1, gate="uniform").eval()
    torch.testing.assert_close(
        torch.compile(uniform, backend="eager", fullgraph=True)(batch()), uniform(batch()), rtol=1e-12, atol=1e-12
    )
