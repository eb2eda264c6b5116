"""Randomness is addressed, not streamed: every draw comes from (seed, purpose, where it is used).

So a killed run continues bit for bit, and no rank's draws depend on what another one did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def addressed_rng(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """A generator for one purpose at one address; two different addresses never share a stream."""
    return np.random.default_rng([seed, *purpose.encode(), 1 << 16, *address])


def addressed_generator(device: torch.device, seed: int, purpose: str, *address: int) -> torch.Generator:
    """The same for torch, on the device."""
    import torch  # takes seconds, and a comparison of runs needs none of it

    state = int(addressed_rng(seed, purpose, *address).integers(2**63))
    return torch.Generator(device).manual_seed(state)
