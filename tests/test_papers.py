"""Every row of the papers: its configuration loads, trains, evaluates, saves and resumes, on the generated corpus."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from harness import PATIENCE_S
from scipy import stats

from benchmarks.papers import __main__ as papers
from benchmarks.papers import page as pages
from benchmarks.papers import running
from benchmarks.papers.record import RECORD, Entry, Line, Record, Search, compact, portable, unpacked
from benchmarks.papers.rows import ROWS, TASKS, Row, identity, recipes, shortened
from mtbert import synthetic
from mtbert.config import Config
from mtbert.config_files import load_config, to_yaml
from mtbert.errors import UserError
from mtbert.heads import Head
from mtbert.manifest import find_checkpoint
from mtbert.record import Curve, RunRecord
from mtbert.runs import Rank, create_run
from mtbert.trainer import train
from tune.space import load_space

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs" / "papers").glob("*.yaml"))
PARTS = ("base", "A", "B")  # what rows are based on


NAMES = [row.name for row in ROWS]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The generated corpus and a tiny encoder in place of the real ones."""
    folder = tmp_path_factory.mktemp("papers")
    corpus = synthetic.generate(folder / "corpus", seed=0, train=40, dev=20)
    texts = [path.read_text() for path in sorted(corpus.glob("*-train.csv"))]
    tokenizer = synthetic.train_tokenizer(texts, folder / "tokenizer.json")
    shape = {"hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 8, "max_positions": 64}
    return [
        f"data.dir={corpus}",
        f"data.cache={folder / 'cache'}",
        f"encoder.shape={json.dumps(shape)}",
        f"encoder.tokenizer={tokenizer}",
        "schedule.batch_size=8",
        "engine.precision=fp32",
        "engine.threads=1",
        "run.log_every=1",
    ]


def short(name: str, settings: list[str], steps: int) -> Config:
    path = ROOT / "configs" / "papers" / f"{name}.yaml"
    return load_config(path, [*settings, shortened(load_config(path, settings), steps)])


def test_every_row_has_its_configuration_and_the_other_way_round() -> None:
    assert {path.stem for path in CONFIGS} == {*NAMES, *PARTS}
    assert len(NAMES) == len(set(NAMES))
    required = [f"A{n}" for n in range(1, 10)] + [f"B{n}" for n in range(6)] + [f"C{n}" for n in range(1, 7)]
    assert {*required, "C0-sst", "C0-cfimdb", "D1", "D2", "D3", "D4", "D5-sst", "D5-para", "D5-sts"} <= set(NAMES)
    assert sum(name.startswith("D6") for name in NAMES) == 4
    for claim in (claim for row in ROWS for claim in row.claims):
        assert claim.than in NAMES and claim.metric in (*TASKS, "composite")


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def recipe(name: str) -> Config:
    return load_config(ROOT / "configs" / "papers" / f"{name}.yaml", ["data.dir=DATA", "encoder.pretrained=MODEL"])


def test_b0_has_a_linear_head_for_similarity() -> None:
    """Its −.009 is an untrained linear head's; the cosine came later (paper B, Table 1 and footnote 2)."""
    sts = recipe("B0").tasks["sts"]
    assert (sts.head.kind, sts.loss) == ("concat", "mse")
    assert all(recipe(f"B{n}").tasks["sts"].head.kind == "cosine" for n in range(1, 6))


def test_c1_is_c0s_run_for_it_cannot_differ() -> None:
    assert recipe("C1") == recipe("C0-sst")
    assert [phase.tasks for phase in recipe("C1").phases] == [["sst"]]  # the heads with more dropout are not trained
    row = row_of("C1")
    sentence = pages.verdict(row.claims[0], row, {}, one_run=True)
    assert "(by the paper's scores: +.139): cannot show; the configurations of C1 and C0-sst are equal" in sentence


@pytest.mark.parametrize(
    ("name", "kind", "scale", "dropout"),
    [
        ("C0-sst", "concat", 5, 0.3),
        *[(f"C{n}", "cosine", 1, 0) for n in range(2, 6)],
        ("C6", "relu_cosine", 5, 0),
        ("E-cosine", "cosine", 5, 0),
        ("E-linear", "concat", 5, 0),
    ],
)
def test_similarity_heads_are_those_of_paper_c(name: str, kind: str, scale: float, dropout: float) -> None:
    """4.4: times 5 the linear head and the ReLU of the cosine, bare the cosine; 5.3: dropout before linear layers."""
    head = Head(recipe(name).tasks["sts"], 8)
    assert (head.kind, head.scale, head.dropout) == (kind, scale, dropout)


def test_e_linear_differs_from_e_cosine_in_the_head_alone() -> None:
    one, other = identity(recipe("E-linear")), identity(recipe("E-cosine"))
    assert {key for key in one if one[key] != other[key]} == {"tasks.sts.head.kind"}


def test_samplers_differ_from_e_uniform_in_the_drawing_alone() -> None:
    """From E-cosine they differ in the number of updates, besides: three times as many, of a batch each."""
    uniform = identity(recipe("E-uniform"))
    for name, drawing in (("E-annealed", {"alpha", "anneal"}), ("E-adaptive", {"kind", "alpha", "targets"})):
        other = identity(recipe(name))
        keys = {key for key in uniform.keys() | other.keys() if uniform.get(key) != other.get(key)}
        assert {key.split(".")[1] for key in keys - {"run.evaluate_every"}} == drawing
        assert {claim.than for claim in row_of(name).claims} == {"E-uniform"}
    (phase,), schedule, batches = recipe("E-uniform").phases, recipe("E-uniform").schedule, recipe("E-cosine").schedule
    assert isinstance(schedule.length, int) and isinstance(batches.length, int) and phase.epochs
    assert schedule.tasks_per_step * schedule.length * phase.epochs == pytest.approx(3 * batches.length, rel=0.01)


def test_claims_have_the_direction_of_the_papers_scores() -> None:
    for row in ROWS:
        for claim in row.claims:
            ours, theirs = (pages.paper_score(each, claim.metric) for each in (row, row_of(claim.than)))
            if ours is not None and theirs is not None:
                says = {"better": ours > theirs, "worse": ours < theirs, "no better": ours - theirs < 0.01}
                assert says.get(claim.kind, abs(ours - theirs) < 0.01), (row.name, claim)


def test_the_papers_largest_effects_are_among_the_claims() -> None:
    """A 5: MNRL may bias training towards paraphrases and STS; A 4.4: weighting costs STS; C: round robin costs SST."""
    kinds = {(row.name, claim.metric, claim.than): claim.kind for row in ROWS for claim in row.claims}
    worse = [("A6", "sst", "A5"), ("A8", "sts", "A4"), ("C3", "sst", "C2"), ("A3", "composite", "A1")]
    assert {kinds[place] for place in worse} == {"worse"}
    assert kinds["A2", "composite", "A1"] == kinds["A9", "composite", "A6"] == "better"  # of A9 the depth alone


def test_b4_is_not_credited_with_the_cosine_it_shares_with_b3() -> None:
    assert recipe("B3").tasks["sts"].head.kind == recipe("B4").tasks["sts"].head.kind == "cosine"
    (claim,) = row_of("B4").claims
    assert "joint encoding" in claim.says and "not the cosine, see E-cosine" in claim.says


def test_c5_sees_as_many_batches_as_c4() -> None:
    unbalanced = sum(-(-rows // 32) for rows in (8544, 53183, 6040))
    assert recipe("C4").schedule.length == "unbalanced" and recipe("C5").schedule.length * 3 == unbalanced == 2118


def test_b4s_rates_all_reach_a_layer_and_keep_the_papers_ratios() -> None:
    config = recipe("B4")
    rates = {part: config.rate(config.phases[1], part) for part in config.part_users}
    assert rates == pytest.approx({"encoder": 1e-4, "sst": 4.75e-3, "para": 5e-4, "pair": 5e-4, "sts": 2e-4})


def test_c7_searches_one_rate_and_the_dropout_of_linear_heads_of_c6() -> None:
    space = load_space(ROOT / "configs" / "search" / "c7.yaml", recipe("C6"))
    assert space["optimizer.lr"].keys == ("optimizer.lr", "optimizer.head_lr")
    assert space["dropout"].keys == ("tasks.sst.head.dropout", "tasks.para.head.dropout")


@pytest.mark.parametrize("name", NAMES)
def test_a_row_trains_evaluates_saves_and_resumes(name: str, settings: list[str], tmp_path: Path) -> None:
    config = short(name, [*settings, f"run.dir={tmp_path}", "run.name=run"], steps=3)
    run = create_run(config, None, [])
    asked = iter([False, True])  # stops after the second step
    stopped = train(run, Rank(), lambda: next(asked), quiet=True)
    assert (stopped.status, stopped.step) == ("stopped", 2)
    finished = train(run, Rank(), quiet=True)
    assert finished.status == "finished" and finished.step >= 3
    assert find_checkpoint(run, "latest").step == finished.step
    scored = set(json.loads((run / "result.json").read_text())["tasks"])
    assert scored == {task for task, values in config.tasks.items() if values.dev is not None}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == list(range(finished.step))
    assert not any("not_finite" in line and any("loss" in tag for tag in line["not_finite"]) for line in lines)


@pytest.fixture
def arguments(settings: list[str], tmp_path: Path) -> list[str]:
    """Three rows that are two runs, of two steps, into a record of their own."""
    places = ["--out", str(tmp_path / "runs"), "--record", str(tmp_path / "papers.jsonl")]
    return [*places, "--rows", "D1", "D6*probe", "--seeds", "1", "--steps", "2", "--set", *settings]


def test_runs_go_into_the_record_and_the_page_is_written_from_it(
    arguments: list[str], settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D1 and D6-dot-probe are one configuration and so one run."""
    record, target = tmp_path / "papers.jsonl", tmp_path / "papers.md"
    assert papers.main(arguments) == 0
    assert [path for path in (tmp_path / "runs").iterdir() if path.suffix != ".lock"] == []
    lines = Record(record).entries()
    assert [(line.row, line.seed, line.precision) for line in lines] == [
        ("D1", 0, "fp32"),
        ("D6-concat-probe", 0, "fp32"),
    ]
    assert lines[0].sizes == {"sst": (40, 20), "para": (40, 20), "sts": (40, 20)} and lines[0].steps == 2
    assert lines[0].scores.keys() == set(TASKS) and lines[0].seconds > 0
    text, told = record.read_text(), target.read_text()
    assert str(tmp_path) not in text + told and "/" not in json.dumps([line.config for line in lines])
    assert all(list(json.loads(line)) == sorted(json.loads(line)) for line in text.splitlines())
    assert "2 of " in told and " runs are done" in told and "run with other values of encoder." in told
    assert sum(line.startswith("| [D") and " | 1 | 2 | " in line for line in told.splitlines()) == 3
    assert "beats concatenation on paraphrases (by the paper's scores: +.013): " in told and "not decided" in told

    # nothing is repeated, and the page needs nothing but the record
    capsys.readouterr()
    target.unlink()
    assert papers.main(arguments) == 0 and papers.main([*arguments, "run.log_every=7", "engine.threads=2"]) == 0
    assert capsys.readouterr().out == f"written: {target}\n" * 2
    assert (record.read_text(), target.read_text()) == (text, told)
    target.unlink()
    elsewhere = ["data.dir=/none", "encoder.tokenizer=/none/tokenizer.json"]
    assert papers.main([*arguments, *elsewhere, "--report"]) == 0 and target.read_text() == told

    # other recipes: what is there is told, left out, and run again only if that is asked for
    changed = [*arguments, "optimizer.head_lr=0.5"]
    capsys.readouterr()
    assert papers.main(changed) == 0 and record.read_text() == text
    said = capsys.readouterr().out
    assert "outdated: D1 seed 0 (optimizer.head_lr); --redo runs it again\n" in said and "1/1 " not in said
    assert "**Left out**, for these recipes have changed since: D1 seed 0 (optimizer.head_lr); D6" in target.read_text()
    assert papers.main([*changed, "--redo", "--rows", "D1", "--keep-runs"]) == 0
    assert "1/1 D1 seed 0" in capsys.readouterr().out and (tmp_path / "runs" / "D1-seed0" / "result.json").is_file()
    after = Record(record).entries()
    assert after[0].as_config.optimizer.head_lr == 0.5 and after[1] == lines[1]

    # a folder of another recipe is not continued
    capsys.readouterr()
    assert papers.main([*arguments, "--redo"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path}/runs/D1-seed0: holds a run whose configuration is not its" in said
    assert "(optimizer.head_lr); remove it" in said


def test_an_interrupted_run_goes_on_and_a_finished_one_is_only_recorded(
    arguments: list[str], settings: list[str], tmp_path: Path
) -> None:
    place = [f"run.dir={tmp_path / 'runs'}", "run.name=D1-seed0"]
    run = create_run(short("D1", [*settings, *place], 2), None, [])
    asked = iter([True])
    assert train(run, Rank(), lambda: next(asked), quiet=True).step == 1
    only = [*arguments, "--rows", "D1", "--keep-runs"]
    assert papers.main(only) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 1]
    (first,) = Record(tmp_path / "papers.jsonl").entries()
    assert first.steps == 2
    log = (tmp_path / "runs" / "D1-seed0.log").read_bytes()
    (tmp_path / "papers.jsonl").unlink()
    assert papers.main(only) == 0
    assert Record(tmp_path / "papers.jsonl").entries() == [first]
    assert (tmp_path / "runs" / "D1-seed0.log").read_bytes() == log, "it did not train again"


def test_sigterm_ends_the_runs_too(arguments: list[str], tmp_path: Path) -> None:
    """`timeout`, a scheduler: their signal reaches this process alone."""
    command = [sys.executable, "-m", "benchmarks.papers", *arguments, "--rows", "D2", "--steps", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "D2-seed0"
    while not (run / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, said) == (130, "interrupted; the same command goes on\n")
    assert (run / "checkpoints").is_dir() and not (run / "result.json").exists()
    held = filelock.FileLock(f"{run}.lock", timeout=0)
    with held:
        pass
    assert "continue with:" in (tmp_path / "runs" / "D2-seed0.log").read_text()


def test_when_time_is_over_no_run_is_started(arguments: list[str], tmp_path: Path) -> None:
    assert papers.main([*arguments, "--budget", "1e-9"]) == 0
    assert not (tmp_path / "papers.jsonl").exists() and "0 of " in (tmp_path / "papers.md").read_text()


def test_the_tracked_record_takes_nothing_but_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for changed, keys in ((["--steps", "3"], "phases"), (["--set", "optimizer.lr=1e-3"], "optimizer.lr")):
        assert papers.main(["--report", *changed]) == 2
        said = f"{RECORD}: holds runs of the recipes as they are; to change {keys}, name another --record\n"
        assert capsys.readouterr().err == f"python -m benchmarks.papers: {said}"


def test_the_page_is_what_the_record_says() -> None:
    """Both are there, or neither."""
    lines = Record(RECORD).lines()
    assert all(line.commit for line in lines)
    told = pages.PAGE.read_text(encoding="utf-8") if pages.PAGE.is_file() else None
    assert told == (pages.page(lines, pages.all_recipes(lines)) if lines else None)


# ---------------------------------------------------------------------------------------------------- the record


STAMP: dict[str, Any] = {"encoder": "E", "when": "2030-01-01", "machine": {"cpu": "C", "cores": 2}, "commit": "c0ffee"}
SIZES = {"sst": (8544, 1101), "para": (9, 100), "sts": (9, 9)}


def entry(name: str, seed: int = 0, **values: Any) -> Entry:
    """As a run of the recipe would have left it."""
    config = portable(load_config(ROOT / "configs" / "papers" / f"{name}.yaml", [*AS_ELSEWHERE, f"seed={seed}"]))
    scores = {"sst": 0.5, "para": 0.7, "sts": 0.4}
    default = {
        **STAMP,
        "files": {},
        "sizes": SIZES,
        "scores": scores,
        "steps": 300,
        "seconds": 90.0,
        "precision": "bf16",
    }
    return Entry(row=name, seed=seed, config=config, **{**default, **values})


AS_ELSEWHERE = ["data.dir=/some/where", "encoder.pretrained=/else/where"]


def page_of(*lines: Line) -> str:
    return pages.page(lines, pages.all_recipes(lines))


def test_a_line_is_known_on_any_machine_and_written_as_it_was_read(tmp_path: Path) -> None:
    record = Record(tmp_path / "papers.jsonl")
    table = compact({"gradient/cosine/a~b": Curve(np.array([9, 19]), np.array([0.123456, np.nan]))}, bool, "gradient/")
    line = entry("A5", scores={"sst": 0.5, "sts": float("nan")}, curves=table)
    record.put(line)
    text = record.path.read_text()
    (again,) = record.entries()
    assert again.key == line.key == recipes([row_of("A5")], 1)[0].key
    assert again.curves == {"step": [9, 19], "gradient/cosine/a~b": [0.1235, None]} and '"step": [9, 19]' in text
    record.put(again)
    assert record.path.read_text() == text and "/else" not in text


def test_lines_are_in_the_order_of_the_rows_and_replaced(tmp_path: Path) -> None:
    record = Record(tmp_path / "papers.jsonl")
    for line in (entry("B0", 1), entry("A5"), entry("B0"), entry("A1"), entry("A5", steps=7)):
        record.put(line)
    assert [(line.row, line.seed) for line in record.lines()] == [("A1", 0), ("A5", 0), ("B0", 0), ("B0", 1)]
    assert record.entries()[1].steps == 7


def test_no_line_is_lost_when_many_write_at_once(tmp_path: Path) -> None:
    lines = [entry("A1", seed) for seed in range(12)]
    threads = [threading.Thread(target=Record(tmp_path / "papers.jsonl").put, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Record(tmp_path / "papers.jsonl").entries() == lines


def test_a_run_that_another_process_has_begun_is_left_to_it(settings: list[str], tmp_path: Path) -> None:
    import filelock

    runner = running.Runner(tmp_path, Record(tmp_path / "papers.jsonl"), None, False, float("inf"))
    with filelock.FileLock(tmp_path / "A1-seed0.lock"):
        assert runner.perform(recipes([row_of("A1")], 1, settings, 2)[0]) is None
    assert not (tmp_path / "A1-seed0").exists()


def test_a_record_is_of_one_set_of_files(tmp_path: Path) -> None:
    record = Record(tmp_path / "papers.jsonl")
    record.put(entry("A1", files={"sts-train.csv": "a" * 64}))
    text = record.path.read_text()
    record.put(entry("B0", files={"ids-sst-train.csv": "b" * 64}))
    with pytest.raises(
        UserError, match=r"^sts-train.csv: is not the one that A1 seed 0 of .* was run with \(SHA-256 c"
    ):
        record.put(entry("A2", files={"sts-train.csv": "c" * 64}))
    assert record.path.read_text().startswith(text) and len(record.lines()) == 2


def test_files_are_known_by_their_content(settings: list[str], tmp_path: Path) -> None:
    (data,) = (text.partition("=")[2] for text in settings if text.startswith("data.dir="))
    shutil.copytree(data, tmp_path / "data")
    config, other = (short("A1", [*settings, *more], 2) for more in ([], [f"data.dir={tmp_path / 'data'}"]))
    assert running.contents(config) == running.contents(other) and len(running.contents(config)) == 7
    assert identity(config) == identity(other)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(other))
    assert running.deviation(tmp_path / "run", config) == "" == running.deviation(tmp_path / "none", config)
    running._digest.cache_clear()  # as in another process
    (tmp_path / "data" / "sts-dev.csv").write_text("other")
    assert running.deviation(tmp_path / "run", config) == "sts-dev.csv"
    (tmp_path / "run" / "config.yaml").write_text("tasks: 3")
    assert "tasks: expected keys and values below it" in running.deviation(tmp_path / "run", config)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: line[:-9], "no JSON ("),
        (lambda line: "<<<<<<< HEAD", "no JSON ("),
        (lambda line: "[]", "the line: Input should be an object"),
        (lambda line: line.replace('"steps": 300', '"steps": "many"'), "steps: Input should be a valid integer"),
        (lambda line: line.replace('"steps": 300, ', ""), "steps: Field required"),
        (lambda line: line.replace('"steps"', '"stairs": 1, "steps"'), "stairs: Extra inputs are not permitted"),
        (lambda line: "\udcff", "no JSON ("),
        (lambda line: "[" * 100_000, "no JSON ("),
    ],
)
def test_a_damaged_line_is_told(
    damage: Callable[[str], str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "papers.jsonl")
    record.put(entry("A1"))
    record.put(entry("A2"))
    first, second = record.path.read_text().splitlines()
    record.path.write_text(f"{first}\n{damage(second)}\n", errors="surrogateescape")
    assert papers.main(["--report", "--record", str(record.path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"python -m benchmarks.papers: {record.path} line 2: {said}") and told.count("\n") == 1
    assert told.endswith("; restore it with git, or remove the line\n") and not (tmp_path / "papers.md").exists()
    record.path.write_text(f"{first}\n{first}\n")
    assert papers.main(["--report", "--record", str(record.path)]) == 2
    assert "line 2: A1 seed 0 for the second time; keep one of the two" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ the page


def test_every_row_has_its_sentence_and_c7_its_line() -> None:
    page = page_of(entry("C0-sst"))
    for name in (*NAMES, "C7"):
        assert f"\n- **{name}**" in page, name
    assert "standard error of an accuracy at most: sst .015" in page
    assert (
        "- **A1**: no finding of its own; measured against it: A2, A3, A4; not run; by the paper's scores: .467" in page
    )
    assert "run.dir=runs/papers`, then `make papers`): not run." in page
    assert "| [C1](../configs/papers/C1.yaml) |" in page and "\n1 of 121 runs are done." in page


@pytest.mark.parametrize(
    ("name", "examples", "sigma"),
    [
        ("A1", 300 * 32, "–"),  # one task: no round robin
        ("A4", 300 * 96, "30"),
        ("B2", 2 * 189 * 96, "–"),
        ("B3", 706 * 96, "353"),
        ("B5", 750 * 96, "25"),
        ("C4", 2118 * 32, "–"),
        ("C5", 706 * 96, "706"),
        ("D2", 900 * 32, "–"),
        ("D3", 300 * 32 + 300 * 96, "–"),
        ("E-adaptive", 1056 * 32, "–"),
    ],
)
def test_examples_are_counted_for_steps_differ(name: str, examples: int, sigma: str) -> None:
    sizes = {"sst": (8544, 1101), "para": (53183, 10051), "sts": (6040, 863), "nli": (27275, 0)}
    run = entry(name, sizes={task: sizes[task] for task in recipe(name).tasks})
    assert pages.examples(run) == pytest.approx(examples, rel=2e-3)
    assert pages.sigma(recipe(name)) == sigma
    assert f"| {pages.examples(run):,} | {sigma} | 1.5 |" in page_of(run)


def test_what_leans_on_the_encoders_training_is_named() -> None:
    """Learnt weights of a dot product and ranking, too, not only cosine heads; what concatenates does not."""
    told = next(line for line in page_of(entry("A1")).splitlines() if line.startswith("**Contamination:**"))
    names = told.rpartition(": ")[2].removesuffix(".").split(", ")
    assert {"A2", "A3", "A6", "A7", "A9", "B1", "B5", "C2", "C6", "D1", "D4", "D5-sts", "D6-dot-tune"} <= set(names)
    assert {"E-cosine", "E-uniform", "E-annealed", "E-adaptive"} <= set(names)
    assert not {"A1", "A4", "A5", "A8", "B0", "C0-sst", "C1", "D6-concat-probe", "E-linear", "E-mgda"} & set(names)


def test_what_no_paper_prints_is_not_called_theirs() -> None:
    page = page_of(entry("A1"))
    assert "(paper: +" not in page and "(paper: −" not in page and "; paper: " not in page
    assert "- **D6-concat-tune**" in page and "not run; no composite in the paper.\n" in page
    assert "- **C0-cfimdb**: no finding of its own; nothing is measured against it; not run; no such number" in page
    for printed in ("−.092", "−.434", ".187", "plain averages"):
        assert printed in page
    scores: pages.Scores = {name: {0: {"para": 0.7}} for name in ("A5", "A7")}
    claim = next(claim for claim in row_of("A7").claims if claim.metric == "para")
    said = pages.verdict(claim, row_of("A7"), scores)
    assert "(by the paper's scores: −.004, less than counts here): no difference" in said


def test_c_is_told_with_its_loss_and_its_cut() -> None:
    page = page_of(entry("A1"))
    assert "- **C3**, its STS loss: squared error (C names none) pulls a bare cosine to 1" in page
    assert f"so that it sees {706 / 1662:.0%} of C4's question pairs" in page


def test_precision_is_told_where_it_is_mixed() -> None:
    seeds = [entry("A5", 0), entry("A5", 1, precision="fp32", machine={"cpu": "D", "cores": 4}), entry("A5", 2)]
    assert "| .633 ± .000 | 2 bf16 + 1 fp32 | 300 | 15,000 | 30 | 1.5 |" in page_of(*seeds)
    assert "C, 2 cores, bf16: 2; D, 4 cores, fp32: 1; 2030-01-01, at c0ffee" in page_of(*seeds)
    assert "| .633 ± .000 | 2 | 300 |" in page_of(seeds[0], seeds[2])


def test_a_record_may_hold_more_seeds_than_are_run_by_default() -> None:
    assert "| 4 | 300 |" in page_of(*[entry("A5", seed) for seed in range(4)])


def test_what_is_no_recipe_any_more_is_left_out() -> None:
    old = entry("A5")
    config = {**old.config, "optimizer": {**old.config["optimizer"], "lr": 0.5}}
    unknown = {**old.config, "colour": "blue"}
    lines = [old.model_copy(update=values) for values in ({"config": config}, {"config": unknown, "seed": 1})]
    page = page_of(*lines, entry("A4").model_copy(update={"row": "A17", "config": config}))
    assert (
        "have changed since: A5 seed 0 (optimizer.lr); A5 seed 1 (this version cannot read it); A17 seed 0 (no such "
        "row and seed)."
    ) in page
    assert "\n0 of 121 runs are done." in page


def test_c7_is_told_from_its_search(tmp_path: Path) -> None:
    folder = tmp_path / "C7"
    (folder / "trials" / "0000").mkdir(parents=True)
    assert running.search_of(folder, None) is None
    (folder / "trials" / "0000" / "result.json").write_text("{}")
    corpus = synthetic.generate(tmp_path / "corpus", seed=0, train=4, dev=2)
    tokenizer = synthetic.train_tokenizer(["a river"], tmp_path / "tokenizer.json")
    shape = {"hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 8, "max_positions": 64}
    more = [f"data.dir={corpus}", f"encoder.shape={json.dumps(shape)}", f"encoder.tokenizer={tokenizer}"]
    config = load_config(ROOT / "configs" / "papers" / "C6.yaml", more)
    (folder / "base.yaml").write_text(to_yaml(config))
    (folder / "best.yaml").write_text("# Trial 0 of C7: composite 0.6543, sst 0.5 after 9.\n" + to_yaml(config))
    arguments = ["--out", str(tmp_path), "--record", str(tmp_path / "papers.jsonl"), "--budget", "1e-9", "--set", *more]
    assert papers.main(arguments) == 0
    text = (tmp_path / "papers.jsonl").read_text()
    (search,) = Record(tmp_path / "papers.jsonl").lines()
    assert isinstance(search, Search) and folder.is_dir()
    assert "are tried over 706 steps, in which 1e-5 moves little" in pages.search_told([search], config)
    assert pages.search_told([search], config).endswith(
        "another choice here, 0.0001 and .300, composite .654; 1 of 6 trials, one seed each, not decided."
    )
    assert "composite .654; 1 of 6 trials" in (tmp_path / "papers.md").read_text()
    assert papers.main(arguments) == 0 and (tmp_path / "papers.jsonl").read_text() == text
    assert "left out, the search varied another configuration (encoder." in pages.search_told([search], recipe("C6"))


def recorded(folder: Path, name: str, lines: list[dict[str, Any]]) -> RunRecord:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(recipe(name)))
    text = "".join(json.dumps({"step": 10 * n + 9, "time": 0.0, **line}) + "\n" for n, line in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text)
    return RunRecord(folder)


@pytest.mark.parametrize(
    ("losses", "said"),
    [([0.8, 4.2, 4.3], ": consistent with a collapse, no proof of one: "), ([0.8, 0.9, 4.3], "no lasting collapse.")],
)
def test_a_collapse_of_ranking_is_told(losses: list[float], said: str, tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", "A2", [{"loss/sts": loss} for loss in losses])
    sentence = pages.ranking(row_of("A2"), entry("A2", alike=running.alike(run)))
    assert sentence is not None and said in sentence
    assert f"at {np.mean(np.array(losses) > 4):.0%} of the logged steps" in sentence
    assert "the sts loss, huber with ranking, was ln 32 or more" in sentence
    assert f"- {sentence}" in page_of(entry("A2", alike=running.alike(run)))
    other = recorded(tmp_path / "other", "A4", [{"loss/sts": 9.0}])
    assert pages.ranking(row_of("A2"), entry("A4", alike=running.alike(other))) is None


def test_surgery_is_measured_against_the_plain_weights(tmp_path: Path) -> None:
    """Steps of one task do not count, nor those with a number that is not finite; the plain weight is 1 where the
    method sums, 1 / tasks where it averages. What the record keeps is enough for it.
    """
    gradients = np.array([[3.0, 0.0, 0.0], [-0.5, 2.0, 0.0]])  # sst, para
    norms, weights = np.linalg.norm(gradients, axis=1), np.array([1.1, 0.8])
    seen = {"gradient/norm/sst": norms[0], "gradient/norm/para": norms[1]}
    seen |= {"gradient/norm/combined": 1.0, "gradient/norm/heads": 2.0}  # as every step has them
    seen["gradient/cosine/sst~para"] = gradients[0] @ gradients[1] / norms.prod()
    one = {"gradient/weight/para": 1.0, "gradient/norm/para": 2.0}
    moved = np.linalg.norm((weights - 1) @ gradients) / np.linalg.norm(gradients.sum(axis=0))
    for name, share in (("C4", 1.0), ("A5", 0.5)):
        two = {**seen, "gradient/weight/sst": share * 1.1, "gradient/weight/para": share * 0.8}
        broken = {**two, "gradient/norm/sst": None, "not_finite": {"gradient/norm/sst": "inf"}}
        run = recorded(tmp_path / name, name, [two, one, broken])
        table = compact(run.curves, lambda tag: tag.startswith("gradient/"), "gradient/cosine/")
        assert table is not None and table["step"] == [9, 29]
        assert pages.surgery_moves(unpacked(table), share < 1) == pytest.approx([moved], rel=1e-3)
        assert pages.heads_share(unpacked(table)) == pytest.approx(4 / (4 + (norms**2).sum()), rel=1e-3)
        page = tmp_path / "docs" / "papers.md"
        pages.write_page(page, [entry(name, curves=table, steps=40)], pages.all_recipes([]))
        told = page.read_text()
        assert f"| {name} | sst~para | 2 | −.242 | −.242 … −.242 | −.242 … −.242 | 100% |" in told
        assert f"one step in 10): {name} 2 of 4.\n" in told
        assert "sst and para" in (tmp_path / "docs" / "papers" / "conflicts.svg").read_text()


def conflicting(**means: float) -> dict[str, dict[str, Curve]]:
    """Of rows with two tasks: cosines around these means, their standard error a bit over .01."""
    noise = np.array([-0.05, 0.05] * 10)
    tag, steps = "gradient/cosine/sst~sts", np.arange(20) * 10 + 9
    return {name: {tag: Curve(steps, mean + noise)} for name, mean in means.items()}


def test_a_conflict_is_a_mean_below_0_that_chance_does_not_explain() -> None:
    """Half the cosines of orthogonal gradients are negative too, and surgery moves these as well."""
    moves = {"A5": np.array([0.06, 0.26]), "C4": np.array([0.01, 0.02])}
    said = pages.surgery_told(conflicting(A5=-0.01, C4=-0.1), moves, {"A5": 0.2, "C4": 0.1})
    assert "in the mean: A5 16.0% (at most 26%), C4 1.5% (at most 2%). That alone shows no conflict" in said
    assert "Of 2 pairs, the mean lies below 0 with its whole interval for C4 sst~sts" in said
    assert "In A5 no pair conflicts by more than chance" in said and "in the median: A5 20%, C4 10%" in said
    said = pages.surgery_told(conflicting(A5=-0.01), moves, {"A5": 0.2})
    assert "for none" in said and "C4" not in said
    said = pages.surgery_told(conflicting(C4=-0.1), moves, {"C4": 0.1})
    assert "no pair conflicts" not in said and "A5" not in said


def test_few_steps_under_surgery_are_told() -> None:
    """Most of C4's have one task alone: they may undo whatever surgery did."""
    curves = conflicting(C4=-0.1, A5=0.0)
    said = pages.reach_told(curves, {"C4": entry("C4", steps=1662), "A5": entry("A5", steps=300)})
    assert "C4 20 of 166, A5 20 of 30. Less than half of them in C4 (none logged after step 200 of 1,662): " in said
    assert pages.reach_told(curves, {name: entry(name, steps=300) for name in curves}).endswith("A5 20 of 30.")


def test_without_arguments_the_places_beside_the_checkout_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(papers, "DATA", tmp_path / "data")
    monkeypatch.setattr(papers, "ENCODER", tmp_path / "minilm")
    for missing, says in (("data", "--data: no "), ("minilm", "--encoder: no ")):
        with pytest.raises(SystemExit):
            papers.main([])
        assert f"{says}{tmp_path / missing}; name " in capsys.readouterr().err
        (tmp_path / missing).mkdir()
    options = papers.parser().parse_args([])
    places = [f"data.dir={tmp_path / 'data'}", f"encoder.pretrained={tmp_path / 'minilm'}"]
    assert papers.places(papers.parser(), options) == places


def test_an_encoder_is_called_what_it_calls_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_name_or_path": "its/origin"}')
    assert running.name_of(tmp_path) == "its/origin"
    (tmp_path / "README.md").write_text("---\n---\n\n# all-MiniLM-L6-v2\nThis is\n")
    assert running.name_of(tmp_path) == "all-MiniLM-L6-v2"


def found(**values: list[float]) -> pages.Scores:
    return {row.replace("_", "-"): {seed: {"sts": v} for seed, v in enumerate(each)} for row, each in values.items()}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (
            [0.70, 0.71, 0.73],
            [0.60, 0.61, 0.62],
            "holds; +.103 sts against E-linear (95%: +.089 … +.118; 3 seeds).",
        ),
        ([0.50, 0.51, 0.52], [0.60, 0.61, 0.62], "does not hold; −.100"),
        ([0.60, 0.70, 0.50], [0.59, 0.62, 0.57], "not decided; +.007"),
        ([0.630, 0.640, 0.612], [0.60, 0.61, 0.60], "not decided; +.024"),  # 4 standard errors, of three seeds
        ([0.609, 0.620, 0.632], [0.60, 0.61, 0.62], "not decided; +.010"),  # above 0, but by enough to count?
        ([0.57, 0.59, 0.61], [0.60, 0.61, 0.62], "does not hold; −.020"),  # not better, whether worse or not
        ([0.602, 0.612, 0.622], [0.60, 0.61, 0.62], "no difference that counts; +.002"),  # however certain it is
        ([0.7], [0.6], "same direction, not decided; +.100 sts against E-linear (1 seed)"),
        ([0.70, 0.71], [0.60, 0.61], "same direction, not decided; +.100 sts against E-linear (2 seeds)"),
        ([0.5], [0.6, 0.6, 0.6], "other direction, not decided; −.100 sts against E-linear (1 seed)"),
        ([0.599], [0.6], "no difference that counts so far, not decided; −.001"),
        ([], [0.6], "not run"),
    ],
)
def test_verdicts_come_from_the_numbers(one: list[float], other: list[float], said: str) -> None:
    row = row_of("E-cosine")
    assert f": {said}" in pages.verdict(row.claims[0], row, found(E_cosine=one, E_linear=other))


@pytest.mark.parametrize(
    ("shift", "spread", "said"),
    [
        (0.000, 0.002, "no difference that counts"),
        (-0.030, 0.002, "does not hold"),
        (-0.004, 0.004, "not decided"),  # −.014 … +.006: no gain that counts, but as little as the paper's there may be
        (0.030, 0.002, "holds"),
    ],
)
def test_what_is_little_in_the_paper_is_refuted_by_the_other_sign(shift: float, spread: float, said: str) -> None:
    claim = next(claim for claim in row_of("A2").claims if claim.metric == "composite")
    scores: pages.Scores = {
        name: {seed: {"composite": 0.5 + (name == "A2") * (shift + (seed - 1) * spread)} for seed in range(3)}
        for name in ("A1", "A2")
    }
    assert f"+.005, less than counts here): {said}; " in pages.verdict(claim, row_of("A2"), scores)


def test_the_interval_is_scipy_s_paired_by_seed() -> None:
    one, other = [0.71, 0.74, 0.70, 0.72], [0.70, 0.71, 0.66, 0.71]
    differences = [a - b for a, b in zip(one, other, strict=True)]
    assert pages.interval(differences) == pytest.approx(stats.ttest_rel(one, other).confidence_interval(0.95))
    assert pages.interval([0.1, 0.1, 0.1]) == pytest.approx((0.1, 0.1))
    assert np.isnan(pages.interval([0.1])).all()


def test_seeds_are_compared_that_both_rows_have() -> None:
    """The seeds of a row say as much of luck as of the row: what only one of the two has is left out."""
    row, ours, theirs = row_of("E-cosine"), {0: 0.70, 1: 0.71, 2: 0.72}, {0: 0.60, 2: 0.62, 3: 0.99}
    scores: pages.Scores = {
        name: {seed: {"sts": value} for seed, value in of.items()}
        for name, of in (("E-cosine", ours), ("E-linear", theirs))
    }
    said = pages.verdict(row.claims[0], row, scores)
    assert said.endswith(": same direction, not decided; +.100 sts against E-linear (2 seeds).")
    del scores["E-linear"][0], scores["E-linear"][2]
    assert pages.verdict(row.claims[0], row, scores).endswith(": not run with the same seed.")


@pytest.mark.parametrize(
    ("shift", "spread", "said"),
    [
        (0.004, 0.001, "holds"),
        (0.006, 0.003, "not decided"),  # within the tolerance, but by chance for all one knows
        (-0.02, 0.008, "not decided"),
        (0.05, 0.004, "does not hold"),
        (-0.05, 0.004, "does not hold"),
    ],
)
@pytest.mark.parametrize("name", ["A5", "B5"])
def test_nothing_changes_only_where_chance_is_smaller_too(name: str, shift: float, spread: float, said: str) -> None:
    row = row_of(name)
    scores: pages.Scores = {row.claims[0].than: {seed: {"composite": 0.7} for seed in range(3)}}
    scores[name] = {seed: {"composite": 0.7 + shift + (seed - 1) * spread} for seed in range(3)}
    assert f"): {said}; " in pages.verdict(row.claims[0], row, scores)


def test_one_seed_decides_nothing() -> None:
    row = row_of("A5")
    scores: pages.Scores = {name: {0: {"composite": 0.7}} for name in ("A5", "A4")}
    assert "+.000): not decided; +.000 composite" in pages.verdict(row.claims[0], row, scores)


@pytest.mark.parametrize(("shift", "said"), [(-0.1, "holds"), (0.0, "holds"), (0.1, "does not hold")])
@pytest.mark.parametrize(("name", "metrics"), [("D5-para", {"sst", "sts"}), ("A9", {"composite"})])
def test_gaining_nothing_is_one_sided(name: str, metrics: set[str], shift: float, said: str) -> None:
    """D 5.4.2: without paraphrases the others do not get better; that they get worse agrees with it. A9: "no more"."""
    row = row_of(name)
    claims = [claim for claim in row.claims if claim.kind == "no better"]
    assert {claim.metric for claim in claims} == metrics
    for claim in claims:
        scores: pages.Scores = {claim.than: {}, name: {}}
        for seed, value in enumerate([0.499, 0.5, 0.501]):
            scores[claim.than][seed] = {claim.metric: value}
            scores[name][seed] = {claim.metric: value + shift}
        assert f": {said}; " in pages.verdict(claim, row, scores)


def test_the_page_tells_how_many_findings_are_tested() -> None:
    """Those with a difference of their own: none that is only told, and none of a row with itself."""
    tested = sum(claim.kind != "told" for row in ROWS for claim in row.claims) - 1  # C1 is C0-sst
    assert f"There are {tested} findings to test" in page_of(entry("A4"))
