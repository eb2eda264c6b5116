"""Jobs on the cluster when nothing goes wrong, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, STEPS, TASKS, Bench, Trained, assert_same_course, scontrol, send, wait_until
from safetensors.numpy import load_file

GENTLE = [
    *["encoder.dropout=0", *(f"tasks.{task}.head.dropout=0" for task in TASKS)],
    *["optimizer.lr=1e-3", "optimizer.head_lr=1e-3", "optimizer.eps=1e-4"],
]
"""Dropout draws differ from rank to rank; a larger eps: see tests/test_engine.py."""


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_nodes_train_the_weights_of_a_local_run(bench: Bench, ranks: int) -> None:
    shape = ["--ranks-per-node", str(ranks)]
    here, local = bench.start(f"local{ranks}", *shape, "--local")
    code, _, err = here.end()
    assert code == 0, err
    if ranks == 1:
        on_slurm = bench.undisturbed
    else:
        there, on_slurm = bench.start(f"slurm{ranks}", *shape)
        assert there.end()[0] == 0
    assert len(local.weights()) == 2 * ranks
    assert_same_course(local, on_slurm)


def test_the_run_folder_has_the_code_and_status_knows_the_job(bench: Bench) -> None:
    run = bench.undisturbed
    assert (run.folder / "code" / "mtbert" / "trainer.py").is_file()
    code, out, _ = bench.type("status", run.folder).end()
    assert code == 0
    assert out.splitlines()[1].split() == [str(run.folder), "slurm", run.job, "finished", str(STEPS)]


def test_the_start_is_measured_part_by_part(bench: Bench) -> None:
    launch = json.loads((bench.undisturbed.folder / "launch.json").read_text())
    assert list(launch["seconds"]) == ["queue", "nodes", "imports", "rendezvous", "data", "build", "first step"]
    assert all(seconds >= 0 for seconds in launch["seconds"].values()) and launch["step"] == 0
    assert f"first step after {launch['total']:.1f} s: queue " in bench.undisturbed.log()


def test_name_account_and_qos_are_visible_and_cancel_saves(bench: Bench) -> None:
    submission, run = bench.start("cancelled", "--account", "lab", "--qos", "quick")
    with run.held_at(30):
        shown = subprocess.run(["squeue", "-h", "-o", "%i %j %a %q"], capture_output=True, text=True, check=True).stdout
        assert f"{run.job} mtbert-cancelled lab quick" in shown.splitlines()
        refused = bench.type("--nodes", "2", "--resume", run.folder).end()
        assert refused[0] == 2 and "is not over" in refused[2] and refused[2].count("\n") == 1
        assert bench.type("cancel", run.folder).end()[0] == 0
    code, out, err = submission.end()
    assert code == 130, err
    assert "was cancelled; continue with" in out
    assert "stopped after step " in out and f"saved in {run.folder}" in out


def test_a_run_moves_from_two_ranks_to_one_and_to_four(bench: Bench) -> None:
    """Elastic: within 1e-5 of a run that stayed on two."""
    straight, stayed = bench.start("stayed", *GENTLE)
    submission, run = bench.start("moved", *GENTLE)
    for step, nodes, ranks in ((45, "1", "1"), (90, "2", "2")):
        with run.held_at(step):
            subprocess.run(["scancel", run.job], check=True)
        assert submission.end()[0] == 130
        shape = ["--nodes", nodes, "--ranks-per-node", ranks]
        submission = bench.type(*shape, "--resume", run.folder, "--follow")
    for each in (straight, submission):
        code, out, err = each.end()
        assert code == 0, f"{out}\n{err}"
    assert (len(stayed.weights()), len(run.weights())) == (2, 4)
    expected, found = masters(stayed), masters(run)
    assert expected.keys() == found.keys()
    assert max(float(abs(expected[name] - found[name]).max()) for name in expected) < 1e-5
    assert run.trained_steps() == list(range(STEPS))


def masters(run: Trained) -> dict[str, np.ndarray]:
    """The final weights, put together from all ranks' spans."""
    spans: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for path in run.checkpoints()[-1].glob("rank-*.safetensors"):
        for key, values in load_file(path).items():
            name, start, _, state = key.rsplit("|", 3)
            if state == "master":
                spans[name][int(start)] = values
    return {name: np.concatenate([pieces[start] for start in sorted(pieces)]) for name, pieces in spans.items()}


