"""What a configuration describes, before anything is trained: the model, the tasks with their data, the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mtbert.config import Config
from mtbert.encoder import EncoderShape
from mtbert.errors import UserError
from mtbert.heads import MultiTaskModel
from mtbert.pretrained import load_pretrained
from mtbert.pretrained import origin as pretrained_origin
from mtbert.runs import check_encoder
from mtbert.surgery import Surgery
from mtbert.tasks import Task, load_tasks, locate_data, locate_tokenizer
from mtbert.token_cache import Progress
from mtbert.trained import KeptEncoder, kept_encoder
from mtbert.weighting import Weighting


def methods_of(config: Config) -> tuple[Surgery, Weighting]:
    """Raises `UserError` for an unknown method or option, an impossible value, or a missing pip extra."""
    surgery = Surgery(config.surgery.method, config.surgery.options, config.seed)
    regression = [task.regression for task in config.tasks.values()]
    return surgery, Weighting(config.weighting.method, config.weighting.options, regression, config.seed)


@dataclass(frozen=True)
class Built:
    """What a configuration describes, before anything is trained."""

    model: MultiTaskModel
    encoder: KeptEncoder
    tasks: list[Task]
    notes: list[str]  # for the user to know


def build(config: Config, run_dir: Path | None = None, initial: bool = True, progress: Progress | None = None) -> Built:
    """The model and the tasks with their data.

    Args:
        run_dir: of a run; once it has started, its encoder is the one that it keeps.
        initial: whether the model needs its initial weights; not where a checkpoint is about to replace them.
        progress: told of a tokenising that takes long.
    """
    encoder = config.encoder
    check_encoder(encoder)
    kept = kept_encoder(run_dir) if run_dir else None
    weights: Mapping[str, Tensor] = {}
    folder, origin = None, kept.origin if kept else {}
    if encoder.pretrained is not None and (initial or kept is None):
        shape, weights, folder = load_pretrained(encoder.pretrained, origin.get("revision"))
        found = pretrained_origin(encoder.pretrained, folder)
        if origin and found["sha256"] != origin["sha256"]:
            raise UserError(
                f"encoder.pretrained {encoder.pretrained}: its weights have changed since this run started; "
                f"put the old ones back, or start a new run"
            )
        origin = found
    data = locate_data(config)
    if kept is None:
        tokenizer = locate_tokenizer(config, data, folder)
        if encoder.shape is not None:
            # not how many there are: a vocab.txt may have one twice, and numbers may be left out
            words = max(tokenizer.get_vocab().values()) + 1
            shape = EncoderShape(vocab_size=words, **encoder.shape.model_dump())
        kept = KeptEncoder(shape, tokenizer, origin)
    shape, tokenizer = kept.shape, kept.tokenizer
    if encoder.shape is not None and any(getattr(shape, key) != size for key, size in encoder.shape):
        raise UserError(
            f"encoder.shape: is not the one in {run_dir}/encoder; what the run holds belongs to another configuration"
        )
    model = MultiTaskModel(shape, encoder, config.tasks, config.seed, config.shared_layers)
    notes = []
    if weights and model.encoder.load_weights(weights) and encoder.pooling == "pooler":
        notes.append(f"{encoder.pretrained} has no pooler: it starts from scratch (encoder.pooling: mean needs none)")
    if encoder.max_length > shape.max_positions:
        cut = f"texts are cut at the {shape.max_positions} tokens that this encoder takes"
        notes.append(f"encoder.max_length {encoder.max_length}: {cut}")
    joint = [name for name, task in config.tasks.items() if task.head.kind == "joint"]
    if joint and shape.type_vocab_size < 2:
        raise UserError(
            f"tasks.{joint[0]}.head.kind joint: this encoder does not tell two texts of a sequence apart "
            f"(type_vocab_size {shape.type_vocab_size}); choose concat, difference or weighted_dot"
        )
    for name, task in config.tasks.items():
        if task.dev and task.train == task.dev:
            notes.append(f"note: tasks.{name} is scored on what it is trained on, {task.dev}")
    tasks = load_tasks(config, data, tokenizer, min(encoder.max_length, shape.max_positions), progress)
    return Built(model, kept, tasks, notes)
