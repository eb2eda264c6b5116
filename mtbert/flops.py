"""Work of the encoder in floating-point operations, and what the device could do at best.

    B sequences of T_b tokens, T tokens of all, D width, F inner width, L layers

Counted are the matrix products of the encoder's layers, two operations per multiplication and addition; a backward pass
costs twice its forward pass (PaLM, Chowdhery et al. 2022, appendix B). Embeddings, norms and heads are left out, and so
is what packing avoids: padding is no work of the model's. Model FLOPs utilisation (MFU) is this work over the time it
took, over the device's peak.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mtbert.encoder import EncoderShape

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "L4": 121.0,
}
"""bf16 matrix products without sparsity, from NVIDIA's data sheets."""


def encoder_flops(shape: EncoderShape, lengths_B: Tensor, only_first: bool, trained: bool) -> float:
    """Operations to take a packed batch through the encoder.

    Args:
        lengths_B: tokens of each sequence.
        only_first: the last layer's output is wanted for [CLS] alone (pooling pooler or cls), which then is the only
            query there; all tokens are keys and values.
        trained: forward and backward; else forward alone, as under a frozen encoder.
    """
    lengths_B = lengths_B.double()
    tokens, width, inner = float(lengths_B.sum()), shape.hidden_size, shape.intermediate_size
    keys = 2 * tokens * 2 * width**2  # k, v
    per_query = 2 * (width**2 + width**2 + 2 * width * inner)  # q, what follows attention, the two inner layers
    layer = keys + tokens * per_query + 4 * width * float(lengths_B.square().sum())  # q kᵀ and its product with v
    last = keys + len(lengths_B) * per_query + 4 * width * tokens if only_first else layer
    return (3 if trained else 1) * ((shape.layers - 1) * layer + last)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of one device at best; None where it is not known, as of a CPU or a slice of a GPU."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:
        return None
    return next((1e12 * peak for model, peak in PEAK_TFLOPS.items() if re.search(rf"\b{model}\b", name)), None)
