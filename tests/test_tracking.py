"""Files are read back with TensorBoard's own loader; the terminal is a real pseudo-terminal."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from harness import PATIENCE_S
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from mtbert import record, tracking
from mtbert.figures import cosine_map
from mtbert.record import MAX_LINE, keep_lines_before
from mtbert.runs import Rank
from mtbert.tracking import Tracker


def records(run: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tracking.grouped(tag))]


def write(run: Path, first: int, last: int, offset: float = 0.0, total: int = 10) -> None:
    with Tracker(run, Rank(), first, total, quiet=True) as tracker:
        for step in range(first, last):
            tracker.scalars(step, {"loss/sst": step + offset})


def test_both_sinks_hold_the_same(tmp_path: Path) -> None:
    write(tmp_path, 0, 4)
    assert curve(tmp_path, "loss/sst") == [(step, float(step)) for step in range(4)]
    assert [(record["step"], record["loss/sst"]) for record in records(tmp_path)] == curve(tmp_path, "loss/sst")
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("2 learning/loss/sst")
    assert [event.wall_time for event in events] == pytest.approx(
        [record["time"] for record in records(tmp_path)], abs=1e-3
    )


def test_resume_continues_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # files of one second and one process are told apart by a counter, and read in the order of their names: 10 before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    write(tmp_path, 0, 10)
    write(tmp_path, 6, 9, offset=100)
    write(tmp_path, 8, 10, offset=200)
    expected = [*[(step, float(step)) for step in range(6)], (6, 106.0), (7, 107.0), (8, 208.0), (9, 209.0)]
    assert curve(tmp_path, "loss/sst") == expected
    assert [(record["step"], record["loss/sst"]) for record in records(tmp_path)] == expected


def test_metrics_are_on_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(tmp_path, Rank(), 0, 10, quiet=True) as tracker:
        tracker.scalars(0, {"loss/sst": 1.0})
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
        tracker.flush()
        assert (tmp_path / "metrics.jsonl").stat().st_ino in synced


def test_damaged_lines_are_dropped_and_long_ones_never_held_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "time": 0, "loss/sst": "x"}\n{"stop": 3}\n' + bytes(16 * MAX_LINE))
        file.write(b'\n{"step": 3, "time": 0, "loss/sst": 3}\n')
    tracemalloc.start()
    try:
        with Tracker(tmp_path, Rank(), 4, 10):
            assert tracemalloc.get_traced_memory()[1] < 8 * MAX_LINE
    finally:
        tracemalloc.stop()
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3]
    assert "metrics.jsonl: 19 line(s) were damaged and are dropped" in capsys.readouterr().out


def test_lines_are_dropped_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the end, which is where they are unless one was damaged."""

    def refuse(_: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path, 0, 5)
    monkeypatch.setattr(record, "written_aside", refuse)
    assert keep_lines_before(tmp_path, 5) == 0 and len(records(tmp_path)) == 5
    assert keep_lines_before(tmp_path, 3) == 0
    assert [line["step"] for line in records(tmp_path)] == [0, 1, 2]
    (tmp_path / "metrics.jsonl").write_text("noise\n" + (tmp_path / "metrics.jsonl").read_text())
    with pytest.raises(OSError, match="No space"):
        keep_lines_before(tmp_path, 3)
    monkeypatch.undo()
    assert keep_lines_before(tmp_path, 3) == 1 and len(records(tmp_path)) == 3


def test_resume_after_death_in_the_middle_of_a_line(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')
    write(tmp_path, 3, 5)
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_reader_sees_each_line_at_once(tmp_path: Path) -> None:
    with Tracker(tmp_path, Rank(), 0, 10, quiet=True) as tracker:
        tracker.scalars(0, {"loss": 1.0})
        assert [record["step"] for record in records(tmp_path)] == [0]


def test_flushed_events_survive_a_kill(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from mtbert.runs import Rank
from mtbert.tracking import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), Rank(), 0, 10, quiet=True)
for step in range(5):
    tracker.scalars(step, {{"loss": 1.0}})
tracker.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [step for step, _ in curve(tmp_path, "loss")] == [0, 1, 2, 3, 4]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    with Tracker(tmp_path, Rank(), 0, 10, quiet=True) as tracker:
        tracker.scalars(0, {"a": math.nan, "b": -math.inf, "c": 0.5})
    [record] = records(tmp_path)
    assert (record["a"], record["b"], record["c"]) == (None, None, 0.5)
    assert record["not_finite"] == {"a": "nan", "b": "-inf"}
    assert math.isnan(curve(tmp_path, "a")[0][1])


TAGS = [
    *["gradient/cosine/quora~sst", "gradient/cosine/sst~sts", "gradient/norm/sst", "gradient/conflict_rate"],
    *["loss/sst", "loss/sst/dev", "metric/sst/accuracy", "metric/composite", "speed/mfu", "speed/tokens_per_second"],
    *["passes/sst", "learning_rate/heads", "memory/peak_gib"],
]


