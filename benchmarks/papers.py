"""Every system of the four papers on given data and encoder, and the page that sets our scores beside the papers'.

usage: python -m benchmarks.papers --data DIR --encoder DIR [--rows A5 'B*'] [--seeds 3] [--jobs N] [--page FILE]

Runs lie in `--out`, one folder per row and seed, started the way users do (`python -m mtbert train`). Interrupt it and
call it again: a finished run is not repeated, an interrupted one continues from its checkpoint. Rows whose
configurations are equal share one run. All rows come once before any comes a second time. The page is written after
every run, from the run folders alone; `--report` only writes it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtbert.config import Config, load_config
from mtbert.errors import UserError
from mtbert.runs import write_atomically

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "papers"
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


@dataclass(frozen=True)
class Claim:
    """What a paper found: `metric` of the row is better (+1), worse (−1) or no different (0) than that of row `than`.

    `sign` None: nobody has claimed anything; the difference is told.
    """

    metric: str
    than: str
    sign: int | None
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


def _row(name: str, system: str, paper: Sequence[float | None], *claims: tuple[str, str, int | None, str]) -> Row:
    sst, para, sts = paper
    return Row(name, system, (sst, para, sts), tuple(Claim(*claim) for claim in claims))


NONE = (None, None, None)
ROWS = [
    _row("A1", "baseline: trained on STS alone", (0.132, 0.590, 0.360)),
    _row("A2", "A1 + cosine MNRL", (0.124, 0.605, 0.379), ("sts", "A1", 1, "cosine MNRL raises STS a little")),
    _row("A3", "A1 + threshold MNRL", (0.126, 0.567, 0.370), ("sts", "A1", 1, "threshold MNRL raises STS a little")),
    _row(
        *("A4", "multitask fine-tuning", (0.514, 0.774, 0.394)),
        ("composite", "A1", 1, "training on all tasks beats training on one"),
    ),
    _row("A5", "A4 + PCGrad", (0.514, 0.774, 0.394), ("composite", "A4", 0, "surgery changes nothing")),
    _row(
        *("A6", "A5 + cosine MNRL", (0.481, 0.793, 0.369)),
        ("para", "A5", 1, "cosine MNRL helps paraphrases"),
        ("sts", "A5", -1, "and hurts STS"),
    ),
    _row(
        *("A7", "A5 + threshold MNRL", (0.505, 0.770, 0.367)),
        ("composite", "A5", -1, "threshold MNRL makes all tasks a little worse"),
    ),
    _row(
        *("A8", "A4 + homoscedastic weighting, dropout .4", (0.481, 0.782, 0.380)),
        ("para", "A4", 1, "uncertainty weighting favours paraphrases"),
        ("sst", "A4", -1, "at the cost of sentiment"),
    ),
    _row(
        *("A9", "A6 + two hidden layers per head", (0.496, 0.794, 0.362)),
        ("composite", "A6", 0, "deeper heads change nothing"),
    ),
    _row("B0", "milestone baseline: SST alone", (0.316, 0.369, -0.009)),
    _row(
        *("B1", "random sequential sampling", (0.304, 0.670, 0.212)),
        ("composite", "B0", 1, "training on all tasks beats training on one"),
    ),
    _row(
        *("B2", "round-robin under-sampling", (0.301, 0.632, 0.181)),
        ("composite", "B1", -1, "under-sampling is a little worse than sequential"),
    ),
    _row(
        *("B3", "round-robin over-sampling", (0.432, 0.691, 0.272)),
        ("composite", "B2", 1, "over-sampling beats under-sampling"),
        ("composite", "B1", 1, "over-sampling beats sequential"),
    ),
    _row(
        *("B4", "B3 + hyperparameters + cosine", (0.497, 0.864, 0.387)),
        ("composite", "B3", 1, "phases, rates, joint encoding and a shared layer help much"),
    ),
    _row("B5", "B4 + PCGrad", (0.497, 0.860, 0.378), ("composite", "B4", 0, "surgery changes nothing")),
    _row("C0-sst", "single task: SST", (0.391, 0.380, -0.009)),
    _row("C0-cfimdb", "single task: CFIMDB", NONE),
    _row(
        *("C1", "C0 + dropout before pair heads", (0.530, 0.410, -0.043)),
        ("sst", "C0-sst", 1, "dropout raises SST (.391 to .530)"),
    ),
    _row("C2", "C1 + cosine STS head", (0.525, 0.403, 0.293), ("sts", "C1", 1, "cosine helps STS, even untrained")),
    _row(
        *("C3", "unbalanced round robin", (0.441, 0.783, 0.377)),
        ("composite", "C2", 1, "training on all tasks beats training on one"),
    ),
    _row("C4", "C3 + PCGrad", (0.455, 0.779, 0.421), ("composite", "C3", 1, "surgery helps a little")),
    _row(
        *("C5", "balanced round robin", (0.490, 0.774, 0.668)),
        ("composite", "C4", 1, "balanced beats unbalanced round robin"),
        ("sts", "C4", 1, "above all on STS"),
    ),
    _row("C6", "C5 + 5·ReLU(cosine)", (0.493, 0.776, 0.692), ("sts", "C5", 1, "a scaled ReLU of the cosine helps STS")),
    _row("D1", "linear probing, weighted dot product", (0.386, 0.694, 0.304)),
    _row("D2", "round-robin fine-tuning", (0.494, 0.823, 0.370), ("composite", "D1", 1, "fine-tuning beats probing")),
    _row(
        *("D3", "SimCSE first, then D1", (0.390, 0.632, 0.195)),
        ("composite", "D1", -1, "SimCSE first hurts probing"),
        ("sts", "D1", -1, "above all STS"),
    ),
    _row(
        *("D4", "SimCSE first, then D2", (0.487, 0.775, 0.346)),
        ("composite", "D2", -1, "SimCSE first hurts fine-tuning"),
    ),
    _row(
        *("D5-sst", "D2, SST left out", (0.278, 0.813, 0.395)),
        ("sst", "D1", -1, "a task left out falls below probing"),
        ("sts", "D2", 1, "without sentiment STS gains"),
    ),
    _row(
        *("D5-para", "D2, paraphrases left out", (0.495, 0.628, 0.357)),
        ("para", "D1", -1, "a task left out falls below probing"),
        ("sst", "D2", 0, "without paraphrases sentiment gains nothing"),
    ),
    _row(
        *("D5-sts", "D2, STS left out", (0.501, 0.825, -0.064)),
        ("sts", "D1", -1, "a task left out falls below probing"),
        ("sst", "D2", 1, "without STS sentiment gains"),
    ),
    _row("D6-concat-probe", "D1 with concatenation", (None, 0.681, 0.277)),
    _row(
        *("D6-dot-probe", "D1 with weighted dot product", (None, 0.694, 0.304)),
        ("para", "D6-concat-probe", 1, "probing, a weighted dot product beats concatenation on paraphrases"),
        ("sts", "D6-concat-probe", 1, "and on STS"),
    ),
    _row("D6-concat-tune", "D2 with concatenation", (None, 0.760, 0.345)),
    _row(
        *("D6-dot-tune", "D2 with weighted dot product", (None, 0.823, 0.370)),
        ("para", "D6-concat-tune", 1, "fine-tuning, a weighted dot product beats concatenation on paraphrases"),
        ("sts", "D6-concat-tune", 1, "and on STS"),
    ),
    _row("E-linear", "C5 without surgery, concat head for STS", NONE),
    _row(
        *("E-cosine", "the same with the cosine head", NONE),
        ("sts", "E-linear", 1, "cosine beats a linear head for STS, all else equal (B wished to know)"),
    ),
    _row(
        *("E-annealed", "BERT-and-PALs annealed sampling", NONE),
        ("composite", "E-cosine", None, "annealed sampling against balanced round robin"),
    ),
    _row(
        *("E-adaptive", "over-sampling the task that lags", NONE),
        ("composite", "E-cosine", None, "adaptive sampling against balanced round robin"),
    ),
    *(
        _row(f"E-{method}", f"A4 + {title}", NONE, ("composite", "A5", None, f"{title} against PCGrad"))
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
            runs.append(Run(row, seed, out / name, [*overrides, f"run.dir={out}", f"run.name={name}"]))
    return runs


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


def verdict(claim: Claim, row: Row, found: dict[str, list[dict[str, float]]]) -> str:
    """One sentence: the paper's finding, its numbers, ours, and whether ours bear it out."""
    one, other = (
        [values[claim.metric] for values in found.get(name, []) if claim.metric in values]
        for name in (row.name, claim.than)
    )
    opening = f"**{row.name}**: {claim.says}"
    if not one or not other:
        return f"{opening}: not run."
    difference = statistics.fmean(one) - statistics.fmean(other)
    spread = math.nan
    if min(len(one), len(other)) > 1:
        spread = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    told = f"{_signed(difference)} {claim.metric} against {claim.than}"
    told += f" (standard error {_plain(spread)}, {len(one)} seeds)" if spread == spread else " (one seed)"
    if claim.sign is None:
        return f"{opening}: {told}."
    return f"{opening}{_paper_s(claim, row)}: {_judged(claim.sign, difference, spread)}; {told}."


