"""What `data check` finds in files, and what `data fetch` brings from a stand-in hub."""

from __future__ import annotations

import http.server
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub import serving, stand_in_hub, use_hub
from huggingface_hub import close_session

from mtbert.cli import main
from mtbert.config import DataConfig
from mtbert.config_files import load_config
from mtbert.data import load_dataset, load_tokenizer, locate_file
from mtbert.datasets import SOURCES, Source, _rewritten, check, fetch, wanted_by, wanted_files
from mtbert.errors import UserError
from mtbert.pretrained import load_pretrained
from mtbert.readers import Row, read_rows

ROOT = Path(__file__).parent.parent
COMMIT = "a" * 40


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_what_is_in_a_file(tmp_path: Path) -> None:
    lines = ["a b", "A  b", "c d e", "c d e", "f"]
    rows = [f"{text}\t{label}" for text, label in zip(lines, ["1", "1.0", "0", "2", "2"], strict=True)]
    path = write(tmp_path / "rows.tsv", "sentence\tlabel", *rows, "too\tmany\tfields", " \t1", "g\t")
    [found], overlaps = check(wanted_files([path], None, None))
    assert (found.rows, found.left_out, found.duplicates, found.conflicting) == (5, 3, 2, 1)
    assert found.labels == {"0": 1, "1": 2, "2": 2}
    assert found.words == {"mean": 2.2, "p95": 3, "longest": 3}
    assert found.reasons == [
        "line 7: 3 fields instead of 2",
        "line 8: column 'sentence': the text is empty",
        "line 9: column 'label': no label",
    ]
    assert overlaps == []


def test_a_label_too_large_for_a_number_is_a_label(tmp_path: Path) -> None:
    huge = "1" + "0" * 400
    path = write(tmp_path / "rows.jsonl", f'{{"text": "a", "label": {huge}}}', '{"text": "b", "label": 1}')
    [found], _ = check(wanted_files([path], None, None))
    assert (found.rows, found.labels) == (2, {"1": 1, "inf": 1})


def test_labels_are_told_apart_and_counted(tmp_path: Path) -> None:
    rows = ["a,1234567", "a,1234568", "b,0", "b,-0", "b,-0.0"]
    [found], _ = check(wanted_files([write(tmp_path / "few.csv", "text,label", *rows)], None, None))
    assert found.labels == {"0": 3, "1234567": 1, "1234568": 1}
    assert (found.duplicates, found.conflicting) == (3, 1)
    rows = [f"w{n},{n / 8}" for n in range(1, 100)] + ["x,nan", "y,NaN", "z,-inf"]
    [found], _ = check(wanted_files([write(tmp_path / "many.csv", "text,label", *rows)], None, None))
    assert found.labels == {"lowest": 0.125, "mean": 6.25, "highest": 12.375, "nan": 2, "-inf": 1}


def test_overlaps_between_files_and_columns_by_their_names(tmp_path: Path) -> None:
    first = write(tmp_path / "one.csv", "question1,question2,is_duplicate", "a,b,1", "c,d,0", "c,d,0")
    second = write(
        tmp_path / "two.jsonl", '{"sentence1": "C", "sentence2": "d"}', '{"sentence1": "x", "sentence2": "d"}'
    )
    third = write(tmp_path / "three.csv", "text", "a")
    found, overlaps = check(wanted_files([first, second, third], None, None))
    assert [(each.texts, each.label) for each in found] == [
        (["question1", "question2"], "is_duplicate"),
        (["sentence1", "sentence2"], None),
        (["text"], None),
    ]
    assert [(overlap.first, overlap.second, overlap.rows) for overlap in overlaps] == [(first, second, 1)]
    with pytest.raises(UserError, match=r"which column is the text\? --text NAME"):
        wanted_files([write(tmp_path / "four.csv", "words,number", "a,1")], None, None)


