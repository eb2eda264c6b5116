"""The engine against a plain single-process reference: no DeepSpeed, no sharding, one obvious loop."""

from __future__ import annotations

import gc
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchjd.scalarization
from harness import Ranks
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from mtbert import zero
from mtbert.config import EncoderConfig, EngineConfig, HeadConfig, OptimizerConfig, TaskConfig
from mtbert.encoder import EncoderShape
from mtbert.engine import Engine, Group, StepResult, combine, gram, parameter_groups
from mtbert.heads import MultiTaskModel
from mtbert.packing import Packed, pack
from mtbert.randomness import addressed_generator, addressed_rng
from mtbert.runs import Rank
from mtbert.surgery import Surgery, pcgrad_vectors, task_orders
from mtbert.weighting import Weighting
from mtbert.zero import Span, exchange

STEPS = 20
SHAPE = EncoderShape(vocab_size=211, hidden_size=12, layers=2, heads=3, intermediate_size=20, max_positions=16)
TASKS = {
    "a": TaskConfig(kind="classification", train="-", dev="-", classes=3, head=HeadConfig(lr=3e-3, dropout=0.2)),
    "b": TaskConfig(kind="classification", train="-", dev="-", classes=2, head=HeadConfig(hidden=[7]), weight=0.5),
    "c": TaskConfig(kind="classification", train="-", dev="-", classes=5),
}
# softmax does not see the key bias, so its gradient is rounding noise of 1e-9, which AdamW would blow up to whole
# steps with the usual eps of 1e-8
OPTIMIZER = OptimizerConfig(lr=1e-3, head_lr=2e-3, weight_decay=0.1, eps=1e-4, ema=0.8)
CPU = torch.device("cpu")

# which examples of a global batch of 8 lie on which rank: unequal counts, and a rank with none
PLACEMENT = {1: [range(8)], 2: [range(3), range(3, 8)], 4: [range(1), range(1, 4), range(0), range(4, 8)]}


def model(dropout: float) -> MultiTaskModel:
    built = MultiTaskModel(SHAPE, EncoderConfig(dropout=dropout), tasks(dropout), seed=3)
    rng = torch.Generator().manual_seed(4)
    for parameter in built.parameters():  # larger than BERT's initial weights, so that the tasks conflict
        parameter.data.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=rng))
    return built


def tasks(dropout: float) -> dict[str, TaskConfig]:
    if dropout:
        return TASKS
    return {
        name: task.model_copy(update={"head": task.head.model_copy(update={"dropout": 0.0})})
        for name, task in TASKS.items()
    }


def weights_of(kinds: dict[str, TaskConfig]) -> dict[str, float]:
    return {name: task.weight for name, task in kinds.items()}


def batch(step: int, task: int, rows: Sequence[int]) -> tuple[Packed, Tensor]:
    """Examples `rows` of the global batch; sentences of 3 to 9 tokens."""
    rng = addressed_rng(0, "test batch", step, task)
    lengths = rng.integers(3, 10, 8)
    sentences = [rng.integers(0, SHAPE.vocab_size, length) for length in lengths]
    labels = rng.integers(0, list(TASKS.values())[task].classes, 8)
    return pack([sentences[row] for row in rows]), torch.from_numpy(labels[list(rows)])


def looked_up(step: int, present: Sequence[int], rows: Sequence[int]) -> Tensor:
    """What examples `rows` of these tasks look up."""
    return torch.cat([batch(step, task, rows)[0].ids_T for task in present])


def loss(built: MultiTaskModel, step: int, task: int, rows: Sequence[int], rank: int, dropout: float) -> Tensor:
    """Sum over the rows, divided by the size of the global batch."""
    packed, labels = batch(step, task, rows)
    generator = addressed_generator(CPU, 0, "dropout", step, rank, task) if dropout else None
    answers = built(list(TASKS)[task], packed, generator)
    return F.cross_entropy(answers, labels, reduction="sum") / 8


@dataclass(frozen=True)
class Case:
    """What is trained how; `phases` begins with steps on heads alone and ends with the encoder and one head."""

    zero: int = 1
    method: str = "pcgrad"
    dropout: float = 0.0
    clip: float = 1.0
    accumulation: int = 1
    weighting: str = "fixed"
    heads_only: tuple[int, ...] = ()
    phases: bool = False

    def tasks_of(self, step: int) -> list[int]:
        """Not every task trains in every step; TorchJD's FAMO knows no absent ones."""
        return [0, 1, 2] if step % 4 or self.weighting == "famo" else [0, 2]

    def rates(self, groups: Sequence[Group], step: int) -> list[float | None]:
        if self.phases and step < 6:
            return [None if group.task is None else 2 * group.lr for group in groups]
        if not self.phases or step < 14:
            return [group.lr for group in groups]
        return [group.lr if group.task in (None, "a") else None for group in groups]