def _judged(sign: int, difference: float, spread: float) -> str:
    if sign == 0:
        return "holds" if abs(difference) <= NOTHING else "does not hold"
    if spread != spread:  # one seed cannot tell a difference from chance
        return "same direction, not decided" if sign * difference > 0 else "other direction, not decided"
    if abs(difference) <= 2 * spread:
        return "not decided, within the spread of the seeds"
    return "holds" if sign * difference > 0 else "does not hold"


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


def page(runs: Sequence[Run], sizes: dict[str, tuple[int, int]], command: str, encoder: str, pictures: Path) -> str:
    """The whole of docs/papers.md."""
    found = scores(runs)
    rows = list(dict.fromkeys(run.row.name for run in runs))
    told = "; ".join(f"{name} {train:,} / {dev:,}" for name, (train, dev) in sizes.items())
    parts = [
        "# The four papers' systems here\n",
        "<!-- Written by benchmarks/papers.py from the run folders. -->\n",
        "Every number of ours comes from this command; it can be interrupted, finished runs are kept:\n\n"
        f"    {command}\n",
        f"Encoder: {encoder}. Data, training / development rows: {told}. Scores are on the development sets after the "
        "last step, ± the standard deviation over seeds; composite = (SST + para + (STS + 1) / 2) / 3. The papers "
        "fine-tuned BERT-base (110 M) for 5 to 30 epochs on 141 k question pairs; what was cut is in each row's YAML "
        "(`configs/papers/`), so findings are compared, not numbers. **Contamination:** all-MiniLM-L6-v2 was trained "
        "on Quora duplicates, SNLI and MultiNLI, among others: with that encoder paraphrase scores flatter, and gains "
        "from NLI (D3, D4) are not what they would be for BERT.\n",
        f"{sum(len(values) for values in found.values())} of {len(runs)} runs are done.\n",
    ]
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
        sentences = [verdict(claim, row, found) for row in members for claim in row.claims]
        parts.append("\n" + "".join(f"- {sentence}\n" for sentence in sentences))
    parts.append(_conflicts(runs, pictures))
    return "\n".join(parts)