def test_the_files_of_a_configuration(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(ROOT / "configs" / "cs224n.yaml"), "--set", f"data.dir={corpus}"]
    assert main(["data", "check", *config, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["rows"] for each in told["files"]] == [200, 60] * 3
    assert len(told["overlaps"]) == 3  # each task's training with its development set
    assert main(["data", "check", *config]) == 0
    assert re.search(
        r"ids-sst-train\.csv: 200 rows \(texts sentence; label sentiment\)\n  labels +0: ", capsys.readouterr().out
    )
    assert main(["data", "check"]) == 2
    for ignored in ([*config, "--text", "sentence"], [*config, "--label", "x"], ["rows.csv", "--set", "seed=1"]):
        capsys.readouterr()
        assert main(["data", "check", *ignored]) == 2
        assert re.fullmatch("mtbert: --(text|set).*leave .* out, or .*\n", capsys.readouterr().err)
    with pytest.raises(UserError, match="the corpus is generated"):
        wanted_by(load_config(ROOT / "configs" / "quickstart.yaml"))


def test_triplets_and_files_of_the_hub_are_checked_as_they_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "nli.csv", "a,b,c", "x,y,z")
    config = tmp_path / "config.yaml"
    remote = "hub:some-org/topics/folder/rows.csv"
    config.write_text(
        f"data: {{dir: {tmp_path}}}\nencoder: {{pretrained: MODEL}}\ntasks:\n"
        "  nli: {kind: triplets, train: nli.csv, columns: {text: [a, b, c]}, head: {kind: cosine}}\n"
        f"  topic: {{kind: classification, train: '{remote}', dev: '{remote}', columns: {{text: [text]}}}}\n"
    )
    with stand_in_hub(
        {"datasets/some-org/topics": {COMMIT: {"folder/rows.csv": b"text,label\na,1\nb,0\n"}}}
    ) as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        found, overlaps = check(wanted_by(load_config(config)))
    assert [(each.file, each.label, each.rows) for each in found] == [
        (str(tmp_path / "nli.csv"), None, 1),
        *[(remote, "label", 2)] * 2,
    ]
    assert [overlap.rows for overlap in overlaps] == [2]


@pytest.mark.parametrize(
    ("kind", "labels", "wrong"),
    [
        ("classification\n    classes: 4", ["1", "9", "abc", "3.0", "2.5", "-1", "nan", ""], [3, 4, 6, 7, 8]),
        (
            "pair_regression\n    head: {kind: cosine}\n    range: [1, 4]",
            ["1", "9", "abc", "3.0", "2.5", "0.9", "inf", ""],
            [3, 4, 7, 8],
        ),
    ],
    ids=["classes", "range"],
)
def test_labels_are_held_to_the_task_as_training_holds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, labels: list[str], wrong: list[int]
) -> None:
    texts = ["one", "two"] if kind.startswith("pair") else ["one"]
    rows = [",".join(["a"] * len(texts) + [label]) for label in labels]
    file = write(tmp_path / "rows.csv", ",".join([*texts, "label"]), *rows)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"encoder: {{shape: {{}}}}\ntasks:\n  t:\n    train: {file}\n    dev: {file}\n"
        f"    columns: {{text: [{', '.join(texts)}]}}\n    kind: {kind}\n"
    )
    assert main(["data", "check", "--config", str(config)]) == 1
    printed = capsys.readouterr()
    assert (
        f"  refused     {len(wrong)}: training stops at the first\n              line 3, column 'label': '9' is"
        in printed.out
    )
    assert printed.out.count("  left out    1\n              line 9: column 'label': no label\n") == 2
    first = f"mtbert: {file} line 3, column 'label': '9' is not a "
    assert [line.startswith(first) for line in printed.err.splitlines()] == [True, True]  # train and dev
    assert main(["data", "check", file, "--text", *texts]) == 0  # of no task

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    task = load_config(config).tasks["t"]
    found, _ = check(wanted_by(load_config(config)))
    assert [int(re.findall(r"line (\d+)", told)[0]) for told in found[0].refusals] == wrong
    for told, line in zip(found[0].refusals, wrong, strict=True):
        write(tmp_path / "rows.csv", ",".join([*texts, "label"]), rows[line - 2])
        with pytest.raises(UserError) as error:
            load_dataset(task, "t", "train", DataConfig(cache=str(tmp_path)), load_tokenizer(vocabulary))
        assert str(error.value) == f"{file} " + re.sub(r"^line \d+", "line 2", told)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"text": "x\\u0000", "label": 1, "id": "a"}', " line 2, column 'text': the character U+0000 is no text"),
        ('{"text": "x\\ud800", "label": 1, "id": "a"}', " line 2, column 'text': the character U+D800 is no text"),
        ('{"text": "", "label": 9, "id": "a"}', " line 2, column 'label': 9 is not a class from 0 to 1"),
        ('{"text": "", "label": "", "id": "a"}', ""),
        ('{"text": "b", "label": 1}', ""),
    ],
)
def test_what_training_stops_at_is_no_row_left_out(tmp_path: Path, bad: str, told: str) -> None:
    """And what is left out is the same here and there."""
    file = write(tmp_path / "rows.jsonl", '{"text": "a", "label": 1, "id": "r"}', bad)
    config = tmp_path / "config.yaml"
    columns = "columns: {text: [text], id: id}"
    config.write_text(f"tasks:\n  t: {{kind: classification, train: {file}, dev: {file}, {columns}}}\n")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    loaded = load_config(config).tasks["t"], "t", "train", DataConfig(cache=str(tmp_path)), load_tokenizer(vocabulary)
    found = check(wanted_by(load_config(config)))[0][0]
    if told:
        with pytest.raises(UserError) as error:
            load_dataset(*loaded)
        assert (found.left_out, found.refused) == (0, 1)
        assert str(error.value) == f"{file} {found.refusals[0]}" and told in str(error.value)
    else:
        [left] = load_dataset(*loaded).quarantined
        assert (found.left_out, found.refused) == (1, 0)
        assert found.reasons == [f"line {left.line}: {left.reason}"]


