"""A task: where its examples are, how they are laid out, which head and loss they get. All of it comes from YAML.

Shapes: N examples of a split, B of a batch, P texts of a batch (B, 2·B or 3·B), D width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from mtbert import synthetic
from mtbert.config import HUB_FILE, Config, DataConfig, Generate, TaskConfig
from mtbert.data import (
    Batch,
    Dataset,
    collate,
    load_dataset,
    load_file,
    load_tokenizer,
    locate_file,
    sequence_lengths,
    special_ids,
)
from mtbert.errors import UserError
from mtbert.files import folder_made_aside, read_small, user_path, write_atomically
from mtbert.losses import example_losses
from mtbert.manifest import sha256
from mtbert.ranking import mnrl
from mtbert.token_cache import Progress

Split = Literal["train", "dev"]

CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Task:
    """One task with its splits open."""

    name: str
    config: TaskConfig
    train: Dataset
    dev: Dataset | None  # triplets can do without; such a task is trained and not scored
    specials: tuple[int, int]  # ids of [CLS] and [SEP]
    max_length: int

    def dataset(self, split: Split) -> Dataset:
        dataset = self.train if split == "train" else self.dev
        assert dataset is not None, "a task without a development set is not scored"
        return dataset

    @property
    def splits(self) -> list[Dataset]:
        return [self.train] if self.dev is None else [self.train, self.dev]

    def tokens_N(self, split: Split) -> NDArray[np.int32]:
        """What each example costs in the encoder, in tokens."""
        return sequence_lengths(self.dataset(split), self.config.head.kind == "joint", self.max_length)

    def batch(self, split: Split, indices: NDArray[np.int64]) -> Batch:
        return collate(self.dataset(split), indices, self.config, self.specials, self.max_length)

    def example_losses(self, answers: Tensor, labels_B: Tensor) -> Tensor | None:
        """The loss of each example, (B,); None with loss mnrl, which an example has only in a batch."""
        return example_losses(self.config, answers, labels_B) if self.config.has_example_loss else None

    def loss(self, vectors_PD: Tensor, answers: Tensor, labels_B: Tensor, epoch: int) -> Tensor:
        """What is trained on: the sum over a rank's examples, scalar. Collective for tasks that rank.

        Args:
            vectors_PD, answers: from the model, for the same batch.
            epoch: from 0 on; the threshold of `mnrl` rises with it.
        """
        losses_B = self.example_losses(answers, labels_B)
        ranking = self.config.ranking
        total = answers.new_zeros(()) if losses_B is None else losses_B.sum()
        if ranking is None:
            return total
        return total + ranking.weight * mnrl(vectors_PD, labels_B, self.config.texts, ranking, epoch)


def load_tasks(
    config: Config, data: DataConfig, tokenizer: Tokenizer, max_length: int, progress: Progress | None = None
) -> list[Task]:
    """Every task with its data read, checked and tokenised (or found in the cache); `progress` as in `load_dataset`."""
    specials = special_ids(tokenizer)
    return [
        Task(
            name,
            task,
            load_dataset(task, name, "train", data, tokenizer, progress),
            load_dataset(task, name, "dev", data, tokenizer, progress) if task.dev is not None else None,
            specials,
            max_length,
        )
        for name, task in config.tasks.items()
    ]


def scored_on(
    file: str, name: str, config: Config, tokenizer: Tokenizer, max_length: int, progress: Progress | None = None
) -> Task:
    """A task of `config` with another file in its development set's place, to be scored on it and not trained.

    Args:
        file: relative to where the command is typed, not to `data.dir`; or on the hub, as in a configuration.

    Raises `UserError` as `load_dataset`.
    """
    task = config.tasks[name]
    on_hub = HUB_FILE.fullmatch(file) is not None
    shown, path = locate_file(file, "--file", config.data) if on_hub else (file, user_path(file))
    data = load_file(path, shown, task, config.data, tokenizer, progress)
    return Task(name, task, data, data, special_ids(tokenizer), max_length)


def with_own_cache(config: Config) -> Config:
    """With this user's own cache where that of the run, which may be from another user or machine, takes no files."""
    recorded = user_path(config.data.cache)
    for folder in (recorded / "tokens", recorded / "generated"):
        near = next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))
        if not os.access(near, os.W_OK | os.X_OK):
            own = {"cache": DataConfig.model_fields["cache"].default}
            return config.model_copy(update={"data": config.data.model_copy(update=own)})
    return config


def locate_data(config: Config) -> DataConfig:
    """Where the examples lie: `data.dir`, or the generated corpus, made on first use."""
    if config.data.generate is None:
        return config.data
    folder = _generated(config.data.generate, user_path(config.data.cache) / "generated")
    return config.data.model_copy(update={"dir": str(folder), "generate": None})


def locate_tokenizer(config: Config, data: DataConfig, pretrained: Path | None) -> Tokenizer:
    """The tokenizer named in the config, else the pretrained model's, else the generated corpus's."""
    if config.encoder.tokenizer is not None:
        return load_tokenizer(config.encoder.tokenizer)
    if pretrained is not None:
        return load_tokenizer(pretrained)
    if config.data.generate is not None and data.dir is not None:
        return load_tokenizer(data.dir)
    raise UserError("encoder.tokenizer: not set; an encoder trained from scratch needs a tokenizer.json or vocab.txt")


def _generated(wanted: Generate, cache: Path) -> Path:
    """The generated corpus with its tokenizer, named after what it depends on; ranks may race, one result stays."""
    recipe = f"{wanted.model_dump_json()} {Path(synthetic.__file__).read_text(encoding='utf-8')}"
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not _whole(folder):
        try:
            with folder_made_aside(folder, _whole) as aside:
                _generate(wanted, aside)
        except OSError as error:
            raise UserError(f"data.cache: cannot make a folder in {folder.parent}: {error.strerror}") from None
    return folder


def _generate(wanted: Generate, folder: Path) -> None:
    synthetic.generate(folder, wanted.seed, wanted.train, wanted.dev)
    paths = (folder / f"{name}-train.csv" for name in synthetic.VOCABULARY)
    texts = (path.read_text(encoding="utf-8") for path in paths)
    lines = (column for text in texts for line in text.splitlines()[1:] for column in line.split("\t")[2:-1])
    synthetic.train_tokenizer(lines, folder / "tokenizer.json")
    checksums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_atomically(folder / CHECKSUMS, json.dumps(checksums, indent=2) + "\n")


def _whole(folder: Path) -> bool:
    """Whether everything is there as it was made; not where that was before there were checksums."""
    try:
        checksums = json.loads(read_small(folder / CHECKSUMS))
        return all(sha256(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