def test_the_first_group_of_scalars_answers_the_first_questions() -> None:
    shown = sorted(map(tracking.grouped, TAGS))
    assert [tag.removeprefix("1 overview/") for tag in shown[:3]] == [
        *["gradient/conflict_rate", "metric/composite", "speed/tokens_per_second"],
    ]
    assert [tag.partition("/")[2] for tag in shown[3:6]] == ["loss/sst", "loss/sst/dev", "metric/sst/accuracy"]


@pytest.mark.parametrize("named", [tracking.grouped, str], ids=["now", "by earlier versions"])
def test_the_layout_puts_pairs_in_one_chart_and_finds_every_question_s_curves(
    tmp_path: Path, named: Callable[[str], str]
) -> None:
    with Tracker(tmp_path, Rank(), 0, 10, quiet=True) as tracker:
        tracker.scalars(0, dict.fromkeys(TAGS, 0.1))
    events = EventAccumulator(str(tmp_path)).Reload()
    [event] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag[0] for category in layout.category for chart in category.chart}
    # as TensorBoard's plugin matches them: from the beginning of the tag
    shown = {title: [tag for tag in TAGS if re.match(regex, named(tag))] for title, regex in charts.items()}
    assert shown["cosine between tasks' gradients"] == TAGS[:2]
    assert shown["training loss"] == ["loss/sst"]
    assert shown["development loss"] == ["loss/sst/dev"]
    assert {tag for found in shown.values() for tag in found} == set(TAGS)
    assert len(layout.category[0].chart) == 4  # a screen


def test_settings_are_hparams_and_pictures_are_pixels(tmp_path: Path) -> None:
    with Tracker(tmp_path, Rank(), 0, 10, quiet=True) as tracker:
        tracker.settings({"optimizer.lr": 0.5, "surgery.method": "pcgrad", "encoder.shape": [1, 2]})
        tracker.figures(3, lambda: {"gradient/cosines": cosine_map(["a", "b"], {("a", "b"): -0.5})})
        tracker.finished()
    events = EventAccumulator(str(tmp_path)).Reload()
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
        for tag in events.summary_metadata
        if tag.startswith("_hparams_/session")
    }
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    assert start["optimizer.lr"].number_value == 0.5
    assert (start["surgery.method"].string_value, start["encoder.shape"].string_value) == ("pcgrad", "[1, 2]")
    assert content["_hparams_/session_end_info"].session_end_info.status == api_pb2.STATUS_SUCCESS
    [image] = events.Images("gradient/cosines")
    picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")).reshape(-1, 3)
    assert image.step == 3 and image.width > 200
    often = {color for color, count in Counter(map(tuple, picture.tolist())).items() if count > len(picture) / 50}
    cells = list(dict.fromkeys(color for color in map(tuple, picture.tolist()) if color in often and len({*color}) > 1))
    # from the top left on: a cosine of 1 is blue, one of −0.5 red
    assert [max(zip(color, ("red", "green", "blue"), strict=True))[1] for color in cells] == ["blue", "red"]


def test_text_is_kept(tmp_path: Path) -> None:
    with Tracker(tmp_path, Rank(), 0, 10, quiet=True) as tracker:
        tracker.text("config", "**seed** 0")
    [event] = EventAccumulator(str(tmp_path)).Reload().Tensors("config/text_summary")
    assert event.tensor_proto.string_val[0] == b"**seed** 0"


def use_everything(tracker: Tracker) -> None:
    with tracker:
        tracker.phase("probe", 0, 9)
        tracker.message("loaded [bold] 3 tasks")
        for step in range(10):
            tracker.progress(step, {"sst": 1.5 - step / 10}, 254.6)
        tracker.table("dev", ["task", "score"], [["sst", 0.5], ["quora", 0.75], ["sts", None]])
        tracker.text("notes", "text")
        tracker.scalars(0, {"loss": 1.0})
        tracker.flush()
    tracker.close()


def test_other_ranks_leave_no_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    use_everything(Tracker(tmp_path, Rank(rank=1, world=2), 0, 10))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_quiet_writes_files_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    use_everything(Tracker(tmp_path, Rank(), 0, 10, quiet=True))
    assert len(records(tmp_path)) == 1
    assert capfd.readouterr() == ("", "")


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    use_everything(Tracker(tmp_path, Rank(), 0, 10))
    out, err = capfd.readouterr()
    assert err == ""
    assert [line.rstrip() for line in out.splitlines()] == [
        "phase probe: steps 0 to 9",
        "loaded [bold] 3 tasks",
        "probe 1/10  sst 1.500  255 examples/s  0:00:00 left",
        "probe 10/10  sst 0.600  255 examples/s  0:00:00 left",
        "dev",
        "task    score",
        "sst    0.5000",
        "quora  0.7500",
        "sts         -",
    ]


