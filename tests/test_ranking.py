"""Multiple negatives ranking against its formula and one process; ranks, micro-batches and empty shares make no
difference."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Ranks
from torch import Tensor
from torch.nn import functional as F

from mtbert.building import build
from mtbert.checkpoint import load_weights
from mtbert.config import (
    Config,
    EncoderConfig,
    EngineConfig,
    MnrlConfig,
    OptimizerConfig,
    SharedLayerConfig,
    TaskConfig,
)
from mtbert.encoder import EncoderShape
from mtbert.engine import Engine, Group, parameter_groups
from mtbert.heads import MultiTaskModel
from mtbert.losses import example_losses
from mtbert.manifest import open_checkpoint
from mtbert.packing import Packed, pack
from mtbert.randomness import addressed_rng
from mtbert.ranking import mnrl
from mtbert.runs import Rank, create_run
from mtbert.surgery import Surgery
from mtbert.synthetic import train_tokenizer
from mtbert.tasks import Task
from mtbert.trainer import train

N, D = 8, 6


def texts(count: int = N, of: int = 2, seed: int = 0) -> Tensor:
    """All first texts, then all second ones, …"""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, D, generator=generator)
    others = [first + 0.8 * torch.randn(count, D, generator=generator) for _ in range(of - 1)]
    return torch.cat([first, *others]).requires_grad_()


def ranking(**values: Any) -> MnrlConfig:
    return MnrlConfig(**values)


# -------------------------------------------------------------------------------------------- the formula


def sentence_transformers(anchors: Tensor, candidates: Tensor, scale: float = 20.0) -> Tensor:
    """MultipleNegativesRankingLoss as that library computes it: cross entropy of scaled cosines, labels 0, 1, …"""
    scores = torch.mm(F.normalize(anchors), F.normalize(candidates).T) * scale
    return F.cross_entropy(scores, torch.arange(len(anchors)))


@pytest.mark.parametrize("of", [2, 3])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_all_pairs_as_in_sentence_transformers(of: int, temperature: float) -> None:
    """With a third column of hard negatives too; there it is what they train SimCSE with."""
    vectors = texts(of=of)
    first, *others = vectors.chunk(of)
    theirs = sentence_transformers(first, torch.cat(others), 1 / temperature)
    ours = mnrl(vectors, torch.zeros(N), of, ranking(temperature=temperature), 0) / N
    torch.testing.assert_close(ours, theirs)
    [grad], [wanted] = torch.autograd.grad(ours, vectors), torch.autograd.grad(theirs, vectors)
    torch.testing.assert_close(grad, wanted)


def test_triplets_as_gao_et_al_write_them() -> None:
    h, plus, minus = (F.normalize(part.detach().double()).numpy() for part in texts(of=3).chunk(3))
    by_hand = 0.0
    for i in range(N):
        below = sum(math.exp(h[i] @ plus[j] / 0.05) + math.exp(h[i] @ minus[j] / 0.05) for j in range(N))
        by_hand += -math.log(math.exp(h[i] @ plus[i] / 0.05) / below)
    assert mnrl(texts(of=3), torch.ones(N), 3, ranking(), 0).item() == pytest.approx(by_hand, rel=1e-5)


def by_hand(vectors: Tensor, positives: Sequence[tuple[int, int]], temperature: float = 0.05) -> float:
    """−1/K Σ [S(x_i, y_j) − log Σ_c exp S(x_i, y_c)] over K positives (Henderson et al. 2017)."""
    x, y = (F.normalize(part.detach().double()).numpy() for part in vectors.chunk(2))
    score = x @ y.T / temperature
    return float(np.mean([np.log(np.exp(score[i]).sum()) - score[i, j] for i, j in positives]))


LABELS = torch.tensor([0.0, 5.0, 4.4, 4.45, 1.0, 4.5, 3.0, 4.39])


@pytest.mark.parametrize(("epoch", "chosen"), [(0, [1, 2, 3, 5]), (1, [1, 3, 5]), (2, [1, 5]), (9, [1])])
def test_label_threshold_rises(epoch: int, chosen: list[int]) -> None:
    """Paper A: 4.4, and 0.05 more each epoch. Pairs below it are negatives of the others."""
    config = ranking(threshold="label", start=4.4, rise=0.05)
    loss = mnrl(texts(), LABELS, 2, config, epoch) / N
    assert loss.item() == pytest.approx(by_hand(texts(), [(i, i) for i in chosen]), rel=1e-5)


@pytest.mark.parametrize("epoch", [0, 3])
def test_cosine_threshold_takes_texts_of_any_pair(epoch: int) -> None:
    x, y = (F.normalize(part.detach()) for part in texts().chunk(2))
    threshold = 0.5 + 0.1 * epoch
    positives = [(i, j) for i in range(N) for j in range(N) if x[i] @ y[j] >= threshold]
    assert {i == j for i, j in positives} == {True, False}
    loss = mnrl(texts(), LABELS, 2, ranking(threshold="cosine", start=0.5, rise=0.1), epoch) / N
    assert loss.item() == pytest.approx(by_hand(texts(), positives), rel=1e-5)


NONE_CHOSEN = [
    (texts(), LABELS, ranking(threshold="label", start=4.4, rise=1.0), 1),  # above every label
    (texts(), LABELS, ranking(threshold="cosine", start=1.0), 0),
    (texts(1), LABELS[:1], ranking(), 0),  # one pair has nothing to be told from
    (texts(0), LABELS[:0], ranking(), 0),
]


@pytest.mark.parametrize(("vectors", "labels", "config", "epoch"), NONE_CHOSEN, ids=["label", "cosine", "one", "empty"])
def test_no_positive_gives_a_zero_with_a_gradient(
    vectors: Tensor, labels: Tensor, config: MnrlConfig, epoch: int
) -> None:
    loss = mnrl(vectors, labels, 2, config, epoch)
    [gradient] = torch.autograd.grad(loss, vectors)
    assert loss.item() == 0.0 and not gradient.any() and gradient.shape == vectors.shape


def test_bf16_vectors_are_compared_in_fp32() -> None:
    rough = texts().detach().bfloat16()
    exact = sentence_transformers(*rough.double().chunk(2))
    torch.testing.assert_close(mnrl(rough, torch.zeros(N), 2, ranking(), 0).double() / N, exact, rtol=1e-5, atol=0)


# -------------------------------------------------------------------------- through the engine, on real ranks

SHAPE = EncoderShape(vocab_size=60, hidden_size=12, layers=2, heads=3, intermediate_size=20, max_positions=16)
PAIR = {"train": "-", "dev": "-", "columns": {"text": ["a", "b"]}}
TASKS = {
    # a plain one, both thresholds, the loss alone and beside another, and a layer that two heads share
    "mixed": TaskConfig(
        kind="pair_regression", head={"kind": "concat", "dropout": 0, "shared": "pair"}, loss="huber",
        mnrl={"threshold": "label", "start": 2.5, "weight": 0.7}, weight=0.5, **PAIR,
    ),
    "cosines": TaskConfig(
        kind="pair_regression", head={"kind": "cosine", "dropout": 0}, loss="mnrl",
        mnrl={"threshold": "cosine", "start": 0.3}, **PAIR,
    ),
    "none": TaskConfig(
        kind="pair_classification", head={"kind": "weighted_dot", "dropout": 0, "shared": "pair"},
        mnrl={"threshold": "cosine", "start": 1.0}, **PAIR,
    ),
    "nli": TaskConfig(
        kind="triplets", train="-", columns={"text": ["a", "b", "c"]}, head={"kind": "cosine", "dropout": 0}
    ),
}  # fmt: skip
LAYERS = {"pair": SharedLayerConfig(lr=5e-4, width=9)}
OPTIMIZER = OptimizerConfig(lr=1e-3, head_lr=2e-3, weight_decay=0.1, eps=1e-4)  # eps: see test_engine.py
STEPS = 6

# which examples of a global batch of 8 lie on which rank: unequal counts, and a rank with none
PLACEMENT = {1: [range(8)], 2: [range(3), range(3, 8)], 4: [range(1), range(1, 4), range(0), range(4, 8)]}


def batch(step: int, name: str, rows: Sequence[int]) -> tuple[Packed, Tensor]:
    task = TASKS[name]
    rng = addressed_rng(0, "test batch", step, list(TASKS).index(name))
    sentences = [[rng.integers(0, SHAPE.vocab_size, rng.integers(3, 10)) for _ in range(8)] for _ in range(task.texts)]
    labels = rng.integers(0, 2, 8) if task.kind == "pair_classification" else rng.uniform(0, 5, 8).astype(np.float32)
    return pack([some[row] for some in sentences for row in rows]), torch.from_numpy(labels[list(rows)])


def model() -> MultiTaskModel:
    built = MultiTaskModel(SHAPE, EncoderConfig(dropout=0.0, pooling="mean"), TASKS, 3, LAYERS)
    generator = torch.Generator().manual_seed(4)
    for parameter in built.parameters():
        parameter.data.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))
    return built


def loss(built: MultiTaskModel, step: int, name: str, rows: Sequence[int]) -> Tensor:
    task = Task(name, TASKS[name], None, None, (0, 0), 16)  # type: ignore[arg-type]  # without data
    packed, labels = batch(step, name, rows)
    vectors = built.vectors(packed)
    return task.loss(vectors, built.answer(name, vectors), labels, epoch=0) / 8


def obvious(built: MultiTaskModel, step: int, name: str, cuts: Sequence[Sequence[int]]) -> Tensor:
    """The loss of a global batch in one process, written out anew; `cuts` are micro-batches over all ranks."""
    task, total = TASKS[name], torch.zeros(())
    for rows in cuts:
        packed, labels = batch(step, name, rows)
        vectors = built.vectors(packed)
        if task.loss_kind != "mnrl":
            total = total + example_losses(task, built.answer(name, vectors), labels).sum() / 8
        config = task.ranking
        assert config is not None
        first, *others = vectors.chunk(task.texts)
        cosines = F.cosine_similarity(first[:, None], torch.cat(others)[None], dim=-1)
        logs = F.log_softmax(cosines / config.temperature, dim=1)
        if config.threshold == "cosine":
            chosen = [logs[i, j] for i in range(len(rows)) for j in range(len(rows)) if cosines[i, j] >= config.start]
        else:
            chosen = [logs[i, i] for i in range(len(rows)) if config.threshold is None or labels[i] >= config.start]
        if chosen:
            total = total - config.weight * torch.stack(chosen).mean() * len(rows) / 8
    return total


def tasks_of(step: int) -> list[str]:
    """In some steps no task, in others one of two uses the shared layer."""
    return [list(TASKS), ["cosines", "nli"], ["cosines", "none", "nli"]][step % 3]


def reference(cuts: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Plain autograd in one process with the sum of the task gradients; in fp64, so that all rounding is the ranks'."""
    built = model().double()
    parameters = dict(built.named_parameters())
    groups = parameter_groups(built, OPTIMIZER, TASKS, SHAPE.layers, LAYERS)
    adams = {
        group: torch.optim.AdamW([parameters[n] for n in group.names], lr=group.lr, betas=OPTIMIZER.betas,
                                 eps=OPTIMIZER.eps, weight_decay=group.weight_decay)
        for group in groups
    }  # fmt: skip
    told = []
    for step in range(STEPS):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)  # of what no loss reaches: the pooler decays all the same
        losses = [obvious(built, step, name, cuts) for name in tasks_of(step)]
        sum(TASKS[name].weight * value for name, value in zip(tasks_of(step), losses, strict=True)).backward()
        told.append([value.item() for value in losses])
        for group, adam in adams.items():
            if trains(group, step):
                adam.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}, told


