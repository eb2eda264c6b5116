"""Every command and program in docs/using.md and docs/adding-a-task.md, run as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mtbert.cli import main
from mtbert.config_files import load_config

DOCS = Path(__file__).parent.parent / "docs"
WITHOUT = {"curl", "tensorboard", "python launch/submit.py", "python -m mtbert serve", "python -m mtbert data fetch"}
"""What other tests start: test_serve.py, test_tracking.py, tests/launch, test_datasets.py."""


def commands(page: str) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in re.findall(r"^    (\S.*)$", text.replace(" \\\n", " "), re.MULTILINE):
        if not line.startswith("{"):  # an answer
            yield line


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run(line: str) -> None:
    command = line.partition(" | ")[2] or line  # `cat FILE |`: stdin is tested in test_predict.py
    arguments = shlex.split(command.partition(" > ")[0])
    if line.startswith("cat "):
        arguments = [line.split()[1] if each == "-" else each for each in arguments] + ["--out", line.split()[-1]]
    assert arguments[:3] == ["python", "-m", "mtbert"], line
    assert main(arguments[3:]) == 0, line


def known(line: str) -> bool:
    return any(line.startswith(prefix) for prefix in WITHOUT)


def test_using_a_trained_run(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, "RUN")
    Path("rows.tsv").write_text("id\tsentence\n1\ta good film\n")
    Path("rows.jsonl").write_text('{"sentence": "a good film"}\n')
    Path("test.tsv").write_text("id\tsentence\tsentiment\n1\ta good film\t3\n")
    ran = [run(line) for line in commands("using.md") if not known(line)]
    assert len(ran) == 10
    assert json.loads(Path("answers.jsonl").read_text())["prediction"] in range(5)
    assert np.load("vectors.npy").shape == (1, 16) and Path("vectors.parquet").is_file()
    for program in blocks("using.md", "python"):
        names: dict[str, object] = {}
        exec(program, names)
        assert np.asarray(names["vectors"]).shape == (1, 16)


def test_adding_a_task(
    trained_run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/NAME").symlink_to(trained_run)
    shutil.copytree(corpus, "DATA")
    rows = "headline\ttopic\n" + "".join(f"word {i}\t{i % 4}\n" for i in range(8))
    for name in ("topic-train.csv", "topic-dev.csv", "DATA/topic-train.csv", "DATA/topic-dev.csv"):
        Path(name).write_text(rows)
    Path("new.csv").write_text("sentence\na good film\n")
    [block] = blocks("adding-a-task.md", "yaml")
    Path("mine.yaml").write_text(block.replace("configs/", f"{DOCS.parent}/configs/"))
    assert list(load_config("mine.yaml").tasks) == ["topic"]
    ran = [run(line.replace("--task topic", "--task sst")) for line in commands("adding-a-task.md") if not known(line)]
    assert len(ran) == 4
    printed = capsys.readouterr().out
    assert "topic-train.csv: 8 rows (texts headline; label topic)" in printed
    assert "8 rows of topic-dev.csv are in topic-train.csv too" in printed
