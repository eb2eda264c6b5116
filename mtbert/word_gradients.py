"""The gradients of the word table under ZeRO-1: of all its rows, or of those alone that a step looks up.

The table is half of a small encoder, and a step meets few of its words. All other rows get no gradient: where it is
known beforehand which these are, nothing of them is zeroed, sent, held or combined.

Shapes: K tasks in the step, W ranks; the table has V rows of D, of which U take part in the step, the same on all
ranks; of these N touch this rank's shard, which lies in R rows of the table (a few of them are padding).

A rank's shard of the flat table can begin and end within a row. Such a row goes to both ranks, and each blanks what is
the other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Table(Protocol):
    """The word embeddings: the weights (V, D), and what stands for them meanwhile, see `encoder.WordEmbedding`."""

    weight: nn.Parameter
    narrowed: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows take part, and how ranks share them."""

    rows_U: Tensor  # ascending
    by_rank: list[slice]  # those among the U that touch each rank's shard
    foreign: tuple[int, int]  # numbers at either end of this rank's that belong to its neighbours


class WordGradients:
    """A step is `begin`, within `collected` the backward of each task, `finished`, and `spread` of what is made of it.

    Args:
        table: the word embeddings.
        numbers: of the flat table, padded so that all ranks' shards are of one size.
        dtype: in which gradients accumulate.
    """

    def __init__(self, table: Table, numbers: int, dtype: torch.dtype) -> None:
        self.table, self.dtype = table, dtype
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = table.weight.device
        self.vocabulary, self.width = table.weight.shape
        self.size = numbers // self.world
        self.bounds = [  # the rows that each rank's shard touches, padding included
            (start // self.width, -(-stop // self.width))
            for start, stop in pairwise(rank * self.size for rank in range(self.world + 1))
        ]
        self.all = self._share(torch.arange(self.vocabulary))
        self.none = self._share(torch.arange(0))
        self.gradient_RD: Tensor | None = None
        self.filled = self.none.rows_U  # rows there that are not zero
        self.storage_KS = self._make_room(self.none, 0)
        self.begin(0, None)

    @property
    def columns(self) -> int:
        """The most numbers that this rank's shard of a task can have."""
        first, last = self.bounds[self.rank]
        return (last - first) * self.width

    @property
    def nbytes(self) -> int:
        sent = [self.buffers_KUD, self.received] if self.world > 1 else []
        return sum(tensor.nbytes for tensor in (self.storage_KS, *sent))

    def begin(self, through: int, word_ids: Tensor | None) -> None:
        """Room for the gradients of so many tasks. Collective where words are given.

        Args:
            word_ids: of all that this rank looks up; None: rows of all words take part.
        """
        weight = self.table.weight
        self.leaf: Tensor = weight
        self.window: tuple[Tensor, Tensor] | None = None  # what the table is narrowed to
        if not through:
            taking = self.none
        elif word_ids is None:
            taking = self.all
        else:
            taking = self._share(self._met(word_ids))
            places_V = torch.full((self.vocabulary,), -1, device=self.device)
            places_V[taking.rows_U] = torch.arange(len(taking.rows_U), device=self.device)
            self.leaf = weight.detach()[taking.rows_U].requires_grad_()
            self.leaf.grad_dtype = self.dtype
            self.window = self.leaf, places_V
        if taking is not self.taking or through > len(self.storage_KS):
            weight.grad = None  # else it would keep the old room while the new one is made
            self.buffers_KUD = self.received = self.storage_KS = self.shards_KS = torch.empty(0)
            self.storage_KS = self._make_room(taking, through)
        self.shards_KS = self.storage_KS[:through]

    def _make_room(self, taking: _Rows, tasks: int) -> Tensor:
        """Sets what gradients are collected in and received in; answers where the shards of all tasks go."""
        self.taking = taking
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        places = tasks if self.world == 1 else min(tasks, 2)
        self.buffers_KUD = torch.empty(places, len(taking.rows_U), self.width, **options)
        mine = taking.by_rank[self.rank]
        size = (mine.stop - mine.start) * self.width
        self.received = torch.empty(self.world - 1, size, **options)
        if self.world == 1:
            return self.buffers_KUD.flatten(1)
        return torch.empty(tasks, size, device=self.device)

    @contextmanager
    def collected(self, place: int) -> Iterator[None]:
        """Within it, gradients of the table go to this place, which is emptied before."""
        self.buffers_KUD[place].zero_()
        self.leaf.grad = self.buffers_KUD[place]
        self.table.narrowed = self.window
        try:
            yield
        finally:
            self.table.narrowed = None

    def pieces(self, place: int) -> list[Tensor]:
        """What every rank's shard needs of the gradient in this place."""
        return [self.buffers_KUD[place, rows].flatten() for rows in self.taking.by_rank]

    def finished(self) -> Tensor:
        """This rank's shards (K, N·D), once they are all summed over ranks."""
        head, tail = self.taking.foreign
        self.shards_KS[:, :head].zero_()
        self.shards_KS[:, self.shards_KS.shape[1] - tail :].zero_()
        return self.shards_KS

    def spread(self, gradient: Tensor) -> Tensor:
        """A gradient (N·D,) like those of `finished`, as this rank's shard of the flat table; fp32."""
        first = self.bounds[self.rank][0]
        start = self.rank * self.size - first * self.width
        if self.taking is self.all and len(gradient) >= start + self.size:  # but for padding, it is that already
            return gradient[start : start + self.size]
        if self.gradient_RD is None:
            self.gradient_RD = torch.zeros(self.columns // self.width, self.width, device=self.device)
        self.gradient_RD.index_fill_(0, self.filled, 0.0)
        self.filled = self.taking.rows_U[self.taking.by_rank[self.rank]] - first
        self.gradient_RD.index_copy_(0, self.filled, gradient.view(-1, self.width))
        return self.gradient_RD.flatten()[start : start + self.size]

    def _met(self, word_ids: Tensor) -> Tensor:
        """The words that any rank looks up, ascending."""
        met_V = torch.zeros(self.vocabulary, dtype=torch.uint8, device=self.device)
        met_V[word_ids] = 1
        if self.world > 1:
            dist.all_reduce(met_V, dist.ReduceOp.MAX)
        return met_V.nonzero().flatten()

    def _share(self, rows_U: Tensor) -> _Rows:
        firsts, lasts = (torch.tensor(each, device=rows_U.device) for each in zip(*self.bounds, strict=True))
        starts, stops = (torch.searchsorted(rows_U, each).tolist() for each in (firsts, lasts))
        start, stop = starts[self.rank], stops[self.rank]
        head = tail = 0
        if start < stop:
            head = max(self.rank * self.size - int(rows_U[start]) * self.width, 0)
            tail = max((int(rows_U[stop - 1]) + 1) * self.width - (self.rank + 1) * self.size, 0)
        by_rank = [slice(one, other) for one, other in zip(starts, stops, strict=True)]
        return _Rows(rows_U.to(self.device), by_rank, (head, tail))
