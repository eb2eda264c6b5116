"""The gradients of the word table on three ranks against the obvious: whole tables, summed."""

from __future__ import annotations

import pytest
import torch
from harness import Ranks
from torch import Tensor

from mtbert.encoder import WordEmbedding
from mtbert.engine import gram
from mtbert.randomness import addressed_rng
from mtbert.runs import Rank
from mtbert.word_gradients import WordGradients
from mtbert.zero import exchange, sum_ranks

Given = tuple[list[Tensor], list[Tensor]]
"""Of a rank and step: which words each of K tasks looks up, and what comes back for each of them (N, D)."""

TABLES = [(vocabulary, width, padded) for vocabulary in (1, 2, 7, 31) for width in (1, 4, 5) for padded in (1, 6, 24)]
"""Rows, their width, and what the flat table is padded to a multiple of: shards within a row, or all padding."""

STEPS = ["some", "all", "some", "none", "no word", "all", "all", "some"]
TASKS = [3, 3, 2, 0, 2, 2, 3, 1]


def given(table: int, step: int, rank: int) -> Given:
    vocabulary, width, _ = TABLES[table]
    rng = addressed_rng(0, "words", table, step, rank)
    most = 0 if STEPS[step] == "no word" else 6
    words = [torch.from_numpy(rng.integers(0, vocabulary, rng.integers(0, most + 1))) for _ in range(TASKS[step])]
    return words, [torch.from_numpy(rng.normal(size=(len(ids), width))).float() for ids in words]


def dense(table: int, step: int, world: int) -> Tensor:
    """The gradients (K, V·D), summed over ranks."""
    vocabulary, width, _ = TABLES[table]
    total = torch.zeros(TASKS[step], vocabulary, width)
    for rank in range(world):
        for k, (ids, back) in enumerate(zip(*given(table, step, rank), strict=True)):
            total[k].index_add_(0, ids, back)
    return total.flatten(1)


def one_table(rank: Rank, number: int) -> list[tuple[Tensor, Tensor]]:
    """Of every step this rank's part of the Gram matrix, and its shard of the gradients' sum."""
    vocabulary, width, padded = TABLES[number]
    table = WordEmbedding(vocabulary, width)
    with torch.no_grad():
        table.weight.copy_(torch.arange(float(vocabulary * width)).view(vocabulary, width))
    multiple = rank.world * padded
    gradients = WordGradients(table, -(-vocabulary * width // multiple) * multiple, torch.float32)
    found = []
    for step, kind in enumerate(STEPS):
        words, backs = given(number, step, rank.rank)
        word_ids = torch.cat([*words, torch.zeros(0, dtype=torch.int64)])
        gradients.begin(TASKS[step], None if kind == "all" else word_ids)
        for k, (ids, back) in enumerate(zip(words, backs, strict=True)):
            place = k if rank.world == 1 else k % 2
            with gradients.collected(place):
                rows = table(ids)
                assert torch.equal(rows.detach(), table.weight.detach()[ids])
                rows.backward(back)
            if rank.world > 1:
                pieces = gradients.pieces(place)
                for work in exchange(gradients.received, pieces):
                    work.wait()
                sum_ranks(gradients.received, pieces, gradients.shards_KS[k])
        shards_KS = gradients.finished()
        assert shards_KS.shape[1] <= gradients.columns
        found.append((gram(shards_KS), gradients.spread(shards_KS.sum(0)).clone()))
    return found


def all_tables(rank: Rank) -> list[list[tuple[Tensor, Tensor]]]:
    return [one_table(rank, number) for number in range(len(TABLES))]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 3])
def test_shards_are_those_of_the_whole_table(ranks: Ranks, world: int) -> None:
    found = ranks(world, all_tables)
    for number, (vocabulary, width, _) in enumerate(TABLES):
        for step in range(len(STEPS)):
            parts, shards = zip(*[each[number][step] for each in found], strict=True)
            total_KP = dense(number, step, world)
            where = TABLES[number], step
            wide = total_KP.double()
            assert torch.allclose(torch.stack(parts).sum(0), wide @ wide.T, atol=1e-5), where
            whole, expected = torch.cat(shards), total_KP.sum(0)
            assert torch.allclose(whole[: vocabulary * width], expected, atol=1e-5), where
            assert not whole[vocabulary * width :].any(), where
