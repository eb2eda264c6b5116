"""What a trial of a population takes over from another."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from mtbert.manifest import find_checkpoint, folder_of, sealed

ROOT = Path(__file__).parent.parent.parent

GRAFT = """
import sys
from pathlib import Path
from tune.trial import Plan, graft
folder, donor, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
plan = Plan(0, str(folder.parent), (donor / "config.yaml").read_text(), {}, {}, False, 1, 1, 0.0)
assert graft(folder, donor, step, plan) == step
"""


def test_a_graft_brings_the_best_checkpoint_along(trained_run: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray reads its settings when it is imported."""
    donor, folder = Path(shutil.copytree(trained_run, tmp_path / "donor")), tmp_path / "grafted"
    newest = max((donor / "checkpoints").glob("step-*"))
    step = int(newest.name.removeprefix("step-"))
    values = json.loads((newest / "manifest.json").read_text())
    best = folder_of(donor, 1)
    shutil.copytree(newest, best, dirs_exist_ok=True)
    for path, own in ((best, {"step": 1}), (newest, {})):
        (path / "manifest.json").write_text(sealed({**values, **own, "best": {"step": 1, "score": 0.9}}))
    folder.mkdir()
    lines = [json.dumps({"step": at, "time": 0, "metric/composite": 0.5}) + "\n" for at in (0, step - 1, step)]
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], '{"step"\n', *lines[2:], lines[0][:9]]))
    command = [sys.executable, "-c", GRAFT, str(folder), str(donor), str(step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "metrics.jsonl").read_text() == "".join(lines[:2])
    assert find_checkpoint(folder, "latest").step == step and find_checkpoint(folder, "best").step == 1


KILLED = """
import sys
from types import SimpleNamespace
from tune import trial
plan = trial.Plan(0, sys.argv[1], "", {}, {}, True, 1, 1, 0.0)
trial.ray_tune.get_context = lambda: SimpleNamespace(get_trial_dir=lambda: "0000")
trial._train = lambda folder, plan: sys.exit(9)
trial.run_trial(plan.settings())
"""


def test_the_error_of_an_attempt_is_not_told_of_the_next_one(tmp_path: Path) -> None:
    """Which is killed and cannot tell its own."""
    told = tmp_path / "0000" / "error.txt"
    told.parent.mkdir()
    told.write_text("of the first attempt")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert not told.exists()


WRITTEN = """
import sys, threading, time
from pathlib import Path
from tune import trial

ranks = object.__new__(trial.Ranks)
ranks.folder, ranks.exits = Path(sys.argv[1]), []
ended = []
trial.ray.wait = lambda *_, num_returns, timeout: (ended or time.sleep(timeout) or [], [])
saved = ranks.folder / "checkpoints" / "step-00000005"
threading.Timer(1, lambda: saved.mkdir(parents=True)).start()
ranks.wait_for_checkpoint(5)
assert saved.is_dir()
ended.append("a rank")
began = time.monotonic()
ranks.wait_for_checkpoint(6)
assert time.monotonic() - began < trial.WRITTEN_S / 2
"""


def test_a_checkpoint_is_waited_for_while_there_is_somebody_to_write_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITTEN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TOLD = """
import sys
from types import SimpleNamespace
from pathlib import Path
from tune import trial

did = []

class Ranks:
    def __init__(self, folder, plan): pass
    def evaluations(self, after): return iter([(5, {"composite": 0.5}), (9, {"composite": 0.6})])
    def wait_for_checkpoint(self, step): did.append(f"wait {step}")
    def end(self): return SimpleNamespace(status="finished")
    def kill(self): did.append("kill")

trial.Ranks = Ranks
trial.ray_tune = SimpleNamespace(
    get_checkpoint=lambda: None,
    Checkpoint=SimpleNamespace(from_directory=lambda directory: None),
    report=lambda result, checkpoint: did.append(f"report {result['step']}"),
)
for replay in (True, False):
    trial._train(Path(sys.argv[1]), trial.Plan(0, "", "", {}, {5: 50, 9: 90}, replay, 1, 1, 0.0))
    print(*did, sep=", ")
    did.clear()
"""


def test_a_member_of_a_population_tells_of_an_evaluation_when_it_can_go_on_from_it(tmp_path: Path) -> None:
    """It may have to make room at once; nothing is decided at the end."""
    done = subprocess.run([sys.executable, "-c", TOLD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["report 5, report 9, kill", "wait 5, report 5, report 9, kill"], done.stderr
