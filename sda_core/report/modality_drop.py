"""Does one modality collapse?  Items that lack their text, or their image, look for their like among whole items.

A half is dropped by putting the mean of the training items in its place, the point that says nothing about the item, and the
items are fused as the export fused them: same axes, fitted on the whole items.  Then two questions, of every item with an image
and a category: is the nearest of the *other* items, as they are, of its own leaf category (1-NN accuracy)?  And is the nearest of
*all* items the item itself?  A vector that lives on its text alone loses nothing without its image, and everything without
its text; one that finds more of its kind without its image has the image in its way.

Big shops are sampled evenly over the item ids, and the axes are fitted on the sample then.
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
    is_fitted: npt.NDArray[np.bool_],
    categories: Sequence[str],
    params: ExportParams,
) -> ModalityDrop | None:
    """The numbers of one variant.

    Args:
        variant: its name.
        image_ND: vectors of the images of N items.
        text_ND: of their texts, in the same order.
        has_image: ``(N,)``, where a row of ``image_ND`` counts.
        is_own_image: ``(N,)``, where it is of the item's own image, and not of one that stands in for it.
        is_fitted: ``(N,)``, whether an item was bought in training.
        categories: leaf category of each item, empty where there is none.
        params: of the export; ``with_base`` is left out, so the figures are those of the variant's own vectors.

    Returns:
        None where there is nothing to ask: less than two items, none with an image and a category, or none that is fitted.
    """
    kinds = np.unique(np.array(categories, dtype=np.str_), return_inverse=True)[1]
    named = np.array([bool(name) for name in categories], dtype=bool)
    asked = np.flatnonzero(has_image & is_own_image & named)
    if len(image_ND) < 2 or not len(asked) or not is_fitted.any():
        return None
    image, text = (unit_rows(rows.astype(np.float64)) if params.normalize else rows for rows in (image_ND, text_ND))
    nothing = np.broadcast_to(text[is_fitted].mean(axis=0, dtype=np.float64), (len(asked), text.shape[1]))
    width = min(params.fused_dim, image.shape[1] + text.shape[1], int(is_fitted.sum()))
    with threadpool_limits(limits=1):
        fused = fuse(
            np.concatenate([image, image[asked], image[asked]]).astype(np.float32),
            np.concatenate([text, nothing, text[asked]]).astype(np.float32),
            np.concatenate([has_image, np.ones(len(asked), bool), np.zeros(len(asked), bool)]),
            np.flatnonzero(is_fitted) + 1,
            params.model_copy(
                update={"normalize": False, "fused_dim": width}
            ),  # the halves are; the length of the whole is nothing
        )
        whole, *halves = np.split(unit_rows(fused.astype(np.float64)), [len(image), len(image) + len(asked)])
        found = [_found(queries, whole, asked, kinds) for queries in (whole[asked], *halves)]
    return ModalityDrop(
        variant=variant,
        num_items=len(image),
        num_asked=len(asked),
        whole=found[0],
        without_text=found[1],
        without_image=found[2],
        chance=float(((np.bincount(kinds)[kinds] - 1) / (len(kinds) - 1))[asked].mean()),
    )


def _found(queries_QF: npt.NDArray[np.float64], whole_NF: npt.NDArray[np.float64], own: np.ndarray, kinds: np.ndarray) -> Found:
    """How often the nearest other item is of the item's kind, and how often nothing is nearer than the item itself."""
    cosines_QN = queries_QF @ whole_NF.T
    rows = np.arange(len(own))
    itself = cosines_QN[rows, own]
    cosines_QN[rows, own] = -np.inf
    nearest = cosines_QN.argmax(axis=1)
    return Found(
        same_category=float((kinds[nearest] == kinds[own]).mean()),
        itself=float((cosines_QN[rows, nearest] <= itself + 1e-9).mean()),
    )