def _line(row: Row, found: Sequence[dict[str, float]], runs: Sequence[Run]) -> str:
    config = next(load_config(config_path(row), run.overrides) for run in runs if run.row.name == row.name)
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
    if not pictured:
        return "\n## Do the tasks conflict?\n\nNot run yet.\n"
    from mtbert.figures import conflict_curves
    from mtbert.record import RunRecord

    figure = conflict_curves([RunRecord(run.folder) for run in pictured], [run.row.name for run in pictured])
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "conflicts.svg", metadata={"Date": None})
    lines = ["| row | pair | mean cosine | 5 % … 95 % | share below 0 |\n|---|---|---|---|---|\n"]
    weights = []
    for run in pictured:
        curves = RunRecord(run.folder).curves
        for tag, curve in sorted(curves.items()):
            if tag.startswith("gradient/cosine/"):
                low, high = np.percentile(curve.values, [5, 95])
                lines.append(
                    f"| {run.row.name} | {tag.rpartition('/')[2]} | {_signed(float(np.mean(curve.values)))} | "
                    f"{_signed(low)} … {_signed(high)} | {np.mean(curve.values < 0):.0%} |\n"
                )
        changed = [np.abs(c.values - 1 / (3 if run.row.name != "C4" else 1)) for t, c in curves.items() if _weight(t)]
        weights.append(f"{run.row.name} {np.mean(np.concatenate(changed)):.3f}")
    return (
        "\n## Do the tasks conflict?\n\n![cosine of every pair of task gradients](papers/conflicts.svg)\n\n"
        + "".join(lines)
        + "\nMean distance of a task's weight from what it is without surgery (1/3 where Pytorch-PCGrad averages, "
        + f"1 in C4): {', '.join(weights)}. Where cosines are near 0 there is little to project away, and the combined "
        + "gradient is nearly the plain one: that is how far the papers' surgery could go.\n"
    )