def answers(built: nn.Module) -> Tensor:
    """What a model says to sentences that it is not trained on."""
    with torch.no_grad():
        return torch.cat([built(name, batch(STEPS, 0, range(8))[0]).flatten() for name in TASKS])


class Homoscedastic:
    """Kendall et al. 2018: Σ c·e^(−s)·L + s/2, an Adam for every s; task b counts as a regression."""

    def __init__(self) -> None:
        self.s = [torch.zeros((), requires_grad=True) for _ in TASKS]
        self.adams = [torch.optim.Adam([s], lr=0.05) for s in self.s]

    def factors(self, values: dict[int, Tensor]) -> list[float]:
        return [(0.5 if task == 1 else 1.0) * float((-self.s[task].detach()).exp()) for task in values]

    def learn(self, values: dict[int, Tensor], after: dict[int, Tensor]) -> None:
        for task, value in values.items():
            self.adams[task].zero_grad()
            ((0.5 if task == 1 else 1.0) * (-self.s[task]).exp() * value + self.s[task] / 2).backward()
            self.adams[task].step()


class Famo:
    """TorchJD's own."""

    def __init__(self) -> None:
        self.famo = torchjd.scalarization.FAMO(3)

    def factors(self, values: dict[int, Tensor]) -> list[float]:
        losses = torch.stack(list(values.values())).requires_grad_()
        return torch.autograd.grad(self.famo(losses), losses)[0].tolist()

    def learn(self, values: dict[int, Tensor], after: dict[int, Tensor]) -> None:
        self.famo.update(torch.stack(list(after.values())))


class Fixed:
    def factors(self, values: dict[int, Tensor]) -> list[float]:
        return [1.0 for _ in values]

    def learn(self, values: dict[int, Tensor], after: dict[int, Tensor]) -> None:
        pass


@dataclass
class Trained:
    """The weights and their average after `STEPS` steps, the answers of the average, and what each step tells."""

    last: dict[str, Tensor]
    average: dict[str, Tensor]
    answers: Tensor
    told: list[dict[str, Tensor]]


def reference(case: Case, world: int) -> Trained:
    """With dropout it plays the ranks in turn, without it sees the global batch at once."""
    built = model(case.dropout)
    parameters = dict(built.named_parameters())
    shared = [name for name in parameters if name.startswith("encoder.")]
    groups = parameter_groups(built, OPTIMIZER, tasks(case.dropout), SHAPE.layers)
    optimizers = [  # one AdamW per group: a head that sits a step out must not move
        torch.optim.AdamW([parameters[n] for n in group.names], weight_decay=group.weight_decay, eps=OPTIMIZER.eps)
        for group in groups
    ]
    surgery = Surgery(case.method, {}, 0)
    weighting = {"fixed": Fixed, "homoscedastic": Homoscedastic, "famo": Famo}[case.weighting]()
    course: list[dict[str, Tensor]] = []  # the weights after every step
    told: list[dict[str, Tensor]] = []
    placement = PLACEMENT[world] if case.dropout else [range(8)]

    def losses(step: int) -> dict[int, Tensor]:
        values = {
            task: sum(loss(built, step, task, part, rank, case.dropout) for rank, part in enumerate(placement))
            for task in case.tasks_of(step)
        }
        return {task: list(TASKS.values())[task].weight * value for task, value in values.items()}

    for step in range(STEPS):
        built.zero_grad()
        rates = case.rates(groups, step)
        frozen = all(rate is None for group, rate in zip(groups, rates, strict=True) if group.task is None)
        values = losses(step)
        known = {task: value.detach().clone() for task, value in values.items()}
        rows, through = [], []
        factors = weighting.factors(known)
        for (task, value), factor in zip(values.items(), factors, strict=True):
            (factor * value).backward()
            if not frozen and task not in case.heads_only:
                rows.append(torch.cat([parameters[n].grad.flatten() for n in shared]))
                through.append(task)
            for n in shared:
                parameters[n].grad = None
        moving = {n for group, rate in zip(groups, rates, strict=True) if rate is not None for n in group.names}
        heads = [p.grad for n, p in parameters.items() if n in moving.difference(shared) and p.grad is not None]
        combined, gram_MM = torch.zeros(0), torch.zeros(0, 0)
        if rows:
            rows_KP = torch.stack(rows)
            gram_MM = rows_KP @ rows_KP.T
            if case.method == "pcgrad":
                combined = pcgrad_vectors(rows_KP, task_orders(0, step, len(rows)), "sum")
            else:
                combined = surgery.weights(gram_MM, step, through) @ rows_KP
            pieces = combined.split([parameters[n].numel() for n in shared])
            for n, piece in zip(shared, pieces, strict=True):
                parameters[n].grad = piece.view_as(parameters[n]).clone()
        norm = torch.cat([combined, *[g.flatten() for g in heads]]).norm()
        weights_K = torch.tensor([list(TASKS.values())[task].weight for task in values])
        told.append(
            {
                "losses_K": torch.stack(list(known.values())) / weights_K,
                "factors_K": torch.tensor(factors) * weights_K,
                "gram_MM": gram_MM,
                "head_norm": torch.cat([torch.zeros(0), *[g.flatten() for g in heads]]).norm(),
                "norm": norm.clone(),
            }
        )
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, case.clip / float(norm)))
        for group, rate, optimizer in zip(groups, rates, optimizers, strict=True):
            if rate is not None and (group.task is None or list(TASKS).index(group.task) in case.tasks_of(step)):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
        with torch.no_grad():
            after = losses(step)
        weighting.learn(known, after)
        course.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    shares = torch.tensor([OPTIMIZER.ema ** (STEPS - 1 - step) for step in range(STEPS)])
    shares /= shares.sum()
    average = {
        name: sum(share * weights[name] for share, weights in zip(shares, course, strict=True)) for name in parameters
    }
    built.load_state_dict(average)
    return Trained(course[-1], average, answers(built), told)


