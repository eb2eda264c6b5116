"""Every system of the four papers on given data and encoder, and the page that sets our scores beside the papers'.

usage: python -m benchmarks.papers [--data DIR] [--encoder DIR] [--rows A5 'B*'] [--seeds 3] [--jobs N] [--page FILE]

Runs lie in `--out`, one folder per row and seed, started the way users do (`python -m mtbert train`). Interrupt it and
call it again: a finished run is not repeated, an interrupted one continues from its checkpoint; one whose configuration
is no longer its recipe's is refused. Rows whose configurations are equal share one run. All rows come once before any
comes a second time. The page is written after every run, from the run folders alone; `--report` only writes it.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtbert.config import Config, load_config
from mtbert.errors import UserError
from mtbert.record import RunRecord
from mtbert.record import settings as bearing_settings
from mtbert.runs import user_path, write_atomically

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "papers"
DATA = ROOT.parent / "shared" / "data"
ENCODER = ROOT / "runs" / "minilm"
"""Where `make papers` looks unless told otherwise."""
TASKS = ("sst", "para", "sts")
HEADINGS = {
    "A": "A · OptimusBERT",
    "B": "B · Sampling methods",
    "C": "C · Robust sentence embeddings",
    "D": "D · Fine-tuning methods",
    "E": "E · Past the papers",
}
PICTURED = ("A5", "C4", "B5")
NOTHING = 0.01
"""A composite or score that differs by no more than this "changes nothing"."""
LITTLE = 0.05
"""Surgery that moves the combined gradient by no more than this share of its length in the mean changes little."""
PLACES = {"data.dir": "DATA", "data.cache": "CACHE", "encoder.pretrained": "MODEL", "encoder.tokenizer": "TOKENIZER"}
"""Keys that hold a path, and what the page calls it."""
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

    @property
    def finding(self) -> bool:
        return bool(self.claims)


def _row(name: str, system: str, paper: Sequence[float | None], *claims: tuple[str, str, Kind, str]) -> Row:
    sst, para, sts = paper
    return Row(name, system, (sst, para, sts), tuple(Claim(*claim) for claim in claims))


NONE = (None, None, None)
ROWS = [
    _row("A1", "baseline: trained on STS alone", (0.132, 0.590, 0.360)),
    _row("A2", "A1 + cosine MNRL", (0.124, 0.605, 0.379), ("sts", "A1", "better", "cosine MNRL raises STS a little")),
    _row(
        *("A3", "A1 + threshold MNRL", (0.126, 0.567, 0.370)),
        ("sts", "A1", "better", "threshold MNRL raises STS a little"),
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
    ),
    _row(
        *("A7", "A5 + threshold MNRL", (0.505, 0.770, 0.367)),
        ("sst", "A5", "worse", "threshold MNRL makes sentiment a little worse"),
        ("para", "A5", "worse", "and paraphrases"),
        ("sts", "A5", "worse", "and STS"),
    ),
    _row(
        *("A8", "A4 + homoscedastic weighting, dropout .4", (0.481, 0.782, 0.380)),
        ("para", "A4", "better", "uncertainty weighting favours paraphrases"),
        ("sst", "A4", "worse", "at the cost of sentiment"),
    ),
    _row(
        *("A9", "A6 + two hidden layers per head", (0.496, 0.794, 0.362)),
        ("composite", "A5", "same", "deeper heads with cosine MNRL do no more than multitask fine-tuning"),
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
            'an "improved training schedule", rates and cosine similarity help substantially',
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
    ),
    _row("C4", "C3 + PCGrad", (0.455, 0.779, 0.421), ("composite", "C3", "better", "surgery helps a little")),
    _row(
        *("C5", "balanced round robin", (0.490, 0.774, 0.668)),
        ("composite", "C4", "better", "balanced beats unbalanced round robin"),
        ("sts", "C4", "better", "and raises STS"),
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
        *("E-annealed", "BERT-and-PALs annealed sampling", NONE),
        ("composite", "E-cosine", "told", "annealed sampling against balanced round robin"),
    ),
    _row(
        *("E-adaptive", "over-sampling the task that lags", NONE),
        ("composite", "E-cosine", "told", "adaptive sampling against balanced round robin"),
    ),
    *(
        _row(f"E-{method}", f"A4 + {title}", NONE, ("composite", "A5", "told", f"{title} against PCGrad"))
        for method, title in [
            *[("gradvac", "GradVac"), ("upgrad", "UPGrad"), ("cagrad", "CAGrad"), ("mgda", "MGDA"), ("famo", "FAMO")]
        ]
    ),
]


# ------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Run:
    """A row with a seed, and the folder it lies in (of the first row with the same configuration)."""

    row: Row
    seed: int
    folder: Path
    overrides: list[str]
    config: Config

    @property
    def result(self) -> dict[str, Any] | None:
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def wall_s(self) -> float:
        path = self.folder / "wall.json"
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.is_file() else math.nan


def config_path(row: Row) -> Path:
    return CONFIGS / f"{row.name}.yaml"


def shortened(config: Config, steps: int) -> str:
    """The phases as an override, `steps` in all, each at least one."""
    lengths = [phase.steps or (phase.epochs or 0) * 100 for phase in config.phases]
    phases = []
    for phase, length in zip(config.phases, lengths, strict=True):
        values = phase.model_dump(exclude={"epochs", "steps"}, exclude_defaults=True)
        phases.append({**values, "steps": max(1, round(steps * length / sum(lengths)))})
    return f"phases={json.dumps(phases)}"


def runs_of(rows: Sequence[Row], seeds: int, out: Path, settings: Sequence[str], steps: int | None) -> list[Run]:
    """In the order in which they are to be run: every row once, then those with a finding again."""
    first_with: dict[str, str] = {}
    runs = []
    for seed in range(seeds):
        for row in rows:
            if seed and not row.finding and not any(c.than == row.name for other in ROWS for c in other.claims):
                continue
            overrides = [*settings, f"seed={seed}"]
            if steps:
                overrides.append(shortened(load_config(config_path(row), settings), steps))
            config = load_config(config_path(row), overrides)
            name = first_with.setdefault(config.model_dump_json(), f"{row.name}-seed{seed}")
            runs.append(Run(row, seed, out / name, [*overrides, f"run.dir={out}", f"run.name={name}"], config))
    return runs


def identity(config: Config) -> dict[str, Any]:
    """What decides a run's scores, dotted, paths resolved. When evaluations come is part of it: adaptive sampling acts
    on them.
    """
    values = {**bearing_settings(config), "run.evaluate_every": config.run.evaluate_every}
    for key in PLACES:
        if isinstance(value := values.get(key), str):
            values[key] = os.path.realpath(ROOT / user_path(value))
    return values


def deviation(path: Path, wanted: Config) -> str | None:
    """The keys in which the configuration in a file is not the wanted one; None where there is no file, or no such."""
    if not path.is_file():
        return None
    try:
        there, here = identity(load_config(path)), identity(wanted)
    except UserError:
        return f"{path.name} cannot be read"
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else None


def outdated(runs: Sequence[Run]) -> dict[Path, str]:
    """Folders, finished or not, that hold a run of something else than the recipe they stand for, and what differs."""
    found = {run.folder: deviation(run.folder / "config.yaml", run.config) for run in runs}
    return {folder: keys for folder, keys in found.items() if keys is not None}


def perform(run: Run) -> None:
    """Start the run, or continue it. Its output goes into a file beside the folder; a failure ends everything."""
    command = [sys.executable, "-m", "mtbert", "train"]
    if (run.folder / "config.yaml").is_file():
        command += ["--resume", str(run.folder)]
    else:
        command += ["--config", str(config_path(run.row)), "--set", *run.overrides]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log = run.folder.parent / f"{run.folder.name}.log"
    try:
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    finally:
        if run.folder.is_dir():
            before = 0.0 if math.isnan(run.wall_s) else run.wall_s
            seconds = before + time.monotonic() - started
            write_atomically(run.folder / "wall.json", json.dumps({"seconds": round(seconds, 1)}) + "\n")
    if code:
        lines = log.read_text(encoding="utf-8").splitlines()
        raise SystemExit(f"{run.row.name} seed {run.seed}: exit code {code}; {log} ends: {' | '.join(lines[-2:])}")


def perform_all(runs: Sequence[Run], jobs: int) -> Iterator[Run]:
    """Every run, `jobs` at a time, in the order in which they end; after a failure no other is started."""
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(perform, run): run for run in runs}
        try:
            for future in as_completed(started):
                future.result()
                yield started[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------ reporting


def scores(runs: Sequence[Run]) -> dict[str, list[dict[str, float]]]:
    """Per row, of every finished seed: score by task, `composite` (of the three tasks) and `seconds`, `steps`."""
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if (result := run.result) is None:
            continue
        said = {task: float(entry["score"]) for task, entry in result["tasks"].items()}
        if all(task in said for task in TASKS):
            said["composite"] = (said["sst"] + said["para"] + (said["sts"] + 1) / 2) / 3
        found.setdefault(run.row.name, []).append({**said, "seconds": run.wall_s, "steps": float(result["step"])})
    return found


def verdict(claim: Claim, row: Row, found: dict[str, list[dict[str, float]]], one_run: bool = False) -> str:
    """One sentence: the paper's finding, its numbers, ours, and whether ours bear it out.

    Args:
        one_run: the configurations of the two rows are equal.
    """
    opening = f"**{row.name}**: {claim.says}"
    if one_run:
        why = f"the configurations of {row.name} and {claim.than} are equal, one run"
        return f"{opening}{_paper_s(claim, row)}: cannot show; {why}."
    one, other = (
        [values[claim.metric] for values in found.get(name, []) if claim.metric in values]
        for name in (row.name, claim.than)
    )
    if not one or not other:
        return f"{opening}: not run."
    difference = statistics.fmean(one) - statistics.fmean(other)
    spread = math.nan
    if min(len(one), len(other)) > 1:
        spread = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    told = f"{_signed(difference)} {claim.metric} against {claim.than}"
    told += f" (standard error {_plain(spread)}, {len(one)} seeds)" if spread == spread else " (one seed)"
    if claim.kind == "told":
        return f"{opening}: {told}."
    return f"{opening}{_paper_s(claim, row)}: {_judged(claim.kind, difference, spread)}; {told}."


def _judged(kind: Kind, difference: float, spread: float) -> str:
    """`spread` is the standard error of the difference, not a number for one seed, which cannot tell it from chance."""
    if kind in ("same", "no better"):
        size = abs(difference) if kind == "same" else difference
        if size + 2 * spread <= NOTHING:
            return "holds"
        return "does not hold" if size - 2 * spread > NOTHING else "not decided"
    agrees = (difference > 0) == (kind == "better")
    if spread != spread:
        return f"{'same' if agrees else 'other'} direction, not decided"
    if abs(difference) <= 2 * spread:
        return "not decided, within the spread of the seeds"
    return "holds" if agrees else "does not hold"


def standing(row: Row, found: dict[str, list[dict[str, float]]]) -> str:
    """One sentence on a row of which no paper claims anything: what is measured against it, and its score."""
    against = [other.name for other in ROWS if any(claim.than == row.name for claim in other.claims)]
    purpose = f"measured against it: {', '.join(against)}" if against else "nothing is measured against it"
    metric = "cfimdb" if row.name == "C0-cfimdb" else "composite"
    values = [each[metric] for each in found.get(row.name, []) if metric in each]
    ours = f"{metric} {_score(values)} ({len(values)} seed{'s' * (len(values) > 1)})" if values else "not run"
    theirs = _composite(row.paper)
    paper = "no such number in a paper" if theirs is None else f"paper: {_plain(theirs)}"
    return f"**{row.name}**: no finding of its own; {purpose}; {ours}; {paper}."


def ranking(run: Run) -> str | None:
    """Whether ranking on a threshold taught anything: ln B is its loss where all B candidates look alike."""
    record = RunRecord(run.folder)
    for name, task in record.config.tasks.items():
        if task.mnrl is None or task.mnrl.threshold is None or f"loss/{name}" not in record.curves:
            continue
        size = task.batch_size or record.config.schedule.batch_size
        losses = record.curves[f"loss/{name}"].values
        share = float(np.mean(losses >= task.mnrl.weight * math.log(size)))
        said = "a collapse, so its scores say little of ranking as such" if share >= 0.5 else "no lasting collapse"
        return (
            f"**{run.row.name}**, its ranking: at {share:.0%} of the logged steps of seed {run.seed} the {name} loss "
            f"was ln {size} or more, which ranking alone gives where all texts of a batch look alike: {said}."
        )
    return None


def _paper_s(claim: Claim, row: Row) -> str:
    other = next(each for each in ROWS if each.name == claim.than)
    if claim.metric == "composite":
        values = [_composite(each.paper) for each in (row, other)]
    else:
        values = [each.paper[TASKS.index(claim.metric)] for each in (row, other)]
    return "" if None in values else f" (paper: {_signed(values[0] - values[1])})"


def _composite(paper: tuple[float | None, float | None, float | None]) -> float | None:
    sst, para, sts = paper
    return None if sst is None or para is None or sts is None else (sst + para + (sts + 1) / 2) / 3


def _plain(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}".replace("0.", ".", 1)


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{abs(value):.3f}".replace("0.", ".", 1)


def _score(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {_plain(statistics.stdev(values))}" if len(values) > 1 else ""
    return _plain(statistics.fmean(values)) + spread


@dataclass(frozen=True)
class About:
    """What the page says besides scores."""

    command: str
    encoder: str
    sizes: dict[str, tuple[int, int]]  # per task, rows for training and development
    search: str  # the line on C7
    left_out: dict[Path, str]  # folders with other recipes, and what differs


def page(runs: Sequence[Run], about: About, pictures: Path) -> str:
    """The whole of docs/papers.md."""
    found = scores(runs)
    rows = list(dict.fromkeys(run.row.name for run in runs))
    folders = {run.row.name: run.folder for run in runs if run.seed == 0}
    first = {run.row.name: run for run in runs if run.seed == 0 and run.result}
    told = "; ".join(f"{name} {train:,} / {dev:,}" for name, (train, dev) in about.sizes.items())
    chance = "; ".join(
        f"{name} {_plain(math.sqrt(0.25 / max(dev, 1)))}" for name, (_, dev) in about.sizes.items() if name in TASKS[:2]
    )
    parts = [
        "# The four papers' systems here\n",
        "<!-- Written by benchmarks/papers.py from the run folders. -->\n",
        "Every number of ours comes from this command; it can be interrupted, finished runs are kept:\n\n"
        f"    {about.command}\n",
        f"Encoder: {about.encoder}. Data, training / development rows: {told}. Scores are on the development sets "
        "after the last step, ± the standard deviation over seeds; composite = (SST + para + (STS + 1) / 2) / 3. Seeds "
        "vary the training alone: the development sets are samples, too (standard error of an accuracy at most: "
        f'{chance}). "Changes nothing" holds if the difference stays within {_plain(NOTHING)} with twice its standard '
        "error. Minutes are wall time, whatever else the machine did meanwhile; they cannot be compared.\n",
        "The papers fine-tuned BERT-base (110 M), A for 10 or 7 epochs, B's last systems for 30, C for one, D does not "
        "say; question pairs: 141 k in C, 202 k in D, over 400 k in B. What was cut is in each row's YAML "
        "(`configs/papers/`), so findings are compared, not numbers.\n",
        "**Contamination:** all-MiniLM-L6-v2 was trained on Quora duplicates, SNLI and MultiNLI, among others, to tell "
        "pairs by the cosine of their mean vectors. With that encoder paraphrase scores flatter, gains from NLI (D3, "
        "D4) are not what they would be for BERT, and whatever has a cosine head (B1-B5, C2-C6, E-cosine against "
        "E-linear) rests on vectors made for it.\n",
        f"{sum(len(values) for values in found.values())} of {len(runs)} runs are done.\n",
    ]
    if about.left_out:
        names = "; ".join(f"{folder.name} ({keys})" for folder, keys in about.left_out.items())
        parts.append(
            f"**Left out**, for these folders hold a run of another configuration than their recipe's: {names}.\n"
        )
    for letter, heading in HEADINGS.items():
        members = [row for row in ROWS if row.name in rows and row.name[0] == letter]
        if not members:
            continue
        parts.append(f"\n## {heading}\n")
        parts.append(
            "| row | system | SST | paper | para | paper | STS | paper | composite | seeds | steps | σ | minutes |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
            + "".join(_line(row, found.get(row.name, []), runs) for row in members)
        )
        sentences = []
        for row in members:
            same = {name for name, folder in folders.items() if folder == folders.get(row.name)}
            sentences += [verdict(claim, row, found, claim.than in same) for claim in row.claims]
            sentences += [] if row.claims else [standing(row, found)]
            sentences += [said] if row.name in first and (said := ranking(first[row.name])) else []
        sentences += [about.search] if letter == "C" else []
        parts.append("\n" + "".join(f"- {sentence}\n" for sentence in sentences))
    parts.append(_conflicts(runs, pictures))
    return "\n".join(parts)


def _line(row: Row, found: Sequence[dict[str, float]], runs: Sequence[Run]) -> str:
    config = next(run.config for run in runs if run.row.name == row.name)
    cells = [f"[{row.name}](../configs/papers/{row.name}.yaml)", row.system]
    if row.name == "C0-cfimdb":
        cells += [f"CFIMDB {_score([values['cfimdb'] for values in found])}", *["–"] * 5]
    else:
        for place, task in enumerate(TASKS):
            cells += [_score([values[task] for values in found]), _plain(row.paper[place])]
    minutes = statistics.fmean([values["seconds"] / 60 for values in found]) if found else math.nan
    cells += [
        _score([values["composite"] for values in found if "composite" in values]),
        str(len(found)),
        f"{found[0]['steps']:,.0f}" if found else "–",
        str(config.schedule.length) if config.schedule.kind != "sequential" else "each to its end",
        f"{minutes:.1f}" if minutes == minutes else "–",
    ]
    return f"| {' | '.join(cells)} |\n"


def _conflicts(runs: Sequence[Run], pictures: Path) -> str:
    """The measured cosines of A5, C4 and B5: one picture, and what it says in numbers."""
    pictured = [run for name in PICTURED for run in runs if run.row.name == name and run.seed == 0 and run.result]
    records = {run.row.name: RunRecord(run.folder) for run in pictured}
    changes = {name: surgery_changes(record) for name, record in records.items()}
    changes = {name: each for name, each in changes.items() if len(each[0])}
    records = {name: records[name] for name in changes}
    if not records:
        return "\n## Do the tasks conflict?\n\nNot measured yet.\n"
    from mtbert.figures import conflict_curves

    figure = conflict_curves(list(records.values()), list(records))
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "conflicts.svg", metadata={"Date": None})
    lines = ["| row | pair | mean cosine | 5 % … 95 % | share below 0 |\n|---|---|---|---|---|\n"]
    cosines: list[float] = []
    for name, record in records.items():
        for tag, curve in sorted(record.curves.items()):
            if tag.startswith("gradient/cosine/"):
                cosines += curve.values.tolist()
                low, high = np.percentile(curve.values, [5, 95])
                lines.append(
                    f"| {name} | {tag.rpartition('/')[2]} | {_signed(float(np.mean(curve.values)))} | "
                    f"{_signed(low)} … {_signed(high)} | {np.mean(curve.values < 0):.0%} |\n"
                )
    every = " or ".join(sorted({str(record.config.run.log_every) for record in records.values()}))
    return (
        "\n## Do the tasks conflict?\n\n![cosine of every pair of task gradients](papers/conflicts.svg)\n\n"
        + "".join(lines)
        + f"\nSeed 0, one step in {every}, where two tasks or more reach the encoder. "
        + surgery_told(changes, np.array(cosines))
    )


def surgery_changes(record: RunRecord) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What surgery did at the logged steps of two tasks or more: |w / plain − 1| of every task's weight; and how far
    the encoder's combined gradient moved, as a share of the plain one's length (from the logged norms and cosines).

    plain is the weight without surgery: 1, or 1 / tasks where the method averages (Pytorch-PCGrad).
    """
    averages = record.config.surgery.options.get("reduction") == "mean"
    logged: dict[int, dict[str, float]] = {}
    for tag, curve in record.curves.items():
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
            logged.setdefault(step, {})[tag] = value
    weights, gradients = [], []
    for values in logged.values():
        tasks = [tag.rpartition("/")[2] for tag in values if tag.startswith("gradient/weight/")]
        if len(tasks) < 2:
            continue
        weight_K = np.array([values[f"gradient/weight/{task}"] for task in tasks])
        norm_K = np.array([values[f"gradient/norm/{task}"] for task in tasks])
        gram_KK = np.outer(norm_K, norm_K)
        for i, j in itertools.permutations(range(len(tasks)), 2):
            pairs = (f"gradient/cosine/{tasks[i]}~{tasks[j]}", f"gradient/cosine/{tasks[j]}~{tasks[i]}")
            gram_KK[i, j] *= next(values[tag] for tag in pairs if tag in values)
        plain_K = np.full(len(tasks), 1 / len(tasks) if averages else 1.0)
        moved_K = weight_K - plain_K
        weights += np.abs(moved_K / plain_K).tolist()
        gradients.append(math.sqrt(max(moved_K @ gram_KK @ moved_K, 0) / (plain_K @ gram_KK @ plain_K or math.inf)))
    return np.array(weights), np.array(gradients)


