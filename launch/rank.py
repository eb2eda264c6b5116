"""The job without submitit, for a batch script of one's own (slurm/train.sbatch).

    python -m launch.rank make RUN [--config YAML] [--set KEY=VALUE ...]     once, in the batch script
    srun python RUN/code/launch/rank.py train RUN                            on every rank

Signals, records, the lock and requeueing are those of `launch.job`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # a signal that asks for a stop would end the interpreter; it waits until the job has its own handlers
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    if not __package__:  # started as a script: imports come from the copy it lies in
        sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.job import Job
from launch.records import (
    JobNote,
    Lock,
    make_job_folder,
    read_note,
    snapshot_code,
    write_note,
    writing_to,
)
from launch.submit import check_over, check_resumable
from mtbert.config_files import DEFAULT_CONFIG, load_config, to_yaml
from mtbert.errors import CommandLine, UserError
from mtbert.files import user_path, write_atomically
from mtbert.runs import create_run, independent


def main() -> int:
    parser = CommandLine(prog="python -m launch.rank", description="The job without submitit.")
    parser.add_argument("verb", choices=("make", "train"))
    parser.add_argument("run", type=user_path)
    parser.add_argument("--config", type=user_path, help="default: configs/quickstart.yaml")
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
        with writing_to(args.run):
            make(args.run, args.config, args.overrides, token, ["sbatch", "slurm/train.sbatch", *sys.argv[2:]])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(run: Path, source: Path | None, overrides: list[str], token: str, command: list[str]) -> None:
    """The run folder: a new one, or one that is there already, to be continued.

    Args:
        command: what was typed, or does the same.
    """
    if "SLURM_NTASKS" not in os.environ:
        raise UserError("SLURM_NTASKS: not set in this job; give --ntasks-per-node to sbatch")
    Lock(run, f"{token}-0").check()
    if not (run / "config.yaml").exists():
        source = source or DEFAULT_CONFIG
        place = {"dir": str(run.parent), "name": run.name}
        # quoted: overrides are YAML, in which 7 is a number
        quoted = [f"run.{key}={json.dumps(text, ensure_ascii=False)}" for key, text in place.items()]
        create_run(load_config(source, [*overrides, *quoted]), str(source), command)
    elif not _begun(run, token):
        if source is not None:
            raise UserError(f"{run}: keeps the configuration it has; leave --config (CONFIG) out, or name a new folder")
        check_resumable(run, overrides)
        check_over(run)
        write_atomically(run / "config.yaml", to_yaml(independent(load_config(run / "config.yaml", overrides))))
    make_job_folder(run)
    snapshot_code(run)
    nodes, tasks = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS"])
    gpus = "SLURM_JOB_GPUS" in os.environ or os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0"
    write_note(run, JobNote("slurm", os.environ["SLURM_JOB_ID"], token, "", nodes, tasks // nodes, gpus))


def _begun(run: Path, token: str) -> bool:
    """Whether this job has made its run folder before: it was requeued, with the same words as the first time."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return True
    note = read_note(run)
    return note is not None and note.token == token


if __name__ == "__main__":
    sys.exit(main())
