"""A search on several machines: a Slurm job whose first node drives, and whose other nodes lend their CPUs and GPUs.

    python -m tune --cluster slurm --nodes 2 ...     makes the search folder and submits SEARCH/search.sbatch
    python -m tune.allocation SEARCH --nodes 2 ...   what the job runs on every node

What `ray symmetric-run` does, for nodes that may be shared: that ends every Ray on a node with `ray stop`, also other
people's, and its workers wait for minutes when the head is gone. Here Slurm ends what is left of the step.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.records import ROOT, complaint, hosts_of_job, outside_of_any_job
from mtbert.errors import UserError
from mtbert.files import write_atomically
from mtbert.stops import STOPPED
from tune.cluster import OBJECT_STORE_BYTES, ray_folder, ray_home, set_variables, write_token

JOIN_S = 120
"""For all nodes to come; Slurm starts the tasks of a step together, so this is for slow file systems."""
STARTS = 3
"""Of Ray on a node, before the node is given up."""
POLL_S = 0.5

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --output={folder}/slurm.log
#SBATCH --open-mode=append
#SBATCH --requeue
{options}
# a site's --export=NONE is for sbatch; srun would follow it
unset SLURM_EXPORT_ENV
# one task per node; when the first, which drives, has ended, the others are ended too
srun --wait=30 {cpus} {python} -m tune.allocation {folder} {asked}
code=$(cat {folder}/.exit-$SLURM_JOB_ID) && rm {folder}/.exit-$SLURM_JOB_ID
exit ${{code:-1}}
"""


def submit(folder: Path, name: str, nodes: int, cpus: int, options: Sequence[str], asked: Sequence[str]) -> str:
    """Writes the batch script and submits it; returns the job's id. Raises `UserError` with sbatch's complaint.

    `asked`: the words that asked for the nodes; when the search ends it says how to go on with the same.
    """
    script = folder / "search.sbatch"
    lines = [f"#SBATCH --{option}" for option in [f"cpus-per-task={cpus}", *options]]
    text = SCRIPT.format(
        name=shlex.quote(f"mtbert-{name}"),
        nodes=nodes,
        folder=shlex.quote(str(folder)),
        options="\n".join(lines),
        cpus=f"--cpus-per-task={cpus}",  # srun does not take it over from the batch script
        asked=shlex.join(asked),
        python=f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)}",
    )
    write_atomically(script, text)
    with outside_of_any_job():
        sent = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True)
    if sent.returncode:
        raise UserError(f"sbatch refused the search: {complaint(sent.stderr)}")
    return sent.stdout.strip().split(";")[0]


def main() -> int:
    """On one node of the job."""
    # of scancel and a time limit, so that what is here is taken away
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, hosts, job = Path(sys.argv[1]), hosts_of_job(), os.environ["SLURM_JOB_ID"]
    port = 6380 + int(job) % 2000  # below the ports of Ray's own workers
    token = folder / f".token-{job}"  # of this job: another one may search here, or be about to
    with contextlib.suppress(KeyboardInterrupt):
        if os.environ["SLURM_NODEID"] == "0":
            with ray_home(token) as home:
                code = _drive(folder, token, home, _address(hosts), port, len(hosts), sys.argv[2:])
                write_atomically(folder / f".exit-{job}", str(code))
                return code
        with ray_home() as home:
            return _lend(token, home, hosts[0], port)
    return STOPPED


def _address(hosts: Sequence[str]) -> str:
    """Of the first, as the others reach it: what its own /etc/hosts says of its name may be the loopback."""
    address = socket.gethostbyname(hosts[0])
    if address.startswith("127.") and len(hosts) > 1:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((hosts[1], 9))  # sends nothing, but picks the route
            return str(probe.getsockname()[0])
    return address


def _drive(folder: Path, token: Path, home: Path, address: str, port: int, nodes: int, asked: Sequence[str]) -> int:
    token.unlink(missing_ok=True)  # of an attempt before a requeue
    set_variables(home, write_token(token))
    _ray_start(home, "--head", f"--node-ip-address={address}", f"--port={port}", "--include-dashboard=false")
    _wait_for(address, port)
    from tune.search import main as search

    return search(["--resume", str(folder), "--address", f"{address}:{port}", *asked, "--nodes", str(nodes)])


def _lend(token: Path, home: Path, host: str, port: int) -> int:
    """Until the head is gone; Ray itself would look for it for minutes. Ray gives its own start 30 s, which is little
    where nodes are busy or import from a slow file system."""
    _wait_for(host, port)
    set_variables(home, token)
    code = 0
    for _ in range(STARTS):
        ray = _ray_start(home, f"--address={host}:{port}")
        while ray.poll() is None and _listens(host, port):
            time.sleep(POLL_S)
        code = ray.poll() or 0
        if not code or not _listens(host, port):
            break
    return code


def _ray_start(home: Path, *options: str) -> subprocess.Popen[bytes]:
    words = [
        *[sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block"],
        f"--num-cpus={os.environ['SLURM_CPUS_ON_NODE']}",
        f"--num-gpus={os.environ.get('SLURM_GPUS_ON_NODE', '0')}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={ray_folder(home)}",
        "--disable-usage-stats",
        *options,
    ]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


def _wait_for(host: str, port: int) -> None:
    """Until the head listens: a node that joins a head that is not there waits for a quarter of an hour."""
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            return _knock(host, port)
        except OSError:
            if time.monotonic() > deadline:
                raise SystemExit(f"error: Ray's head did not come up on {host}:{port} within {JOIN_S} s") from None
            time.sleep(POLL_S)


def _listens(host: str, port: int) -> bool:
    """One that is only slow does."""
    try:
        _knock(host, port)
    except ConnectionRefusedError:
        return False
    except TimeoutError:
        return True
    return True


def _knock(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=5).close()


if __name__ == "__main__":
    sys.exit(main())
