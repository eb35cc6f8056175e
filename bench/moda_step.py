"""Compare MoDA's training step with LoRA's: PEFT's LoRA of the same total rank, a loop over the experts; and merged inference.

All sides run in one process, on the same base weights (in memory once) and inputs, in turns; ratios of medians are reported.
On a CPU processor time is measured, so that other work on the machine has little effect.

    python -m bench moda_step                              # a stack of transformer-shaped linear layers, on the CPU
    python -m bench moda_step --shape nano --threads 1     # the built-in backbone, images and texts
    python -m bench moda_step --shape calls --no-large     # 98 tiny layers: what MoDA adds around the arithmetic
    python -m bench moda_step --device cuda --shape 7b     # the linear layers of Qwen2.5-VL-7B, random weights, bfloat16
    python -m bench moda_step --device cuda --shape 7b --batch 32 --no-large   # as many tokens as a training's pass has
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import peft
import torch
import typer
from PIL import Image
from torch import Tensor, nn

from bench.common import default_params
from sda_core import backbones
from sda_core.adapters import MoDAConfig, merged_modality, modality, targets

LINEAR = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
Context = Callable[[nn.Module, str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a stack of decoder layers."""

    width: int
    key_width: int
    inner: int
    depth: int
    batch: int
    length: int


SHAPES = {
    "small": Shape(width=256, key_width=64, inner=1344, depth=2, batch=8, length=128),
    "calls": Shape(width=32, key_width=16, inner=64, depth=14, batch=2, length=4),  # launch-bound, like small passes on a GPU
    "7b": Shape(width=3584, key_width=512, inner=18944, depth=28, batch=4, length=128),  # Qwen2.5-VL-7B's language model
}


class Layer(nn.Module):
    """The linear layers of one decoder block, with cheap operations in between."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        for name in ("q_proj", "o_proj"):
            setattr(self, name, nn.Linear(shape.width, shape.width))
        for name in ("k_proj", "v_proj"):
            setattr(self, name, nn.Linear(shape.width, shape.key_width))
        for name in ("gate_proj", "up_proj"):
            setattr(self, name, nn.Linear(shape.width, shape.inner, bias=False))
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)
        self.repeats = shape.width // shape.key_width

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``."""
        mixed = self.q_proj(x) + (self.k_proj(x) * self.v_proj(x)).repeat(1, 1, self.repeats)
        x = x + self.o_proj(mixed) / 8
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) / 8


@dataclass(frozen=True)
class Subject:
    """The adapted model, and a pass of each modality through it."""

    model: nn.Module
    pattern: str
    passes: dict[str, Callable[[nn.Module], Tensor]]
    rows: int
    text: str


def stack(shape: Shape, device: torch.device, dtype: torch.dtype) -> Subject:
    """Linear layers with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.ModuleDict({"layers": nn.Sequential(*(Layer(shape).to(dtype) for _ in range(shape.depth)))})
        x = torch.randn(shape.batch, shape.length, shape.width).to(dtype)

    def run(model: nn.Module) -> Tensor:
        return model.get_submodule("base_model.model.layers" if hasattr(model, "base_model") else "layers")(x)

    text = f"{shape.depth} layers of width {shape.width}, batch {shape.batch} x {shape.length}"
    return Subject(model, LINEAR, {"image": run, "text": run}, shape.batch, text)


def nano(device: torch.device, batch: int) -> Subject:
    """The built-in backbone, with images and texts."""
    params = default_params()
    backbone = backbones.build(params.backbone, device)
    generator = np.random.default_rng(0)
    pixels = [Image.fromarray(generator.integers(0, 256, (112, 112, 3), dtype=np.uint8)) for _ in range(batch)]
    image_inputs = backbone.image_inputs(pixels, "What is this?")
    text_inputs = backbone.text_inputs(["title: a red kettle of steel; brand: none; price: 12; " * 3] * batch)
    passes = {
        "image": lambda model: backbone.encode(model, image_inputs),
        "text": lambda model: backbone.encode(model, text_inputs),
    }
    lengths = ", ".join(
        f"{inputs['input_ids'].shape[1]} tokens for each {name}"
        for name, inputs in (("image", image_inputs), ("text", text_inputs))
    )
    return Subject(backbone.model, backbone.adapter_pattern("language"), passes, batch, f"nano, batch {batch}, {lengths}")


def shared(model: nn.Module) -> nn.Module:
    """A copy that shares the weight tensors."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).requires_grad_(False)


