"""The principal axes of vectors, computed exactly and in float64.

The covariance is summed in chunks, so that a large matrix (57,000 items with 7,168 columns, for example) is not copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CHUNK_ROWS = 4096


def principal_axes(
    vectors_IF: np.ndarray, fit_rows: np.ndarray, num_components: int, *, even: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the principal axes of the fitted rows; :func:`project` computes the components.

    The axes are computed from the covariance if there are at least as many rows as columns, else from the singular value
    decomposition of the rows; both are exact.  The largest loading of each axis in absolute value is positive.

    scikit-learn's ``PCA(svd_solver="covariance_eigh")`` is not used: it agrees within 1e-9, signs included, but not bit for
    bit, so trained recommenders would differ, and it needs the whole matrix in float64, which doubles the memory.

    Args:
        vectors_IF: ``(I, F)``.
        fit_rows: row numbers, at least one, without repetitions.
        num_components: number of axes; fewer are returned if there are fewer rows or columns.
        even: divide each axis by ``sqrt(v + mean v)``, with ``v`` the variance along it: this brings axes of large variance
            closer to the others, and does not inflate axes of small variance as whitening does.

    Returns:
        The mean ``(F,)`` and the axes ``(F, K)``, both float64.
    """
    width = vectors_IF.shape[1]
    kept = min(num_components, width, len(fit_rows))
    mean_F = np.zeros(width, dtype=np.float64)
    for chunk in _chunks(fit_rows):
        mean_F += vectors_IF[chunk].sum(0, dtype=np.float64)
    mean_F /= len(fit_rows)
    if len(fit_rows) >= width:
        scatter_FF = np.zeros((width, width), dtype=np.float64)
        for chunk in _chunks(fit_rows):
            centred = vectors_IF[chunk] - mean_F
            scatter_FF += centred.T @ centred
        energy_F, axes_FF = np.linalg.eigh(scatter_FF)
        energy_K, axes_FK = energy_F[::-1][:kept], axes_FF[:, ::-1][:, :kept]
    else:
        _, singular_F, axes_FF = np.linalg.svd(vectors_IF[fit_rows] - mean_F, full_matrices=False)
        energy_K, axes_FK = np.square(singular_F[:kept]), axes_FF[:kept].T
    signs_K = np.sign(axes_FK[np.abs(axes_FK).argmax(0), np.arange(kept)])
    axes_FK = axes_FK * signs_K
    if even:
        variance_K = np.maximum(energy_K, 0) / len(fit_rows)
        typical = variance_K.mean()
        axes_FK = axes_FK / np.sqrt(variance_K + typical) if typical > 0 else axes_FK
    return mean_F, axes_FK


def project(vectors_IF: np.ndarray, mean_F: np.ndarray, axes_FK: np.ndarray) -> np.ndarray:
    """The components ``(vectors - mean) @ axes``, ``(I, K)`` float32."""
    projected_IK = np.empty((len(vectors_IF), axes_FK.shape[1]), dtype=np.float32)
    for chunk in _chunks(np.arange(len(vectors_IF))):
        projected_IK[chunk] = (vectors_IF[chunk] - mean_F) @ axes_FK
    return projected_IK


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most ``_CHUNK_ROWS`` rows."""
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield rows[start : start + _CHUNK_ROWS]
