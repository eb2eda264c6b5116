"""Counted by hand and by torch while the encoder runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtbert.encoder import Encoder, EncoderShape, Pooling
from mtbert.flops import encoder_flops, peak_flops
from mtbert.packing import pack

SHAPE = EncoderShape(50, 16, 3, 2, 40, 32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("trained", [True, False])
def test_as_torch_counts_them(pooling: Pooling, trained: bool) -> None:
    """Sequences of one length: packing then pads nothing within attention either."""
    encoder = Encoder(SHAPE, 0.0)
    packed = pack([np.full(9, 3) for _ in range(4)])
    with FlopCounterMode(display=False) as counter:
        vectors_BD = encoder.sentence_vectors(packed, pooling)
        if trained:
            vectors_BD.sum().backward()
    counted = encoder_flops(SHAPE, packed.lengths_B, only_first=pooling != "mean", trained=trained)
    assert counted == counter.get_total_flops()


def test_padding_is_no_work() -> None:
    lengths = [3, 9, 20]
    alone = [encoder_flops(SHAPE, torch.tensor([length]), False, True) for length in lengths]
    assert encoder_flops(SHAPE, torch.tensor(lengths), False, True) == sum(alone)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
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