class LoopedExperts(nn.Module):
    """Experts one by one, as in the formula: two matmuls, a gate and a sum for each."""

    def __init__(self, base: nn.Linear, num_experts: int, r: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        each = r // num_experts
        self.A = nn.ParameterList(nn.Parameter(torch.randn(each, base.in_features) * 0.01) for _ in range(num_experts))
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(base.out_features, each)) for _ in range(num_experts))
        self.embedding = nn.Embedding(2, 64)
        self.gate = nn.Linear(64, num_experts, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / r
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The formula, term by term."""
        result = self.base(x)
        dtype, x = result.dtype, x.to(self.A[0].dtype)
        assert self.rows is not None
        gate_BE = torch.softmax(self.gate(self.embedding(self.rows)), dim=-1)
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            change = torch.nn.functional.linear(torch.nn.functional.linear(self.dropout(x), A), B)
            result = result + change * self.scale * gate_BE[:, e, None, None]
        return result.to(dtype)


def looped(model: nn.Module, pattern: str, num_experts: int, r: int, alpha: float, dropout: float) -> nn.Module:
    """A model with its targeted layers wrapped."""
    for name in targets(model, pattern).names:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        layer = LoopedExperts(base, num_experts, r, alpha, dropout).to(base.weight.device)
        setattr(model.get_submodule(parent), child, layer)
    return model


def memory_of_a_pass(model: nn.Module, run: Callable[[], Tensor], device: torch.device) -> int:
    """Memory of a step in bytes: the allocator's peak on a GPU; on the CPU, the tensors that forward saves for backward.

    The latter is exact and reproducible, unlike the resident memory of a small process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # prevents reuse of the address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(saved.values())


def sides_of(subject: Subject, r: int, loops: tuple[int, ...]) -> dict[str, tuple[nn.Module, Context]]:
    """The models by name, each with the context for a pass of a modality."""
    common = {"r": r, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": subject.pattern}

    def rows(model: nn.Module, name: str) -> AbstractContextManager[None]:
        device = next(model.parameters()).device
        ids_B = torch.full((subject.rows,), ("image", "text").index(name), device=device)
        for module in model.modules():
            if isinstance(module, LoopedExperts):
                module.rows = ids_B
        return nullcontext()

    found: dict[str, tuple[nn.Module, Context]] = {
        f"LoRA, rank {r}": (peft.get_peft_model(shared(subject.model), peft.LoraConfig(**common)), lambda *_: nullcontext())
    }
    for num_experts in (1, 4, 8):
        model = peft.get_peft_model(shared(subject.model), MoDAConfig(num_experts=num_experts, **common))
        found[f"MoDA, E = {num_experts}"] = (model, modality)
    if loops:
        reference = MoDAConfig(num_experts=4, variant="reference", **common)
        found["MoDA, E = 4, reference"] = (peft.get_peft_model(shared(subject.model), reference), modality)
    for num_experts in loops:
        model = looped(shared(subject.model), subject.pattern, num_experts, r, 32, 0.1)
        found[f"loop over experts, E = {num_experts}"] = (model, rows)
    return found


class Clock:
    """Clock of the device, or of the processor without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        """The time after synchronising with the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(clock: Clock, rounds: int, runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each side, run in turns after one warm-up run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training(subject: Subject, device: torch.device, rounds: int, r: int, loops: tuple[int, ...]) -> None:
    """A step of every side: both modalities forward and backward."""
    sides = sides_of(subject, r, loops)

    def step(model: nn.Module, context: Context) -> None:
        for name, run in subject.passes.items():
            with context(model, name):
                run(model).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    memory: dict[str, int] = {}
    for name, (model, context) in sides.items():
        model.train()
        with context(model, "image"):
            run = subject.passes["image"]
            memory[name] = memory_of_a_pass(model, lambda model=model, run=run: run(model).float().square().mean(), device)
        model.zero_grad(set_to_none=True)
    median = measure(Clock(device), rounds, {name: lambda side=side: step(*side) for name, side in sides.items()})
    reference = f"LoRA, rank {r}"
    print(f"| {'side':28} | ms/step   | x LoRA | MiB      | x LoRA |\n|{'-' * 30}|-----------|--------|----------|--------|")
    for name in sides:
        time_ratio, memory_ratio = median[name] / median[reference], memory[name] / max(memory[reference], 1)
        print(
            f"| {name:28} | {1000 * median[name]:9.1f} | {time_ratio:6.2f} | {memory[name] / 2**20:8.0f} | {memory_ratio:6.2f} |"
        )
    for num_experts in loops:
        loop, ours = f"loop over experts, E = {num_experts}", f"MoDA, E = {num_experts}"
        times, held = median[loop] / median[ours], memory[loop] / memory[ours]
        print(f"MoDA and a loop over {num_experts} experts: MoDA is {times:.2f} x faster, with 1/{held:.1f} of the memory")


@torch.no_grad()
def inference(subject: Subject, device: torch.device, rounds: int, r: int) -> None:
    """A pass of the base model, of the adapted one, and of the adapted one merged."""
    adapted = peft.get_peft_model(
        shared(subject.model), MoDAConfig(r=r, lora_alpha=32, num_experts=4, target_modules=subject.pattern)
    ).eval()
    merged = copy.deepcopy(adapted)  # with separate weights, because the merge changes them
    run, plain = subject.passes["image"], subject.model.eval()

    def unmerged() -> None:
        with modality(adapted, "image"):
            run(adapted)

    with merged_modality(merged, "image"):
        sides = {"base": lambda: run(plain), "unmerged": unmerged, "merged": lambda: run(merged)}
        median = measure(Clock(device), rounds, sides)
    print("\n| inference, E = 4 | ms/pass   | x base |\n|------------------|-----------|--------|")
    for name, seconds in median.items():
        print(f"| {name:16} | {1000 * seconds:9.1f} | {seconds / median['base']:6.2f} |")


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    shape: Annotated[Literal["small", "calls", "7b", "nano"], typer.Option()] = "small",
    rounds: int = 7,
    threads: int = 1,
    batch: Annotated[int | None, typer.Option(help="Batch size; default: 8 for nano, else that of the shape.")] = None,
    no_large: Annotated[
        bool, typer.Option("--no-large", help="Leave out the implementations that need most memory: loops, reference.")
    ] = False,
    r: int = 8,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    if shape == "nano":
        subject = nano(where, batch or 8)
    else:
        sizes = SHAPES[shape]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        subject = stack(replace(sizes, batch=batch or sizes.batch), where, dtype)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, processor time"
    kind = next(subject.model.parameters()).dtype
    print(f"{name}, {kind}: {subject.text}, r = {r}, {len(targets(subject.model, subject.pattern))} adapted layers\n")
    training(subject, where, rounds, r, () if no_large else (4, 8))
    inference(subject, where, rounds, r)
