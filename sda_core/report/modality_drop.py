"""Measure the contribution of each modality: nearest neighbours of items without their text or their image.

A modality is dropped by replacing its vector with the mean of the training items, which carries no information, and the items
are fused as in the export, with axes fitted on the complete items.  Two questions are asked for every item with an image and a
category: does the nearest *other* complete item have the same leaf category (1-NN accuracy), and is the nearest of *all* items
the item itself?  A vector that depends on its text only loses nothing without its image, and everything without its text.  If
the accuracy is higher without the image, the image is harmful.

Large shops are sampled evenly over the item ids, and the axes are then fitted on the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from sda_core.embeddings.fusion import fuse
from sda_core.params import ExportParams
from sda_core.report.model import Found, ModalityDrop
from sda_core.unit_rows import unit_rows

Vectors = npt.NDArray[np.float32]


def modality_drop(
    variant: str,
    image_ND: Vectors,
    text_ND: Vectors,
    has_image: npt.NDArray[np.bool_],
    is_own_image: npt.NDArray[np.bool_],
    has_text: npt.NDArray[np.bool_],
    is_fitted: npt.NDArray[np.bool_],
    categories: Sequence[str],
    params: ExportParams,
) -> ModalityDrop | None:
    """The measurements for one variant.

    Args:
        variant: name of the variant.
        image_ND: image vectors of N items.
        text_ND: text vectors, in the same order.
        has_image: ``(N,)``, whether a row of ``image_ND`` is valid.
        is_own_image: ``(N,)``, whether it is that of the item's image and not of a placeholder.
        has_text: ``(N,)``, whether a row of ``text_ND`` is valid.
        is_fitted: ``(N,)``, whether an item occurs in training.
        categories: leaf category of each item, empty if there is none.
        params: section of the export; ``with_base`` is ignored, so that the figures are those of the variant's own vectors.

    Returns:
        None if there are less than two items, none with image, text and category, or none in training.
    """
    kinds = np.unique(np.array(categories, dtype=np.str_), return_inverse=True)[1]
    named = np.array([bool(name) for name in categories], dtype=bool)
    asked = np.flatnonzero(has_image & is_own_image & has_text & named)
    if len(image_ND) < 2 or not len(asked) or not is_fitted.any():
        return None
    width = min(params.fused_dim, image_ND.shape[1] + text_ND.shape[1], int(is_fitted.sum()))
    has_half, lacks_half = np.ones(len(asked), dtype=bool), np.zeros(len(asked), dtype=bool)
    with threadpool_limits(limits=1):
        fused = fuse(
            np.concatenate([image_ND, image_ND[asked], image_ND[asked]]),
            np.concatenate([text_ND, text_ND[asked], text_ND[asked]]),
            np.concatenate([has_image, has_half, lacks_half]),
            np.flatnonzero(is_fitted) + 1,
            params.model_copy(update={"fused_dim": width}),
            has_text=np.concatenate([has_text, lacks_half, has_half]),
        )
        whole, *halves = np.split(unit_rows(fused.astype(np.float64)), [len(image_ND), len(image_ND) + len(asked)])
        found = [_found(queries, whole, asked, kinds) for queries in (whole[asked], *halves)]
    return ModalityDrop(
        variant=variant,
        num_items=len(image_ND),
        num_asked=len(asked),
        whole=found[0],
        without_text=found[1],
        without_image=found[2],
        chance=float(((np.bincount(kinds)[kinds] - 1) / (len(kinds) - 1))[asked].mean()),
    )


def _found(queries_QF: npt.NDArray[np.float64], whole_NF: npt.NDArray[np.float64], own: np.ndarray, kinds: np.ndarray) -> Found:
    """Share of items whose nearest other item has the same category, and of items that are nearest to themselves.

    A query of zeros, of which nothing is left, finds nothing.
    """
    cosines_QN = queries_QF @ whole_NF.T
    rows = np.arange(len(own))
    itself = cosines_QN[rows, own]
    cosines_QN[rows, own] = -np.inf
    nearest = cosines_QN.argmax(axis=1)
    is_left = queries_QF.any(axis=1)
    return Found(
        same_category=float((is_left & (kinds[nearest] == kinds[own])).mean()),
        itself=float((is_left & (cosines_QN[rows, nearest] <= itself + 1e-9)).mean()),
    )
