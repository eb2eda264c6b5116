"""Every row of the papers: its configuration loads, trains, evaluates, saves and resumes, on the generated corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import papers
from mtbert import synthetic
from mtbert.config import Config, load_config, to_yaml
from mtbert.heads import Head
from mtbert.manifest import find_checkpoint
from mtbert.record import RunRecord
from mtbert.runs import Rank, create_run
from mtbert.trainer import train
from tune.space import load_space

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs" / "papers").glob("*.yaml"))
PARTS = ("base", "A", "B")  # what rows are based on


NAMES = [row.name for row in papers.ROWS]


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
    return load_config(path, [*settings, papers.shortened(load_config(path, settings), steps)])


def test_every_row_has_its_configuration_and_the_other_way_round() -> None:
    assert {path.stem for path in CONFIGS} == {*NAMES, *PARTS}
    assert len(NAMES) == len(set(NAMES))
    required = [f"A{n}" for n in range(1, 10)] + [f"B{n}" for n in range(6)] + [f"C{n}" for n in range(1, 7)]
    assert {*required, "C0-sst", "C0-cfimdb", "D1", "D2", "D3", "D4", "D5-sst", "D5-para", "D5-sts"} <= set(NAMES)
    assert sum(name.startswith("D6") for name in NAMES) == 4
    for claim in (claim for row in papers.ROWS for claim in row.claims):
        assert claim.than in NAMES and claim.metric in (*papers.TASKS, "composite")


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
    row = next(row for row in papers.ROWS if row.name == "C1")
    sentence = papers.verdict(row.claims[0], row, {}, one_run=True)
    assert "(paper: +.139): cannot show; the configurations of C1 and C0-sst are equal" in sentence


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
    one, other = papers.identity(recipe("E-linear")), papers.identity(recipe("E-cosine"))
    assert {key for key in one if one[key] != other[key]} == {"tasks.sts.head.kind"}


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


def test_the_runner_goes_on_where_it_was_and_writes_the_page(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D1 and D6-dot-probe are one configuration and so one run; two seeds of rows with a finding, one of others."""
    data = next(text.partition("=")[2] for text in settings if text.startswith("data.dir="))
    arguments = ["--data", data, "--out", str(tmp_path / "runs"), "--page", str(tmp_path / "docs" / "papers.md")]
    arguments += ["--rows", "D1", "D6*probe", "--seeds", "1", "--steps", "2", "--set", *settings]
    assert papers.main(arguments) == 0
    folders = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["D1-seed0", "D6-concat-probe-seed0"]
    results = {folder: (folder / "result.json").stat().st_mtime_ns for folder in folders}
    page = (tmp_path / "docs" / "papers.md").read_text()
    assert "3 of 3 runs are done" in page and "| [D6-dot-probe](" in page and data not in page
    assert "beats concatenation on paraphrases (paper: +.013): " in page and "not decided" in page
    (tmp_path / "docs" / "papers.md").unlink()
    assert papers.main([*arguments, "--report"]) == 0
    assert (tmp_path / "docs" / "papers.md").read_text() == page
    assert results == {folder: (folder / "result.json").stat().st_mtime_ns for folder in folders}

    # what a run says of another recipe is not shown under this one's name, and nothing of it is touched
    assert papers.main([*arguments, "run.log_every=7", "engine.threads=2"]) == 0  # these change no score
    changed = [*arguments, "optimizer.head_lr=0.5", "tasks.sst.head.dropout=0.7"]
    capsys.readouterr()
    assert papers.main(changed) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{folders[0]}: holds a run whose configuration is not its recipe's" in said
    assert "(optimizer.head_lr, tasks.sst.head.dropout); remove it" in said and "likewise D6-concat-probe-seed0" in said
    assert papers.main([*changed, "--report"]) == 0
    page = (tmp_path / "docs" / "papers.md").read_text()
    assert "D1-seed0 (optimizer.head_lr, tasks.sst.head.dropout)" in page and "| [D1](" not in page
    shutil.rmtree(folders[1])
    (folders[0] / "result.json").unlink()  # as if it were stopped: it is not continued under another name either
    assert papers.main([*changed, "--report"]) == 0 and papers.main(changed) == 2
    assert results.keys() >= {path for path in (tmp_path / "runs").iterdir() if path.is_dir()} == {folders[0]}


def test_paths_that_lead_to_one_folder_are_one_recipe(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(*_with(tmp_path / "a" / ".." / "data"))))
    assert papers.deviation(tmp_path / "config.yaml", load_config(*_with(tmp_path / "data"))) is None
    assert papers.deviation(tmp_path / "config.yaml", load_config(*_with(tmp_path / "others"))) == "data.dir"
    assert papers.deviation(tmp_path / "none.yaml", load_config(*_with(tmp_path / "data"))) is None
    (tmp_path / "config.yaml").write_text("tasks: 3")
    assert papers.deviation(tmp_path / "config.yaml", load_config(*_with(tmp_path))) == "config.yaml cannot be read"


