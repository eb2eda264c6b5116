"""One strict `Config` of all that a run may be told; `config_files` reads it.

This module imports neither torch nor anything heavy, so that `--help` and configuration errors come at once.
Every key carries its meaning in `description`; `docs/configuration.md` is generated from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

ENCODER = "encoder"  # what the shared part of the model is called among parts
RESERVED = {"shared": "the layers that heads share", "composite": "the mean of all scores"}
"""Names that no task of a new run may have, and what has them."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, values: Any) -> Any:
        """But where one belongs: pydantic would take `true` as 1; in YAML an unquoted yes, no, on or off is one."""
        for key in cls.model_fields.keys() & (values if isinstance(values, dict) else {}):
            given = values[key] if isinstance(values[key], list | tuple) else [values[key]]
            if any(isinstance(each, bool) for each in given) and cls.model_fields[key].annotation is not bool:
                raise PydanticCustomError(
                    "boolean", "{key}: is neither true nor false; a name such as yes or on needs quotes", {"key": key}
                )
        return values


class Generate(Section):
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the generated corpus")
    train: int = Field(4000, ge=1, description="training examples per task")
    dev: int = Field(600, ge=1, description="development examples per task")


class DataConfig(Section):
    dir: str | None = Field(None, description="folder that the tasks' file names are relative to")
    generate: Generate | None = Field(None, description="use the generated corpus instead of files")
    cache: str = Field("~/.cache/mtbert", description="where tokenised, memory-mapped data and generated corpora lie")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.dir is not None and self.generate is not None:
            raise ValueError("dir and generate exclude each other; set one of them to null")
        return self


class ShapeConfig(Section):
    """Shape of an encoder trained from scratch; a pretrained one brings its own."""

    hidden_size: int = Field(128, ge=1, description="width of the hidden states, a multiple of `heads`")
    layers: int = Field(4, ge=1, description="transformer layers")
    heads: int = Field(4, ge=1, description="attention heads of a layer")
    intermediate_size: int = Field(512, ge=1, description="inner width of the feed-forward layers")
    max_positions: int = Field(512, ge=4, description="longest sequence in tokens, special tokens included")

    @model_validator(mode="after")
    def _heads_divide(self) -> ShapeConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self


class EncoderConfig(Section):
    pretrained: str | None = Field(
        None,
        description="Hugging Face folder or hub name with config.json, model.safetensors and a tokenizer",
    )
    shape: ShapeConfig | None = Field(None, description="train from scratch with this shape instead")
    tokenizer: str | None = Field(
        None,
        description="tokenizer.json or vocab.txt (or a folder with one); default: the pretrained model's",
    )
    pooling: Literal["pooler", "cls", "mean"] = Field(
        "pooler",
        description="sentence vector: BERT's tanh layer on [CLS], [CLS] itself, or the mean over tokens",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="after the embeddings and in both residual branches")
    max_length: int = Field(
        512, ge=4, description="longer sequences are truncated (pairs: the longer one first), in tokens"
    )


class Columns(Section):
    text: list[str] = Field(
        ["sentence"],
        min_length=1,
        max_length=3,
        description="one text column, two for a pair, three for triplets: text, its match, its hard negative",
    )
    label: str = Field("label", description="column with the label; triplets have none")
    id: str | None = Field(None, description="column that names the row in predictions and reports")
    source: str | None = Field(
        None, description="column of dev that says where a row comes from; reports score each apart"
    )

    @model_validator(mode="after")
    def _apart(self) -> Columns:
        if len(set(self.text)) < len(self.text):
            raise ValueError(f"text: names a column twice ({', '.join(self.text)})")
        if self.label in self.text:
            raise ValueError(f"label: column {self.label!r} is a text; a task that reads its labels learns nothing")
        return self


HeadKind = Literal["linear", "joint", "concat", "difference", "weighted_dot", "cosine", "relu_cosine"]