OPTIONS = {"homoscedastic": {"lr": 0.05}}


Found = tuple[list[tuple[Span, dict[str, Tensor]]], Tensor, list[StepResult]]


def trained(rank: Rank, case: Case) -> Found:
    """What one rank's shards hold after the same steps through the engine, the average's answers, and what the steps
    told.

    In the middle the average answers, too, which must leave no trace.
    """
    built = model(case.dropout)
    config = EngineConfig(zero=case.zero, precision="fp32", clip_norm=case.clip, accumulation=case.accumulation)
    groups = parameter_groups(built, OPTIMIZER, tasks(case.dropout), SHAPE.layers)
    weighting = Weighting(case.weighting, OPTIONS.get(case.weighting, {}), [False, True, False], 0)
    engine = Engine(built, groups, weights_of(TASKS), config, OPTIMIZER, Surgery(case.method, {}, 0), rank, weighting)
    mine = PLACEMENT[rank.world][rank.rank]
    parts = [part.tolist() for part in np.array_split(np.array(mine, dtype=int), case.accumulation)]
    told = []
    for step in range(STEPS):
        losses = {
            task: [
                lambda task=task, part=part, step=step: loss(engine.model, step, task, part, rank.rank, case.dropout)
                for part in parts
            ]
            for task in case.tasks_of(step)
        }
        told_of = looked_up(step, case.tasks_of(step), mine) if step % 5 else None
        result = engine.step(step, losses, rates=case.rates(groups, step), heads_only=case.heads_only, word_ids=told_of)
        assert not result.skipped
        told.append(result)
        if step in (STEPS // 2, STEPS - 1):
            with engine.averaged():
                said = answers(engine.model)
    shards = [(span, {name: state.clone() for name, state in states.items()}) for span, states in engine.state()]
    return shards, said, told


def worst_difference(expected: dict[str, Tensor], shards: list[list[tuple[Span, Tensor]]]) -> float:
    seen = {name: torch.zeros(parameter.numel()) for name, parameter in expected.items()}
    worst = 0.0
    for span, values in [entry for shard in shards for entry in shard]:
        seen[span.name][span.start : span.stop] += 1
        worst = max(worst, float((expected[span.name].flatten()[span.start : span.stop] - values).abs().max()))
    assert all(bool((count == 1).all()) for count in seen.values()), "the shards do not tile the parameters"
    return worst


CASES = [
    Case(1, "sum"),
    Case(1, "mgda"),
    Case(1, clip=0.5),
    Case(1, dropout=0.1),
    Case(1, accumulation=3, clip=1e9),
    Case(1, weighting="homoscedastic", heads_only=(1,), phases=True),
    Case(1, clip=0.1, phases=True),
    Case(1, weighting="famo"),
    Case(3, dropout=0.1),
    Case(3, heads_only=(2,)),  # the last of the step, whose backward is the last that DeepSpeed sees
    Case(3, "mgda"),
    Case(3, accumulation=2, clip=1e9),
    Case(3, weighting="homoscedastic", heads_only=(1,), phases=True),
]
FOR_FOUR_RANKS = CASES[:-3]
"""ZeRO-3 gathers weights layer by layer, which takes four ranks on two cores half a minute a case: two of them do."""


def all_cases(rank: Rank, cases: list[Case]) -> list[Found]:
    return [trained(rank, case) for case in cases]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2, 4])
