"""What one sees of a search, and what becomes of it when nobody looks any more."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PATIENCE_S

ROOT = Path(__file__).parent.parent.parent

WATCHED = """
import sys
from pathlib import Path

from mtbert.config_files import load_config
from tune.board import Board
from tune.search import Settings, _terminated
from tune.space import load_space
from tune.study import Study

space = load_space(Path("configs/search/default.yaml"), load_config(Path("configs/quickstart.yaml")))
settings = Settings("q", 3, 5500, 8, ["composite"], "asha", 3, "random", 0, 1, 1, 0.0, None, "", "n")
study = Study(space, None, "n", {}, ["composite"], "random", 0, 3)
board = Board(study, settings)
board.say("search folder")
with board:
    try:
        with _terminated():
            study.ask()
            board.show(0)
            sys.stdin.read()
            board.show(0)
            sys.exit("nobody asked for a stop")
    except KeyboardInterrupt:
        pass
board.say("report")
sys.exit(141 if board.unread else "that is not known")
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_search_that_nobody_watches_any_more_is_stopped(terminal: bool) -> None:
    """Without a word of what is written in vain: of a live table, or of lines in a pipe."""
    outer, inner = pty.openpty() if terminal else os.pipe()
    words = [sys.executable, "-c", WATCHED]
    search = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=inner, stderr=subprocess.PIPE)
    os.close(inner)
    shown = b""
    while b"trial 0: " not in shown and b"1 running" not in shown:
        read = os.read(outer, 4096)
        assert read, shown
        shown += read
    os.close(outer)
    _, errors = search.communicate(timeout=PATIENCE_S)
    assert (search.returncode, errors) == (141, b"")
