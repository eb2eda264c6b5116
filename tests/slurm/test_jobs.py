"""Jobs on the cluster when nothing goes wrong, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import STEPS, Cluster, Run, Submission, Trained, assert_same_course, scontrol, wait_until


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_nodes_train_the_weights_of_a_local_run(ranks: int, start: Run, undisturbed: Trained) -> None:
    shape = ("--nodes", "2", "--ranks-per-node", str(ranks))
    here, local = start(f"local{ranks}", *shape, "--local")
    code, _, err = here.end()
    assert code == 0, err
    if ranks == 1:
        on_slurm = undisturbed
    else:
        there, on_slurm = start(f"slurm{ranks}", *shape, "--follow")
        assert there.end()[0] == 0
    assert len(local.weights()) == 2 * ranks
    assert_same_course(local, on_slurm)


def test_the_run_folder_has_the_code_and_status_knows_the_job(place: Path, undisturbed: Trained) -> None:
    assert (undisturbed.folder / "code" / "mtbert" / "trainer.py").is_file()
    code, out, _ = Submission(place, "status", undisturbed.folder).end()
    assert code == 0
    assert out.splitlines()[1].split() == [str(undisturbed.folder), "slurm", undisturbed.job, "finished", str(STEPS)]


def test_the_name_is_visible_and_cancel_saves(place: Path, start: Run) -> None:
    submission, run = start("cancelled", "--nodes", "2", "--follow")
    run.wait_for_step(20)
    shown = subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True, check=True).stdout
    assert shown == "mtbert-cancelled\n"
    refused = Submission(place, "--nodes", "2", "--resume", run.folder).end()
    assert refused[0] == 2 and "is not over" in refused[2] and refused[2].count("\n") == 1
    assert Submission(place, "cancel", run.folder).end()[0] == 0
    code, out, err = submission.end()
    assert code == 130, err
    assert "was cancelled; continue with" in out
    saved = max((run.folder / "checkpoints").glob("step-*"))
    assert int(saved.name.removeprefix("step-")) % 20, "the ranks saved where they were told to stop"


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_a_cancelled_run_continues_on_other_nodes(nodes: str, place: Path, start: Run, undisturbed: Trained) -> None:
    submission, run = start(f"elastic{nodes}", "--nodes", "2", "--follow")
    run.wait_for_step(45)
    subprocess.run(["scancel", run.job], check=True)
    assert submission.end()[0] == 130
    code, _, err = Submission(place, "--nodes", nodes, "--resume", run.folder, "--follow").end()
    assert code == 0, err
    assert len(run.weights()) == int(nodes)
    if nodes == "2":
        assert_same_course(run, undisturbed)


def test_an_array_of_seeds(place: Path, start: Run) -> None:
    few = ("--set", "phases=[{steps: 4}]")
    submission, folder = start("seeds", "--nodes", "2", "--array", "seed=0,1", "--follow", *few)
    code, out, err = submission.end()
    assert code == 0, f"{out}\n{err}"
    runs = [folder.folder / f"seed={seed}" for seed in (0, 1)]
    assert [json.loads((run / "result.json").read_text()) != {} for run in runs] == [True, True]
    final = [(run / "checkpoints" / "step-00000004" / "rank-0-of-2.safetensors").read_bytes() for run in runs]
    assert final[0] != final[1]


def test_gpus_are_asked_for_one_rank_each(place: Path, start: Run) -> None:
    submission, _ = start("gpus", "--nodes", "2", "--gpus-per-node", "2", "--dry-run")
    code, out, _ = submission.end()
    assert code == 0
    assert "#SBATCH --gpus-per-node=2\n" in out and "#SBATCH --ntasks-per-node=2\n" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes", "3"], "sbatch refused the job: Batch job submission failed: "),
        (["--nodes", "2", "--gpus-per-node", "99"], "sbatch refused the job: "),
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--time", "soon"], "--time soon: not a time limit"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(
    arguments: list[str], told: str, place: Path, start: Run
) -> None:
    submission, run = start("refused", *arguments)
    code, out, err = submission.end()
    assert (code, out) == (2, "")
    assert told in err and err.startswith("error: ") and err.count("\n") == 1
    assert not run.folder.exists()


def test_a_mistake_found_in_a_rank_is_one_line(start: Run, place: Path) -> None:
    data = place / "data"
    data.mkdir()
    (data / "train.csv").write_text("id\tsentence\tsentiment\na\tgood\t9\n")
    (data / "dev.csv").write_text("id\tsentence\tsentiment\na\tgood\t1\n")
    here = ["data={dir: data, generate: null}", "tasks.para=null", "tasks.sts=null"]
    files = ["tasks.sst.train=train.csv", "tasks.sst.dev=dev.csv"]
    submission, _ = start("mistaken", "--nodes", "2", "--follow", "--set", *here, *files)
    code, _, err = submission.end()
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("job ")]
    assert len(lines) == 1 and lines[0].startswith("error: ")


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_run_folder_that_a_node_does_not_see(node: str, start: Run, cluster: Cluster, tmp_path: Path) -> None:
    cluster("hide", node, tmp_path)
    submission, _ = start("hidden", "--nodes", "2", "--follow", "--set", f"run.dir={tmp_path / 'runs'}")
    code, _, err = submission.end()
    assert code != 0
    assert "put run.dir on a file system that all nodes share" in err
    wait_until(lambda: "idle" in scontrol("show", "node", node).lower(), 30, "an idle node")


def test_a_plain_batch_script_without_submitit(place: Path, cluster: Cluster, undisturbed: Trained) -> None:
    root = Path(__file__).parent.parent.parent
    (place / ".venv").symlink_to(Path(sys.prefix))
    variables = {**os.environ, "CONFIG": "tiny.yaml", "PYTHONPATH": str(root)}
    submitted = subprocess.run(
        ["sbatch", "--wait", root / "slurm" / "train.sbatch", "runs/plain"], cwd=place, env=variables
    )
    assert submitted.returncode == 0
    assert_same_course(Trained(place / "runs" / "plain"), undisturbed)
