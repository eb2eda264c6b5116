"""Coverage-guided fuzzing of all that reads what a stranger may have written: `make fuzz SECONDS=600`.

    python tests/faults/fuzz_readers.py [--seconds 60] [--readers NAME ...] [--work DIR] [--table]

Each reader may refuse its input with a `UserError` of one line; anything else is found, and its input kept in
DIR/READER-crash-…. atheris (LibFuzzer) mutates `corpus/READER`; what it adds stays in DIR, and DIR/fuzz.jsonl counts,
run by run: `--table` sums that up. test_corpus.py replays the corpus without atheris.

Guided is what is Python: inside safetensors (Rust), tokenizers (Rust) and Arrow (C++) mutations are blind. Files of
safetensors are therefore mutated as what they are, a length, a JSON header and numbers.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import io
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

CORPUS = HERE / "corpus"
ROOMS = ("config", "yaml_files", "readers", "manifest", "checkpoint", "record", "pretrained", "zero", "data", "runs")
READING = ["launch.records", "tune.space"] + [f"mtbert.{room}" for room in ROOMS]
INSTRUMENTED = ["yaml", *READING]
LIMITS = ["-timeout=20", "-rss_limit_mb=2500", "-max_len=4096", "-print_final_stats=1", "-verbosity=0"]


Read = Callable[[bytes, Path], Any]


def _table(form: str) -> Read:
    def read(content: bytes, place: Path) -> Any:
        from mtbert.readers import Record, read_table

        rows = list(read_table(io.BytesIO(content), form, "x").rows)
        lines = [row.line for row in rows]
        assert lines == sorted(set(lines)), "a line is read twice or out of order"
        assert all(isinstance(row, Record) or row.reason for row in rows)
        return rows

    return read


def _parquet(content: bytes, place: Path) -> Any:
    from mtbert.readers import read_rows

    path = place / "x.parquet"
    path.write_bytes(content)
    return list(read_rows(path, ["text", "label"], "id"))


def _yaml(content: bytes, place: Path) -> Any:
    from mtbert.config import load_config, to_yaml

    path = place / "x.yaml"
    path.write_bytes(content)
    config = load_config(path)
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    return config


def _manifest(content: bytes, place: Path) -> Any:
    """With the right checksum where it has one: a stranger can compute it."""
    from mtbert.manifest import open_checkpoint, sealed

    folder = place / "step-00000003"  # as the manifests of the corpus say
    folder.mkdir(exist_ok=True)
    (folder / "rank-0-of-1.safetensors").write_bytes(b"x")
    try:
        values = json.loads(content)
        if "sha256" in values:
            content = sealed(values).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    (folder / "manifest.json").write_bytes(content)
    return open_checkpoint(folder)


def _shard(content: bytes, place: Path) -> Any:
    """As a rank's shard with the right checksum: as bad as a stranger can make it."""
    from mtbert.checkpoint import _Reader
    from mtbert.manifest import Checkpoint, Manifest
    from mtbert.zero import Span

    name = "rank-0-of-1.safetensors"
    (place / name).write_bytes(content)
    values = {"format": 1, "step": 1, "adam_steps": [1], "best": None, "shapes": {"w": [2, 2]}}
    manifest = Manifest.model_validate({**values, "files": {name: {"size": 0, "sha256": "0" * 64}}})
    with _Reader(Checkpoint(place, manifest)) as reader:
        return reader.span(Span("w", 1, 3, 0), "master")


def _state(content: bytes, place: Path) -> Any:
    """What a method of surgery or weighting has learnt."""
    from mtbert.checkpoint import _load_state

    (place / "surgery.safetensors").write_bytes(content)
    return _load_state(place / "surgery.safetensors", 3)


def _weights(content: bytes, place: Path) -> Any:
    from mtbert.pretrained import load_pretrained

    shape = {"vocab_size": 3, "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "bert", **shape, "intermediate_size": 2, "max_position_embeddings": 3}
    (place / "config.json").write_text(json.dumps(config))
    (place / "model.safetensors").write_bytes(content)
    return load_pretrained(str(place))


def _shape(content: bytes, place: Path) -> Any:
    from mtbert.pretrained import read_shape

    (place / "config.json").write_bytes(content)
    return read_shape(place / "config.json")


def _tokenizer(name: str) -> Read:
    def read(content: bytes, place: Path) -> Any:
        from mtbert.data import load_tokenizer

        (place / name).write_bytes(content)
        tokenizer = load_tokenizer(place / name)
        return tokenizer.encode("a b é", add_special_tokens=False).tokens

    return read


def _metrics(content: bytes, place: Path) -> Any:
    from mtbert.record import RunRecord

    (place / "config.yaml").touch()
    (place / "metrics.jsonl").write_bytes(content)
    return RunRecord(place).curves


def _predictions(content: bytes, place: Path) -> Any:
    from mtbert.record import RunRecord

    (place / "config.yaml").write_text("tasks: {a: {kind: classification, train: t, dev: d, classes: 2}}\n")
    scores = {"metric/a/accuracy": 0.5, "metric/composite": 0.5}
    (place / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 0, **scores}) + "\n")
    (place / "predictions").mkdir(exist_ok=True)
    (place / "predictions" / "step-00000001.npz").write_bytes(content)
    said = RunRecord(place).said("latest")["a"]
    return [f"{id}" for id in said.ids_N]


