"""pytest's plugin in the copies of `mutants.py`: hundreds of runs of a few tests, each in a process of its own.

Such a run took 3 to 4 CPU seconds, all but 0.3 of them for what is done here once instead or not at all. mutmut forks
the runs from a process that has collected the tests: that one also imports what the tests import while they run.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import Phase, settings

IMPORTED, STATISTICS = Path("imported.json"), Path("mutmut-stats.json")


def pytest_configure(config: pytest.Config) -> None:
    once = settings(settings.get_profile("mtbert"), phases=[Phase.explicit, Phase.generate])
    settings.register_profile("mutants", once)  # a failure is one, its smallest example no better
    settings.load_profile("mutants")
    if config.getoption("collectonly") and IMPORTED.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in json.loads(IMPORTED.read_text()):
                with suppress(Exception):
                    importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quickest first, for the first failure ends a run."""
    seconds = json.loads(STATISTICS.read_text())["duration_by_test"] if STATISTICS.exists() else {}
    items.sort(key=lambda item: float(seconds.get(item.nodeid, 0)))


def pytest_collection_finish() -> None:
    gc.freeze()  # else pytest's own collections at the end go through all of torch, five times


def pytest_sessionfinish() -> None:
    if not IMPORTED.exists():
        IMPORTED.write_text(json.dumps([*sys.modules]))


@pytest.fixture(autouse=True)
def controls() -> None:
    """Every test runs the two functions whose mutants are known beforehand."""
    module = importlib.import_module(f"mtbert.{os.environ['MUTATED']}")
    module.no_op()
    assert module.certain() == 1
