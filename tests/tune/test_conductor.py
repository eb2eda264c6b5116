"""What the scheduler is told of a search that is continued, and who is blamed for a trial that cannot begin."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

EXPLORE = """
import sys
from pathlib import Path

from mtbert.config_files import load_config
from mtbert.errors import UserError
from tune.board import Board
from tune.conductor import Conductor
from tune.search import Settings
from tune.space import load_space
from tune.study import Study

folder = Path(sys.argv[1])
space = load_space(folder / "space.yaml", load_config(folder / "base.yaml"))
settings = Settings("q", 4, 5500, 8, ["composite"], "pbt", 3, "random", 0, 1, 1, 0.0, None, "", "n")
study = Study(space, None, "n", {}, ["composite"], "random", 0, 4)
study.ask()
def refuse(*_):
    raise UserError("does not fit")
donor = {"plan": {"number": 0, "values": {"weights": [1, 1, 1]}}}
for search in ("as it began", "continued"):
    conductor = Conductor(folder, settings, space, study, Board(study, settings))
    print([conductor._explore(donor)["plan"]["values"]["weights"] for _ in range(3)])
    planned, conductor._planned = conductor._planned, refuse
    assert conductor._explore(donor) == donor
    conductor._planned = planned
    (folder / "trials" / "0000").mkdir(parents=True, exist_ok=True)
    (folder / "trials" / "0000" / "lineage.jsonl").write_text("{}\\n" * 3)
"""


def test_a_continued_population_explores_elsewhere_than_before(tmp_path: Path) -> None:
    """In a process of its own, as below."""
    (tmp_path / "base.yaml").write_text(
        f"{{base: {ROOT / 'configs/quickstart.yaml'}, data: {{generate: {{train: 200, dev: 60}}, cache: {tmp_path}}}}}"
    )
    (tmp_path / "space.yaml").write_text("parameters: {weights: {simplex: 3, keys: [tasks.*.weight]}}")
    command = [sys.executable, "-c", EXPLORE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert before != after


RESUME = """
import sys
from pathlib import Path
from types import SimpleNamespace

from mtbert.config_files import load_config
from tune.board import Board
from tune.conductor import Conductor
from tune.search import Settings
from tune.space import load_space
from tune.study import Study

folder = Path(sys.argv[1])
space = load_space(folder / "space.yaml", load_config(folder / "base.yaml"))
settings = Settings("q", 3, 5500, 8, ["composite"], "asha", 3, "random", 0, 1, 1, 0.0, None, "", "n")
study = Study(space, None, "n", {}, ["composite"], "random", 0, 3)
curves = [[0.60, 0.66, 0.70, 0.74, 0.76, 0.78], [0.70, 0.71], [0.80, 0.81, 0.82]]
for curve in curves:
    number, _ = study.ask()
    for evaluation, score in enumerate(curve, 1):
        study.report(number, 375 * evaluation, {"composite": score})
for number in (1, 2):
    study.finish(number, "pruned")
conductor = Conductor(folder, settings, space, study, Board(study, settings))
asha = conductor._scheduler()
suggested = conductor.suggest("tune-id")
assert suggested["plan"]["number"] == 0, study.tried()[0].error
trial = SimpleNamespace(trial_id="tune-id")
asha.on_trial_add(None, trial)
for evaluation, score in enumerate(curves[0], 1):
    print(asha.on_trial_result(None, trial, {"evaluation": evaluation, asha._metric: score}))
conductor.reported("tune-id", {"step": 56, "examples": 4830, "evaluation": 7, "score/composite": 0.8})
conductor.reported("tune-id", {"step": 64, "examples": 5520, "evaluation": 0, "score/composite": 0.9})
told = study.tried()[0]
assert told.examples == 5520 and list(told.curve)[-2:] == [4812, 5500], told
"""


def test_what_an_interrupted_trial_had_passed_does_not_stop_it(tmp_path: Path) -> None:
    """It was the first at every rung, where both others, which ended before the search was stopped, were better.

    What it goes on to show is recorded at the examples of its rungs, by which Optuna ranks stopped trials: its
    own differ by some from another trial's. In a process of its own: Ray reads its settings when it is imported.
    """
    (tmp_path / "trials").mkdir()
    (tmp_path / "base.yaml").write_text(
        f"{{base: {ROOT / 'configs/quickstart.yaml'}, data: {{generate: {{train: 200, dev: 60}}, cache: {tmp_path}}}}}"
    )
    (tmp_path / "space.yaml").write_text("parameters: {optimizer.lr: {uniform: [0.001, 0.01]}}")
    command = [sys.executable, "-c", RESUME, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:7] == ["CONTINUE"] * 6


BEGIN = """
import sys
from pathlib import Path

from mtbert.config_files import load_config
from mtbert.errors import UserError
from tune.board import Board
from tune.conductor import Conductor
from tune.search import Settings
from tune.space import load_space
from tune.study import Study

folder = Path(sys.argv[1])
space = load_space(folder / "space.yaml", load_config(folder / "base.yaml"))
settings = Settings("q", 1, 5500, 8, ["composite"], "asha", 3, "random", 0, 1, 1, 0.0, None, "", "n")
study = Study(space, None, "n", {}, ["composite"], "random", 0, 1)
try:
    Conductor(folder, settings, space, study, Board(study, settings)).suggest("tune-id")
except UserError as error:
    print("refused:", error)
print([trial.state for trial in study.tried()])
"""


@pytest.mark.parametrize(
    ("data", "batch_size", "told"),
    [
        ("generate: null, dir: gone", 16, r"refused: .*gone.*\n\['running'\]"),
        ("generate: {train: 200, dev: 60}", 16, r"refused: run.dir .*trials: cannot make .*\n\['running'\]"),
        ("generate: {train: 200, dev: 60}", 5000, r"trial 0: .* 10 steps fall into 5 equal parts.*\n\['failed'\]"),
    ],
)
def test_what_would_fail_every_trial_is_no_trials_failure(
    data: str, batch_size: int, told: str, tmp_path: Path
) -> None:
    """No data, no folder to write to; and, for comparison, values that do not fit. As above in a process of its own."""
    (tmp_path / "trials").touch()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    (tmp_path / "base.yaml").write_text(
        f"{{base: {ROOT / 'configs/quickstart.yaml'}, data: {{{data}, cache: {tmp_path}}},"
        f" encoder: {{tokenizer: {tmp_path}/vocab.txt}}}}"
    )
    (tmp_path / "space.yaml").write_text(
        f"parameters: {{schedule.batch_size: {{choice: [16, 5000]}}}}\nstarts: [{{schedule.batch_size: {batch_size}}}]"
    )
    command = [sys.executable, "-c", BEGIN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(told + r"\n", done.stdout), done.stdout