def surgery_told(
    changes: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]], cosines: NDArray[np.float64]
) -> str:
    """How far surgery changed the gradients of each row, and what that means for what it can do."""
    weights, gradients = (
        ", ".join(f"{name} {np.mean(each[at]):.1%} (at most {np.max(each[at]):.0%})" for name, each in changes.items())
        for at in (0, 1)
    )
    much = [name for name, (_, moved) in changes.items() if np.mean(moved) > LITTLE]
    meaning = (
        f"In {', '.join(much)} that is more than {LITTLE:.0%}: where surgery leaves a score as it was there, that is "
        "not for want of conflicts."
        if much
        else f"That is {LITTLE:.0%} or less everywhere: there is little to project away, and the combined gradient is "
        "nearly the plain one, which bounds what surgery can do to a score."
    )
    return (
        f"{np.mean(cosines < 0):.0%} of the cosines lie below 0, the mean of their sizes is "
        f"{_plain(float(np.mean(np.abs(cosines))))}. Surgery changes a task's weight in the mean by: {weights}; and "
        f"moves the combined gradient, in the mean, by this share of its length: {gradients}. {meaning}\n"
    )


def dataset_sizes(rows: Sequence[Row], settings: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Rows of every task's files after quarantine, from the token cache."""
    from mtbert.pretrained import load_pretrained
    from mtbert.tasks import load_tasks, locate_data, locate_tokenizer

    sizes: dict[str, tuple[int, int]] = {}
    for row in rows:
        config = load_config(config_path(row), settings)
        if set(config.tasks) <= sizes.keys():
            continue
        data = locate_data(config)
        pretrained = config.encoder.pretrained
        folder = load_pretrained(pretrained)[2] if pretrained else None
        for task in load_tasks(config, data, locate_tokenizer(config, data, folder), config.encoder.max_length):
            sizes[task.name] = (len(task.train), len(task.dev or ()))
    return sizes


def encoder_told(config: Config, name: str | None) -> str:
    """The encoder's name, by itself if nobody gives one, and its size."""
    import torch

    from mtbert.encoder import Encoder
    from mtbert.pretrained import load_pretrained

    pretrained = config.encoder.pretrained
    if pretrained is None:
        return name or "from scratch"
    shape, _, folder = load_pretrained(pretrained)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in Encoder(shape, 0.0).parameters())
    name = name or (name_of(folder) if user_path(pretrained).is_dir() else pretrained)
    return f"{name} ({parameters / 1e6:.1f} M parameters)"


