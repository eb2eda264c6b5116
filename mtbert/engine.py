"""A training step: task gradients as ZeRO shards, their Gram matrix, the combination, the optimizer.

    K losses → K backwards → K shards of reduced gradients → G = S Sᵀ (one all-reduce of K² numbers)
             → weighting: K factors f → surgery on f_i·f_j·G_ij: K weights w → Σ w_k·f_k·S_k → DeepSpeed's step

Shapes: K tasks in the step, M of them reach the encoder, P encoder parameters, W ranks, S = P/W numbers of a rank's
shard.

A rank holds a whole task gradient only during that task's backward (and the next one's, while it travels). The encoder
gets surgery; what heads are made of gets the gradients of the tasks that use it, times their factors, summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtbert.config import ENCODER, EngineConfig, OptimizerConfig, SharedLayerConfig, TaskConfig
from mtbert.ranks import choose_precision, local_device, lowest_common
from mtbert.runs import Rank
from mtbert.surgery import Surgery
from mtbert.weighting import Weighting
from mtbert.zero import Host, Loss, Own, Span, Stage1, Stage3, initialise_deepspeed


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate and weight decay.

    `task` None: the encoder, shared by all tasks and so under surgery. Else the head of this task, or the layer of this
    name that the heads of some tasks have in common: it gets the gradients of its `users`, summed, as they are.
    """

    task: str | None
    names: tuple[str, ...]
    lr: float
    weight_decay: float
    users: tuple[str, ...] = ()
    layer_scale: float = 1.0  # what `layer_decay` makes of the encoder's rate here; part of `lr`

    @property
    def part(self) -> str:
        """Its name in `phases[].trainable`."""
        return self.task or ENCODER


WORDS = "encoder.words.weight"
"""The parameter that is a group of its own, for a step may train some of its rows only."""

STATES = ("master", "exp_avg", "exp_avg_sq", "average")
"""What belongs to every element of a parameter: the fp32 weight, AdamW's moments, the average of the weights."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank. All on the CPU."""

    tasks: tuple[int, ...]
    losses_K: Tensor  # fp64; without λ
    factors_K: Tensor  # fp64; what each task's gradients were multiplied by: λ times the factor of `weighting`
    through: tuple[int, ...]  # the tasks that reach the encoder
    gram_MM: Tensor  # fp64; of their gradients there, factors included
    weights_M: Tensor  # fp32; what surgery multiplied these by, NaN in a skipped step
    head_norm: float  # of all heads' gradients together
    norm: float  # of the combined gradient, before clipping
    skipped: bool  # a loss or gradient was not finite: nothing was updated
    stop: bool  # at least one rank wants to stop
    save: bool  # at least one rank wants a checkpoint


def parameter_groups(
    model: nn.Module,
    config: OptimizerConfig,
    tasks: Mapping[str, TaskConfig],
    layers: int,
    shared_layers: Mapping[str, SharedLayerConfig] | None = None,
) -> list[Group]:
    """The encoder's groups first, of these the table of words last and alone, then those of heads and of layers that
    heads share. Weight decay spares biases and LayerNorm (everything with one dimension).

    With `layer_decay` d the embeddings get lr·d^layers, layer i lr·d^(layers − 1 − i), what lies above it lr.
    """
    own_rates = {name: task.head.lr for name, task in tasks.items()}
    own_rates |= {name: layer.lr for name, layer in (shared_layers or {}).items()}
    members: dict[tuple[str | None, bool, float, float], list[str]] = {}
    key: tuple[str | None, bool, float, float]
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        if parts[0] in ("heads", "shared"):
            key = (parts[1], False, 1.0, decay)
        else:
            key = (None, name == WORDS, config.layer_decay ** _depth_below_top(parts, layers), decay)
        members.setdefault(key, []).append(name)
    groups = []
    for key in sorted(members, key=lambda key: (key[0] is not None, key[1])):
        (part, _, scale, decay), names = key, members[key]
        if part is None:
            groups.append(Group(None, tuple(names), config.lr * scale, decay, layer_scale=scale))
            continue
        own_lr = own_rates[part]
        users = tuple(name for name, task in tasks.items() if part in (name, task.head.shared))
        groups.append(Group(part, tuple(names), config.head_lr if own_lr is None else own_lr, decay, users))
    return groups


