"""Do the tests notice when a line is wrong? `make mutants ARGS="--modules schedule --sample 20"`.

    python tests/faults/mutants.py [--modules NAME ...] [--sample N] [--jobs N] [--table]

mutmut changes one thing at a time in a copy of the sources (an operator, a number, a condition) and runs on it those of
the module's own tests that need one process and reach the changed function; a mutant that no test fails on has
survived. It leaves decorated functions and module level alone. What runs out of time or crashes is run again alone
before it counts as noticed. First two functions are added to the copy: the mutant of one must survive (nobody looks at
what it returns), that of the other must be killed; else the counts would mean nothing. The copy stays in
`.mutants/NAME`, where a run that was cut short goes on and `mutmut show MUTANT` shows one.

When all mutants of a module were tried, `mutants.json` beside this file has the counts and what survived, and
docs/reliability.md has its table. `--sample` takes that many of each module, drawn from a seed, and records nothing.
`--table` tries nothing: it prints and writes the table of what was recorded, and tells which modules and tests are no
longer those of the record.

Ends with 1 where fewer than 85 % are killed, or some were not tried.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import page  # noqa: E402

from mtbert.environment import commit  # noqa: E402

RECORD = Path(__file__).with_name("mutants.json")

TESTS = {
    "surgery": ["tests/test_surgery.py"],
    "schedule": ["tests/test_schedule.py"],
    "checkpoint": ["tests/test_checkpoint.py"],
    "manifest": ["tests/test_manifest.py"],
}
"""What is run on the mutants of a module: the quickest tests that are about it."""

HELPERS = ["tests/conftest.py", "tests/harness.py"]
NEEDED = ["mtbert", "launch", "configs", "pyproject.toml", *HELPERS]
PLUGIN = Path(__file__).with_name("mutants_plugin.py")

FLOOR = 0.85
NOTICED = ("killed", "timeout", "segfault", "caught by type check")
DOUBTFUL = ("timeout", "segfault", "suspicious")

CONTROLS = """

def no_op() -> int:
    return 1


def certain() -> int:
    return 1
"""


def configuration(module: str) -> str:
    """mutmut's. The time a run may take: five times what its tests took, and half a minute."""
    lines = ["[mutmut]", "source_paths=mtbert", f"only_mutate=mtbert/{module}.py"]
    # forked from mutmut's own process, workers would find themselves with its forkserver and its threads
    lines += ["process_isolation=forkserver", "timeout_multiplier=5", "timeout_constant=6"]
    lines += ["also_copy=", *(f"    {name}" for name in ("launch", "configs", "pyproject.toml", "tests", PLUGIN.name))]
    lines += ["pytest_add_cli_args=", "    -x", "    -q", "    --tb=no", "    -p", "    no:cacheprovider"]
    lines += ["    -p", f"    {PLUGIN.stem}", "    -m", "    not ranks"]
    lines += ["pytest_add_cli_args_test_selection=", *(f"    {test}" for test in TESTS[module])]
    return "\n".join(lines) + "\n"


def digest(paths: Sequence[Path]) -> str:
    """Of the names and bytes of files and of all that lies in folders."""
    content = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix != ".pyc":
                content.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return content.hexdigest()


def prepare(module: str) -> Path:
    """The copy, with what was found in it so far if it is still that of these sources."""
    place = ROOT / ".mutants" / module
    names = [*NEEDED, *TESTS[module]]
    made_from = digest([*(ROOT / name for name in names), PLUGIN]) + configuration(module) + CONTROLS
    note = place / "made-from"
    if note.is_file() and note.read_text() == made_from:
        return place
    shutil.rmtree(place, ignore_errors=True)
    (place / "tests").mkdir(parents=True)
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    shutil.copy(PLUGIN, place)
    with (place / "mtbert" / f"{module}.py").open("a") as file:
        file.write(CONTROLS)
    (place / "setup.cfg").write_text(configuration(module))
    note.write_text(made_from)
    return place


