"""Faults into real jobs, drawn from a seed, and what comes out held against jobs that were left alone.

    python tests/faults/soak.py [--faults 500] [--seed 0] [--kinds WORD ...] [--ledger FILE] [--table]

A patient (`patient.py`) is struck by one fault after another, each at a moment drawn from the seed (`moments.py`): an
end (`ends.py`), a refusal (`refusals.py`), damage (`damage.py`), or something beside it (`companions.py`). The job goes
on, or ends and is continued as its last words say. After every fault:

- there is evidence that it struck; a fault without is "not injected", is not counted, and is drawn again;
- every checkpoint is whole, and its numbers are those of the undisturbed run after the same step;
- a job that ended did so with a code that the fault explains, named the cause and how to go on, and goes on without
  another word; its processes are gone, and after an end in order nothing is left behind;
- it did not wait for anything longer than `PATIENCE_S`, and no socket was within reach of other machines.

A patient that has come to its end has the result and the metrics of the undisturbed run, line by line.

The ledger has a line per fault from the moment it is judged, so that a soak that was ended goes on where it stood. What
a fault that was lost leaves is kept in soak-lost/. Some kinds need root, a file system of their own, strace or
faketime; those that cannot be had here are named and left out.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import companions  # noqa: F401 - each of them fills KINDS
import damage  # noqa: F401
import ends  # noqa: F401
import page
import refusals  # noqa: F401
from kinds import KINDS, Kind, here
from patient import ROOT, Lab, Lost, NotInjected, Patient, Undisturbed, lab, undisturbed

from mtbert.environment import commit
from mtbert.stops import STOPPED

SURVIVED, LOST, NOTHING, BROKEN = "survived", "lost", "not injected", "harness error"
COUNTED = (SURVIVED, LOST)
MISSES = 3
"""Tries that came to nothing after which a kind is passed over for as long as if it had struck."""
HOPELESS = 25
"""Tries in a row that came to nothing after which a soak is given up."""

LEDGER = Path(__file__).with_name("soak.jsonl")

Line = dict[str, Any]


class Ledger:
    """A line of JSON per fault; of two with the same seed and number the later one holds.

    Who mends what lost one adds its line once more, with `mended`: what it was, and since when it is no more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: dict[tuple[int, int], Line] = {}
        self.concluded: list[Line] = []
        if path.exists():
            whole = path.read_bytes()
            # the machine may have gone in the middle of a line
            os.truncate(path, whole.rfind(b"\n") + 1)
            for text in whole[: whole.rfind(b"\n") + 1].splitlines():
                self._take(json.loads(text))

    def add(self, line: Line) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def _take(self, line: Line) -> None:
        if "kind" in line:
            self.faults[line["seed"], line["number"]] = line
        else:
            self.concluded.append(line)

    def of(self, seed: int, names: Sequence[str]) -> list[Line]:
        return [line for line in self.faults.values() if line["seed"] == seed and line["kind"] in names]