def name_of(folder: Path) -> str:
    """What an encoder's README calls it in its title, else what its config.json does, else the folder."""
    readme = folder / "README.md"
    title = re.search(r"^# (\S+)\s*$", readme.read_text(encoding="utf-8"), re.MULTILINE) if readme.is_file() else None
    if title:
        return title[1]
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path") or folder.name)


def search_told(out: Path, settings: Sequence[str], shown: str) -> str:
    """The line on C7, from the folder of its search if there is one; `shown` is what the page calls `out`."""
    path, folder = CONFIGS / "C6.yaml", out / "C7"
    command = f"python -m tune --config {path.relative_to(ROOT)} --space configs/search/c7.yaml --scheduler none "
    command += f"--evaluations 1 --name {folder.name} --set data.dir=DATA encoder.pretrained=MODEL run.dir={shown}"
    opening = (
        "**C7**: the search for C6's learning rate (1e-4, 1e-5, 1e-6), then its dropout (.2, .3, .4); the paper chose "
        f"1e-5 and .3 ([c7.yaml](../configs/search/c7.yaml), `{command}`)"
    )
    if not (folder / "best.yaml").is_file():
        return f"{opening}: not run."
    if keys := deviation(folder / "base.yaml", load_config(path, settings)):
        return f"{opening}: left out, the search there varied another configuration ({keys})."
    best = load_config(folder / "best.yaml")
    rate, dropout = best.optimizer.lr, best.tasks["sst"].head.dropout
    score = re.search(r"composite ([\d.]+)", (folder / "best.yaml").read_text(encoding="utf-8").partition("\n")[0])
    done = len(list((folder / "trials").glob("*/result.json")))
    choice = "the same" if (rate, dropout) == (1e-5, 0.3) else "another choice"
    found = f"{choice} here, {rate:g} and {_plain(dropout)}"
    found += f", composite {_plain(float(score[1]))}" if score else ""
    return f"{opening}: {found}; {done} of 6 trials, one seed each, not decided."


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the CS224N files (default: ../shared/data beside the checkout)")
    parser.add_argument(
        *["--encoder"],
        help="Hugging Face folder or hub name (default: runs/minilm; --set encoder.shape=… for a new one)",
    )
    parser.add_argument("--encoder-name", metavar="NAME", help="what the page calls it (default: by its own README)")
    parser.add_argument("--out", default="runs/papers", help="folder for the runs")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help="names or patterns, such as A5 'D*'")
    parser.add_argument("--seeds", type=int, default=3, help="of the rows that a finding rests on; the others get one")
    parser.add_argument("--steps", type=int, help="cut every row to so many steps: a look at whether all works")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, which share the cores")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--page", default=str(ROOT / "docs" / "papers.md"))
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs (270 MB each with MiniLM)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser()
    options = reader.parse_args(arguments)
    rows = [row for row in ROWS if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in options.rows)]
    if not rows:
        reader.error(f"--rows: no such row; there are {', '.join(row.name for row in ROWS)}")
    settings = [*places(reader, options), *options.set]
    if options.jobs > 1:  # a thread a run wastes less than all threads on one: about a fifth on two cores
        settings.append(f"engine.threads={max(1, len(os.sched_getaffinity(0)) // options.jobs)}")
    out, target = Path(options.out).absolute(), Path(options.page)
    try:
        runs = runs_of(rows, options.seeds, out, settings, options.steps)
        old = outdated(runs)
        if old and not options.report:
            folder, keys = next(iter(old.items()))
            raise UserError(
                f"{folder}: holds a run whose configuration is not its recipe's ({keys}); remove it to have it run "
                f"anew, or choose another --out{_likewise(list(old)[1:])}"
            )
        runs = [run for run in runs if run.folder not in old]
        waiting = {run.folder: run for run in reversed(runs) if run.result is None}  # rows may share one run
        todo = [] if options.report else list(reversed(waiting.values()))
        about: About | None = None
        for number, run in enumerate(perform_all(todo, options.jobs)):
            print(f"{number + 1}/{len(todo)} {run.row.name} seed {run.seed}: {run.row.system}", flush=True)
            if not options.keep_checkpoints:
                shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            about = about or about_page(options, rows, settings, out, old)
            write_page(target, runs, about)
        if not todo:
            write_page(target, runs, about_page(options, rows, settings, out, old))
    except UserError as error:
        print(f"papers: {error}", file=sys.stderr)
        return 2
    print(f"written: {target}")
    return 0


