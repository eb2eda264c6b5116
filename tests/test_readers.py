"""Rows come out as they were written; what is malformed is named, and costs no neighbour."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings

from mtbert.errors import UserError, to_install
from mtbert.readers import Quarantined, Record, Row, form_of, read_rows, read_table


def rows(path: Path, *columns: str, id_column: str | None = None) -> list[Row | Quarantined]:
    return list(read_rows(path, columns, id_column))


def write(folder: Path, content: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def good(found: list[Row | Quarantined]) -> list[tuple[int, tuple[object, ...]]]:
    return [(row.line, row.values) for row in found if isinstance(row, Row)]


def bad(found: list[Row | Quarantined]) -> list[int]:
    return [row.line for row in found if isinstance(row, Quarantined)]


# ------------------------------------------------------------------------------------------------ RFC 4180

# all that quoting is about, and letters from other alphabets
FIELD = st.text(st.sampled_from("ab \"\t,\n\r'é漢\u2028"), max_size=12)


@settings(deadline=None, max_examples=400)
@given(
    table=st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(FIELD, min_size=width, max_size=width), max_size=8)
    ),
    delimiter=st.sampled_from("\t,"),
    terminator=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example(table=[["a\nb", "c"], ['"', "\n"]], delimiter="\t", terminator="\n", quoting=csv.QUOTE_MINIMAL)
@example(table=[['x\n"1\t2"\ny', "1\t2\n3\t4\n5\t6"]], delimiter="\t", terminator="\n", quoting=csv.QUOTE_MINIMAL)
@example(table=[["one\n" * 12], ["two"]], delimiter=",", terminator="\n", quoting=csv.QUOTE_ALL)
@example(table=[["first\n" + "a, b\n" * 12, "c"]], delimiter=",", terminator="\n", quoting=csv.QUOTE_MINIMAL)
@example(table=[["a, b\nc", "1"], ["d", "1,\n"]], delimiter=",", terminator="\r\n", quoting=csv.QUOTE_MINIMAL)
def test_what_a_csv_writer_wrote_reads_back(
    tmp_path_factory: pytest.TempPathFactory, table: list[list[str]], delimiter: str, terminator: str, quoting: int
) -> None:
    if quoting == csv.QUOTE_MINIMAL and terminator == "\n":  # before Python 3.13 a lone \r is then left unquoted
        table = [[field.replace("\r", "") for field in row] for row in table]
    width = len(table[0]) if table else 2
    names = [f"column{i}" for i in range(width)]

    def written(*rows: list[str]) -> str:
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=delimiter, lineterminator=terminator, quoting=quoting).writerows(rows)
        return out.getvalue()

    if delimiter == "\t":  # tabs and line breaks within fields can look like rows; then nothing tells what was meant
        table = [row for row in table if not all_whole(written(row).removesuffix(terminator).split("\n"), width)]
    path = write(
        tmp_path_factory.getbasetemp(), written(names, *table), "rows.tsv" if delimiter == "\t" else "rows.csv"
    )
    assert [values for _, values in good(rows(path, *names))] == [tuple(row) for row in table]
    assert not bad(rows(path, *names))


def all_whole(lines: list[str], width: int) -> bool:
    return len(lines) > 1 and width > 1 and all(line.count("\t") == width - 1 for line in lines)


def test_a_field_over_several_lines_keeps_the_line_numbers_right(tmp_path: Path) -> None:
    path = write(tmp_path, 'text,label\n"one\n\ntwo",1\nthree,0\n')
    assert good(rows(path, "text", "label")) == [(2, ("one\n\ntwo", "1")), (5, ("three", "0"))]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.txt"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_every_reader_goes_by_the_first_line_and_not_by_the_name(tmp_path: Path, name: str, delimiter: str) -> None:
    path = write(tmp_path, f"text{delimiter}label\na{delimiter}1\n", name)
    with path.open("rb") as file:
        table = read_table(file, form_of(path), name)
        assert [row.values for row in table.rows if isinstance(row, Record)] == [{"text": "a", "label": "1"}]
    assert (table.columns, table.delimiter) == (["text", "label"], delimiter)
    assert good(rows(path, "text", "label")) == [(2, ("a", "1"))]


@pytest.mark.parametrize(("name", "texts"), [("rows.tsv", ["a, b", "c"]), ("rows.csv", ["c"])])
def test_one_column_is_read_by_the_name(tmp_path: Path, name: str, texts: list[str]) -> None:
    path = write(tmp_path, "text\na, b\nc\n", name)
    with path.open("rb") as file:
        table = list(read_table(file, form_of(path), str(path)).rows)
    assert [row.values["text"] for row in table if isinstance(row, Record)] == texts
    assert [values for _, values in good(rows(path, "text"))] == [(text,) for text in texts]


def test_byte_order_mark_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufefftext\tlabel\n\na\t1\n\r\nb\t0")
    assert good(rows(path, "text", "label")) == [(3, ("a", "1")), (5, ("b", "0"))]


def test_an_empty_line_is_a_row_where_there_is_one_column(tmp_path: Path) -> None:
    """Vectors and answers keep the places of their rows."""
    assert good(rows(write(tmp_path, "text\na\n\nb\n"), "text")) == [(2, ("a",)), (3, ("",)), (4, ("b",))]


def test_quotes_are_characters_before_an_empty_line_too(tmp_path: Path) -> None:
    path = write(tmp_path, 'id\ttext\n1\ta\n2\t"open\n3\tb\n\n4\t"another" one\n', "rows.tsv")
    assert [values for _, values in good(rows(path, "text"))] == [("a",), ('"open',), ("b",), ('"another" one',)]


def test_what_may_not_be_read_is_the_users_to_mend(tmp_path: Path, as_nobody: Callable[[], Any]) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    files = [write(tmp_path, "text\na\n", "locked.csv"), write(folder, "text\na\n"), folder / "none.csv"]
    files[0].chmod(0)
    folder.chmod(0o700)
    with as_nobody():
        for path in files:
            with pytest.raises(UserError, match=f"^{path}: Permission denied$"):
                rows(path, "text")


def test_the_first_line_tells_the_delimiter_whatever_the_name(tmp_path: Path) -> None:
    tab = write(tmp_path, "\ttext, all\tlabel\n0\ta, b\t1\n", "rows.csv")
    comma = write(tmp_path, 'text,label\n"a, b",1\n', "rows.tsv")
    assert good(rows(tab, "text, all", "label")) == good(rows(comma, "text", "label")) == [(2, ("a, b", "1"))]


# ------------------------------------------------------------------------------------------------ malformed rows


@pytest.mark.parametrize(
    "flaw",
    ['5,"open,0', '5,"open', '5,"""Cited; never closed,0', '"5,open,0', '5,"shut" too soon,0', "5,a,b,c", "5,one"],
)
@pytest.mark.parametrize("neighbour", ['6,"quoted",1', '6,"""Cited"" he said",1', '6,5" nail,1', "6,plain,1"])
@pytest.mark.parametrize("between", [0, 1, 20])
def test_a_flawed_row_costs_no_neighbour(tmp_path: Path, flaw: str, neighbour: str, between: int) -> None:
    plain = "".join(f"{n},text {n},0\n" for n in range(between))
    path = write(tmp_path, f"id,text,label\n1,before,1\n{flaw}\n{plain}{neighbour}\n9,after,0\n")
    found = rows(path, "text", "label")
    assert bad(found) == [3]
    if between or '5" nail' not in neighbour or not flaw.count('"') % 2:
        assert [line for line, _ in good(found)] == [2, *range(4, between + 6)]
    else:  # a stray quote right after an unclosed one could be its end: both lines are set aside, and named
        assert [line for line, _ in good(found)] == [2, 5]
        assert "(lines 3–4)" in next(row.reason for row in found if isinstance(row, Quarantined))