class Soak:
    """
    Args:
        names: of the kinds; each comes as often as any other.
        worlds: numbers of ranks a patient may have.
        lost: where run folders of faults that were lost are kept.
    """

    def __init__(
        self,
        place: Lab,
        ledger: Ledger,
        seed: int,
        names: Sequence[str],
        worlds: Sequence[int],
        lost: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.place, self.ledger, self.seed, self.lost = place, ledger, seed, lost
        self.names = [name for name in names if place.fills or KINDS[name].needs != "disk"]  # never the machine's own
        self.worlds, self.tell = worlds, tell
        self.references: dict[int, Undisturbed] = {}
        self.patient: Patient | None = None
        self.last: Line = {}  # of the patient's faults
        self.commit = commit()

    def run(self, faults: int) -> None:
        """Until the ledger has this many faults of the seed that struck, and the last patient has come to its end."""
        for world in self.worlds:
            self.references[world] = reference = undisturbed(self.place, world)
            lasts = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in reference.lasts.items())
            self.tell(f"undisturbed on {world} rank(s): {reference.seconds:.0f} s; {lasts}")
        missed = 0
        while sum(line["outcome"] in COUNTED for line in self.ledger.of(self.seed, self.names)) < faults:
            if missed == HOPELESS:
                raise SystemExit(f"given up: {HOPELESS} in a row came to nothing")
            self.settle()
            missed = 0 if self.one() in COUNTED else missed + 1
        if self.patient:
            self.settle(wait=True)

    def one(self) -> str:
        """Draws a fault, and what becomes of it."""
        number = 1 + max((number for seed, number in self.ledger.faults if seed == self.seed), default=0)
        draw = random.Random(f"{self.seed} {number}")
        fault = self.choose(number)
        began, waited, used = time.monotonic(), self.waited_s(), _children_s()
        line: Line = {"seed": self.seed, "number": number, "kind": fault.name, "commit": self.commit}
        try:
            patient = self.patient or self.admit(number, draw)
            patient.draw = draw
            line |= {"world": patient.world, "patient": patient.name, "step": patient.step()}
            line |= self.strike(patient, fault)
        except Lost as error:
            line |= {"outcome": LOST, "what": str(error)}
        except Exception:
            line |= {"outcome": BROKEN, "what": traceback.format_exc()}
        spent = {
            "seconds": time.monotonic() - began,
            "waited_s": self.waited_s() - waited,
            "cpu_s": _children_s() - used,
        }
        line |= {what: round(seconds, 1) for what, seconds in spent.items()}
        self.book(line)
        return str(line["outcome"])

    def book(self, line: Line) -> None:
        for path, name in ((self.place.root, "LAB"), (ROOT, "CHECKOUT")):  # the ledger is no one machine's
            line = json.loads(json.dumps(line).replace(str(path), name))
        self.ledger.add(line)
        self.last = line
        outcome = line["outcome"]
        self.tell(
            f"{line['number']} {line['kind']}: {outcome}, {line.get('patient')} × {line.get('world')}, "
            f"{line['seconds']:.0f} s{': ' + line['what'] if 'what' in line else ''} {line.get('evidence', '')}"
        )
        if outcome in (LOST, BROKEN):
            self.keep(line["number"])
            self.discharge()
            shutil.rmtree(self.place.cache, ignore_errors=True)  # what is wrong with it must not strike the next one

    def waited_s(self) -> float:
        """As this process saw it, and not as the clock says: a machine may stand still."""
        return sum(patient.waited_s for patient in self.place.patients)

    def choose(self, number: int) -> Kind:
        """One of those that had the fewest turns."""
        turns = collections.Counter[str]()
        missed = collections.Counter[str]()
        for line in self.ledger.of(self.seed, self.names):
            turns[line["kind"]] += line["outcome"] in COUNTED
            missed[line["kind"]] += line["outcome"] not in COUNTED
        chance = {name: random.Random(f"{self.seed} {number} {name}").random() for name in self.names}
        return KINDS[min(self.names, key=lambda name: (turns[name] + missed[name] // MISSES, chance[name]))]

    def admit(self, number: int, draw: random.Random) -> Patient:
        world = draw.choice(self.worlds)
        self.patient = Patient(self.place, f"patient-{number}", world, draw, self.references[world])
        self.patient.start()
        return self.patient

    def strike(self, patient: Patient, fault: Kind) -> Line:
        """What goes into the ledger of it."""
        patient.named = ""
        try:
            evidence = fault.strike(patient)
        except NotInjected as error:
            if error.touched:
                self.judge(patient, fault, must_end=False)
            return {"outcome": NOTHING, "what": str(error)}
        if not fault.aside and self.judge(patient, fault, must_end=fault.ends) and fault.ends:
            return {"outcome": NOTHING, "what": "the job ended as if nothing had happened", "evidence": evidence}
        return {"outcome": SURVIVED, "evidence": evidence}

    def judge(self, patient: Patient, fault: Kind, must_end: bool) -> bool:
        """Lets the job go on after a fault until it has saved anew; whether it came to the run's end without a word."""
        if must_end:
            patient.wait()
        allowed, quiet = fault.codes, True
        while True:
            newest = max(patient.checkpoints(), default=-1)
            patient.until(
                "a save or an end",
                lambda: patient.ended or max(patient.checkpoints(), default=-1) > newest,  # noqa: B023
            )
            if not patient.ended:
                break
            assert patient.job
            code, words = int(patient.job.returncode), patient.words()
            patient.gone()
            patient.same()
            if code == 0:
                break
            if code not in allowed:
                raise Lost(f"exit code {code}: {words}")
            heard(patient, fault, code, words)
            if code == STOPPED and not fault.abrupt:
                patient.tidy()
            patient.put_back()
            allowed, quiet = (), False  # what it ended of is over
            patient.start()
        patient.same()
        patient.put_back()
        return patient.ended and quiet

    def settle(self, wait: bool = False) -> None:
        """A patient whose job has ended between two faults must have come to its end; what is wrong with it now is
        laid to the last fault. `wait`: until it has ended."""
        if not (patient := self.patient) or not (wait or patient.ended):
            return
        try:
            if code := patient.wait():
                raise Lost(f"exit code {code}: {patient.words()}")
            patient.conclude()
        except Lost as error:
            self.book({**self.last, "outcome": LOST, "what": f"seen later: {error}"})
            return
        except Exception:
            self.book({**self.last, "outcome": BROKEN, "what": f"seen later: {traceback.format_exc()}"})
            return
        self.ledger.add({"seed": self.seed, "concluded": patient.name})
        self.discharge()

    def discharge(self) -> None:
        if self.patient:
            self.patient.bury()
        self.patient = None
        for path in [*(self.place.disk / "runs").glob("patient-*"), self.place.disk / "exports"]:
            shutil.rmtree(path, ignore_errors=True)
        for said in self.place.root.glob("patient-*.out"):
            said.unlink()

    def keep(self, number: int) -> None:
        """What a fault left, for who looks into it."""
        for other in self.place.patients:
            other.end()
        target = self.lost / f"{self.seed}-{number}"
        shutil.rmtree(target, ignore_errors=True)
        runs = (self.place.disk / "runs").glob("patient-*")
        for source in [*runs, self.place.disk / "exports", self.place.cache]:
            if source.exists():
                shutil.copytree(source, target / source.name, symlinks=True, dirs_exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        for said in self.place.root.glob("patient-*.out"):
            shutil.copy(said, target)


def heard(patient: Patient, fault: Kind, code: int, words: str) -> None:
    """A job that ended, other than with its submitter, has named the cause and how to go on."""
    if code < 0:
        return
    # where the run folder takes no record of the end, the logs tell
    told = patient.words(everything=True) if re.search(r"see \S+/logs/", words) else words
    if not re.search(patient.named or fault.because, told):
        raise Lost(f"exit code {code}, and its last words do not name the cause: {words}")
    # a mistake that is found before there is a job is told to who types that very command
    began = code != 2 or (re.search("^run folder ", words, re.MULTILINE) and patient.checkpoints())
    if began and not re.search(rf"continue with: .*--resume \S*{patient.name}\b", words):
        raise Lost(f"exit code {code} without a word on how to go on: {words}")


def _children_s() -> float:
    """CPU seconds of processes that have ended; of those that were killed with their parents nobody knows."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(ledger: Ledger) -> str:
    """Markdown."""
    lines = [*ledger.faults.values()]
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in KINDS}
    for line in lines:
        counts.setdefault(line["kind"], collections.Counter())[line["outcome"]] += 1
    total = sum(counts.values(), collections.Counter[str]())
    rows = [f"| {name} | {' | '.join(str(count[o]) for o in COUNTED)} |" for name, count in counts.items() if count]
    rows.append(f"| **all** | {' | '.join(f'**{total[outcome]}**' for outcome in COUNTED)} |")
    phases = collections.Counter(
        str(line["evidence"]["phase"]) for line in lines if "phase" in line.get("evidence", {})
    )
    commits = collections.Counter(str(line["commit"]) for line in lines if line["outcome"] in COUNTED)
    seconds = [line["seconds"] for line in lines if line["outcome"] in COUNTED]
    notes = [
        f"{total[NOTHING]} more came to nothing and were not counted, {total[BROKEN]} to errors of the harness.",
        f"{len({(line['seed'], line.get('patient')) for line in lines})} patients, {len(ledger.concluded)} of them to "
        "their end.",
        f"Moments: {', '.join(f'{phase} {count}' for phase, count in phases.most_common())}.",
        f"Commits: {', '.join(f'{at} {count}' for at, count in commits.items())}.",
        f"{sum(seconds) / 3600:.1f} hours, {sum(seconds) / max(len(seconds), 1):.0f} s a fault.",
        *(f"Lost: seed {line['seed']}, {line['number']}, {line['kind']}: "
          f"{line.get('mended', line['what'].splitlines()[0])}"
          for line in lines if line["outcome"] == LOST),
    ]  # fmt: skip
    return "\n".join(["| fault | survived | lost |", "|---|---|---|", *rows, "", *notes])


def tell(ledger: Ledger) -> int:
    """The table; into docs/reliability.md, too, where it is that of the repository's ledger."""
    print(table(ledger))
    if ledger.path.resolve() == LEDGER:
        page.write("soak", table(ledger) + "\n")
    return 0


def soak(
    faults: int,
    seed: int,
    names: Sequence[str],
    worlds: Sequence[int],
    ledger: Ledger,
    lost: Path,
    tell: Callable[[str], None],
) -> None:
    with lab() as place:
        Soak(place, ledger, seed, names, worlds, lost, tell).run(faults)


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults into real jobs, and what comes of them.")
    parser.add_argument(
        "--faults", type=int, default=500, help="in all, those that the ledger has of this seed included"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=[""], metavar="WORD", help="only kinds with one of these in them")
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2], metavar="W")
    parser.add_argument("--ledger", type=Path, default=LEDGER, metavar="FILE", help="default: the repository's")
    parser.add_argument(
        "--lost", type=Path, default=Path("soak-lost"), metavar="FOLDER", help="for runs that were lost"
    )
    parser.add_argument("--table", action="store_true", help="only write what the ledger has into the page")
    args = parser.parse_args()
    ledger = Ledger(args.ledger)
    if args.table:
        return tell(ledger)
    missing = [name for name, each in KINDS.items() if each.needs and not here(each.needs)]
    names = [name for name in KINDS if name not in missing and any(word in name for word in args.kinds)]
    if not names:
        parser.error(f"--kinds {' '.join(args.kinds)}: no kind has that in its name: {', '.join(KINDS)}")
    for number in (signal.SIGINT, signal.SIGTERM):  # the patients are not left behind; nohup would have SIGINT ignored
        signal.signal(number, lambda *_: sys.exit("interrupted; the same command goes on from here"))
    soak(args.faults, args.seed, names, args.worlds, ledger, args.lost, lambda text: print(text, flush=True))
    tell(ledger)
    if missing:
        print(f"not to be had here: {', '.join(missing)}")
    outcomes = {line["outcome"] for line in ledger.of(args.seed, names)}
    return int(bool(outcomes & {LOST, BROKEN}))


if __name__ == "__main__":
    sys.exit(main())
