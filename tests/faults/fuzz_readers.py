"""Coverage-guided fuzzing of all that reads what a stranger may have written: `make fuzz SECONDS=600`.

    python tests/faults/fuzz_readers.py [--seconds 60] [--readers NAME ...] [--work DIR] [--json FILE]

Each reader may refuse its input with a `UserError` of one line; anything else is found, and its input kept in
DIR/READER-crash-…. atheris (LibFuzzer) mutates `corpus/READER`; what it adds stays in DIR. test_corpus.py replays the
corpus without atheris.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

CORPUS = HERE / "corpus"
INSTRUMENTED = ["yaml"] + [
    f"mtbert.{room}" for room in ("config", "yaml_files", "readers", "manifest", "checkpoint", "record")
]
LIMITS = ["-timeout=20", "-rss_limit_mb=2500", "-max_len=4096", "-print_final_stats=1", "-verbosity=0"]


def _table(form: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, place: Path) -> None:
        from mtbert.readers import Record, read_table

        rows = list(read_table(io.BytesIO(content), form, "x").rows)
        lines = [row.line for row in rows]
        assert lines == sorted(set(lines)), "a line is read twice or out of order"
        assert all(isinstance(row, Record) or row.reason for row in rows)

    return read


def _parquet(content: bytes, place: Path) -> None:
    from mtbert.readers import read_rows

    path = place / "x.parquet"
    path.write_bytes(content)
    for _ in read_rows(path, ["text", "label"], "id"):
        pass


def _yaml(content: bytes, place: Path) -> None:
    from mtbert.config import load_config, to_yaml

    path = place / "x.yaml"
    path.write_bytes(content)
    config = load_config(path)
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def _manifest(content: bytes, place: Path) -> None:
    from mtbert.manifest import open_checkpoint

    folder = place / "step-00000003"  # as the manifests of the corpus say
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(content)
    open_checkpoint(folder)


def _shard(content: bytes, place: Path) -> None:
    """As a rank's shard with the right checksum: as bad as a stranger can make it."""
    from mtbert.checkpoint import _Reader
    from mtbert.manifest import Checkpoint, Manifest
    from mtbert.zero import Span

    name = "rank-0-of-1.safetensors"
    (place / name).write_bytes(content)
    values = {"format": 1, "step": 1, "adam_steps": [1], "best": None, "shapes": {"w": [2, 2]}}
    manifest = Manifest.model_validate({**values, "files": {name: {"size": 0, "sha256": "0" * 64}}})
    with _Reader(Checkpoint(place, manifest)) as reader:
        reader.span(Span("w", 1, 3, 0), "master")


def _weights(content: bytes, place: Path) -> None:
    from mtbert.pretrained import load_pretrained

    shape = {"vocab_size": 3, "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "bert", **shape, "intermediate_size": 2, "max_position_embeddings": 3}
    (place / "config.json").write_text(json.dumps(config))
    (place / "model.safetensors").write_bytes(content)
    load_pretrained(str(place))


def _metrics(content: bytes, place: Path) -> None:
    from mtbert.record import RunRecord

    (place / "config.yaml").touch()
    (place / "metrics.jsonl").write_bytes(content)
    assert RunRecord(place).curves is not None


READERS: dict[str, Callable[[bytes, Path], None]] = {
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
}


def refuses_or_reads(reader: str, content: bytes, place: Path) -> None:
    from mtbert.errors import UserError

    try:
        READERS[reader](content, place)
    except UserError as error:
        assert "\n" not in str(error), f"more than a line: {error}"


def fuzz(reader: str, arguments: list[str]) -> None:
    """In this process, until LibFuzzer ends it."""
    import atheris

    import mtbert.pretrained
    import mtbert.zero

    for name in [name for name in sys.modules if name.startswith(tuple(INSTRUMENTED))]:
        del sys.modules[name]
    with atheris.instrument_imports(include=INSTRUMENTED):
        import mtbert.checkpoint
        import mtbert.readers
        import mtbert.record  # noqa: F401
    for name in ("mtbert.pretrained", "mtbert.zero"):  # with the errors and the classes of the instrumented ones
        sys.modules.pop(name, None)
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as place:
        atheris.Setup([sys.argv[0], *arguments], lambda content: refuses_or_reads(reader, content, Path(place)))
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing of the readers.")
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS)
    parser.add_argument("--work", type=Path, default=Path(".fuzz"), metavar="DIR", help="corpora that grow, and finds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what came out")
    args = parser.parse_args()
    counts: dict[str, Any] = {}
    for reader in args.readers:
        grown = args.work / reader
        grown.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "run", reader, *LIMITS, f"-artifact_prefix={args.work}/{reader}-"]
        command += [f"-max_total_time={max(1, args.seconds // len(args.readers))}", str(grown), str(CORPUS / reader)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        found = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
        counts[reader] = {"executions": int(found[1]) if found else 0, "found": int(done.returncode != 0)}
        print(f"{reader}: {counts[reader]['executions']:,} executions" + ", FOUND" * (done.returncode != 0), flush=True)
        if done.returncode:
            print(done.stdout[-2000:] + done.stderr[-4000:])
    total = sum(count["executions"] for count in counts.values())
    print(f"{total:,} executions, {sum(count['found'] for count in counts.values())} found")
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1) + "\n")
    return int(any(count["found"] for count in counts.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
