"""Compare the export with a base, an unmerged and a merged model: items and tokens per second, and the share of the matmul peak.

All sides run in one process on the same weights and items; ratios are of medians.  The weights are random, which costs the
same as trained ones.  The peak is that of a large square matmul, measured in the same run.  On a CPU one thread is used, and
its processor time is measured, so that other work on the machine has no effect.

    python -m bench export                                        # the tiny shape, on the CPU or the GPU
    python -m bench export --shape 7b --batch 64 --items 512      # Qwen2.5-VL-7B's shape, bfloat16 on a GPU
"""

from __future__ import annotations

import copy
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.common import default_params
from bench.shapes import backbone_of
from sda_core import adapters

SIDES = ("base", "unmerged", "merged")


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of the best of some square matmuls."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        start = _now(device)
        torch.mm(a, b)
        best = min(best, _now(device) - start)
    return 2 * size**3 / best


def _now(device: torch.device) -> float:
    """The time in seconds after synchronising with the device."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def operations_of(run: Callable[[], object]) -> int:
    """Floating-point operations of the matmuls, convolutions and attentions of a run, counted by torch."""
    counted = dict.fromkeys(_ATTENTION, _attention_operations)
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        run()
    return counter.get_total_flops()


_ATTENTION = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}")
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
]


def _attention_operations(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """Operations of one attention from the shapes ``(B, H, L, D)``; key heads may be shared, which torch's count rejects."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[-2] * (width + value[-1])


def main(
    shape: Annotated[Literal["tiny", "7b"], typer.Option()] = "tiny",
    items: int = 128,
    batch: int = 32,
    side: Annotated[int, typer.Option(help="Width and height of an image in pixels; 0: 112 (tiny) or 252 (7b).")] = 0,
    words: Annotated[int, typer.Option(help="Mean number of words of a text.")] = 20,
    rounds: int = 3,
    matmul: Annotated[int, typer.Option(help="Width of the matmul that measures the peak; 0: 2048 (CPU) or 8192 (GPU).")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the language model's layers.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Type of the weights; default: float32 on a CPU, bfloat16 on a GPU."),
    ] = None,
) -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    precision = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    side = side or (112 if shape == "tiny" else 252)
    peak = matmul_peak(device, precision, matmul or (8192 if device.type == "cuda" else 2048))

    backbone = backbone_of(shape, side, device, precision)
    random = np.random.default_rng(0)
    pixels = [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(batch)]
    lengths = np.sort(random.integers(1, 2 * words, items))
    starts = range(0, items, batch)
    images = backbone.image_inputs(pixels, "The picture shows a product.")
    batches = {
        "image": [images for _ in starts],
        "text": [backbone.text_inputs(["words " * n for n in lengths[start : start + batch]]) for start in starts],
    }
    batches = {name: [{k: v.to(device) for k, v in inputs.items()} for inputs in some] for name, some in batches.items()}
    num_tokens = {name: sum(int(inputs["attention_mask"].sum()) for inputs in some) for name, some in batches.items()}
    num_padded = {name: sum(inputs["attention_mask"].numel() for inputs in some) for name, some in batches.items()}

    def encode(model: nn.Module, name: str) -> None:
        with torch.inference_mode():
            for inputs in batches[name]:
                backbone.encode(model, inputs)

    operations = {name: operations_of(lambda name=name: encode(backbone.model, name)) for name in batches}
    adapted = _adapted(backbone)
    if compiled:
        for layer in adapted.get_base_model().model.language_model.layers:
            layer.compile(dynamic=True)
    around: dict[str, Callable[[str], AbstractContextManager[object]]] = {
        "base": lambda _: _Bare(adapted),
        "unmerged": lambda name: adapters.modality(adapted, name),
        "merged": lambda name: adapters.merged_modality(adapted, name),
    }
    seconds: dict[tuple[str, str], list[float]] = {(s, name): [] for s in SIDES for name in batches}
    memory: dict[str, int] = dict.fromkeys(SIDES, 0)
    vectors: dict[tuple[str, str], Tensor] = {}
    # On a CPU in turns, because other work varies; on a GPU one after another, because a merge keeps the weights on the CPU.
    turns, passes = (rounds + 1, 1) if device.type == "cpu" else (1, rounds + 1)
    for turn in range(turns):
        for which in SIDES[turn % 3 :] + SIDES[: turn % 3]:
            for name in batches:
                with around[which](name):
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    for number in range(turn, turn + passes):
                        start = _now(device)
                        encode(adapted, name)
                        if number:  # the first round is for warm-up
                            seconds[which, name].append(_now(device) - start)
                    if (which, name) not in vectors:
                        with torch.inference_mode():
                            vectors[which, name] = backbone.encode(adapted, batches[name][0])
                    if device.type == "cuda":
                        memory[which] = max(memory[which], torch.cuda.max_memory_allocated())

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {precision}, shape {shape}, {items} items in batches of {batch}, images of {side} px")
    print(
        f"matmul peak {peak / 1e12:.3g} TFLOP/s; padding {1 - num_tokens['text'] / num_padded['text']:.1%} of the text positions"
    )
    print("\n| side     | modality | items/s | tokens/s | of peak | time / base |\n|---|---|---|---|---|---|")
    for which in SIDES:
        for name in batches:
            spent = statistics.median(seconds[which, name])
            ratio = spent / statistics.median(seconds["base", name])
            print(
                f"| {which:8} | {name:8} | {items / spent:.4g} | {num_tokens[name] / spent:.4g} "
                f"| {operations[name] / spent / peak:.1%} | {ratio:.3f} |"
            )
    exact = copy.deepcopy(adapted).float()
    print("\nrelative difference of a batch's vectors, largest of the items; exact is the unmerged pass in float32:")
    for name in batches:
        with torch.inference_mode(), adapters.modality(exact, name):
            vectors["exact", name] = backbone.encode(exact, batches[name][0])
        pairs = (("unmerged", "exact"), ("merged", "exact"), ("merged", "unmerged"), ("base", "unmerged"))
        found = (f"{a} from {b} {_difference(vectors[b, name], vectors[a, name]):.1e}" for a, b in pairs)
        print(f"  {name}: " + ", ".join(found))
    if device.type == "cuda":
        print("\npeak memory, GiB: " + ", ".join(f"{which} {memory[which] / 2**30:.1f}" for which in SIDES))
    else:
        print(f"\npeak resident memory of the whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def _difference(own_BD: Tensor, other_BD: Tensor) -> float:
    return float(((own_BD - other_BD).norm(dim=-1) / own_BD.norm(dim=-1)).max())


def _adapted(backbone: Any) -> Any:
    """The paper's adapter around the model, with random weights."""
    params = default_params().train_adapter.moda
    pattern, num_layers = backbone.adapter_pattern("language"), backbone.num_adapter_layers("language")
    model = adapters.build(backbone.model, params, ["image", "text"], pattern, num_layers, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "moda_B" in name:
                weight.normal_(0.0, 0.01)
    return model.eval()


class _Bare:
    """The base model, with its linear layers in place of the adapted ones."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], layer)
            for path, layer in model.named_modules()
            if isinstance(layer, adapters.MoDALinear)
        ]

    def __enter__(self) -> None:
        for parent, child, layer in self._places:
            setattr(parent, child, layer.base_layer)

    def __exit__(self, *_: object) -> None:
        for parent, child, layer in self._places:
            setattr(parent, child, layer)