def _with(data: Path) -> tuple[Path, list[str]]:
    return ROOT / "configs" / "papers" / "A1.yaml", [f"data.dir={data}", "encoder.pretrained=MODEL"]


def test_every_row_has_its_sentence_and_c7_its_line(tmp_path: Path) -> None:
    settings = ["data.dir=DATA", "encoder.pretrained=MODEL"]
    runs = papers.runs_of(papers.ROWS, 1, tmp_path, settings, None)
    about = papers.About("COMMAND", "ENCODER", {"sst": (8544, 1101)}, papers.search_told(tmp_path, settings, "OUT"), {})
    page = papers.page(runs, about, tmp_path)
    for name in (*NAMES, "C7"):
        assert f"\n- **{name}**" in page, name
    assert "standard error of an accuracy at most: sst .015" in page
    assert "- **A1**: no finding of its own; measured against it: A2, A3, A4; not run; paper: .467." in page
    assert "run.dir=OUT`): not run." in page


def test_c7_is_told_from_its_search(tmp_path: Path) -> None:
    settings = ["data.dir=DATA", "encoder.pretrained=MODEL"]
    folder = tmp_path / "C7"
    (folder / "trials" / "0000").mkdir(parents=True)
    (folder / "trials" / "0000" / "result.json").write_text("{}")
    config = recipe("C6")
    (folder / "base.yaml").write_text(to_yaml(config))
    (folder / "best.yaml").write_text(
        "# Trial 0 of C7: composite 0.6543, sst 0.5 after 9 examples.\n" + to_yaml(config)
    )
    said = papers.search_told(tmp_path, settings, "OUT")
    assert said.endswith(
        "another choice here, 0.0001 and .300, composite .654; 1 of 6 trials, one seed each, not decided."
    )
    (folder / "base.yaml").write_text(to_yaml(recipe("C5")))
    assert "left out, the search there varied another configuration (tasks.sts.head.kind, tasks.sts.head.scale)" in (
        papers.search_told(tmp_path, settings, "OUT")
    )


def recorded(folder: Path, name: str, lines: list[dict[str, Any]]) -> RunRecord:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(recipe(name)))
    text = "".join(json.dumps({"step": 10 * n + 9, "time": 0.0, **line}) + "\n" for n, line in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text)
    return RunRecord(folder)


@pytest.mark.parametrize(("losses", "said"), [([0.8, 4.2, 4.3], "at 67% "), ([0.8, 0.9, 4.3], "no lasting collapse")])
def test_a_collapse_of_ranking_is_told(losses: list[float], said: str, tmp_path: Path) -> None:
    recorded(tmp_path / "run", "A2", [{"loss/sts": loss} for loss in losses])
    row = next(row for row in papers.ROWS if row.name == "A2")
    sentence = papers.ranking(papers.Run(row, 0, tmp_path / "run", [], recipe("A2")))
    assert sentence is not None and said in sentence and "ln 32" in sentence
    recorded(tmp_path / "other", "A4", [{"loss/sts": 9.0}])
    assert papers.ranking(papers.Run(row, 0, tmp_path / "other", [], recipe("A4"))) is None


def test_surgery_is_measured_against_the_plain_weights(tmp_path: Path) -> None:
    """Steps of one task do not count; the plain weight is 1 where the method sums, 1 / tasks where it averages."""
    gradients = np.array([[3.0, 0.0, 0.0], [-0.5, 2.0, 0.0]])  # sst, para
    norms, weights = np.linalg.norm(gradients, axis=1), np.array([1.1, 0.8])
    seen = {"gradient/norm/sst": norms[0], "gradient/norm/para": norms[1]}
    seen["gradient/cosine/sst~para"] = gradients[0] @ gradients[1] / norms.prod()
    one = {"gradient/weight/para": 1.0, "gradient/norm/para": 2.0}
    moved = np.linalg.norm((weights - 1) @ gradients) / np.linalg.norm(gradients.sum(axis=0))
    for name, share in (("C4", 1.0), ("A5", 0.5)):
        two = {**seen, "gradient/weight/sst": share * 1.1, "gradient/weight/para": share * 0.8}
        changes = papers.surgery_changes(recorded(tmp_path / name, name, [two, one]))
        assert sorted(changes[0]) == pytest.approx([0.1, 0.2]) and changes[1] == pytest.approx([moved])


