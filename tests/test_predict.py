"""Rows in, the same rows out with answers: against the model on one example at a time, and against evaluation."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from numpy.typing import NDArray

from mtbert import predict
from mtbert.cli import main
from mtbert.data import special_ids
from mtbert.errors import UserError
from mtbert.packing import pack
from mtbert.predict import ADDED, embed_file, predict_file
from mtbert.readers import read_table
from mtbert.trained import Trained, load_run
from mtbert.trainer import evaluate_run

ROOT = Path(__file__).parent.parent
TASKS = {"sst": "ids-sst-dev.csv", "para": "quora-dev.csv", "joint": "quora-dev.csv", "sts": "sts-dev.csv"}


@pytest.fixture(scope="module")
def run(trained_run: Path) -> Trained:
    return load_run(trained_run, "latest")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small file has many."""
    monkeypatch.setattr(predict, "WINDOW_ROWS", 7)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def alone(run: Trained, task: str, texts: Sequence[str]) -> NDArray[Any]:
    """The head's answer to one example, put together by hand."""
    cls_id, sep_id = special_ids(run.tokenizer)
    ids = [run.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    if run.config.tasks[task].head.kind == "joint":
        first, second = ids
        packed = pack([np.array([cls_id, *first, sep_id, *second, sep_id])], [len(first) + 2])
    else:
        packed = pack([np.array([cls_id, *each, sep_id]) for each in ids])
    with torch.no_grad():
        return np.atleast_1d(run.model(task, packed).numpy().squeeze())


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("task", TASKS)
def test_every_row_comes_back_in_its_place_with_the_answer_of_the_model(
    run: Trained, corpus: Path, tmp_path: Path, task: str
) -> None:
    out = tmp_path / "out.csv"
    report = predict_file(run, task, str(corpus / TASKS[task]), str(out))
    given, found = read(corpus / TASKS[task]), read(out)
    assert (report.rows, report.unanswered, len(found)) == (len(given), 0, len(given))
    assert len({row["score"] for row in found}) > len(found) / 2  # else order could not be told
    kind = run.config.tasks[task]
    for before, after in zip(given, found, strict=True):
        assert {name: after[name] for name in before} == before
        answers = alone(run, task, [before[column] for column in kind.columns.text])
        if len(answers) > 1:
            shares = np.exp(answers - answers.max()) / np.exp(answers - answers.max()).sum()
            expected = [answers.argmax(), answers.max(), shares.max()]
        elif kind.kind == "pair_classification":
            share = 1 / (1 + np.exp(-answers[0]))
            expected = [share >= 0.5, answers[0], max(share, 1 - share)]
        else:
            expected = [min(max(answers[0], 0), 5), answers[0]]
            assert after["probability"] == ""
        got = [float(after[name]) for name in ADDED[: len(expected)]]
        np.testing.assert_allclose(got, np.array(expected, float), atol=1e-5)
        assert after["error"] == ""


def test_predictions_are_those_that_evaluation_scores(
    run: Trained, trained_run: Path, corpus: Path, tmp_path: Path
) -> None:
    for result in evaluate_run(trained_run, "latest")[1]:
        predict_file(run, result.task, str(corpus / TASKS[result.task]), str(tmp_path / "out.csv"))
        found = [float(row["prediction"]) for row in read(tmp_path / "out.csv")]
        np.testing.assert_allclose(found, result.predictions_N, atol=1e-5)


def test_every_form_gives_the_same_answers(run: Trained, corpus: Path, tmp_path: Path) -> None:
    rows = read(corpus / "sts-dev.csv")[:20]
    columns = list(rows[0])
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *(row.values() for row in rows)])
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row | {"extra": [1, None]}) + "\n" for row in rows))
    predict_file(run, "sts", str(corpus / "sts-dev.csv"), str(tmp_path / "tabs.csv"))
    predict_file(run, "sts", str(tmp_path / "in.csv"), str(tmp_path / "commas.csv"))
    predict_file(run, "sts", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    expected = [float(row["score"]) for row in read(tmp_path / "tabs.csv")[:20]]
    with (tmp_path / "commas.csv").open(newline="") as file:
        commas = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in commas] == [[*columns, *ADDED]] * 20
    assert all(line["extra"] == [1, None] and line["probability"] is None for line in lines)
    assert [row["id"] for row in commas] == [line["id"] for line in lines] == [row["id"] for row in rows]
    np.testing.assert_allclose([float(row["score"]) for row in commas], expected, atol=1e-5)
    np.testing.assert_allclose([line["score"] for line in lines], expected, atol=1e-5)


