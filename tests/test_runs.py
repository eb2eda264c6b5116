"""A run folder is there whole or not at all, holds what a reader needs, and no secret."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from mtbert import __version__
from mtbert.config import Config, DataConfig, EncoderConfig
from mtbert.config_files import load_config
from mtbert.environment import commit, cpu
from mtbert.errors import UserError
from mtbert.files import HOST, NODE, alive, sweep, write_atomically
from mtbert.record import RunRecord
from mtbert.runs import FORMAT, Outcome, Rank, cpu_quota, create_run, discard_unstarted, usable_cores

ROOT = Path(__file__).parent.parent
COMMAND = ["mtbert", "train", "--set", "seed=3"]


def make_config(folder: Path, name: str | None = "first", **run: object) -> Config:
    task = {"kind": "classification", "train": "t", "dev": "d"}
    data = {"dir": "/data", "cache": "/cache"}
    return Config.model_validate(
        {"data": data, "tasks": {"sst": task}, "run": {"dir": str(folder), "name": name, **run}}
    )


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("hidden", [PermissionError, FileNotFoundError])
def test_another_user_s_process_lives_also_where_proc_hides_it(
    monkeypatch: pytest.MonkeyPatch, hidden: type[OSError]
) -> None:
    """As /proc with hidepid=1 and 2 does."""

    def refuse(*_: object) -> None:
        raise PermissionError

    def hide(*_: object) -> str:
        raise hidden

    with subprocess.Popen(["sleep", "60"]) as process:
        monkeypatch.setattr(Path, "read_text", hide)
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", refuse)
            assert alive(process.pid)
        process.kill()
    assert not alive(process.pid)


# ------------------------------------------------------------------------------------------- run folders


def test_the_folder_holds_config_and_environment(tmp_path: Path) -> None:
    config = make_config(tmp_path / "deep" / "runs")
    folder = create_run(config, "mine.yaml", COMMAND)
    assert folder == tmp_path / "deep" / "runs" / "first"
    assert contents(folder) == ["config.yaml", "environment.json"]
    assert load_config(folder / "config.yaml") == config
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"] == COMMAND
    assert environment["directory"] == str(Path.cwd())
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["cpus"] == os.cpu_count()
    assert {"torch", "deepspeed", "safetensors", "numpy"} <= set(environment["packages"])
    assert (environment["mtbert"], environment["commit"]) == (__version__, commit() or None)
    assert environment["cpu"] == cpu() != ""
    assert {"format": FORMAT, **RunRecord(folder).environment.model_dump()} == environment


def test_the_commit_is_that_of_this_program(tmp_path: Path) -> None:
    """With a + where the code is another by now; a copy that lies in the checkout of something else has none."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    code, installed = tmp_path / "mtbert" / "environment.py", tmp_path / ".venv" / "environment.py"
    for path in (code, installed):
        path.parent.mkdir()
        path.write_text("1\n")
    assert commit(code) == ""
    git("init", "--quiet")
    git("add", "mtbert")
    git("commit", "--quiet", "--message", "one")
    head = git("rev-parse", "--short=10", "HEAD").strip()
    assert (commit(code), commit(installed)) == (head, "")
    code.write_text("2\n")
    assert commit(code) == f"{head}+"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = create_run(make_config(tmp_path), None, COMMAND)
    assert json.loads((folder / "environment.json").read_text())["commit"] is None


def test_a_command_line_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = create_run(make_config(tmp_path), None, ["mtbert", os.fsdecode(b"--config=caf\xe9.yaml")])
    assert RunRecord(folder).environment.command == ["mtbert", r"--config=caf\udce9.yaml"]


def test_no_environment_variable_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret-of-the-test")
    folder = create_run(make_config(tmp_path), None, COMMAND)
    told = "".join(path.read_text() for path in folder.iterdir())
    assert "secret-of-the-test" not in told
    assert "HF_TOKEN" not in told


def test_an_existing_name_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = create_run(make_config(tmp_path), None, COMMAND)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"^run\.name first: .*exists already; choose another name, or .*--resume"):
        create_run(make_config(tmp_path, log_every=3), None, COMMAND)
    assert (folder / "config.yaml").read_bytes() == before


def test_of_many_that_want_a_name_one_gets_it(tmp_path: Path) -> None:
    won: list[Path] = []
    lost: list[UserError] = []

    def want() -> None:
        try:
            won.append(create_run(make_config(tmp_path), None, COMMAND))
        except UserError as error:
            lost.append(error)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


def test_default_names_tell_config_and_content(tmp_path: Path) -> None:
    one = create_run(make_config(tmp_path, None), "configs/cs224n.yaml", COMMAND).name
    other = create_run(make_config(tmp_path, None, log_every=3), "configs/cs224n.yaml", COMMAND).name
    _, _, config, digest = one.split("-")
    assert config == "cs224n" and len(digest) == 6
    assert digest != other.split("-")[-1]
    assert create_run(make_config(tmp_path, None), None, COMMAND).name.split("-")[2] == "run"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run\.dir .*file/runs: cannot make .*: Not a directory$"):
        create_run(make_config(tmp_path / "file" / "runs"), None, COMMAND)


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from mtbert.config_files import load_config
    from mtbert.errors import UserError
    from mtbert.files import write_atomically
    from mtbert.runs import create_run
    task = "tasks.a={kind: classification, train: t, dev: d}"
    config = load_config(None, [f"run.dir={sys.argv[1]}", "run.name=first", task])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # no file grows beyond 100 bytes: as on a full disk
    try:
        create_run(config, None, [])
    except UserError as error:
        print(error)
    target = Path(sys.argv[1], "precious.txt")
    try:
        write_atomically(target, "x" * 200)
    except OSError:
        print(target.read_text())
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    (tmp_path / "precious.txt").write_text("as it was")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    told, kept = done.stdout.splitlines()
    assert told == f"run.dir {tmp_path}: cannot write to {tmp_path / 'first'}: File too large"
    assert kept == "as it was"
    assert contents(tmp_path) == ["precious.txt"]


