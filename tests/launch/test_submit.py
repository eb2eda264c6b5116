"""The command line: what it shows, what it refuses, and that a refusal leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from fake_slurm import FakeSlurm
from harness import PATIENCE_S

from launch import records
from launch.records import End, EndRecord, JobNote, Lock, snapshot_code, stop_path, write_note
from launch.slurm import standings
from launch.submit import main
from mtbert.config_files import load_config
from mtbert.errors import UserError
from mtbert.lock import RunLock
from mtbert.runs import create_run

ROOT = Path(__file__).parent.parent.parent

CONFIG = {
    "data": {"generate": {"train": 40, "dev": 20}},
    "encoder": {"shape": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}},
    "tasks": {"sst": {"kind": "classification", "train": "sst-train.csv", "dev": "sst-dev.csv", "classes": 5}},
    "phases": [{"steps": 4}],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def submit(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In this process, which spares each test the imports."""
    words = [str(word) for word in arguments]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        try:
            code = main(words)
        except SystemExit as ended:  # of the parser
            code = int(ended.code or 0)
    out.seek(0)
    return subprocess.CompletedProcess(words, code, out.read(), err.getvalue())


def submit_apart(*arguments: str | Path, cwd: Path, script: bool = True) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as from a shell."""
    start = [ROOT / "launch" / "submit.py"] if script else ["-m", "launch.submit"]
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize("script", [True, False])
def test_help_is_there_from_anywhere(script: bool, tmp_path: Path) -> None:
    done = submit_apart("--help", cwd=tmp_path if script else ROOT, script=script)
    assert done.returncode == 0 and "--ranks-per-node" in done.stdout


def test_nothing_that_takes_seconds_is_imported_to_submit() -> None:
    heavy = ["torch", "deepspeed", "numpy", "tokenizers", "sklearn", "scipy", "ray", "optuna", "tensorboard"]
    code = f"import sys, launch.submit, launch.local; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_dry_run_shows_the_configuration_and_makes_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = submit("--nodes", "2", "--config", config, "--set", "seed=7", "--local", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, _, rest = done.stdout.partition("\n")
    assert "2 node(s) × 1 CPU rank(s)" in first
    assert yaml.safe_load(rest)["seed"] == 7
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "optimiser.lr=1"], "did you mean 'optimizer'?"),
        (["--set", "optimizer.lr=fast"], "optimizer.lr: input should be a valid number"),
        (["--set", "data={dir: nowhere}"], "data"),
        (["--ranks-per-node", "1", "--gpus-per-node", "1"], "one rank per GPU"),
        (["--gpus-per-node", "900"], "--gpus-per-node 900"),
        (["--resume", "nowhere"], "leave --config out"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], told: str, config: Path, tmp_path: Path
) -> None:
    done = submit("--config", config, "--local", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize("nodes", ["0", "two", "-1"])
def test_a_wrong_number_of_nodes_is_refused(nodes: str, config: Path, tmp_path: Path) -> None:
    done = submit("--config", config, f"--nodes={nodes}", cwd=tmp_path)
    assert done.returncode == 2
    told = f"error: argument --nodes: {nodes!r} is not a number from 1 (--help shows what there is)\n"
    assert done.stderr == f"python launch/submit.py: {told}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nods", "2"], "unrecognized arguments: --nods; did you mean --nodes?"),
        (["--nods=2"], "unrecognized arguments: --nods=2; did you mean --nodes?"),
        (["statsu"], "statsu: expected an"),
    ],
)
def test_a_wrong_word_is_named_itself(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = submit(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"python launch/submit.py: error: {told}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "my.yaml"], "train my.yaml: --config takes a configuration, --resume a run folder to continue"),
        (
            ["--follow", "runs/x", "--resume=y", "--nodes", "1"],
            "--follow RUN only watches a job; leave --resume, --nodes out",
        ),
        (["cancel", "runs/x", "--dry-run"], "cancel takes run folders and no options; leave --dry-run out"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = submit(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("visible", "shape", "ranks"),
    [
        ("0,1", [], "1 node(s) × 2 GPU rank(s)"),
        ("3,2,-1,0", [], "1 node(s) × 2 GPU rank(s)"),
        ("-1", [], "1 node(s) × 1 CPU rank(s)"),
        ("", [], "1 node(s) × 1 CPU rank(s)"),
        ("0", ["--nodes", "2", "--ranks-per-node", "2"], "2 node(s) × 2 CPU rank(s)"),
    ],
)
def test_gpus_are_those_cuda_would_see(
    visible: str, shape: list[str], ranks: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = submit("--config", config, "--local", "--dry-run", *shape, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith(f": {ranks}")


def test_gpus_that_stay_idle_are_told(
    config: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slurm.does("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-abc)'")
    done = submit("--config", config, "--local", "--dry-run", "--nodes", "2", cwd=tmp_path)
    assert "2 node(s) × 1 CPU rank(s)" in done.stdout
    assert done.stderr == "1 GPU(s) stay idle, fewer than the 2 nodes; --nodes 1 would use them\n"


def test_a_driver_that_hangs_counts_as_no_gpu(
    config: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("launch.local.DRIVER_S", 0.3)
    slurm.does("nvidia-smi", "exec sleep 9")
    done = submit("--config", config, "--local", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "1 CPU rank(s)" in done.stdout
    assert done.stderr == "nvidia-smi does not answer within 0.3 s, so no GPU is used\n"


@pytest.mark.parametrize("visible", ["GPU-5ebe9f43", "0,MIG-41b35"])
def test_gpus_without_numbers_are_refused_before_there_is_a_run_folder(
    visible: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = submit("--config", config, "--local", "--set", "run.name=mine", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.endswith(f"{visible.split(',')[-1]}: local jobs need device numbers, such as 0,1\n")
    assert list(tmp_path.iterdir()) == [config]


def test_gpus_that_torch_cannot_use_are_one_line_and_no_ranks_on_cpus(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "97")
    done = submit("--config", config, "--local", "--set", "run.name=mine", cwd=tmp_path)
    assert done.returncode == 2 and "1 GPU rank(s)" in done.stdout
    *_, last = done.stderr.splitlines()
    assert "CUDA_VISIBLE_DEVICES names 97, but torch " in last and "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "runs" / "mine").exists()


def test_options_of_slurm_are_not_passed_over_in_silence(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--time", "1:00:00", "--mem=8G", "--slurm", "exclusive"]
    done = submit("--config", config, "--local", "--dry-run", *options, cwd=tmp_path)
    told = "error: --local trains without Slurm; leave --time, --mem, --slurm out\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = submit("--config", config, "--dry-run", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "not used, as there is no Slurm here: --time, --mem, --slurm\n")
    done = submit("--config", config, "--dry-run", "--time", "soon", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --time soon: not a time limit; ")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("nodes=3", "use --nodes"),
        ("ntasks_per_node=2", "use --ranks-per-node"),
        ("gpus-per-node=a100:2", "use --gpus-per-node"),
        ("cpus-per-task=4", "use --cpus-per-rank"),
        ("time=10", "use --time"),
        ("array=0-3", "use --array"),
        ("gpus-per-task=1", "is set by the launcher"),
        ("wrap=hostname", "is set by the launcher"),
        ("export=NONE", "is set by the launcher"),
    ],
)
def test_what_the_batch_script_relies_on_is_not_passed_over_its_head(
    config: Path, tmp_path: Path, slurm: FakeSlurm, option: str, told: str
) -> None:
    done = submit("--config", config, "--slurm", "exclusive", option, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: --slurm {option}: {told}\n")
    assert not (tmp_path / "runs").exists() and slurm.calls("sbatch") == []


def test_missing_data_are_named_before_anything_starts(config: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    here: list[str | Path] = ["--config", config, "--local", "--set", "data.generate=null"]
    done = submit(*here, f"data.dir={tmp_path / 'nowhere'}", cwd=tmp_path)
    assert done.stderr == f"error: data.dir {tmp_path / 'nowhere'}: no such folder\n"
    done = submit(*here, f"data.dir={data}", cwd=tmp_path)
    assert done.stderr == f"error: tasks.sst.train: no file {data / 'sst-train.csv'}\n"
    done = submit(*here, cwd=tmp_path)
    assert done.stderr == f"error: tasks.sst.train: no file sst-train.csv in {tmp_path}; data.dir is not set\n"
    done = submit(*here, f"tasks.sst.train={data}/t.csv", cwd=tmp_path)
    assert done.stderr == f"error: tasks.sst.train: no file {data}/t.csv\n"
    assert not (tmp_path / "runs").exists()


def test_a_tilde_is_the_home_folder(
    config: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "t.csv").touch()
    monkeypatch.setenv("HOME", str(home))
    files = ["data.generate=null", "tasks.sst.train=~/t.csv", "tasks.sst.dev=~/t.csv"]
    for more in ([], [f"data.dir={tmp_path}"]):
        done = submit("--config", config, "--dry-run", "--set", "run.dir=~/runs", *files, *more, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"runs=({home}/runs/RUN)" in done.stdout
    done = submit("--resume=~/runs", cwd=tmp_path)  # which shells leave as it is
    assert done.stderr == f"error: --resume {home}/runs: no run folder, config.yaml is missing there\n"
    done = submit("--config", config, "--dry-run", "--set", *files, "tasks.sst.dev=~/d.csv", cwd=tmp_path)
    assert done.stderr == f"error: tasks.sst.dev: no file {home}/d.csv\n"


def test_a_continued_run_keeps_what_it_trains(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.read_text())
    done = submit("--resume", run, "--set", "optimizer.lr=1", "--local", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and "optimizer.lr=1: a continued run keeps what it trains" in done.stderr
    done = submit("--resume", run, "--set", "checkpoint.keep=5", "--local", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "keep: 5" in done.stdout


def test_a_continued_run_has_absolute_paths_as_a_new_one_has(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "echo Submitted batch job 7")
    run = create_run(load_config(config, ["data.generate=null", f"run.dir={tmp_path}"]), None, [])
    data = tmp_path / "DATA"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"sst-{split}.csv").touch()
    done = submit("--resume", run, "--set", "data.dir=DATA", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_config(run / "config.yaml").data.dir == str(data)


def test_a_taken_name_is_not_overwritten(config: Path, tmp_path: Path) -> None:
    taken = tmp_path / "runs" / "mine"
    taken.mkdir(parents=True)
    done = submit("--config", config, "--local", "--set", "run.name=mine", cwd=tmp_path)
    assert done.returncode == 2 and "exists already" in done.stderr
    assert list(taken.iterdir()) == []


def test_a_refused_array_takes_only_its_own_runs_with_it(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    """Whether sbatch refuses it or one of its names is taken; the others in the array stay."""
    slurm.does("sbatch", "echo 'sbatch: error: no room' >&2; exit 1")
    array = tmp_path / "runs" / "seeds"
    arguments = ["--config", config, "--set", "run.name=seeds", "--array"]
    done = submit(*arguments, "seed=0,1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sbatch refused the job: no room" in done.stderr and done.stderr.count("\n") == 1
    assert not array.exists()

    slurm.does("sbatch", "echo Submitted batch job 7")
    assert submit(*arguments, "seed=1", cwd=tmp_path).returncode == 0
    slurm.does("sbatch", "exit 1")
    for more in ("seed=2,3", "seed=2,1"):
        done = submit(*arguments, more, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert sorted(path.name for path in array.iterdir()) == ["code", "job", "seed=1"]
    slurm.does("sbatch", "echo Submitted batch job 8")
    done = submit(*arguments, "seed=2,3", cwd=tmp_path)
    assert done.returncode == 0 and "job 8_1:" in done.stdout
    assert (
        done.stdout.splitlines()[0] == "runs/seeds: trains with the code of runs/seeds/code, from its first submission"
    )
    assert all((array / f"seed={seed}" / "code" / "launch").is_dir() for seed in (1, 2, 3))


def test_a_refused_array_leaves_the_runs_that_another_submission_put_there(
    config: Path, tmp_path: Path, slurm: FakeSlurm
) -> None:
    slurm.does("sbatch", "mkdir runs/seeds/seed=2; exit 1")
    done = submit("--config", config, "--set", "run.name=seeds", "--array", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 2
    assert sorted(path.name for path in (tmp_path / "runs" / "seeds").iterdir()) == ["code", "job", "seed=2"]


def test_a_job_on_slurm_that_cannot_be_noted_is_named(
    config: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    slurm.does("sbatch", "echo Submitted batch job 7")
    monkeypatch.setattr("launch.submit.write_note", refuse)
    done = submit("--config", config, "--set", "run.name=mine", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: runs/mine: cannot be written to: No space left on device; "
        "submitted all the same, end it with: scancel 7\n"
    )
    done = submit("--config", config, "--array", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("end it with: scancel 7_0 7_1\n")


def test_a_local_job_that_runs_is_not_continued(config: Path, tmp_path: Path) -> None:
    """Its ranks may not have come to the lock yet."""
    run = create_run(load_config(config, [f"run.dir={tmp_path}"]), None, [])
    (run / "job").mkdir()
    write_note(run, JobNote("local", str(os.getpid()), "ab12", socket.gethostname(), 1, 1))
    done = submit("--local", "--resume", run, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"job {os.getpid()} is not over; end it with: python launch/submit.py cancel {run}" in done.stderr
    long_ago = time.time() - 600
    os.utime(run / "job" / "job.json", (long_ago, long_ago))  # and nobody has the lock: the number is another's now
    assert submit("cancel", run, cwd=tmp_path).stdout == f"local job {os.getpid()} is over\n"


@pytest.mark.parametrize("verb", [["status"], ["cancel"], ["--follow"]])
def test_what_is_no_run_folder_has_no_job(verb: list[str], run: Path) -> None:
    (run / "config.yaml").touch()
    done = submit(*verb, run / "config.yaml", cwd=run.parent)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {run / 'config.yaml'}: no job was submitted from this folder\n",
    )
    (run / "job" / "job.json").mkdir()
    done = submit(*verb, run, cwd=run.parent)
    assert (done.returncode, done.stderr) == (2, f"error: {run / 'job' / 'job.json'}: cannot be read: Is a directory\n")


def test_one_folder_without_a_job_keeps_no_other_running(run: Path, slurm: FakeSlurm) -> None:
    write_note(run, JobNote("slurm", "7", "ab12", "", 2, 1))
    slurm.does("scancel", "exit 0")
    done = submit("cancel", run.parent / "other", run, cwd=run.parent)
    assert done.returncode == 2 and done.stdout.startswith("cancelled job 7; ")


def test_ctrl_c_while_sbatch_is_asked_leaves_nothing(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "kill -INT $PPID; sleep 2; exit 1")
    done = submit_apart("--config", config, "--array", "seed=0,1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert list((tmp_path / "runs").iterdir()) == []


def test_ctrl_c_while_a_local_job_begins_leaves_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.local.snapshot_code", pressed)
    done = submit("--config", config, "--local", "--array", "seed=0,1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_disk_that_is_full_while_a_local_job_begins_is_one_line_and_leaves_nothing(
    config: Path, tmp_path: Path
) -> None:
    """Not the disk, but this process may write no file as large as the largest of our code's."""
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "submit.py", "--config", config, "--local"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "cannot be written to: [Errno 27] File too large" in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_refused_continuation_leaves_the_configuration_as_it_was(
    config: Path, tmp_path: Path, slurm: FakeSlurm
) -> None:
    slurm.does("sbatch", "echo 'sbatch: error: no room' >&2; exit 1")
    run = create_run(load_config(config, [f"run.dir={tmp_path}"]), None, [])
    before = (run / "config.yaml").read_bytes()
    words = ["--resume", run, "--set", "checkpoint.keep=9"]
    assert "no room" in submit(*words, cwd=tmp_path).stderr
    assert (run / "config.yaml").read_bytes() == before
    slurm.does("sbatch", "echo Submitted batch job 7")
    assert submit(*words, cwd=tmp_path).returncode == 0
    assert load_config(run / "config.yaml").checkpoint.keep == 9


