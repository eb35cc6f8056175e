"""One training step of MoDA against PEFT's LoRA of the same total rank, and against a loop over the experts.

All sides run in one process, on the same weights and inputs, in turns; what is reported are ratios of medians.

    python bench/moda_step.py                 # a stack of transformer-shaped linear layers, on the CPU or the GPU
    python bench/moda_step.py --width 3584    # the 7B model's width
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import peft
import torch
from torch import Tensor, nn

from sda_core.adapters import MoDAConfig, modality

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Layer(nn.Module):
    """The linear layers of one decoder block, with what lies between them in the cheapest form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(width * 5.25)
        for name in ("q_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width))
        for name in ("k_proj", "v_proj"):
            setattr(self, name, nn.Linear(width, width // 4))
        for name in ("gate_proj", "up_proj"):
            setattr(self, name, nn.Linear(width, inner, bias=False))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``."""
        mixed = self.q_proj(x) + (self.k_proj(x) * self.v_proj(x)).repeat(1, 1, 4)
        x = x + self.o_proj(mixed) / 8
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) / 8


class LoopedExperts(nn.Module):
    """Experts one by one, as the formula is written: two matmuls, a gate and a sum for each."""

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


def stack(width: int, depth: int, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """The base model, the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(width) for _ in range(depth))).to(device, dtype)


def looped(model: nn.Sequential, num_experts: int, r: int, alpha: float, dropout: float) -> nn.Sequential:
    """The base model with every linear layer wrapped."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model:
        for name in TARGETS:
            setattr(
                layer,
                name,
                LoopedExperts(getattr(layer, name), num_experts, r, alpha, dropout).to(next(model.parameters()).device),
            )
    return model


def memory_of_a_pass(model: nn.Module, run: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that a step holds: the allocator's peak on a GPU; on the CPU, what forward saves for backward.

    The second is exact and the same every time, which the resident memory of a small process is not.
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
            kept.append(tensor)  # keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(saved.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--r", type=int, default=8)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(options.batch, options.length, options.width, device=device, dtype=dtype)
    common = {"r": options.r, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": TARGETS}

    def base() -> nn.Sequential:
        return stack(options.width, options.depth, device, dtype)

    sides: dict[str, tuple[nn.Module, Callable[[nn.Module, int], AbstractContextManager[None]]]] = {}

    def around(model: nn.Module, step: int) -> AbstractContextManager[None]:
        return modality(model, ("image", "text")[step % 2])

    def rows(model: nn.Module, step: int) -> AbstractContextManager[None]:
        ids = torch.full((options.batch,), step % 2, device=device)
        for module in model.modules():
            if isinstance(module, LoopedExperts):
                module.rows = ids
        return nullcontext()

    sides[f"LoRA, rank {options.r}"] = (peft.get_peft_model(base(), peft.LoraConfig(**common)), lambda *_: nullcontext())
    for num_experts in (1, 4, 8):
        model = peft.get_peft_model(base(), MoDAConfig(num_experts=num_experts, **common))
        sides[f"MoDA, E = {num_experts}"] = (model, around)
    for num_experts in (4, 8):
        model = looped(base(), num_experts, options.r, 32, 0.1).to(device)
        sides[f"loop over experts, E = {num_experts}"] = (model, rows)

    def step(model: nn.Module, context: Callable[[nn.Module, int], AbstractContextManager[None]]) -> None:
        for part in (0, 1):  # both modalities, one backward: a step of the training loop
            with context(model, part):
                model(x).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, int] = {}
    for name, (model, context) in sides.items():
        model.train()
        step(model, context)
        with context(model, 0):
            memory[name] = memory_of_a_pass(model, lambda model=model: model(x).float().square().mean(), device)
        model.zero_grad(set_to_none=True)
    for _ in range(options.rounds):
        for name, (model, context) in sides.items():
            start = time.perf_counter()
            step(model, context)
            seconds[name].append(time.perf_counter() - start)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shape = f"{options.depth} layers of width {options.width}, batch {options.batch} x {options.length}, r = {options.r}"
    print(f"{where}, {dtype}: {shape}")
    reference = f"LoRA, rank {options.r}"
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n| {'side':28} | ms a step | x LoRA | MiB held | x LoRA |\n|{'-' * 30}|-----------|--------|----------|--------|")
    for name in sides:
        time_ratio, memory_ratio = median[name] / median[reference], memory[name] / max(memory[reference], 1)
        print(
            f"| {name:28} | {1000 * median[name]:9.1f} | {time_ratio:6.2f} | {memory[name] / 2**20:8.0f} | {memory_ratio:6.2f} |"
        )
    for num_experts in (4, 8):
        ratio = median[f"loop over experts, E = {num_experts}"] / median[f"MoDA, E = {num_experts}"]
        print(f"\nMoDA against a loop over {num_experts} experts: {ratio:.2f} x faster")


if __name__ == "__main__":
    main()
