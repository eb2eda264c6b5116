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
from scipy import stats

from benchmarks.papers.record import Entry, Line, Search, matched, outdated, unpacked
from benchmarks.papers.rows import (
    AS_THEY_ARE,
    NONE,
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
from mtbert.phases import plan
from mtbert.record import Curve

PAGE = ROOT / "docs" / "papers.md"
HEADINGS = {
    "A": "A · OptimusBERT",
    "B": "B · Sampling methods",
    "C": "C · Robust sentence embeddings",
    "D": "D · Fine-tuning methods",
    "E": "E · Past the papers",
}
PAPERS = {
    "A": (
        "R. Matheny, S. Charles and G. Seir",
        "OptimusBERT: Exploring BERT Transformer with Multi-Task Fine-Tuning, Gradient Surgery, and Adaptive Multiple "
        "Negative Rank Loss Learning Fine-Tuning",
    ),
    "B": (
        "A. Wu and W. Larlarb",
        "Optimizing Multitask BERT: A Study of Sampling Methods and Advanced Training Techniques",
    ),
    "C": (
        "S. Ramos and Y. Dalmia",
        "Multi-Task Learning for Robust Contextualized Sentence Embedding Generation",
    ),
    "D": (
        "C. Toups, K. Tsegay and A. Alinur",
        "Evaluating fine-tuning methods for robust multi-task sentence embeddings",
    ),
}
PICTURED = ("A5", "C4", "B5")
NOTHING = 0.01
"""The smallest difference of a score or composite that counts."""
REGIONS: dict[Kind, tuple[float, float]] = {
    "better": (NOTHING, math.inf),
    "worse": (-math.inf, -NOTHING),
    "same": (-NOTHING, NOTHING),
    "no better": (-math.inf, NOTHING),
}
"""Where the difference of two rows lies, if the finding holds."""
CONFIDENCE = 0.95
Scores = dict[str, dict[int, dict[str, float]]]
"""By row and seed: its score in every task, and what `scores` adds."""
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
    first = {recipe.row.name: recipe for recipe in wanted if not recipe.seed}
    same = {(one, other) for one in first for other in first if first[one].key == first[other].key}
    findings = [(row.name, claim.than) for row in ROWS for claim in row.claims if claim.kind != "told"]
    parts = [
        *_head(list(found.values()), first, sum(pair not in same for pair in findings)),
        f"{len({entry.key for entry in found.values()})} of {runs} runs are done.\n",
    ]
    if keys := changed(wanted):
        parts.append(f"**Not the recipes**: they were run with other values of {keys}.\n")
    if old := outdated(lines, wanted):
        names = "; ".join(outdated_told(line, wanted) for line in old)
        parts.append(f"**Left out**, for these recipes have changed since: {names}.\n")
    uniform = len({entry.precision for entry in found.values()}) < 2
    for letter, heading in HEADINGS.items():
        members = [row for row in ROWS if row.name[0] == letter]
        parts.append(f"\n## {heading}\n")
        parts.append(
            "| row | system | SST | paper | para | paper | STS | paper | composite | seeds | steps | examples | σ | "
            f"minutes |\n{'|---' * 14}|\n"
            + "".join(
                _line(row, [*done.get(row.name, {}).values()], _seeds(row, found, uniform), first[row.name].config)
                for row in members
            )
        )
        sentences = []
        for row in members:
            sentences += [verdict(claim, row, done, (row.name, claim.than) in same) for claim in row.claims]
            sentences += [] if row.claims else [standing(row, done)]
            sentences += [f"**{row.name}**, {row.note}."] if row.note else []
            entry = found.get((row.name, 0))
            sentences += [said] if entry and (said := ranking(row, entry)) else []
        sentences += [search_told(lines, first["C6"].config)] if letter == "C" else []
        parts.append("\n" + "".join(f"- {sentence}\n" for sentence in sentences))
    parts.append(_conflicts(_pictured(found), {name: entry for (name, seed), entry in found.items() if not seed}))
    return "\n".join(parts)


def _head(entries: Sequence[Entry], first: dict[str, Recipe], findings: int) -> list[str]:
    """What holds for all rows. Of runs that stand for several rows there are as many entries, of which each counts.

    Args:
        first: the recipe of every row with seed 0.
        findings: how many are tested.
    """
    runs = list({id(entry): entry for entry in entries}.values())
    sizes = {task: size for entry in entries for task, size in entry.sizes.items()}
    told = "; ".join(f"{name} {train:,} / {dev:,}" for name, (train, dev) in sorted(sizes.items())) or "–"
    chance = "; ".join(
        f"{name} {_plain(math.sqrt(0.25 / max(sizes[name][1], 1)))}" for name in TASKS[:2] if name in sizes
    )
    machines = Counter(", ".join([*map(str, _parts(entry)), entry.precision]) for entry in runs)
    days = sorted({entry.when for entry in runs})
    commits = sorted({entry.commit for entry in runs if entry.commit})
    compare = ", ".join(name for name, recipe in first.items() if compares(recipe.config))
    return [
        "# The four papers' systems here\n",
        "<!-- Written by `python -m benchmarks.papers --report` from benchmarks/papers.jsonl. -->\n",
        "The papers are project reports of Stanford's course CS224N: "
        + "; ".join(f"**{letter}** {authors}, *{title}*" for letter, (authors, title) in PAPERS.items())
        + ". What the terms mean: [README.md](README.md#terms).\n",
        "Every number of ours comes from\n\n    make papers\n\n"
        "It takes many hours, and need not have them at once: each finished run is a line of "
        "[papers.jsonl](../benchmarks/papers.jsonl), with its configuration, its scores and what the page needs of its "
        'curves, and this page is written from those lines alone. `make papers ARGS="--budget 60"` adds what begins '
        "within an hour, on any machine with the same files (they are known by their SHA-256); commit the record and "
        "the page together.\n",
        f"Encoder: {'; '.join(sorted({entry.encoder for entry in entries})) or '–'}. Data, training / development "
        f"rows: {told}. Scores are on the development sets after the last step, ± the standard deviation over seeds; "
        "composite = (SST + para + (STS + 1) / 2) / 3. Steps differ in size: examples are those that training saw, to "
        "the hundred, repeated ones each time. Minutes are wall time, whatever else the machine did meanwhile; they "
        "cannot be compared.\n",
        f"A finding is tested on the differences between two rows in the seeds that both have, {SEEDS} or more, by the "
        f"{CONFIDENCE:.0%} t interval of their mean; a difference of less than {_plain(NOTHING)} does not count. It "
        "holds where the whole interval agrees with it, does not hold where none of it does, and is not decided where "
        f'a part does ("no difference that counts": all of it lies within ±{_plain(NOTHING)}). A difference of the '
        f"paper's that would not count is refuted by the other sign alone. There are {findings} "
        "findings to test, each by itself: about "
        f"{(1 - CONFIDENCE) * findings:.0f} of so many intervals miss the true difference. Seeds vary the training "
        f"alone: the development sets are samples, too (standard error of an accuracy at most: {chance or '–'}), which "
        "no interval here includes.\n",
        "The papers fine-tuned BERT-base (110 M), A for 10 or 7 epochs, B's last systems for 30, C for one, D does not "
        "say. Question pairs for training: 141 k in C; D's 202 k are these with the development and test rows, B's "
        "\"over 400,000\" all of Quora's; A tells no number. What was cut is in each row's YAML (`configs/papers/`): "
        "findings are compared, not numbers. Here batches hold texts of like length, for speed, as in no paper: that "
        "makes gradients and their cosines noisier, and negatives from the batch alike in length.\n",
        '"By the paper\'s scores" is computed here, composites by our formula: B, C and D print plain averages. (A has '
        "composites, with a gain of .195 for A4, of which its text makes .187. D's Table 2 prints −.092 and −.434 for "
        "D5-sst and D5-sts against D1 where its scores give −.108 and −.368.)\n",
        "**Contamination:** all-MiniLM-L6-v2 was trained on Quora duplicates, SNLI and MultiNLI, among others, to tell "
        "pairs by the cosine of their mean vectors. With that encoder paraphrase scores flatter, and gains from NLI "
        "(D3, D4) are not what they would be for BERT. These rows compare or rank texts by the cosine or a weighted "
        "dot product of vectors that were made for it, an advantage over concatenation that BERT may not give: "
        f"{compare}.\n",
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
        *([f"{done[0]['steps']:,.0f}", f"{done[0]['examples']:,.0f}"] if done else ["–", "–"]),
        sigma(config),
        f"{minutes:.1f}" if minutes == minutes else "–",
    ]
    return f"| {' | '.join(cells)} |\n"


def sigma(config: Config) -> str:
    """The steps of an epoch, where that is a number and a round robin has more tasks than one to go round."""
    several = any(phase.epochs and len(phase.tasks or config.tasks) > 1 for phase in config.phases)
    length = config.schedule.length if config.schedule.kind == "round_robin" and several else None
    return str(length) if isinstance(length, int) else "–"


def examples(entry: Entry) -> int:
    """Those that training saw, repeated ones each time, to the hundred."""
    seen = 0.0
    for phase in plan(entry.as_config, [np.ones(entry.sizes[name][0], np.int64) for name in entry.as_config.tasks]):
        of_a_batch = [
            len(tokens) / batches
            for tokens, batches in zip(phase.schedule.tokens_N, phase.schedule.batches_per_pass, strict=True)
        ]
        for step in range(phase.first, phase.last + 1):
            seen += sum(of_a_batch[place] for place, _ in phase.schedule.batches_at(phase.schedule_step(step)))
    return round(seen / 100) * 100


def compares(config: Config) -> bool:
    """Whether it asks of vectors what sentence encoders are trained for: that texts alike have a large product."""
    kinds = ("cosine", "relu_cosine", "weighted_dot")
    return any(task.head.kind in kinds or task.ranking for task in config.tasks.values())


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


def scores(found: dict[tuple[str, int], Entry]) -> Scores:
    """Of every finished run: score by task, `composite` (of the three tasks), `seconds`, `steps` and `examples`."""
    done: Scores = {}
    for (name, seed), entry in found.items():
        said = dict(entry.scores)
        if all(task in said for task in TASKS):
            said["composite"] = (said["sst"] + said["para"] + (said["sts"] + 1) / 2) / 3
        course = {"seconds": entry.seconds, "steps": float(entry.steps), "examples": float(examples(entry))}
        done.setdefault(name, {})[seed] = said | course
    return done


def verdict(claim: Claim, row: Row, found: Scores, one_run: bool = False) -> str:
    """One sentence: the paper's finding, its numbers, ours, and whether ours bear it out.

    Args:
        one_run: the configurations of the two rows are equal.
    """
    opening = f"**{row.name}**: {claim.says}"
    theirs = paper_difference(claim, row)
    if one_run:
        why = f"the configurations of {row.name} and {claim.than} are equal, one run"
        return f"{opening}{_paper_s(claim.kind, theirs)}: cannot show; {why}."
    one, other = (
        {seed: values[claim.metric] for seed, values in found.get(name, {}).items() if claim.metric in values}
        for name in (row.name, claim.than)
    )
    # by seed: whatever a seed gives both rows alike (order of the data, dropout) is no difference between them
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not differences:
        return f"{opening}: not run{' with the same seed' * bool(one and other)}."
    counted = f"{len(differences)} seed{'s' * (len(differences) > 1)}"
    if len(differences) >= SEEDS:
        low, high = interval(differences)
        counted = f"{CONFIDENCE:.0%}: {_signed(low)} … {_signed(high)}; {counted}"
    told = f"{_signed(statistics.fmean(differences))} {claim.metric} against {claim.than} ({counted})"
    if claim.kind == "told":
        return f"{opening}: {told}."
    judged = _judged(claim.kind, differences, _is_little(claim.kind, theirs))
    return f"{opening}{_paper_s(claim.kind, theirs)}: {judged}; {told}."


def interval(values: Sequence[float]) -> tuple[float, float]:
    """That of the mean (Student's t); NaN for a single value, which says nothing of chance."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, half = statistics.fmean(values), stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(mean - half), float(mean + half)


def _judged(kind: Kind, differences: Sequence[float], little: bool) -> str:
    """Whether a finding holds.

    Args:
        differences: of the metric in the same seed.
        little: the paper's would not count. Ours may be as little, on either side of nothing.
    """
    mean, (least, most) = statistics.fmean(differences), REGIONS[kind]
    directed = kind in ("better", "worse")
    if len(differences) < SEEDS:
        agrees = "same" if (mean > 0) == (kind == "better") else "other"
        so_far = f"{agrees} direction, " if abs(mean) > NOTHING else "no difference that counts so far, "
        return f"{so_far * directed}not decided"
    low, high = interval(differences)
    if directed and -NOTHING <= low <= high <= NOTHING:
        return "no difference that counts"  # nor may the paper's, so it neither holds nor not
    if least <= low and high <= most:
        return "holds"
    room = NOTHING if little else 0.0
    return "does not hold" if high <= least - room or most + room <= low else "not decided"


def standing(row: Row, found: Scores) -> str:
    """One sentence on a row of which no paper claims anything: what is measured against it, and its score."""
    against = [other.name for other in ROWS if any(claim.than == row.name for claim in other.claims)]
    purpose = f"measured against it: {', '.join(against)}" if against else "nothing is measured against it"
    metric = "cfimdb" if row.name == "C0-cfimdb" else "composite"
    values = [each[metric] for each in found.get(row.name, {}).values() if metric in each]
    ours = f"{metric} {_score(values)} ({len(values)} seed{'s' * (len(values) > 1)})" if values else "not run"
    theirs = paper_score(row, "composite")
    paper = "no such number in a paper" if row.paper == NONE else "no composite in the paper"
    if theirs is not None:
        paper = f"by the paper's scores: {_plain(theirs)}"
    return f"**{row.name}**: no finding of its own; {purpose}; {ours}; {paper}."


def ranking(row: Row, entry: Entry) -> str | None:
    """Whether ranking on a threshold taught anything: ln B is its loss where all B candidates look alike."""
    for name, share in entry.alike.items():
        config = entry.as_config
        size = config.tasks[name].batch_size or config.schedule.batch_size
        loss = config.tasks[name].loss_kind
        collapse = f"consistent with a collapse, no proof of one: a part of it is {loss}'s"
        return (
            f"**{row.name}**, its ranking: at {share:.0%} of the logged steps of seed {entry.seed} the {name} loss, "
            f"{loss} with ranking, was ln {size} or more, which ranking alone gives where all texts of a batch look "
            f"alike: {collapse if share >= 0.5 else 'no lasting collapse'}."
        )
    return None


def search_told(lines: Iterable[Line], config: Config) -> str:
    """The line on C7, the search from the configuration of C6."""
    command = "python -m tune --config configs/papers/C6.yaml --space configs/search/c7.yaml --scheduler none "
    command += "--evaluations 1 --name C7 --set data.dir=DATA encoder.pretrained=MODEL run.dir=runs/papers"
    opening = (
        "**C7**: the search for C6's learning rate (1e-4, 1e-5, 1e-6), then its dropout (.2, .3, .4); the paper chose "
        f"1e-5 and .3. Here they are tried over {config.schedule.length} steps, in which 1e-5 moves little "
        f"([c7.yaml](../configs/search/c7.yaml), `{command}`, then `make papers`)"
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


def paper_difference(claim: Claim, row: Row) -> float | None:
    """By the paper's scores."""
    other = next(each for each in ROWS if each.name == claim.than)
    ours, theirs = (paper_score(each, claim.metric) for each in (row, other))
    return None if ours is None or theirs is None else ours - theirs


def _is_little(kind: Kind, difference: float | None) -> bool:
    return kind in ("better", "worse") and difference is not None and abs(difference) < NOTHING


def _paper_s(kind: Kind, difference: float | None) -> str:
    if difference is None:
        return ""
    return f" (by the paper's scores: {_signed(difference)}{', less than counts here' * _is_little(kind, difference)})"


def paper_score(row: Row, metric: str) -> float | None:
    """What a paper tells of the row, its composite by our formula."""
    if metric != "composite":
        return row.paper[TASKS.index(metric)]
    sst, para, sts = row.paper
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


COSINES = "gradient/cosine/"
Curves = dict[str, dict[str, Curve]]
"""By row and tag."""


def _conflicts(curves: Curves, entries: dict[str, Entry]) -> str:
    """The measured cosines of the pictured rows in numbers, and what surgery did with them."""
    moves = {
        name: surgery_moves(of, entries[name].as_config.surgery.options.get("reduction") == "mean")
        for name, of in curves.items()
    }
    moves = {name: each for name, each in moves.items() if len(each)}
    if not moves:
        return "\n## Do the tasks conflict?\n\nNot measured yet.\n"
    curves = {name: curves[name] for name in moves}
    lines = [
        f"| row | pair | steps | mean cosine | {CONFIDENCE:.0%} interval of the mean | 5% … 95% of the steps | share "
        f"below 0 |\n{'|---' * 7}|\n"
    ]
    for (name, pair), values in _pairs(curves).items():
        both = interval(values), np.percentile(values, [5, 95])
        spans = (f"{_signed(low)} … {_signed(high)}" for low, high in both)
        mean, below = statistics.fmean(values), np.mean(np.array(values) < 0)
        lines.append(f"| {name} | {pair} | {len(values)} | {_signed(mean)} | {' | '.join(spans)} | {below:.0%} |\n")
    heads = {name: heads_share(of) for name, of in curves.items()}
    return (
        "\n## Do the tasks conflict?\n\n![cosine of every pair of task gradients](papers/conflicts.svg)\n\n"
        f"{''.join(lines)}\n{reach_told(curves, entries)}\n\n{surgery_told(curves, moves, heads)}\n"
    )


def _pairs(curves: Curves) -> dict[tuple[str, str], list[float]]:
    """The cosines at the logged steps, by row and pair of tasks."""
    return {
        (name, tag.removeprefix(COSINES)): curve.values.tolist()
        for name, of in curves.items()
        for tag, curve in sorted(of.items())
        if tag.startswith(COSINES)
    }


def _by_step(curves: dict[str, Curve]) -> list[dict[str, float]]:
    """What was logged at each step, by tag."""
    logged: dict[int, dict[str, float]] = {}
    for tag, curve in curves.items():
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
            logged.setdefault(step, {})[tag] = value
    return list(logged.values())


def _tasks(values: dict[str, float]) -> list[str]:
    """Those that reach the encoder at a step; not from the norms, for there are those of all combined and of heads."""
    named = (tag.rpartition("/")[2] for tag in values if tag.startswith(("gradient/weight/", COSINES)))
    return sorted({task for name in named for task in name.split("~")})


def surgery_moves(curves: dict[str, Curve], averages: bool) -> NDArray[np.float64]:
    """How far surgery moved the encoder's combined gradient at the logged steps of two tasks or more, as a share of the
    plain one's length (from the logged weights, norms and cosines).

    The plain one has weights of 1, or 1 / tasks where the method `averages` (Pytorch-PCGrad).
    """
    moves = []
    for values in _by_step(curves):
        tasks = _tasks(values)
        pairs = {pair: _cosine(values, *pair) for pair in itertools.permutations(tasks, 2)}
        weights_norms = [[values.get(f"gradient/{kind}/{task}") for task in tasks] for kind in ("weight", "norm")]
        if not pairs or None in (*itertools.chain(*weights_norms), *pairs.values()):
            continue  # one task alone, or a number that was not finite
        weight_K, norm_K = np.array(weights_norms, np.float64)
        gram_KK = np.outer(norm_K, norm_K)
        for (one, other), cosine in pairs.items():
            gram_KK[tasks.index(one), tasks.index(other)] *= cosine
        plain_K = np.full(len(tasks), 1 / len(tasks) if averages else 1.0)
        moved_K = weight_K - plain_K
        moves.append(math.sqrt(max(moved_K @ gram_KK @ moved_K, 0) / (plain_K @ gram_KK @ plain_K or math.inf)))
    return np.array(moves)


def _cosine(values: dict[str, float], one: str, other: str) -> float | None:
    return values.get(f"{COSINES}{one}~{other}", values.get(f"{COSINES}{other}~{one}"))


def heads_share(curves: dict[str, Curve]) -> float:
    """Of the squared lengths of the task gradients, encoder and heads, the median over the logged steps."""
    shares = []
    for values in _by_step(curves):
        squares = [values.get(f"gradient/norm/{name}", math.nan) ** 2 for name in ("heads", *_tasks(values))]
        shares.append(squares[0] / (sum(squares) or math.inf))
    return float(np.nanmedian(shares))


def reach_told(curves: Curves, entries: dict[str, Entry]) -> str:
    """In how many of a row's steps surgery has something to do."""
    every = {name: entries[name].as_config.run.log_every for name in curves}
    logged = {name: entries[name].steps // every[name] for name in curves}
    reached = {
        name: sorted({step for tag, curve in of.items() if tag.startswith(COSINES) for step in curve.steps.tolist()})
        for name, of in curves.items()
    }
    counted = ", ".join(f"{name} {len(steps)} of {logged[name]}" for name, steps in reached.items())
    told = (
        "Seed 0. Two tasks or more reach the encoder in so many of the logged steps (one step in "
        f"{' or '.join(sorted(map(str, set(every.values()))))}): {counted}."
    )
    few = ", ".join(
        f"{name} (none logged after step {steps[-1] + 1:,} of {entries[name].steps:,})"
        for name, steps in reached.items()
        if 2 * len(steps) < logged[name]
    )
    if few:
        told += f" Less than half of them in {few}: a score that surgery leaves as it was may owe that to the other "
        told += "steps, which surgery does not touch."
    return told


def surgery_told(curves: Curves, moves: dict[str, NDArray[np.float64]], heads: dict[str, float]) -> str:
    """Whether task gradients conflict by more than chance, and how far surgery moves the encoder's.

    Args:
        moves: by row, as of `surgery_moves`.
        heads: by row, as of `heads_share`.
    """
    pairs = _pairs(curves)
    below = [place for place, values in pairs.items() if interval(values)[1] < 0]
    without = [name for name in curves if name not in {row for row, _ in below}]
    moved = ", ".join(f"{name} {np.mean(moves[name]):.1%} (at most {np.max(moves[name]):.0%})" for name in curves)
    told = (
        "Surgery moves the encoder's combined gradient by this share of its length, in the mean: "
        f"{moved}. That alone shows no conflict: gradients with nothing in common have cosines of either sign, by the "
        f"batch, and PCGrad projects away whatever lies below 0. Of {len(pairs)} pairs, the mean lies below 0 with its "
        f"whole interval for {', '.join(' '.join(place) for place in below) or 'none'}. "
    )
    if without:
        told += f"In {', '.join(without)} no pair conflicts by more than chance, as B supposed of its tasks (5.2). "
    shares = ", ".join(f"{name} {share:.0%}" for name, share in heads.items())
    return (
        f"{told.rstrip()}\n\nSurgery here works on the encoder alone. Pytorch-PCGrad (A and B used it, C names it) "
        "takes all parameters: heads' gradients change, too, and each projection is divided by ‖g_j‖² with the head's "
        "part in it, so that the encoder's moves by less. Heads have this part of the squared length of the task "
        f"gradients here, in the median: {shares}."
    )