def mutmut(place: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MUTATED": place.name}
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
    return {name: state for name, _, state in (line.strip().partition(": ") for line in lines) if state}


def change(place: Path, mutant: str) -> str:
    """What mutmut made of which line; what lies around it and stays as it is is left out."""
    lines = mutmut(place, "show", mutant).splitlines()
    return "\n".join(
        line[0] + " " + line[1:].strip() for line in lines if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")
    )


def control(name: str) -> bool:
    return name.rsplit("__mutmut_", 1)[0].endswith((".x_no_op", ".x_certain"))


def check_controls(module: str, place: Path) -> None:
    wanted = {f"mtbert.{module}.x_no_op__mutmut_1": "survived", f"mtbert.{module}.x_certain__mutmut_1": "killed"}
    mutmut(place, "run", *wanted)
    found = {mutant: state for mutant, state in states(place).items() if control(mutant)}
    if found != wanted:
        raise SystemExit(f"{module}: these mutants must be {wanted}, but are {found}")


def score(module: str, sample: int | None, jobs: int) -> dict[str, Any]:
    place = prepare(module)
    stamp = {
        "when": datetime.date.today().isoformat(),
        "commit": commit(),
        **of_what(module),
    }  # files may change since
    check_controls(module, place)
    children = ("--max-children", str(jobs))
    if sample is None:
        mutmut(place, "run", *children)
    else:
        names = sorted(name for name in states(place) if not control(name))
        mutmut(place, "run", *children, *random.Random(0).sample(names, min(sample, len(names))))
    if doubtful := [name for name, state in states(place).items() if state in DOUBTFUL]:
        mutmut(place, "run", "--max-children", "1", *doubtful)
    found = {name: state for name, state in states(place).items() if not control(name)}
    counts = collections.Counter(state for state in found.values() if state != "not checked")
    missed = sorted(name for name, state in found.items() if state not in (*NOTICED, "not checked"))
    return {
        **stamp,
        "mutants": len(found),
        "tried": sum(counts.values()),
        "killed": sum(counts[state] for state in NOTICED),
        "states": dict(counts.most_common()),
        "survived": {name: change(place, name) for name in missed},
    }


def of_what(module: str) -> dict[str, str]:
    """The digests of what a score is about."""
    return {
        "source": digest([ROOT / "mtbert" / f"{module}.py"]),
        "tests": digest([ROOT / name for name in (*HELPERS, *TESTS[module])]),
    }


# ------------------------------------------------------------------------------------------------ what is told


def read_record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return record


def block(record: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| module | mutants | killed | | tried at |", "|---|---|---|---|---|"]
    for module in TESTS:
        if module not in record:
            lines.append(f"| `{module}.py` | | | not tried | |")
            continue
        told = record[module]
        share = told["killed"] / told["mutants"]
        missed = " (missed)" if share < FLOOR else ""
        lines.append(
            f"| `{module}.py` | {told['mutants']} | {told['killed']} | {share:.1%}{missed} "
            f"| {told['commit']}, {told['when']} |"
        )
    return "\n".join(lines) + "\n"


def changed_since(record: dict[str, Any]) -> list[str]:
    """A line for every module whose record is not that of the files of now."""
    lines = []
    for module, told in record.items():
        if other := [name for name, value in of_what(module).items() if told[name] != value]:
            lines.append(f"{module}: {' and '.join(other)} changed since {told['commit']}; try it again")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the core.")
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module; default: all")
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--table", action="store_true", help="try nothing, write the table of what was recorded")
    args = parser.parse_args(arguments)
    if args.table:
        print(block(read_record()), *changed_since(read_record()), sep="\n")
        page.write("mutants", block(read_record()))
        return 0
    code = 0
    for module in args.modules:
        found = score(module, args.sample, args.jobs)
        mutants, tried, killed = (found[key] for key in ("mutants", "tried", "killed"))
        apart = ", ".join(f"{count} {state}" for state, count in found["states"].items())
        print(f"{module}: {killed} of {tried} killed ({killed / max(tried, 1):.1%}), {mutants} in all: {apart}")
        for name, what in found["survived"].items():
            print(f"    survived: {name}\n        " + what.replace("\n", "\n        "), flush=True)
        wanted = mutants if args.sample is None else min(args.sample, mutants)
        if tried < wanted:
            print(f"    {wanted - tried} were not tried; once more goes on from here")
        elif args.sample is None:
            record = {**read_record(), module: found}
            RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            page.write("mutants", block(record))
        code |= tried < wanted or killed < FLOOR * tried
    return code


if __name__ == "__main__":
    sys.exit(main())