def test_training_stops_at_the_first_row_that_is_refused(tmp_path: Path) -> None:
    """Whatever is wrong with it, and with a later one of the same chunk."""
    rows = ['{"text": "x\\u0000", "label": 1}', '{"text": "a", "label": 9}']
    file = write(tmp_path / "rows.jsonl", *rows)
    config = tmp_path / "config.yaml"
    config.write_text(f"tasks:\n  t: {{kind: classification, train: {file}, dev: {file}, columns: {{text: [text]}}}}\n")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    found = check(wanted_by(load_config(config)))[0][0]
    with pytest.raises(UserError) as error:
        load_dataset(
            load_config(config).tasks["t"], "t", "train", DataConfig(cache=str(tmp_path)), load_tokenizer(vocabulary)
        )
    assert str(error.value) == f"{file} {found.refusals[0]}"
    assert found.refusals[0] == "line 1, column 'text': the character U+0000 is no text; remove it"


def test_an_id_column_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.csv", "text,label", "a,1")
    config = tmp_path / "config.yaml"
    columns = "columns: {text: [text], id: name}"
    config.write_text(f"tasks:\n  t: {{kind: classification, train: {file}, dev: {file}, {columns}}}\n")
    assert main(["data", "check", "--config", str(config)]) == 2
    assert "no column 'name'; columns present" in capsys.readouterr().err


def test_a_source_column_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only development examples are scored by source."""
    train = write(tmp_path / "train.csv", "text,label", "a,1")
    dev = write(tmp_path / "dev.csv", "text,label,sorce", "a,1,x")
    config = tmp_path / "config.yaml"
    columns = "columns: {text: [text], source: source}"
    config.write_text(f"tasks:\n  t: {{kind: classification, train: {train}, dev: {dev}, {columns}}}\n")
    assert main(["data", "check", "--config", str(config)]) == 2
    assert "dev.csv: no column 'source'; columns present: 'sorce', " in capsys.readouterr().err
    write(tmp_path / "dev.csv", "text,label,source", "a,1,x")
    assert main(["data", "check", "--config", str(config)]) == 0


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no rows; a task needs at least one example"),
        (["a,1"] * 93 + [",1"] * 7, "7 of 100 rows are malformed, more"),
    ],
)
def test_a_file_that_training_refuses_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], told: str
) -> None:
    file = write(tmp_path / "rows.csv", "text,label", *rows)
    assert main(["data", "check", file]) == 1
    printed = capsys.readouterr()
    assert f"  refused     {told}" in printed.out and printed.err.startswith(f"mtbert: {file}: {told}")
    config = tmp_path / "config.yaml"
    config.write_text(f"tasks:\n  t: {{kind: classification, train: {file}, dev: {file}, columns: {{text: [text]}}}}\n")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(UserError) as error:
        load_dataset(
            load_config(config).tasks["t"], "t", "train", DataConfig(cache=str(tmp_path)), load_tokenizer(vocabulary)
        )
    assert printed.err == f"mtbert: {error.value}\n"


def test_the_real_files_hold_what_is_known_of_them(data_dir: Path) -> None:
    names = ["ids-sst-train.csv", "sts-train.csv", "sts-dev.csv", "quora-dev.csv"]
    found, overlaps = check(wanted_files([str(data_dir / name) for name in names], None, None))
    sst, sts, _, quora = found
    assert (sst.rows, sst.duplicates) == (8544, 10)
    assert (sts.rows, sts.duplicates, sts.conflicting) == (6040, 30, 4)
    assert [overlap.rows for overlap in overlaps if overlap.second.endswith("sts-dev.csv")] == [13]
    assert quora.left_out == 2


# ------------------------------------------------------------------------------------------------ fetch


def parquet(**columns: list[object]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


@pytest.fixture
def repositories() -> dict[str, dict[str, dict[str, bytes]]]:
    """Small files with the columns that the hub's have."""
    sst = b'{"text": "tab\\there", "label": 4, "label_text": "very positive"}\n{"text": "b", "label": 0}\n'
    pair = {"question1": ["a"], "question2": ["b"], "label": [1], "idx": [0]}
    score = {"sentence1": ['he said "hi"'], "sentence2": ["d"], "label": [2.5], "idx": [0]}
    glue = {
        f"{name}/{split}-00000-of-00001.parquet": parquet(**columns)
        for name, columns in (("qqp", pair), ("stsb", score))
        for split in ("train", "validation")
    }
    return {
        "datasets/SetFit/sst5": {COMMIT: {"train.jsonl": sst, "dev.jsonl": sst}},
        "datasets/nyu-mll/glue": {COMMIT: glue},
    }


