"""docs/papers.md and its picture, written from the record alone: our scores beside the papers', and what follows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.record import Entry, Line, Search, matched, outdated, unpacked
from benchmarks.papers.rows import (
    AS_THEY_ARE,
    ROOT,
    ROWS,
    SEEDS,
    TASKS,
    Claim,
    Kind,
    Recipe,
    Row,
    changed,
    differing,
    identity,
    recipes,
)
from mtbert.config import Config
from mtbert.errors import UserError
from mtbert.files import write_atomically
from mtbert.record import Curve

PAGE = ROOT / "docs" / "papers.md"
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


def all_recipes(lines: Iterable[Line], settings: Sequence[str] = AS_THEY_ARE, steps: int | None = None) -> list[Recipe]:
    """What a page is about: every row, with as many seeds as any has in the record, at least `SEEDS`."""
    return recipes(ROWS, max([SEEDS, *(line.seed + 1 for line in lines)]), settings, steps)


def write_page(target: Path, lines: Sequence[Line], wanted: Sequence[Recipe]) -> None:
    """The page, and its picture in a folder beside it."""
    if curves := _pictured(matched(lines, wanted)):
        from mtbert.figures import COSINE, panels, svg

        drawn = {
            tag.removeprefix(COSINE).replace("~", " and "): [(row, of[tag]) for row, of in curves.items() if tag in of]
            for tag in sorted({tag for of in curves.values() for tag in of if tag.startswith(COSINE)})
        }
        pictures = target.parent / "papers"
        pictures.mkdir(parents=True, exist_ok=True)
        write_atomically(pictures / "conflicts.svg", svg(panels(drawn, zero=True, ylabel="cosine")))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page(lines, wanted))


def _pictured(found: dict[tuple[str, int], Entry]) -> dict[str, dict[str, Curve]]:
    """The curves of the rows that have some."""
    entries = {name: found[name, 0] for name in PICTURED if (name, 0) in found}
    return {name: unpacked(entry.curves) for name, entry in entries.items() if entry.curves}


def page(lines: Sequence[Line], wanted: Sequence[Recipe]) -> str:
    """The whole of docs/papers.md.

    Args:
        lines: the record's.
        wanted: the recipes of today, from `all_recipes`.
    """
    found = matched(lines, wanted)
    done = scores(found)
    runs = len({recipe.key for recipe in wanted})
    parts = [*_head(list(found.values())), f"{len({entry.key for entry in found.values()})} of {runs} runs are done.\n"]
    if keys := changed(wanted):
        parts.append(f"**Not the recipes**: they were run with other values of {keys}.\n")
    if old := outdated(lines, wanted):
        names = "; ".join(outdated_told(line, wanted) for line in old)
        parts.append(f"**Left out**, for these recipes have changed since: {names}.\n")
    uniform = len({entry.precision for entry in found.values()}) < 2
    first = {recipe.row.name: recipe for recipe in wanted if not recipe.seed}
    for letter, heading in HEADINGS.items():
        members = [row for row in ROWS if row.name[0] == letter]
        parts.append(f"\n## {heading}\n")
        parts.append(
            "| row | system | SST | paper | para | paper | STS | paper | composite | seeds | steps | σ | minutes |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
            + "".join(
                _line(row, done.get(row.name, []), _seeds(row, found, uniform), first[row.name].config)
                for row in members
            )
        )
        sentences = []
        for row in members:
            same = {name for name, recipe in first.items() if recipe.key == first[row.name].key}
            sentences += [verdict(claim, row, done, claim.than in same) for claim in row.claims]
            sentences += [] if row.claims else [standing(row, done)]
            entry = found.get((row.name, 0))
            sentences += [said] if entry and (said := ranking(row, entry)) else []
        sentences += [search_told(lines, first["C6"].config)] if letter == "C" else []
        parts.append("\n" + "".join(f"- {sentence}\n" for sentence in sentences))
    parts.append(_conflicts(_pictured(found), {name: entry for (name, seed), entry in found.items() if not seed}))
    return "\n".join(parts)


def _head(entries: Sequence[Entry]) -> list[str]:
    """What holds for all rows. Of runs that stand for several rows there are as many entries, of which each counts."""
    runs = list({id(entry): entry for entry in entries}.values())
    sizes = {task: size for entry in entries for task, size in entry.sizes.items()}
    told = "; ".join(f"{name} {train:,} / {dev:,}" for name, (train, dev) in sorted(sizes.items())) or "–"
    chance = "; ".join(
        f"{name} {_plain(math.sqrt(0.25 / max(sizes[name][1], 1)))}" for name in TASKS[:2] if name in sizes
    )
    machines = Counter(", ".join([*map(str, _parts(entry)), entry.precision]) for entry in runs)
    days = sorted({entry.when for entry in runs})
    commits = sorted({entry.commit for entry in runs if entry.commit})
    return [
        "# The four papers' systems here\n",
        "<!-- Written by `python -m benchmarks.papers --report` from benchmarks/papers.jsonl. -->\n",
        "Every number of ours comes from\n\n    make papers\n\n"
        "It takes many hours, and need not have them at once: each finished run is a line of "
        "[papers.jsonl](../benchmarks/papers.jsonl), with its configuration, its scores and what the page needs of its "
        'curves, and this page is written from those lines alone. `make papers ARGS="--budget 60"` adds what begins '
        "within an hour, on any machine with the same files (they are known by their SHA-256); commit the record and "
        "the page together.\n",
        f"Encoder: {'; '.join(sorted({entry.encoder for entry in entries})) or '–'}. Data, training / development "
        f"rows: {told}. Scores are on the development sets after the last step, ± the standard deviation over seeds; "
        "composite = (SST + para + (STS + 1) / 2) / 3. Seeds vary the training alone: the development sets are "
        f'samples, too (standard error of an accuracy at most: {chance or "–"}). "Changes nothing" holds if the '
        f"difference stays within {_plain(NOTHING)} with twice its standard error. Minutes are wall time, whatever "
        "else the machine did meanwhile; they cannot be compared.\n",
        "The papers fine-tuned BERT-base (110 M), A for 10 or 7 epochs, B's last systems for 30, C for one, D does not "
        "say; question pairs: 141 k in C, 202 k in D, over 400 k in B. What was cut is in each row's YAML "
        "(`configs/papers/`), so findings are compared, not numbers.\n",
        "**Contamination:** all-MiniLM-L6-v2 was trained on Quora duplicates, SNLI and MultiNLI, among others, to tell "
        "pairs by the cosine of their mean vectors. With that encoder paraphrase scores flatter, gains from NLI (D3, "
        "D4) are not what they would be for BERT, and whatever has a cosine head (B1-B5, C2-C6, E-cosine against "
        "E-linear) rests on vectors made for it.\n",
        *([_where(machines, days, commits)] if runs else []),
    ]


def _parts(entry: Entry) -> list[str]:
    machine = entry.machine
    gpu = [str(machine["gpu"])] if "gpu" in machine else []
    return [*gpu, str(machine["cpu"]), f"{machine['cores']} cores"]


def _where(machines: Counter[str], days: Sequence[str], commits: Sequence[str]) -> str:
    counted = "; ".join(f"{machine}: {count}" for machine, count in sorted(machines.items()))
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    code = f", at {', '.join(commits)} (+: with changes)" if commits else ""
    return (
        f"Runs by machine and the precision it chose: {counted}; {span}{code}. Where both precisions are there, the "
        "column of seeds says how many had which; their results differ by rounding.\n"
    )


def _seeds(row: Row, found: dict[tuple[str, int], Entry], uniform: bool) -> str:
    """How many; with their precision unless that is the same on the whole page."""
    precisions = Counter(entry.precision for (name, _), entry in found.items() if name == row.name)
    if uniform or not precisions:
        return str(precisions.total())
    return " + ".join(f"{count} {precision}" for precision, count in sorted(precisions.items()))


def _line(row: Row, done: Sequence[dict[str, float]], seeds: str, config: Config) -> str:
    cells = [f"[{row.name}](../configs/papers/{row.name}.yaml)", row.system]
    if row.name == "C0-cfimdb":
        cells += [f"CFIMDB {_score([values['cfimdb'] for values in done])}", *["–"] * 5]
    else:
        for place, task in enumerate(TASKS):
            cells += [_score([values[task] for values in done]), _plain(row.paper[place])]
    minutes = statistics.fmean([values["seconds"] / 60 for values in done]) if done else math.nan
    cells += [
        _score([values["composite"] for values in done if "composite" in values]),
        seeds,
        f"{done[0]['steps']:,.0f}" if done else "–",
        str(config.schedule.length) if config.schedule.kind != "sequential" else "each to its end",
        f"{minutes:.1f}" if minutes == minutes else "–",
    ]
    return f"| {' | '.join(cells)} |\n"


def outdated_told(line: Entry, wanted: Sequence[Recipe]) -> str:
    """A line that is no recipe's, and in which keys it differs from that of its row and seed."""
    recipe = next((each for each in wanted if (each.row.name, each.seed) == (line.row, line.seed)), None)
    if recipe is None:
        why = "no such row and seed"
    else:
        try:
            why = differing(identity(line.as_config), identity(recipe.config))
        except UserError:
            why = "this version cannot read it"
    return f"{line.row} seed {line.seed} ({why})"


