"""Fixtures every room uses: a generated corpus, the real data where they lie, and real ranks over gloo."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import PATIENCE_S, Ranks, run_ranks
from hypothesis import settings

from mtbert import synthetic
from mtbert.config_files import load_config

ROOT = Path(__file__).parent.parent

# ranks meet over gloo here, on CPUs, and an engine would take a GPU; CUDA reads this when it starts, not on import
if not os.environ.get("MTBERT_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# no deadline: a busy machine is no failure; derandomised: what passed once on a commit passes again
settings.register_profile("mtbert", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mtbert")
settings.register_profile("long", deadline=None, max_examples=2000)  # other examples each time: --hypothesis-profile


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: one process runs a file, and at the end the others would wait for it. (make test asks
    pytest-xdist to leave it there: by itself it begins with the files of the most tests.)"""
    items.sort(key=lambda item: item.path.parts[-2:] != ("tune", "test_search.py"))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell starts what it runs in the background, tests too, with SIGINT ignored, which children inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """A user whom modes keep out, as they do not root. Imports must be done before: the installation may be private."""

    @contextmanager
    def become() -> Iterator[None]:
        was = os.getresuid()
        if was[1] == 0:
            os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            os.setresuid(*was)

    return become


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated corpus: {sst,quora,sts}-{train,dev}.csv. Shared by the session: only read it."""
    return synthetic.generate(tmp_path_factory.mktemp("corpus"), seed=0, train=200, dev=60)


@pytest.fixture(scope="session")
def trained_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained for a few steps: a head of each sort. Shared by the session: only read it."""
    from mtbert.runs import Rank, create_run
    from mtbert.trainer import train

    folder = tmp_path_factory.mktemp("trained")
    synthetic.train_tokenizer([path.read_text() for path in sorted(corpus.glob("*-train.csv"))], folder / "t.json")
    shape = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32, "max_positions": 64}
    values = {
        "data": {"dir": str(corpus), "cache": str(folder / "cache")},
        "encoder": {"shape": shape, "tokenizer": str(folder / "t.json"), "pooling": "mean"},
        "tasks": {
            "para": {"head": {"kind": "difference", "hidden": [16]}},
            "joint": {
                "kind": "pair_classification",
                "train": "quora-train.csv",
                "dev": "quora-dev.csv",
                "columns": {"text": ["sentence1", "sentence2"], "label": "is_duplicate", "id": "id"},
                "head": {"kind": "joint"},
                "loss": "cross_entropy",
            },
            "sts": {"head": {"kind": "relu_cosine", "hidden": [8]}},
        },
        "phases": [{"steps": 6}],
        "schedule": {"batch_size": 8},
        "optimizer": {"lr": 1e-2, "head_lr": 1e-2},
        "engine": {"precision": "fp32", "threads": 1},
        "run": {"dir": str(folder), "name": "run", "evaluate_every": 3},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"base": str(ROOT / "configs" / "cs224n.yaml"), **values}))
    run = create_run(load_config(config), None, [])
    train(run, Rank(), quiet=True)
    return run


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets, which are not part of the repository."""
    directory = ROOT.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"the real data are absent: {directory} is no folder")
    return directory


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Runs `function(rank: Rank, *args)` on real processes joined over gloo; may be called several times in a test.

    The function lies at the top level of its test module, the arguments and the result can be pickled. The process
    group is up when it starts. A rank that fails, fails the test with its traceback; the others are then killed, as
    they are after `timeout` seconds.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = PATIENCE_S) -> list[Any]:
        return run_ranks(tmp_path_factory.mktemp("ranks"), world, function, *args, timeout=timeout)

    return run
