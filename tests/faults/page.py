"""What docs/reliability.md tells as counted: each tool writes its own block there, from a record beside its source.

The records are tracked, so that what takes hours adds up over sessions and machines; test_page.py holds the page to
what they have.
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"


def cut(name: str) -> tuple[str, str, str]:
    """The page up to the block of this name, the block, and what follows."""
    start, end = f"<!-- {name}: written by `make {name}` -->\n\n", f"\n<!-- end of {name} -->\n"
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(start)
    told, ended, after = rest.partition(end)
    assert found and ended, f"{PAGE.name} has no place for {name}"
    return before + start, told, end + after


def write(name: str, block: str) -> None:
    before, _, after = cut(name)
    PAGE.write_text(before + block + after, encoding="utf-8")