def test_a_run_that_never_started_is_discarded_and_one_that_did_is_kept(tmp_path: Path) -> None:
    folder = create_run(make_config(tmp_path), None, COMMAND)
    discard_unstarted(folder)
    assert not folder.exists()
    folder = create_run(make_config(tmp_path), None, COMMAND)  # the name is free again
    (folder / "metrics.jsonl").write_text("")
    discard_unstarted(folder)
    assert contents(folder) == ["config.yaml", "environment.json", "metrics.jsonl"]


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("content", ["", "é\n\r\n", b"\x00\xff"])
def test_what_is_written_is_read(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert contents(tmp_path) == ["file"]


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 10) == b"new"
    os.close(reader)
    assert contents(tmp_path) == ["link", "pipe", "real"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    versions = [bytes([65 + n]) * 300_000 for n in range(4)]
    write_atomically(path, versions[0])
    over = threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        while not over.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(60):
        write_atomically(path, versions[n % 4])
    over.set()
    reader.join()
    assert len(set(seen)) > 1
    assert set(seen) <= set(versions)


# ------------------------------------------------------------------------------------------- records


def test_ranks_and_outcomes_travel_between_processes() -> None:
    for record in (Rank(1, 4, 1, 2, "tcp://node:1"), Outcome("stopped", 3, {"sst": 0.5})):
        assert pickle.loads(pickle.dumps(record)) == record
    assert [Rank(rank, 2).first for rank in range(2)] == [True, False]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rank().rank = 1  # type: ignore[misc]


def test_no_torch_in_here() -> None:
    """`launch` and `tune` import this at their start."""
    code = "import mtbert.runs, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_paths_in_the_folder_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is continued and evaluated from anywhere; hub names and generated data stay as they are."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    written = {}
    for number, pretrained in enumerate(["model", "google-bert/bert-base-uncased"]):
        encoder = EncoderConfig(pretrained=pretrained, tokenizer="t.json")
        config = make_config(tmp_path / "runs", f"{number}")
        config = config.model_copy(update={"data": DataConfig(dir="data"), "encoder": encoder})
        written[number] = load_config(create_run(config, f"{number}.yaml", []) / "config.yaml")
    assert written[0].data.dir == str(tmp_path / "data")
    assert written[0].encoder.tokenizer == str(tmp_path / "t.json")
    assert written[0].encoder.pretrained == str(tmp_path / "model")
    assert written[1].encoder.pretrained == "google-bert/bert-base-uncased"


# ------------------------------------------------------------------------------------- what is left of files

HANGS = """
import sys
from pathlib import Path
from mtbert.files import written_aside
with written_aside(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    print("half", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_wrote_aside_is_swept(tmp_path: Path) -> None:
    """By the next who writes the file, and by `sweep` for all files of a folder; a living process keeps its own."""
    for name in ("[1].json", "other.json"):
        command = [sys.executable, "-c", HANGS, str(tmp_path / name)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == "half\n"
        write_atomically(tmp_path / name, "whole")
        sweep(tmp_path)
        [left] = tmp_path.glob(".*.tmp")
        assert left.read_text() == "half"
        process.kill()
        process.communicate()
        if name == "[1].json":
            write_atomically(tmp_path / "other.json", "another file")
            assert left.exists()
            write_atomically(tmp_path / name, "whole")
        else:
            sweep(tmp_path)
        assert contents(tmp_path) == sorted({"other.json", "[1].json"})


def test_what_another_container_writes_aside_is_left_alone_for_a_day(tmp_path: Path) -> None:
    """Its host has the same name, and its processes are not to be seen; that of another host is none of ours."""
    pid = subprocess.Popen(["true"])
    pid.wait()
    names = [f".model.{host}.{pid.pid}.tmp" for host in (HOST, f"{NODE}-1", NODE, f"{NODE}x-1", "other")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    sweep(tmp_path)
    assert contents(tmp_path) == sorted(names[1:])
    for name in names[1:]:
        for path in (tmp_path / name / "weights", tmp_path / name):
            os.utime(path, (0, 0))
    (tmp_path / names[1] / "weights").touch()
    sweep(tmp_path)
    assert contents(tmp_path) == sorted([names[1], *names[3:]])


def test_names_that_no_task_of_a_new_run_may_have(tmp_path: Path) -> None:
    """A run that has one may be read for ever."""
    for name in ("shared", "composite"):
        config = make_config(tmp_path)
        config = config.model_copy(update={"tasks": {name: config.tasks["sst"]}})
        with pytest.raises(UserError, match=rf"^tasks\.{name}: this name belongs to the .+; choose another$"):
            create_run(config, None, COMMAND)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("own", "limits", "granted"),
    [
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/kubepods/pod7", {"cpu.max": "200000 50000"}, 4),  # within the container it is not to be seen
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("4:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("0::/", {"cpu.max": "noise"}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_what_control_groups_grant(tmp_path: Path, own: str | None, limits: dict[str, str], granted: float) -> None:
    for name, text in {**limits, "other": ""}.items():
        (tmp_path / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name).write_text(f"{text}\n")
    if own is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"1:name=systemd:/\n{own}\n")
    assert cpu_quota(tmp_path) == granted
    assert usable_cores() >= 1