def test_what_surgery_did_is_told_from_the_numbers() -> None:
    cosines, weights = np.array([-0.2, 0.1, 0.1, 0.2]), np.array([0.1, 0.2])
    much, little = (weights, np.array([0.08, 0.1])), (weights, np.array([0.01, 0.02]))
    said = papers.surgery_told({"A5": much, "C4": little}, cosines)
    assert "25% of the cosines lie below 0, the mean of their sizes is .150" in said
    assert (
        "in the mean by: A5 15.0% (at most 20%)" in said and "C4 1.5% (at most 2%). In A5 that is more than 5%" in said
    )
    assert "That is 5% or less everywhere" in papers.surgery_told({"C4": little}, cosines)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], 'make papers ARGS="--seeds 3 --jobs 1"'),
        (["--data", "/x", "--encoder", "/y", "--rows", "A5", "D*", "--seeds", "1"],
         "make papers ARGS=\"--data DATA --encoder MODEL --rows A5 'D*' --seeds 1 --jobs 1\""),
        (["--set", "optimizer.lr=1e-5", "data.cache=/z", "--steps", "9"],
         'make papers ARGS="--seeds 3 --jobs 1 --steps 9 --set optimizer.lr=1e-5 data.cache=CACHE"'),
        (["--set", 'surgery={"method": "sum"}'],
         "python -m benchmarks.papers --seeds 3 --jobs 1 --set 'surgery={\"method\": \"sum\"}'"),
    ],
)  # fmt: skip
def test_the_page_names_the_command_with_all_that_matters(arguments: list[str], command: str) -> None:
    assert papers.command_of(papers.parser().parse_args(arguments)) == command


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
    assert papers.name_of(tmp_path) == "its/origin"
    (tmp_path / "README.md").write_text("---\n---\n\n# all-MiniLM-L6-v2\nThis is\n")
    assert papers.name_of(tmp_path) == "all-MiniLM-L6-v2"


def found(**values: list[float]) -> dict[str, list[dict[str, float]]]:
    return {name.replace("_", "-"): [{"sts": value} for value in each] for name, each in values.items()}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ([0.70, 0.71, 0.72], [0.60, 0.61, 0.62], "holds; +.100 sts against E-linear (standard error .008, 3 seeds)"),
        ([0.50, 0.51, 0.52], [0.60, 0.61, 0.62], "does not hold; −.100"),
        ([0.60, 0.70, 0.50], [0.59, 0.62, 0.57], "not decided, within the spread of the seeds; +.007"),
        ([0.7], [0.6], "same direction, not decided; +.100 sts against E-linear (one seed)"),
        ([0.5], [0.6, 0.6], "other direction, not decided; −.100"),
        ([], [0.6], "not run"),
    ],
)
def test_verdicts_come_from_the_numbers(one: list[float], other: list[float], said: str) -> None:
    row = next(row for row in papers.ROWS if row.name == "E-cosine")
    assert said in papers.verdict(row.claims[0], row, found(E_cosine=one, E_linear=other))


def row_of(name: str) -> papers.Row:
    return next(row for row in papers.ROWS if row.name == name)


@pytest.mark.parametrize(
    ("shift", "spread", "said"),
    [
        (0.004, 0.001, "holds"),
        (0.009, 0.004, "not decided"),  # within the tolerance, but by chance for all one knows
        (-0.02, 0.02, "not decided"),
        (0.05, 0.004, "does not hold"),
        (-0.05, 0.004, "does not hold"),
    ],
)
@pytest.mark.parametrize("name", ["A5", "A9", "B5"])
def test_nothing_changes_only_where_chance_is_smaller_too(name: str, shift: float, spread: float, said: str) -> None:
    row = row_of(name)
    base = [0.7 - spread, 0.7, 0.7 + spread]
    scores = {row.claims[0].than: [{"composite": value} for value in base]}
    scores[name] = [{"composite": value + shift} for value in base]
    assert f"): {said}; " in papers.verdict(row.claims[0], row, scores)


def test_one_seed_decides_nothing() -> None:
    row = row_of("A5")
    scores = {"A5": [{"composite": 0.7}], "A4": [{"composite": 0.7}]}
    assert "changes nothing (paper: +.000): not decided; +.000 composite" in papers.verdict(row.claims[0], row, scores)


@pytest.mark.parametrize(("shift", "said"), [(-0.1, "holds"), (0.0, "holds"), (0.1, "does not hold")])
def test_gaining_nothing_is_one_sided(shift: float, said: str) -> None:
    """D 5.4.2: without paraphrases the others do not get better; that they get worse agrees with it."""
    row = row_of("D5-para")
    base = [0.499, 0.5, 0.501]
    for claim in (claim for claim in row.claims if claim.kind == "no better"):
        scores = {"D2": [{claim.metric: value} for value in base]}
        scores["D5-para"] = [{claim.metric: value + shift} for value in base]
        assert f": {said}; " in papers.verdict(claim, row, scores)
    assert {claim.metric for claim in row.claims if claim.kind == "no better"} == {"sst", "sts"}