class HeadConfig(Section):
    kind: HeadKind = Field(
        "linear",
        description="one text: linear. Pairs: joint (both texts in one sequence with [SEP], then linear), or two "
        "encodings joined by concat, difference (concat and |u − v|), weighted_dot (elementwise product), cosine, "
        "relu_cosine. Triplets: cosine",
    )
    shared: str | None = Field(None, description="name of one of shared_layers, which then comes first")
    hidden: list[Annotated[int, Field(ge=1)]] = Field([], description="widths of hidden layers, each ReLU and dropout")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the head's input and after its hidden layers")
    scale: float | None = Field(
        None,
        gt=0,
        description="multiplies the answer. Default: the highest label for cosine and relu_cosine of pair_regression, "
        "20 for those with loss bce (the logit is scale · (cosine − ½)), 1 for all else",
    )
    lr: float | None = Field(None, ge=0, description="learning rate of this head; default optimizer.head_lr")


class SharedLayerConfig(Section):
    """Linear and ReLU between the encoder and the heads that name it (paper B)."""

    width: int | None = Field(None, ge=1, description="width of its output; default: the encoder's")
    lr: float | None = Field(None, ge=0, description="learning rate of this layer; default optimizer.head_lr")


class MnrlConfig(Section):
    """Multiple negatives ranking (Henderson et al. 2017): a text's partner against all other partners in the batch."""

    threshold: Literal["label", "cosine"] | None = Field(
        None,
        description="which pairs are positives. Default: every pair of the batch. label: pairs whose label is at "
        "least t. cosine: first and second texts of the batch whose cosine is at least t, be they of one pair or two",
    )
    start: float | None = Field(None, description="t in the first epoch of the run; needed with threshold")
    rise: float = Field(0.0, ge=0, description="added to t after each epoch of the run, whatever its phase trains")
    temperature: float = Field(0.05, gt=0, description="cosines are divided by it before the softmax")
    weight: float = Field(1.0, ge=0, description="multiplies this loss before it is added to the task's `loss`")

    @model_validator(mode="after")
    def _consistent(self) -> MnrlConfig:
        if self.threshold is not None and self.start is None:
            raise ValueError(f"threshold {self.threshold} needs start, the t of the first epoch")
        if self.threshold is None and (self.start is not None or self.rise):
            raise ValueError("start and rise need threshold: label or cosine")
        if self.threshold == "cosine" and self.start is not None and not -1 <= self.start <= 1:
            raise ValueError(f"start {self.start:g} is no cosine; give a number from -1 to 1")
        return self


LossKind = Literal["cross_entropy", "bce", "mse", "huber", "cosine_embedding", "mnrl"]
MetricKind = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
TaskKind = Literal["classification", "pair_classification", "pair_regression", "triplets"]

_LOSSES_OF: dict[str, tuple[str, ...]] = {
    "classification": ("cross_entropy",),
    "pair_classification": ("bce", "cross_entropy", "cosine_embedding", "mnrl"),
    "pair_regression": ("mse", "huber", "cosine_embedding", "mnrl"),
    "triplets": ("mnrl",),
}
_METRICS_OF: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "pair_classification": ("accuracy", "f1", "matthews"),
    "pair_regression": ("pearson", "spearman"),
    "triplets": ("accuracy",),
}
_PAIR_HEADS = ("joint", "concat", "difference", "weighted_dot", "cosine", "relu_cosine")
_HEADS_OF: dict[str, tuple[str, ...]] = {
    "classification": ("linear",),
    "pair_classification": _PAIR_HEADS,
    "pair_regression": _PAIR_HEADS,
    "triplets": ("cosine",),
}
_COSINE_HEADS = ("cosine", "relu_cosine")


HUB_FILE = re.compile("hub:([^/@]+/[^/@]+)(?:@([^/@]+))?/(.+)")
"""A file of a dataset repository: its name, the revision if one is said, the path in it."""