def test_parameters_equal_the_plain_reference(ranks: Ranks, world: int) -> None:
    """20 AdamW steps; with dropout off the reference sees the global batch at once, so all numbers of ranks agree."""
    cases = FOR_FOUR_RANKS if world == 4 else CASES
    found = ranks(world, all_cases, cases)  # one start of DeepSpeed for all
    worst = {}
    for number, case in enumerate(cases):
        expected = reference(case, world)
        shards, said, told = zip(*[each[number] for each in found], strict=True)
        for state, weights in (("master", expected.last), ("average", expected.average)):
            pieces = [[(span, states[state]) for span, states in shard] for shard in shards]
            worst[state, case] = worst_difference(weights, pieces)
        worst["answers", case] = max(float((each - expected.answers).abs().max()) for each in said)
        for results in told:
            for step, (result, wanted) in enumerate(zip(results, expected.told, strict=True)):
                for name, value in wanted.items():
                    ours = torch.as_tensor(getattr(result, name)).float()
                    assert torch.allclose(ours, value.float(), rtol=1e-4, atol=1e-5), (case, step, name)
    assert max(worst.values()) < 2e-6, {key: value for key, value in worst.items() if value >= 2e-6}


def engine_of(rank: Rank, method: str = "sum", kinds: dict[str, TaskConfig] = TASKS, **settings: object) -> Engine:
    """An engine in its first state, dropout off."""
    built = MultiTaskModel(SHAPE, EncoderConfig(dropout=0.0), kinds, seed=3)
    config = EngineConfig(**{"precision": "fp32", "clip_norm": None, **settings})
    groups = parameter_groups(built, OPTIMIZER, kinds, SHAPE.layers)
    return Engine(built, groups, weights_of(kinds), config, OPTIMIZER, Surgery(method, {}, 0), rank)


def one_step(
    engine: Engine, rank: Rank, step: int = 0, spoilt: int | None = None, told_of: Tensor | None = None
) -> StepResult:
    """A step on all three tasks; `spoilt` turns that task's loss into NaN on the last rank only."""
    mine = PLACEMENT[rank.world][rank.rank]
    bad = float("nan") if rank.rank == rank.world - 1 else 1.0

    def build(task: int) -> Tensor:
        value = loss(engine.model, step, task, mine, rank.rank, 0.0)
        return value * bad if task == spoilt else value

    return engine.step(step, {task: [lambda task=task: build(task)] for task in range(3)}, word_ids=told_of)


def masters(engine: Engine) -> Tensor:
    return torch.cat([tensors["master"].clone() for _, tensors in engine.state()])


# ------------------------------------------------------------------------------------------ no task may go missing


def first_moments(rank: Rank, zero: int) -> list[tuple[Span, Tensor]]:
    engine = engine_of(rank, zero=zero)
    one_step(engine, rank)
    return [(span, tensors["exp_avg"].clone()) for span, tensors in engine.state()]


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [1, 3])
def test_every_task_gradient_counts_once(ranks: Ranks, zero: int) -> None:
    """DeepSpeed keeps only the last of several backwards unless it is kept from it: after one step AdamW's first moment
    is (1 − β₁) times the sum of the task gradients, so each one's coefficient can be solved for."""
    built = MultiTaskModel(SHAPE, EncoderConfig(dropout=0.0), TASKS, seed=3)
    shared = {name: p for name, p in built.named_parameters() if name.startswith("encoder.")}
    rows = []
    for task, config in enumerate(TASKS.values()):
        value = config.weight * loss(built, 0, task, range(8), 0, 0.0)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(shared.values()))]))
    places = dict(zip(shared, np.cumsum([0, *[p.numel() for p in shared.values()]]), strict=False))
    moment = torch.zeros(sum(p.numel() for p in shared.values()))
    for shard in ranks(2, first_moments, zero):
        for span, values in shard:
            if span.name in places:
                moment[places[span.name] + span.start : places[span.name] + span.stop] = values
    gradient = moment / (1 - OPTIMIZER.betas[0])
    coefficients = torch.linalg.lstsq(torch.stack(rows).T.double(), gradient[:, None].double()).solution.squeeze()
    told = dict(zip(TASKS, coefficients.tolist(), strict=True))
    assert torch.allclose(coefficients, torch.ones(3, dtype=torch.float64), atol=1e-4), (
        f"how often each task's gradient arrived in the optimizer: {told}; this DeepSpeed treats gradients differently"
    )


