"""The systems of the four papers: what each paper found of them, and the recipes here that stand for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from mtbert.config import Config
from mtbert.config_files import load_config
from mtbert.record import settings as bearing_settings

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "papers"
TASKS = ("sst", "para", "sts")
SEEDS = 3
"""Of the rows that a finding rests on; the others get one."""
PLACES = {"data.dir": "DATA", "encoder.pretrained": "MODEL", "encoder.tokenizer": "TOKENIZER"}
"""Keys that hold a path, and what stands there instead where machines are not to matter."""
AS_THEY_ARE = ("data.dir=DATA", "encoder.pretrained=MODEL")
"""Settings that complete a recipe and change nothing of it."""
Kind = Literal["better", "worse", "same", "no better", "told"]


@dataclass(frozen=True)
class Claim:
    """What a paper found of `metric` of the row, against that of row `than`.

    told: nobody has claimed anything; the difference is told.
    """

    metric: str
    than: str
    kind: Kind
    says: str


@dataclass(frozen=True)
class Row:
    name: str
    system: str
    paper: tuple[float | None, float | None, float | None]  # dev: SST and paraphrase accuracy, STS Pearson
    claims: tuple[Claim, ...] = ()
    note: str = ""  # what a reader of its scores has to know

    @property
    def finding(self) -> bool:
        return bool(self.claims)


def _row(
    name: str, system: str, paper: Sequence[float | None], *claims: tuple[str, str, Kind, str], note: str = ""
) -> Row:
    sst, para, sts = paper
    return Row(name, system, (sst, para, sts), tuple(Claim(*claim) for claim in claims), note)


NONE = (None, None, None)
ROWS = [
    _row("A1", "baseline: trained on STS alone", (0.132, 0.590, 0.360)),
    _row(
        *("A2", "A1 + cosine MNRL", (0.124, 0.605, 0.379)),
        ("sts", "A1", "better", "cosine MNRL raises STS a little"),
        ("composite", "A1", "better", "and the whole a little"),
    ),
    _row(
        *("A3", "A1 + threshold MNRL", (0.126, 0.567, 0.370)),
        ("sts", "A1", "better", "threshold MNRL raises STS a little"),
        ("composite", "A1", "worse", "and lowers the whole a little"),
    ),
    _row(
        *("A4", "multitask fine-tuning", (0.514, 0.774, 0.394)),
        ("composite", "A1", "better", "training on all tasks beats training on one"),
    ),
    _row("A5", "A4 + PCGrad", (0.514, 0.774, 0.394), ("composite", "A4", "same", "surgery changes nothing")),
    _row(
        *("A6", "A5 + cosine MNRL", (0.481, 0.793, 0.369)),
        ("para", "A5", "better", "cosine MNRL helps paraphrases"),
        ("sts", "A5", "worse", "and hurts STS"),
        ("sst", "A5", "worse", "and sentiment"),
    ),
    _row(
        *("A7", "A5 + threshold MNRL", (0.505, 0.770, 0.367)),
        ("sst", "A5", "worse", "threshold MNRL makes sentiment a little worse"),
        ("para", "A5", "worse", "and paraphrases"),
        ("sts", "A5", "worse", "and STS"),
    ),
    _row(
        *("A8", "A4 + homoscedastic weighting, dropout .4", (0.481, 0.782, 0.380)),
        ("para", "A4", "better", "uncertainty weighting with dropout .4 favours paraphrases"),
        ("sst", "A4", "worse", "at the cost of sentiment"),
        ("sts", "A4", "worse", "and of STS"),
    ),
    _row(
        *("A9", "A6 + two hidden layers per head", (0.496, 0.794, 0.362)),
        ("composite", "A5", "no better", "deeper heads with cosine MNRL do no more than multitask fine-tuning"),
        ("composite", "A6", "better", "two hidden layers add a little to cosine MNRL"),
    ),
    _row("B0", "milestone baseline: SST alone", (0.316, 0.369, -0.009)),
    _row(
        *("B1", "random sequential sampling", (0.304, 0.670, 0.212)),
        ("composite", "B0", "better", "training on all tasks beats training on one"),
    ),
    _row(
        *("B2", "round-robin under-sampling", (0.301, 0.632, 0.181)),
        ("composite", "B1", "worse", "under-sampling is a little worse than sequential"),
    ),
    _row(
        *("B3", "round-robin over-sampling", (0.432, 0.691, 0.272)),
        ("composite", "B2", "better", "over-sampling beats under-sampling"),
        ("composite", "B1", "better", "over-sampling beats sequential"),
    ),
    _row(
        *("B4", "B3 + phases, rates, joint encoding, shared layer (cosine already in B1-B3)", (0.497, 0.864, 0.387)),
        (
            "composite",
            "B3",
            "better",
            "phases, rates, joint encoding and a shared layer help substantially (not the cosine, see E-cosine)",
        ),
    ),
    _row("B5", "B4 + PCGrad", (0.497, 0.860, 0.378), ("composite", "B4", "same", "surgery changes nothing")),
    _row("C0-sst", "single task: SST", (0.391, 0.380, -0.009)),
    _row("C0-cfimdb", "single task: CFIMDB", NONE),
    _row(
        *(
            "C1",
            "C0 + dropout before pair heads (cannot change anything: these are not trained)",
            (0.530, 0.410, -0.043),
        ),
        ("sst", "C0-sst", "better", "dropout raises SST (.391 to .530)"),
    ),
    _row(
        *("C2", "C1 + bare cosine STS head", (0.525, 0.403, 0.293)),
        ("sts", "C1", "better", "cosine helps STS, even untrained"),
    ),
    _row(
        *("C3", "unbalanced round robin", (0.441, 0.783, 0.377)),
        ("composite", "C2", "better", "training on all tasks beats training on one"),
        ("sst", "C2", "worse", "at the cost of sentiment"),
        note=(
            "its STS loss: squared error (C names none) pulls a bare cosine to 1 for nearly all labels of 0 … 5, up to "
            "C5; C4's conflicts and a gain of C6 may come from that"
        ),
    ),
    _row("C4", "C3 + PCGrad", (0.455, 0.779, 0.421), ("composite", "C3", "better", "surgery helps a little")),
    _row(
        *("C5", "balanced round robin", (0.490, 0.774, 0.668)),
        ("composite", "C4", "better", "balanced beats unbalanced round robin"),
        ("sts", "C4", "better", "and raises STS"),
        note=(
            "its cut: with as many batches in all as C4, 706 of each task, so that it sees 42% of C4's question pairs; "
            "a loss of paraphrases may come from that"
        ),
    ),
    _row(
        *("C6", "C5 + 5·ReLU(cosine)", (0.493, 0.776, 0.692)),
        ("sts", "C5", "better", "a scaled ReLU of the cosine helps STS"),
    ),
    _row("D1", "linear probing, weighted dot product", (0.386, 0.694, 0.304)),
    _row(
        *("D2", "fine-tuning, a task per step, drawn evenly (paper: in turn)", (0.494, 0.823, 0.370)),
        ("composite", "D1", "better", "fine-tuning beats probing"),
    ),
    _row(
        *("D3", "SimCSE first, then D1", (0.390, 0.632, 0.195)),
        ("composite", "D1", "worse", "SimCSE first hurts probing"),
        ("sts", "D1", "worse", "and hurts STS"),
    ),
    _row(
        *("D4", "SimCSE first, then D2", (0.487, 0.775, 0.346)),
        ("composite", "D2", "worse", "SimCSE first hurts fine-tuning"),
    ),
    _row(
        *("D5-sst", "D2, SST left out", (0.278, 0.813, 0.395)),
        ("sst", "D1", "worse", "a task left out falls below probing"),
        ("sts", "D2", "better", "without sentiment STS gains"),
    ),
    _row(
        *("D5-para", "D2, paraphrases left out", (0.495, 0.628, 0.357)),
        ("para", "D1", "worse", "a task left out falls below probing"),
        ("sst", "D2", "no better", "without paraphrases sentiment gains nothing"),
        ("sts", "D2", "no better", "nor does STS"),
    ),
    _row(
        *("D5-sts", "D2, STS left out", (0.501, 0.825, -0.064)),
        ("sts", "D1", "worse", "a task left out falls below probing"),
        ("sst", "D2", "better", "without STS sentiment gains"),
    ),
    _row("D6-concat-probe", "D1 with concatenation", (None, 0.681, 0.277)),
    _row(
        *("D6-dot-probe", "D1 with weighted dot product", (None, 0.694, 0.304)),
        ("para", "D6-concat-probe", "better", "probing, a weighted dot product beats concatenation on paraphrases"),
        ("sts", "D6-concat-probe", "better", "and on STS"),
    ),
    _row("D6-concat-tune", "D2 with concatenation", (None, 0.760, 0.345)),
    _row(
        *("D6-dot-tune", "D2 with weighted dot product", (None, 0.823, 0.370)),
        ("para", "D6-concat-tune", "better", "fine-tuning, a weighted dot product beats concatenation on paraphrases"),
        ("sts", "D6-concat-tune", "better", "and on STS"),
    ),
    _row("E-linear", "C5 at half its steps, without surgery, 5·linear for STS", NONE),
    _row(
        *("E-cosine", "the same with 5·cosine", NONE),
        ("sts", "E-linear", "better", "cosine beats a linear head for STS, all else equal (B wished to know)"),
    ),
    _row(
        *("E-uniform", "E-cosine with a task per step, drawn evenly", NONE),
        ("composite", "E-cosine", "told", "a task per step against all tasks in each, of as many batches"),
    ),
    _row(
        *("E-annealed", "BERT-and-PALs annealed sampling", NONE),
        ("composite", "E-uniform", "told", "annealed against uniform sampling"),
    ),
    _row(
        *("E-adaptive", "over-sampling the task that lags", NONE),
        ("composite", "E-uniform", "told", "adaptive sampling, which looks at development scores, against uniform"),
    ),
    *(
        _row(f"E-{method}", f"A4 + {title}", NONE, ("composite", "A5", "told", f"{title} against PCGrad"))
        for method, title in [
            *[("gradvac", "GradVac"), ("upgrad", "UPGrad"), ("cagrad", "CAGrad"), ("mgda", "MGDA"), ("famo", "FAMO")]
        ]
    ),
]


# ------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """A row's configuration with a seed, and the settings that were laid over its file."""

    row: Row
    seed: int
    overrides: list[str]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.row.name}-seed{self.seed}"

    @cached_property
    def key(self) -> str:
        return key(self.config)


