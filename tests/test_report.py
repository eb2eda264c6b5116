"""The page is read back as a browser's parser reads it, and its numbers are counted again."""

from __future__ import annotations

import html.parser
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtbert.cli import main
from mtbert.config_files import load_config, to_yaml
from mtbert.figures import evaluation_figures
from mtbert.files import write_atomically
from mtbert.pages import run_pictures
from mtbert.record import RunRecord, Said, write_predictions
from mtbert.runs import Rank
from mtbert.tracking import Tracker

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
N = 40
EVIL = '<script>alert("no")</script> & <img src=x onerror=alert(1)>'


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the cells of every table."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        if self._inside in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the one table whose header begins so."""
        [rows] = [rows for rows in self.tables if rows[0][: len(header)] == list(header)]
        return rows[1:]


def said() -> Said:
    """Of sources web (even lines) and news, whose examples are right and wrong."""
    right_N = np.arange(N) % 2 == 0
    lengths_N = np.repeat([5, 9, 20, 21], N // 4)
    shares_NC = np.where(right_N[:, None], [0.1, 0.9], [0.8, 0.2])
    ids = np.array([f"r{n}" for n in range(N)])
    losses_N = np.where(right_N, 0.1, 1.0 + np.arange(N))
    lines_N = np.arange(N) + 3  # line 2 was left out
    return Said(ids, lines_N, lengths_N, np.ones(N), right_N.astype(float), losses_N, shares_NC)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One task whose last sentence, the worst error, would be a script if it were not escaped."""
    rows = ["\tid\tsentence\tsentiment\tsource", "0\tbroken"]
    for n in range(N):
        text = EVIL if n == N - 1 else f"sentence {n}"
        quoted = '"' + text.replace('"', '""') + '"'
        rows.append(f"{n}\tr{n}\t{quoted}\t1\t{'news' if n % 2 else 'web'}")
    (tmp_path / "dev.csv").write_text("\n".join(rows) + "\n")
    overrides = ["data.generate=null", f"data.dir={tmp_path}", "tasks.para=null", "tasks.sts=null"]
    overrides += ["tasks.sst.dev=dev.csv", "tasks.sst.classes=2", "tasks.sst.columns.source=source"]
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, overrides)))
    write_atomically(folder / "environment.json", '{"command": ["train", "a b"], "host": "<host>", "packages": {}}')
    with Tracker(folder, Rank(), 0, 10, quiet=True) as tracker:
        for step in range(9):
            tracker.scalars(step, {"loss/sst": 1.0})
        tracker.scalars(9, {"metric/sst/accuracy": 0.5, "metric/composite": 0.5, "loss/sst/dev": 1.0})
    write_predictions(folder, 10, {"sst": said()}, [10])
    return folder


def test_text_is_text_and_nothing_is_fetched_or_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"page: {run / 'report.html'}\n"
    page = Page(run / "report.html")
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "img", "pre"}
    allowed |= {"table", "tr", "th", "td"}
    assert {tag for tag, _ in page.elements} <= allowed
    for tag, attributes in page.elements:
        assert attributes.keys() <= {"lang", "charset", "http-equiv", "content", "name", "class", "alt", "src"}, tag
        assert (attributes.get("src") or "data:").startswith("data:")
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    worst = page.table("id", "sentence", "true")
    assert worst[0] == ["r39", EVIL, "1", "0", "0.2000", "40.0000"]
    assert (
        sum(tag == "img" for tag, _ in page.elements) == 5
    )  # scores, losses, development loss, confusion, reliability


def test_slices_errors_and_classes_are_counted_right(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(output), "--checkpoint", "latest"]) == 0
    page = Page(output)
    wrong = 1.0 + np.arange(1, N, 2)
    assert page.table("source") == [
        ["news", "20", "0.0000", f"{wrong.mean():.4f}"],
        ["web", "20", "1.0000", "0.1000"],
    ]
    lengths = page.table("tokens")
    halves = [["5 … 5", "10", "0.5000"], ["9 … 9", "10", "0.5000"], ["20 … 21", "20", "0.5000"]]
    assert [row[:3] for row in lengths] == halves
    assert page.table("class") == [
        ["0", "0", "0.0000", "0.0000", "0.0000"],
        ["1", "40", "1.0000", "0.5000", f"{2 / 3:.4f}"],
    ]
    errors = page.table("id", "sentence")
    assert [row[0] for row in errors] == [f"r{n}" for n in range(39, 0, -2)]
    assert [row[1] for row in errors[1:]] == [f"sentence {n}" for n in range(37, 0, -2)]


@pytest.mark.parametrize("ids", [True, False], ids=["found by id", "found by label"])
def test_classes_are_called_by_their_names(run: Path, tmp_path: Path, ids: bool) -> None:
    config = load_config(
        run / "config.yaml", ["tasks.sst.classes=[bad, good]"] + ["tasks.sst.columns.id=null"] * (not ids)
    )
    (run / "config.yaml").write_text(to_yaml(config))
    file = tmp_path / "dev.csv"
    file.write_text(file.read_text().replace("\t1\t", "\tgood\t"))
    assert main(["report", str(run)]) == 0
    page = Page(run / "report.html")
    assert [row[:2] for row in page.table("class")] == [["bad", "0"], ["good", "40"]]
    assert page.table("id", "sentence", "true")[0] == ["r39", EVIL, "good", "bad", "0.2000", "40.0000"]
    axes = evaluation_figures("sst", config.tasks["sst"], said())["confusion"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["bad", "good"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bad", "good"]


def test_where_no_example_has_a_loss_of_its_own_none_is_shown(run: Path, tmp_path: Path) -> None:
    """Loss mnrl: errors are by their distance."""
    columns = "columns: {text: [id, sentence], label: sentiment, id: id, source: source}"
    task = f"{{kind: pair_regression, train: a, dev: dev.csv, {columns}, head: {{kind: cosine}}, loss: mnrl}}"
    overrides = ["data.generate=null", f"data.dir={tmp_path}", "tasks.para=null", "tasks.sts=null"]
    overrides += ["tasks.sst=null", f"tasks.sst={task}"]
    (run / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, overrides)))
    with Tracker(run, Rank(), 0, 10, quiet=True) as tracker:
        tracker.scalars(9, {"metric/sst/pearson": 0.5, "metric/composite": 0.5})
    answers = replace(said(), predictions_N=np.arange(N) / N, losses_N=np.full(N, np.nan))
    write_predictions(run, 10, {"sst": replace(answers, probabilities_NC=np.empty((N, 0)))}, [10])
    assert main(["report", str(run)]) == 0
    page = Page(run / "report.html")
    content = (run / "report.html").read_text()
    assert "mean loss" not in content and not [
        cell for rows in page.tables for row in rows for cell in row if cell == "nan"
    ]
    assert "worst errors (farthest from the label)" in content
    assert page.table("id", "id", "sentence")[0] == ["r0", "r0", "sentence 0", "1.0000", "0.0000"]
    assert [len(row) for row in page.table("source")] == [3, 3]


def test_a_task_called_dev_has_a_training_loss(run: Path, tmp_path: Path) -> None:
    """Its tag is loss/dev; that of a development loss ends in /dev as well."""
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    with Tracker(folder, Rank(), 0, 10, quiet=True) as tracker:
        tracker.scalars(0, {"loss/dev": 1.0})
    assert [title for title, _ in run_pictures([RunRecord(folder)], ["dev"])] == ["Training loss"]


def test_without_the_data_it_says_so_and_does_without(run: Path, tmp_path: Path) -> None:
    (tmp_path / "dev.csv").unlink()
    assert main(["report", str(run)]) == 0
    page = Page(run / "report.html")
    assert "without texts and sources, for" in (run / "report.html").read_text()
    assert [row[0] for row in page.table("id", "true")][:2] == ["r39", "r37"]


@pytest.mark.parametrize(("named", "extra"), [(True, "9\tnew\tput in\t1\tweb"), (False, "9\tnew\tput in\t0\tweb")])
def test_texts_of_other_rows_are_not_shown(run: Path, tmp_path: Path, named: bool, extra: str) -> None:
    """A row that was put in moves all others; ids tell, and labels where there are no ids."""
    file, config = tmp_path / "dev.csv", run / "config.yaml"
    if not named:
        config.write_text(re.sub(r"(?m)^( +)id: id$", r"\1id: null", config.read_text()))
    assert main(["report", str(run)]) == 0
    assert Page(run / "report.html").table("id", "sentence") and Page(run / "report.html").table("source")
    head, broken, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, broken, extra, *rows]) + "\n")
    assert main(["report", str(run)]) == 0
    assert "dev.csv has changed: line 3 is not the example" in (run / "report.html").read_text()
    page = Page(run / "report.html")
    assert page.table("id", "true") and not [rows for rows in page.tables if rows[0][0] == "source"]


def test_what_a_run_need_not_hold(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record of its environment, sources that are not said or no text, a name that is not UTF-8; ~ after a `=`."""
    (run / "environment.json").unlink()
    overrides = ["data.generate=null", f"data.dir={tmp_path}", "tasks.para=null", "tasks.sts=null"]
    overrides += ["tasks.sst.dev=dev.jsonl", "tasks.sst.classes=2", "tasks.sst.columns.source=source"]
    (run / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, overrides)))
    rows = [{"id": f"r{n}", "sentence": "a", "sentiment": 1, "source": "\ud800" if n else None} for n in range(N)]
    del rows[1]["source"]
    (tmp_path / "dev.jsonl").write_text("\n\n" + "".join(json.dumps(row) + "\n" for row in rows))
    named = run.rename(run.with_name(os.fsdecode(b"caf\xe9")))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["report", str(named), "--output=~/page.html"]) == 0
    page = Page(tmp_path / "page.html")
    assert [row[:2] for row in page.table("source")] == [[r"\ud800", str(N - 2)], ["(empty)", "2"]]
    assert r"<title>caf\udce9</title>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere: no run folder"),
        (["n" * 300], "cannot be read: File name too long"),
        (["RUN", "--output", "/proc/nothing/page.html"], "/proc/nothing/page.html: cannot write it"),
        (["EMPTY"], "nothing was evaluated yet"),
    ],
)
def test_mistakes(
    run: Path, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((run / "config.yaml").read_text())
    places = {"RUN": str(run), "EMPTY": str(empty)}
    assert main(["report", *(places.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