def nothing_to_train(rank: Rank, zero: int) -> list[bool]:
    """Whether each step moved weights: over a frozen encoder a head without parameters alone, as the first step and
    after another one, which trains a head with some; then all that a task has."""
    pair = {"kind": "pair_regression", "columns": {"text": ["one", "two"]}, "head": {"kind": "cosine", "dropout": 0}}
    engine = engine_of(rank, kinds={"a": TASKS["a"], "pair": TaskConfig(train="-", dev="-", **pair)}, zero=zero)
    mine = PLACEMENT[rank.world][rank.rank]

    def build(task: int) -> Tensor:
        packed, labels = batch(0, 0, mine if task == 0 else [*mine, *reversed(mine)])
        if task == 0:
            return F.cross_entropy(engine.model("a", packed), labels, reduction="sum") / 8
        return F.mse_loss(engine.model("pair", packed), labels[: len(mine)].float(), reduction="sum") / 8

    moved = []
    for step, (present, frozen) in enumerate([([1], True), ([0, 1], True), ([1], True), ([0, 1], False)]):
        before = masters(engine)
        rates = [None if frozen and group.task is None else group.lr for group in engine.groups]
        result = engine.step(step, {task: [lambda task=task: build(task)] for task in present}, rates=rates)
        assert not result.skipped
        moved.append(not torch.equal(masters(engine), before))
    return moved


def weighs_nothing(rank: Rank, zero: int) -> list[bool]:
    """Whether each step moved weights: on a task of λ = 0 alone, before and after one on a task that counts."""
    engine = engine_of(rank, kinds={**TASKS, "a": TASKS["a"].model_copy(update={"weight": 0.0})}, zero=zero)
    mine = PLACEMENT[rank.world][rank.rank]
    moved = []
    for step, task in enumerate((0, 1, 0)):
        before = masters(engine)
        losses = {task: [lambda task=task, step=step: loss(engine.model, step, task, mine, rank.rank, 0.0)]}
        assert not engine.step(step, losses).skipped
        moved.append(not torch.equal(masters(engine), before))
    return moved


def heads_first(rank: Rank, zero: int) -> tuple[bool, bool]:
    """Whether the encoder and the heads move in a first step that leaves the encoder alone. Memory that nobody has
    written to is NaN here, as it may be anywhere."""
    torch.use_deterministic_algorithms(True)
    engine = engine_of(rank, zero=zero)
    before = [tensors["master"].clone() for _, tensors in engine.state()]
    rates = [None if group.task is None else group.lr for group in engine.groups]
    mine = PLACEMENT[rank.world][rank.rank]
    losses = {task: [lambda task=task: loss(engine.model, 0, task, mine, rank.rank, 0.0)] for task in range(3)}
    assert not engine.step(0, losses, rates=rates).skipped
    moved = {True: False, False: False}
    for (span, tensors), old in zip(engine.state(), before, strict=True):
        moved[span.name.startswith("encoder.")] |= not torch.equal(tensors["master"], old)
    torch.use_deterministic_algorithms(False)
    return moved[True], moved[False]


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [1, 3])
def test_heads_alone_can_come_first(ranks: Ranks, zero: int) -> None:
    assert ranks(2, heads_first, zero) == [(False, True)] * 2


def famo_after_an_overflow(rank: Rank) -> tuple[bool, bool]:
    """A loss that overflows with the new weights costs what would be learnt from it, nothing else."""
    engine = engine_of(rank)
    engine.weighting = Weighting("famo", {}, [False] * 3, 0)
    mine = PLACEMENT[rank.world][rank.rank]

    def build(task: int) -> Tensor:
        value = loss(engine.model, 0, task, mine, rank.rank, 0.0)
        return value if torch.is_grad_enabled() or task else value * math.inf

    before = {name: value.clone() for name, value in engine.weighting.state_dict().items()}
    result = engine.step(0, {task: [lambda task=task: build(task)] for task in range(3)})
    same = all(torch.equal(value, before[name]) for name, value in engine.weighting.state_dict().items())
    return result.skipped, same


