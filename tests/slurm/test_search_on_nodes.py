"""A search on the nodes of a Slurm allocation."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from conftest import PATIENCE, ROOT, Bench, Trained, scontrol, wait_until

SPACE = {"parameters": {"optimizer.lr": {"loguniform": [1e-5, 1e-2]}}}
COMMON = ["--evaluations", "2", "--scheduler", "none", "--ranks-per-trial", "2", "--cluster", "slurm", "--nodes", "2"]


@dataclass
class Search:
    """A search folder, and the folder for temporary files that its jobs are given."""

    place: Path
    name: str
    tmp: Path
    jobs: list[str] = field(default_factory=list)
    told: str = ""  # by the last submission

    @property
    def folder(self) -> Path:
        return self.place / "runs" / self.name

    def submit(self, *words: str) -> None:
        sent = subprocess.run(
            [sys.executable, "-m", "tune", *words],
            cwd=self.place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp)},
            capture_output=True,
            text=True,
        )
        assert sent.returncode == 0, sent.stderr
        self.told = sent.stdout
        self.jobs.append(self.told.split()[1].rstrip(":"))

    def begin(self, *words: str) -> None:
        (self.place / "space.yaml").write_text(yaml.safe_dump(SPACE))
        self.submit("--config", "tiny.yaml", "--space", "space.yaml", "--name", self.name, *COMMON, *words)

    def end(self, state: str) -> str:
        """Waits for the end of the job, which must leave nothing behind; what the search printed."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_until(lambda: self._state() in over, PATIENCE, f"the end of search {self.name}")
        told = (self.folder / "slurm.log").read_text()
        assert self._state() == state, told
        wait_until(lambda: not list(self.tmp.iterdir()), 30, "the end of Ray's files")
        assert not (self.folder / "token").exists()
        return told

    def _state(self) -> str:
        shown = scontrol("show", "job", "-o", self.jobs[-1])
        return dict(word.partition("=")[::2] for word in shown.split())["JobState"]

    def hosts(self, trial: int) -> list[str]:
        """Of a trial's ranks, in its last attempt."""
        starts = (self.folder / "trials" / f"{trial:04d}" / "job" / "starts.jsonl").read_text().splitlines()
        return sorted(json.loads(starts[-1])["hosts"])


@contextmanager
def searching(bench: Bench, name: str) -> Iterator[Search]:
    search = Search(bench.place, name, Path(tempfile.mkdtemp(prefix="s")))  # short: it holds sockets
    try:
        yield search
    finally:
        for job in search.jobs:
            with suppress(FileNotFoundError):
                subprocess.run(["scancel", "--full", "--signal=KILL", job], check=False, capture_output=True)
        shutil.rmtree(search.tmp, ignore_errors=True)


def test_trials_spread_over_two_nodes(bench: Bench) -> None:
    """Nodes with room for one trial each: two trials run at once, one per node."""
    with searching(bench, "wide") as search:
        search.begin("--trials", "2", "--examples", "960", "--cpus-per-node", "2")
        told = search.end("COMPLETED")
        assert told.count("  complete") == 2, told
        assert sorted(map(search.hosts, range(2))) == [["node1", "node1"], ["node2", "node2"]]
        assert (search.folder / "best.yaml").is_file()


def test_a_cancelled_search_of_a_trial_over_two_nodes_goes_on(bench: Bench) -> None:
    """One CPU on each node: the two ranks of the trial meet over the network."""
    with searching(bench, "apart") as search:
        search.begin("--trials", "1", "--examples", "2400", "--slurm", "comment=apart")
        trial = Trained(search.folder / "trials" / "0000")
        wait_until(lambda: bool(trial.checkpoints()), PATIENCE, "a checkpoint")
        subprocess.run(["scancel", search.jobs[-1]], check=True)
        search.end("CANCELLED")

        words = shlex.split(search.told.partition("continue with: ")[2])
        assert words[-5:] == ["slurm", "--nodes", "2", "--slurm", "comment=apart"], search.told
        search.submit(*words[3:])
        told = search.end("COMPLETED")
        assert told.count("  complete") == 1, told
        assert search.hosts(0) == ["node1", "node2"]
        assert trial.trained_steps() == list(range(100))
