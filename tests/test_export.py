"""Exported folders, opened by the programs they are for, against the packed encoder and `predict`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertModel

from mtbert.cli import main
from mtbert.config import Config
from mtbert.errors import UserError
from mtbert.export import PaddedEncoder, export
from mtbert.files import HOST
from mtbert.heads import MultiTaskModel
from mtbert.packing import pack
from mtbert.readers import Row, read_rows
from mtbert.trained import Trained, load_run

ROOT = Path(__file__).parent.parent
POOLINGS = ("mean", "cls", "pooler")


@pytest.fixture(scope="module")
def pairs(corpus: Path) -> list[tuple[str, str]]:
    rows = read_rows(corpus / "sts-dev.csv", ["sentence1", "sentence2"])
    return [row.values for row in rows if isinstance(row, Row)][:12]


@pytest.fixture(scope="module")
def texts(pairs: list[tuple[str, str]]) -> list[str]:
    """Of many lengths; the last is longer than the encoder's positions."""
    firsts = [first for first, _ in pairs]
    return [*firsts, " ".join(firsts[:2]), " ".join(firsts)]


def opened(run_dir: Path, pooling: str) -> Trained:
    run = load_run(run_dir, "latest", "fp32")
    run.model.pooling = pooling
    with torch.no_grad():
        for parameter in run.model.encoder.parameters():  # so that texts differ by more than rounding
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return run


@pytest.fixture(scope="module", params=POOLINGS)
def exported(
    trained_run: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Trained, Path]:
    run = opened(trained_run, request.param)
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(run, folder)
    return run, folder


def vectors_of(run: Trained, texts: Sequence[str]) -> NDArray[np.float32]:
    vectors = run.embed(run.tokenise([[text] for text in texts]))
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01  # else equality says nothing
    return vectors


def test_sentence_transformers_gives_the_same_vectors(exported: tuple[Trained, Path], texts: list[str]) -> None:
    run, folder = exported
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == run.max_length
    np.testing.assert_allclose(model.encode(texts), vectors_of(run, texts), atol=1e-5)


