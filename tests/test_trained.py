"""What a run folder alone is good for: everything moved away or changed that the run was started with."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import stand_in_hub, use_hub
from test_trainer import TINY, digests

from mtbert import trained
from mtbert.building import build
from mtbert.config import Config, EncoderConfig, ShapeConfig
from mtbert.data import load_tokenizer
from mtbert.encoder import Encoder, EncoderShape, initialise
from mtbert.errors import UserError
from mtbert.pretrained import save_pretrained
from mtbert.runs import Outcome, Rank, create_run, independent, local_folder
from mtbert.synthetic import train_tokenizer
from mtbert.trained import keep_encoder, kept_encoder, load_run
from mtbert.trainer import evaluate_run, train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pretrained(corpus: Path, tmp_path: Path) -> Path:
    """A tiny Hugging Face folder."""
    return make_pretrained(corpus, tmp_path / "pretrained", seed=3)


def make_pretrained(corpus: Path, folder: Path, seed: int) -> Path:
    folder.mkdir()
    texts = [path.read_text() for path in sorted(corpus.glob("*-train.csv"))]
    tokenizer = load_tokenizer(train_tokenizer(texts, folder / "tokenizer.json"))
    encoder = Encoder(EncoderShape(tokenizer.get_vocab_size(), 16, 2, 2, 32, 64), 0.0)
    initialise(encoder, seed)
    save_pretrained(encoder.state_dict(), encoder.shape, folder)
    return folder


def make_config(corpus: Path, tmp_path: Path, pretrained: str) -> Config:
    """The quick start on a pretrained encoder, made tiny; dropout on."""
    quick = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    values: dict[str, Any] = {
        **quick,
        **TINY,
        "data": {"dir": str(corpus), "cache": str(tmp_path / "cache")},
        "encoder": {"pretrained": pretrained, "pooling": "mean"},
        "run": {**TINY["run"], "dir": str(tmp_path / "runs"), "name": None},
    }
    return Config.model_validate(values)


def new_run(config: Config, name: str) -> Path:
    return create_run(config.model_copy(update={"run": config.run.model_copy(update={"name": name})}), None, [])


def stopped(run: Path, after: int) -> Outcome:
    polls = iter(range(after))
    return train(run, Rank(), stop=lambda: next(polls, None) is None, quiet=True)


def test_a_run_needs_nothing_but_its_folder(corpus: Path, tmp_path: Path, pretrained: Path) -> None:
    config = make_config(corpus, tmp_path, str(pretrained))
    straight, moved = new_run(config, "straight"), new_run(config, "moved")
    train(straight, Rank(), quiet=True)
    assert stopped(moved, after=4).status == "stopped"
    tokenizer = load_tokenizer(pretrained).to_str()
    shutil.rmtree(pretrained)
    moved = moved.rename(tmp_path / "elsewhere")
    assert train(moved, Rank(), quiet=True).status == "finished"
    assert digests(moved) == digests(straight)
    for found, expected in zip(evaluate_run(moved, "latest")[1], evaluate_run(straight, "latest")[1], strict=True):
        assert found.predictions_N.tolist() == expected.predictions_N.tolist()

    run = load_run(moved, "latest")
    assert run.tokenizer.to_str() == tokenizer  # to the bit: the token cache is named after it
    assert (run.step, run.max_length, run.dtype) == (12, 64, torch.float32)
    kept = kept_encoder(moved)
    assert kept is not None
    assert kept.origin["pretrained"] == str(pretrained) and kept.origin["revision"] is None


def test_a_checkpoint_that_a_save_takes_away_while_it_is_opened(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, away = Path(shutil.copytree(trained_run, tmp_path / "run")), tmp_path / "away"
    found, calls = trained.find_checkpoint, []

    def taken_away(run: Path, which: Any) -> Any:
        if away.exists():
            away.rename(calls[0])
            return found(run, which)
        checkpoint = found(run, which)
        calls.append(checkpoint.folder.rename(away) and checkpoint.folder)
        return checkpoint

    monkeypatch.setattr(trained, "find_checkpoint", taken_away)
    assert load_run(run, "latest").step == 6 and len(calls) == 1

    def missing(run: Path, which: Any) -> Any:
        calls.append(run)
        return dataclasses.replace(found(run, which), folder=run)

    monkeypatch.setattr(trained, "find_checkpoint", missing)
    with pytest.raises(FileNotFoundError):
        load_run(run, "latest")
    assert len(calls) == 2, "nothing was saved meanwhile"


def test_an_encoder_in_a_folder_that_one_may_not_enter(
    corpus: Path, tmp_path: Path, as_nobody: Callable[[], Any]
) -> None:
    model = tmp_path / "private" / "model"
    (tmp_path / "private").mkdir(mode=0o700)
    with as_nobody():
        assert independent(make_config(corpus, tmp_path, str(model))).encoder.pretrained == str(model)
        with pytest.raises(UserError, match=rf"^encoder.pretrained {model}: Permission denied$"):
            local_folder(str(model))


def test_a_vocabulary_with_a_word_twice_trains_from_scratch(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\nb\n")
    config = make_config(corpus, tmp_path, "none")
    shape = ShapeConfig(hidden_size=8, layers=1, heads=1, intermediate_size=8)
    encoder = EncoderConfig(shape=shape, tokenizer=str(tmp_path / "vocab.txt"))
    assert build(config.model_copy(update={"encoder": encoder}), tmp_path).encoder.shape.vocab_size == 8


def test_weights_that_changed_before_the_first_save_are_refused(corpus: Path, tmp_path: Path, pretrained: Path) -> None:
    run = new_run(make_config(corpus, tmp_path, str(pretrained)), "changed")
    with pytest.raises(UserError, match=r"no encoder/tokenizer\.json"):
        load_run(run, "latest")
    stopped(run, after=1)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(run, "latest")
    shutil.rmtree(pretrained)
    make_pretrained(corpus, pretrained, seed=4)
    with pytest.raises(UserError, match="weights have changed since this run started"):
        train(run, Rank(), quiet=True)
    shutil.rmtree(pretrained)
    make_pretrained(corpus, pretrained, seed=3)
    assert train(run, Rank(), quiet=True).status == "finished"


def test_a_run_keeps_to_the_commit_of_the_hub_that_it_started_with(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = ("0" * 40, "1" * 40)
    repository = {old: read_files(make_pretrained(corpus, tmp_path / "old", seed=1))}
    config = make_config(corpus, tmp_path, "some-org/small")
    run = new_run(config, "pinned")
    with stand_in_hub({"models/some-org/small": repository}) as endpoint:

        def started() -> tuple[float, str | None]:
            built = build(config, run)
            keep_encoder(run, built.encoder)
            return float(built.model.encoder.pooler.weight.detach().sum()), built.encoder.origin["revision"]

        use_hub(monkeypatch, endpoint, tmp_path / "home")
        first = started()
        assert first[1] == old
        repository[new] = read_files(make_pretrained(corpus, tmp_path / "new", seed=2))
        use_hub(monkeypatch, endpoint, tmp_path / "fresh home")
        assert started() == first
        shutil.rmtree(run / "encoder")  # a run that starts now takes what is new
        second = started()
        assert second[1] == new and second[0] != first[0]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