class TaskConfig(Section):
    kind: TaskKind = Field(
        description="decides how many texts a row has and what its label is; triplets (a text, a match, a hard "
        "negative) have no label and train the encoder alone: supervised SimCSE (Gao et al. 2021)"
    )
    train: str = Field(
        description="training file (.csv and .tsv by their first line, .jsonl, .parquet), in data.dir or, as "
        "hub:owner/name/path or hub:owner/name@REVISION/path, of a dataset repository of the Hugging Face hub"
    )
    dev: str | None = Field(None, description="development file; only triplets can do without, and are not scored then")
    columns: Columns = Field(default_factory=Columns, description="what the file's columns are called")
    classes: Annotated[int, Field(ge=2)] | Annotated[list[str], Field(min_length=2)] = Field(
        2,
        description="classification kinds: how many, and labels are 0 … classes − 1; or their names, such as [world, "
        "sport], and labels are these names",
    )
    range: tuple[float, float] = Field((0.0, 5.0), description="lowest and highest label (pair_regression)")
    head: HeadConfig = Field(default_factory=HeadConfig, description="the layers that only this task has")
    loss: LossKind | None = Field(
        None,
        description="default: cross_entropy, bce, mse or mnrl, by kind. cosine_embedding needs a cosine head and takes "
        "a label's place in `range` as the share of being similar",
    )
    margin: float = Field(0.0, ge=-1, lt=1, description="cosine_embedding: dissimilar texts may have this cosine")
    mnrl: MnrlConfig | None = Field(
        None, description="ranking within the batch, besides `loss`, or how loss mnrl does it"
    )
    metric: MetricKind | None = Field(
        None,
        description="default: accuracy, or pearson for pair_regression. f1 of two classes is that of class 1, of more "
        "the mean of each class's (macro)",
    )
    weight: float = Field(1.0, ge=0, description="λ: the task's loss is multiplied by it before surgery")
    batch_size: int | None = Field(
        None, ge=1, description="examples per step over all ranks; default schedule.batch_size"
    )

    @property
    def texts(self) -> int:
        """Texts of an example."""
        return {"classification": 1, "triplets": 3}.get(self.kind, 2)

    @property
    def regression(self) -> bool:
        """Whether labels are values; else they are classes."""
        return self.kind == "pair_regression"

    @property
    def class_count(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """What each class is called; its number where the task gives no names."""
        return [str(number) for number in range(self.classes)] if isinstance(self.classes, int) else self.classes

    @property
    def loss_kind(self) -> str:
        return self.loss or _LOSSES_OF[self.kind][0]

    @property
    def has_example_loss(self) -> bool:
        """Whether an example has a loss alone; with loss mnrl it has one only in a batch."""
        return self.loss_kind != "mnrl"

    @property
    def probability_columns(self) -> int:
        """Classes that its answers give probabilities of; 0 where they give none."""
        return self.class_count if self.loss_kind in ("cross_entropy", "bce") else 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that it could be scored by."""
        return _METRICS_OF[self.kind]

    @property
    def metric_kind(self) -> str:
        return self.metric or _METRICS_OF[self.kind][0]

    @property
    def head_has_parameters(self) -> bool:
        """A layer that it shares is none of its own."""
        return self.head.kind not in _COSINE_HEADS or bool(self.head.hidden)

    @property
    def highest_label(self) -> float:
        return self.range[1] if self.regression else self.class_count - 1

    @property
    def ranking(self) -> MnrlConfig | None:
        """How texts are ranked within a batch; None if they are not."""
        return self.mnrl or (MnrlConfig() if self.loss_kind == "mnrl" else None)

    def number_of(self, label: Any) -> float:
        """A label as it is learnt. Raises `ValueError` if it is none of the task's: of classes that have names only
        these are, for a number might have been meant in another order."""
        if not isinstance(self.classes, int):
            name = str(label).strip()
            if name in self.classes:
                return float(self.classes.index(name))
            raise ValueError(f"{label!r} is none of the classes {', '.join(self.classes)}")
        regression = self.regression
        low, high = self.range if regression else (0, self.classes - 1)
        try:
            if "_" in str(label):  # 1_0 is 10 to Python alone
                raise TypeError
            number = float(label)
        except (TypeError, ValueError, OverflowError):  # OverflowError: of an integer that is no float
            number = math.nan
        if low <= number <= high and (regression or number.is_integer()):
            return number
        right = f"a number from {low:g} to {high:g}" if regression else f"a class from 0 to {high}"
        raise ValueError(f"{label!r} is not {right}")

    def label_of(self, number: float) -> int | float | str:
        """What `number_of` learns as this number, as users are told it: a class's name or number, or a value."""
        if self.regression:
            return number
        return int(number) if isinstance(self.classes, int) else self.classes[int(number)]

    @field_validator("train", "dev")
    @classmethod
    def _hub_names(cls, file: str | None) -> str | None:
        if file is not None and file.startswith("hub:") and not HUB_FILE.fullmatch(file):
            raise ValueError(f"{file!r} is not hub:owner/name/path/in/repo.csv or hub:owner/name@REVISION/path")
        return file

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        if len(self.columns.text) != self.texts:
            raise ValueError(
                f"kind {self.kind} takes {self.texts} text column(s), columns.text names {len(self.columns.text)}"
            )
        for key, value, valid in (
            ("head.kind", self.head.kind, _HEADS_OF[self.kind]),
            ("loss", self.loss_kind, _LOSSES_OF[self.kind]),
            ("metric", self.metric_kind, _METRICS_OF[self.kind]),
        ):
            if value not in valid:
                raise ValueError(f"{key} {value!r} does not fit kind {self.kind}; valid: {', '.join(valid)}")
        _belongs(self, "classes", "classification", "pair_classification")
        seen: set[str] = set()
        for name in [] if isinstance(self.classes, int) else self.classes:
            if name != " ".join(name.split()) or not name:
                raise ValueError(f"classes: {name!r} is no name; blanks stand singly, and between words")
            if name in seen:
                raise ValueError(f"classes: names {name!r} twice")
            seen.add(name)
        _belongs(self, "range", "pair_regression")
        if self.dev is None and self.kind != "triplets":
            raise ValueError("dev: missing; only triplets can do without a development file")
        if self.kind == "pair_classification" and self.loss_kind != "cross_entropy" and self.class_count != 2:
            raise ValueError(f"loss {self.loss_kind} needs classes 2, not {self.class_count}; use loss cross_entropy")
        if self.range[0] >= self.range[1]:
            raise ValueError(f"range {list(self.range)} is upside down; give [lowest, highest]")
        if self.regression and self.head.kind in _COSINE_HEADS and self.range[1] <= 0:
            raise ValueError(f"head.kind {self.head.kind!r} answers up to the highest label, which must be above 0")
        if self.head.lr is not None and not self.head_has_parameters:
            raise ValueError(f"head.lr: a {self.head.kind} head without hidden layers has no parameters; leave it out")
        self._loss_fits_head()
        self._ranking_fits()
        return self

    def _loss_fits_head(self) -> None:
        cosine_head, loss = self.head.kind in _COSINE_HEADS, self.loss_kind
        if loss in ("cosine_embedding", "mnrl") and not cosine_head:
            raise ValueError(
                f"loss {loss} does not fit head.kind {self.head.kind!r}; valid: head.kind cosine or relu_cosine"
            )
        if loss == "cross_entropy" and cosine_head:
            valid = ", ".join(kind for kind in _LOSSES_OF[self.kind] if kind != loss)
            raise ValueError(f"loss {loss} does not fit head.kind {self.head.kind!r}; valid: {valid}")
        if loss in ("cosine_embedding", "mnrl") and self.head.scale is not None:
            raise ValueError(f"loss {loss} works on plain cosines; leave head.scale out")
        if self.margin and loss != "cosine_embedding":
            raise ValueError(f"margin belongs to loss cosine_embedding, not {loss}")

    def _ranking_fits(self) -> None:
        if self.ranking is None:
            return
        if self.kind == "classification" or self.head.kind == "joint":
            valid = ", ".join(kind for kind in _PAIR_HEADS if kind != "joint")
            raise ValueError(f"mnrl ranks texts that are encoded one by one; valid: a pair task with head.kind {valid}")
        if self.loss_kind == "mnrl" and (self.head.hidden or self.head.shared):
            raise ValueError("loss mnrl trains the encoder alone; leave head.hidden and head.shared out, or add a loss")
        if self.kind == "triplets" and self.ranking.threshold is not None:
            raise ValueError("mnrl.threshold: every triplet is a positive; leave it out")
        if self.ranking.threshold == "label" and (self.ranking.start or 0) > self.highest_label:
            raise ValueError(f"mnrl.start {self.ranking.start:g} is above the highest label, {self.highest_label:g}")


class ScheduleConfig(Section):
    kind: Literal["round_robin", "sequential", "sampled", "adaptive"] = Field(
        "round_robin",
        description="round_robin: every task in every step. sequential: each dataset to its end, one after "
        "another. sampled: tasks drawn with probability ∝ N^alpha. adaptive: more often the lower their score lies "
        "under its target",
    )
    length: Literal["shortest", "longest", "unbalanced"] | Annotated[int, Field(ge=1)] = Field(
        "longest",
        description="steps per epoch of all but sequential: when the shortest or the longest "
        "dataset ends, unbalanced (a task stops when its data end), or σ, a number of steps; shorter "
        "datasets start again",
    )
    alpha: float = Field(
        1.0,
        ge=0,
        description="sampled: 1 is proportional to size, 0 is uniform. adaptive: probability ∝ 1 / (min(1, score / "
        "target)^alpha + 0.1), with the scores of the last evaluation; 0 is uniform",
    )
    targets: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="adaptive: by task, the score it is measured against (what it reaches alone); default 1"
    )
    anneal: float = Field(
        0.0,
        ge=0,
        description="sampled: alpha falls linearly by this much from the first epoch to the last (PALs: 0.8)",
    )
    tasks_per_step: int = Field(
        1,
        ge=1,
        description="sampled, adaptive: draws per step; with 1 a step has one task, and surgery nothing to do. A task "
        "drawn twice has a larger batch in the step, not a larger weight: with several draws tasks count more evenly "
        "than alpha says",
    )
    batch_size: int = Field(32, ge=1, description="examples per task and step, over all ranks and micro-batches")
    bucket: int = Field(
        64, ge=1, description="batches sorted by length together: larger wastes less, 1 is a plain shuffle"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if self.length not in ("longest", "unbalanced") and self.kind == "sequential":
            raise ValueError(
                "length: an epoch of kind sequential ends with the last dataset; leave length out, or set it to longest"
            )
        if self.length == "unbalanced" and self.kind != "round_robin":
            raise ValueError("length unbalanced belongs to kind round_robin")
        if self.anneal > self.alpha:
            raise ValueError(f"anneal {self.anneal} would take alpha {self.alpha} below 0")
        _belongs(self, "anneal", "sampled")
        _belongs(self, "targets", "adaptive")
        for key in ("alpha", "tasks_per_step"):
            _belongs(self, key, "sampled", "adaptive")
        return self


def _belongs(section: TaskConfig | ScheduleConfig, key: str, *kinds: str) -> None:
    """Refuses a value that would do nothing. The default is let through: a configuration written out has every key."""
    default = type(section).model_fields[key].default
    if section.kind not in kinds and getattr(section, key) != default:
        instead = "null" if default in ({}, None) else default
        raise ValueError(
            f"{key} belongs to kind {' and '.join(kinds)}, not {section.kind}; leave it out, or set it to {instead}"
        )


class Milestones(Section):
    """A learning rate that falls in steps (torch's MultiStepLR)."""

    milestones: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="epochs of the run after which every rate is multiplied by gamma"
    )
    gamma: float = Field(gt=0, le=1, description="factor of each step down")


