"""Every command in the docs is executed, or stands in `ELSEWHERE` with the reason why not here.

A command is a line of a code block, or an inline piece of code, that begins with one of `PROGRAMS`. Pages use real
names: in the sandbox DATA is a corpus, MODEL a Hugging Face folder, runs/NAME a finished run and my.yaml the README's.
Training commands get `SMALL` appended, `launch/submit.py` is asked for a dry run (tests/launch has real ones); nothing
else is changed. Python blocks are executed as they are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from mtbert import cli, synthetic
from mtbert.encoder import Encoder, EncoderShape, initialise
from mtbert.pretrained import save_pretrained
from mtbert.surgery import AGGREGATORS
from mtbert.weighting import WEIGHTINGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / page for page in ("README.md", "CONTRIBUTING.md", "slurm/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
OWN_TEST = ("adding-a-task.md", "export.md", "using.md")
"""Pages whose commands and programs follow from each other: test_docs_using.py and test_export.py run them in order."""
PROGRAMS = (
    "python",
    "make",
    "tensorboard",
    "sbatch",
    "export",
    "source",
    "pip",
    "torchrun",
    "slurm/cluster.sh",
    "MTBERT_",
)
SMALL = [
    *["phases=[{steps: 2}]", "schedule.batch_size=4", "schedule.length=4", "run.evaluate_every=2", "data.cache=cache"],
    *["engine.threads=THREADS", "engine.precision=fp32"],
]
SMALL_SHAPE = [
    *["data.generate.train=40", "data.generate.dev=12", "encoder.shape.hidden_size=8", "encoder.shape.layers=1"],
    *["encoder.shape.heads=2", "encoder.shape.intermediate_size=8"],
]

ELSEWHERE = {
    r"make (train|test|check|help)( .*)?": ".ci/run runs check and test; train is `launch/submit.py`, below",
    r"make (slurm-up|slurm-down|test-slurm|test-browser|bench)( .*)?": "needs root, Slurm, Chromium or a quiet machine",
    r"make (soak|fuzz|mutants|audit|papers|test-long|test-again)( .*)?": "minutes to hours",
    r"pip install (--require-hashes|-c) .*": "gigabytes; packages of an index",
    r"source \.venv/bin/activate": "activates what `make` made",
    r"export SLURM_CONF=\S+": "for the cluster of `make slurm-up`",
    r"slurm/cluster\.sh.*|sbatch .*|MTBERT_SLURM=1 .*": "needs a Slurm cluster: tests/slurm",
    r"python launch/submit\.py (--follow RUN|cancel RUN|--nodes 4 --resume RUN)": "needs a job: tests/slurm",
    r"python launch/submit\.py --nodes 2 --follow": "the same, on the cluster of `make slurm-up`: tests/slurm",
    r"torchrun .*": "needs several hosts: tests/test_cli.py starts it on this one",
    r"(make search|python -m tune)( .*)?": "minutes of work",
    r".*runs/SEARCH.*": "what a search has left",
    r"python -m mtbert serve .*": "serves until it is stopped: tests/test_serve.py",
    r"python (-m )?benchmarks.*": "measures for minutes; its parts are tested",
}
"""What is not run here: the whole command as a pattern, and where it is run or why it cannot be."""


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every command on a page."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    fenced = language = None
    for number, line in enumerate(text.splitlines(), 1):
        if fence := re.match(r"\s*```(\w*)", line):
            fenced, language = (None, None) if fenced else (True, fence[1])
            continue
        if fenced:
            found = [line.strip()] if language in ("", "sh", "bash", "console") else []
        elif line.startswith("    "):
            found = [line.strip()]
        else:
            found = re.findall(r"`([^`]+)`", line)
        for code in found:
            command = code.removeprefix("$ ").partition("  #")[0].strip()
            if command.startswith(PROGRAMS) and " " in command and "…" not in command:
                yield number, command


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def all_commands() -> list[tuple[str, str]]:
    """Each command once, with the first place where it stands."""
    found: dict[str, str] = {}
    for page in PAGES:
        for number, command in commands(page) if page.name not in OWN_TEST else ():
            found.setdefault(command, f"{page.relative_to(ROOT)}:{number}")
    return [(place, command) for command, place in found.items()]


def elsewhere(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in ELSEWHERE)


HERE = [(place, command) for place, command in all_commands() if not elsewhere(command)]

# ------------------------------------------------------------------------------------------------ the sandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout to type in: the repository's files, and those that the pages speak of."""
    box = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "launch", "mtbert", "slurm", "tune"):
        if (ROOT / name).exists():
            (box / name).symlink_to(ROOT / name)
    synthetic.generate(box / "DATA", train=40, dev=12)
    (box / "test.csv").symlink_to(box / "DATA" / "ids-sst-dev.csv")
    labelled = ["headline,topic", *(f"headline {n} of the day,{n % 4}" for n in range(40))]
    for split in ("train", "dev"):
        (box / "DATA" / f"topic-{split}.csv").write_text("\n".join(labelled) + "\n")
    (box / "headlines.csv").write_text("headline\nrain again\nmarkets calm\n")
    (box / "sentences.csv").write_text("sentence\nthe river is calm\nno one liked it\n")
    texts = [path.read_text() for path in (box / "DATA").glob("*-train.csv")]
    (box / "MODEL").mkdir()
    synthetic.train_tokenizer(texts, box / "MODEL" / "tokenizer.json", 400)
    shape = EncoderShape(400, 8, 1, 2, 8, 64)
    encoder = Encoder(shape, 0.0)
    initialise(encoder, 0)
    save_pretrained(encoder.state_dict(), shape, box / "MODEL")
    [text] = [block for block in blocks(ROOT / "README.md", "yaml") if "topic" in block]
    (box / "my.yaml").write_text(text)
    (box / "mine.yaml").write_text("base: configs/quickstart.yaml\n")
    (box / "docs").mkdir()
    for name in ("NAME", "OTHER"):
        run_in(box, f"python -m mtbert train --set run.name={name} seed={len(name)}")
    return box