def trains(group: Group, step: int) -> bool:
    if group.task is None:
        return True
    users = {"pair": {"mixed", "none"}}.get(group.task, {group.task})
    return bool(users & set(tasks_of(step)))


def trained(rank: Rank, zero: int, accumulation: int) -> tuple[dict[str, list[Any]], list[list[float]]]:
    """What a rank's shards hold after the same steps through the engine, and the losses it was told."""
    built = model()
    groups = parameter_groups(built, OPTIMIZER, TASKS, SHAPE.layers, LAYERS)
    config = EngineConfig(zero=zero, precision="fp32", clip_norm=None, accumulation=accumulation)
    weights = {name: task.weight for name, task in TASKS.items()}
    engine = Engine(built, groups, weights, config, OPTIMIZER, Surgery("sum", {}, 0), rank)
    mine = PLACEMENT[rank.world][rank.rank]
    told = []
    for step in range(STEPS):
        losses = {
            list(TASKS).index(name): [
                lambda name=name, step=step, part=part: loss(engine.model, step, name, part)
                for part in ([row for row in mine if row % accumulation == cut] for cut in range(accumulation))
            ]
            for name in tasks_of(step)
        }
        told.append(engine.step(step, losses).losses_K.tolist())
    shards: dict[str, list[Any]] = {}
    for span, tensors in engine.state():
        shards.setdefault(span.name, []).append((span.start, span.stop, tensors["master"].clone()))
    return shards, told


