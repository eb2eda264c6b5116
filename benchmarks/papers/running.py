"""From a recipe to a line of the record: the run in a folder of its own, continued if it was interrupted."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import filelock
import numpy as np

from benchmarks import options
from benchmarks.papers.page import PICTURED
from benchmarks.papers.record import SEARCH, Entry, Record, Search, compact, portable, rounded
from benchmarks.papers.rows import ROOT, Recipe, config_path, differing, identity
from mtbert.config import Config
from mtbert.config_files import load_config
from mtbert.data import locate_file
from mtbert.environment import commit
from mtbert.errors import UserError
from mtbert.files import user_path, write_atomically
from mtbert.manifest import folders, read_manifest, sha256
from mtbert.pretrained import load_pretrained
from mtbert.record import RunRecord
from mtbert.stops import stop_requests
from mtbert.tasks import load_tasks, locate_data, locate_tokenizer

PRECISIONS = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}


@dataclass(frozen=True)
class Runner:
    out: Path  # folder for run folders
    record: Record
    encoder: str | None  # what the page is to call it
    keep: bool  # run folders, once they are in the record
    deadline: float  # of time.monotonic: no run is started after it
    training: set[subprocess.Popen[bytes]] = field(default_factory=set)
    ending: threading.Event = field(default_factory=threading.Event)

    def folder(self, recipe: Recipe) -> Path:
        return self.out / recipe.name

    def perform(self, recipe: Recipe) -> Entry | None:
        """Run it and put it into the record. None where another process does it, or time is over."""
        folder = self.folder(recipe)
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(f"{folder}.lock", timeout=0):
            done = any(line.key == recipe.key for line in self.record.lines())
            if done or time.monotonic() > self.deadline:
                return None
            if not (folder / "result.json").is_file():
                self.train(recipe, folder)
            entry = entry_of(recipe, folder, self.encoder)
            self.record.put(entry)
            if not self.keep:
                shutil.rmtree(folder)
                _log(folder).unlink(missing_ok=True)
            return entry
        return None

    def train(self, recipe: Recipe, folder: Path) -> None:
        """Start the run, or continue it. Its output goes into a file beside the folder; a failure ends everything."""
        command = [sys.executable, "-m", "mtbert", "train"]
        if (folder / "config.yaml").is_file():
            command += ["--resume", str(folder)]
        else:
            place = [f"run.dir={folder.parent}", f"run.name={folder.name}"]
            command += ["--config", str(config_path(recipe.row)), "--set", *recipe.overrides, *place]
        started = time.monotonic()
        log = _log(folder)
        try:
            with log.open("a", encoding="utf-8") as file:
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
                self.training.add(process)
                if self.ending.is_set():  # since the list was gone through
                    process.terminate()
                code = process.wait()
                self.training.remove(process)
        finally:
            if folder.is_dir():
                seconds = wall_seconds(folder) + time.monotonic() - started
                write_atomically(folder / "wall.json", json.dumps({"seconds": round(seconds, 1)}) + "\n")
        if code:
            end = " | ".join(log.read_text(encoding="utf-8").splitlines()[-2:])
            raise SystemExit(f"{recipe.row.name} seed {recipe.seed}: exit code {code}; {log} ends: {end}")

    @contextlib.contextmanager
    def ended_by_sigterm(self) -> Iterator[None]:
        """SIGTERM reaches the runs, which save and end, and is a KeyboardInterrupt here."""

        def end(*_: object) -> NoReturn:
            self.ending.set()
            for process in [*self.training]:
                process.terminate()
            raise KeyboardInterrupt

        with stop_requests(end, signal.SIGTERM):
            yield

    def perform_all(self, wanted: Sequence[Recipe], jobs: int) -> Iterator[tuple[Recipe, Entry]]:
        """Each that was run, `jobs` at a time, in the order in which they end; after a failure no other is started."""
        with ThreadPoolExecutor(jobs) as pool:
            started = {pool.submit(self.perform, recipe): recipe for recipe in wanted}
            try:
                for future in as_completed(started):
                    if entry := future.result():
                        yield started[future], entry
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def refuse_changed(self, wanted: Sequence[Recipe]) -> None:
        """Raises `UserError` for folders, finished or not, that hold a run of something else than their recipe."""
        found = [(self.folder(recipe), deviation(self.folder(recipe), recipe.config)) for recipe in wanted]
        if changed := [(folder, keys) for folder, keys in found if keys]:
            (first, keys), *others = changed
            likewise = f"; likewise {', '.join(folder.name for folder, _ in others)}" if others else ""
            raise UserError(
                f"{first}: holds a run whose configuration is not its recipe's ({keys}); remove it to have it run "
                f"anew, or choose another --out{likewise}"
            )


def deviation(folder: Path, wanted: Config) -> str:
    """The keys in which the run in a folder is not the wanted one, and files with other content; empty where it is, and
    where there is no run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return ""
    try:
        there = load_config(path)
        return differing(identity(there) | contents(there), identity(wanted) | contents(wanted))
    except UserError as error:
        return str(error)


def wall_seconds(folder: Path) -> float:
    """Of all parts of a run together."""
    path = folder / "wall.json"
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.is_file() else 0.0


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


