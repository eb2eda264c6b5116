"""Counted by hand and by torch while the encoder runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtbert.encoder import Encoder, EncoderShape
from mtbert.flops import encoder_flops, peak_flops
from mtbert.packing import pack

SHAPE = EncoderShape(50, 16, 3, 2, 40, 32)


LENGTHS = (9, 9, 9, 9)
"""Sequences of one length: packing then pads nothing within attention either."""


@pytest.mark.parametrize("trained", [True, False])
def test_as_torch_counts_them(trained: bool) -> None:
    encoder = Encoder(SHAPE, 0.0)
    packed = pack([np.full(length, 3) for length in LENGTHS])
    with FlopCounterMode(display=False) as counter:
        vectors_BD = encoder.sentence_vectors(packed, "mean")
        if trained:
            vectors_BD.sum().backward()
    assert encoder_flops(SHAPE, packed.lengths_B, only_first=False, trained=trained) == counter.get_total_flops()


@pytest.mark.parametrize("trained", [True, False])
def test_the_last_layer_needs_one_query_for_a_vector_from_cls(trained: bool) -> None:
    """Whatever the encoder does: against a last layer that computes no more than that."""
    width, inner = SHAPE.hidden_size, SHAPE.intermediate_size
    query, key, value, attended = (torch.ones(width, width, requires_grad=True) for _ in range(4))
    up, down = torch.ones(width, inner, requires_grad=True), torch.ones(inner, width, requires_grad=True)
    below = replace(SHAPE, layers=SHAPE.layers - 1)
    with FlopCounterMode(display=False) as counter:
        for length in LENGTHS:
            hidden_TD = torch.ones(length, width, requires_grad=True)
            shares_1T = hidden_TD[:1] @ query @ (hidden_TD @ key).T
            vector_1D = shares_1T @ (hidden_TD @ value) @ attended @ up @ down
            if trained:
                vector_1D.sum().backward()
    lengths_B = torch.tensor(LENGTHS)
    expected = encoder_flops(below, lengths_B, only_first=False, trained=trained) + counter.get_total_flops()
    assert encoder_flops(SHAPE, lengths_B, only_first=True, trained=trained) == expected


def test_padding_is_no_work() -> None:
    lengths = [3, 9, 20]
    alone = [encoder_flops(SHAPE, torch.tensor([length]), False, True) for length in lengths]
    assert encoder_flops(SHAPE, torch.tensor(lengths), False, True) == sum(alone)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_is_of_that_device_or_unknown(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert peak == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