def places(reader: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Where data and encoder lie, as settings; ends the program if that is nowhere."""
    data, encoder = options.data, options.encoder
    if data is None and not any(text.startswith("data.") for text in options.set):
        data = DATA
        if not data.is_dir():
            reader.error(f"--data: no {data}; name the folder with the CS224N files (ids-sst-train.csv and others)")
    if encoder is None and not any(text.startswith(("encoder.pretrained=", "encoder.shape=")) for text in options.set):
        encoder = ENCODER
        if not encoder.is_dir():
            instead = "name a Hugging Face folder, or a hub name such as sentence-transformers/all-MiniLM-L6-v2"
            reader.error(f"--encoder: no {encoder}; {instead}")
    settings = [f"data.dir={Path(data).absolute()}"] if data else []
    if encoder:
        settings.append(f"encoder.pretrained={Path(encoder).absolute() if Path(encoder).is_dir() else encoder}")
    return settings


def _likewise(folders: Sequence[Path]) -> str:
    return f"; likewise {', '.join(folder.name for folder in folders)}" if folders else ""


def about_page(
    options: argparse.Namespace, rows: Sequence[Row], settings: Sequence[str], out: Path, old: dict[Path, str]
) -> About:
    config = load_config(config_path(rows[0]), settings)
    return About(
        command=command_of(options),
        encoder=encoder_told(config, options.encoder_name),
        sizes=dataset_sizes(rows, settings),
        search=search_told(out, settings, "OUT" if Path(options.out).is_absolute() else options.out),
        left_out=old,
    )


def command_of(options: argparse.Namespace) -> str:
    """What was typed, as far as it bears on the numbers, with names in place of paths."""
    words = ["--data", "DATA"] if options.data else []
    words += ["--encoder", "MODEL"] if options.encoder else []
    words += ["--rows", *options.rows] if options.rows != ["*"] else []
    words += ["--seeds", str(options.seeds), "--jobs", str(options.jobs)]
    words += ["--steps", str(options.steps)] if options.steps else []
    pairs = [(key, PLACES.get(key, value)) for key, _, value in (text.partition("=") for text in options.set)]
    words += ["--set", *(f"{key}={value}" for key, value in pairs)] if pairs else []
    line = shlex.join(words)
    if set(line) & set('"$`\\!'):  # which a shell, or make, would read again
        return f"python -m benchmarks.papers {line}"
    return f'make papers ARGS="{line}"'


def write_page(target: Path, runs: list[Run], about: About) -> None:
    text = page(runs, about, target.parent / "papers")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text)


if __name__ == "__main__":
    sys.exit(main())
