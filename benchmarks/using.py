"""Using a trained run: rows a second, memory on a large file, and a service under many clients.

usage: python -m benchmarks.using predict RUN FILE --task TASK [--gigabytes 1]
       python -m benchmarks.using serve RUN FILE --task TASK [--clients 64] [--seconds 60]

RUN is a run folder, FILE a delimited file that `python -m mtbert predict` takes. `predict` answers FILE three times,
each time beside a matrix product that says what the machine gives just then; then, as the command line does, it answers
a small and a large file made of the same rows and a long column, and compares the memory of the two. `serve` starts
the service, asks a text per request from many connections and compares the answers with those of `predict`; every 20th
request of a client is a bad one, which must be refused with a reason.
"""

from __future__ import annotations

import csv
import http.client
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import options
from benchmarks.workload import gemm_rate
from mtbert.data import sequence_lengths
from mtbert.errors import UserError, count
from mtbert.flops import encoder_flops
from mtbert.predict import answer_texts, opened_source, predict_file
from mtbert.readers import Record, Row, read_rows
from mtbert.trained import Trained, load_run

ROUNDS = 3
BAD_EVERY = 20  # requests of a client
PAYLOAD = 10_000  # characters of the column that makes a file large


def measure_predict(run_dir: str, file: str, task: str, gigabytes: float) -> dict[str, Any]:
    run = load_run(Path(run_dir), "best")
    flops, tokens, words = _work(run, file, task)
    reports, peaks = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(ROUNDS):
            peaks.append(gemm_rate(run.dtype))
            reports.append(predict_file(run, task, file, str(folder / "out")))
        sizes = {"small": min(0.02, gigabytes / 2), "large": gigabytes}
        memory = {which: _memory(run_dir, task, _inflated(file, folder / which, size)) for which, size in sizes.items()}
    seconds = statistics.median(report.seconds for report in reports)
    rows = reports[0].rows
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(run.dtype).removeprefix("torch."),
        "rows": rows,
        "words_per_row": words / rows,
        "tokens_per_row": tokens / rows,
        "rows_per_second": rows / seconds,
        "seconds": [report.seconds for report in reports],
        "gemm_peak_flops": max(peaks),
        "model_flops_share": flops / seconds / max(peaks),
        "rows_per_second_at_peak": max(peaks) / flops * rows,
        "gigabytes": gigabytes,
        "resident_bytes": memory,
    }


def _work(run: Trained, file: str, task: str) -> tuple[float, int, int]:
    """Floating-point operations, tokens and words of a file's rows."""
    texts = _texts(run, task, file)
    joint = run.task(task).head.kind == "joint"
    lengths_N = sequence_lengths(run.tokenise(texts), joint, run.max_length)
    assert joint or len(texts[0]) == 1, "of pairs encoded separately the texts would have to be counted one by one"
    flops = encoder_flops(run.shape, torch.from_numpy(lengths_N), run.model.pooling != "mean", trained=False)
    return flops, int(lengths_N.sum()), sum(len(text.split()) for row in texts for text in row)


def _texts(run: Trained, task: str, file: str) -> list[list[str]]:
    rows = read_rows(Path(file), run.task(task).columns.text)
    texts = [list(row.values) for row in rows if isinstance(row, Row)]
    if not texts:
        raise UserError(f"{file}: no row")
    return texts


def _inflated(file: str, target: Path, gigabytes: float) -> Path:
    rows = itertools.cycle(list(_rows(file)))
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        columns = [column for column in next(rows) if column]
        writer.writerow([*columns, "payload"])
        while out.tell() < gigabytes * 1e9:
            writer.writerows([*(row[c] for c in columns), "x" * PAYLOAD] for row in itertools.islice(rows, 1000))
    return target


def _rows(file: str) -> Iterator[dict[str, str]]:
    with opened_source(file, "") as table:
        for row in table.rows:
            if isinstance(row, Record):
                yield row.values