# ------------------------------------------------------------------------------------------------------ findings


def scores(found: dict[tuple[str, int], Entry]) -> dict[str, list[dict[str, float]]]:
    """Per row, of every finished seed: score by task, `composite` (of the three tasks) and `seconds`, `steps`."""
    done: dict[str, list[dict[str, float]]] = {}
    for (name, _), entry in found.items():
        said = dict(entry.scores)
        if all(task in said for task in TASKS):
            said["composite"] = (said["sst"] + said["para"] + (said["sts"] + 1) / 2) / 3
        done.setdefault(name, []).append({**said, "seconds": entry.seconds, "steps": float(entry.steps)})
    return done


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


def ranking(row: Row, entry: Entry) -> str | None:
    """Whether ranking on a threshold taught anything: ln B is its loss where all B candidates look alike."""
    for name, share in entry.alike.items():
        config = entry.as_config
        size = config.tasks[name].batch_size or config.schedule.batch_size
        said = "a collapse, so its scores say little of ranking as such" if share >= 0.5 else "no lasting collapse"
        return (
            f"**{row.name}**, its ranking: at {share:.0%} of the logged steps of seed {entry.seed} the {name} loss "
            f"was ln {size} or more, which ranking alone gives where all texts of a batch look alike: {said}."
        )
    return None