def identity(config: Config) -> dict[str, Any]:
    """What decides a run's scores, dotted, but for what the files hold that it names: a name stands for each path. When
    evaluations come is part of it: adaptive sampling acts on them.
    """
    values = {**bearing_settings(config), "run.evaluate_every": config.run.evaluate_every}
    return {key: PLACES[key] if key in PLACES and value else value for key, value in values.items()}


def key(config: Config) -> str:
    """Equal for configurations whose `identity` is."""
    return json.dumps(identity(config), sort_keys=True)


def differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first keys whose values differ, as a list to read; empty where none does."""
    keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def config_path(row: Row) -> Path:
    return CONFIGS / f"{row.name}.yaml"


@cache
def _loaded(path: Path, settings: tuple[str, ...]) -> Config:
    """Each is asked for several times: for the runs, for the page, and to see what was changed."""
    return load_config(path, settings)


def shortened(config: Config, steps: int) -> str:
    """The phases as an override, `steps` in all, each at least one."""
    lengths = [phase.steps or (phase.epochs or 0) * 100 for phase in config.phases]
    phases = []
    for phase, length in zip(config.phases, lengths, strict=True):
        values = phase.model_dump(exclude={"epochs", "steps"}, exclude_defaults=True)
        phases.append({**values, "steps": max(1, round(steps * length / sum(lengths)))})
    return f"phases={json.dumps(phases)}"


def recipes(
    rows: Sequence[Row], seeds: int, settings: Sequence[str] = AS_THEY_ARE, steps: int | None = None
) -> list[Recipe]:
    """In the order in which they are to be run: every row once, then those that a finding rests on again."""
    found = []
    for seed in range(seeds):
        for row in rows:
            if seed and not row.finding and not any(c.than == row.name for other in ROWS for c in other.claims):
                continue
            overrides = [*settings]
            if steps:
                overrides.append(shortened(_loaded(config_path(row), tuple(settings)), steps))
            config = _loaded(config_path(row), tuple(overrides))
            overrides.insert(len(settings), f"seed={seed}")
            found.append(Recipe(row, seed, overrides, config.model_copy(update={"seed": seed})))
    return found


def changed(wanted: Sequence[Recipe]) -> str:
    """The keys in which --set or --steps made the first of these something else than what stands in its file."""
    plain = {recipe.row.name: recipe for recipe in recipes(ROWS, 1)}
    firsts = (recipe for recipe in wanted if not recipe.seed)
    differences = (differing(identity(recipe.config), identity(plain[recipe.row.name].config)) for recipe in firsts)
    return next((keys for keys in differences if keys), "")
