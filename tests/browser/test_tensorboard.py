"""What a person sees who opens TensorBoard, a report and a comparison."""

from __future__ import annotations

import io
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtbert.compare import compare, write_page
from mtbert.record import RunRecord
from mtbert.report import write_report
from mtbert.tracking import grouped

Keep = Callable[[str, bytes], None]


def get(address: str, body: bytes | None = None, **query: str) -> Any:
    url = f"{address}?{urllib.parse.urlencode(query)}" if query else address
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


@pytest.fixture(scope="session")
def data(tensorboard: str, run: Path) -> str:
    """The address of TensorBoard's data, once it has read the run."""
    for _ in range(60):
        if grouped("metric/composite") in get(f"{tensorboard}data/plugin/scalars/tags").get(run.name, {}):
            return f"{tensorboard}data/plugin/"
        time.sleep(1)
    raise AssertionError("TensorBoard has not read the run")


@pytest.fixture
def page(browser: Any) -> Any:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    yield page
    page.close()


def coloured(png: bytes) -> int:
    """Pixels of a picture that are neither black, white nor grey: where curves are, be they as dark as slate."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=-1) > 30).sum())


# ------------------------------------------------------------------------------------- what it was told


def test_curves_of_a_resumed_run_have_no_gap_and_no_overlap(data: str, run: Path) -> None:
    record = RunRecord(run)
    tags = get(f"{data}scalars/tags")[run.name]
    assert tags.keys() == set(map(grouped, record.curves))
    for tag, curve in record.curves.items():
        points = get(f"{data}scalars/scalars", run=run.name, tag=grouped(tag))
        assert [step for _, step, _ in points] == curve.steps.tolist(), tag
        np.testing.assert_allclose([float(value) for *_, value in points], curve.values, rtol=1e-6)


def test_layout_pictures_texts_and_settings_are_there(data: str, run: Path) -> None:
    layout = get(f"{data}custom_scalars/layout")
    assert layout["category"][0]["title"] == "does it learn, do the tasks fight, is it fast"
    images = set(get(f"{data}images/tags")[run.name])
    config = RunRecord(run).config
    assert "gradient/cosines" in images
    for name, task in config.tasks.items():
        assert f"{name}/{'scatter' if task.kind == 'pair_regression' else 'confusion'}" in images
    assert {"config", "command", "environment"} <= {
        tag.removesuffix("/text_summary") for tag in get(f"{data}text/tags")[run.name]
    }
    statuses = ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING"]
    wanted = {"experimentName": "", "colParams": [], "sliceSize": 10, "startIndex": 0, "allowedStatuses": statuses}
    groups = get(f"{data}hparams/session_groups", json.dumps(wanted).encode())["sessionGroups"]
    [group] = [group for group in groups if group["sessions"][0]["name"] == run.name]
    assert group["hparams"]["surgery.method"] == config.surgery.method
    assert group["hparams"]["optimizer.lr"] == config.optimizer.lr
    assert group["sessions"][0]["status"] == "STATUS_SUCCESS"


# --------------------------------------------------------------------------------------- what it shows


def test_the_first_screen_answers_the_first_questions(page: Any, tensorboard: str, data: str, keep: Keep) -> None:
    page.goto(f"{tensorboard}#timeseries")
    page.wait_for_selector("scalar-card line-chart", timeout=60_000)
    drawn: list[int] = []
    for _ in range(30):
        cards = page.query_selector_all("scalar-card")[:3]
        drawn = [coloured(card.query_selector("line-chart").screenshot()) for card in cards]
        if len(drawn) == 3 and min(drawn) > 100:
            break
        page.wait_for_timeout(1000)
    assert len(drawn) == 3 and min(drawn) > 100, drawn
    titles = ["".join(card.query_selector(".tag").inner_text().split()) for card in cards]
    assert titles == [
        "".join(grouped(tag).split())
        for tag in ("gradient/conflict_rate", "metric/composite", "speed/tokens_per_second")
    ]
    keep("time-series", page.screenshot())


def test_custom_scalars_put_all_pairs_in_one_chart(page: Any, tensorboard: str, data: str, keep: Keep) -> None:
    page.goto(f"{tensorboard}#custom_scalars")
    page.wait_for_selector("tf-custom-scalar-multi-line-chart-card", timeout=60_000)
    page.wait_for_selector("vz-line-chart2 path", state="attached", timeout=60_000)
    page.wait_for_timeout(4000)
    cards = page.query_selector_all("tf-custom-scalar-multi-line-chart-card")
    assert len(cards) >= 3 and coloured(page.screenshot()) > 1000
    keep("custom-scalars", page.screenshot())


@pytest.mark.parametrize(
    ("tab", "selector"),
    [("images", "tf-image-loader img"), ("hparams", "tf-hparams-main"), ("text", "tf-text-loader")],
)
def test_the_other_tabs_open(page: Any, tensorboard: str, data: str, tab: str, selector: str, keep: Keep) -> None:
    page.goto(f"{tensorboard}#{tab}")
    page.wait_for_selector(selector, timeout=60_000)
    page.wait_for_timeout(3000)
    if tab == "images":
        keep("images", page.screenshot())


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_pages_open_without_a_server_or_a_network(
    browser: Any, run: Path, tmp_path: Path, which: str, keep: Keep
) -> None:
    path = tmp_path / f"{which}.html"
    if which == "report":
        write_report(run, "best", path)
    else:
        write_page(compare([run], "latest", 100), path)
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    page = context.new_page()
    asked: list[str] = []
    told: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(path.as_uri())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert told == []
    sizes = page.evaluate("Array.from(document.images).map(image => [image.complete, image.naturalWidth])")
    assert len(sizes) >= 3 and all(complete and width > 100 for complete, width in sizes)
    if which == "report":
        keep(which, page.screenshot())
    context.close()