@pytest.mark.parametrize(("width", "folded"), [(20, 3), (80, 2), (160, 1)])
def test_no_number_of_a_table_is_cut(width: int, folded: int) -> None:
    """As `compare` has them. On 80 columns the name folds; on 20 lines are longer than the terminal's."""
    out = io.StringIO()
    columns = ["run", "seeds", "step", "sst", "sts"]
    name, scores = "optimizer.lr=0.001 loss=mse surgery.method=pcgrad", ["0.7123 ± 0.0101"] * 2
    tracking.print_table("", columns, [[name, 3, "1200", *scores]], Console(file=out, width=width))
    words = out.getvalue().split()
    assert words[:5] == columns and " ".join(words).count("0.7123 ± 0.0101") == 2
    assert set(name.split()) <= set(words) and "1200" in words and "…" not in words
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + folded and (max(map(len, lines)) <= width) == (width > 20)


def test_brackets_and_colons_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Such as lists of settings, by which `compare` calls its groups, and their paths."""
    cells = ["trainable=[pooler, heads]", "dir=[/data/x]", ":car:"]
    tracking.print_table("to [pooler] and [/x]", ["run"], [[cell] for cell in cells])
    told = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert told == ["to [pooler] and [/x]", "run", *cells]


def test_a_table_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        tracking.print_table("", ["run"], [["first"]])


def test_plain_lines_come_by_the_clock(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PLAIN_LINE_EVERY_S", 0.0)
    with Tracker(tmp_path, Rank(), 6, 10) as tracker:
        for step in range(6, 10):
            tracker.progress(step, {"sst": 1.0}, 10.0)
    assert re.findall(r"train (\d+)/10", capfd.readouterr().out) == ["7", "8", "9", "10"]


def test_time_left() -> None:
    assert [tracking._clock(seconds) for seconds in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]


def use_tokenising() -> None:
    with tracking.tokenising_told(Rank(), quiet=False) as tell:
        assert tell
        for rows in (256, 512):
            tell("DATA/[bold]rows.csv", rows)


def test_tokenising_is_told_by_the_clock_and_by_rank_0_alone(capfd: pytest.CaptureFixture[str]) -> None:
    use_tokenising()
    assert capfd.readouterr() == ("tokenising DATA/[bold]rows.csv: 256 rows\n", "")
    for rank, quiet in ((Rank(), True), (Rank(rank=1, world=2), False)):
        with tracking.tokenising_told(rank, quiet) as tell:
            assert tell is None


def on_a_terminal(call: str) -> str:
    """What stands there after a call in a process of its own, without what moves the cursor."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from mtbert.runs import Rank
from mtbert.tracking import Tracker
from test_tracking import use_everything, use_tokenising
{call}
"""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=subprocess.PIPE, env=environment)
    os.close(follower)
    shown = b""
    while chunk := _read(leader):
        shown += chunk
    os.close(leader)
    assert process.communicate(timeout=PATIENCE_S)[1] == b""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    text = on_a_terminal(f"use_everything(Tracker(Path({str(tmp_path)!r}), Rank(), 0, 10))")
    assert re.search(r"probe .*10/10 sst 0\.600 255 examples/s", text)
    assert text.index("loaded [bold] 3 tasks") < text.rindex("probe")


def test_tokenising_on_a_terminal_is_a_live_line() -> None:
    assert "tokenising DATA/[bold]rows.csv: 512 rows" in on_a_terminal("use_tokenising()")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux: the other end is closed
        return b""


NO_ROOM = """
import resource, sys
from pathlib import Path
from mtbert.runs import Rank
from mtbert.tracking import Tracker

room = lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
with Tracker(Path(sys.argv[1]), Rank(), 0, 30, quiet=True) as tracker:
    for step in range(30):
        if step == 10:
            room(1)
        if step == 20:
            room(resource.RLIM_INFINITY)
        tracker.scalars(step, {"loss/sst": float(step)})
        if step != 9:
            tracker.flush()
"""


def test_a_full_disk_costs_events_but_no_line(tmp_path: Path) -> None:
    """A limit on the size of files refuses what a full disk would, from step 10 to 19, and the event of step 9, which
    waits to be written."""
    done = subprocess.run([sys.executable, "-c", NO_ROOM, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(tmp_path)] == list(range(30))
    points = curve(tmp_path, "loss/sst")
    assert points[:9] == [(step, float(step)) for step in range(9)]
    assert points[-9:] == [(step, float(step)) for step in range(21, 30)]
    assert [step for step, _ in points] == sorted({step for step, _ in points})