def search_told(lines: Iterable[Line], config: Config) -> str:
    """The line on C7, the search from the configuration of C6."""
    command = "python -m tune --config configs/papers/C6.yaml --space configs/search/c7.yaml --scheduler none "
    command += "--evaluations 1 --name C7 --set data.dir=DATA encoder.pretrained=MODEL run.dir=runs/papers"
    opening = (
        "**C7**: the search for C6's learning rate (1e-4, 1e-5, 1e-6), then its dropout (.2, .3, .4); the paper chose "
        f"1e-5 and .3 ([c7.yaml](../configs/search/c7.yaml), `{command}`, then `make papers`)"
    )
    search = next((line for line in lines if isinstance(line, Search)), None)
    if search is None:
        return f"{opening}: not run."
    if keys := search_differs(search, config):
        return f"{opening}: left out, the search varied another configuration ({keys})."
    choice = "the same" if (search.lr, search.dropout) == (1e-5, 0.3) else "another choice"
    return (
        f"{opening}: {choice} here, {search.lr:g} and {_plain(search.dropout)}, composite {_plain(search.composite)}; "
        f"{search.trials} of 6 trials, one seed each, not decided."
    )


def search_differs(search: Search, config: Config) -> str:
    """The keys in which what was searched is not this configuration."""
    try:
        return differing(identity(search.as_config), identity(config))
    except UserError:
        return "this version cannot read it"


