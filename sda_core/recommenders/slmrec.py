"""SLMRec: self-supervised learning for multimedia recommendation (Tao et al., IEEE TMM 2022), with LightGCN (He et al. 2020).

There is one channel for the items' ids and one per modality.  A channel's items are a learned table, or the projected vectors
``W_m f_i``; its users are a learned table that all channels share.  Each channel is propagated over the graph of *training*
interactions, ``A = D^-1/2 (0 R; R' 0) D^-1/2``, and the layers are averaged:

    e_m = (1 / (L + 1)) sum_l A^l (user table; item inputs of m)
    user = W_user [e_id; e_1; ..; e_M] + b,    item = W_item [e_id; e_1; ..; e_M] + b,    x_ui = user . item

The loss is BPR over ``x_ui``, plus ``task_weight`` times one of the paper's self-supervised tasks.  With
``NCE(X, Y) = -mean_i log (exp(cos(x_i, y_i) / T) / sum_j exp(cos(x_i, y_j) / T))`` over the distinct users or items of a batch:

* ``fd``, feature dropout: two views of all channels, each with separate dropout of every layer's output;
  ``NCE(users', users'') + NCE(items', items'')``.
* ``fm``, feature masking: two views, each with the items of a different channel set to zero; the same loss.
* ``fd+fm``: both augmentations at once.
* ``fac``, fine and coarse: ``x <- G_m x`` from the items' ids through one modality after the other, each step to a coarser
  space (the last one half as wide): ``sum_m NCE(G_m .. G_1 e_id, H_m e_m)``.

Design: BPR (MMRec's port of the public code has a softmax over the batch); a user or item that occurs several times in a batch
counts once (otherwise it would be its own negative); cosines also in ``fac`` (that port uses plain products, which are
unbounded); vectors standardised as for the other recommenders.  Without item vectors only the id channel remains: LightGCN,
with ``fd`` if that is the task, and no other task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_core.params import SLMRecParams
from sda_core.recommenders import losses
from sda_core.recommenders.base import EpochRecord, side_by_side
from sda_core.recommenders.batches import TrainingData
from sda_core.recommenders.features import standardise
from sda_core.recommenders.fit import Batch, TrainedRecommender
from sda_core.recommenders.pairs import INITIAL_STD, factors, forget_unknown_users, pair_batches


def graph(data: TrainingData) -> Tensor:
    """The normalised adjacency matrix of users and items, from the distinct training pairs.

    Returns:
        Sparse ``(U + I + 2, U + I + 2)``: rows of users first, then those of items; user 0 and item 0 have no edges.
    """
    rows, items = data.train.pairs(np.arange(data.num_users + 1))
    users = torch.from_numpy(rows)
    nodes = torch.from_numpy(items) + data.num_users + 1
    size = data.num_users + data.num_items + 2
    degree = torch.bincount(torch.cat([users, nodes]), minlength=size).double()
    value = (degree[users] * degree[nodes]).rsqrt().float()
    indices = torch.stack([torch.cat([users, nodes]), torch.cat([nodes, users])])
    return torch.sparse_coo_tensor(indices, torch.cat([value, value]), (size, size), check_invariants=True).coalesce()


def graph_product(graph_NN: Tensor, x_NK: Tensor) -> Tensor:
    """``graph x``, bit-reproducible.

    On a GPU torch's deterministic mode uses cuSPARSE's reproducible algorithm for a batch of sparse products, but not for a
    single one (measured: the same time, but two runs of ``sparse.mm`` differ).
    """
    if x_NK.is_cuda:
        return torch.bmm(graph_NN.unsqueeze(0), x_NK.unsqueeze(0)).squeeze(0)
    return torch.sparse.mm(graph_NN, x_NK)


class SLMRec(TrainedRecommender):
    """SLMRec, see the module's docstring.

    The final vectors of users and items are saved with the weights, because they depend on the training interactions, which
    a loaded model does not need.

    Args:
        item_vectors: modalities by name, each ``(I + 1, D)`` (one matrix is a single modality), or None.
    """

    user_table_UD: Tensor
    item_table_ID: Tensor

    def __init__(
        self, params: SLMRecParams, num_users: int, num_items: int, item_vectors: np.ndarray | Mapping[str, np.ndarray] | None
    ) -> None:
        super().__init__(params, num_users, num_items, None if item_vectors is None else side_by_side(item_vectors))
        self.fit_params = params
        self.graph_params = params
        modalities = {"content": item_vectors} if isinstance(item_vectors, np.ndarray) else dict(item_vectors or {})
        width = params.hidden_size
        self.user_inputs = factors(num_users, width)
        self.item_inputs = factors(num_items, width)
        self.projections = nn.ModuleDict()
        for name, vectors in modalities.items():
            self.register_buffer(f"vectors_{name}", torch.from_numpy(standardise(vectors)), persistent=False)
            projection = nn.Linear(vectors.shape[1], width, bias=False)
            nn.init.normal_(projection.weight, std=INITIAL_STD)  # vectors of length 1: the scale of the item factors
            self.projections[name] = projection
        num_channels = 1 + len(modalities)
        self.fuse_users = nn.Linear(num_channels * width, width)
        self.fuse_items = nn.Linear(num_channels * width, width)
        self.coarser = nn.ModuleList()  # G
        self.own = nn.ModuleList()  # H
        if params.task == "fac":
            widths = [width] * len(modalities)
            if len(modalities) > 1:
                widths[-1] = max(1, width // 2)
            for in_width, out_width in zip([width, *widths], widths, strict=False):
                self.coarser.append(nn.Linear(in_width, out_width))
                self.own.append(nn.Linear(width, out_width))
        for module in [self.fuse_users, self.fuse_items, *self.coarser, *self.own]:
            assert isinstance(module, nn.Linear)
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        self.register_buffer("user_table_UD", torch.zeros(num_users + 1, width))
        self.register_buffer("item_table_ID", torch.zeros(num_items + 1, width))
        self._graph: Tensor | None = None
        self._is_stale = False

    def train(self, mode: bool = True) -> SLMRec:
        """Switch between training and scoring; clears the tables, which are computed once per scoring phase."""
        self._is_stale = True
        super().train(mode)
        return self

    # ------------------------------------------------------------------------------------------- training
    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """As in the base class, on the graph of the training interactions, which is released at the end."""
        self.check_data(data)
        forget_unknown_users(data, self.user_inputs)
        self._graph = graph(data).to(device)
        records = super().fit(data, checkpoint=checkpoint, fingerprint=fingerprint, device=device)
        self._refresh_tables()
        self._graph = None
        return records

    def batches(self, data: TrainingData, random: np.random.Generator) -> Iterator[Batch]:
        """Every training interaction once per epoch, each with an item that the user does not have in training."""
        return pair_batches(data, self.fit_params.batch_size, random, self.params.kind)

    def loss(self, batch: Batch) -> Tensor:
        """BPR, plus the squared lengths of the used rows of user and item tables averaged over the batch, plus the task."""
        channels = self.spread(self.inputs(), dropout=0.0)
        user_UD, item_ID = self.fuse(channels)
        user_BD, positive_BD, negative_BD = (
            user_UD[batch["user_B"]],
            item_ID[batch["positive_B"]],
            item_ID[batch["negative_B"]],
        )
        loss = losses.bpr((user_BD * positive_BD).sum(dim=1), (user_BD * negative_BD).sum(dim=1))
        penalty = self.user_inputs(batch["user_B"]).square().sum()
        penalty = penalty + self.item_inputs(torch.cat([batch["positive_B"], batch["negative_B"]])).square().sum()
        loss = loss + self.graph_params.embedding_regularization * penalty / len(user_BD)
        if self.graph_params.task_weight == 0.0:
            return loss
        return loss + self.graph_params.task_weight * self.task(channels, batch["user_B"].unique(), batch["positive_B"].unique())

    def task(self, channels: list[tuple[Tensor, Tensor]], user_n: Tensor, item_n: Tensor) -> Tensor:
        """The self-supervised task over distinct users ``(n,)`` and items ``(n,)``.

        Args:
            channels: the result of :meth:`spread` for the unchanged inputs.
        """
        params = self.graph_params
        kind, temperature = params.task, params.temperature
        if kind == "fac":
            total = user_n.new_zeros((), dtype=torch.float32)
            x_nD = channels[0][1][item_n]
            for (_, item_ID), coarser, own in zip(channels[1:], self.coarser, self.own, strict=True):
                x_nD = coarser(x_nD)
                total = total + losses.in_batch_softmax(x_nD, own(item_ID[item_n]), temperature)
            return total
        inputs = self.inputs()
        masked: tuple[int, ...] = ()
        if "fm" in kind and len(inputs) > 1:
            masked = tuple(torch.randperm(len(inputs))[:2].tolist())
        elif "fd" not in kind:  # no task, or no channel to mask: both views would be equal
            return user_n.new_zeros((), dtype=torch.float32)
        views = []
        for number in (0, 1):
            changed = [
                (users, torch.zeros_like(items) if masked and masked[number] == channel else items)
                for channel, (users, items) in enumerate(inputs)
            ]
            views.append(self.fuse(self.spread(changed, dropout=params.dropout if "fd" in kind else 0.0)))
        (users_1, items_1), (users_2, items_2) = views
        return losses.in_batch_softmax(users_1[user_n], users_2[user_n], temperature) + losses.in_batch_softmax(
            items_1[item_n], items_2[item_n], temperature
        )

    # ------------------------------------------------------------------------------------------ the network
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """Users ``(U + 1, D)`` and items ``(I + 1, D)`` of each channel, ids first."""
        users = self.user_inputs.weight
        vectors = [(projection, getattr(self, f"vectors_{name}")) for name, projection in self.projections.items()]
        return [(users, self.item_inputs.weight), *((users, projection(matrix)) for projection, matrix in vectors)]

    def spread(self, inputs: list[tuple[Tensor, Tensor]], dropout: float) -> list[tuple[Tensor, Tensor]]:
        """The mean of all layers by channel; one sparse product per layer for all channels together."""
        assert self._graph is not None, "the graph is there while fit runs"
        x_NK = torch.cat([torch.cat(pair) for pair in inputs], dim=1).float()
        total_NK = x_NK
        with torch.autocast(x_NK.device.type, enabled=False):  # some devices lack half precision for sparse products
            for _ in range(self.graph_params.num_layers):
                x_NK = F.dropout(graph_product(self._graph, x_NK), dropout, self.training)
                total_NK = total_NK + x_NK
        mean_NK = total_NK / (self.graph_params.num_layers + 1)
        halves = (part.split([self.num_users + 1, self.num_items + 1]) for part in mean_NK.chunk(len(inputs), dim=1))
        return [(users, items) for users, items in halves]

    def fuse(self, channels: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Users ``(U + 1, D)`` and items ``(I + 1, D)``, fused over all channels."""
        users, items = zip(*channels, strict=True)
        return self.fuse_users(torch.cat(users, dim=1)), self.fuse_items(torch.cat(items, dim=1))

    def _refresh_tables(self) -> None:
        if self._is_stale and self._graph is not None:
            with torch.no_grad():
                user_UD, item_ID = self.fuse(self.spread(self.inputs(), dropout=0.0))
                self.user_table_UD.copy_(user_UD)
                self.item_table_ID.copy_(item_ID)
        self._is_stale = False

    def _item_matrix(self) -> Tensor:
        self._refresh_tables()
        return self.item_table_ID

    def _queries(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        self._refresh_tables()
        return self.user_table_UD[user_ids_B]

    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:
        return self._queries(user_ids_B, history_BL) @ self.item_table_ID.T