Decay = Literal["constant", "linear", "cosine"] | Milestones
Scale = Annotated[float, Field(gt=0)]


class PhaseConfig(Section):
    """A stretch of training with its own tasks, trainable parts, length and learning rates.

    A part is the encoder, the head of a task, or a layer that heads share, by name.
    """

    name: str = Field("train", description="shown while it runs")
    epochs: int | None = Field(None, ge=1, description="epochs of the schedule; give this or steps")
    steps: int | None = Field(None, ge=1, description="steps; give this or epochs")
    tasks: list[str] | None = Field(None, min_length=1, description="names of the tasks that it trains; default: all")
    trainable: Literal["all", "heads"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all", description="heads: the encoder is frozen (linear probing); or names of parts, such as [encoder, sst]"
    )
    leave_out: list[str] = Field(
        [], description="tasks whose loss trains their heads and does not reach the encoder (leave one task out)"
    )
    lr: float | None = Field(None, ge=0, description="learning rate of the encoder; default optimizer.lr")
    head_lr: float | None = Field(
        None, ge=0, description="learning rate of heads that have none of their own; default optimizer.head_lr"
    )
    lr_scale: Scale | dict[str, Scale] = Field(
        1.0, description="multiplies every learning rate during this phase; or by part, such as {encoder: 0.5, sst: 2}"
    )
    warmup: float | None = Field(None, ge=0, lt=1, description="default optimizer.warmup")
    decay: Decay | None = Field(None, description="default optimizer.decay")

    @model_validator(mode="after")
    def _one_length(self) -> PhaseConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"phase {self.name!r} needs either epochs or steps")
        return self

    def trains(self, part: str) -> bool:
        """Whether the part named so moves in this phase, should a task that uses it be trained."""
        if isinstance(self.trainable, str):
            return self.trainable == "all" or part != ENCODER
        return part in self.trainable

    def scale(self, part: str) -> float:
        return self.lr_scale.get(part, 1.0) if isinstance(self.lr_scale, dict) else self.lr_scale


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    lr: float = Field(2e-5, ge=0, description="learning rate of the encoder")
    head_lr: float = Field(1e-3, ge=0, description="learning rate of the heads")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate is this times that of the layer above")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW: decay of the gradient's two moving averages")
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second average")
    weight_decay: float = Field(0.01, ge=0, description="AdamW; biases and LayerNorm are spared")
    warmup: float = Field(0.06, ge=0, lt=1, description="share of each phase in which the rates rise from 0")
    decay: Decay = Field(
        "linear",
        description="course after the warm-up: constant, over each phase to 0 (linear, cosine), or in steps, such as "
        "{milestones: [5, 25], gamma: 0.7}",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights (0.999: about the last 1000 steps), which evaluation and "
        "exported weights use instead of the last step's; null: no average",
    )