def _depth_below_top(parts: Sequence[str], layers: int) -> int:
    if "layers" in parts:
        return layers - 1 - int(parts[parts.index("layers") + 1])
    return 0 if "pooler" in parts else layers  # the embeddings and their LayerNorm


class Engine:
    """DeepSpeed around the model, with one gradient shard per task. Made on every rank of a process group.

    Args:
        model: with the weights to start from, on the CPU, the same on every rank; moved, cast and changed in place.
            Its `encoder.words` is a `WordEmbedding`.
        groups: from `parameter_groups`.
        loss_weights: λ of every task by its name; tasks are numbered in this order.
        config, optimizer: of these sections of a configuration; the learning rates are those of `groups`.
        surgery: on the gradients of the encoder.
        rank: this process.
        weighting: of the tasks' losses, after λ; none unless given.

    Raises `UserError` where this rank's GPU cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        loss_weights: Mapping[str, float],
        config: EngineConfig,
        optimizer: OptimizerConfig,
        surgery: Surgery,
        rank: Rank,
        weighting: Weighting | None = None,
    ) -> None:
        self.groups = list(groups)
        self.tasks = list(loss_weights)
        self.loss_weights = torch.tensor(list(loss_weights.values()), dtype=torch.float64)
        self.surgery = surgery
        self.weighting = weighting or Weighting("fixed", {}, [False] * len(self.tasks), 0)
        self.clip_norm = config.clip_norm
        self.device = local_device(rank)
        self.dtype = lowest_common(choose_precision(config.precision, self.device), self.device)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        masters = {name: value.detach().float().clone() for name, value in model.named_parameters()}
        deepspeed = initialise_deepspeed(
            model, [(g.names, g.lr, g.weight_decay) for g in self.groups], config, optimizer, self.dtype, self.device
        )
        self.model = deepspeed.module
        users = {
            index: [number for number, task in enumerate(self.tasks) if task in group.users]
            for index, group in enumerate(self.groups)
            if group.task is not None
        }
        self._host: Host = (
            Stage1(deepspeed, users, config.accumulation, self.model.encoder.words)
            if config.zero == 1
            else Stage3(deepspeed, users)
        )
        parameters = dict(self.model.named_parameters())
        self._encoder = [parameters[name] for group in self.groups if group.task is None for name in group.names]
        self.partitions = self._host.partitions
        self.ema = optimizer.ema
        self.averaged_steps = 0  # steps in the average
        self._averages = [torch.zeros_like(p.master.data) for p in self.partitions] if self.ema else []
        self._combined = torch.zeros(self._host.columns, device=self.device)
        self.set_masters(lambda span: masters[span.name].flatten()[span.start : span.stop])

    @property
    def gradient_bytes(self) -> int:
        """What this rank holds for the tasks' gradients of the encoder: shards and what is on its way."""
        return self._host.gradient_bytes

    # --------------------------------------------------------------------------------------------- a step

    def step(
        self,
        step: int,
        losses: Mapping[int, Sequence[Loss]],
        rates: Sequence[float | None] | None = None,
        heads_only: Collection[int] = (),
        epoch: int = 0,
        rate_factor: float = 1.0,
        stop: bool = False,
        save: bool = False,
        word_ids: Tensor | None = None,
    ) -> StepResult:
        """One optimizer step. Collective: all ranks pass the same arguments but for the losses, `word_ids`, `stop`
        and `save`.

        Args:
            step: its number; what methods that draw, or go by time, are told.
            losses: task number → micro-batches, of each task of this step; as many on all ranks.
            rates: learning rate of every group, None for a group that is frozen; default: each group's own. Where the
                encoder is frozen, no gradient is computed for it, and surgery rests.
            heads_only: tasks whose loss trains their heads and does not reach the encoder.
            epoch: for weightings that go by epochs.
            rate_factor: the schedule's part of `rates`, for what the weighting learns.
            stop, save: this rank wants to stop, or a checkpoint; the answer says whether any does.
            word_ids: of all words that the losses look up on this rank, int64, on its device; given on all ranks or
                none. Then only their rows of the table of words have gradients that travel and that surgery works on
                (stage 1). None: any may be looked up. A word that no rank told of is an `IndexError` on CPUs.
        """
        rates = [group.lr for group in self.groups] if rates is None else rates
        tasks = tuple(losses)
        frozen = all(rate is None for group, rate in zip(self.groups, rates, strict=True) if group.task is None)
        through = () if frozen else tuple(task for task in tasks if task not in heads_only)
        self._host.begin(len(through), word_ids)
        values = [self._backward(task, through, losses[task]) for task in tasks]
        shards, own = self._host.shards()
        still = {number for number, partition in enumerate(self.partitions) if rates[partition.group] is None}
        own = {task: {n: piece for n, piece in pieces.items() if n not in still} for task, pieces in own.items()}
        gram_MM, head_gram_KK, losses_K, stop, save = self._agree(tasks, shards, own, values, stop, save)
        lambda_K = self.loss_weights[list(tasks)]
        factors_K = lambda_K * self.weighting.factors(lambda_K * losses_K, tasks, step, epoch)
        factors_M = factors_K[[tasks.index(task) for task in through]]
        gram_MM *= torch.outer(factors_M, factors_M)
        head_square = float(factors_K @ head_gram_KK @ factors_K)
        weights_M = torch.full((len(through),), math.nan)
        norm = math.nan
        # in fp32, which surgery works in: what overflows there is not finite either
        if gram_MM.float().isfinite().all() and losses_K.isfinite().all() and math.isfinite(head_square):
            weights_M = self.surgery.weights(gram_MM.float(), step, through) if through else weights_M
            norm = math.sqrt(max(float(weights_M.double() @ gram_MM @ weights_M.double()), 0.0) + max(head_square, 0.0))
        if math.isfinite(norm):
            scale = min(1.0, self.clip_norm / norm) if self.clip_norm and norm > 0 else 1.0
            self._set_rates(rates, tasks, through)
            self._apply(shards, own, weights_M * factors_M * scale, dict(zip(tasks, factors_K * scale, strict=True)))
            self._average()
            after_K = self._losses_after(losses) if self.weighting.wants_losses_after else None
            after_K = None if after_K is None else lambda_K * after_K
            if after_K is None or after_K.isfinite().all():
                self.weighting.learn(lambda_K * losses_K, tasks, step, epoch, rate_factor, after_K)
        return StepResult(
            tasks=tasks,
            losses_K=losses_K,
            factors_K=factors_K,
            through=through,
            gram_MM=gram_MM,
            weights_M=weights_M,
            head_norm=math.sqrt(head_square) if head_square >= 0 else math.nan,
            norm=norm,
            skipped=not math.isfinite(norm),
            stop=stop,
            save=save,
        )

    def _backward(self, task: int, through: Sequence[int], losses: Sequence[Loss]) -> Tensor:
        """The task's loss on this rank; still on the device, so that nothing waits for it here."""
        if task in through:
            return self._host.backward(task, through.index(task), losses)
        for parameter in self._encoder:  # then autograd neither keeps nor computes anything below the heads
            parameter.requires_grad_(False)
        try:
            return self._host.backward(task, None, losses)
        finally:
            for parameter in self._encoder:
                parameter.requires_grad_(True)

    def _agree(
        self,
        tasks: Sequence[int],
        shards: Sequence[Tensor],
        own: Mapping[int, Own],
        values: Sequence[Tensor],
        stop: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
        """Everything ranks must know of each other after the backwards, in one all-reduce of M² + K² + K + 2 numbers
        (fp64)."""
        wide, deep = len(shards[0]), len(tasks)
        message = torch.cat(
            [
                torch.stack([gram(piece_MS) for piece_MS in shards]).sum(0).flatten(),
                _own_gram([own[task] for task in tasks], self.device).flatten(),
                torch.stack(list(values)).double(),
                torch.tensor([stop, save], dtype=torch.float64, device=self.device),
            ]
        )
        dist.all_reduce(message)
        gram_MM, head_gram_KK, losses_K, wishes = message.cpu().split([wide**2, deep**2, deep, 2])
        return gram_MM.view(wide, wide), head_gram_KK.view(deep, deep), losses_K, bool(wishes[0]), bool(wishes[1])

    def _set_rates(self, rates: Sequence[float | None], tasks: Sequence[int], through: Sequence[int]) -> None:
        pulling = [task for task in tasks if self.loss_weights[task] > 0]
        present = {self.tasks[task] for task in pulling}
        for group, rate, values in zip(self.groups, rates, self._host.options, strict=True):
            values["lr"] = rate or 0.0
            # what no task of this step trains must not fade or decay
            idle = not set(pulling) & set(through) if group.task is None else present.isdisjoint(group.users)
            values["frozen"] = rate is None or idle

    def _apply(
        self, shards: Sequence[Tensor], own: Mapping[int, Own], weights_M: Tensor, factors: Mapping[int, Tensor]
    ) -> None:
        sizes = [piece_MS.shape[1] for piece_MS in shards]
        encoder = self._combined[: sum(sizes)].split(sizes)
        for piece_MS, out in zip(shards, encoder, strict=True):
            if len(weights_M):
                combine(piece_MS, weights_M.float(), out=out)
        heads = []
        for number, partition in enumerate(self.partitions):
            if self.groups[partition.group].task is None:
                continue
            gradient = torch.zeros(partition.master.numel(), device=self.device)
            for task, pieces in own.items():
                if number in pieces:
                    gradient.add_(pieces[number], alpha=float(factors[task]))
            heads.append(gradient)
        self._host.apply(encoder, heads)

    def _losses_after(self, losses: Mapping[int, Sequence[Loss]]) -> Tensor:
        """The losses of this step's batches with the updated weights, over all ranks (K,)."""
        with torch.no_grad():
            values_K = torch.stack([torch.stack([loss() for loss in parts]).sum() for parts in losses.values()])
        values_K = values_K.double()
        dist.all_reduce(values_K)
        return values_K.cpu()

    # ---------------------------------------------------------------------------------- the average of the weights

    def _average(self) -> None:
        """Take this step's weights θ_t into the average: Σ_s β^(t−s) θ_s / Σ_s β^(t−s) over the steps s = 1 … t.

        That is the moving average m_t = β·m_(t−1) + (1−β)·θ_t with Adam's bias correction m_t / (1−β^t) (Kingma and
        Ba 2015, §3): the first step's average is its weights, and the initial weights have no part in it. Each rank
        averages its own fp32 shard.
        """
        if self.ema is None:
            return
        self.averaged_steps += 1
        newest = (1 - self.ema) / (1 - self.ema**self.averaged_steps)
        for average, partition in zip(self._averages, self.partitions, strict=True):
            average.lerp_(partition.master.data, newest)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model's weights are the average, where there is one: what is evaluated and exported."""
        if not self.averaged_steps:
            yield
            return
        last = [partition.master.data.clone() for partition in self.partitions]
        self._publish(self._averages)
        try:
            yield
        finally:
            self._publish(last)

    def _publish(self, weights: Sequence[Tensor]) -> None:
        for partition, values in zip(self.partitions, weights, strict=True):
            partition.master.data.copy_(values)
        self._host.publish_masters()

    # ------------------------------------------------------------------------------------- state, for checkpoints

    def state(self) -> Iterator[tuple[Span, dict[str, Tensor]]]:
        """This rank's optimizer state: per span the fp32 master and, once stepped, AdamW's two moments and the average
        of the weights."""
        states = self._host.states
        for number, partition in enumerate(self.partitions):
            moments = {"master": partition.master.detach(), **states.get(partition.master, {})}
            if self.averaged_steps:
                moments["average"] = self._averages[number]
            for span in partition.spans:
                piece = slice(span.offset, span.offset + span.stop - span.start)
                yield span, {name: moments[name][piece] for name in STATES if name in moments}

    def steps_taken(self) -> list[int]:
        """AdamW's step count of every group (a frozen group's stands still)."""
        states = self._host.states
        taken = [0] * len(self.groups)
        for partition in self.partitions:
            taken[partition.group] = int(states.get(partition.master, {}).get("step", 0))
        return taken

    def set_masters(self, value: Callable[[Span], Tensor]) -> None:
        """Set the fp32 master weights, and the model's own from them. DeepSpeed clones its masters from weights that
        are already rounded to bf16."""
        for partition in self.partitions:
            for span in partition.spans:
                partition.master.data[span.offset : span.offset + span.stop - span.start] = value(span)
        self._host.publish_masters()

    def load_state(self, read: Callable[[Span, str], Tensor], steps: Mapping[str, int], averaged_steps: int) -> None:
        """Take over a checkpoint; `read(span, state)`, with a name in `STATES`, gives the numbers of a span.

        Args:
            steps: AdamW's step count of every part of the model. Its groups have that in common, and nothing else:
                `layer_decay` and `weight_decay` decide which they are, and may have changed.
        """
        self.averaged_steps = averaged_steps if self.ema else 0
        if self.averaged_steps:
            for average, partition in zip(self._averages, self.partitions, strict=True):
                for span in partition.spans:
                    average[span.offset : span.offset + span.stop - span.start] = read(span, "average")
        states = self._host.states
        for partition in self.partitions:
            taken = steps[self.groups[partition.group].part]
            if not taken:
                continue
            moments = {
                "step": torch.tensor(float(taken)),
                "exp_avg": torch.zeros_like(partition.master),
                "exp_avg_sq": torch.zeros_like(partition.master),
            }
            if self.device.type == "cuda":  # fused AdamW keeps its step count beside the parameters
                moments["step"] = moments["step"].to(self.device)
            for name in ("exp_avg", "exp_avg_sq"):
                for span in partition.spans:
                    moments[name][span.offset : span.offset + span.stop - span.start] = read(span, name)
            states[partition.master] = moments
        self.set_masters(lambda span: read(span, "master"))


def _own_gram(own_K: Sequence[Own], device: torch.device) -> Tensor:
    """Dot products (K, K) of the tasks' gradients outside the encoder, in fp64; zero where they share no layer."""
    gram_KK = torch.zeros(len(own_K), len(own_K), dtype=torch.float64, device=device)
    for i, first in enumerate(own_K):
        for j, second in enumerate(own_K[: i + 1]):
            for number in first.keys() & second.keys():
                gram_KK[i, j] += first[number].double().dot(second[number].double())
            gram_KK[j, i] = gram_KK[i, j]
    return gram_KK


# ------------------------------------------------------------------------------------------------ Gram space


def gram(shards_KS: Tensor) -> Tensor:
    """S Sᵀ of a rank's shards in one pass, (K, K) fp64: fp32 sums over 2¹³ numbers, fp64 across these.

    The relative error stays near 1e-6; longer sums in fp32 would lose more digits (1e-5 at 2¹⁸).
    """
    total_KK = torch.zeros(len(shards_KS), len(shards_KS), dtype=torch.float64, device=shards_KS.device)
    for chunk_KC in _chunks(shards_KS):
        whole = chunk_KC.shape[1] // _SUMMED * _SUMMED
        pieces_NKc = chunk_KC[:, :whole].unflatten(1, (-1, _SUMMED)).transpose(0, 1)
        rest_Kc = chunk_KC[:, whole:]
        total_KK += torch.bmm(pieces_NKc, pieces_NKc.mT).sum(0, dtype=torch.float64)
        total_KK += (rest_Kc @ rest_Kc.T).double()
    return total_KK


def combine(shards_KS: Tensor, weights_K: Tensor, out: Tensor) -> None:
    """Σ_k w_k·S_k into `out` (S,) fp32, in one pass."""
    weights_K = weights_K.to(out.device)
    for chunk_KC, out_C in zip(_chunks(shards_KS), out.split(_columns(out.device)), strict=True):
        torch.mv(chunk_KC.T, weights_K, out=out_C)


_SUMMED = 1 << 13


def _columns(device: torch.device) -> int:
    """Of a chunk: few enough to stay in the cache as fp32, on a GPU enough to keep it busy."""
    return _SUMMED << (5 if device.type == "cpu" else 8)


def _chunks(shards_KS: Tensor) -> Iterator[Tensor]:
    """The shards from left to right as fp32 (K, C), valid until the next one is asked for: bf16 is converted into one
    buffer, for fresh memory every time would cost more than the conversion."""
    pieces = shards_KS.split(_columns(shards_KS.device), dim=1)
    if shards_KS.dtype == torch.float32:
        yield from pieces
        return
    # rows a power of two apart would meet in the same few sets of the cache: with 16 tasks a fifth slower
    buffer = pieces[0].new_empty(len(pieces[0]), pieces[0].shape[1] + 16 * 17, dtype=torch.float32)
    for piece_KC in pieces:
        yield buffer[:, : piece_KC.shape[1]].copy_(piece_KC)
