"""Ranking within a batch: each text shall find its match among those of the whole global batch.

Shapes: B examples of this rank, N of all ranks, S texts of an example (2, or 3 with a hard negative), C = (S − 1)·N
candidates, D width.

Every rank gathers the vectors of all and computes the loss of the whole batch; its backward follows only its own
vectors. The engine sums gradients over ranks, so what comes out is exactly the gradient of one process that sees the
whole batch, and nothing travels in the backward. The B·S·D numbers of the gather are few beside a gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mtbert.config import MnrlConfig


def mnrl(vectors_PD: Tensor, labels_B: Tensor, texts: int, config: MnrlConfig, epoch: int) -> Tensor:
    """Multiple negatives ranking loss; with hard negatives, supervised SimCSE. Collective; a scalar.

    The mean over positives (i, j) of −log softmax_j(cos(x_i, y_j) / τ), where y runs over the second texts of all
    examples, then over all hard negatives: Henderson et al. 2017 (multiple negatives) with the cosine as score S; on
    triplets it is Gao et al. 2021, equation 5. Paper A writes S as the correlation of predicted with true similarities,
    which has no (i, j) to rank; we follow the source it cites. Every candidate but y_j counts against the pair (i, j),
    those of pairs below the threshold too, as in paper A.

    Args:
        vectors_PD: sentence vectors of this rank's examples: all first texts, then all second ones, …; P = S·B.
        labels_B: what threshold `label` compares with t = start + rise·epoch.
        epoch: from 0 on.

    Returns this rank's part of N times the mean, like a sum over examples: divided by the examples of the global batch
    and summed over ranks it is the mean, over micro-batches as well, each of which ranks within itself. Without a
    positive it is 0 with a gradient of zeros, and the ranks have met in the same collectives.
    """
    unit_PD = F.normalize(vectors_PD.float(), dim=-1)  # fp32: see Head
    own_BSD = unit_PD.view(texts, len(labels_B), unit_PD.shape[1]).transpose(0, 1)
    rows_N, world = _gather(torch.cat([own_BSD.flatten(1), labels_B.float()[:, None]], dim=1))
    count = len(rows_N)
    unit_SND = rows_N[:, :-1].view(count, *own_BSD.shape[1:]).transpose(0, 1)
    cosine_NC = unit_SND[0] @ unit_SND[1:].flatten(0, 1).T
    with torch.no_grad():
        positive_NC = _positives(cosine_NC, rows_N[:, -1], config, epoch)
    losses_NC = -F.log_softmax(cosine_NC / config.temperature, dim=1)
    total = count * (losses_NC * positive_NC).sum() / positive_NC.sum().clamp(min=1)
    return total + (total / world - total).detach()  # all ranks know the value, and share it evenly


def _positives(cosine_NC: Tensor, labels_N: Tensor, config: MnrlConfig, epoch: int) -> Tensor:
    """1 where a text (row) and a candidate (column) count as a match."""
    count = len(labels_N)
    own_NC = torch.eye(count, cosine_NC.shape[1], device=cosine_NC.device)
    if config.threshold is None:
        return own_NC
    assert config.start is not None, "checked with the configuration"
    threshold = config.start + config.rise * epoch
    if config.threshold == "cosine":
        return (cosine_NC >= threshold).float()
    return own_NC * (labels_N >= threshold)[:, None]


def _gather(own_BX: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, in rank order, and how many ranks there are. Only this rank's own rows pass a gradient."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return own_BX, 1
    counts = torch.zeros(world, dtype=torch.int64, device=own_BX.device)
    counts[dist.get_rank()] = len(own_BX)
    dist.all_reduce(counts)
    longest = max(int(counts.max()), 1)  # a collective of no numbers is asking for trouble
    padded = own_BX.new_zeros(longest, own_BX.shape[1])
    padded[: len(own_BX)] = own_BX.detach()
    received = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(received, padded)
    parts = [rows[:count] for rows, count in zip(received, counts.tolist(), strict=True)]
    parts[dist.get_rank()] = own_BX
    return torch.cat(parts), world