def _weight(tag: str) -> bool:
    return tag.startswith("gradient/weight/")


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the CS224N files")
    parser.add_argument("--encoder", help="Hugging Face folder or hub name (or --set encoder.shape=… for a new one)")
    parser.add_argument("--out", default="runs/papers", help="folder for the runs")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help="names or patterns, such as A5 'D*'")
    parser.add_argument("--seeds", type=int, default=3, help="of the rows that a finding rests on; the others get one")
    parser.add_argument("--steps", type=int, help="cut every row to so many steps: a look at whether all works")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, which share the cores")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--page", default=str(ROOT / "docs" / "papers.md"))
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs (270 MB each with MiniLM)")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in options.rows)]
    if not rows:
        parser.error(f"--rows: no such row; there are {', '.join(row.name for row in ROWS)}")
    settings = [f"data.dir={Path(options.data).absolute()}", *options.set]
    if options.encoder:
        folder = Path(options.encoder)
        settings.append(f"encoder.pretrained={folder.absolute() if folder.is_dir() else options.encoder}")
    if options.jobs > 1:  # a thread a run wastes less than all threads on one: about a fifth on two cores
        settings.append(f"engine.threads={max(1, len(os.sched_getaffinity(0)) // options.jobs)}")
    out, target = Path(options.out).absolute(), Path(options.page)
    command = 'make papers ARGS="--data DATA --encoder MODEL'
    if options.rows != ["*"]:
        command += f" --rows {' '.join(options.rows)}"
    command += f" --seeds {options.seeds} --jobs {options.jobs}"
    command += (f" --steps {options.steps}" if options.steps else "") + '"'
    try:
        runs = runs_of(rows, options.seeds, out, settings, options.steps)
        waiting = {run.folder: run for run in reversed(runs) if run.result is None}  # rows may share one run
        todo = [] if options.report else list(reversed(waiting.values()))
        sizes: dict[str, tuple[int, int]] = {}
        for number, run in enumerate(perform_all(todo, options.jobs)):
            print(f"{number + 1}/{len(todo)} {run.row.name} seed {run.seed}: {run.row.system}", flush=True)
            if not options.keep_checkpoints:
                shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            sizes = sizes or dataset_sizes(rows, settings)
            write_page(target, runs, sizes, command, options.encoder)
        if not todo:
            write_page(target, runs, dataset_sizes(rows, settings), command, options.encoder)
    except UserError as error:
        print(f"papers: {error}", file=sys.stderr)
        return 2
    print(f"written: {target}")
    return 0


def write_page(
    target: Path, runs: list[Run], sizes: dict[str, tuple[int, int]], command: str, encoder: str | None
) -> None:
    text = page(runs, sizes, command, Path(encoder).name if encoder else "from scratch", target.parent / "papers")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text)


if __name__ == "__main__":
    sys.exit(main())