@pytest.mark.ranks
def test_famo_learns_nothing_from_a_loss_that_is_not_finite(ranks: Ranks) -> None:
    assert ranks(2, famo_after_an_overflow) == [(False, True)] * 2


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [1, 3])
def test_a_step_without_a_backward_changes_nothing(ranks: Ranks, zero: int) -> None:
    assert ranks(2, nothing_to_train, zero) == [[False, True, False, True]] * 2


@pytest.mark.parametrize("zero", [1, 3])
def test_a_task_that_weighs_nothing_moves_nothing(ranks: Ranks, zero: int) -> None:
    """Neither decay nor what is left of the momentum."""
    assert ranks(2, weighs_nothing, zero) == [[False, True, False]] * 2


# ----------------------------------------------------------------------------------------------- bad numbers, bf16


def spoilt_steps(rank: Rank, zero: int) -> tuple[StepResult, bool, StepResult]:
    engine = engine_of(rank, "pcgrad", zero=zero)
    before = masters(engine)
    bad = one_step(engine, rank, spoilt=1, told_of=looked_up(0, range(3), range(8)))
    unchanged = bool((masters(engine) == before).all()) and engine.steps_taken() == [0] * len(engine.groups)
    return bad, unchanged, one_step(engine, rank, step=1)


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [1, 3])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks: Ranks, zero: int) -> None:
    for bad, unchanged, after in ranks(2, spoilt_steps, zero):
        assert bad.skipped and unchanged
        assert torch.isnan(bad.losses_K).tolist() == [False, True, False]
        assert not after.skipped and math.isfinite(after.norm)


def in_bf16(rank: Rank, zero: int, accumulation: int) -> tuple[bool, float]:
    built = MultiTaskModel(SHAPE, EncoderConfig(dropout=0.0), TASKS, seed=3)
    start = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    groups = parameter_groups(built, OPTIMIZER, TASKS, SHAPE.layers)
    config = EngineConfig(precision="bf16", zero=zero, accumulation=accumulation)
    engine = Engine(built, groups, weights_of(TASKS), config, OPTIMIZER, Surgery("pcgrad", {}, 0), rank)
    exact = all(
        bool((tensors["master"] == start[span.name].flatten()[span.start : span.stop]).all())
        for span, tensors in engine.state()
    )
    assert engine.dtype == next(engine.model.parameters()).dtype == torch.bfloat16
    losses = []
    mine = PLACEMENT[rank.world][rank.rank]
    parts = [mine[number::accumulation] for number in range(accumulation)]
    for step in range(STEPS):
        builders = {
            k: [lambda k=k, part=part: loss(engine.model, 0, k, part, rank.rank, 0.0) for part in parts]
            for k in range(3)
        }
        told_of = looked_up(0, range(3), mine) if step % 2 else None
        losses.append(float(engine.step(step, builders, word_ids=told_of).losses_K.sum()))
    return exact, losses[-1] / losses[0]


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "accumulation"), [(1, 1), (1, 2), (3, 1)])
def test_bf16_starts_from_exact_masters_and_learns(ranks: Ranks, zero: int, accumulation: int) -> None:
    for exact, ratio in ranks(2, in_bf16, zero, accumulation):
        assert exact, "the fp32 masters were cloned from weights already rounded to bf16"
        assert ratio < 0.95


# ----------------------------------------------------------------------------------------- what travels, what is held


def counted(rank: Rank, narrowed: bool) -> tuple[int, int, dict[str, int]]:
    """Shared and all parameters, and the numbers given to each kind of message and collective in one step."""
    engine = engine_of(rank, "pcgrad")
    one_step(engine, rank)
    told_of = looked_up(1, range(3), PLACEMENT[rank.world][rank.rank]) if narrowed else None
    with torch.profiler.profile(record_shapes=True) as profile:
        one_step(engine, rank, step=1, told_of=told_of)
    given: dict[str, int] = {}
    for event in profile.events():
        if event.name == "gloo:send" or event.name.startswith("c10d::"):
            numbers = max((int(np.prod(shape)) for shape in event.input_shapes if shape), default=0)
            given[event.name] = given.get(event.name, 0) + numbers
    parameters = dict(engine.model.named_parameters())
    shared = sum(p.numel() for name, p in parameters.items() if name.startswith("encoder."))
    return shared, sum(p.numel() for p in parameters.values()), given


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("narrowed", [False, True])
def test_numbers_on_the_wire(ranks: Ranks, world: int, narrowed: bool) -> None:
    """Of each of K task gradients the other ranks' pieces, the parameters once by all-gather: (K + 1)·P·(W − 1)/W
    numbers sent per rank, as an all-gather sends n·(W − 1)/W of n; of words that no rank looks up, where that is known,
    the latter alone. Heads travel once, groups are padded to 2·W, and rows on the border of two shards go to both."""
    unmet = SHAPE.vocab_size - len(looked_up(1, range(3), range(8)).unique())
    assert unmet > SHAPE.vocab_size / 3
    needed = everyone = 0.0
    for shared, total, given in ranks(world, counted, narrowed):
        padding = 2 * world * 20
        needed += 3 * (shared - narrowed * unmet * SHAPE.hidden_size) + total - shared
        sent = given.pop("gloo:send") * world / (world - 1)
        assert narrowed or 3 * shared + total - shared <= sent <= 3 * shared + total - shared + 3 * padding
        everyone += sent
        assert total <= given.pop("c10d::_allgather_base_") <= total + padding
        messages = {"c10d::send", "c10d::recv_"}
        assert set(given) - messages == {"c10d::allreduce_"}, "besides, all-reduces of what ranks agree on"
    assert needed <= everyone <= needed + 3 * world * padding


