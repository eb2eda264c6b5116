"""Whole searches through the command line: what is refused before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tune.search import main

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--ranks-per-trial", "999"],
            r"--ranks-per-trial 999: a trial needs 999 × 1 CPU; this machine has \d+ CPU, room",
        ),
        (["--ranks-per-trial", "2", "--gpus-per-rank", "0.5"], "only one rank per trial can do with part of a GPU"),
        (["--gpus-per-rank", "64"], "a trial needs 1 × 1 CPU and 1 × 64 GPU"),
        (["--metric", "accuracy"], "--metric accuracy: no trial reports it; valid: composite, sst, para, sts"),
        (["--metric", "sst", "sts", "--scheduler", "asha"], "--scheduler asha: needs one metric to judge by, not 2"),
        (["--scheduler", "pbt", "--trials", "3"], "a population of at least 4, not --trials 3"),
        (["--space", str(ROOT / "configs/search/c7.yaml"), "--trials", "7"], "the stages of the space have 6 trials"),
        (["--nodes", "2"], "--nodes: of which cluster"),
        (["--resume", "nowhere"], "--resume nowhere: no search folder"),
        (["--config", "nothing.yaml"], "cannot read the configuration"),
        (["--set", "optimizer.lrr=3"], "did you mean 'lr'"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(complaint, err)
    assert not list(tmp_path.iterdir())