def test_classes_that_have_names_are_answered_by_them(run: Trained, corpus: Path, tmp_path: Path) -> None:
    file, names = str(corpus / TASKS["sst"]), ["awful", "poor", "so so", "good", "great"]
    task = run.config.tasks["sst"].model_copy(update={"classes": names})
    named = replace(run, config=run.config.model_copy(update={"tasks": {**run.config.tasks, "sst": task}}))
    predict_file(run, "sst", file, str(tmp_path / "numbers.csv"))
    predict_file(named, "sst", file, str(tmp_path / "names.csv"))
    numbers, found = read(tmp_path / "numbers.csv"), read(tmp_path / "names.csv")
    assert found == [{**row, "prediction": names[int(row["prediction"])]} for row in numbers]
    (tmp_path / "in.jsonl").write_text(json.dumps({"sentence": numbers[0]["sentence"]}) + "\n")
    predict_file(named, "sst", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == found[0]["prediction"]
    with pytest.raises(UserError, match="--submission: the course's classes are numbers, and this task's have names"):
        predict_file(named, "sst", file, str(tmp_path / "s.csv"), submission=True)


BAD = 'id\tsentence\nr1\tgood film\nr2\ttoo\tmany\nr3\t  \nr4\t"never\tclosed\nr5\t\x01\nr6\tdull\n'


def test_a_row_that_cannot_be_answered_keeps_its_place_with_the_reason(run: Trained, tmp_path: Path) -> None:
    (tmp_path / "bad.tsv").write_text(BAD)
    report = predict_file(run, "sst", str(tmp_path / "bad.tsv"), str(tmp_path / "out.tsv"))
    found = read(tmp_path / "out.tsv")
    assert [row["id"] for row in found] == ["r1", "r2", "r3", "r4", "r5", "r6"]
    assert [bool(row["prediction"]) for row in found] == [True, False, False, False, False, True]
    assert [row["error"].partition(" (")[0] for row in found] == [
        "",
        "3 fields instead of 2: r2\ttoo\tmany",
        "column 'sentence': the text is empty",
        'a quote is opened and not closed: r4\t"never\tclosed',
        "nothing in the text is a wordpiece",
        "",
    ]
    assert (report.rows, report.unanswered) == (6, 4)
    assert report.troubles[0] == f"{tmp_path}/bad.tsv line 3: 3 fields instead of 2"
    lines = ['{"sentence": "good"}', "{", '{"sentence": 3}', '{"text": "x"}', '{"sentence": "\\ud800"}', "[]"]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    predict_file(run, "sst", str(tmp_path / "bad.jsonl"), str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(set(ADDED) < set(row) for row in rows)
    assert rows[0]["error"] is None and rows[1]["prediction"] is None
    assert rows[1]["error"].endswith(": {") and rows[5]["error"].endswith(": []")
    assert [row["error"].partition(": ")[0] for row in rows[1:]] == [
        "not JSON",
        "column 'sentence'",
        "no key 'sentence'",
        "column 'sentence'",
        "a JSON list instead of an object",
    ]
    assert rows[1]["line"] == 2 and rows[4]["sentence"] == "\ud800"


@pytest.mark.parametrize("bad", ["q\tonly one text\n", "q\t\tno first text\n"])
def test_a_window_without_a_usable_row(run: Trained, tmp_path: Path, bad: str) -> None:
    (tmp_path / "in.tsv").write_text("id\tsentence1\tsentence2\n" + bad)
    report = predict_file(run, "joint", str(tmp_path / "in.tsv"), str(tmp_path / "out.tsv"))
    assert (report.rows, report.unanswered, len(read(tmp_path / "out.tsv"))) == (1, 1, 1)
    assert len(run.answer("joint", run.tokenise([])).predictions_N) == 0


def test_fields_come_back_as_they_were(run: Trained, tmp_path: Path) -> None:
    fields = ["a\rb", "a\nb", "a\tb", 'a"b', "a\r\nb"]
    rows = [[name, "good film"] for name in fields]
    with (tmp_path / "in.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows([["id", "sentence"], *rows])
    predict_file(run, "sst", str(tmp_path / "in.tsv"), str(tmp_path / "out.tsv"))
    assert [row["id"] for row in read(tmp_path / "out.tsv")] == fields


def test_a_window_is_bounded_whatever_its_rows_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "WINDOW_CHARACTERS", 1000)
    lines = [json.dumps({"sentence": "good", "more": list(range(100))})] * 6 + ["{" + "x" * 400] * 6
    rows = read_table(io.BytesIO("\n".join(lines).encode()), "jsonl", "x").rows
    assert [len(window) for window in predict._windows(rows)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("task", "header"),
    [
        ("sst", "id \t Predicted_Sentiment "),
        ("para", "id \t Predicted_Is_Paraphrase "),
        ("sts", "id \t Predicted_Similiary "),
    ],
)
def test_submission_is_as_the_course_writes_it(
    run: Trained, corpus: Path, tmp_path: Path, task: str, header: str
) -> None:
    predict_file(run, task, str(corpus / TASKS[task]), str(tmp_path / "rows.csv"))
    predict_file(run, task, str(corpus / TASKS[task]), str(tmp_path / "out.csv"), submission=True)
    first, *lines = (tmp_path / "out.csv").read_text().split("\n")
    assert first == header and lines.pop() == ""
    rows = read(tmp_path / "rows.csv")
    shown = {"sst": str, "para": lambda text: f"{text}.0", "sts": str}[task]
    assert lines == [f"{row['id']} , {shown(row['prediction'])} " for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("in.tsv", "id\tsentence\n1\tgood\n2\t \n", "line 3: column 'sentence': the text is empty; a submission"),
        ("in.tsv", "id\tsentence\n\tgood\n", "line 2: 'id' is empty; a submission needs"),
        (
            "in.jsonl",
            '{"id": 1, "sentence": "good"}\n{"sentence": "bad"}\n',
            "line 2: 'id' is empty; a submission needs",
        ),
    ],
)
def test_a_submission_is_whole_or_not_there(run: Trained, tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        predict_file(run, "sst", str(tmp_path / name), str(tmp_path / "out.csv"), submission=True)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_the_course_s_own_test_file(run: Trained, data_dir: Path, tmp_path: Path) -> None:
    report = predict_file(run, "sts", str(data_dir / "sts-test-student.csv"), str(tmp_path / "o"), submission=True)
    assert (report.rows, report.unanswered) == (1725, 0)
    assert len((tmp_path / "o").read_text().splitlines()) == 1726


# ------------------------------------------------------------------------------------------------ vectors


def test_vectors_are_those_of_single_sentences(run: Trained, corpus: Path, tmp_path: Path) -> None:
    rows = read(corpus / "ids-sst-dev.csv")
    long = " ".join(row["sentence"] for row in rows)  # is cut
    lines = [{"id": row["id"], "sentence": row["sentence"]} for row in rows] + [{"id": "l", "sentence": long}]
    lines.insert(3, {"id": "e", "sentence": ""})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = embed_file(run, str(path), tmp_path / "out.npy")
    embed_file(run, str(path), tmp_path / "out.parquet")
    vectors = np.load(tmp_path / "out.npy")
    assert vectors.shape == (len(lines), 16) and vectors.dtype == np.float32 and report.unanswered == 1
    assert np.isnan(vectors[3]).all()
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["id"] for row in table] == [line["id"] for line in lines]
    assert (table[3]["vector"], table[3]["error"]) == (None, "column 'sentence': the text is empty")
    cls_id, sep_id = special_ids(run.tokenizer)
    for line, vector, row in zip(lines, vectors, table, strict=True):
        if not line["sentence"]:
            continue
        ids = run.tokenizer.encode(line["sentence"], add_special_tokens=False).ids[: run.max_length - 2]
        with torch.no_grad():
            expected = run.model.encoder.sentence_vectors(pack([np.array([cls_id, *ids, sep_id])]), "mean")[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
        np.testing.assert_allclose(row["vector"], expected, atol=1e-5)
        assert row["text"] == line["sentence"]


def test_the_text_of_json_lines_goes_by_the_keys_of_the_first_good_row(run: Trained, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{\n{"id": 1, "text": "good"}\n')
    assert embed_file(run, str(tmp_path / "text.jsonl"), tmp_path / "out.npy").unanswered == 1
    assert np.isfinite(np.load(tmp_path / "out.npy")[1]).all()
    (tmp_path / "none.jsonl").write_text('{"id": 1, "txt": "good"}\n')
    with pytest.raises(UserError, match=r"which column is the text\? --text NAME; columns present: id, txt"):
        embed_file(run, str(tmp_path / "none.jsonl"), tmp_path / "out.npy")
    with pytest.raises(UserError, match=r"no column 'sentence'; columns present: 'id', 'txt'"):
        predict_file(run, "sst", str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl"))


def test_no_rows_give_no_vectors(run: Trained, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\n")
    embed_file(run, str(tmp_path / "in.csv"), tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").shape == (0, 16)


# ------------------------------------------------------------------------------------------------ command line


def test_a_pipe_has_answers_before_its_end(trained_run: Path, corpus: Path) -> None:
    """More than one window goes in, and answers come out while the pipe stays open."""
    rows = read(corpus / "ids-sst-dev.csv")
    command = [sys.executable, "-m", "mtbert", "predict", str(trained_run), "--task", "sst", "-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=-1, text=True)
    assert process.stdin and process.stdout
    process.stdin.write("sentence\tid\n" + "".join(f"{rows[i % 60]['sentence']}\t{i}\n" for i in range(4200)))
    process.stdin.flush()
    lines = [process.stdout.readline() for _ in range(1 + 4096)]
    assert process.poll() is None
    rest, told = process.communicate()
    found = list(csv.DictReader(io.StringIO("".join(lines) + rest), delimiter="\t"))
    assert [row["id"] for row in found] == [str(i) for i in range(4200)]
    assert len({row["score"] for row in found[:60]}) > 30
    assert all(
        float(row["score"]) == pytest.approx(float(found[i % 60]["score"]), abs=1e-5) for i, row in enumerate(found)
    )
    assert process.returncode == 0 and told.startswith("mtbert: 4,200 rows, ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "nli"], r"no task 'nli'; this run has sst, para, sts, joint"),
        (["--task", "para"], r"no column 'sentence1'; columns present: 'id', 'sentence'; --text names the right one"),
        (["--task", "sst", "--text", "a", "b"], r"--text: the task takes 1 text column"),
        (["--task", "sst", "--text", "txt"], r"no column 'txt'"),
        (["--task", "sst", "--out", "nowhere/x"], r"--out nowhere/x: its folder does not exist"),
        (["--task", "sst", "--out", "~nobody-here/x"], r"--out ~nobody-here/x: its folder does not exist"),
        (["--task", "sst", "--out", "x" * 256], r": File name too long"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    trained_run: Path,
    tmp_path: Path,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.tsv").write_text("id\tsentence\n1\tgood\n")
    out = [] if "--out" in arguments else ["--out", "out.tsv"]
    assert main(["predict", str(trained_run), "in.tsv", *arguments, *out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error
    assert list(Path().iterdir()) == [Path("in.tsv")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("id\tsentence\tscore\n1\tgood\t3\n", "has a column 'score' already; rename it first"),
        ("", "the file is empty; its first line must name the columns"),
        ("sentence\tsentence\n", "column 'sentence' occurs twice"),
        (b"id\tsentence\n1\tgood\n2\t\xff\n", "line 3, column 'sentence': byte 0xff is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_leaves_nothing(run: Trained, tmp_path: Path, content: Any, told: str) -> None:
    (tmp_path / "in").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        predict_file(run, "sst", str(tmp_path / "in"), str(tmp_path / "out"))
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    with pytest.raises(UserError, match="Parquet cannot be read"):
        predict_file(run, "sst", "x.parquet", "-")
    with pytest.raises(UserError, match=r"nowhere: No such file"):
        predict_file(run, "sst", str(tmp_path / "nowhere"), "-")
    with pytest.raises(UserError, match=r"~nobody-here/x: No such file"):
        predict_file(run, "sst", "~nobody-here/x", "-")
    with pytest.raises(UserError, match=r"/proc/self/mem: cannot be read: Input/output error"):
        predict_file(run, "sst", "/proc/self/mem", "-")


@pytest.mark.parametrize("key", ADDED)
def test_keys_that_the_answer_needs_are_not_overwritten(run: Trained, tmp_path: Path, key: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"sentence": "good"}\n' + json.dumps({"sentence": "good", key: "mine"}) + "\n")
    with pytest.raises(UserError, match=f"line 2: has a key '{key}' already; rename it first"):
        predict_file(run, "sst", str(tmp_path / "in.jsonl"), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [tmp_path / "in.jsonl"]


def test_answers_do_not_replace_what_they_answer(run: Trained, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sentence\na\n")
    (tmp_path / "link.npy").symlink_to("rows.csv")
    rows = str(tmp_path / "rows.csv")
    for answer, out in ((lambda out: predict_file(run, "sst", rows, out), rows),
                        (lambda out: embed_file(run, rows, Path(out)), str(tmp_path / "link.npy"))):  # fmt: skip
        with pytest.raises(UserError, match=f"--out {out}: is the file that is read; name another"):
            answer(out)
    assert (tmp_path / "rows.csv").read_text() == "sentence\na\n"


def test_an_id_that_is_no_text_to_parquet(run: Trained, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "x\\ud800", "sentence": "a"}\n{"id": 7, "sentence": "a"}\n')
    assert embed_file(run, str(tmp_path / "rows.jsonl"), tmp_path / "v.parquet").unanswered == 0
    assert pyarrow.parquet.read_table(tmp_path / "v.parquet")["id"].to_pylist() == ["x\\ud800", "7"]


def test_a_link_stays_one_and_a_pipe_is_written_to(run: Trained, tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_text("id\tsentence\n1\tgood\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "real").write_text("old")
    (tmp_path / "link").symlink_to("deep/real")
    predict_file(run, "sst", str(tmp_path / "in.tsv"), str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    expected = (tmp_path / "deep" / "real").read_text()
    assert expected.startswith("id\tsentence\tprediction")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    predict_file(run, "sst", str(tmp_path / "in.tsv"), str(tmp_path / "pipe"))
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 10_000).decode() == expected
    os.close(reader)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "in.tsv", "link", "pipe", "real"]


def test_what_is_read_through_a_redirection_is_not_replaced(trained_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_text("id\tsentence\n1\tgood\n")
    command = [sys.executable, "-m", "mtbert", "predict", str(trained_run), "--task", "sst", "-", "--out", str(source)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with source.open() as file:
        done = subprocess.run(command, env=environment, stdin=file, stdout=-1, stderr=-1, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"mtbert: --out {source}: is the file that is read; name another\n"
    assert source.read_text() == "id\tsentence\n1\tgood\n"


def test_a_full_disk_behind_stdout(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_text("id\tsentence\n1\tgood\n")
    command = [sys.executable, "-m", "mtbert", "predict", str(trained_run), "--task", "sst", str(tmp_path / "in.tsv")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (2, "mtbert: stdout: cannot be written: No space left on device\n")
