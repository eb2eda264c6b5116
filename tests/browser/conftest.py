"""TensorBoard and our pages in Debian's Chromium, headless, through Playwright.

`make test-browser` collects these tests. Elsewhere they are left out, and the summary says so.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from mtbert.config_files import load_config
from mtbert.record import RunRecord
from mtbert.runs import create_run

ROOT = Path(__file__).parent.parent.parent
WANTED = os.environ.get("MTBERT_BROWSER") == "1"
PICTURES = ROOT / "docs" / "pictures"
SOFTWARE_GL = ["--enable-unsafe-swiftshader"]
"""TensorBoard's time series are drawn by WebGL, which no GPU is here for."""

collect_ignore_glob = [] if WANTED else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not WANTED:
        terminalreporter.write_line("tests/browser left out: they need Chromium; run them with make test-browser")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start, stopped in the middle and resumed by another process; or a copy of the run that RUN names:
    the pages are about one run alone, whatever lies beside it."""
    folder = tmp_path_factory.mktemp("runs")
    if named := os.environ.get("RUN"):
        return Path(shutil.copytree(named, folder / Path(named).name, ignore=shutil.ignore_patterns("checkpoints")))
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [f"run.dir={folder}", "run.name=quickstart", "phases=[{epochs: 2}]"]
    )
    run = create_run(config, None, ["python", "launch/submit.py"])
    code = """
import sys
from pathlib import Path
from mtbert.record import RunRecord
from mtbert.runs import Rank
from mtbert.trainer import train
run, until = Path(sys.argv[1]), int(sys.argv[2])
def stop():
    loss = RunRecord(run).curves.get("loss/sst")
    return loss is not None and loss.steps[-1] >= until
train(run, Rank(), stop, quiet=True)
"""
    for until in (120, 10**9):
        subprocess.run([sys.executable, "-c", code, str(run), str(until)], check=True, cwd=ROOT)
    assert RunRecord(run).result
    return run


@pytest.fixture(scope="session")
def tensorboard(run: Path) -> Iterator[str]:
    """Its address, while it shows the folder that the run lies in."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run.parent.name, "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", "0"],
        cwd=run.parent.parent,  # the page shows the folder as it was given
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr
    try:
        for line in server.stderr:
            if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield address[0]
                break
        else:
            pytest.fail("TensorBoard did not start")
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "no Chromium here; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False, args=SOFTWARE_GL)
        yield browser
        browser.close()


Keep = Callable[[str, bytes], None]


@pytest.fixture(scope="session")
def keep() -> Keep:
    """Puts a screenshot into docs/pictures, with few colours: they are pictures of charts."""

    def save(name: str, png: bytes) -> None:
        PICTURES.mkdir(exist_ok=True)
        Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            PICTURES / f"{name}.png", optimize=True
        )

    return save