def test_a_run_folder_that_one_may_not_write_to_is_one_line(config: Path, tmp_path: Path) -> None:
    """As root as well, without the right to write anywhere."""
    run = create_run(load_config(config, [f"run.dir={tmp_path}"]), None, [])
    run.chmod(0o555)
    powerless = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    words = [*powerless, sys.executable, ROOT / "launch" / "submit.py", "--local", "--resume", run]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (2, f"error: {run}: cannot be written to: Permission denied\n")


def test_a_value_with_a_slash_makes_one_folder(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "echo Submitted batch job 7")
    words = ["--set", "run.name=files", "--array", "data.cache=cache/a,cache/b"]
    done = submit("--config", config, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / "runs" / "files" / f"data.cache=cache_{letter}" for letter in "ab"]
    assert all((run / "code" / "launch").is_dir() for run in runs)


def test_a_command_that_is_told_can_be_typed(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "echo Submitted batch job 7")
    done = submit("--config", config, "--set", "run.name=my run", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "watch with: python launch/submit.py --follow 'runs/my run'"
    slurm.does("scontrol", "echo JobState=PENDING")
    for way in ([], ["--local"]):
        done = submit("--resume", "runs/my run", *way, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.endswith("or end it with: python launch/submit.py cancel 'runs/my run'\n")


def test_ctrl_c_while_an_array_is_watched_leaves_at_once(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "echo Submitted batch job 7")
    slurm.does("scontrol", "echo JobState=RUNNING NodeList=n1")
    words = [ROOT / "launch" / "submit.py", "--config", config, "--array", "seed=0,1", "--follow"]
    following = subprocess.Popen([sys.executable, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert following.stderr and following.stderr.readline() == "job 7_0: running on n1\n"
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 130
    assert "job 7_0 goes on" in err and "7_1" not in err


def test_a_job_submitted_from_inside_a_job_gets_nothing_of_that_one(
    config: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch passes its environment on: the id of an array on a node would be that of the new job."""
    slurm.does("sbatch", "env >$0.env; echo Submitted batch job 7")
    outer = ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CPU_BIND", "SLURMD_NODENAME", "SRUN_DEBUG")
    ours = ("SUBMITIT_EXECUTOR", "MTBERT_BATCH_STARTED")
    for name in (*outer, *ours, "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "5")
    before = dict(os.environ)
    assert submit("--config", config, cwd=tmp_path).returncode == 0
    assert dict(os.environ) == before
    passed = {line.partition("=")[0] for line in (slurm.place / "sbatch.env").read_text().splitlines()}
    assert {"SLURM_CONF", "SBATCH_ACCOUNT"} <= passed and not passed & {*outer, *ours}


def test_who_has_enough_of_a_job_on_slurm_leaves_it_running(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "echo Submitted batch job 7")
    slurm.does("scontrol", "echo JobState=RUNNING NodeList=n1")
    slurm.does("scancel", "exit 0")
    words = [ROOT / "launch" / "submit.py", "--config", config, "--array", "seed=0,1", "--follow"]
    following = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert following.stderr and following.stdout
    assert following.stderr.readline() == "job 7_0: running on n1\n"
    following.stdout.close()
    log = next((tmp_path / "runs").glob("*/seed=0")) / "logs" / "rank0.log"
    log.parent.mkdir()
    log.write_text("step 1\n")
    with following.stderr as errors:
        assert (errors.read(), following.wait(PATIENCE_S)) == ("", 141)
    assert slurm.calls("scancel") == []


def test_a_table_that_nobody_reads_to_its_end_is_no_traceback(run: Path) -> None:
    words = [sys.executable, ROOT / "launch" / "submit.py", "status"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, cwd=run.parent, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_preempted_job_that_slurm_cancelled_is_over(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "echo Submitted batch job 7")
    assert submit("--config", config, "--set", "run.name=mine", cwd=tmp_path).returncode == 0
    slurm.does("scontrol", "echo JobState=PREEMPTED Restarts=0")
    done = submit("status", "runs/mine", cwd=tmp_path)
    assert done.stdout.splitlines()[1].split() == ["runs/mine", "slurm", "7", "killed", "-"]


def test_cancel_says_what_scancel_complains_of_in_one_line(run: Path, slurm: FakeSlurm) -> None:
    write_note(run, JobNote("slurm", "7", "ab12", "", 2, 1))
    slurm.does("scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1")
    done = submit("cancel", run, cwd=run.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: cancel {run}: Kill job error on job id 7: Invalid job id specified\n"
    slurm.does("scancel", "exit 3")
    assert submit("cancel", run, cwd=run.parent).stderr == f"error: cancel {run}: scancel failed, exit code 3\n"
    slurm.does("scancel", "exit 0")
    assert submit("cancel", run, cwd=run.parent).stdout.startswith("cancelled job 7; ")


def test_the_folder_of_an_array_stands_for_its_runs(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.does("sbatch", "echo Submitted batch job 7")
    assert submit("--config", config, "--array", "seed=0,1", "--set", "run.name=a", cwd=tmp_path).returncode == 0
    slurm.does("scontrol", "echo JobState=PENDING Restarts=0")
    rows = submit("status", "runs/a", cwd=tmp_path).stdout.splitlines()[1:]
    assert [row.split()[:3] for row in rows] == [[f"runs/a/seed={seed}", "slurm", f"7_{seed}"] for seed in (0, 1)]
    slurm.does("scancel", '[ "$1" = 7_1 ] || { echo "scancel: error: Invalid job id specified" >&2; exit 1; }')
    done = submit("cancel", "runs/a", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: cancel runs/a/seed=0: Invalid job id specified\n")
    assert done.stdout.startswith("cancelled job 7_1; ")
    for verb in ("status", "cancel"):
        done = submit(verb, "runs", cwd=tmp_path)  # which only holds runs
        assert (done.returncode, done.stderr) == (2, "error: runs: no job was submitted from this folder\n")
    done = submit("--follow", "runs/a", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: runs/a: an array of 2 runs; name one of them, such as runs/a/seed=0\n",
    )


def test_cancel_where_there_is_no_slurm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_note(run, JobNote("slurm", "7", "ab12", "", 2, 1))
    monkeypatch.setenv("PATH", str(run))
    done = submit("cancel", run, cwd=run.parent)
    assert done.returncode == 2
    assert done.stderr == f"error: cancel {run}: no scancel here; cancel job 7 where Slurm is\n"


def test_a_local_job_that_is_over_is_not_asked_to_stop(run: Path) -> None:
    """Nor told as running; one that has begun is, though no rank may have the lock yet."""
    with subprocess.Popen(["sleep", "60"]) as job:
        write_note(run, JobNote("local", str(job.pid), "ab12", socket.gethostname(), 2, 1))
        begun = submit("status", run, cwd=run.parent)
        job.kill()
    assert "running" in begun.stdout
    done = submit("cancel", run, cwd=run.parent)
    assert (done.returncode, done.stdout) == (0, f"local job {job.pid} is over\n")
    assert [path.name for path in (run / "job").iterdir()] == ["job.json"]
    assert "killed" in submit("status", run, cwd=run.parent).stdout
    Lock(run, "ab12-0").acquire()  # in the name of this process
    done = submit_apart("cancel", run, cwd=run.parent)
    assert done.stdout == f"asked local job {job.pid} to save and stop\n"
    assert stop_path(run, "ab12").exists()


def test_whose_lock_it_is_says_how_to_end_it(run: Path) -> None:
    """A note may be of an earlier job, which cancel would ask in vain."""
    write_note(run, JobNote("local", "7", "ab12", "elsewhere", 1, 1))
    plain = RunLock(run, "cd34-0")
    plain.acquire()
    with pytest.raises(UserError, match=rf"; wait for it, or end process {os.getpid()} on {socket.gethostname()}$"):
        Lock(run, "ef56-0").acquire()
    assert submit("cancel", run, cwd=run.parent).stdout == "local job 7 is over\n"
    plain.release()
    Lock(run, "ab12-0").acquire()
    with pytest.raises(UserError, match=rf"or end it with: python launch/submit\.py cancel {run}$"):
        RunLock(run, "cd34-0").acquire()
    assert submit("cancel", run, cwd=run.parent).stdout == "asked local job 7 to save and stop\n"


def test_a_slurm_that_is_silent_is_asked_once_and_hides_no_other_job(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PATIENCE_S", 2)
    slurm.does("scontrol", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    runs = [tmp_path / name for name in "abc"]
    for run, cluster in zip(runs, ("slurm", "local", "slurm"), strict=True):
        (run / "job").mkdir(parents=True)
        write_note(run, JobNote(cluster, "7", "ab12", "elsewhere", 2, 1))
    silent = "unknown: Slurm does not answer: slurm_load_jobs error: Unable to contact"
    assert standings(runs) == [
        (str(runs[0]), "slurm 7", silent, "-"),
        (str(runs[1]), "local 7", "killed", "-"),
        (str(runs[2]), "slurm 7", silent, "-"),
    ]
    asked = len(slurm.calls("scontrol"))
    standings(runs[:1])
    assert len(slurm.calls("scontrol")) == 2 * asked, "as often for one as for two"


def test_a_damaged_note_hides_no_other_job(tmp_path: Path) -> None:
    """Asked for that run, status says what to do."""
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "job").mkdir(parents=True)
    damaged = tmp_path / "runs" / "a" / "job" / "job.json"
    damaged.write_text("{")
    write_note(tmp_path / "runs" / "b", JobNote("local", "1", "ab12", "elsewhere", 2, 1))
    done = submit("status", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        ["runs/a", "-", "damaged", "-"],
        ["runs/b", "local", "1", "killed", "-"],
    ]
    done = submit("status", "runs/b", "runs/a", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: runs/a/job/job.json: not what a launcher wrote; ")


def test_of_two_submissions_that_copy_the_code_into_one_folder_one_does(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        copies = [each.result() for each in [pool.submit(snapshot_code, tmp_path) for _ in range(4)]]
    assert copies == [tmp_path / "code"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["code"]
    assert (tmp_path / "code" / "launch" / "start.py").is_file() and (tmp_path / "code" / "mtbert" / "cli.py").is_file()


def test_a_run_folder_from_a_newer_version_is_refused(config: Path, tmp_path: Path) -> None:
    run = create_run(load_config(config, [f"run.dir={tmp_path}"]), None, [])
    made_by = json.loads((run / "environment.json").read_text())
    assert made_by["format"] == 2
    (run / "environment.json").write_text(json.dumps({**made_by, "format": 3}))
    done = submit("--resume", run, "--local", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {run}: run folder of format 3, from a newer mtbert; this one reads up to 2")


def test_a_mistake_found_by_a_rank_leaves_no_run_folder(config: Path, tmp_path: Path) -> None:
    """Not so for a run that is continued."""
    wrong = ["--set", "run.name=wrong", "encoder.tokenizer=nowhere.json"]
    done = submit_apart("--config", config, "--local", *wrong, cwd=tmp_path)
    assert done.returncode == 2 and "nowhere.json" in done.stderr
    assert not (tmp_path / "runs" / "wrong").exists()
    kept = tmp_path / "runs" / "kept"
    kept.mkdir()
    (kept / "config.yaml").write_text(config.read_text() + "seed: 1\n")
    done = submit_apart("--resume", kept, "--local", "--set", "data.cache=/proc/nowhere", cwd=tmp_path)
    assert done.returncode == 2 and (kept / "config.yaml").is_file()


def test_the_last_words_are_those_of_the_last_attempt_of_the_job(
    config: Path, tmp_path: Path, slurm: FakeSlurm
) -> None:
    """Not of an attempt before it that left a record, nor of a job before it; also in an array."""
    slurm.does("sbatch", "echo Submitted batch job 7")
    words = ["--config", config, "--set", "run.name=seeds", "--array", "seed=0,1"]
    assert submit(*words, cwd=tmp_path).returncode == 0
    array = tmp_path / "runs" / "seeds"
    run = array / "seed=1"
    token = json.loads((run / "job" / "job.json").read_text())["token"]
    record = EndRecord(run, f"{token}-0", "node1", 0)
    record.write(End("stopped", 0, "node1", 30))
    record.close()
    (array / "job" / "6_1_0_log.err").write_text("error: the job before\n")
    (array / "job" / "7_0_0_log.err").write_text("error: the other task\n")
    (array / "job" / "7_1_0_log.err").write_text("srun: words\nerror: node2 does not see it\n")
    slurm.does("scontrol", "echo JobState=FAILED Restarts=1")
    done = submit("--follow", run, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:2] == ["error: node2 does not see it"]
    assert submit("status", run, cwd=tmp_path).stdout.splitlines()[1].split()[1:] == ["slurm", "7_1", "killed", "30"]
    (array / "job" / "7_1_0_log.err").unlink()
    assert "could not write to" in submit("--follow", run, cwd=tmp_path).stderr


def test_all_that_the_runs_of_an_array_wrote_is_shown(
    config: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what one wrote before its turn; of a run that is continued, what it wrote since then."""
    monkeypatch.setattr("launch.slurm.ASK_EVERY_S", 0.2)
    speak = "for run in $(ls -d runs/seeds/*=*); do mkdir -p $run/logs; echo ${run##*/} >>$run/logs/rank0.log; done"
    slurm.does("sbatch", f"{speak}; echo Submitted batch job 7")
    slurm.does("scontrol", "echo JobState=CANCELLED Restarts=0")
    done = submit("--config", config, "--set", "run.name=seeds", "--array", "seed=0,1", "--follow", cwd=tmp_path)
    said = [line for line in done.stdout.splitlines() if line.startswith("seed=")]
    assert said == ["seed=0", "seed=1"]
    done = submit("--resume", "runs/seeds/seed=1", "--follow", cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.startswith("seed=")] == ["seed=1"]


def test_a_plain_job_whose_ranks_were_all_killed_says_what_slurm_says(
    run: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has none of submitit's logs; its ranks' say that the folder could be written to."""
    monkeypatch.setattr("launch.slurm.ASK_EVERY_S", 0.2)
    write_note(run, JobNote("slurm", "7", "sbatch7", "", 2, 1))
    slurm.does("scontrol", "echo JobState=OUT_OF_MEMORY Restarts=0")
    told = submit("--follow", run, cwd=run.parent).stderr.splitlines()[1]
    assert told.startswith("error: the first node could not write to ") and "(Slurm says OUT_OF_MEMORY)" in told
    (run / "logs").mkdir()
    (run / "logs" / "rank0.log").touch()
    done = submit("--follow", run, cwd=run.parent)
    killed, way_on = done.stderr.splitlines()[1:]
    assert done.returncode == 1 and way_on.startswith("continue with: ")
    assert killed == f"error: the job was killed (Slurm says OUT_OF_MEMORY); see {run}/logs/"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("surgery.options.reductoin=mean", "error: surgery.options"),
        ("weighting.options.lr=1", "error: weighting.options.lr: fixed has no such option; it takes none"),
        ("encoder.shape=null", "error: encoder.pretrained: give a Hugging Face folder or hub name"),
        ("encoder.pretrained=x/y", "error: encoder.pretrained and encoder.shape exclude each other"),
        ("encoder={pretrained: /nope, shape: null}", "error: encoder.pretrained /nope: no such folder; give one with "),
    ],
)
def test_what_the_ranks_would_refuse_is_refused_before_it_waits(
    config: Path, tmp_path: Path, slurm: FakeSlurm, override: str, told: str
) -> None:
    done = submit("--config", config, "--set", override, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
    done = submit("--config", config, "--set", override, "--local", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("kind", "barred"), [("round_robin", False), ("adaptive", True)])
def test_evaluations_that_decide_what_is_drawn_stay_where_they_are(
    config: Path, tmp_path: Path, kind: str, barred: bool
) -> None:
    run = create_run(load_config(config, [f"schedule.kind={kind}", f"run.dir={tmp_path}", "run.name=r"]), None, [])
    done = submit("--local", "--dry-run", "--resume", run, "--set", "run.evaluate_every=3", cwd=tmp_path)
    assert (done.returncode == 2, "evaluations decide what an adaptive schedule draws" in done.stderr) == (barred,) * 2