@pytest.mark.parametrize("between", [0, 1, 20])
@pytest.mark.parametrize("text", ['"open', '"""Cited, never closed', '"good" film', '"shut" too, "soon'])
@pytest.mark.parametrize("neighbour", ['it is bad "', '5" nail', '"another', "plain"])
def test_where_each_line_has_all_its_tabs_quotes_are_characters(
    tmp_path: Path, text: str, neighbour: str, between: int
) -> None:
    texts = ["before", text, *(f"text {n}" for n in range(between)), neighbour, "after"]
    path = write(tmp_path, "text\tlabel\n" + "".join(f"{text}\t{n}\n" for n, text in enumerate(texts)), "rows.tsv")
    found = rows(path, "text", "label")
    assert good(found) == [(n + 2, (text, str(n))) for n, text in enumerate(texts)]
    assert not bad(found)


def test_a_flawed_row_among_tabs_costs_no_neighbour(tmp_path: Path) -> None:
    found = rows(write(tmp_path, 'text\tlabel\n"one\ntwo" x\t1\n"open\n"shut"\t0\na\tb\tc\nlast\t1\n', "x.tsv"), "text")
    assert [good(found), bad(found)] == [[(5, ("shut",)), (7, ("last",))], [2, 4, 6]]


def test_quoted_fields_among_tabs_lose_their_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, 'text\tlabel\n"a ""b"""\t1\n"one\n\ttwo"\t0\n', "rows.tsv")
    assert good(rows(path, "text", "label")) == [(2, ('a "b"', "1")), (3, ("one\n\ttwo", "0"))]