CHILD = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Runs a command and prints its peak in KiB. It is small itself: a process begins with the peak of who starts it."""


def _memory(run_dir: str, task: str, file: Path) -> int:
    """The peak of `mtbert predict` on a file, in bytes."""
    out = file.with_suffix(".out")
    command = [sys.executable, "-m", "mtbert", "predict", run_dir, str(file), "--task", task, "--out", str(out)]
    told = subprocess.run([sys.executable, "-c", CHILD, *command], check=True, stdout=subprocess.PIPE, text=True).stdout
    out.unlink()
    file.unlink()
    return int(told.split()[-1]) * 1024


BAD = [
    b"{",
    b"x" * 10_000_000,
    json.dumps({"task": "sst", "inputs": "a text, not a list"}).encode(),
    json.dumps({"task": "sst", "inputs": [3]}).encode(),
    json.dumps({"task": "sst", "inputs": [""]}).encode(),
    json.dumps({"task": "sst", "inputs": ["x" * 100_000]}).encode(),
]


@dataclass
class _Client:
    """What one connection saw."""

    seconds: list[float] = field(default_factory=list)
    errors: int = 0  # good requests that were not answered
    other: int = 0  # answered with another prediction than `predict` gives
    farthest: float = 0.0  # largest difference of a score
    refused: int = 0
    not_refused: int = 0  # bad requests that were answered with anything but 4xx and a reason


def measure_serve(run_dir: str, file: str, task: str, clients: int, seconds: float) -> dict[str, Any]:
    run = load_run(Path(run_dir), "best")
    texts = _texts(run, task, file)
    expected = answer_texts(run, task, texts)
    del run
    command = [sys.executable, "-m", "mtbert", "serve", run_dir, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout

    def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, Any]:
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def client(number: int) -> _Client:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        seen = _Client()
        for done in itertools.count():
            at = (number + clients * done) % len(texts)
            if expected[at] is None:
                continue
            if (number + done) % BAD_EVERY == 0:
                status, answer = post(connection, BAD[(number + done) // BAD_EVERY % len(BAD)])
                good = 400 <= status < 500 and bool(answer["detail"])
                seen.refused, seen.not_refused = seen.refused + good, seen.not_refused + (not good)
                continue
            body = json.dumps({"task": task, "inputs": [texts[at] if len(texts[at]) > 1 else texts[at][0]]}).encode()
            started = time.monotonic()
            if started > end:
                return seen
            status, answer = post(connection, body)
            seen.seconds.append(time.monotonic() - started)
            if status != 200:
                seen.errors += 1
                continue
            prediction, score, _ = expected[at]
            [found] = answer["predictions"]
            seen.other += found["prediction"] != prediction
            seen.farthest = max(seen.farthest, abs(found["score"] - score))
        raise AssertionError

    try:
        address = re.match(r"mtbert: http://([^:]+):(\d+)", process.stdout.readline())
        if not address:
            raise UserError(f"the service did not start: exit code {process.wait(timeout=60)}")
        host, port = address.groups()
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            results = list(pool.map(client, range(clients)))
        up = process.poll() is None
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    times = np.concatenate([result.seconds for result in results])
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(times),
        "errors": sum(result.errors for result in results),
        "other_predictions_than_predict": sum(result.other for result in results),
        "largest_difference_of_a_score": max(result.farthest for result in results),
        "bad_requests_refused": sum(result.refused for result in results),
        "bad_requests_not_refused": sum(result.not_refused for result in results),
        "still_up": up,
        "requests_per_second": len(times) / seconds,
        "milliseconds": {f"p{q}": float(np.percentile(times, q) * 1e3) for q in (50, 99)} | {"max": times.max() * 1e3},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("using", __doc__)
    parser.add_argument("what", choices=["predict", "serve"])
    parser.add_argument("run")
    parser.add_argument("file")
    parser.add_argument("--task", required=True)
    parser.add_argument("--gigabytes", type=options.amount, default=1)
    parser.add_argument("--clients", type=count, default=64)
    parser.add_argument("--seconds", type=options.amount, default=60)
    given = parser.parse_args(arguments)
    try:
        if given.what == "predict":
            result = measure_predict(given.run, given.file, given.task, given.gigabytes)
        else:
            result = measure_serve(given.run, given.file, given.task, given.clients, given.seconds)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
