"""InfoNCE: the matching pair against the rest of the batch, in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce(image_BD: Tensor, text_BD: Tensor, temperature: float | Tensor, normalize: bool = True) -> Tensor:
    """Symmetric contrastive loss with hard targets (van den Oord et al. 2018; Radford et al. 2021).

    ``L = 1/2 [ CE(V T^T / temperature, i) + CE(T V^T / temperature, i) ]``, mean over the rows ``i`` of the batch,
    with ``V``, ``T`` the unit vectors of the images and the texts.

    Also known as: CLIP loss, NT-Xent between two views, multiple-negatives ranking loss in both directions.

    Relations: :func:`~sda_core.losses.cmsa` with a teacher that is certain of the matching pair is this loss.

    Args:
        image_BD: ``(B, D)``, row ``i`` belongs to row ``i`` of ``text_BD``.
        text_BD: ``(B, D)``.
        temperature: divides the similarities (what others call the logit scale is its inverse).
        normalize: scale the rows to unit length first; else plain dot products.

    Returns:
        Scalar in nats; in float32 at least, whatever the inputs are.
    """
    image_BD, text_BD = prepare(image_BD, text_BD, normalize)
    logits_BB = image_BD @ text_BD.T / temperature
    target_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def prepare(image_BD: Tensor, text_BD: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Both inputs in float32 at least (half precision cannot hold ``similarity / temperature``), unit rows if asked."""
    assert image_BD.shape == text_BD.shape, f"one image row a text row (got {tuple(image_BD.shape)}, {tuple(text_BD.shape)})"
    assert image_BD.dim() == 2, f"(B, D) inputs (got {tuple(image_BD.shape)})"
    dtype = torch.promote_types(torch.promote_types(image_BD.dtype, text_BD.dtype), torch.float32)
    image_BD, text_BD = image_BD.to(dtype), text_BD.to(dtype)
    if normalize:
        image_BD, text_BD = F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1)
    return image_BD, text_BD
