"""Every head against its formula written out with NumPy, on weights drawn for the test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mtbert.config import EncoderConfig, HeadKind, SharedLayerConfig, TaskConfig, TaskKind
from mtbert.encoder import EncoderShape
from mtbert.errors import UserError
from mtbert.heads import HEADS, Head, MultiTaskModel
from mtbert.losses import example_losses
from mtbert.packing import pack

D = 6
Array = NDArray[np.float64]
COMPARING = ("cosine", "relu_cosine")
PAIRED = (*HEADS, *COMPARING)
"""Heads that see two vectors of an example."""


def make_task(kind: str, head: str, hidden: list[int] | None = None, **over: Any) -> TaskConfig:
    """A task of this kind with a loss that fits its head; the head's dropout is off."""
    texts = ["a", "b", "c"][: {"classification": 1, "triplets": 3}.get(kind, 2)]
    loss = "cosine_embedding" if kind == "pair_classification" and head in COMPARING else None
    settings = {"kind": head, "hidden": hidden or [], "dropout": 0.0, "scale": over.pop("scale", None)}
    values = {"loss": loss, "train": "t.csv", "dev": "d.csv", "columns": {"text": texts}, **over}
    return TaskConfig(kind=kind, head=settings, **values)


def make_head(task: TaskConfig, width: int = D, seed: int = 0) -> Head:
    """Random biases too: BERT's initialisation has them at 0, where a forgotten one is not seen."""
    head = Head(task, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return head


def vectors(count: int, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def linear(layer: nn.Module, x: Array) -> Array:
    assert isinstance(layer, nn.Linear)
    return np.asarray(x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy())


def cosine(u: Array, v: Array) -> Array:
    return np.asarray((u * v).sum(-1) / np.sqrt((u * u).sum(-1) * (v * v).sum(-1)))


FORMULAS: dict[str, Callable[[Array, Array], Array]] = {
    "concat": lambda u, v: np.concatenate([u, v], axis=1),
    "weighted_dot": lambda u, v: u * v,
    "difference": lambda u, v: np.concatenate([u, v, np.abs(u - v)], axis=1),
    "cosine": cosine,
    "relu_cosine": lambda u, v: np.maximum(cosine(u, v), 0),
}


def expected(head: Head, task: TaskConfig, x: Array) -> Array:
    """What the head answers without dropout, in fp64."""

    def through_hidden(x: Array) -> Array:
        for layer in head.hidden:
            x = np.maximum(linear(layer, x), 0)
        return x

    kind = task.head.kind
    if task.kind == "triplets":
        u, v, w = np.split(through_hidden(x), 3)
        return cosine(u, v) - cosine(u, w)
    if kind in COMPARING:
        u, v = np.split(through_hidden(x), 2)
        if task.loss_kind == "bce":
            return (task.head.scale or 20) * (FORMULAS[kind](u, v) - 0.5)
        highest = task.range[1] if task.kind == "pair_regression" and task.loss_kind != "cosine_embedding" else 1.0
        return (task.head.scale or highest) * FORMULAS[kind](u, v)
    joined = FORMULAS[kind](*np.split(x, 2)) if kind in FORMULAS else x
    assert head.output is not None
    scores = (task.head.scale or 1) * linear(head.output, through_hidden(joined))
    return scores if scores.shape[1] > 1 else scores[:, 0]


TASKS = [
    *(make_task("classification", "linear", hidden, classes=5) for hidden in ([], [4], [7, 3])),
    *(
        make_task(kind, head, hidden)
        for kind in ("pair_classification", "pair_regression")
        for head in get_args(HeadKind)
        if head != "linear"
        for hidden in ([], [7, 3])
    ),
    make_task("pair_classification", "concat", classes=3, loss="cross_entropy"),
    make_task("pair_regression", "cosine", range=(-1, 1)),
    make_task("pair_regression", "relu_cosine", range=(1, 3)),
    make_task("pair_regression", "concat", scale=5),  # paper C, iteration 1
    make_task("pair_regression", "cosine", scale=1),  # paper C, iteration 2
    make_task("pair_regression", "cosine", loss="cosine_embedding"),
    make_task("pair_regression", "relu_cosine", loss="mnrl"),
    *(make_task("pair_classification", "cosine", scale=scale, loss="bce") for scale in (None, 7)),
    make_task("triplets", "cosine"),
]


def told(task: TaskConfig) -> str:
    hidden = "x".join(map(str, task.head.hidden)) or "plain"
    return f"{task.kind}-{task.head.kind}-{hidden}-{task.loss_kind}-{task.head.scale}"


def test_every_head_and_kind_is_tried() -> None:
    assert {task.head.kind for task in TASKS} == set(get_args(HeadKind))
    assert {task.kind for task in TASKS} == set(get_args(TaskKind))


@pytest.mark.parametrize("task", TASKS, ids=told)
def test_against_the_formula(task: TaskConfig) -> None:
    head = make_head(task)
    x = vectors(5 * (task.texts if task.head.kind in PAIRED else 1))
    answers = head(x)
    np.testing.assert_allclose(answers.detach().numpy(), expected(head, task, x.double().numpy()), rtol=1e-5, atol=2e-6)
    assert answers.dtype == torch.float32
    assert answers.shape == ((5, task.classes) if task.loss_kind == "cross_entropy" else (5,))


@pytest.mark.parametrize("task", TASKS, ids=told)
def test_no_example_is_no_trouble_and_no_gradient(task: TaskConfig) -> None:
    """A rank without a share of a batch takes part all the same; what it adds is 0, not NaN."""
    head = make_head(task)
    x = vectors(0).requires_grad_()
    answers = head(x, torch.Generator().manual_seed(0))
    assert answers.shape == ((0, task.classes) if task.loss_kind == "cross_entropy" else (0,))
    dtype = torch.float32 if task.kind == "pair_regression" else torch.int64
    losses = answers if task.loss_kind == "mnrl" else example_losses(task, answers, torch.zeros(0, dtype=dtype))
    losses.sum().backward()
    for parameter in head.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("task", TASKS, ids=told)
def test_an_example_s_answer_does_not_depend_on_its_neighbours(task: TaskConfig) -> None:
    head = make_head(task)
    if task.head.kind in PAIRED:
        parts = [vectors(5, seed=seed) for seed in range(task.texts)]
        whole = head(torch.cat(parts))
        alone = torch.cat([head(torch.stack(example)) for example in zip(*parts, strict=True)])
    else:
        x = vectors(5)
        whole, alone = head(x), torch.cat([head(row[None]) for row in x])
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("kind", COMPARING)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8), min_size=1, max_size=4),
    st.sampled_from([(0.0, 5.0), (-1.0, 1.0), (1.0, 4.0)]),
)
def test_cosine_heads_are_torch_s_cosine_up_to_the_highest_label(
    kind: str, rows: list[list[float]], limits: tuple[float, float]
) -> None:
    head = Head(make_task("pair_regression", kind, range=limits), 4)
    first, second = torch.tensor(rows).split(4, dim=1)
    answers = head(torch.cat([first, second]))
    cosines = F.cosine_similarity(first.double(), second.double())
    wanted = limits[1] * (cosines.relu() if kind == "relu_cosine" else cosines)
    torch.testing.assert_close(answers.double(), wanted, rtol=1e-5, atol=1e-5 * limits[1])
    lowest = 0.0 if kind == "relu_cosine" else -limits[1]
    assert bool(((answers >= lowest * 1.0001) & (answers <= limits[1] * 1.0001)).all())


