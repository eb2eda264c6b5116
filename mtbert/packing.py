"""Packed batches: sequences laid end to end, without padding, and how attention may cut them into blocks.

Shapes: B sequences, T tokens of all sequences together; inside a block N sequences padded to L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOKENS_PER_BATCH = 4096
"""Without gradients, over all ranks; large enough for full speed, small enough for any device that can train."""

ALIKE = 16
"""So many sequences of one length are a block of their own: it needs no padding, and so neither copies nor a mask."""


@dataclass(frozen=True)
class Block:
    """Neighbouring sequences of similar length, padded for attention to the longest of them."""

    tokens: slice  # where they lie among the T tokens
    count: int  # N sequences
    longest: int  # L tokens
    # all None when the lengths are equal:
    padded_NL: Tensor | None  # flat; the token at each place of the padded block, at padding any one
    places: Tensor | None  # each token's place among the N·L
    mask_N1L: Tensor | None  # 0 at tokens, −inf at padding


@dataclass(frozen=True)
class Packed:
    """B sequences laid end to end, shortest first; `first_B`, `lengths_B`, `sequence_T` speak of the caller's order.
    All int64 but `starts`."""

    ids_T: Tensor
    positions_T: Tensor  # of each token in its sequence, from 0
    types_T: Tensor  # 0, or 1 in the second text of a pair
    sequence_T: Tensor  # the sequence (in the caller's order) that each token belongs to
    lengths_B: Tensor
    first_B: Tensor  # where each sequence's first token, [CLS], lies among the T
    starts: Tensor  # int32, B + 1: where the sequences start in the order they lie in, then T
    longest: int
    blocks: tuple[Block, ...]

    @property
    def tokens(self) -> int:
        return len(self.ids_T)

    @property
    def padded(self) -> int:
        """Tokens that a padded batch would hold."""
        return len(self.lengths_B) * self.longest

    def to(self, device: torch.device | str, blocks: bool = True) -> Packed:
        """On the device. Without `blocks`, most of the copies, only a variable-length kernel can attend."""
        moved = tuple(replace(block, **_moved(block, device)) for block in self.blocks) if blocks else ()
        return replace(self, blocks=moved, **_moved(self, device))


def _moved(record: Block | Packed, device: torch.device | str) -> dict[str, Any]:
    """The tensors of a record, on the device."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: v.to(device, non_blocking=True) for name, v in values.items() if isinstance(v, Tensor)}


def pack(sequences: Sequence[np.ndarray], second_starts: Sequence[int] | None = None) -> Packed:
    """Lay tokenised sequences end to end.

    Args:
        sequences: token ids of each, special tokens included. May be empty: a rank may be left without examples.
        second_starts: where the second text of each pair starts; from there on the token type is 1.
    """
    lengths = np.array([len(ids) for ids in sequences], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    sorted_lengths = lengths[order]
    starts = np.concatenate([[0], sorted_lengths.cumsum()])
    first = np.empty_like(lengths)
    first[order] = starts[:-1]
    ids = np.concatenate([np.zeros(0, np.int64), *(sequences[b] for b in order)])
    positions = np.arange(len(ids)) - np.repeat(starts[:-1], sorted_lengths)
    types = np.zeros(len(ids), np.int64)
    if second_starts is not None:
        types = (positions >= np.repeat(np.asarray(second_starts, np.int64)[order], sorted_lengths)).astype(np.int64)
    return Packed(
        ids_T=torch.from_numpy(ids.astype(np.int64)),
        positions_T=torch.from_numpy(positions),
        types_T=torch.from_numpy(types),
        sequence_T=torch.from_numpy(np.repeat(order, sorted_lengths)),
        lengths_B=torch.from_numpy(lengths),
        first_B=torch.from_numpy(first),
        starts=torch.from_numpy(starts.astype(np.int32)),
        longest=int(lengths.max(initial=0)),
        blocks=tuple(_blocks(sorted_lengths, starts)),
    )


def _blocks(lengths: np.ndarray, starts: np.ndarray) -> list[Block]:
    """Cut sequences sorted by length where going on would cost more padding than a block of its own."""
    alike = np.searchsorted(lengths, lengths, side="right") - np.searchsorted(lengths, lengths, side="left")
    alone = alike >= ALIKE
    blocks, begin = [], 0
    while begin < len(lengths):
        if alone[begin]:
            end = begin + int(alike[begin])
        else:
            end = int(np.searchsorted(lengths, max(1.5 * lengths[begin], lengths[begin] + 8), side="right"))
            end = begin + int(np.argmax(np.append(alone[begin:end], True)))
        blocks.append(_block(lengths[begin:end], int(starts[begin]), int(starts[end])))
        begin = end
    return blocks


def _block(lengths: np.ndarray, start: int, stop: int) -> Block:
    count, longest = len(lengths), int(lengths[-1])
    real_NL = np.arange(longest) < lengths[:, None]
    if real_NL.all():
        return Block(slice(start, stop), count, longest, None, None, None)
    places = real_NL.ravel().nonzero()[0]
    padded_NL = np.zeros(count * longest, np.int64)
    padded_NL[places] = np.arange(start, stop)
    mask_NL = np.where(real_NL, np.float32(0), np.float32(-math.inf))
    tensors = torch.from_numpy(padded_NL), torch.from_numpy(places), torch.from_numpy(mask_NL[:, None])
    return Block(slice(start, stop), count, longest, *tensors)


def batches_by_length(tokens_N: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """The N examples, those of like length together, up to `TOKENS_PER_BATCH` tokens (or one example) a batch."""
    order_N = np.argsort(tokens_N, kind="stable")
    start, load = 0, 0
    for place, index in enumerate(order_N):
        load += int(tokens_N[index])
        if load > TOKENS_PER_BATCH and place > start:
            yield order_N[start:place]
            start, load = place, int(tokens_N[index])
    yield order_N[start:]
