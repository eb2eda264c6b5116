"""Ranks and run folders: what `launch`, `tune` and the trainer agree on. No torch in here."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtbert.config import RESERVED, Config, EncoderConfig
from mtbert.config_files import to_yaml
from mtbert.environment import environment
from mtbert.errors import UserError
from mtbert.files import permitted, read_small, seen_as_folder, user_path, write_atomically

FORMAT = 2
"""Of run folders and the checkpoints in them; goes up when an older mtbert could no longer continue one, and so with
every new key of a manifest: keys that are not known count as damage."""

PRETRAINED_FILES = "config.json, model.safetensors and a tokenizer"


@dataclass(frozen=True)
class Rank:
    """One process among `world`; `rendezvous` is tcp://host:port, or file:// and a path as it is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    rendezvous: str = ""

    @classmethod
    def here(cls) -> Rank:
        """This process as torchrun's variables have it, or another launcher's of torch programs; else the only one.

        Raises `UserError` where some of them are missing.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        try:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            rank, world, local, local_world = (int(os.environ[name]) for name in names)
            rendezvous = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        except (KeyError, ValueError) as error:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {error}: several ranks need RANK, LOCAL_RANK, "
                f"LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT too, as torchrun sets them; or unset it"
            ) from None
        return cls(rank, world, local, local_world, rendezvous)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """Its part of those that this process may use."""
        return max(1, usable_cores() // self.local_world)


def usable_cores() -> int:
    """A scheduler often grants this process a part of the machine, a container's limit a part of the time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """How many CPUs' time the control groups of this process grant it, infinite where they set no limit.

    Linux: `cpu.max` of version 2 and `cpu.cfs_quota_us` of version 1 (Documentation/admin-guide/cgroup-v2.rst,
    Documentation/scheduler/sched-bwc.rst). More threads than that are stopped for a part of every tenth of a second.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    least = math.inf
    for _, controllers, own in (line.split(":", 2) for line in lines):
        mounted = root / "sys/fs/cgroup" / ("cpu" if "cpu" in controllers.split(",") else "")
        group = Path(own.lstrip("/"))  # within a container often not to be seen; what is above it then is its own
        for folder in (group, *group.parents):
            least = min(least, _granted(mounted / folder))
    return least


def _granted(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def visible_gpus() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names, None where it is unset. CUDA reads it up to the first that is no device."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    names = [name.strip() for name in listed.split(",")]
    return list(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, names))


@dataclass(frozen=True)
class Outcome:
    """How a training call ended. `stopped`: asked to stop, saved, to be continued from the run folder."""

    status: Literal["finished", "stopped"]
    step: int
    metrics: dict[str, float]


class Stopwatch:
    """Where the time before the first training step went: seconds by part, in order."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """The time since the lap before, or since this watch was made, went into `part`."""
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


def check_encoder(encoder: EncoderConfig) -> None:
    """Raises `UserError` where it has no source, or two."""
    if (encoder.pretrained is None) == (encoder.shape is None):
        raise UserError(
            "encoder.pretrained: give a Hugging Face folder or hub name, or set encoder.shape to train from scratch"
            if encoder.shape is None
            else "encoder.pretrained and encoder.shape exclude each other; set one of them to null"
        )


def local_folder(name_or_folder: str) -> Path | None:
    """None for what can only be a hub name. Raises `UserError` for a folder that is not there."""
    folder = user_path(name_or_folder)
    with permitted(f"encoder.pretrained {name_or_folder}"):
        if folder.is_dir():
            return folder
    if name_or_folder.startswith((".", "/", "~")) or name_or_folder.count("/") > 1 or folder.exists():
        raise UserError(f"encoder.pretrained {name_or_folder}: no such folder; give one with {PRETRAINED_FILES}")
    return None


def create_run(config: Config, source: str | None, command: list[str]) -> Path:
    """A new run folder with the resolved config, environment and command in it.

    Args:
        source: the YAML file the config came from; its stem goes into the folder's name.
        command: what the user typed.

    Raises `UserError` when `run.name` is already taken (nothing a user made is overwritten) or the folder cannot be
    written; no half of it is left then.
    """
    for task in config.tasks.keys() & RESERVED.keys():
        raise UserError(f"tasks.{task}: this name belongs to {RESERVED[task]}; choose another")
    text = to_yaml(independent(config))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    name = config.run.name or f"{stamp}-{Path(source).stem if source else 'run'}-{digest}"
    folder = user_path(config.run.dir) / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"run.name {name}: {folder} exists already; choose another name, or continue it with --resume {folder}"
        ) from None
    except OSError as error:
        raise UserError(f"run.dir {config.run.dir}: cannot make {folder}: {error.strerror}") from None
    made_by = {"format": FORMAT, **environment(command)}
    try:
        write_atomically(folder / "config.yaml", text)
        write_atomically(folder / "environment.json", json.dumps(made_by, indent=2) + "\n")
    except OSError as error:
        shutil.rmtree(folder)
        raise UserError(f"run.dir {config.run.dir}: cannot write to {folder}: {error.strerror}") from None
    return folder


def independent(config: Config) -> Config:
    """With absolute paths, so that the run can be continued and evaluated from anywhere."""
    data, encoder = config.data, config.encoder
    if data.generate is None:  # no folder: the files are relative to the current one
        data = data.model_copy(update={"dir": _absolute(data.dir or ".")})
    data = data.model_copy(update={"cache": _absolute(data.cache)})
    if encoder.tokenizer is not None:
        encoder = encoder.model_copy(update={"tokenizer": _absolute(encoder.tokenizer)})
    if encoder.pretrained is not None and seen_as_folder(user_path(encoder.pretrained)):  # else a hub name
        encoder = encoder.model_copy(update={"pretrained": _absolute(encoder.pretrained)})
    return config.model_copy(update={"data": data, "encoder": encoder})


def _absolute(path: str) -> str:
    return str(user_path(path).absolute())


def check_run(folder: Path) -> None:
    """Raises `UserError` for a folder that is no run's, for one of a newer mtbert, whose settings this one might read
    as something else, and for one in which a link leads out of it: what training writes there would land elsewhere."""
    try:
        _check_files(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    try:
        made_by = json.loads(read_small(folder / "environment.json"))
    except (OSError, ValueError, RecursionError):
        return
    written = made_by.get("format", FORMAT) if isinstance(made_by, dict) else FORMAT
    if isinstance(written, int) and written > FORMAT:
        raise UserError(
            f"{folder}: run folder of format {written}, from a newer mtbert; this one reads up to {FORMAT}; update it"
        )


def _check_files(folder: Path) -> None:
    """What `check_run` refuses of a folder's files. Raises `OSError` where they cannot be looked at."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run folder (it holds no config.yaml); give one that training made")
    shared = folder / "code"  # of an array, a link to the copy that its jobs share; training writes nothing there
    for place, folders, files in os.walk(folder):
        for path in (path for name in (*folders, *files) if (path := Path(place, name)) != shared):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # its job may still run
                continue
            if stat.S_ISLNK(mode) and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                raise UserError(f"{path}: is a link out of the run folder; put there what it leads to")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise UserError(f"{path}: is neither a file nor a folder, and has no place in a run folder; remove it")


def discard_unstarted(folder: Path) -> None:
    """Remove a run folder that holds nothing but what `create_run` and a launcher put there, so that its name is free
    again."""
    put_there = {"config.yaml", "environment.json", "encoder", "code", "job", "logs"}
    if {path.name for path in folder.iterdir()} <= put_there:
        shutil.rmtree(folder)