def messages(rank: Rank) -> str:
    """Of a step: b where an exchange begins, w where the host waits for a message."""
    engine = engine_of(rank, "pcgrad")
    one_step(engine, rank)
    seen = []

    class Watched:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            seen.append("w")
            self.work.wait()

    begin = dist.batch_isend_irecv

    def watched(operations: list[dist.P2POp]) -> list[Watched]:
        seen.append("b")
        return [Watched(work) for work in begin(operations)]

    dist.batch_isend_irecv = watched
    one_step(engine, rank, step=1)
    return "".join(seen)


@pytest.mark.ranks
def test_all_heads_travel_before_one_is_waited_for(ranks: Ranks) -> None:
    """Of three tasks, each with two groups: weight decay or none; the encoder has the table of words besides."""
    for seen in ranks(2, messages):
        assert re.fullmatch(r"bbb(w+bbb){2}b{6}w+", seen), seen


class OnGpu(Tensor):
    """On a CPU, and says otherwise."""

    is_cuda = True


def one_exchange(rank: Rank, gpu: bool) -> tuple[int, bool]:
    """Messages of an exchange of rows of so many numbers that gloo gets them in pieces; whether all arrived."""
    size, given = 3 << 18, []
    sent_WS = torch.arange(rank.world * size).view(rank.world, size) * (rank.rank + 1)
    received = torch.zeros(rank.world - 1, size, dtype=torch.int64)
    begin = dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda operations: given.extend(operations) or begin(operations)
    for work in exchange(received.as_subclass(OnGpu) if gpu else received, sent_WS.unbind()):
        work.wait()
    mine = torch.arange(rank.rank * size, (rank.rank + 1) * size)
    others = [other for other in range(rank.world) if other != rank.rank]
    right = all(torch.equal(row, mine * (other + 1)) for row, other in zip(received, others, strict=True))
    return len(given), right


@pytest.mark.ranks
@pytest.mark.parametrize(("gpu", "pieces"), [(False, 2), (True, 1)])
def test_pieces_are_for_gloo_alone(ranks: Ranks, gpu: bool, pieces: int) -> None:
    """NCCL launches a large group of messages part by part, which may hang."""
    assert ranks(3, one_exchange, gpu) == [(2 * 2 * pieces, True)] * 3


def uneven_exchange(rank: Rank) -> bool:
    """Whether all arrived where every rank has another share, one of them nothing."""
    piece, zero._PIECE = zero._PIECE, 4
    sizes = [9, 0, 3]
    starts = np.cumsum([0, *sizes])
    sent = [torch.arange(first, first + size) * (rank.rank + 1) for first, size in zip(starts, sizes, strict=False)]
    received = torch.zeros(rank.world - 1, sizes[rank.rank], dtype=torch.int64)
    for work in exchange(received, sent):
        work.wait()
    zero._PIECE = piece
    mine = torch.arange(starts[rank.rank], starts[rank.rank + 1])
    others = [other for other in range(rank.world) if other != rank.rank]
    return all(torch.equal(row, mine * (other + 1)) for row, other in zip(received, others, strict=True))


@pytest.mark.ranks
def test_ranks_exchange_pieces_of_unequal_size(ranks: Ranks) -> None:
    assert ranks(3, uneven_exchange) == [True] * 3


def untold(rank: Rank) -> str:
    engine = engine_of(rank)
    try:
        one_step(engine, rank, told_of=looked_up(0, range(2), range(8)))
    except IndexError as error:
        return str(error)
    return "nothing"


