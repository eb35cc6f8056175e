"""L2 normalisation of the rows of NumPy matrices."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

F = TypeVar("F", bound=np.floating)


def row_lengths(rows_ND: npt.NDArray[F]) -> npt.NDArray[F]:
    """``sqrt(sum_d x_nd^2)``: ``(N,)``, in the dtype of the rows, without a copy of them."""
    return np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND))


def unit_rows(rows_ND: npt.NDArray[F], out: npt.NDArray[F] | None = None) -> npt.NDArray[F]:
    """Each row divided by its length; zero rows stay zero.

    Args:
        rows_ND: ``(N, D)``, float32 or float64.
        out: the output matrix, which may be ``rows_ND`` itself; None for a new matrix.

    Returns:
        ``(N, D)``, in the dtype of the rows.
    """
    lengths_N = row_lengths(rows_ND)
    return np.divide(rows_ND, np.where(lengths_N > 0, lengths_N, lengths_N.dtype.type(1))[:, None], out=out)