def test_transformers_gives_the_same_states(exported: tuple[Trained, Path], pairs: list[tuple[str, str]]) -> None:
    run, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([first for first, _ in pairs], [second for _, second in pairs], padding=True, return_tensors="pt")
    with torch.inference_mode():
        states, pooled = BertModel.from_pretrained(folder).eval()(**batch, return_dict=False)
    lengths = batch["attention_mask"].sum(1).tolist()
    sequences = [ids[:length].numpy() for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    starts = [types[:length].tolist().index(1) for types, length in zip(batch["token_type_ids"], lengths, strict=True)]
    packed = pack(sequences, starts)
    with torch.inference_mode():
        hidden_TD = run.model.encoder(packed)
    for number, length in enumerate(lengths):
        torch.testing.assert_close(
            states[number, :length], hidden_TD[packed.sequence_T == number], atol=1e-5, rtol=1e-5
        )
    if run.model.pooling == "pooler":
        vectors = pooled
    elif run.model.pooling == "cls":
        vectors = states[:, 0]
    else:
        vectors = torch.stack([state[:length].mean(0) for state, length in zip(states, lengths, strict=True)])
    scores = answers_of_the_page(folder, "joint", [vectors.numpy()]).max(-1)
    assert np.ptp(scores) > 1e-4
    np.testing.assert_allclose(scores, run.answer("joint", run.tokenise(pairs)).scores_N, atol=1e-5)


def answers_of_the_page(folder: Path, task: str, vectors: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)
    return page["answers"](folder, task, vectors)


def assert_heads_are_as_the_page_describes_them(run: Trained, folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    u, v = (vectors_of(run, [pair[side] for pair in pairs]) for side in (0, 1))
    w = np.roll(v, 1, axis=0)
    for name, task in run.config.tasks.items():
        if task.head.kind == "joint":
            continue
        examples = [(*pair, pairs[i - 1][1])[: task.texts] for i, pair in enumerate(pairs)]
        answers = answers_of_the_page(folder, name, [u, v, w][: task.texts])
        scores = answers.max(-1) if task.loss_kind == "cross_entropy" else answers.reshape(-1)
        assert np.ptp(scores) > 1e-4, name
        np.testing.assert_allclose(scores, run.answer(name, run.tokenise(examples)).scores_N, atol=1e-5, err_msg=name)


def test_heads_are_as_the_page_describes_them(exported: tuple[Trained, Path], pairs: list[tuple[str, str]]) -> None:
    assert_heads_are_as_the_page_describes_them(*exported, pairs)


PAIR = {"train": "t", "dev": "d", "columns": {"text": ["a", "b"]}}
EVERY_SORT: dict[str, dict[str, Any]] = {
    "one": {"kind": "classification", "train": "t", "dev": "d", "classes": 3, "head": {"shared": "common"}},
    "concat": {**PAIR, "kind": "pair_classification", "head": {"kind": "concat", "shared": "common", "hidden": [6, 5]}},
    "dot": {**PAIR, "kind": "pair_regression", "head": {"kind": "weighted_dot", "scale": 2.5}},
    "near": {**PAIR, "kind": "pair_classification", "head": {"kind": "cosine", "shared": "common"}},
    "embedded": {**PAIR, "kind": "pair_regression", "head": {"kind": "cosine"}, "loss": "cosine_embedding"},
    "ranked": {**PAIR, "kind": "pair_classification", "head": {"kind": "cosine"}, "loss": "mnrl"},
    "triplets": {"kind": "triplets", "train": "t", "columns": {"text": ["a", "b", "c"]}, "head": {"kind": "cosine"}},
}


def test_heads_that_the_run_has_not(trained_run: Path, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    run = opened(trained_run, "mean")
    values = {**run.config.model_dump(), "tasks": EVERY_SORT, "shared_layers": {"common": {"width": 7}}}
    config = Config.model_validate(values)
    model = MultiTaskModel(run.shape, config.encoder, config.tasks, 0, config.shared_layers)
    model.encoder.load_state_dict(run.model.encoder.state_dict())
    with torch.no_grad():
        for parameter in (*model.heads.parameters(), *model.shared.parameters()):
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    run = dataclasses.replace(run, config=config, model=model)
    export(run, tmp_path / "model")
    assert_heads_are_as_the_page_describes_them(run, tmp_path / "model", pairs)
    cosines = run.answer("embedded", run.tokenise(pairs))
    np.testing.assert_allclose(cosines.predictions_N, np.clip(5 * cosines.scores_N, 0, 5))


def padded(sequences: Sequence[NDArray[Any]], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids, mask = np.zeros((len(sequences), width), np.int64), np.zeros((len(sequences), width), np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    return ids, mask


def sequences_of(run: Trained, texts: Sequence[str]) -> list[NDArray[Any]]:
    ids = [run.tokenizer.encode(text, add_special_tokens=False).ids[: run.max_length - 2] for text in texts]
    special = [run.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")]
    return [np.array([special[0], *each, special[1]]) for each in ids]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_padded_encoder_is_the_packed_one(trained_run: Path, texts: list[str], pooling: str) -> None:
    run = opened(trained_run, pooling)
    sequences = sequences_of(run, texts)
    ids, mask = map(torch.from_numpy, padded(sequences, 64))
    with torch.inference_mode():
        states, vectors = PaddedEncoder(run.model.encoder, run.model.pooling)(ids, mask, torch.zeros_like(ids))
        packed = pack(sequences)
        hidden_TD = run.model.encoder(packed)
    np.testing.assert_allclose(vectors, vectors_of(run, texts), atol=1e-5)
    for number, sequence in enumerate(sequences):
        torch.testing.assert_close(
            states[number, : len(sequence)], hidden_TD[packed.sequence_T == number], atol=1e-5, rtol=1e-5
        )


def test_onnx_of_any_batch_and_length(
    trained_run: Path, tmp_path: Path, texts: list[str], pairs: list[tuple[str, str]]
) -> None:
    run = opened(trained_run, "mean")
    folder = tmp_path / "model"
    export(run, folder, onnx=True)
    expected = vectors_of(run, texts)
    encoder = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    sequences = sequences_of(run, texts)
    for count, width in ((1, len(sequences[0])), (3, 40), (len(texts), 64)):
        ids, mask = padded(sequences[:count], width)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        states, vectors = encoder.run(["last_hidden_state", "sentence_embedding"], inputs)
        assert states.shape == (count, width, 16)
        np.testing.assert_allclose(vectors, expected[:count], atol=2e-5)
    u, v = (vectors_of(run, [pair[side] for pair in pairs]) for side in (0, 1))
    for task, inputs in {
        "sst": {"vectors": u},
        "para": {"first": u, "second": v},
        "sts": {"first": u, "second": v},
    }.items():
        [answers] = onnxruntime.InferenceSession(folder / "onnx" / f"head_{task}.onnx").run(["answers"], inputs)
        found = run.answer(task, run.tokenise(pairs if len(inputs) == 2 else [pair[:1] for pair in pairs]))
        np.testing.assert_allclose(answers.max(-1) if task == "sst" else answers, found.scores_N, atol=2e-5)
    assert (folder / "onnx" / "head_joint.onnx").is_file()


def test_the_model_card_says_what_the_run_recorded(trained_run: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained_run), str(tmp_path / "out"), "--checkpoint", "latest"]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    [scores] = [line for line in lines if line["step"] == 5 and "metric/sts/pearson" in line]
    assert (
        f"| sts | pair_regression | relu_cosine | mse | sts-train.csv | pearson | {scores['metric/sts/pearson']:.4f} |"
        in card
    )
    assert "from scratch; weights after 6 steps" in card and "base_model" not in card
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert "\n\n## Limits\n\n- The licences of the training data apply" in card


def test_names_of_classes_go_with_the_export(trained_run: Path, tmp_path: Path) -> None:
    run = load_run(trained_run, "latest", "fp32")
    names = ["awful", "poor", "so so", "good", "gr|eat"]
    task = run.config.tasks["sst"].model_copy(update={"classes": names})
    config = run.config.model_copy(update={"tasks": {**run.config.tasks, "sst": task}})
    for folder, opened in (("numbers", run), ("names", dataclasses.replace(run, config=config))):
        export(opened, tmp_path / folder)
    numbers, named = (json.loads((tmp_path / f / "heads.json").read_text())["tasks"] for f in ("numbers", "names"))
    id2label = named["sst"].pop("id2label")
    assert named == numbers and id2label == {str(number): name for number, name in enumerate(names)}
    plain, card = ((tmp_path / f / "README.md").read_text() for f in ("numbers", "names"))
    line = "\n\n- Classes of sst: awful, poor, so so, good, gr\\|eat."
    assert line in card and card.replace(line, "") == plain


def test_nothing_is_overwritten_and_nothing_half_written(trained_run: Path, tmp_path: Path) -> None:
    run = load_run(trained_run, "latest", "fp32")
    (tmp_path / "mine").mkdir()
    for taken in (".", "/", ""):
        with pytest.raises(UserError, match="exists already"):
            export(run, Path(taken))
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        export(run, tmp_path / "file" / "model")
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        export(run, tmp_path / ("x" * 256))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_what_a_killed_export_left_goes_with_the_next(trained_run: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f".other-0.{HOST}.{pid}.tmp" / "onnx").mkdir(parents=True)
    export(load_run(trained_run, "latest", "fp32"), tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {f".other-0.{HOST}.{os.getpid()}.tmp", "model"}


def test_of_two_exports_at_once_one_is_there_whole(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "notes").write_text("the user's own")
    run = load_run(trained_run, "latest", "fp32")

    def exported() -> str:
        try:
            export(run, tmp_path / "model")
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        told = sorted(each.result() for each in [pool.submit(exported) for _ in range(2)])
    assert told[0] == "" and re.search("Directory not empty|exists already", told[1])
    assert (tmp_path / "model").stat().st_mode == (tmp_path / ".model.tmp").stat().st_mode
    assert (tmp_path / "model" / "README.md").is_file() and (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / ".model.tmp" / "notes").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.tmp", "model"]


@pytest.mark.parametrize("largest", ["tokenizer.json", "heads.safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(trained_run: Path, tmp_path: Path, largest: str) -> None:
    """The largest file is the one that no longer fits."""
    run = load_run(trained_run, "latest", "fp32")
    if largest == "tokenizer.json":
        run.tokenizer.add_tokens([f"word-{number}" for number in range(10_000)])
    else:
        run.model.shared["large"] = torch.nn.Linear(1000, 500)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, hard))  # no file grows beyond
    try:
        with pytest.raises(UserError, match="model: cannot be written: File too large"):
            export(run, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
