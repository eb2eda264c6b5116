"""A search on several machines: a Slurm job whose first node drives, and whose other nodes lend their CPUs and GPUs.

    python -m tune --cluster slurm --nodes 2 ...     makes the search folder and submits SEARCH/search.sbatch
    python -m tune.allocation SEARCH                 what the job runs on every node

What `ray symmetric-run` does, for nodes that may be shared: that ends every Ray on a node with `ray stop`, also other
people's, and its workers wait for minutes when the head is gone. Here Slurm ends what is left of the step.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.records import ROOT
from mtbert.config import UserError
from mtbert.runs import write_atomically
from tune.cluster import OBJECT_STORE_BYTES, make_home, set_variables, write_token

JOIN_S = 120
"""For all nodes to come; Slurm starts the tasks of a step together, so this is for slow file systems."""

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --output={folder}/slurm.log
#SBATCH --open-mode=append
#SBATCH --requeue
{options}
# one task per node; when the first, which drives, has ended, the others are ended too
srun --wait=5 {cpus} {python} -m tune.allocation {folder}
exit $(cat {folder}/.exit)
"""


def submit(folder: Path, name: str, nodes: int, cpus: int, options: Sequence[str]) -> str:
    """Writes the batch script and submits it; returns the job's id. Raises `UserError` with sbatch's complaint."""
    script = folder / "search.sbatch"
    lines = [f"#SBATCH --{option}" for option in [f"cpus-per-task={cpus}", *options]]
    text = SCRIPT.format(
        name=shlex.quote(f"mtbert-{name}"),
        nodes=nodes,
        folder=shlex.quote(str(folder)),
        options="\n".join(lines),
        cpus=f"--cpus-per-task={cpus}",  # srun does not take it over from the batch script
        python=f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)}",
    )
    write_atomically(script, text)
    sent = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True)
    if sent.returncode:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in sent.stderr.splitlines() if line]
        raise UserError(f"sbatch refused the search: {'; '.join(lines)}")
    return sent.stdout.strip().split(";")[0]


def main() -> int:
    """On one node of the job."""
    folder = Path(sys.argv[1])
    hosts = _hosts()
    job, number = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NODEID"])
    port = 6380 + int(job) % 2000  # below the ports of Ray's own workers
    home = make_home()
    token = folder / "token"
    try:
        if number == 0:
            token.unlink(missing_ok=True)
            (folder / ".exit").unlink(missing_ok=True)
            set_variables(write_token(folder))
            return _drive(folder, home, socket.gethostbyname(hosts[0]), port, len(hosts))
        _wait_for(hosts[0], port)
        set_variables(token)
        return subprocess.run([*_ray_start(home), f"--address={hosts[0]}:{port}", "--block"]).returncode
    finally:
        if number == 0:
            token.unlink(missing_ok=True)
        shutil.rmtree(home, ignore_errors=True)


def _drive(folder: Path, home: Path, address: str, port: int, nodes: int) -> int:
    head = subprocess.Popen(
        [
            *_ray_start(home),
            "--head",
            f"--node-ip-address={address}",
            f"--port={port}",
            f"--temp-dir={home}",
            "--block",
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_for(address, port)
        from tune.search import main as search

        code = search(["--resume", str(folder), "--address", f"{address}:{port}", "--nodes", str(nodes)])
    finally:
        head.terminate()
        head.wait()
    write_atomically(folder / ".exit", str(code))
    return code


def _ray_start(home: Path) -> list[str]:
    cpus = os.environ["SLURM_CPUS_ON_NODE"]
    return [
        *[sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", f"--num-cpus={cpus}"],
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
    ]


def _hosts() -> list[str]:
    listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(listed, check=True, capture_output=True, text=True, timeout=60).stdout.split()


def _wait_for(host: str, port: int) -> None:
    """Until something listens there: a node that joins a head that is not there waits for a quarter of an hour."""
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise SystemExit(f"error: Ray's head did not come up on {host}:{port} within {JOIN_S} s") from None
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