# ---------------------------------------------------------------------------------------------------- the record


def entry_of(recipe: Recipe, folder: Path, encoder: str | None) -> Entry:
    """What the record keeps of a finished run."""
    run = RunRecord(folder)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    pictured = recipe.row.name in PICTURED and not recipe.seed
    kept = tuple(f"gradient/{kind}/" for kind in ("cosine", "norm", "weight"))
    return Entry(
        **stamp(recipe.row.name, recipe.config, encoder),
        sizes=sizes(recipe.config),
        scores={task: round(float(said["score"]), 6) for task, said in result["tasks"].items()},
        steps=result["step"],
        seconds=wall_seconds(folder),
        precision=precision(folder),
        alike=alike(run),
        curves=compact(run.curves, lambda tag: tag.startswith(kept), kept[0]) if pictured else None,
    )


def precision(folder: Path) -> str:
    """What the machine that saved last has chosen; its newest checkpoint knows."""
    newest = next(iter(folders(folder)), None)
    course = read_manifest(newest).manifest.course if newest else None
    return PRECISIONS[course.precision] if course else "not told"


def stamp(row: str, config: Config, encoder: str | None) -> dict[str, Any]:
    """The fields that all lines have."""
    return {
        "row": row,
        "seed": config.seed,
        "config": portable(config),
        "files": contents(config),
        "encoder": encoder_told(config, encoder),
        "when": datetime.date.today().isoformat(),
        "machine": options.machine(),
        "commit": commit(),
    }


def search_of(folder: Path, encoder: str | None) -> Search | None:
    """What the record keeps of a search; None where nothing came of it yet."""
    if not (folder / "best.yaml").is_file():
        return None
    best = load_config(folder / "best.yaml")
    head = (folder / "best.yaml").read_text(encoding="utf-8").partition("\n")[0]
    score = re.search(r"composite ([\d.]+)", head)
    if score is None:
        raise UserError(f"{folder}/best.yaml: its first line tells no composite; it was not written by this search")
    return Search(
        **stamp(SEARCH, load_config(folder / "base.yaml"), encoder),
        lr=best.optimizer.lr,
        dropout=best.tasks["sst"].head.dropout,
        composite=float(score[1]),
        trials=len(list((folder / "trials").glob("*/result.json"))),
    )


def alike(run: RunRecord) -> dict[str, float]:
    """Per task that ranks on a threshold: the share of the logged steps whose loss is what ranking gives where all B
    texts of a batch look alike, weight · ln B, or more. The task's own loss is in it, too: below that bound nothing has
    collapsed, above it something may have.
    """
    shares = {}
    for name, task in run.config.tasks.items():
        if task.mnrl is not None and task.mnrl.threshold is not None and f"loss/{name}" in run.curves:
            bound = task.mnrl.weight * math.log(task.batch_size or run.config.schedule.batch_size)
            shares[name] = rounded(float(np.mean(run.curves[f"loss/{name}"].values >= bound)))
    return shares


def contents(config: Config) -> dict[str, str]:
    """SHA-256 of every file that a run of it reads, by its name. Raises `UserError` for one that is not there."""
    data, found = locate_data(config), {}
    for name, task in config.tasks.items():
        for split, file in (("train", task.train), ("dev", task.dev)):
            if file is not None:
                found[file] = _digest(locate_file(file, f"tasks.{name}.{split}", data)[1])
    if config.encoder.pretrained is not None:
        found["model.safetensors"] = _digest(_pretrained(config.encoder.pretrained)[1] / "model.safetensors")
    if config.encoder.tokenizer is not None:
        found["tokenizer"] = _digest(user_path(config.encoder.tokenizer))
    return found


@functools.cache
def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


@functools.cache
def _pretrained(name_or_folder: str) -> tuple[int, Path]:
    """Parameters and folder."""
    import torch

    from mtbert.encoder import Encoder

    shape, _, folder = load_pretrained(name_or_folder)
    with torch.device("meta"):
        return sum(each.numel() for each in Encoder(shape, 0.0).parameters()), folder


def sizes(config: Config) -> dict[str, tuple[int, int]]:
    """Rows of every task's files after quarantine, from the token cache."""
    data = locate_data(config)
    folder = _pretrained(config.encoder.pretrained)[1] if config.encoder.pretrained else None
    tasks = load_tasks(config, data, locate_tokenizer(config, data, folder), config.encoder.max_length)
    return {task.name: (len(task.train), len(task.dev or ())) for task in tasks}


def encoder_told(config: Config, name: str | None) -> str:
    """The encoder's name, by itself if nobody gives one, and its size."""
    pretrained = config.encoder.pretrained
    if pretrained is None:
        return name or "from scratch"
    parameters, folder = _pretrained(pretrained)
    name = name or (name_of(folder) if user_path(pretrained).is_dir() else pretrained)
    return f"{name} ({parameters / 1e6:.1f} M parameters)"


def name_of(folder: Path) -> str:
    """What an encoder's README calls it in its title, else what its config.json does, else the folder."""
    readme = folder / "README.md"
    title = re.search(r"^# (\S+)\s*$", readme.read_text(encoding="utf-8"), re.MULTILINE) if readme.is_file() else None
    if title:
        return title[1]
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path") or folder.name)
