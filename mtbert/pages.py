"""Pages from templates. HTML is self-contained (no script, no network), and Jinja escapes whatever is filled in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtbert.errors import UserError
from mtbert.figures import COSINE, conflict_curves, curves_of, data_uri, panels
from mtbert.files import write_atomically
from mtbert.record import RunRecord

Table = tuple[list[str], list[list[str | float | None]]]
"""Columns and rows."""


def render(template: str, **values: Any) -> str:
    """One of `mtbert/templates`, filled in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mtbert"),
        autoescape=jinja2.select_autoescape(["html"]),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    environment.filters["numeric"] = _numeric
    return environment.get_template(template).render(**values)


def write_page_at(path: Path, page: str) -> None:
    """Half a surrogate pair, of a file's name or out of JSON, comes out escaped.

    Raises `UserError` where nothing can be written.
    """
    try:
        write_atomically(path, page.encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror}") from None


def run_pictures(runs: Sequence[RunRecord], labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The curves of one run or several, by title, each an image's `src`."""
    tags = list(dict.fromkeys(tag for run in runs for tag in run.curves))
    questions = {
        "Scores": [tag for tag in tags if tag.startswith("metric/")],
        "Training loss": [tag for tag in tags if tag.startswith("loss/") and not _of_development(tag)],
        "Development loss": [tag for tag in tags if _of_development(tag)],
        "Cosines of task gradients": [tag for tag in tags if tag.startswith(COSINE)],
        "Surgery": [tag for tag in tags if tag.startswith(("gradient/weight/", "gradient/conflict_rate"))],
        "Speed": [tag for tag in tags if tag in ("speed/tokens_per_second", "speed/mfu", "memory/peak_gib")],
    }
    for title, wanted in questions.items():
        if not wanted:
            continue
        if wanted[0].startswith(COSINE):
            yield title, data_uri(conflict_curves(runs, labels))
        else:
            names = [tag.split("/")[1] if _of_development(tag) else tag.partition("/")[2] for tag in wanted]
            drawn = {name: curves_of(runs, tag, labels) for name, tag in zip(names, wanted, strict=True)}
            yield title, data_uri(panels(drawn))


def _of_development(tag: str) -> bool:
    """`loss/TASK/dev`; the training loss of a task may be `loss/dev`."""
    return tag.startswith("loss/") and tag.count("/") == 2


def _numeric(rows: Sequence[Sequence[str | float | None]], columns: Sequence[str]) -> list[bool]:
    """Of each column whether it holds numbers, which stand to the right; there may be no row."""
    return [any(isinstance(row[at], (int, float)) for row in rows) for at in range(len(columns))]


def _shown(value: str | float | None) -> str:
    """A cell of a table, as the terminal shows it."""
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
