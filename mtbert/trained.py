"""A run opened for use. All that takes lies in the run folder: no data, no pretrained weights, no network.

    RUN/encoder/config.json       shape, as Hugging Face writes it     kept when the run starts
    RUN/encoder/tokenizer.json    as it was then
    RUN/encoder/origin.json       name, hub commit and SHA-256 of the pretrained weights
    RUN/checkpoints/…             weights

Shapes: N examples, D width of the encoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from mtbert.checkpoint import find_checkpoint, load_weights
from mtbert.config import Config, UserError, load_config
from mtbert.data import load_tokenizer
from mtbert.encoder import EncoderShape
from mtbert.engine import choose_precision, local_device
from mtbert.heads import MultiTaskModel
from mtbert.pretrained import read_shape, write_shape
from mtbert.runs import Rank, write_atomically

Origin = dict[str, str | None]


@dataclass(frozen=True)
class KeptEncoder:
    """What a run keeps of its encoder when it starts."""

    shape: EncoderShape
    tokenizer: Tokenizer
    origin: Origin  # empty: trained from scratch


def keep_encoder(run_dir: Path, encoder: KeptEncoder) -> None:
    """Write it into the run folder; tokenizer last, whose presence says that all is there."""
    folder = run_dir / "encoder"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "origin.json", json.dumps(encoder.origin, indent=2) + "\n")
    write_shape(encoder.shape, folder / "config.json")
    write_atomically(folder / "tokenizer.json", encoder.tokenizer.to_str(pretty=True))


def kept_encoder(run_dir: Path) -> KeptEncoder | None:
    """What `keep_encoder` wrote; None where a run has not got that far."""
    folder = run_dir / "encoder"
    if not (folder / "tokenizer.json").is_file():
        return None
    origin: Origin = json.loads((folder / "origin.json").read_text(encoding="utf-8"))
    return KeptEncoder(read_shape(folder / "config.json"), load_tokenizer(folder), origin)


@dataclass(frozen=True)
class Trained:
    """A trained run in memory, ready to answer."""

    run_dir: Path
    config: Config
    step: int  # steps its weights were trained for
    shape: EncoderShape
    tokenizer: Tokenizer
    model: MultiTaskModel
    device: torch.device
    dtype: torch.dtype

    @property
    def max_length(self) -> int:
        """Tokens of a sequence; what is longer is truncated."""
        return min(self.config.encoder.max_length, self.shape.max_positions)


def load_run(
    run_dir: Path, which: Literal["best", "latest"], precision: Literal["auto", "fp32", "bf16"] | None = None
) -> Trained:
    """Open a run's checkpoint for use in this process.

    Args:
        which: the checkpoint with the best development score, or the newest.
        precision: default: the one that the run was trained with.

    Raises `UserError` where there is no checkpoint yet, or it is damaged.
    """
    config = load_config(run_dir / "config.yaml")
    kept = kept_encoder(run_dir)
    if kept is None:
        raise UserError(
            f"{run_dir}: no encoder/tokenizer.json; the run has not started, or continue it once (--resume)"
        )
    checkpoint = find_checkpoint(run_dir, which)
    model = MultiTaskModel(kept.shape, config.encoder, config.tasks, config.seed, config.shared_layers)
    model.load_state_dict(load_weights(checkpoint, {name: p.shape for name, p in model.named_parameters()}))
    device = local_device(Rank())
    dtype = choose_precision(precision or config.engine.precision, device)
    model.to(device=device, dtype=dtype)
    return Trained(run_dir, config, checkpoint.step, kept.shape, kept.tokenizer, model, device, dtype)