@pytest.mark.parametrize("name", ["train", "training", "values"])
def test_names_that_modules_have_themselves(name: str) -> None:
    task = TaskConfig(kind="classification", train="-", dev="-")
    with pytest.raises(UserError, match=f"^{name}: PyTorch keeps this name for itself"):
        MultiTaskModel(SHAPE, EncoderConfig(), {name: task}, seed=0)


def test_cosine_of_bf16_vectors_is_taken_in_fp32() -> None:
    head = Head(make_task("pair_regression", "cosine"), 256)
    first = vectors(1, width=256)
    second = first + 0.05 * vectors(1, seed=2, width=256)
    pair = torch.cat([first, second]).bfloat16()
    exact = 5 * F.cosine_similarity(pair[:1].double(), pair[1:].double())
    assert 0.001 < 5 - float(exact) < 0.02  # bf16 has steps of 0.03 there
    torch.testing.assert_close(head(pair).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in PAIRED if kind not in ("concat", "difference")])
def test_symmetric_heads(kind: str) -> None:
    head = make_head(make_task("pair_regression", kind, [5]))
    first, second = vectors(4, seed=1), vectors(4, seed=2)
    torch.testing.assert_close(head(torch.cat([first, second])), head(torch.cat([second, first])))


# ------------------------------------------------------------------------------------------------ dropout


def dropping(kind: str, head: str, hidden: list[int], p: float) -> TaskConfig:
    task = make_task(kind, head)
    return task.model_copy(update={"head": task.head.model_copy(update={"hidden": hidden, "dropout": p})})


