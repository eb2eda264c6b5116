"""Coverage-guided fuzzing of all that reads what a stranger may have written: `make fuzz SECONDS=600`.

    python tests/faults/fuzz_readers.py [--seconds 60] [--readers NAME ...] [--work DIR] [--table]

Each reader may refuse its input with a `UserError` of one line; anything else is found, and its input kept in
DIR/READER-crash-…. atheris (LibFuzzer) mutates `corpus/READER`; what it adds stays in DIR. `fuzz.jsonl`, which is in
git, gets a line per reader and run; docs/reliability.md gets the sum, from `--table` alone as well. What was found
counts as mended once its input lies in `corpus/READER`, which test_corpus.py replays without atheris.

Guided is what is Python: inside safetensors, tokenizers and pydantic (Rust) and Arrow (C++) mutations are blind. Files
of safetensors, JSON and NumPy archives are therefore mutated as what they are: a header and numbers, values, arrays.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import collections
import datetime
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import page  # noqa: E402

from mtbert.environment import commit  # noqa: E402

CORPUS = HERE / "corpus"
LEDGER = HERE / "fuzz.jsonl"
INSTRUMENTED = ["mtbert", "launch", "tune", "yaml"]
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
    from mtbert.config_files import load_config, to_yaml

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


def _vocabulary(content: bytes, place: Path) -> Any:
    from mtbert.data import load_tokenizer

    (place / "vocab.txt").write_bytes(content)
    return load_tokenizer(place / "vocab.txt").encode("a b é", add_special_tokens=False).tokens


def _encoder(name: str) -> Read:
    """A file of those that a run keeps of its encoder; the others are in order."""

    def read(content: bytes, place: Path) -> Any:
        from mtbert.trained import kept_encoder

        folder = place / "encoder"
        folder.mkdir(exist_ok=True)
        (folder / "origin.json").write_bytes(b"{}")
        (folder / "config.json").write_bytes((CORPUS / "shape" / "plain").read_bytes())
        (folder / "tokenizer.json").write_bytes((CORPUS / "tokenizer" / "plain").read_bytes())
        (folder / name).write_bytes(content)
        kept = kept_encoder(place)
        assert kept is not None
        encoding = kept.tokenizer.encode("a b é", add_special_tokens=False)
        assert all(id < kept.shape.vocab_size for id in encoding.ids), "a token that the encoder does not know"
        return kept.origin, encoding.tokens

    return read


@functools.cache
def _config() -> Any:
    """With a task of classes and one of values."""
    from mtbert.config import Config

    task = {"train": "t", "dev": "d"}
    pairs = {"kind": "pair_regression", "columns": {"text": ["s", "t"]}, "head": {"kind": "cosine"}, **task}
    return Config.model_validate({"data": {"dir": "D"}, "tasks": {"a": {"kind": "classification", **task}, "b": pairs}})


def _run(place: Path) -> Any:
    from mtbert.record import RunRecord

    (place / "config.yaml").touch()
    run = RunRecord(place)
    vars(run)["config"] = _config()  # to read it would take nearly all of the time
    return run


def _metrics(content: bytes, place: Path) -> Any:
    """As a report reads it, and as training that goes on does."""
    from mtbert.record import keep_lines_before

    (place / "metrics.jsonl").write_bytes(content)
    keep_lines_before(place, 10)
    (place / "metrics.jsonl").write_bytes(content)
    run = _run(place)
    return run.curves, run.scores("best"), run.scores("latest")


def _predictions(content: bytes, place: Path) -> Any:
    """With the tables that a report makes of it."""
    from mtbert import report

    scores = {"metric/a/accuracy": 0.5, "metric/b/pearson": 0.5, "metric/composite": 0.5}
    (place / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 0, **scores}) + "\n")
    (place / "predictions").mkdir(exist_ok=True)
    (place / "predictions" / "step-00000001.npz").write_bytes(content)
    run = _run(place)
    said = run.said("latest")
    for name, one in said.items():
        task = run.config.tasks[name]
        tables = [report._by_length(task, one), report._errors(task, one, one.labels_N.argsort(), {})]
        if task.kind == "classification":
            tables.append(report._by_class(task, one))
        str(tables).encode()
    return said


def _document(name: str) -> Read:
    """What a report shows of `environment.json` or `result.json`."""

    def read(content: bytes, place: Path) -> Any:
        from mtbert import report

        (place / name).write_bytes(content)
        (place / "metrics.jsonl").write_bytes((CORPUS / "metrics" / "plain").read_bytes())
        run = _run(place)
        scores = {"a": 0.5, "b": 0.5, "composite": 0.5}
        shown = report._environment(run) if name == "environment.json" else report._scores(run, scores)
        str(shown).encode()
        return shown

    return read


def _cache(content: bytes, place: Path) -> Any:
    """The manifest of tokenised data, with the right checksum where it has one."""
    from mtbert.token_cache import intact

    (place / "tokens").write_bytes(b"x")
    (place / "manifest.json").write_bytes(_with_checksum(content))
    return intact(place)


def _with_checksum(content: bytes) -> bytes:
    try:
        values = json.loads(content)
        if values.pop("checksum", None) is not None:
            values["checksum"] = zlib.crc32(json.dumps(values).encode())
        return json.dumps(values).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return content


def _search(content: bytes, place: Path) -> Any:
    """What `python -m tune --resume` goes on with."""
    from tune.search import read_settings

    (place / "search.yaml").write_bytes(content)
    return read_settings(place)


@functools.cache
def _service() -> Callable[[str, bytes], tuple[int, Any]]:
    """POSTs a body to a path of the whole service, with a model of two numbers a token; status and answer."""
    import torch
    from tokenizers import Tokenizer

    from mtbert.encoder import EncoderShape
    from mtbert.heads import MultiTaskModel
    from mtbert.serve import Limits, make_app
    from mtbert.trained import Trained

    config = _config()
    tokenizer = Tokenizer.from_file(str(CORPUS / "tokenizer" / "plain"))
    shape = EncoderShape(tokenizer.get_vocab_size(), 2, 1, 1, 2, 16)
    model = MultiTaskModel(shape, config.encoder, config.tasks, 0, config.shared_layers)
    run = Trained(Path("run"), config, 1, shape, tokenizer, model, torch.device("cpu"), torch.float32)
    app, loop = make_app(run, Limits()), asyncio.new_event_loop()
    lifespan = app.router.lifespan_context(app)
    loop.run_until_complete(lifespan.__aenter__())

    def close() -> None:
        loop.run_until_complete(lifespan.__aexit__(None, None, None))
        loop.close()

    atexit.register(close)
    return lambda path, body: loop.run_until_complete(_post(app, path, body))


async def _post(app: Callable[..., Awaitable[None]], path: str, body: bytes) -> tuple[int, Any]:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    coming, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> dict[str, Any]:
        if not coming:
            await asyncio.Event().wait()  # the client stays
        return coming.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    answer = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(answer, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} in an answer, which JSON does not know")


def _serve(content: bytes, place: Path) -> Any:
    from mtbert.errors import UserError

    status, answer = _service()("/predict" if b'"task"' in content else "/embed", content)
    if status != 200:
        assert 400 <= status < 500 and list(answer) == ["detail"] and 0 < len(answer["detail"]) < 400, (status, answer)
        raise UserError(answer["detail"])
    return answer


def _job(name: str) -> Read:
    """A note, a lock or an end that a job left."""

    def read(content: bytes, place: Path) -> Any:
        from launch import records
        from mtbert.lock import read_owner

        (place / "job").mkdir(exist_ok=True)
        (place / "job" / name).write_bytes(content)
        if name == "job.json":
            return records.read_note(place)
        if name == "lock":
            return read_owner(place / "job" / name)
        return records.last_end(place, "token")

    return read


def _space(content: bytes, place: Path) -> Any:
    from tune.space import load_space

    (place / "space.yaml").write_bytes(content)
    return load_space(place / "space.yaml", _config())


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
    "tokenizer": _encoder("tokenizer.json"),
    "origin": _encoder("origin.json"),
    "checksums": _encoder("checksums.json"),
    "vocabulary": _vocabulary,
    "cache": _cache,
    "predictions": _predictions,
    "environment": _document("environment.json"),
    "result": _document("result.json"),
    "note": _job("job.json"),
    "lock": _job("lock"),
    "end": _job("token-0.end.json"),
    "space": _space,
    "search": _search,
    "serve": _serve,
}


def refuses_or_reads(reader: str, content: bytes, place: Path) -> Any:
    """What is read; None where it is refused."""
    from mtbert.errors import UserError

    try:
        return READERS[reader](content, place)
    except UserError as error:
        assert "\n" not in str(error), f"more than a line: {error}"
        return None


# ------------------------------------------------------------------------------------------------ mutations


Change = Callable[[bytes, random.Random], bytes]


def changed_tensors(content: bytes, rng: random.Random) -> bytes:
    """A file of safetensors with something in its header changed, and the length that goes with it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    name, tensor = rng.choice(list(header.items()))
    kind = rng.choice(["name", "dtype", "shape", "data_offsets", "gone", "more", "numbers"])
    if kind == "name":
        header[rng.choice([name[:-1], f"{name}|", "w|0|4|master", "w|9|4|exp_avg", "", "__metadata__"])] = header.pop(
            name
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
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


ODD = [None, True, 0, 1, -1, 7, 0.5, 1e-320, 1e308, math.inf, math.nan, 2**31, 2**63, 2**64, 10**400]
ODD += ["", "a", "nan", "a\nb", "\0", "\ud800", "é" * 300, "../x", [], {}, [[]], {"": 0}]


def changed_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON document, or one of the lines of a file of them, with values changed, moved, renamed, gone."""
    try:
        before, text, after = b"", json.loads(content), b""
    except ValueError:
        lines = content.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        before, text, after = b"".join(lines[:at]), json.loads(lines[at]), b"\n" + b"".join(lines[at + 1 :])
    document = [text]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = _places(document)
        holder, key = rng.choice(places)
        kind = rng.choice(["odd", "odd", "copy", "gone", "name", "twice", "inside"])
        if kind == "odd":
            holder[key] = rng.choice(ODD)
        elif kind == "copy":
            other, there = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[there]))
        elif kind == "gone" and holder is not document:
            del holder[key]
        elif kind == "name" and isinstance(holder, dict):
            holder[rng.choice(["", "é" * 300, "a\nb", "\ud800", f"{key}x", *(str(name) for _, name in places)])] = (
                holder.pop(key)
            )
        elif kind == "twice" and isinstance(holder, list) and holder is not document:
            holder.extend([holder[key]] * rng.choice([1, 70]))
        else:
            holder[key] = [holder[key]]
    return before + json.dumps(document[0]).encode() + after


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every list and dictionary in a value with every index and key that it has."""
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def changed_archive(content: bytes, rng: random.Random) -> bytes:
    """A NumPy archive with an array's bytes changed, or its place taken by another's; checksums are right."""
    import atheris

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename: archive.read(member)[:4096] for member in archive.infolist()[:20]}
    name = rng.choice(list(members))
    kind = rng.choice(["bytes", "header", "values", "values", "other", "gone"])
    before = members[name]
    if kind == "bytes":
        members[name] = bytes(atheris.Mutate(before, 4096))
    elif kind == "header":
        old, new = rng.choice(HEADERS), rng.choice(HEADERS)
        members[name] = before.replace(old, new.ljust(len(old)), 1) if len(new) <= len(old) else before
    elif kind == "values":  # after a header of 128 bytes
        values = bytearray(before[128:])
        at = rng.randrange(len(values)) & ~7
        values[at : at + 8] = struct.pack("<d", rng.choice([0.0, 1.0, -1.0, 2.0, 1e300, math.nan, math.inf]))
        members[name] = before[:128] + bytes(values)
    elif kind == "other":
        members[name] = members[rng.choice(list(members))]
    else:
        del members[name]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, written in members.items():
            archive.writestr(zipfile.ZipInfo(name), written, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


HEADERS = [b"'<f8'", b"'>f8'", b"'<f4'", b"'<f2'", b"'<i8'", b"'<u8'", b"'<i4'", b"'|O'", b"'<U1'", b"'|S8'", b"'<c8'"]
HEADERS += [b"'<M8'", b"'|b1'", b"(2,)", b"(0,)", b"(1,)", b"()", b"(2, 2)", b"(4, 1)", b"(2, 0)", b"False", b"True"]

DOCUMENTS = ("jsonl", "metrics", "manifest", "shape", "tokenizer", "origin", "checksums", "cache", "environment")
DOCUMENTS += ("result", "note", "lock", "end", "serve")
CHANGES: dict[str, Change] = {
    **dict.fromkeys(("shard", "weights", "state"), changed_tensors),
    **dict.fromkeys(DOCUMENTS, changed_json),
    "predictions": changed_archive,
}


def mutator(change: Change) -> Callable[[bytes, int, int], bytes]:
    """Changes one input in five, and what is not of its kind, as plain bytes."""
    import atheris

    def mutate(content: bytes, largest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            if rng.random() < 0.8:
                return change(content, rng)[:largest]
        except Exception:  # of no such form: the parsers of JSON, archives and headers raise a dozen classes
            pass  # and it is changed blindly
        return bytes(atheris.Mutate(content, largest))

    return mutate


def fuzz(reader: str, place: Path, arguments: list[str]) -> None:
    """In this process, until LibFuzzer ends it."""
    import atheris

    def once(content: bytes) -> None:
        refuses_or_reads(reader, content, place)

    plain = (CORPUS / reader / "plain").read_bytes()
    once(plain)  # imports what it takes, of which only a part is instrumented
    for name in [name for name in sys.modules if name.partition(".")[0] in INSTRUMENTED]:
        del sys.modules[name]
    _config.cache_clear()
    _service.cache_clear()
    with atheris.instrument_imports(include=INSTRUMENTED):
        once(plain)
    change = CHANGES.get(reader)
    atheris.Setup([sys.argv[0], *arguments], once, **({"custom_mutator": mutator(change)} if change else {}))
    atheris.Fuzz()


# --------------------------------------------------------------------------------------------------- counts


def entries(ledger: Path = LEDGER) -> list[dict[str, Any]]:
    """Run by run: when, at which commit, how long (start-up included), executions, SHA-1 of the inputs found."""
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def outstanding(runs: list[dict[str, Any]]) -> list[str]:
    """Finds whose input is not in the corpus, and readers without a run since their last find."""
    left = []
    for run in runs:
        corpus = CORPUS / run["reader"]
        known = {hashlib.sha1(path.read_bytes()).hexdigest() for path in corpus.iterdir()} if corpus.is_dir() else ()
        left += [f"{run['reader']} {sha1}" for sha1 in run["found"] if sha1 not in known]
    last = {run["reader"]: run for run in runs}
    return left + [f"{reader}: not run again" for reader, run in last.items() if run["found"]]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: every reader's sums, and its last run."""
    lines = ["| reader | executions | seconds | found | last run | at commit |", "|---|---|---|---|---|---|"]
    total: collections.Counter[str] = collections.Counter()
    for reader in READERS:
        if mine := [run for run in runs if run["reader"] == reader]:
            sums = {key: sum(run[key] for run in mine) for key in ("executions", "seconds")}
            sums["found"] = sum(len(run["found"]) for run in mine)
            total.update(sums)
            lines.append(_line(reader, sums, mine[-1]["date"], mine[-1]["commit"]))
    return "\n".join([*lines, _line("all", total, "", "")]) + "\n"


def _line(reader: str, sums: Mapping[str, int], date: str, commit: str) -> str:
    return f"| {reader} | {sums['executions']:,} | {sums['seconds']:,} | {sums['found']} | {date} | {commit} |"


def block(runs: list[dict[str, Any]]) -> str:
    left = outstanding(runs)
    return f"{table(runs)}\nOutstanding: {', '.join(left) or 'nothing'}.\n"


def run(reader: str, seconds: int, work: Path) -> dict[str, Any] | None:
    """Fuzzes a reader in a process of its own; the entry of `LEDGER`."""
    grown = work / reader
    grown.mkdir(parents=True, exist_ok=True)
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    began, at = time.monotonic(), commit()
    with tempfile.TemporaryDirectory(dir=shared) as place:
        command = [sys.executable, __file__, "run", reader, place, *LIMITS, f"-max_total_time={seconds}"]
        command += [f"-artifact_prefix={work}/{reader}-", str(grown), str(CORPUS / reader)]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=alone)
    counted = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    found = (
        re.findall(r"Test unit written to \S+-([0-9a-f]{40})$", done.stderr, re.MULTILINE) if done.returncode else []
    )
    if not counted or bool(found) != bool(done.returncode):  # what it did is not known, and does not count
        print(f"{reader}: the fuzzer itself ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return None
    print(f"{reader}: {int(counted[1]):,} executions" + ", FOUND" * bool(found), flush=True)
    if found:
        print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("INFO")))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": at,
        "reader": reader,
        "seconds": round(time.monotonic() - began),
        "executions": int(counted[1]),
        "found": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing of the readers.")
    parser.add_argument("--seconds", type=int, default=60, help="in all, without the start of each reader")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS)
    parser.add_argument("--work", type=Path, default=Path(".fuzz"), metavar="DIR", help="corpora that grow, and finds")
    parser.add_argument("--table", action="store_true", help="what all runs came to, into the page; runs nothing")
    args = parser.parse_args()
    good = True
    for reader in args.readers if not args.table else ():
        entry = run(reader, max(1, args.seconds // len(args.readers)), args.work)
        good = good and entry is not None and not entry["found"]
        if entry is None:
            continue
        with LEDGER.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    page.write("fuzz", block(entries()))
    print(block(entries()))
    return int(not good)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        fuzz(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
