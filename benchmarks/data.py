"""Data: how long training waits for it, and what ten million examples cost at start.

usage: python -m benchmarks.data [--examples 10000000] [--json FILE]

Waiting is the mean of `speed/waiting_for_data` over a run of 60 steps of 3 × 32 examples of the generated corpus. For
the start-up, a file of so many one-sentence examples is written and tokenised once (not counted, but told); then a new
process opens it, builds the schedule and takes the first batch: seconds without imports, the files just written still
in the page cache, and its peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks import options
from mtbert.config import DataConfig, ScheduleConfig, TaskConfig
from mtbert.config_files import load_config
from mtbert.data import load_dataset, load_tokenizer, sequence_lengths
from mtbert.errors import UserError, count
from mtbert.randomness import addressed_rng
from mtbert.ranks import peak_memory
from mtbert.record import RunRecord
from mtbert.runs import Rank, create_run
from mtbert.schedule import Schedule
from mtbert.tasks import locate_data
from mtbert.trainer import train

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BATCH = 32
TASK = TaskConfig(kind="classification", train="many.tsv", dev="many.tsv", classes=2)


def waiting(steps: int = 60) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            QUICKSTART,
            [
                f"run.dir={folder}",
                f"phases=[{{steps: {steps}}}]",
                "encoder.shape={hidden_size: 384, layers: 6, heads: 12}",
            ],
        )
        run = create_run(config, None, [])
        train(run, Rank(), quiet=True)
        return float(RunRecord(run).curves["speed/waiting_for_data"].values.mean())


def start_up(examples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = str(folder / "cache")
        corpus = locate_data(load_config(QUICKSTART, [f"data.cache={cache}"]))
        assert corpus.dir is not None
        tokenizer = load_tokenizer(corpus.dir)
        _write(folder / "many.tsv", tokenizer, examples)
        started = time.perf_counter()
        load_dataset(TASK, "many", "train", DataConfig(dir=name, cache=cache), tokenizer)
        tokenising = time.perf_counter() - started
        command = [sys.executable, "-m", "benchmarks.data", "--open", name, corpus.dir]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {"examples": examples, "tokenising_seconds": tokenising, **json.loads(answer)}


def _write(path: Path, tokenizer: Tokenizer, examples: int) -> None:
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    rng = addressed_rng(0, "many")
    with path.open("w", encoding="utf-8") as file:
        file.write("sentence\tlabel\n")
        for first in range(0, examples, 100_000):
            count = min(100_000, examples - first)
            chosen = rng.integers(0, len(words), (count, 8))
            labels = rng.integers(0, 2, count)
            lines = (
                f"{' '.join(words[i] for i in row)} {first + number}\t{label}\n"
                for number, (row, label) in enumerate(zip(chosen.tolist(), labels.tolist(), strict=True))
            )
            file.writelines(lines)


def _open(folder: str, corpus: str) -> dict[str, float]:
    started = time.perf_counter()
    cache = str(Path(folder) / "cache")
    dataset = load_dataset(TASK, "many", "train", DataConfig(dir=folder, cache=cache), load_tokenizer(corpus))
    schedule = Schedule(ScheduleConfig(), [sequence_lengths(dataset, joint=False, max_length=512)], [BATCH], seed=0)
    (share,) = schedule.shares(0, 0, 1)
    assert len(share.micro_batches[0]) == BATCH
    return {
        "start_up_seconds": time.perf_counter() - started,
        "resident_bytes": peak_memory(torch.device("cpu")),
    }


def measure(examples: int) -> dict[str, Any]:
    if examples < BATCH:
        raise UserError(f"--examples {examples}: takes a batch of {BATCH} or more")
    return {"waiting_for_data": waiting(), **start_up(examples)}


def table(result: dict[str, Any]) -> str:
    return (
        f"waiting for data {result['waiting_for_data']:.2%} of the time; {result['examples']:,} examples: tokenised "
        f"once in {result['tokenising_seconds']:.0f} s, then start-up {result['start_up_seconds']:.1f} s and "
        f"{result['resident_bytes'] / 2**20:.0f} MiB at most"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("data", __doc__)
    parser.add_argument("--examples", type=count, default=10_000_000)
    parser.add_argument("--open", nargs=2, help=SUPPRESS)
    given, _ = parser.parse_known_args(arguments)
    if given.open:
        print(json.dumps(_open(*given.open)))
        return 0
    return options.run(parser, lambda o: measure(o.examples), table, arguments)


if __name__ == "__main__":
    sys.exit(main())
