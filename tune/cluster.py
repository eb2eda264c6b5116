"""The Ray that a search runs on: started here for one search, or by `launch` on a Slurm allocation.

Ray listens on all interfaces whatever it is told, and whoever reaches it may run code: so a token is asked for, always,
and it lies in a file that only the user can read. Nothing is left behind, even when the driver is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.records import ROOT
from mtbert.errors import UserError

OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing but small messages passes through it; Ray would take a third of the memory."""

JOIN_S = 120.0

SWEEP = """
trap : TERM INT HUP
cat
clean=0
for _ in $(seq 40); do
    left=$({ grep -lszx "TMPDIR=$0" /proc/[0-9]*/environ; find /proc/[0-9]*/fd -lname "$0/*"; } 2>/dev/null |
        cut -d / -f 3 | sort -u | grep -vx $PPID)
    [ -z "$left" ] || kill -9 $left
    rm -rf "$0" "$@"
    if [ -n "$left" ] || [ -e "$0" ]; then clean=0; else clean=$((clean + 1)); fi
    [ $clean -lt 2 ] || exit 0
    sleep 0.25
done
"""
"""Waits for the end of its input, the life of the process that started it, or for a signal to all of a Slurm step. Ends
what Ray left: its agents would look for it for another minute. They write their names over their environment, and are
known by the log files that they hold open."""


def set_variables(home: Path, token_file: Path) -> None:
    """What Ray reads when it is imported, in this process and in those it starts."""
    assert "ray" not in sys.modules, "Ray was imported before its settings were there"
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {
        "TMPDIR": str(home),  # so that what killed ranks leave there goes with it
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # ranks inherit it; 15, Ray's choice, starves them where anything else runs
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it hides the GPUs of an actor without any, with a warning
        "RAY_AIR_NEW_OUTPUT": "0",  # which prints its own account whatever the verbosity
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "PYTHONPATH": os.pathsep.join(path),  # workers import our packages
    }


@contextlib.contextmanager
def ray_home(*secrets: Path) -> Iterator[Path]:
    """A folder for Ray on this node, only for this user; it, `secrets` and all processes that use it go with the block,
    also after a kill -9.

    Under /tmp when the usual place has a long name: Ray's sockets lie 64 characters below, and the path of a socket has
    107 at most. Ray opens its own folder to everyone; `ray_folder` is one within.
    """
    usual = tempfile.gettempdir()
    home = Path(tempfile.mkdtemp(prefix="mtbert-ray-", dir=usual if len(usual) < 23 else "/tmp"))
    sweeper = subprocess.Popen(
        ["sh", "-c", SWEEP, str(home), *map(str, secrets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield home
    finally:
        assert sweeper.stdin
        sweeper.stdin.close()
        sweeper.wait()


def ray_folder(home: Path) -> Path:
    return home / "r"


def write_token(file: Path) -> Path:
    file.touch(mode=0o600, exist_ok=False)  # before there is anything in it to be read
    file.write_text(secrets.token_hex(32))
    return file


@contextlib.contextmanager
def local_ray(cpus: int, gpus: int, dashboard: bool) -> Iterator[None]:
    """Ray on this machine while the block lasts."""
    with ray_home() as home:
        set_variables(home, write_token(home / "token"))
        import ray

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(ray_folder(home)),
            )
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def joined_ray(address: str, count: int) -> Iterator[None]:
    """A Ray that is running already, while the block lasts. Waits until it has `count` nodes.

    Raises `UserError` without a token for it, lest it be one that asks for none.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN_PATH" not in os.environ:
        raise UserError(
            f"--address {address}: needs RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH with the token's file"
        )
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        deadline = time.monotonic() + JOIN_S
        while len(nodes()) < count:
            if time.monotonic() > deadline:
                raise UserError(f"only {len(nodes())} of {count} nodes joined within {JOIN_S} s")
            time.sleep(0.5)
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Mapping[str, float]]:
    """Resources of each living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_room(nodes: Sequence[Mapping[str, Any]], ranks: int, cpus: int, gpus: float) -> int:
    """How many trials fit at once. Raises `UserError` naming what is missing when not even one does.

    Ray itself would wait for ever. `gpus`: at most 1, a part of one is always of the same.
    """
    per_node = [
        min(
            int(node.get("CPU", 0) // cpus),
            int(node.get("GPU", 0)) * int(1 / gpus + 1e-9) if gpus else ranks * len(nodes) * int(node.get("CPU", 0)),
        )
        for node in nodes
    ]
    places = sum(per_node)
    if places >= ranks:
        return places // ranks
    has = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    where = "this machine has" if len(nodes) == 1 else f"the {len(nodes)} nodes have"
    need = f"{ranks} × {cpus} CPU" + (f" and {ranks} × {gpus:g} GPU" if gpus else "")
    option = f"--ranks-per-trial {ranks}"
    if not places:  # for a single rank
        fits = any(node.get("CPU", 0) >= cpus for node in nodes)
        option = f"--gpus-per-rank {gpus:g}" if fits else f"--cpus-per-rank {cpus}"
    raise UserError(
        f"{option}: a trial needs {need}; {where} {has['CPU']:g} CPU"
        + (f" and {has['GPU']:g} GPU" if gpus else "")
        + f", room for {places} rank(s): {ranks - places} short"
    )
