"""A run opened for use. All that takes lies in the run folder: no data, no pretrained weights, no network.

    RUN/encoder/config.json       shape, as Hugging Face writes it     kept when the run starts
    RUN/encoder/tokenizer.json    as it was then
    RUN/encoder/origin.json       name, hub commit and SHA-256 of the pretrained weights
    RUN/encoder/checksums.json    SHA-256 of these three
    RUN/checkpoints/…             weights

Shapes: N examples, S texts of an example (1 to 3), B examples of a batch, C classes, D width of the encoder.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from mtbert.checkpoint import load_weights
from mtbert.config import Config, TaskConfig
from mtbert.config_files import load_config
from mtbert.data import Dataset, Strings, collate, load_tokenizer, sequence_lengths, special_ids
from mtbert.encoder import EncoderShape
from mtbert.errors import UserError
from mtbert.files import read_small, write_atomically
from mtbert.heads import MultiTaskModel
from mtbert.losses import predict, probabilities
from mtbert.manifest import find_checkpoint, folders, sha256
from mtbert.packing import batches_by_length, pack
from mtbert.pretrained import read_shape, write_shape
from mtbert.ranks import choose_precision, local_device
from mtbert.runs import Rank, check_run

Origin = dict[str, str | None]
KEPT = ("origin.json", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class KeptEncoder:
    """What a run keeps of its encoder when it starts. Raises `UserError` where the two do not belong together."""

    shape: EncoderShape
    tokenizer: Tokenizer
    origin: Origin  # empty: trained from scratch

    def __post_init__(self) -> None:
        highest = max(self.tokenizer.get_vocab().values())
        if highest >= self.shape.vocab_size:
            raise UserError(
                f"encoder.tokenizer: has tokens up to number {highest}, the encoder knows {self.shape.vocab_size}; "
                f"use the tokenizer that the encoder was trained with"
            )


def keep_encoder(run_dir: Path, encoder: KeptEncoder) -> None:
    """Write it into the run folder, unless it is there; checksums last, whose presence says that all is."""
    folder = run_dir / "encoder"
    if (folder / "checksums.json").is_file():
        return
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "origin.json", json.dumps(encoder.origin, indent=2) + "\n")
    write_shape(encoder.shape, folder / "config.json")
    write_atomically(folder / "tokenizer.json", encoder.tokenizer.to_str(pretty=True))
    checksums = {name: sha256(folder / name) for name in KEPT}
    write_atomically(folder / "checksums.json", json.dumps(checksums, indent=2) + "\n")


def kept_encoder(run_dir: Path) -> KeptEncoder | None:
    """What `keep_encoder` wrote; None where a run has not got that far."""
    folder = run_dir / "encoder"
    try:
        checksums = json.loads(read_small(folder / "checksums.json"))
    except FileNotFoundError:
        if not (folder / "tokenizer.json").is_file():
            return None
        checksums = {}  # a run from before there were any
    except (OSError, ValueError, RecursionError):
        checksums = None
    if not isinstance(checksums, dict) or not checksums.keys() <= set(KEPT):
        raise UserError(f"{folder / 'checksums.json'}: not what training wrote; it was damaged")
    for name, wanted in checksums.items():
        try:
            if not (folder / name).is_file() or sha256(folder / name) != wanted:
                raise UserError(f"{folder / name}: missing or changed since the run started; it was damaged")
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from None
    try:
        origin = json.loads(read_small(folder / "origin.json"))
        texts = isinstance(origin, dict) and all(isinstance(value, str | None) for value in origin.values())
    except (OSError, ValueError, RecursionError):
        texts = False
    if not texts:
        raise UserError(f"{folder / 'origin.json'}: missing or not what training wrote; it was damaged")
    return KeptEncoder(read_shape(folder / "config.json"), load_tokenizer(folder), origin)


@dataclass(frozen=True)
class Answers:
    """What a task's head says of N examples, float64 each; NaN where there is no such thing."""

    predictions_N: NDArray[np.float64]  # class numbers, or values within the task's range
    scores_N: NDArray[np.float64]  # as the head gives it: logit (of bce that of class 1), cosine, unclamped value
    probabilities_N: NDArray[np.float64]  # of the predicted class


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

    def task(self, name: str) -> TaskConfig:
        """Raises `UserError` listing the run's tasks when it has none of that name."""
        if name not in self.config.tasks:
            raise UserError(f"{self.run_dir}: no task {name!r}; this run has {', '.join(self.config.tasks)}")
        return self.config.tasks[name]

    def tokenise(self, texts_NS: Sequence[Sequence[str]]) -> Dataset:
        """Examples in memory, for `answer` and `embed`; those with lengths_NS = 0 hold no wordpiece."""
        texts = len(texts_NS[0]) if texts_NS else 1
        flat = list(itertools.chain.from_iterable(texts_NS))
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(flat, add_special_tokens=False)]
        lengths = np.array([len(i) for i in ids], np.int32)
        return Dataset(
            file="",
            texts=texts,
            labels_N=np.zeros(len(texts_NS), np.float32),
            lengths_NS=lengths.reshape(-1, texts),
            lines_N=np.zeros(len(texts_NS), np.int64),
            ids=[],
            quarantined=[],
            all_tokens=np.fromiter(itertools.chain.from_iterable(ids), np.uint32, int(lengths.sum())),
            token_starts=np.concatenate([[0], lengths.cumsum(dtype=np.int64)]),
            all_texts=Strings(np.empty(0, np.uint8), np.zeros(1, np.int64)),
        )

    @torch.inference_mode()
    def answer(self, task: str, examples: Dataset) -> Answers:
        """The task's answers to examples with its number of texts, in their order."""
        config = self.task(task)
        answers_3N = np.full((3, len(examples)), np.nan)
        if not len(examples):  # of which `tokenise` cannot tell how many texts each would have
            return Answers(*answers_3N)
        tokens_N = sequence_lengths(examples, config.head.kind == "joint", self.max_length)
        for indices in batches_by_length(tokens_N):
            batch = collate(examples, indices, config, special_ids(self.tokenizer), self.max_length)
            answers = self.model(task, batch.packed.to(self.device))
            for row, values in enumerate(_read_out(config, answers)):
                answers_3N[row, indices] = values.double().cpu()
        return Answers(*answers_3N)

    @torch.inference_mode()
    def embed(self, examples: Dataset) -> NDArray[np.float32]:
        """Sentence vectors of examples with one text, pooled as in training, (N, D)."""
        assert examples.texts == 1
        cls_id, sep_id = special_ids(self.tokenizer)
        vectors_ND = np.empty((len(examples), self.shape.hidden_size), np.float32)
        lengths_N = np.minimum(examples.lengths_NS[:, 0], self.max_length - 2)
        for indices in batches_by_length(lengths_N + np.int64(2)) if len(examples) else ():
            sequences = [np.array([cls_id, *examples.tokens(i)[0][: lengths_N[i]], sep_id], np.int64) for i in indices]
            vectors_BD = self.model.encoder.sentence_vectors(pack(sequences).to(self.device), self.model.pooling)
            vectors_ND[indices] = vectors_BD.float().cpu()
        return vectors_ND