@pytest.mark.parametrize("head", [kind for kind in get_args(HeadKind) if kind != "linear"])
def test_dropout_is_on_exactly_when_there_is_a_generator(head: str) -> None:
    model = make_head(dropping("pair_regression", head, [5], 0.5))
    x = vectors(8)
    off = model.train()(x)
    assert torch.equal(off, model.eval()(x))
    on = [model(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(on[0], on[1])
    assert not torch.equal(on[0], on[2])
    assert not torch.equal(on[0], off)


def test_dropout_lies_on_the_input_and_after_each_hidden_layer() -> None:
    """With all weights 1 and inputs 1 the share of zeros in, and the mean of, the answers tell where it was."""
    p, count = 0.5, 4000
    for hidden, survival in [([], 1 - p), ([1], (1 - p) ** 2), ([1, 1], (1 - p) ** 3)]:
        head = Head(dropping("classification", "linear", hidden, p), 1)
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter.fill_(float(name.endswith("weight")))
        answers = head(torch.ones(count, 1), torch.Generator().manual_seed(3))[:, 0]
        alive = (answers > 0).float().mean().item()
        assert alive == pytest.approx(survival, abs=4 * math.sqrt(survival / count))
        assert answers.mean().item() == pytest.approx(1.0, abs=0.15)  # the expectation stays


# ------------------------------------------------------------------------------------------------ the model

SHAPE = EncoderShape(vocab_size=30, hidden_size=8, layers=1, heads=2, intermediate_size=16, max_positions=16)


def make_model(seed: int = 0) -> MultiTaskModel:
    tasks = {
        "sst": make_task("classification", "linear", classes=5),
        "para": make_task("pair_classification", "joint"),
        "sts": make_task("pair_regression", "cosine"),
    }
    return MultiTaskModel(SHAPE, EncoderConfig(pooling="mean"), tasks, seed)


SEQUENCES = [np.array(ids) for ids in ([2, 5, 6, 3], [2, 7, 3], [2, 9, 9, 9, 3], [2, 3])]


def test_the_model_is_its_encoder_and_the_task_s_head() -> None:
    model = make_model()
    packed = pack(SEQUENCES)
    pooled = model.encoder.sentence_vectors(packed, "mean")
    for task, answers in {"sst": 4, "para": 4, "sts": 2}.items():
        assert torch.equal(model(task, packed), model.heads[task](pooled))
        assert len(model(task, packed)) == answers
    for task in model.heads:
        assert len(model(task, pack([]))) == 0


def test_a_layer_shared_between_heads() -> None:
    """Its answer is the head's on ReLU(W·vector), both texts of a pair through the same layer."""
    tasks = {name: make_task("pair_regression", kind) for name, kind in [("one", "joint"), ("two", "cosine")]}
    tasks = {
        name: task.model_copy(update={"head": task.head.model_copy(update={"shared": "pair"})})
        for name, task in tasks.items()
    } | {"own": make_task("classification", "linear")}
    for width in (None, 5):
        layers = {"pair": SharedLayerConfig(width=width)}
        model = MultiTaskModel(SHAPE, EncoderConfig(pooling="mean"), tasks, 0, layers)
        with torch.no_grad():
            for parameter in model.shared.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        packed = pack(SEQUENCES)
        vectors_PD = model.vectors(packed)
        layer = model.shared["pair"]
        common = torch.from_numpy(np.maximum(linear(layer, vectors_PD.detach().double().numpy()), 0)).float()
        assert common.shape == (4, width or SHAPE.hidden_size)
        for name in ("one", "two"):
            torch.testing.assert_close(model(name, packed), model.heads[name](common))
        torch.testing.assert_close(model("own", packed), model.heads["own"](vectors_PD))
    halved = tasks["one"].model_copy(update={"head": tasks["one"].head.model_copy(update={"dropout": 0.5})})
    model = MultiTaskModel(SHAPE, EncoderConfig(dropout=0), tasks | {"one": halved}, 0, layers)
    dropped, kept = (model.answer("one", vectors_PD, g) for g in (torch.Generator().manual_seed(0), None))
    assert not torch.equal(dropped, kept)


def test_the_encoder_is_shared_and_a_head_is_not() -> None:
    model = make_model()
    model("sst", pack(SEQUENCES)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.heads["sst"].parameters())
    assert all(parameter.grad is None for parameter in model.heads["para"].parameters())
    assert all(parameter.grad is not None for parameter in model.encoder.layers.parameters())


def test_initial_weights_follow_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one = make_model(7).state_dict()
    assert torch.equal(before, torch.get_rng_state()), "torch's own initialisation draws from the global generator"
    two, other = make_model(7).state_dict(), make_model(8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["heads.sst.output.weight"], other["heads.sst.output.weight"])
    matrix = one["encoder.layers.0.qkv.weight"]
    assert 0.015 < float(matrix.std()) < 0.025
    assert not one["heads.sst.output.bias"].any()
