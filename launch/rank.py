"""The job without submitit, for a batch script of one's own (slurm/train.sbatch).

    python -m launch.rank make RUN [--config YAML] [--set KEY=VALUE ...]     once, in the batch script
    srun python -m launch.rank train RUN                                     on every rank

Signals, records, the lock and requeueing are those of `launch.job`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # a signal that asks for a stop would end the interpreter; it waits until the job has its own handlers
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})

from launch.job import Job
from launch.records import JobNote, Lock, make_job_folder, write_note
from mtbert.config import load_config
from mtbert.errors import UserError
from mtbert.runs import create_run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.rank", description="The job without submitit.")
    parser.add_argument("verb", choices=("make", "train"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides")
    args = parser.parse_args()
    if "SLURM_JOB_ID" not in os.environ:
        print("error: launch.rank runs inside a Slurm job; use launch/submit.py to start one", file=sys.stderr)
        return 2
    token = f"sbatch{os.environ['SLURM_JOB_ID']}"
    if args.verb == "train":
        Job(args.run.resolve(), token)()
        return 0
    try:
        make(args.run, args.config, args.overrides, token)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(run: Path, source: Path, overrides: list[str], token: str) -> None:
    """The run folder, unless an earlier attempt of this job, or another job, has made it."""
    if not (run / "config.yaml").exists():
        config = load_config(source, [*overrides, f"run.dir={run.parent}", f"run.name={run.name}"])
        create_run(config, str(source), ["sbatch", "slurm/train.sbatch"])
    make_job_folder(run)
    Lock(run, f"{token}-0").check()
    nodes, tasks = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS"])
    write_note(run, JobNote("slurm", os.environ["SLURM_JOB_ID"], token, "", nodes, tasks // nodes))


if __name__ == "__main__":
    sys.exit(main())