def _read_out(task: TaskConfig, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, scores and probabilities, (B,) each."""
    scores_B = answers.amax(dim=-1) if task.loss_kind == "cross_entropy" else answers
    probabilities_BC = probabilities(task, answers)
    nothing_B = torch.full(scores_B.shape, torch.nan)
    return predict(task, answers), scores_B, probabilities_BC.amax(dim=-1) if probabilities_BC.shape[-1] else nothing_B


def load_run(
    run_dir: Path, which: Literal["best", "latest"], precision: Literal["auto", "fp32", "bf16"] | None = None
) -> Trained:
    """Open a run's checkpoint for use in this process.

    Args:
        which: the checkpoint with the best development score, or the newest.
        precision: default: the one in the run's configuration, where "auto" means what this device does best.

    Raises `UserError` where there is no checkpoint yet, or it is damaged.
    """
    check_run(run_dir)
    config = load_config(run_dir / "config.yaml")
    kept = kept_encoder(run_dir)
    if kept is None:
        raise UserError(
            f"{run_dir}: no encoder/tokenizer.json; the run has not started, or continue it once (--resume)"
        )
    model = MultiTaskModel(kept.shape, config.encoder, config.tasks, None, config.shared_layers)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def found() -> tuple[int, dict[str, Tensor]]:
        checkpoint = find_checkpoint(run_dir, which)
        return checkpoint.step, load_weights(checkpoint, shapes)

    there = folders(run_dir)
    try:
        step, weights = found()
    except (UserError, FileNotFoundError):
        if folders(run_dir) == there:
            raise
        step, weights = found()  # it trains, and a save has put another in its place
    model.load_state_dict(weights, assign=True)
    device = local_device(Rank())
    dtype = choose_precision(precision or config.engine.precision, device)
    model.to(device=device, dtype=dtype)
    return Trained(run_dir, config, step, kept.shape, kept.tokenizer, model, device, dtype)
