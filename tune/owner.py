"""The small actor that owns one rank of a trial. A module of its own: Ray Tune takes longer to import than Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

from launch.records import job_folder


@ray.remote
class Owner:
    """Starts a rank on its node and outlives it. Its methods run in one thread, which the kernel ties the rank to."""

    def place(self) -> dict[str, Any]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        address = ray.util.get_node_ip_address()
        return {"address": address, "host": socket.gethostname(), "port": port, "gpus": ray.get_gpu_ids()}

    def start(self, words: list[str], code: Path, devices: list[int]) -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # all of the trial's on this host, of which a rank picks its own by its local number; none for a rank on CPUs
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        with (job_folder(Path(words[0])) / f"start{words[3]}_log.err").open("w") as early:  # until it has its own log
            self.process = subprocess.Popen(
                [sys.executable, str(code / "launch" / "child.py"), str(os.getpid()), *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=early,
            )
        return self.process.pid

    def wait(self) -> int:
        return self.process.wait()
