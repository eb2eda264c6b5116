"""What docs/reliability.md tells as measured, from the records that lie beside this file.

    python tests/faults/page.py     writes it anew

The records are tracked, so that what takes hours adds up over sessions and machines; every line names its commit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import again
import soak

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"

BLOCKS: dict[str, Callable[[], str]] = {
    "soak": lambda: soak.table([soak.Ledger(soak.LEDGER)]),
    "again": lambda: again.table(again.read(again.RECORD)),
}


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a block."""
    return f"<!-- {name}: `python tests/faults/page.py` writes what follows -->\n\n", f"\n<!-- end of {name} -->\n"


def written(text: str) -> str:
    """The page with the blocks of today."""
    for name, block in BLOCKS.items():
        start, end = marks(name)
        before, found, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        assert found and ended, f"{PAGE.name} has no place for {name}"
        text = f"{before}{start}{block()}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
