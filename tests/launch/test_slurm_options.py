"""What of the Slurm side needs no cluster: time limits and the batch script."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm import minutes, script
from launch.submit import parser
from mtbert.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:00", 90), ("0:30", 1), ("1:30:00", 90), ("1:30:01", 91), ("1-0", 1440), ("1-12:30", 2190)],
)
def test_time_limits_are_slurms(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["soon", "", "0", "1h", "-5", "1:2:3:4", "1.5"])
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a time limit"):
        minutes(text)


def test_the_script_asks_for_what_was_typed(tmp_path: Path) -> None:
    words = "--nodes 2 --gpus-per-node 4 --partition gpu --time 1:00 --qos long --mem 64G --slurm reservation=mine"
    text = script(parser().parse_args(words.split()), "mtbert-x", tmp_path)
    for line in ("nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "partition=gpu", "time=1", "qos=long", "mem=64G"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --reservation=mine\n" in text
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --signal=USR2@30\n" in text, "half of a limit that is shorter than the usual notice"
    assert "wckey" not in text and "account" not in text


def test_a_path_with_a_space_survives_the_script(tmp_path: Path) -> None:
    folder = tmp_path / "my runs" / "one"
    text = script(parser().parse_args(["--nodes", "2"]), "mtbert-one", folder)
    assert f"'{folder}/code/launch/start.py'" in text
