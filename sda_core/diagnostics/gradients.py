"""Gradient conflict between the modalities: cosines between the gradients of their passes.

The gradient of the loss reaches the shared weights through the vectors of each modality's pass.  Here each pass is measured
separately: the loss is computed on detached vectors, and each pass runs backward with the gradient of its own vectors.
Training does the same and sums the results.  The public code of SDA (arXiv 2512.06883) computes the image part as the loss
against detached texts, which is equal.  A negative cosine means that a step for one modality partly undoes a step for the
other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sda_core.adapters import modality
from sda_core.adapters.moda import MoDALayer
from sda_core.errors import TrainingError

MATRICES = ("A", "B")


@dataclass(frozen=True)
class GradientProducts:
    """Inner products between the modalities' gradients, which can be summed over layers and matrices.

    They cover the low-rank matrices A and B (all experts) of every adapted layer: the weights that both LoRA and MoDA have and
    that all modalities share.  The parameters of the gate are excluded: LoRA has none, and a modality's row of the embedding
    has a gradient from that modality only, so its cosines would be 0 by construction.

    Attributes:
        modalities: M names.
        layers: names of the adapted modules, in the model's order.
        products: ``(layers, 2, M, M)`` float64, ``<g_m, g_n>`` of A and of B in each layer.
        both: ``(layers, M, M)`` int64, the number of coordinates of A and B that are non-zero in both gradients.
    """

    modalities: tuple[str, ...]
    layers: tuple[str, ...]
    products: Tensor
    both: Tensor

    def cosine(self, layers: str = ".*", matrices: str = "AB") -> Tensor:
        """Cosines of the gradients of some weights, concatenated to one vector: ``(M, M)`` float64.

        NaN if a modality's gradient is 0 (in A while B is 0, as in a new adapter; in a layer without a pass of the
        modality).  Exactly 0 if the two share no coordinate, as with ``gate: onehot``, whose modalities own different
        experts; :meth:`overlap` distinguishes this from orthogonal gradients.

        Args:
            layers: regular expression that must match a layer's full name.
            matrices: ``"A"``, ``"B"`` or both.

        Raises:
            TrainingError: no layer matches.
        """
        rows, columns = self._rows(layers), [MATRICES.index(matrix) for matrix in matrices]
        return _cosine(self.products[rows][:, columns].sum(dim=(0, 1)))

    def cosine_by_layer(self, one: str, two: str) -> dict[str, float]:
        """Cosine between two modalities in each layer, A and B together."""
        m, n = self.modalities.index(one), self.modalities.index(two)
        return dict(zip(self.layers, _cosine(self.products.sum(dim=1))[:, m, n].tolist(), strict=True))

    def norms(self, layers: str = ".*") -> dict[str, float]:
        """Norm of each modality's gradient; raises as :meth:`cosine`."""
        total_MM = self.products[self._rows(layers)].sum(dim=(0, 1))
        return dict(zip(self.modalities, total_MM.diagonal().sqrt().tolist(), strict=True))

    def overlap(self, layers: str = ".*") -> Tensor:
        """Share of the non-zero coordinates of the sparser gradient that are also non-zero in the other one: ``(M, M)``.

        1 for plain LoRA, 0 for disjoint experts, NaN if a gradient is 0; raises as :meth:`cosine`.
        """
        both_MM = self.both[self._rows(layers)].sum(dim=0).double()
        return both_MM / torch.minimum(both_MM.diagonal()[:, None], both_MM.diagonal()[None, :])

    def _rows(self, layers: str) -> list[int]:
        rows = [row for row, name in enumerate(self.layers) if re.fullmatch(layers, name)]
        if not rows:
            raise TrainingError("gradients", f"{layers!r} matches none of {len(self.layers)} layers", f"e.g. {self.layers[0]}")
        return rows


def _cosine(products: Tensor) -> Tensor:
    """Convert ``(..., M, M)`` inner products to cosines, within [-1, 1]; 0 / 0 is NaN."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return (products / norms.unsqueeze(-1) / norms.unsqueeze(-2)).clamp(-1, 1)


def gradient_products(
    model: nn.Module,
    passes: Mapping[str, Callable[[], Tensor]],
    criterion: Callable[[Mapping[str, Tensor]], Tensor],
    adapter_name: str = "default",
) -> GradientProducts:
    """Measure the gradient of every modality's pass on one batch.

    The model is measured in evaluation mode (no dropout) and restored afterwards: modes, gradients, trainable parameters.
    A frozen adapter can be measured too.  Passes run twice, first without a graph, so that only one graph is in memory at
    a time.

    Args:
        model: a model with MoDA layers, unmerged.
        passes: by modality, a function that runs the batch through ``model`` and returns vectors ``(B, D)``; row ``i`` is
            the same item in each.  It is called inside ``modality(model, name)``.
        criterion: computes the loss from vectors by modality.
        adapter_name: name of the adapter.

    Raises:
        TrainingError: no such adapter, a merged one, an unknown modality, fewer than two passes, or a loss or gradient that
            is not finite.
    """
    if len(passes) < 2:
        raise TrainingError("gradients", f"should compare at least two modalities (got {', '.join(passes) or 'none'})")
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, MoDALayer) and adapter_name in module.moda_A
    }
    if not layers:
        raise TrainingError("gradients", f"{type(model).__name__} has no MoDA adapter {adapter_name!r}", "build or load it first")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise TrainingError("gradients", f"the adapter is merged into {merged[0]}", "call unmerge_modality(model) first")
    weights = [matrix for layer in layers.values() for matrix in (layer.moda_A[adapter_name], layer.moda_B[adapter_name])]
    with _measured(model, weights):
        leaves = {}
        for name, run in passes.items():
            with torch.no_grad(), modality(model, name):
                leaves[name] = run().detach().requires_grad_()
        value = criterion(leaves)
        pulls = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        gradients = []
        for (name, run), pull in zip(passes.items(), pulls, strict=True):
            if pull is not None:
                with modality(model, name):
                    vectors_BD = run()
                vectors_BD.backward(pull)
            gradients.append([torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights])
            for weight in weights:
                weight.grad = None
    inner, touched = [], []
    for at in range(len(weights)):
        rows_MN = torch.stack([of_modality[at].flatten() for of_modality in gradients]).double()
        touched_MN = (rows_MN != 0).double()
        inner.append((rows_MN @ rows_MN.T).cpu())
        touched.append((touched_MN @ touched_MN.T).cpu())
    M = len(passes)
    products = torch.stack(inner).view(len(layers), 2, M, M)
    if not (torch.isfinite(value.detach()) and torch.isfinite(products).all()):
        raise TrainingError("gradients", f"loss {value.item()} or a gradient is not finite", "check the items of the batch")
    both = torch.stack(touched).view(len(layers), 2, M, M).sum(dim=1).long()
    return GradientProducts(tuple(passes), tuple(layers), products, both)


@contextmanager
def _measured(model: nn.Module, weights: list[Tensor]) -> Generator[None]:
    """Context with evaluation mode, trainable weights and no gradients; the previous state is restored."""
    parameters = list(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    state = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        model.eval()
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad, gradient in state:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
