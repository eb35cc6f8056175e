"""Item embeddings: learned by id, projected from frozen content vectors, or both.

Design:

* Content vectors may have any scale and width.  They are centred over the items and divided by *one* number, so that the
  mean squared length is 1.  They are centred because vision-language vectors share a large common direction, and an equal
  shift of all items shifts all scores of a user equally.  One number is used instead of one per dimension, because the
  geometry between items is what is evaluated, and whitening would inflate the last axes of a PCA.
* A vector of zeros means that nothing is known about the item.  Such rows stay zero, which is the centre, and do not count
  in the mean and the length.
* The projector consists of two linear maps without a non-linearity in between, as in the paper's public code.  The weights
  are multiplied first, ``(W2 W1) x`` instead of ``W2 (W1 x)``, which costs D times the hidden size per item instead of D
  times D/2.
* The inner width is D/2, but at least the smaller of D and the hidden size: narrow vectors (a PCA to 64) would otherwise
  pass through a bottleneck.  At the paper's widths the two rules agree.
* With content, an item without a training interaction has no learned id: it is represented by content only.  A learned id
  of such an item would only be trained as a negative, which content cannot compensate.
* ``id_dropout`` drops the learned id of an item for a step, so that content alone learns to represent items (DropoutNet,
  Volkovs, Yu and Poutanen 2017).  The rest is not rescaled, because a new item is scored in the same way.
* Dropout is applied to the embeddings, with one mask per item and step: as input, target and negative an item has the same
  entries dropped.  Output weights are most of a model's parameters, and overfit without it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_STD = 0.02  # standard deviation of an item embedding's entries, learned or projected


def standardise(item_vectors: np.ndarray) -> np.ndarray:
    """Centre over the items and scale to mean squared length 1; see the module's docstring.

    Args:
        item_vectors: ``(I + 1, D)``; rows of zeros, such as the padding in row 0, stay zero.

    Returns:
        ``(I + 1, D)`` float32; all zero if all items have the same vector.
    """
    result = np.zeros(item_vectors.shape, dtype=np.float32)
    has_vector = item_vectors.any(axis=1)
    rows = item_vectors[has_vector].astype(np.float64)
    if not len(rows):
        return result
    rows -= rows.mean(axis=0)
    length = math.sqrt(float(np.einsum("id,id->", rows, rows)) / len(rows))
    # If all vectors are equal, rounding gives a length of about 1e-16 times the values.
    if length > 1e-7 * float(np.abs(item_vectors).max(initial=0.0)):
        result[has_vector] = rows / length
    return result


class Projector(nn.Module):
    """``x -> W2 (W1 x + b1) + b2``, evaluated as one linear map."""

    def __init__(self, in_size: int, out_size: int, initial_std: float) -> None:
        super().__init__()
        inner_size = max(in_size // 2, min(in_size, out_size))
        self.inner = nn.Linear(in_size, inner_size)
        self.outer = nn.Linear(inner_size, out_size)
        # `inner` preserves the expected length of a vector of length 1, and `outer` gives entries of initial_std.
        nn.init.normal_(self.inner.weight, std=inner_size**-0.5)
        nn.init.normal_(self.outer.weight, std=initial_std)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.bias)

    def forward(self, vector_nD: Tensor) -> Tensor:
        """``(n, D) -> (n, hidden)``."""
        weight = self.outer.weight @ self.inner.weight
        bias = self.outer(self.inner.bias)
        return F.linear(vector_nD, weight, bias)


class ItemEncoder(nn.Module):
    """Map item ids to embeddings, which are used as inputs and as tied output weights.

    Args:
        num_items: I.
        hidden_size: width of an embedding.
        item_vectors: ``(I + 1, D)`` or None.
        representation: ``id`` (a learned table), ``content`` (projected vectors only) or ``id+content`` (their sum);
            without vectors it is always ``id``.
        dropout: dropout of the embeddings in training.
        id_dropout: with ``id+content``: probability that an item's learned id is dropped for a training step.
    """

    vectors_ID: Tensor
    has_id_I1: Tensor

    def __init__(
        self,
        num_items: int,
        hidden_size: int,
        item_vectors: np.ndarray | None,
        representation: str,
        dropout: float,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.id_dropout = id_dropout
        self.ids: nn.Embedding | None = None
        self.projector: Projector | None = None
        if item_vectors is None or representation != "content":
            self.ids = nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
            nn.init.normal_(self.ids.weight, std=INITIAL_STD)
            with torch.no_grad():
                self.ids.weight[0] = 0.0
        if item_vectors is not None and representation != "id":
            self.register_buffer("vectors_ID", torch.from_numpy(standardise(item_vectors)), persistent=False)
            self.projector = Projector(item_vectors.shape[1], hidden_size, INITIAL_STD)
        if self.ids is not None and self.projector is not None:
            self.register_buffer("has_id_I1", torch.ones(num_items + 1, 1), persistent=False)

    def keep_ids_of(self, item_ids_n: Tensor) -> None:
        """Represent all items except these by content only; has no effect without both content and learned ids.

        The other rows of the learned table are set to zero and stay zero, so a saved model needs no list of them.

        Args:
            item_ids_n: ids ``(n,)`` of the items seen in training, in any order, with or without repetitions.
        """
        if self.ids is None or self.projector is None:
            return
        self.has_id_I1.zero_()
        self.has_id_I1[item_ids_n.to(self.has_id_I1.device)] = 1.0
        with torch.no_grad():
            self.ids.weight.mul_(self.has_id_I1)

    def forward(self, item_ids_n: Tensor) -> Tensor:
        """Embeddings ``(n, hidden)`` of distinct item ids ``(n,)``; the row of padding is undefined and must be masked."""
        return self._embed(item_ids_n)

    def projected(self, item_ids_n: Tensor) -> Tensor:
        """The content part, ``(n, hidden)``, without dropout."""
        assert self.projector is not None
        return self.projector(self.vectors_ID[item_ids_n])

    def table(self) -> Tensor:
        """Embeddings of all items by id, ``(I + 1, hidden)``."""
        return self._embed(None)

    def _embed(self, item_ids_n: Tensor | None) -> Tensor:
        embedding: Tensor | None = None
        if self.projector is not None:
            embedding = self.projector(self.vectors_ID if item_ids_n is None else self.vectors_ID[item_ids_n])
        if self.ids is not None:
            learned = self.ids.weight if item_ids_n is None else self.ids(item_ids_n)
            embedding = learned if embedding is None else embedding + learned * self._kept_ids(item_ids_n)
        assert embedding is not None
        return F.dropout(embedding, self.dropout, self.training)

    def _kept_ids(self, item_ids_n: Tensor | None) -> Tensor:
        """Mask of the items whose learned ids are used, ``(n, 1)`` of 0 and 1."""
        kept_n1 = self.has_id_I1 if item_ids_n is None else self.has_id_I1[item_ids_n]
        if self.training and self.id_dropout:
            kept_n1 = kept_n1 * (torch.rand_like(kept_n1) >= self.id_dropout)
        return kept_n1
