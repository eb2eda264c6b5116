"""Do the tests notice when a line is wrong? `make mutants ARGS="--modules schedule --sample 20"`.

    python tests/faults/mutants.py [--modules NAME ...] [--sample N] [--json FILE]

mutmut changes one thing at a time in a copy of the sources (an operator, a number, a condition) and runs on it the
module's own tests that need one process; a mutant that no test fails on has survived. It leaves decorated functions and
module level alone. What runs out of time or crashes is run again alone before it counts as noticed. First two functions
are added to the copy whose mutants must all survive (nobody looks at what it returns) or must all be killed: else the
counts would mean nothing. The copy stays in `.mutants/NAME`, where a run that was cut short goes on and
`mutmut show MUTANT` shows one. `--sample` takes that many of each module, drawn from a seed.

Ends with 1 where fewer than 85 % are killed, or some were not tried.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = ["mtbert", "launch", "configs", "tests", "pyproject.toml"]

TESTS = {
    "surgery": ["tests/test_surgery.py"],
    "schedule": ["tests/test_schedule.py"],
    "manifest": ["tests/test_manifest.py"],
    "checkpoint": ["tests/test_manifest.py", "tests/test_trainer.py"],
}
"""What is run on the mutants of a module: the quickest tests that are about it."""

FLOOR = 0.85
NOTICED = ("killed", "timeout", "segfault", "caught by type check")
DOUBTFUL = ("timeout", "segfault", "suspicious")

CONTROLS = """

def no_op() -> int:
    return 1 + 1


def certain() -> int:
    return 1 + 1
"""
CALLS = """

@pytest.fixture(autouse=True)
def controls() -> None:
    from mtbert import {module}

    {module}.no_op()
    assert {module}.certain() == 2
"""


def prepare(module: str) -> Path:
    """The copy, with what was found in it so far if it is still that of these sources."""
    place = ROOT / ".mutants" / module
    files = [path for name in NEEDED for path in sorted((ROOT / name).rglob("*")) or [ROOT / name]]
    content = hashlib.sha256(Path(__file__).read_bytes())
    for path in files:
        if path.is_file() and path.suffix != ".pyc":
            content.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    made_from = place / "made-from"
    if made_from.is_file() and made_from.read_text() == content.hexdigest():
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    for path, text in ((f"mtbert/{module}.py", CONTROLS), ("tests/conftest.py", CALLS.format(module=module))):
        with (place / path).open("a") as file:
            file.write(text)
    # forked from mutmut's own process, workers would find themselves with its forkserver and its threads
    lines = ["[mutmut]", "process_isolation=forkserver", "source_paths=mtbert", f"only_mutate=mtbert/{module}.py"]
    lines += ["also_copy=", *(f"    {name}" for name in NEEDED)]
    lines += ["pytest_add_cli_args=", "    -x", "    -q", "    -p", "    no:cacheprovider", "    -m", "    not ranks"]
    lines += ["pytest_add_cli_args_test_selection=", *(f"    {test}" for test in TESTS[module])]
    (place / "setup.cfg").write_text("\n".join(lines) + "\n")
    made_from.write_text(content.hexdigest())
    return place


def mutmut(place: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # the copy is to be imported
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(
            f"mutmut {arguments[0]}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def states(place: Path) -> dict[str, str]:
    """Of every mutant, by name."""
    lines = mutmut(place, "results", "--all", "true").splitlines()
    return dict(line.strip().split(": ", 1) for line in lines if ": " in line)


def check_controls(module: str, place: Path) -> None:
    for name, wanted in (("no_op", "survived"), ("certain", "killed")):
        names = f"mtbert.{module}.x_{name}__mutmut_"
        mutmut(place, "run", f"{names}*")
        found = {mutant: state for mutant, state in states(place).items() if mutant.startswith(names)}
        if not found or set(found.values()) != {wanted}:
            raise SystemExit(f"{module}: every mutant of {name} must be {wanted}, but: {found}")


def score(module: str, sample: int | None) -> dict[str, Any]:
    place = prepare(module)
    check_controls(module, place)
    if sample is None:
        mutmut(place, "run")
    else:
        names = sorted(name for name in states(place) if not control(name))
        mutmut(place, "run", *random.Random(0).sample(names, min(sample, len(names))))
    if doubtful := [name for name, state in states(place).items() if state in DOUBTFUL]:
        mutmut(place, "run", "--max-children", "1", *doubtful)
    found = {name: state for name, state in states(place).items() if not control(name)}
    counts = collections.Counter(state for state in found.values() if state != "not checked")
    killed = sum(counts[state] for state in NOTICED)
    missed = sorted(name for name, state in found.items() if state not in (*NOTICED, "not checked"))
    return {
        "mutants": len(found),
        "tried": sum(counts.values()),
        "killed": killed,
        "states": counts,
        "survived": missed,
    }


def control(name: str) -> bool:
    return name.rsplit("__mutmut_", 1)[0].endswith((".x_no_op", ".x_certain"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the core.")
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    answer = {}
    code = 0
    for module in args.modules:
        found = answer[module] = score(module, args.sample)
        mutants, tried, killed = (found[key] for key in ("mutants", "tried", "killed"))
        apart = ", ".join(f"{count} {state}" for state, count in found["states"].most_common())
        print(f"{module}: {killed} of {tried} killed ({killed / max(tried, 1):.0%}), {mutants} in all: {apart}")
        for name in found["survived"]:
            print(f"    survived: {name}")
        wanted = mutants if args.sample is None else min(args.sample, mutants)
        if tried < wanted:
            print(f"    {wanted - tried} were not tried; once more goes on from here")
        code |= tried < wanted or killed < FLOOR * tried
    if args.json:
        args.json.write_text(json.dumps(answer, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