def test_an_unclosed_quote_in_the_last_row(tmp_path: Path) -> None:
    found = rows(write(tmp_path, 'text,label\na,1\n"b,0\n'), "text")
    assert [good(found), bad(found)] == [[(2, ("a",))], [3]]


def test_a_flawed_row_of_several_lines_is_one_row(tmp_path: Path) -> None:
    found = rows(write(tmp_path, 'text,label\n"one\ntwo",1,2\nthree,0\n'), "text")
    assert [good(found), bad(found)] == [[(4, ("three",))], [2]]


@pytest.mark.parametrize("lines", [1, 40_000])
def test_a_long_text_is_a_text_with_quotes_and_without(tmp_path: Path, lines: int) -> None:
    text = "\n".join(["x" * (400_000 // lines)] * lines)
    path = write(tmp_path, f'text,label\n"{text}",1\n{"x" * 400_000},2\nb,0\n')
    assert [values for _, values in good(rows(path, "text"))] == [(text,), ("x" * 400_000,), ("b",)]


def test_where_the_search_for_the_closing_quote_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = csv.field_size_limit(1000)
    monkeypatch.setattr("mtbert.readers.MAX_LINE", 1000)
    try:
        found = rows(write(tmp_path, 'text,label\n"open,1\n' + "plain,0\n" * 500), "text")
    finally:
        csv.field_size_limit(limit)
    assert [(row.line, row.reason) for row in found if isinstance(row, Quarantined)] == [
        (2, "a quote is opened and not closed within 1,000 characters")
    ]
    assert len(good(found)) == 500


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ('"shut" too soon,0', "a quote is closed before the field ends; within quotes a quote is written twice"),
        ('a\rb,"c"', "a carriage return outside of quotes"),
        ('"open,0', "a quote is opened and not closed"),
    ],
)
def test_the_reason_is_in_words(tmp_path: Path, flaw: str, reason: str) -> None:
    [row] = rows(write(tmp_path, f"text,label\n{flaw}\n"), "text")
    assert isinstance(row, Quarantined) and row.reason == reason


def test_many_unclosed_quotes_take_no_quadratic_time(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\n" + "".join(f'"{n},0\nplain {n},1\n' for n in range(2000)))
    found = rows(path, "text")
    assert len(good(found)) == len(bad(found)) == 2000


def test_the_id_of_a_flawed_row_is_told_where_it_can_be(tmp_path: Path) -> None:
    path = write(tmp_path, 'id,text,label\nx1,"open,0\nx2,b,1\n"x3,c,1\n')
    found = rows(path, "text", id_column="id")
    assert [row.id for row in found] == ["x1", "x2", None]
    assert [type(row) for row in found] == [Quarantined, Row, Quarantined]


# ------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.csv: the file is empty; its first line must name the columns"),
        ('"text\tlabel\n', "rows.csv line 1: a quote is opened and not closed"),
        ("\tid\tsentance\tlabel\n", "rows.csv: no column 'sentence'; columns present: 'sentance',"),
        ("sentence\tsentence\tlabel\n", "column 'sentence' occurs twice"),
        (b"sentence\tlabel\nok\t1\ncaf\xe9\t1\n", "rows.csv line 3, column 'sentence': byte 0xe9 is not UTF-8"),
        (b'sentence\tlabel\n"two\nlines \xff"\t1\n', "rows.csv line 3, column 'sentence': byte 0xff is not UTF-8"),
        (b"sentence\tlabel\nok\t1\0\n", "rows.csv line 2, column 'label': a NUL byte"),
        (b'sentence\tlabel\n"open \xe9\t1\n', "rows.csv line 2: byte 0xe9 is not UTF-8"),
        (b"\xff\xfes\0e\0n\0", "rows.csv line 1: byte 0xff is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        rows(write(tmp_path, content), "sentence", "label")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtbert.readers.MAX_LINE", 1000)
    with pytest.raises(UserError, match="line 2: longer than 1,000 bytes"):
        rows(write(tmp_path, "text,label\n" + "x" * 5000), "text")


def test_a_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "", "ids-sst-train.csv")
    with pytest.raises(UserError, match=r"sst-train\.csv: no such file; did you mean ids-sst-train\.csv\?"):
        rows(tmp_path / "sst-train.csv", "text")
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        rows(tmp_path / "nowhere" / "a.csv", "text")
    with pytest.raises(UserError, match="is not a file"):
        rows(tmp_path, "text")


# ------------------------------------------------------------------------------------------------ JSON lines


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"id": 7, "label": 1, "text": "é\n"}), "", '{"text": 1', "[1]", '{"id": 8, "text": "b"}']
    path = write(tmp_path, "\n".join(lines), "rows.jsonl")
    found = rows(path, "text", "label", id_column="id")
    assert found[0] == Row(1, ("é\n", 1), "7")
    assert [(row.line, row.id) for row in found[1:]] == [(3, None), (4, None), (5, "8")]
    assert all(isinstance(row, Quarantined) for row in found[1:])
    assert "no key 'label'" in found[3].reason  # type: ignore[union-attr]


