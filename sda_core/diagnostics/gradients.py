"""Do the modalities pull an adapter in different directions?  Cosines between the gradients of their passes.

The loss is one number, but it reaches the shared weights by as many ways as there are modalities: through the vectors of
the image pass, of the text pass, and so on.  Here each way is walked alone: the loss is taken on detached vectors, and
each pass is run backward with its own vectors' gradient (so does training, which adds them up; the public code of SDA,
arXiv 2512.06883, measures the image's way as the loss against detached texts, which is the same).  A cosine below 0 says
that a step for one modality undoes some of a step for the other.
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
    """Inner products between the modalities' gradients, which add up over layers and matrices.

    What counts are the low-rank matrices A and B of every adapted layer, all experts of them: the weights that LoRA and
    MoDA both have and that all modalities share.  The gate's own parameters do not count: LoRA has none, and a modality's
    row of the embedding gets a gradient from that modality alone, so its cosines would be 0 by construction.

    Attributes:
        modalities: M names.
        layers: names of the adapted modules, in the model's order.
        products: ``(layers, 2, M, M)`` float64, ``<g_m, g_n>`` of A and of B in each layer.
        both: ``(layers, M, M)`` int64, how many coordinates of A and B neither gradient leaves at 0.
    """

    modalities: tuple[str, ...]
    layers: tuple[str, ...]
    products: Tensor
    both: Tensor

    def cosine(self, layers: str = ".*", matrices: str = "AB") -> Tensor:
        """Cosines of the gradients of some weights, taken as one long vector: ``(M, M)`` float64.

        Not a number where a modality's gradient is 0 (in A while B is 0, as in a new adapter; in a layer that the
        modality does not pass).  Exactly 0 where the two share no coordinate, as with ``gate: onehot``, whose modalities
        own different experts; :meth:`overlap` tells that from gradients that are orthogonal.

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
        """Length of each modality's gradient; raises as :meth:`cosine`."""
        total_MM = self.products[self._rows(layers)].sum(dim=(0, 1))
        return dict(zip(self.modalities, total_MM.diagonal().sqrt().tolist(), strict=True))

    def overlap(self, layers: str = ".*") -> Tensor:
        """Of the coordinates that the sparser of two gradients moves, the share that the other moves too: ``(M, M)``.

        1 for plain LoRA, 0 for disjoint experts, not a number where a gradient is 0; raises as :meth:`cosine`.
        """
        both_MM = self.both[self._rows(layers)].sum(dim=0).double()
        return both_MM / torch.minimum(both_MM.diagonal()[:, None], both_MM.diagonal()[None, :])

    def _rows(self, layers: str) -> list[int]:
        rows = [row for row, name in enumerate(self.layers) if re.fullmatch(layers, name)]
        if not rows:
            raise TrainingError("gradients", f"{layers!r} matches none of {len(self.layers)} layers", f"e.g. {self.layers[0]}")
        return rows


def _cosine(products: Tensor) -> Tensor:
    """``(..., M, M)`` inner products to cosines, within [-1, 1]; 0 / 0 is not a number."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return (products / norms.unsqueeze(-1) / norms.unsqueeze(-2)).clamp(-1, 1)


def gradient_products(
    model: nn.Module,
    passes: Mapping[str, Callable[[], Tensor]],
    criterion: Callable[[Mapping[str, Tensor]], Tensor],
    adapter_name: str = "default",
) -> GradientProducts:
    """Measure the gradient of every modality's pass on one batch.

    The model is measured in evaluation mode (no dropout), and is left as it was: modes, gradients, what is trainable.
    An adapter that was loaded frozen can be measured too.  Passes run twice, first without a graph, so that no two
    graphs are in memory at once.

    Args:
        model: with MoDA layers, unmerged.
        passes: by modality, a function that runs the batch through ``model`` and gives vectors ``(B, D)``; row ``i`` is
            the same item in each.  It is called inside ``modality(model, name)``.
        criterion: the loss of vectors by modality.
        adapter_name: which adapter.

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
        raise TrainingError("gradients", f"loss {value.item()} or a gradient is not finite", "look at the items of the batch")
    both = torch.stack(touched).view(len(layers), 2, M, M).sum(dim=1).long()
    return GradientProducts(tuple(passes), tuple(layers), products, both)


@contextmanager
def _measured(model: nn.Module, weights: list[Tensor]) -> Generator[None]:
    """Evaluation mode and trainable weights, no gradients; all of it is put back."""
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