def test_the_three_data_sets_come_as_the_configuration_names_them(
    tmp_path: Path, repositories: dict[str, dict[str, dict[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    with stand_in_hub(repositories) as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        assert main(["data", "fetch", str(folder)]) == 0
        assert [line.partition(": ")[2] for line in fetch(folder, ["sst"])] == ["is there already"] * 2
    tasks = load_config(ROOT / "configs" / "cs224n.yaml", [f"data.dir={folder}"]).tasks.values()
    rows = {
        file: [
            (row.id, *row.values)
            for row in read_rows(folder / file, [*task.columns.text, task.columns.label], task.columns.id)
            if isinstance(row, Row)
        ]
        for task in tasks
        for file in (task.train, task.dev)
    }
    assert rows["ids-sst-dev.csv"] == [("ids-sst-dev-0", "tab\there", "4"), ("ids-sst-dev-1", "b", "0")]
    assert rows["quora-train.csv"] == [("quora-train-0", "a", "b", "1")]
    assert rows["sts-dev.csv"] == [("sts-dev-0", 'he said "hi"', "d", "2.5")]
    origins = json.loads((folder / "sources.json").read_text())
    assert set(origins) == {source.target for sources in SOURCES.values() for source in sources} == set(rows)
    assert {origin["commit"] for origin in origins.values()} == {COMMIT}


def test_a_carriage_return_in_a_text_comes_back(tmp_path: Path) -> None:
    """Unquoted, it would make a row with a quote malformed."""
    text = {"text": 'he said "hi"', "more": "a\rb"}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(text) + "\n")
    source = Source("some-org/some", "theirs.jsonl", "ours.csv", {"text": "sentence1", "more": "sentence2"})
    content, rows = _rewritten(tmp_path / "theirs.jsonl", source)
    (tmp_path / "ours.csv").write_text(content, newline="")
    assert rows == 1 and [*read_rows(tmp_path / "ours.csv", ["sentence1", "sentence2"])] == [
        Row(2, tuple(text.values()), None)
    ]


def test_a_hub_without_the_files_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_hub({"datasets/SetFit/sst5": {COMMIT: {"train.jsonl": b'{"text": "a"}\n'}}}) as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        with pytest.raises(UserError, match="no column 'label'"):
            list(fetch(tmp_path / "one", ["sst"]))
        with pytest.raises(UserError, match=r"nyu-mll/glue/stsb/\S+: cannot fetch it from the hub: 404"):
            list(fetch(tmp_path / "two", ["sts"]))
    assert not list((tmp_path / "one").iterdir()) and not list((tmp_path / "two").iterdir())


def test_what_cannot_be_read_or_written_is_told_in_a_line(
    tmp_path: Path, repositories: dict[str, dict[str, dict[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in (b'{"ids', b"[]", b"\xff"):
        (tmp_path / "sources.json").write_bytes(content)
        with pytest.raises(UserError, match=r"sources\.json: not what `data fetch` wrote"):
            list(fetch(tmp_path, ["sst"]))
    with stand_in_hub(repositories) as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        with pytest.raises(UserError, match=r"/proc/ids-sst-train\.csv: cannot be written: "):
            list(fetch(Path("/proc"), ["sst"]))


@pytest.fixture
def wall() -> Iterator[str]:
    """A proxy that lets nothing through, and a hub that hangs up without a word."""

    class Wall(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_error(403)

        def do_GET(self) -> None:
            self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Quiet."""

    close_session()  # the client reads where its proxy is when it opens one
    with serving(Wall) as address:
        yield address
    close_session()


@pytest.mark.parametrize("proxy", [True, False])
def test_failures_on_the_way_to_the_hub(
    wall: str, proxy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no `OSError` of the client's."""
    if proxy:
        monkeypatch.setenv("HTTPS_PROXY", wall)
    use_hub(monkeypatch, "https://hub.invalid" if proxy else wall, tmp_path / "home")
    for ask in (
        lambda: load_pretrained("some-org/small"),
        lambda: locate_file("hub:some-org/topics/rows.csv", "tasks.topic.train", DataConfig()),
        lambda: list(fetch(tmp_path, ["sst"])),
    ):
        with pytest.raises(UserError, match=r"cannot fetch it from the hub: (403|Server disconnected)") as error:
            ask()
        assert "\n" not in str(error.value)