CASES = [(1, 1), (1, 2), (3, 1)]  # ZeRO stage, micro-batches


def all_cases(rank: Rank) -> list[Any]:
    return [trained(rank, *case) for case in CASES]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_trains_what_one_process_does(ranks: Ranks, world: int) -> None:
    results = ranks(world, all_cases)
    for number, (zero, accumulation) in enumerate(CASES):
        expected, losses = reference([range(cut, 8, accumulation) for cut in range(accumulation)])
        worst, seen = 0.0, dict.fromkeys(expected, 0)
        for shards, told in (result[number] for result in results):
            np.testing.assert_allclose(np.concatenate(told), np.concatenate(losses), rtol=2e-5, atol=1e-6)
            for name, pieces in shards.items():
                for start, stop, values in pieces:
                    seen[name] += stop - start
                    worst = max(worst, float((expected[name].flatten()[start:stop] - values).abs().max()))
        assert seen == {name: parameter.numel() for name, parameter in expected.items()}
        assert worst < 1e-6, (zero, accumulation, worst)


# -------------------------------------------------------------------------------------------------- a whole run


def test_a_run_with_triplets_rising_thresholds_a_shared_layer_and_long_texts(corpus: Path, tmp_path: Path) -> None:
    """From YAML to scores: two epochs of two steps, then the heads alone."""
    tokenizer = train_tokenizer([path.read_text() for path in sorted(corpus.glob("*-train.csv"))], tmp_path / "t.json")
    text, pair = ["sentence"], ["sentence1", "sentence2"]
    tasks = {
        "cfimdb": {"kind": "classification", "columns": {"text": text, "label": "sentiment"}},
        "para": {
            "kind": "pair_classification", "columns": {"text": pair, "label": "is_duplicate"},
            "head": {"kind": "joint", "shared": "pair"},
        },
        "sts": {  # the cosine head of a task of its own next to MNRL alone, whose second threshold lies above 5
            "kind": "pair_regression", "columns": {"text": pair, "label": "similarity"}, "loss": "mnrl",
            "head": {"kind": "cosine"}, "mnrl": {"threshold": "label", "start": 1, "rise": 4.5},
        },
        "again": {
            "kind": "pair_regression", "columns": {"text": pair, "label": "similarity"},
            "head": {"kind": "cosine", "shared": "pair"}, "loss": "cosine_embedding", "margin": 0.2,
        },
        "nli": {"kind": "triplets", "columns": {"text": ["sent0", "sent1", "hard_neg"]}, "head": {"kind": "cosine"}},
    }  # fmt: skip
    for name, file in (("cfimdb", "ids-cfimdb"), ("para", "quora"), ("sts", "sts"), ("again", "sts")):
        tasks[name] |= {"train": f"{file}-train.csv", "dev": f"{file}-dev.csv"}
    tasks["nli"]["train"] = "nli-triplets.csv"
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "max_positions": 48}
    values = {
        "data": {"dir": str(corpus), "cache": str(tmp_path / "cache")},
        "encoder": {"shape": shape, "tokenizer": str(tokenizer), "pooling": "mean"},
        "tasks": tasks,
        "shared_layers": {"pair": {"lr": 0.01}},
        "schedule": {"length": 2, "batch_size": 8},
        "phases": [{"epochs": 2}, {"steps": 1, "trainable": "heads"}],
        "run": {"dir": str(tmp_path / "runs"), "name": "run", "log_every": 1, "evaluate_every": 5},
        "checkpoint": {"every_steps": 4, "keep": 9},
        "engine": {"precision": "fp32", "threads": 1, "accumulation": 2},
    }
    config = Config.model_validate(values)
    built = build(config)
    long = built.tasks[0]
    assert long.tokens_N("train").max() == 48 < long.train.lengths_NS.max() + 2  # truncated
    run = create_run(config, None, [])
    outcome = train(run, Rank(), quiet=True)
    assert outcome.status == "finished" and set(outcome.metrics) == set(tasks) - {"nli"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [[line[f"loss/{name}"] for line in lines if f"loss/{name}" in line] for name in ("sts", "nli")]
    assert [value > 0 for value in told[0]] == [True, True, False, False, False]  # above every label: 0, not a stop
    assert all(value > 0 for value in told[1])
    assert {f"loss/{name}/dev" for name in tasks if f"loss/{name}/dev" in lines[-1]} == {
        "loss/cfimdb/dev", "loss/para/dev", "loss/again/dev"
    }  # fmt: skip
    shapes = {name: parameter.shape for name, parameter in built.model.named_parameters()}
    four, five = (load_weights(open_checkpoint(run / "checkpoints" / f"step-0000000{n}"), shapes) for n in (4, 5))
    moved = {name for name in shapes if not torch.equal(four[name], five[name])}
    assert moved == {name for name in shapes if name.startswith(("heads.", "shared."))}
    assert "shared.pair.weight" in moved and lines[-2]["learning_rate/pair"] <= 0.01