@pytest.mark.ranks
def test_a_word_that_the_step_was_not_told_of_is_an_error(ranks: Ranks) -> None:
    """It has no row where the gradients go; to leave it out would train something else."""
    assert ranks(1, untold) == ["index out of range in self"]


def deepspeed_s_own(rank: Rank) -> tuple[str, int]:
    """The device that DeepSpeed makes the current one, whatever a launcher left in the variable, and how often steps
    and evaluations have the host wait for the device; a CPU is never waited for, so the call is what counts."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    waits: list[object] = []
    CPU_Accelerator.synchronize = lambda *_: waits.append(None)
    os.environ["LOCAL_RANK"] = "7"
    engine = engine_of(rank)
    before = len(waits)
    for step in range(4):
        one_step(engine, rank, step)
    return os.environ["LOCAL_RANK"], len(waits) - before


@pytest.mark.ranks
def test_deepspeed_takes_our_device_and_does_not_wait_for_it(ranks: Ranks) -> None:
    assert ranks(1, deepspeed_s_own) == [("0", 0)]


def held(rank: Rank, tasks: int) -> tuple[int, int]:
    """Numbers in all live tensors after a step on so many tasks, and shared parameters."""
    kinds = {f"t{k}": TASKS["a"] for k in range(tasks)}
    engine = engine_of(rank, "pcgrad", kinds)
    mine = PLACEMENT[rank.world][rank.rank]

    def build(task: int) -> Tensor:
        packed, labels = batch(0, 0, mine)
        return F.cross_entropy(engine.model(f"t{task}", packed), labels, reduction="sum") / 8

    engine.step(0, {k: [lambda k=k: build(k)] for k in range(tasks)})
    gc.collect()
    alive = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in alive}
    return sum(sizes.values()), sum(p.numel() for n, p in engine.model.named_parameters() if n.startswith("encoder."))


@pytest.mark.ranks
def test_a_further_task_costs_a_shard_and_no_more(ranks: Ranks) -> None:
    """No rank keeps a whole task gradient: from 3 to 7 tasks, memory grows by 4 shards of P/W and 4 small heads."""
    few, many = ranks(2, held, 3), ranks(2, held, 7)
    for (with_few, shared), (with_many, _) in zip(few, many, strict=True):
        growth = (with_many - with_few) / 4
        assert shared / 2 <= growth < 0.75 * shared


# ----------------------------------------------------------------------------------------------------- Gram space


@pytest.mark.parametrize("columns", [1, 1000, (1 << 18) + 5])
def test_gram_and_combination_equal_the_obvious(columns: int) -> None:
    shards_KS = torch.empty(4, columns).normal_(generator=torch.Generator().manual_seed(0))
    weights_K = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out = torch.empty(columns)
    combine(shards_KS, weights_K, out)
    wide = shards_KS.double()
    norm_K = wide.norm(dim=1)
    assert ((gram(shards_KS) - wide @ wide.T).abs() <= 1e-6 * torch.outer(norm_K, norm_K)).all()
    assert torch.allclose(out.double(), weights_K.double() @ wide, atol=1e-5)


def test_groups_layer_decay_and_weight_decay() -> None:
    decaying = OPTIMIZER.model_copy(update={"layer_decay": 0.8})
    groups = parameter_groups(model(0.0), decaying, TASKS, SHAPE.layers)
    found = {name: group for group in groups for name in group.names}
    assert [group.task for group in groups] == sorted([g.task for g in groups], key=lambda task: task is not None)
    assert found["encoder.pooler.weight"].lr == found["encoder.layers.1.up.weight"].lr == 1e-3
    assert found["encoder.layers.0.up.weight"].lr == pytest.approx(0.8e-3)
    assert found["encoder.words.weight"].lr == pytest.approx(0.64e-3)
    assert found["encoder.norm.weight"].lr == pytest.approx(0.64e-3)
    assert found["heads.a.output.weight"].lr == 3e-3 and found["heads.c.output.weight"].lr == 2e-3
    for name, group in found.items():
        spared = name.endswith("bias") or "norm" in name
        assert group.weight_decay == (0.0 if spared else 0.1), name
    assert set(found) == {name for name, _ in model(0.0).named_parameters()}


def test_deepspeed_brings_no_compiler() -> None:
    """Nothing here is compiled, and importing what could do it, or asking whether it could, takes seconds of every
    start; the answers are printed."""
    code = "import sys; from mtbert.zero import quiet_deepspeed\nwith quiet_deepspeed(): print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "deepspeed.runtime.zero.muon.original_muon" in modules and "torch._inductor.compile_fx" not in modules
    assert "deepspeed.ops.op_builder.all_ops" not in modules
