"""One long run, disturbed at random moments, held against one that was left alone.

    MTBERT_SLURM=1 python tests/slurm/soak.py [disturbances] [seed]        as root on Debian, about 40 s each

Prints a Markdown table for docs/reliability.md. Exit code 1 when the runs differ.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import Cluster, Submission, Trained, scontrol, wait_until, write_config

STEPS_EACH = 130
EVERY_STEPS = 20


def main(disturbances: int = 20, seed: int = 0) -> int:
    draw = random.Random(seed)
    steps = disturbances * STEPS_EACH
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    write_config(place / "soak.yaml", phases=[{"steps": steps}])
    cluster = Cluster(place / "lab")
    os.environ["SLURM_CONF"] = str(cluster.lab / "slurm.conf")
    cluster("up")
    try:
        return soak(draw, disturbances, steps, place, cluster)
    finally:
        cluster("down")
        shutil.rmtree(place, ignore_errors=True)


def soak(draw: random.Random, disturbances: int, steps: int, place: Path, cluster: Cluster) -> int:
    submission, run = submit(place, "disturbed")
    print("| # | disturbance | at step | next attempt began with | lost steps | back after |")
    print("|---|---|---|---|---|---|")
    for number in range(disturbances):
        wait_for(run, number * STEPS_EACH + draw.randrange(30, STEPS_EACH - 20))
        time.sleep(draw.random())
        kind = draw.choice(["USR2", "USR2 on one rank", "requeue", "kill -9 of a rank", "power cut"])
        before, attempts, began = run.step(), starts(run), time.monotonic()
        disturb(kind, run, cluster, draw)
        wait_for_start(run, attempts + 1)
        first = int(continued(run)[-1])
        lost = max(0, before + 1 - first)
        print(f"| {number + 1} | {kind} | {before} | {first} | {lost} | {time.monotonic() - began:.0f} s |", flush=True)
    code, out, err = submission.end(timeout=600)
    quiet, reference = submit(place, "undisturbed")
    quiet_code, _, _ = quiet.end(timeout=1200)
    same = bool(final(run, steps)) and final(run, steps) == final(reference, steps)
    logged = [line["step"] for line in run.lines() if "loss/sst" in line]
    whole = logged == list(range(steps))
    print(f"\nexit codes {code} and {quiet_code}; weights and optimizer state equal bit for bit: {same}; ")
    print(f"every step in the metrics, none twice: {whole}")
    if code:
        print(out, err)
    return int(not (same and whole and code == quiet_code == 0))


def submit(place: Path, name: str) -> tuple[Submission, Trained]:
    arguments = ["--config", "soak.yaml", "--nodes", "2", "--follow", "--set", f"run.name={name}"]
    return Submission(place, *arguments), Trained(place / "runs" / name)


def disturb(kind: str, run: Trained, cluster: Cluster, draw: random.Random) -> None:
    if kind == "USR2":
        subprocess.run(["scancel", "--signal=USR2", run.job], check=True)
    elif kind == "USR2 on one rank":
        os.kill(run.ranks()[draw.randrange(2)], signal.SIGUSR2)
    elif kind == "requeue":
        scontrol("requeue", run.job)
    elif kind == "kill -9 of a rank":
        os.kill(run.ranks()[draw.randrange(2)], signal.SIGKILL)
    else:
        cluster("crash", "node2")
        time.sleep(draw.uniform(1, 20))
        cluster("revive", "node2")


def starts(run: Trained) -> int:
    return len(continued(run))


def wait_for_start(run: Trained, number: int) -> None:
    wait_until(lambda: starts(run) >= number, 300, f"start {number} after the first")


def continued(run: Trained) -> list[str]:
    """The steps that attempts after the first began with, from rank 0's log."""
    path = run.folder / "logs" / "rank0.log"
    words = path.read_text().split("continuing after step ") if path.exists() else [""]
    return [text.split()[0] for text in words[1:]]


def wait_for(run: Trained, step: int) -> None:
    deadline = time.monotonic() + 300
    while run.step() < step:
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.1)


def final(run: Trained, steps: int) -> dict[str, bytes]:
    folder = run.folder / "checkpoints" / f"step-{steps:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