def _paper_s(claim: Claim, row: Row) -> str:
    other = next(each for each in ROWS if each.name == claim.than)
    ours, theirs = (
        _composite(each.paper) if claim.metric == "composite" else each.paper[TASKS.index(claim.metric)]
        for each in (row, other)
    )
    return "" if ours is None or theirs is None else f" (paper: {_signed(ours - theirs)})"


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


# ----------------------------------------------------------------------------------------------------- conflicts


def _conflicts(curves: dict[str, dict[str, Curve]], entries: dict[str, Entry]) -> str:
    """The measured cosines of the pictured rows in numbers, and what surgery did with them."""
    changes = {
        name: surgery_changes(of, entries[name].as_config.surgery.options.get("reduction") == "mean")
        for name, of in curves.items()
    }
    changes = {name: each for name, each in changes.items() if len(each[0])}
    if not changes:
        return "\n## Do the tasks conflict?\n\nNot measured yet.\n"
    lines = ["| row | pair | mean cosine | 5 % … 95 % | share below 0 |\n|---|---|---|---|---|\n"]
    cosines: list[float] = []
    for name in changes:
        for tag, curve in sorted(curves[name].items()):
            if tag.startswith("gradient/cosine/"):
                cosines += curve.values.tolist()
                low, high = np.percentile(curve.values, [5, 95])
                lines.append(
                    f"| {name} | {tag.rpartition('/')[2]} | {_signed(float(np.mean(curve.values)))} | "
                    f"{_signed(low)} … {_signed(high)} | {np.mean(curve.values < 0):.0%} |\n"
                )
    every = " or ".join(sorted({str(entries[name].as_config.run.log_every) for name in changes}))
    return (
        "\n## Do the tasks conflict?\n\n![cosine of every pair of task gradients](papers/conflicts.svg)\n\n"
        + "".join(lines)
        + f"\nSeed 0, one step in {every}, where two tasks or more reach the encoder. "
        + surgery_told(changes, np.array(cosines))
    )


def surgery_changes(curves: dict[str, Curve], averages: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What surgery did at the logged steps of two tasks or more: |w / plain − 1| of every task's weight; and how far
    the encoder's combined gradient moved, as a share of the plain one's length (from the logged norms and cosines).

    plain is the weight without surgery: 1, or 1 / tasks where the method `averages` (Pytorch-PCGrad).
    """
    logged: dict[int, dict[str, float]] = {}
    for tag, curve in curves.items():
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
            logged.setdefault(step, {})[tag] = value
    weights, gradients = [], []
    for values in logged.values():
        of_a_task = ("gradient/weight/", "gradient/norm/")
        # not of the norms, for there are those of all tasks combined and of all heads
        named = (tag.rpartition("/")[2] for tag in values if tag.startswith(("gradient/weight/", "gradient/cosine/")))
        tasks = sorted({task for name in named for task in name.split("~")})
        pairs = {pair: _cosine(values, *pair) for pair in itertools.permutations(tasks, 2)}
        weights_norms = [[values.get(f"{tag}{task}") for task in tasks] for tag in of_a_task]
        if not pairs or None in (*itertools.chain(*weights_norms), *pairs.values()):
            continue  # one task alone, or a number that was not finite
        weight_K, norm_K = np.array(weights_norms, np.float64)
        gram_KK = np.outer(norm_K, norm_K)
        for (one, other), cosine in pairs.items():
            gram_KK[tasks.index(one), tasks.index(other)] *= cosine
        plain_K = np.full(len(tasks), 1 / len(tasks) if averages else 1.0)
        moved_K = weight_K - plain_K
        weights += np.abs(moved_K / plain_K).tolist()
        gradients.append(math.sqrt(max(moved_K @ gram_KK @ moved_K, 0) / (plain_K @ gram_KK @ plain_K or math.inf)))
    return np.array(weights), np.array(gradients)


def _cosine(values: dict[str, float], one: str, other: str) -> float | None:
    return values.get(f"gradient/cosine/{one}~{other}", values.get(f"gradient/cosine/{other}~{one}"))


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
