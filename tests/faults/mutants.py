"""Do the tests notice when a line is wrong? `make mutants MODULES="surgery schedule checkpoint manifest"`.

    python tests/faults/mutants.py [--modules NAME ...] [--sample N] [--json FILE]

mutmut changes one thing at a time in a copy of the sources (an operator, a number, a condition) and runs the module's
own tests on it; a mutant that no test fails on has survived. The copy stays in `.mutants/NAME`: `mutmut show MUTANT`
there shows one. `--sample` takes that many of each module, drawn from a seed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = ["mtbert", "launch", "configs", "tests", "pyproject.toml"]

TESTS = {
    "surgery": ["tests/test_surgery.py"],
    "schedule": ["tests/test_schedule.py"],
    "manifest": ["tests/test_manifest.py"],
    "checkpoint": ["tests/test_manifest.py", "tests/test_trainer.py"],
}
"""What is run on the mutants of a module: the quickest tests that are about it."""

KILLED = ("killed", "timeout", "segfault", "caught by type check")


def prepare(module: str) -> Path:
    place = ROOT / ".mutants" / module
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    lines = ["[mutmut]", "source_paths=mtbert", f"only_mutate=mtbert/{module}.py", "also_copy="]
    lines += [f"    {name}" for name in NEEDED]
    lines += ["pytest_add_cli_args=", "    -x", "    -q", "    -p", "    no:cacheprovider"]
    lines += ["pytest_add_cli_args_test_selection=", *(f"    {test}" for test in TESTS[module])]
    (place / "setup.cfg").write_text("\n".join(lines) + "\n")
    return place


def mutmut(place: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # the copy is to be imported
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode and arguments[0] != "run":
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout + done.stderr * (arguments[0] == "run")


def score(module: str, sample: int | None) -> dict[str, object]:
    place = prepare(module)
    if sample is None:
        told = mutmut(place, "run")
    else:
        mutmut(place, "run", "no such mutant")  # makes them all, and runs none
        names = [line.split(":")[0].strip() for line in mutmut(place, "results", "--all", "true").splitlines()]
        told = mutmut(place, "run", *random.Random(0).sample(sorted(names), min(sample, len(names))))
    results = mutmut(place, "results", "--all", "true").splitlines()
    states = dict(line.strip().split(": ", 1) for line in results if ": " in line)
    counts = collections.Counter(state for state in states.values() if state != "not checked")
    tried = sum(counts.values())
    if not tried:
        raise SystemExit(f"{module}: nothing was tried\n{told[-3000:]}")
    killed = sum(counts[state] for state in KILLED)
    survived = sorted(name for name, state in states.items() if state not in (*KILLED, "not checked"))
    return {"mutants": len(states), "tried": tried, "killed": killed, "states": counts, "survived": survived}


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the core.")
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    answer = {}
    for module in args.modules:
        found = answer[module] = score(module, args.sample)
        share = int(str(found["killed"])) / max(int(str(found["tried"])), 1)
        print(f"{module}: {found['killed']} of {found['tried']} killed ({share:.0%}), {found['mutants']} in all")
        for name in found["survived"]:  # type: ignore[attr-defined]
            print(f"    survived: {name}")
    if args.json:
        args.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