def test_an_array_of_seeds(bench: Bench) -> None:
    """The last one has the id of the whole array; asked to stop, it goes back into the queue alone."""
    submission, folder = bench.start("seeds", "phases=[{steps: 60}]", "--array", "seed=0,1")
    first, last = runs = [Trained(folder.folder / f"seed={seed}") for seed in (0, 1)]
    wait_until((last.folder / "job" / "job.json").exists, 120, "the submission")
    with last.held_at(10) as pids:
        shown = scontrol("show", "job", "-o", last.job).split()
        assert shown[0] == f"JobId={last.job.split('_')[0]}"
        send(signal.SIGUSR2, pids)
    code, out, err = submission.end()
    assert code == 0, f"{out}\n{err}"
    assert (first.restarts, last.restarts) == (0, 1)
    assert all(json.loads((run.folder / "result.json").read_text()) for run in runs)
    assert first.trained_steps() == last.trained_steps() == list(range(60))
    final = [(run.checkpoints()[-1] / "rank-0-of-2.safetensors").read_bytes() for run in runs]
    assert final[0] != final[1]


def test_gpus_are_asked_for_one_rank_each(bench: Bench) -> None:
    submission, _ = bench.start("gpus", "--gpus-per-node", "2", "--dry-run")
    code, out, _ = submission.end()
    assert code == 0
    assert "#SBATCH --gpus-per-node=2\n" in out and "#SBATCH --ntasks-per-node=2\n" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes", "3"], "sbatch refused the job: Batch job submission failed: "),
        (["--gpus-per-node", "99"], "sbatch refused the job: "),
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--time", "soon"], "--time soon: not a time limit"),
        (["--account", "nobody"], "sbatch refused the job: Batch job submission failed: Invalid account"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(bench: Bench, arguments: list[str], told: str) -> None:
    submission, run = bench.start(f"refused{arguments[0]}", *arguments)
    code, out, err = submission.end()
    assert (code, out) == (2, "")
    assert told in err and err.startswith("error: ") and err.count("\n") == 1
    assert not run.folder.exists()


def test_a_mistake_found_in_a_rank_is_one_line_and_leaves_nothing(bench: Bench) -> None:
    data = bench.place / "data"
    data.mkdir()
    (data / "train.csv").write_text("id\tsentence\tsentiment\na\tgood\t9\n")
    (data / "dev.csv").write_text("id\tsentence\tsentiment\na\tgood\t1\n")
    here = ["data={dir: data, generate: null}", "tasks.para=null", "tasks.sts=null"]
    files = ["tasks.sst.train=train.csv", "tasks.sst.dev=dev.csv"]
    submission, run = bench.start("mistaken", *here, *files)
    code, _, err = submission.end()
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("job ")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert not run.folder.exists()


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_run_folder_that_a_node_does_not_see(bench: Bench, node: str) -> None:
    alone = bench.place / f"hidden-on-{node}"
    alone.mkdir()
    bench.cluster("hide", node, alone)
    submission, _ = bench.start("hidden", f"run.dir={alone / 'runs'}")
    code, _, err = submission.end()
    assert code != 0
    assert "put run.dir on a file system that all nodes share" in err


def test_a_plain_batch_script_and_a_second_job_on_its_folder(bench: Bench) -> None:
    """The second job refuses; when the first is killed and leaves its lock, a third one takes the folder over."""
    (bench.place / ".venv").symlink_to(Path(sys.prefix))

    def sbatch(**variables: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["sbatch", "--wait", ROOT / "slurm" / "train.sbatch", "runs/plain"],
            cwd=bench.place,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            stdout=subprocess.DEVNULL,
        )

    run = Trained(bench.place / "runs" / "plain")
    first = sbatch(CONFIG="tiny.yaml")
    with run.held_at(30) as pids:
        job = run.job
        second = sbatch()
        assert second.wait(PATIENCE) == 2
        log = next(path for path in bench.place.glob("mtbert-*.log") if job not in path.name)
        assert log.read_text().startswith("error: runs/plain: another job is using this run folder (process ")
        assert run.job == job
        send(signal.SIGKILL, pids)
    first.wait(PATIENCE)
    assert (run.folder / "job" / "lock").exists()
    assert sbatch().wait(PATIENCE) == 0
    assert_same_course(run, bench.undisturbed)
