"""Sharded evaluation is the plain loop: same predictions on 1, 2 and 3 ranks as one example at a time."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Ranks
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import distributed as dist

from mtbert.cli import main
from mtbert.config import Config
from mtbert.config_files import load_config
from mtbert.encoder import EncoderShape
from mtbert.evaluate import Evaluation, evaluate_all
from mtbert.heads import MultiTaskModel
from mtbert.losses import predict
from mtbert.metrics import METRICS
from mtbert.packing import TOKENS_PER_BATCH, batches_by_length
from mtbert.runs import Rank
from mtbert.synthetic import VOCABULARY, train_tokenizer
from mtbert.tasks import Task, load_tasks, locate_tokenizer
from mtbert.trainer import evaluate_file, evaluate_run

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
LENGTH = 24
FEW = 2


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Four kinds of head: joint, two encodings compared, three, one text; and a task that is not scored."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = train_tokenizer([(corpus / f"{name}-train.csv").read_text() for name in VOCABULARY], folder / "t.json")
    data = ["data.generate=null", f"data.dir={corpus}", f"data.cache={folder}", f"encoder.tokenizer={tokenizer}"]
    triplets = (
        "{kind: triplets, train: nli-triplets.csv, columns: {text: [sent0, sent1, hard_neg]}, head: {kind: cosine}}"
    )
    tasks = [f"tasks.nli={triplets}", "tasks.nli.dev=nli-triplets.csv", f"tasks.unscored={triplets}"]
    return load_config(QUICKSTART, [*data, *tasks, "encoder.dropout=0.5", "tasks.sts.head.kind=relu_cosine"])


def build(config: Config) -> tuple[MultiTaskModel, list[Task]]:
    """The same model on every rank, with random weights under which examples differ."""
    tokenizer: Tokenizer = locate_tokenizer(config, config.data, None)
    shape = EncoderShape(tokenizer.get_vocab_size(), 16, 2, 2, 32, LENGTH)
    model = MultiTaskModel(shape, config.encoder, config.tasks, seed=1)
    tasks = load_tasks(config, config.data, tokenizer, LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)  # BERT's initialisation, under which all sentences are nearly alike
    return model, tasks


def first(task: Task, count: int) -> Task:
    """The task with only the first examples of its development set."""
    data = task.dev
    if data is None:
        return task
    few = replace(data, labels_N=data.labels_N[:count], lengths_NS=data.lengths_NS[:count])
    assert len(few) == count
    return replace(task, dev=few)


def sharded(rank: Rank, config: Config) -> list[tuple[list[Evaluation], float]]:
    """Of the whole development sets, and of their first two examples."""
    model, tasks = build(config)
    cpu = torch.device("cpu")
    return [evaluate_all(model, some, rank, cpu) for some in (tasks, [first(task, FEW) for task in tasks])]


def alone(config: Config, folder: Path) -> list[tuple[list[Evaluation], float]]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        return sharded(Rank(), config)
    finally:
        dist.destroy_process_group()


def one_by_one(config: Config) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64], list[list[float]]]]:
    """Predictions, losses and probabilities of each task's development set, an example at a time."""
    model, tasks = build(config)
    found = {}
    for task in tasks:
        predictions, losses, probabilities = [], [], []
        for index in range(len(task.dev or ())):
            batch = task.batch("dev", np.array([index]))
            with torch.no_grad():
                answers = model(task.name, batch.packed)
            predictions.append(float(predict(task.config, answers)[0]))
            each = task.example_losses(answers, batch.labels_B)
            losses.append(float(answers[0] if each is None else each[0]))
            positive = float(answers.flatten()[-1].sigmoid())
            shares = {"sst": answers[0].softmax(-1).tolist(), "para": [1 - positive, positive]}
            probabilities.append(shares.get(task.name, []))
        found[task.name] = np.array(predictions), np.array(losses), probabilities
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_gives_the_plain_loop_s_predictions(
    ranks: Ranks, config: Config, world: int, tmp_path: Path
) -> None:
    """With 2 examples for 3 ranks one has none, and still takes part."""
    answers = ranks(world, sharded, config) if world > 1 else [alone(config, tmp_path)]
    _, tasks = build(config)
    plain = one_by_one(config)
    for which, count in enumerate([None, FEW]):
        results, score = answers[0][which]
        scored = [task for task in tasks if task.name != "unscored"]
        for task, result in zip(scored, results, strict=True):
            predictions_N, losses_N, probabilities = (values[:count] for values in plain[task.name])
            np.testing.assert_allclose(result.predictions_N, predictions_N, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(result.probabilities_NC, probabilities, atol=1e-5)
            if task.name == "nli":
                assert np.isnan(result.losses_N).all()
            else:
                np.testing.assert_allclose(result.losses_N, losses_N, rtol=1e-4, atol=1e-5)
            assert result.loss == (None if task.name == "nli" else pytest.approx(losses_N.mean(), rel=1e-5))
            assert (result.task, result.metric) == (task.name, task.config.metric_kind)
            wanted = METRICS[result.metric](predictions_N, task.dev.labels_N[:count])
            assert result.score == pytest.approx(wanted, abs=1e-6)
        sst, para, sts, nli = (result.score for result in results)
        assert score == pytest.approx(np.mean([sst, para, (sts + 1) / 2, nli]))
        for others in answers[1:]:
            same, again = others[which]
            assert again == score
            for one, other in zip(results, same, strict=True):
                np.testing.assert_array_equal(one.predictions_N, other.predictions_N)
                assert (one.score, one.loss) == (other.score, other.loss)


def test_the_plain_loop_tells_examples_apart(config: Config) -> None:
    """Else the test above could not fail."""
    plain = one_by_one(config)
    assert len(plain.pop("unscored")[0]) == 0
    for predictions, losses, _ in plain.values():
        assert len(np.unique(predictions)) > 1
        assert len(np.unique(losses.round(4))) > 50


def test_a_model_that_broke_has_no_score(config: Config, tmp_path: Path) -> None:
    """Of a classifier's NaN the largest is class 0, which may well be right."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, tasks = build(config)
        next(model.parameters()).data.fill_(math.nan)
        results, score = evaluate_all(model, tasks, Rank(), torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert all(math.isnan(result.score) for result in results) and math.isnan(score)


# ------------------------------------------------------------------------------------------------ any file


DEV = {"sst": "ids-sst-dev.csv", "para": "quora-dev.csv", "joint": "quora-dev.csv", "sts": "sts-dev.csv"}


def test_the_development_file_scores_what_the_development_set_does(
    trained_run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit, by the task's metric and loss and in every answer; and the run folder stays as it is."""
    before = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
    step, results, _ = evaluate_run(trained_run, "latest")
    assert {result.task for result in results} == set(DEV)
    assert main(["evaluate", str(trained_run), "--checkpoint", "latest", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    for dev in results:
        file = str(corpus / DEV[dev.task])
        found_step, task, found = evaluate_file(trained_run, "latest", dev.task, file)
        assert (found_step, found.metric, found.score, found.loss) == (step, dev.metric, dev.score, dev.loss)
        for field in ("predictions_N", "losses_N", "probabilities_NC"):
            assert np.array_equal(getattr(found, field), getattr(dev, field)), field
        command = ["evaluate", str(trained_run), "--checkpoint", "latest", "--task", dev.task, "--file", file]
        assert main([*command, "--json"]) == 0
        of_file = json.loads(capsys.readouterr().out)
        scores = of_file["tasks"][dev.task].pop("scores")
        assert of_file == {
            "step": told["step"],
            "file": file,
            "examples": 60,
            "left_out": 0,
            "tasks": {dev.task: told["tasks"][dev.task]},
        }
        others = {kind: METRICS[kind] for kind in scores}
        assert next(iter(others)) == dev.metric and set(others) == set(task.config.metrics)
        labels_N = task.dataset("dev").labels_N
        assert scores == {kind: pytest.approx(metric(dev.predictions_N, labels_N)) for kind, metric in others.items()}
        assert main(command) == 0
        printed = capsys.readouterr().out
        title = f"Scores on {file} after step 6 (latest checkpoint): 60 examples"
        assert " ".join(printed.split()).startswith(f"{title} task metric score loss {dev.task} {dev.metric} ")
        for value in (*scores.values(), dev.loss):
            assert f" {value:.4f}" in printed
    assert {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()} == before


def test_a_file_is_scored_by_its_own_labels_and_says_what_it_leaves_out(
    trained_run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name is relative to where the command is typed, although the run has a folder for its data."""
    monkeypatch.chdir(tmp_path)
    header, *rows = (corpus / "quora-dev.csv").read_text().splitlines()
    assert header.endswith("\tis_duplicate")
    flipped = [f"{row[:-3]}{1 - int(float(row[-3:]))}" for row in rows]
    (tmp_path / "test.csv").write_text("\n".join([header, *flipped, "no\trow", rows[0][:-3]]) + "\n")
    command = ["evaluate", str(trained_run), "--task", "joint", "--json", "--file"]
    assert main([*command, str(corpus / "quora-dev.csv")]) == 0
    right = json.loads(capsys.readouterr().out)
    assert main([*command, "test.csv"]) == 0
    printed = capsys.readouterr()
    wrong = json.loads(printed.out)
    assert (wrong["file"], wrong["examples"], wrong["left_out"]) == ("test.csv", 60, 2)
    assert wrong["tasks"]["joint"]["score"] == pytest.approx(1 - right["tasks"]["joint"]["score"])
    assert printed.err.splitlines() == [
        f"mtbert: test.csv line 62: 2 fields instead of {header.count(chr(9)) + 1}",
        "mtbert: test.csv line 63: column 'is_duplicate': no label",
    ]


def test_somebody_else_s_run_is_scored_with_one_s_own_cache(
    trained_run: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, home, theirs = tmp_path / "run", tmp_path / "home", tmp_path / "a file" / "cache"
    shutil.copytree(trained_run, run)
    config = (run / "config.yaml").read_text()
    recorded = load_config(run / "config.yaml").data.cache
    (run / "config.yaml").write_text(config.replace(recorded, str(theirs)))
    theirs.parent.touch()  # root may write to every folder, but makes none in a file
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    assert main(["evaluate", str(run), "--task", "sst", "--json", "--file", str(corpus / "ids-sst-dev.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 60
    assert list((home / ".cache" / "mtbert" / "tokens").iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "sst"], "--task says whose examples --file holds; give both"),
        (["--file", "rows.csv"], "--task says whose examples --file holds; give both"),
        (["--task", "nli", "--file", "rows.csv"], "no task 'nli'; this run has sst, para, sts, joint"),
        (["--task", "sst", "--file", "row.csv"], "mtbert: row.csv: no such file; did you mean rows.csv?"),
        (["--task", "sst", "--file", "rows.csv"], "rows.csv: no column 'sentiment'; columns present: "),
        (["--task", "sts", "--file", "rows.csv"], "rows.csv line 2, column 'similarity': '7' is not a number from 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_file_that_cannot_be_scored_is_one_line(
    trained_run: Path,
    tmp_path: Path,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("id,sentence,sentence1,sentence2,similarity\n1,a,b,c,7\n")
    assert main(["evaluate", str(trained_run), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and told in printed.err


def test_batches_hold_every_example_once_by_length_and_no_more_tokens_than_allowed() -> None:
    rng = np.random.default_rng(0)
    for tokens_N in (rng.integers(3, 500, 3000), np.array([7]), np.array([20_000, 5, 30_000]), np.full(5000, 4)):
        batches = list(batches_by_length(tokens_N))
        order = np.concatenate(batches)
        assert sorted(order.tolist()) == list(range(len(tokens_N)))
        assert (np.diff(tokens_N[order]) >= 0).all()
        assert all(tokens_N[batch].sum() <= TOKENS_PER_BATCH or len(batch) == 1 for batch in batches)
        assert len(batches) <= 2 * tokens_N.sum() / TOKENS_PER_BATCH + 2  # and not one by one