def _job(name: str) -> Read:
    """A note, a lock or an end that a job left."""

    def read(content: bytes, place: Path) -> Any:
        from launch import records

        (place / "job").mkdir(exist_ok=True)
        (place / "job" / name).write_bytes(content)
        if name == "job.json":
            return records.read_note(place)
        if name == "lock":
            return records._read(records.Owner, place / "job" / name)
        return records.last_end(place, "token")

    return read


def _space(content: bytes, place: Path) -> Any:
    from mtbert.config import Config
    from tune.space import load_space

    task = {"kind": "classification", "train": "t", "dev": "d"}
    (place / "space.yaml").write_bytes(content)
    return load_space(
        place / "space.yaml", Config.model_validate({"data": {"dir": "D"}, "tasks": {"a": task, "b": task}})
    )


READERS: dict[str, Read] = {
    "csv": _table("csv"),
    "tsv": _table("tsv"),
    "delimited": _table(""),
    "jsonl": _table("jsonl"),
    "parquet": _parquet,
    "yaml": _yaml,
    "manifest": _manifest,
    "shard": _shard,
    "weights": _weights,
    "metrics": _metrics,
    "state": _state,
    "shape": _shape,
    "tokenizer": _tokenizer("tokenizer.json"),
    "vocabulary": _tokenizer("vocab.txt"),
    "predictions": _predictions,
    "note": _job("job.json"),
    "lock": _job("lock"),
    "end": _job("token-0.end.json"),
    "space": _space,
}
SAFETENSORS = ("shard", "weights", "state")


def refuses_or_reads(reader: str, content: bytes, place: Path) -> Any:
    """What is read; None where it is refused."""
    from mtbert.errors import UserError

    try:
        return READERS[reader](content, place)
    except UserError as error:
        assert "\n" not in str(error), f"more than a line: {error}"
        return None


def mutated_tensors(content: bytes, largest: int, seed: int) -> bytes:
    """A file of safetensors with something in its header changed, and the length that goes with it."""
    rng = random.Random(seed)
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
        name, tensor = rng.choice(list(header.items()))
        kind = rng.choice(["name", "dtype", "shape", "data_offsets", "gone", "more", "numbers"])
        if kind == "name":
            header[rng.choice([name[:-1], f"{name}|", "w|0|4|master", "w|9|4|exp_avg", "", "__metadata__"])] = (
                header.pop(name)
            )
        elif kind == "dtype":
            tensor["dtype"] = rng.choice(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", ""])
        elif kind in ("shape", "data_offsets"):
            number = rng.choice([0, 1, 4, 8, 16, 2**31, 2**62, 2**64, -1, 0.5, None])
            tensor[kind][rng.randrange(len(tensor[kind]))] = number
        elif kind == "gone":
            del header[name]
        elif kind == "more":
            header[f"{name}{rng.randrange(3)}"] = dict(tensor)
        else:
            numbers = numbers[: rng.randrange(len(numbers) + 1)] or bytes(rng.randrange(64))
    except (struct.error, ValueError, AttributeError, LookupError, TypeError):
        import atheris

        return bytes(atheris.Mutate(content, largest))
    text = json.dumps(header).encode()
    return (struct.pack("<Q", len(text)) + text + numbers)[:largest]


def fuzz(reader: str, place: Path, arguments: list[str]) -> None:
    """In this process, until LibFuzzer ends it."""
    import atheris

    for name in READING:  # with what they import, which is not instrumented
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mtbert", "launch", "tune", "yaml")]:
        del sys.modules[name]
    with atheris.instrument_imports(include=INSTRUMENTED):
        for name in READING:
            importlib.import_module(name)
    mutator = {"custom_mutator": mutated_tensors} if reader in SAFETENSORS else {}
    atheris.Setup(
        [sys.argv[0], *arguments], lambda content: refuses_or_reads(reader, content, place) and None, **mutator
    )
    atheris.Fuzz()


def table(ledger: Path) -> str:
    """All runs so far."""
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in ledger.read_text().splitlines() if ledger.exists() else []:
        entry = json.loads(line)
        for key in ("seconds", "executions", "found"):
            sums[entry["reader"]][key] += entry[key]
    lines = ["| reader | seconds | executions | found |", "|---|---|---|---|"]
    for reader, counts in [*sorted(sums.items()), ("all", sum(sums.values(), collections.Counter()))]:
        lines.append(f"| {reader} | {counts['seconds']:,} | {counts['executions']:,} | {counts['found']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing of the readers.")
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS)
    parser.add_argument("--work", type=Path, default=Path(".fuzz"), metavar="DIR", help="corpora that grow, and finds")
    parser.add_argument("--table", action="store_true", help="what all runs with this DIR came to; runs nothing")
    args = parser.parse_args()
    ledger = args.work / "fuzz.jsonl"
    if args.table:
        print(table(ledger))
        return 0
    seconds = max(1, args.seconds // len(args.readers))
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    finds = 0
    for reader in args.readers:
        grown = args.work / reader
        grown.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=shared) as place:
            command = [sys.executable, __file__, "run", reader, place, *LIMITS, f"-max_total_time={seconds}"]
            command += [f"-artifact_prefix={args.work}/{reader}-", str(grown), str(CORPUS / reader)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        counted = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
        executions, found = int(counted[1]) if counted else 0, int(done.returncode != 0)
        finds += found
        print(f"{reader}: {executions:,} executions" + ", FOUND" * found, flush=True)
        if found:
            print(done.stdout[-2000:] + done.stderr[-4000:])
        with ledger.open("a") as file:
            entry = {"reader": reader, "seconds": seconds, "executions": executions, "found": found}
            file.write(json.dumps(entry) + "\n")
    return int(finds > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        fuzz(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