def test_json_lines_without_the_column_or_in_latin_1(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'text'; columns present: 'txt', 'label'"):
        rows(write(tmp_path, '{"label": 1, "txt": "a"}\n', "rows.jsonl"), "text", "label")
    with pytest.raises(UserError, match="line 1, column 'text': byte 0xe9 is not UTF-8"):
        rows(write(tmp_path, b'{"label": 1, "text": "caf\xe9"}\n', "rows.jsonl"), "text", "label")


@pytest.mark.parametrize("empty", [[], ["x y"], ['{"text": "x y"}'], ['{"text": "x y", "source": null}']])
def test_a_row_of_json_lines_need_not_tell_its_source(tmp_path: Path, empty: list[str]) -> None:
    path = write(tmp_path, "\n".join([*empty, '{"text": "a", "source": 7}', '{"text": "b"}']), "rows.jsonl")
    found = [row for row in read_rows(path, ["text"], source="source") if isinstance(row, Row)]
    assert [row.source for row in found[-2:]] == ["7", ""]
    assert [row.values for row in found[-2:]] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text,sorce\na,b\n"), ("a.jsonl", '{"text": "a", "sorce": "b"}')]
)
def test_a_source_that_no_row_has_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=r"no column 'source'; columns present: 'sorce', 'text'$"):
        list(read_rows(path, ["text"], source="source"))


# ------------------------------------------------------------------------------------------------ Parquet


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = {
        "id": [f"x{n}" for n in range(5000)],
        "text": [f"text {n}" for n in range(5000)],
        "label": [0, None] * 2500,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    found = rows(path, "text", "label", id_column="id")
    assert len(found) == 5000
    assert found[-1] == Row(5000, ("text 4999", None), "x4999")
    assert [row.source for row in read_rows(path, ["text"], "id", source="label") if isinstance(row, Row)][:2] == [
        "0",
        "",
    ]
    with pytest.raises(UserError, match="no column 'txt'; columns present: 'text'"):
        rows(path, "txt")


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a readable Parquet file"):
        rows(write(tmp_path, b"PAR1 and nothing", "rows.parquet"), "text")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=re.escape(to_install("parquet"))):
        rows(write(tmp_path, b"PAR1", "rows.parquet"), "text")