WeightingMethod = Literal[
    "fixed", "homoscedastic", "imtl_l", "dwa", "famo", "mean", "gls", "stch", "random", "cosmos", "pbi"
]
SurgeryMethod = Literal[
    "sum", "mean", "pcgrad", "gradvac", "upgrad", "dualproj", "mgda", "cagrad", "aligned_mtl", "imtl_g", "krum",
    "fairgrad", "pcd",
]  # fmt: skip
"""Those of `mtbert.weighting` and `mtbert.surgery`, which take torch to import."""


class WeightingConfig(Section):
    method: WeightingMethod = Field("fixed", description="of the losses, after λ (docs/surgery.md)")
    options: dict[str, Any] = Field({}, description="of the method, e.g. lr: 0.01 for homoscedastic")


class SurgeryConfig(Section):
    method: SurgeryMethod = Field("pcgrad", description="how task gradients become one (docs/surgery.md)")
    options: dict[str, Any] = Field({}, description="of the method, e.g. reduction: sum | mean for pcgrad")


class EngineConfig(Section):
    zero: Literal[1, 3] = Field(1, description="ZeRO stage: 1 shards optimizer and task gradients, 3 also parameters")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the hardware multiplies it"
    )
    accumulation: int = Field(1, ge=1, description="micro-batches a rank cuts its share of a batch into")
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the combined gradient; null: no clipping")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="what one rank's device computes at best at this precision, in TFLOP/s, to draw speed/mfu against; "
        "default: the data sheet's of a few NVIDIA GPUs in bf16, elsewhere no speed/mfu",
    )
    deterministic: bool = Field(
        False,
        description="the same bits from the same seed on GPUs too, at a cost in speed (docs/reliability.md); CPUs give "
        "them anyway",
    )
    threads: int | None = Field(
        None, ge=1, description="torch threads per rank; default: OMP_NUM_THREADS, or else cores / ranks on the host"
    )

    @field_validator("zero", mode="before")
    @classmethod
    def _stages(cls, stage: Any) -> Any:
        if stage in (0, 2):
            raise ValueError(
                "stages 0 and 2 are not offered: 0 shards nothing, and 2 adds nothing to 1 once the "
                "task gradients are ours to shard; use 1, or 3 for an encoder that outgrows one GPU"
            )
        return stage


