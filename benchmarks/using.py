"""Using a trained run: rows a second, memory on a large file, and a service under many clients.

usage: python -m benchmarks.using predict RUN FILE --task TASK [--gigabytes 1]
       python -m benchmarks.using serve RUN FILE --task TASK [--clients 64] [--seconds 60]

RUN is a run folder, FILE a delimited file that `python -m mtbert predict` takes. `predict` answers FILE three times, of
which the best counts; then, as the command line does, a small and a large file made of its rows with a long column
more, and compares the memory of the two. `serve` starts the service and asks a text per request from many connections.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mtbert.predict import predict_file
from mtbert.readers import Record, form_of, read_table
from mtbert.trained import load_run

PAYLOAD = 10_000  # characters of the column that makes a file large


def measure_predict(run_dir: str, file: str, task: str, gigabytes: float) -> dict[str, Any]:
    run = load_run(Path(run_dir), "best")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reports = [predict_file(run, task, file, str(folder / "out")) for _ in range(3)]
        sizes = {"small": 0.01, "large": gigabytes}
        memory = {which: _memory(run_dir, task, _inflated(file, folder / which, size)) for which, size in sizes.items()}
    return {
        "dtype": str(run.dtype),
        "rows": reports[0].rows,
        "rows_per_second": max(report.rows / report.seconds for report in reports),
        "gigabytes": gigabytes,
        "resident_bytes": memory,
    }


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
    with Path(file).open("rb") as opened:
        for row in read_table(opened, form_of(Path(file)), file).rows:
            if isinstance(row, Record):
                yield row.values


def _memory(run_dir: str, task: str, file: Path) -> int:
    """The peak of `mtbert predict` on a file, in bytes."""
    out = file.with_suffix(".out")
    command = [sys.executable, "-m", "mtbert", "predict", run_dir, str(file), "--task", task, "--out", str(out)]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    out.unlink()
    file.unlink()
    return usage.ru_maxrss * 1024


def measure_serve(run_dir: str, file: str, task: str, clients: int, seconds: float) -> dict[str, Any]:
    texts = load_run(Path(run_dir), "best").config.tasks[task].columns.text
    inputs = [row[texts[0]] if len(texts) == 1 else [row[c] for c in texts] for row in _rows(file)]
    command = [sys.executable, "-m", "mtbert", "serve", run_dir, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    host, port = process.stdout.readline().split()[1].removeprefix("http://").split(":")
    end = time.monotonic() + seconds

    def client(number: int) -> tuple[list[float], int]:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        times, errors = [], 0
        for each in itertools.islice(itertools.cycle(inputs), number, None):
            started = time.monotonic()
            if started > end:
                return times, errors
            body = json.dumps({"task": task, "inputs": [each]})
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            errors += answer.status != 200
            times.append(time.monotonic() - started)
        raise AssertionError

    try:
        with ThreadPoolExecutor(clients) as pool:
            results = list(pool.map(client, range(clients)))
    finally:
        process.terminate()
        process.wait()
    times = np.concatenate([times for times, _ in results])
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(times),
        "errors": sum(errors for _, errors in results),
        "requests_per_second": len(times) / seconds,
        "milliseconds": {f"p{q}": float(np.percentile(times, q) * 1e3) for q in (50, 99)} | {"max": times.max() * 1e3},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["predict", "serve"])
    parser.add_argument("run")
    parser.add_argument("file")
    parser.add_argument("--task", required=True)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    if options.what == "predict":
        result = measure_predict(options.run, options.file, options.task, options.gigabytes)
    else:
        result = measure_serve(options.run, options.file, options.task, options.clients, options.seconds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