def run_in(box: Path, command: str) -> None:
    """What `command` says, in this process where it is ours; it must succeed."""
    line, _, output = command.partition(" > ")
    words = shlex.split(line)
    before = Path.cwd()
    os.chdir(box)
    try:
        if words[:3] == ["python", "-m", "mtbert"]:
            if words[3] == "train" and "--resume" not in words:
                words += ["--set", *small(words)]
            with Path(output or os.devnull).open("w") as file, contextlib.redirect_stdout(file):
                assert cli.main(words[3:]) == 0, command
        elif words[:2] == ["python", "launch/submit.py"]:
            assert submit(words[2:]) == 0, command
        else:
            assert words[0] == "tensorboard", f"{command}: nothing here knows how to run it; or name it in ELSEWHERE"
            serve_curves(words[1:])
    finally:
        os.chdir(before)


def small(words: list[str]) -> list[str]:
    parts = SMALL + SMALL_SHAPE * ("my.yaml" not in words)  # whose encoder is MODEL
    return [part.replace("THREADS", str(torch.get_num_threads())) for part in parts]


def submit(words: list[str]) -> int:
    """Through the front door, which is asked what it would do: with an sbatch that is there, and never called."""
    from launch.submit import main

    Path("tools").mkdir(exist_ok=True)
    sbatch = Path("tools", "sbatch").resolve()
    sbatch.write_text("#!/bin/sh\nexit 1\n")
    sbatch.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
        return main(words if words == ["status"] else [*words, "--dry-run"])


def serve_curves(words: list[str]) -> None:
    command = [sys.executable, "-m", "tensorboard.main", *words, "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        assert any("http://127.0.0.1:" in line for line in server.stderr), "TensorBoard did not start"
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


# --------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("place", "command"), HERE, ids=[f"{place} {command}" for place, command in HERE])
def test_the_command_does_what_the_page_says(sandbox: Path, place: str, command: str) -> None:
    run_in(sandbox, command)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.name not in OWN_TEST], ids=lambda page: page.name
)
def test_python_blocks_run(sandbox: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sandbox)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


def test_commands_are_found_and_what_is_not_run_is_still_there() -> None:
    found = [command for _, command in all_commands()]
    assert "python -m mtbert compare runs/pcgrad runs/sum --html compared.html" in found
    assert len(HERE) >= 12
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in found), f"no page has {pattern} any more"


def test_make_knows_every_verb() -> None:
    verbs = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = {command.split()[1] for _, command in all_commands() if command.startswith("make ")}
    assert told <= verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        there = page.parent / target if target else page
        assert there.exists(), f"{page.relative_to(ROOT)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.relative_to(ROOT)}: {target}#{anchor}"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = {page.name for page in (ROOT / "docs").glob("*.md")} - set(re.findall(r"[\w-]+\.md", index))
    assert not missing, f"docs/README.md does not list {missing}"


def test_the_page_on_surgery_knows_every_method() -> None:
    page = (ROOT / "docs" / "surgery.md").read_text(encoding="utf-8")
    table, _, weightings = page.partition("`weighting.method`")
    listed = [name for row in re.findall(r"^\| (`\w+`.*?) \|", table, re.MULTILINE) for name in re.findall(r"\w+", row)]
    assert sorted(listed) == sorted(AGGREGATORS)
    assert {name for name in WEIGHTINGS if f"`{name}`" not in weightings} == set()


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    from mtbert import __version__

    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")