class CheckpointConfig(Section):
    every_minutes: float | None = Field(10.0, gt=0, description="time between saves")
    every_steps: int | None = Field(None, ge=1, description="steps between saves, besides the time")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, besides the best")


class RunConfig(Section):
    dir: str = Field("runs", description="folder that run folders are made in")
    name: str | None = Field(None, description="name of the run folder; default: date, config name and a short hash")
    evaluate_every: int | None = Field(None, ge=1, description="steps between evaluations; default: each epoch")
    log_every: int = Field(
        10, ge=1, description="steps between lines in metrics.jsonl and TensorBoard; there is one every 10,000 at least"
    )

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or "\0" in name or not {"/", ".."}.isdisjoint(Path(name).parts)):
            raise ValueError("expected a name that stays inside of run.dir, such as mine or group/mine")
        return name


class Config(Section):
    seed: int = Field(0, ge=0, lt=2**63, description="of initial weights, dropout, order of the examples and surgery")
    data: DataConfig = Field(default_factory=DataConfig, description="where the examples come from")
    encoder: EncoderConfig = Field(default_factory=EncoderConfig, description="the BERT that all tasks share")
    tasks: dict[str, TaskConfig] = Field(description="name → task; a new task needs no code")
    shared_layers: dict[str, SharedLayerConfig] = Field(
        {},
        description="name → layer (linear, ReLU) between the encoder and the heads that name it (head.shared); it is "
        "trained like a head, by the sum of its tasks' gradients",
    )
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="which tasks train at which step")
    phases: list[PhaseConfig] = Field(
        [PhaseConfig(epochs=3)], min_length=1, description="stretches of training, one after another"
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its learning rates")
    weighting: WeightingConfig = Field(default_factory=WeightingConfig, description="how much each task's loss counts")
    surgery: SurgeryConfig = Field(default_factory=SurgeryConfig, description="how task gradients become one")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="how a step is computed")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="when the run is saved")
    run: RunConfig = Field(default_factory=RunConfig, description="the run folder and what is written to it")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.tasks:
            raise ValueError("tasks: at least one task is needed")
        for name in self.tasks:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"tasks.{name}: a task's name is made of letters, digits, - and _")
            if name == ENCODER:
                raise ValueError(f"tasks.{name}: this name belongs to the part that all tasks share; choose another")
        idle = [name for name, task in self.tasks.items() if not task.weight]
        if idle and self.weighting.method in ("gls", "famo"):
            raise ValueError(
                f"tasks.{idle[0]}.weight 0: weighting.method {self.weighting.method} goes by logarithms of weighted "
                f"losses; set tasks.{idle[0]} to null instead, or give it a weight above 0"
            )
        if self.surgery.method == "pcd":
            self._fits_pcd()
        if all(task.dev is None for task in self.tasks.values()):
            raise ValueError("tasks: none has a dev file, so nothing would be scored; give one to at least one task")
        self._layers_exist()
        for name, task in self.tasks.items():
            self._can_rank(name, task)
        _known("schedule.targets", self.schedule.targets, self.tasks)
        for number, phase in enumerate(self.phases):
            self._check_phase(f"phases.{number}", phase)
        return self

    def _fits_pcd(self) -> None:
        """It averages the tasks' norms over steps, which have to be of the same tasks."""
        if self.schedule.kind != "round_robin" or self.schedule.length == "unbalanced":
            raise ValueError("surgery.method pcd: needs all tasks in every step: schedule.kind round_robin, balanced")
        for number, phase in enumerate(self.phases):
            reach = set(phase.tasks or self.tasks) - set(phase.leave_out)
            if phase.trains(ENCODER) and reach != set(self.tasks):
                absent = ", ".join(name for name in self.tasks if name not in reach)
                raise ValueError(
                    f"surgery.method pcd: needs all tasks in every step, and {absent} does not reach the encoder in "
                    f"phases.{number}; leave it out of the run, or use another method"
                )

    def _layers_exist(self) -> None:
        wanted = {name: task.head.shared for name, task in self.tasks.items() if task.head.shared is not None}
        for name, layer in wanted.items():
            if layer not in self.shared_layers:
                valid = ", ".join(self.shared_layers) or "none; define it there"
                raise ValueError(f"tasks.{name}.head.shared: no {layer!r} in shared_layers; there: {valid}")
        for layer in self.shared_layers:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", layer) or layer in (ENCODER, *self.tasks):
                raise ValueError(
                    f"shared_layers.{layer}: a layer's name is made of letters, digits, - and _, and is no task's"
                )
            if layer not in wanted.values():
                raise ValueError(f"shared_layers.{layer}: no head uses it; name it in tasks.TASK.head.shared")

    def _can_rank(self, name: str, task: TaskConfig) -> None:
        size, cuts = task.batch_size or self.schedule.batch_size, self.engine.accumulation
        if task.ranking is not None and size < 2 * cuts:
            where = f"tasks.{name}: mnrl cannot rank within a batch of {size}"
            raise ValueError(
                f"{where} cut into {cuts} micro-batches; lower engine.accumulation or use batch_size {2 * cuts} or more"
                if cuts > 1
                else f"{where}; use batch_size 2 or more"
            )

    def _check_phase(self, where: str, phase: PhaseConfig) -> None:
        users = self.part_users
        _known(f"{where}.tasks", phase.tasks or (), self.tasks)
        _known(f"{where}.leave_out", phase.leave_out, self.tasks)
        if not isinstance(phase.trainable, str):
            _known(f"{where}.trainable", phase.trainable, users, "a list names parts; all and heads stand alone")
        _known(f"{where}.lr_scale", phase.lr_scale if isinstance(phase.lr_scale, dict) else (), users)
        trained = set(phase.tasks or self.tasks)
        moved = [
            part
            for part, tasks in users.items()
            if phase.trains(part)
            and self.rate(phase, part) > 0
            and trained & set(tasks) - (set(phase.leave_out) if part == ENCODER else set())
        ]
        if not moved:
            useful = [part for part, tasks in users.items() if trained & set(tasks)]
            raise ValueError(
                f"{where}: phase {phase.name!r} trains nothing: what is trainable has no parameters, a rate of 0, or "
                f"no loss that reaches it; valid parts for trainable: {', '.join(useful)}, with a rate above 0"
            )

    @property
    def part_users(self) -> dict[str, list[str]]:
        """Parts of the model that have parameters → the tasks that use them."""
        users = {ENCODER: list(self.tasks)}
        for name, task in self.tasks.items():
            if task.head_has_parameters:
                users[name] = [name]
        for layer in self.shared_layers:
            users[layer] = [name for name, task in self.tasks.items() if task.head.shared == layer]
        return users

    def rate(self, phase: PhaseConfig, part: str) -> float:
        """The part's learning rate in a phase, before warm-up, decay and `layer_decay`."""
        if part == ENCODER:
            rate = self.optimizer.lr if phase.lr is None else phase.lr
        else:
            own = self.tasks[part].head.lr if part in self.tasks else self.shared_layers[part].lr
            head_lr = self.optimizer.head_lr if phase.head_lr is None else phase.head_lr
            rate = head_lr if own is None else own
        return rate * phase.scale(part)


def _known(where: str, names: Iterable[str], valid: Iterable[str], hint: str = "") -> None:
    for name in names:
        if name not in valid:
            raise ValueError(f"{where}: no {name!r} here; valid: {', '.join(valid)}" + (f"; {hint}" if hint else ""))
