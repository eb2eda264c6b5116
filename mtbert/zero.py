"""What knows DeepSpeed, and nothing else does: its start and end, and ZeRO stages 1 and 3 as hosts of task gradients.

A host takes K losses to K backwards and each task's gradient into shards; what is combined from them it hands to
DeepSpeed's optimizer step.

Shapes: K tasks in the step, P encoder parameters, W ranks, S = P/W numbers of a rank's shard.

What we rest on inside DeepSpeed (private names; the version range in setup.py is narrow and tests/test_engine.py fails
when a gradient goes missing): both stages `optimizer` (ours, inside of theirs), `averaged_gradients`; stage 1
`bit16_groups`, `bit16_groups_flat`, `single_partition_of_fp32_groups`, `update_lp_params`; stage 3 `fp16_groups`,
`fp32_partitioned_groups_flat`, `fp16_partitioned_groups_flat`, `sub_group_to_group_id`, `grad_partitions_flat_buffer`,
`overflow`, `parameter_offload.partition_all_parameters`, and of a parameter `partition_numel`, `ds_numel`; at the start
`ops.__compatible_ops__`, `runtime.compiler.compile` and `.dummy_decorator`, `runtime.zero.muon.original_muon`,
and that `LOCAL_RANK` is the index of the device.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtbert.config import EngineConfig, OptimizerConfig
from mtbert.word_gradients import Table, WordGradients

Loss = Callable[[], Tensor]
"""Builds one micro-batch's loss: this rank's sum over its examples, divided by those of the global batch."""


@dataclass(frozen=True)
class Span:
    """Elements start … stop of a flattened parameter, which lie from `offset` on in a partition."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """A rank's piece of a group: fp32 master weights, and which parameters they belong to."""

    group: int
    master: Tensor
    spans: tuple[Span, ...]


Own = dict[int, Tensor]
"""A task's gradient outside the encoder on this rank: partition number → shard, for the groups that the task uses."""


class Host(Protocol):
    """Where gradients become shards. Partitions hold the encoder's groups first, then the heads'.

    A step is `begin`, a `backward` for each of its tasks, `shards`, and `apply` unless something was not finite; all
    ranks make the same calls in the same order, for all but `gradient_bytes` may communicate.
    """

    partitions: list[Partition]
    options: list[dict[str, Any]]
    """AdamW's of every group: `lr`, and `frozen` for one that this step leaves alone."""
    states: MutableMapping[Tensor, dict[str, Tensor]]
    """AdamW's by master: `exp_avg` and `exp_avg_sq` like the master, `step` a number; none before its first step."""
    columns: int
    """The most numbers that this rank's shard of a task's gradient of the encoder can have."""

    @property
    def gradient_bytes(self) -> int:
        """Of all that holds the encoder's task gradients on this rank."""

    def begin(self, through: int, word_ids: Tensor | None) -> None:
        """Ends the validity of the last step's shards.

        Args:
            through: how many of the step's tasks reach the encoder.
            word_ids: of what this rank's losses look up, as in `Engine.step`.
        """

    def backward(self, task: int, slot: int | None, losses: Sequence[Loss]) -> Tensor:
        """Build each micro-batch's loss of a task and go back through it, once per task and step.

        Args:
            slot: the task's row in the shards, 0 … through − 1 in the order of calls; None where it does not reach the
                encoder, whose parameters then require no gradient.

        Returns: the sum of the losses on this rank, fp32 scalar on the device; nothing has waited for it.
        """

    def shards(self) -> tuple[list[Tensor], dict[int, Own]]:
        """This rank's shards of what the backwards found, summed over ranks.

        Returns: the encoder's in pieces of (through, S_i), fp32 or, on one rank, the dtype in which gradients
        accumulate; and each task's own, fp32. Both are valid until the next `begin`.
        """

    def apply(self, encoder: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        """An optimizer step; then the model's weights are the new masters. Raises `RuntimeError` where DeepSpeed leaves
        the step out.

        Args:
            encoder: the gradients of the encoder, fp32 (S_i,) for every piece of the shards.
            heads: those of every other partition, fp32 of the master's shape.
        """

    def publish_masters(self) -> None:
        """Set the model's weights, on all ranks, from masters that were written to."""


# ------------------------------------------------------------------------------------------------- ZeRO stage 1


class Stage1:
    """ZeRO-1 as host, with flat gradient buffers of our own.

    With this configuration DeepSpeed installs no gradient hooks. A task's gradients accumulate in views of one flat
    buffer laid out like DeepSpeed's flat weights; after the backward, every rank sends every other the piece that is
    its shard and sums what it receives in fp32. That carries (W−1)/W·P numbers per task, half of an all-reduce, and
    the sum is exact to fp32 even for a bf16 payload. Two buffers take turns, so that a task's gradient travels during
    the next one's backward; a third holds what arrives, as it is summed before the next task's gradient leaves. With
    one rank there is nothing to send: every task has a buffer, and the buffers are the shards.

    The table of words is a group of its own, and its gradients, of fewer rows as a rule, lie apart in `WordGradients`.
    """

    def __init__(self, engine: Any, users: Mapping[int, Sequence[int]], accumulation: int, table: Table) -> None:
        """`users`: for each group outside the encoder, which come last, the tasks that use it. `accumulation`: how many
        micro-batches a task may have in a step. `table`: the word embeddings, the last of the encoder's groups."""
        self.engine = engine
        optimizer = engine.optimizer
        self.world = dist.get_world_size()
        self.optimizer = optimizer
        self.options, self.states = optimizer.optimizer.param_groups, optimizer.optimizer.state
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.sizes = [flat.numel() for flat in optimizer.bit16_groups_flat]
        self.dense_groups = len(self.sizes) - len(users) - 1  # all that the table comes after
        assert [id(p) for p in optimizer.bit16_groups[self.dense_groups]] == [id(table.weight)]
        self.partitions = [self._partition(index, names) for index in range(len(self.sizes))]
        dtype = optimizer.bit16_groups_flat[0].dtype
        # a backward adds each gradient once, several would lose small addends in bf16 (embeddings add row by row even
        # in one backward; with accumulation > 1 only those of positions and types do, within each micro-batch)
        self.grad_dtype = torch.float32 if accumulation > 1 else dtype
        self.device = optimizer.bit16_groups_flat[0].device
        self.dense = sum(self.sizes[: self.dense_groups])
        # what a task trains outside the encoder: the groups, one buffer for them, its views
        self.own_groups: dict[int, list[int]] = {}
        for index, tasks in users.items():
            for task in tasks:
                self.own_groups.setdefault(task, []).append(index)
        self.own_buffers: dict[int, Tensor] = {}
        self.own_views: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        for task, indices in self.own_groups.items():
            size = sum(self.sizes[index] for index in indices)
            self.own_buffers[task] = torch.zeros(size, dtype=self.grad_dtype, device=self.device)
            self.own_views[task] = self._views(self.own_buffers[task], indices)
        self.present: list[int] = []
        if self.grad_dtype != dtype:
            for parameter in engine.module.parameters():
                parameter.grad_dtype = self.grad_dtype
        self.buffers: list[Tensor] = []
        self.views: list[list[tuple[nn.Parameter, Tensor]]] = []
        self.received: list[Tensor] = []  # of each group but the table: rows of the other ranks, in their order
        self.travelling: tuple[int, int, list[Any]] | None = None  # slot, its buffer, works
        self.storage_KS = self.shards_KS = torch.empty(0, self.dense // self.world, device=self.device)
        self.word_gradients = WordGradients(table, self.sizes[self.dense_groups], self.grad_dtype)
        self.columns = self.dense // self.world + self.word_gradients.columns

    def _partition(self, index: int, names: Mapping[int, str]) -> Partition:
        flat: Tensor = self.optimizer.bit16_groups_flat[index]
        size = flat.numel() // self.world
        low, high = dist.get_rank() * size, (dist.get_rank() + 1) * size
        spans = []
        for parameter in self.optimizer.bit16_groups[index]:
            offset = parameter.storage_offset() - flat.storage_offset()
            start, stop = max(offset, low), min(offset + parameter.numel(), high)
            if start < stop:
                spans.append(Span(names[id(parameter)], start - offset, stop - offset, start - low))
        return Partition(index, self.optimizer.single_partition_of_fp32_groups[index], tuple(spans))

    @property
    def gradient_bytes(self) -> int:
        sent = [] if self.world == 1 else [*self.buffers, *self.received]
        return sum(tensor.nbytes for tensor in (self.storage_KS, *sent)) + self.word_gradients.nbytes

    def _views(self, buffer: Tensor, groups: Sequence[int]) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter of the groups with its place in a buffer that holds the groups one after another."""
        views, first = [], 0
        for index in groups:
            flat = self.optimizer.bit16_groups_flat[index]
            for parameter in self.optimizer.bit16_groups[index]:
                offset = first + parameter.storage_offset() - flat.storage_offset()
                views.append((parameter, buffer[offset : offset + parameter.numel()].view_as(parameter)))
            first += flat.numel()
        return views

    def begin(self, through: int, word_ids: Tensor | None) -> None:
        if through > len(self.storage_KS):
            self._allocate(through)
        self.shards_KS = self.storage_KS[:through]
        self.word_gradients.begin(through, word_ids)
        self.present = []

    def _allocate(self, tasks: int) -> None:
        """Shards for as many tasks as a step turns out to have, and buffers for their backwards."""
        dtype = self.grad_dtype if self.world == 1 else torch.float32
        self.storage_KS = torch.zeros(tasks, self.dense // self.world, dtype=dtype, device=self.device)
        if self.world == 1:
            self.buffers = list(self.storage_KS)
        else:
            shape = {"dtype": self.grad_dtype, "device": self.device}
            self.buffers = [torch.zeros(self.dense, **shape) for _ in range(min(tasks, 2))]
            sizes = self.sizes[: self.dense_groups]
            self.received = [torch.zeros(self.world - 1, size // self.world, **shape) for size in sizes]
        self.views = [self._views(buffer, range(self.dense_groups)) for buffer in self.buffers]

    def backward(self, task: int, slot: int | None, losses: Sequence[Loss]) -> Tensor:
        self.present.append(task)
        if task in self.own_buffers:
            self.own_buffers[task].zero_()
            for parameter, view in self.own_views[task]:
                parameter.grad = view
        place = 0
        if slot is not None:
            place = slot if self.world == 1 else slot % 2  # what left from there has arrived before the last one left
            self.buffers[place].zero_()
            for parameter, view in self.views[place]:
                parameter.grad = view
        value = torch.zeros((), device=self.device)
        with nullcontext() if slot is None else self.word_gradients.collected(place):
            for build in losses:
                loss = build()
                if loss.requires_grad:  # else a head without parameters over a frozen encoder
                    loss.backward()
                value += loss.detach()
        if self.world > 1 and slot is not None:
            self._send(slot, place)
        return value

    def _send(self, slot: int, place: int) -> None:
        self._receive()
        works = []
        for received, sent in zip([*self.received, self.word_gradients.received], self._groups(place), strict=True):
            works += exchange(received, sent)
        self.travelling = slot, place, works

    def _groups(self, place: int) -> list[Sequence[Tensor]]:
        """What a place holds: for each group the ranks' pieces."""
        pieces = self.buffers[place].split(self.sizes[: self.dense_groups])
        return [*(piece.view(self.world, -1).unbind() for piece in pieces), self.word_gradients.pieces(place)]

    def _receive(self) -> None:
        """Sum what arrived of the task gradient that is on its way, if one is."""
        if self.travelling is None:
            return
        slot, place, works = self.travelling
        self.travelling = None
        for work in works:
            work.wait()
        sizes = [size // self.world for size in self.sizes[: self.dense_groups]]
        shards = [*self.shards_KS[slot].split(sizes), self.word_gradients.shards_KS[slot]]
        for shard, received, sent in zip(
            shards, [*self.received, self.word_gradients.received], self._groups(place), strict=True
        ):
            sum_ranks(received, sent, shard)

    def shards(self) -> tuple[list[Tensor], dict[int, Own]]:
        leaving = [piece for task in self.present for piece in self._leave(task)]  # all, before any is waited for
        self._receive()
        own: dict[int, Own] = {task: {} for task in self.present}
        for task, index, received, sent, works in leaving:
            for work in works:
                work.wait()
            own[task][index] = sum_ranks(received, sent.unbind(), torch.empty(sent.shape[1], device=self.device))
        return [self.shards_KS, self.word_gradients.finished()], own

    def _leave(self, task: int) -> Iterator[tuple[int, int, Tensor, Tensor, list[Any]]]:
        """Begin to exchange what a task trains outside the encoder: by group the rows received and sent, and works."""
        indices = self.own_groups.get(task, [])
        pieces = self.own_buffers[task].split([self.sizes[index] for index in indices]) if indices else ()
        for index, piece in zip(indices, pieces, strict=True):
            sent = piece.view(self.world, -1)
            received = torch.empty_like(sent[1:])
            yield task, index, received, sent, exchange(received, sent)

    def apply(self, encoder: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        dense, words = encoder
        pieces = dense.split([size // self.world for size in self.sizes[: self.dense_groups]])
        for index, gradient in enumerate([*pieces, self.word_gradients.spread(words), *heads]):
            self.optimizer.averaged_gradients[index] = [gradient]
        self.engine.step()

    def publish_masters(self) -> None:
        self.optimizer.update_lp_params()


_PIECE = 1 << 19
"""Numbers in one message of gloo: with four ranks behind links of 1 Gbit/s an exchange took 0.36 s in one piece, 0.30
in 16. NCCL cuts messages by itself, and puts a group of hundreds (364 at BERT-base on 8 ranks) on the GPU in several
launches, which is slow and may hang (pytorch/pytorch#174288)."""


def exchange(received: Tensor, sent_W: Sequence[Tensor]) -> list[Any]:
    """Send the j-th to rank j, and begin to receive what the others have for this rank. Collective.

    What an all-to-all does, by point-to-point messages: gloo's own uses a link in one direction at a time and took
    0.36 s where both directions at once need 0.19 (two ranks, 23 MB, 1 Gbit/s); NCCL's consists of these messages.

    Args:
        received: (W − 1, S), of the same dtype; what the other ranks have for this one, in the ranks' order.
        sent_W: for every rank its piece, of any size and dtype; neither may be written to before the works are done.

    Returns: works to wait for.
    """
    rank, world = dist.get_rank(), len(sent_W)
    longest = max(received.shape[1], *(len(each) for each in sent_W))
    piece = max(longest, 1) if received.is_cuda else _PIECE
    messages = []
    for first in range(0, longest, piece):
        for distance in range(1, world):
            to, source = (rank + distance) % world, (rank - distance) % world
            arriving = received[source - (source > rank)][first : first + piece]
            leaving = sent_W[to][first : first + piece]
            messages += [dist.P2POp(dist.irecv, arriving, source)] if len(arriving) else []
            messages += [dist.P2POp(dist.isend, leaving, to)] if len(leaving) else []
    works: list[Any] = dist.batch_isend_irecv(messages) if messages else []
    return works


def sum_ranks(received: Tensor, sent_W: Sequence[Tensor], out: Tensor) -> Tensor:
    """`out` (S,) fp32: the sum over ranks of this rank's own of `sent_W` and of those `received` (W − 1, S), in rank
    order (torch.sum with a dtype makes a converted copy of everything first)."""
    rank = dist.get_rank()
    rows = [*received[:rank], sent_W[rank], *received[rank:]]
    out.copy_(rows[0])
    for row in rows[1:]:
        out.add_(row)
    return out


# ------------------------------------------------------------------------------------------------- ZeRO stage 3


class Stage3:
    """ZeRO-3: parameters are sharded too, for an encoder that outgrows one GPU.

    DeepSpeed reduces each backward into its own flat partition buffer; we take a task's gradient out of it and hand its
    optimizer the combination.
    """

    def __init__(self, engine: Any, users: Mapping[int, Sequence[int]]) -> None:
        """`users`: for each group outside the encoder, which come last, the tasks that use it."""
        self.engine = engine
        self.optimizer = engine.optimizer
        self.options, self.states = self.optimizer.optimizer.param_groups, self.optimizer.optimizer.state
        self.world = dist.get_world_size()
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.partitions = []
        for index, parameters in enumerate(self.optimizer.fp16_groups):
            spans, offset = [], 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start, stop = dist.get_rank() * size, min((dist.get_rank() + 1) * size, parameter.ds_numel)
                if start < stop:
                    spans.append(Span(names[id(parameter)], start, stop, offset))
                offset += size
            group = self.optimizer.sub_group_to_group_id[index]
            self.partitions.append(Partition(group, self.optimizer.fp32_partitioned_groups_flat[index], tuple(spans)))
        self.flat: Tensor = self.optimizer.grad_partitions_flat_buffer
        self.columns = sum(p.master.numel() for p in self.partitions if p.group not in users)
        self.storage_KS = self.shards_KS = torch.zeros(0, self.columns, device=self.flat.device)
        self.own: dict[int, Own] = {}
        self.places: dict[int, tuple[slice, Sequence[int]]] = {}  # of each partition outside the encoder, and its users
        first = 0
        for number, partition in enumerate(self.partitions):
            size = partition.master.numel()
            if partition.group in users:
                self.places[number] = (slice(first, first + size), users[partition.group])
            first += size

    @property
    def gradient_bytes(self) -> int:
        return self.storage_KS.nbytes + self.flat.nbytes

    def begin(self, through: int, word_ids: Tensor | None) -> None:
        if through > len(self.storage_KS):
            self.storage_KS = torch.zeros(through, self.columns, device=self.flat.device)
        self.shards_KS = self.storage_KS[:through]
        self.own = {}

    def backward(self, task: int, slot: int | None, losses: Sequence[Loss]) -> Tensor:
        places = {number: place for number, (place, users) in self.places.items() if task in users}
        own = {number: torch.zeros_like(self.flat[place]) for number, place in places.items()}
        if slot is not None:
            self.shards_KS[slot].zero_()
        value = torch.zeros((), device=self.flat.device)
        for build in losses:
            self.flat.zero_()
            loss = build()
            if loss.requires_grad:  # else a head without parameters over a frozen encoder
                self.engine.backward(loss * self.world)  # DeepSpeed divides by the number of ranks
            if slot is not None:
                self.shards_KS[slot] += self.flat[: self.columns]
            for number, place in places.items():
                own[number] += self.flat[place]
            value += loss.detach()
        self.own[task] = own
        return value

    def shards(self) -> tuple[list[Tensor], dict[int, Own]]:
        return [self.shards_KS], self.own

    def apply(self, encoder: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        pieces = encoder[0].split([p.master.numel() for p in self.partitions[: len(self.partitions) - len(heads)]])
        # DeepSpeed's own list is of the last backward, with zeros for what that did not train; none without a backward
        for index, gradient in enumerate([*pieces, *heads]):
            self.optimizer.averaged_gradients[index] = [gradient]
        self.engine.step()
        if self.optimizer.overflow:  # it says nothing itself, and the run would train nothing
            raise RuntimeError("DeepSpeed left out a step whose gradients are finite")

    def publish_masters(self) -> None:
        # weights gathered for an earlier pass may still be held for the next one
        self.optimizer.parameter_offload.partition_all_parameters()
        for weights, partition in zip(self.optimizer.fp16_partitioned_groups_flat, self.partitions, strict=True):
            weights.data.copy_(partition.master.data)


# -------------------------------------------------------------------------------------------------- DeepSpeed itself


class _AdamW(torch.optim.AdamW):
    """AdamW that leaves a frozen group alone: no decay, no step count, no fading moments."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            if group["frozen"]:
                for parameter in group["params"]:
                    parameter.grad = None
        return super().step(closure)


@contextmanager
def quiet_deepspeed() -> Iterator[Any]:
    """DeepSpeed, imported when asked for and without its greetings; our own lines say what a user needs."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        # of its ops only a shared-memory one for CPUs would be used: compiled with ninja (27 s), and where there is no
        # compiler it raises; asking which others could be built starts compilers and prints on stdout
        deepspeed.ops.__compatible_ops__ = {}
        _import_muon()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        yield deepspeed


def _import_muon() -> None:
    """Without the compiler, which its module asks for in passing: 1.5 to 2 s of every start for what is never called.

    DeepSpeed asks of every optimizer whether it is its Muon.
    """
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - DeepSpeed finds it in sys.modules
    finally:
        compiler.compile = compile_


def initialise_deepspeed(
    model: nn.Module,
    groups: Sequence[tuple[Sequence[str], float, float]],
    config: EngineConfig,
    optimizer: OptimizerConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """DeepSpeed's engine around the model. `groups`: names of parameters, their learning rate and weight decay."""
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed makes this GPU the current one
    # what DeepSpeed calls is renamed in torch 2.13; not news for a user
    warnings.filterwarnings("ignore", message=r".*(reduce_scatter|all_gather_into)_tensor. is deprecated")
    parameters = dict(model.named_parameters())
    options = [
        {"params": [parameters[name] for name in names], "lr": lr, "weight_decay": decay, "frozen": False}
        for names, lr, decay in groups
    ]
    adamw = _AdamW(options, betas=optimizer.betas, eps=optimizer.eps, fused=True)
    zero: dict[str, Any] = {"stage": config.zero, "overlap_comm": False, "contiguous_gradients": False}
    if config.zero == 1:
        zero["compute_grad_norm"] = False
    else:
        zero["contiguous_gradients"] = True
        zero["stage3_param_persistence_threshold"] = 0
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # its default is 1.0; we clip the combined gradient ourselves
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # a step that is not finite ends before; DeepSpeed would read every gradient again, and the host wait for it
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # nobody reads it, and it has the host wait for the GPU
    }
    if config.zero == 3:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    with quiet_deepspeed() as deepspeed:
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        engine, *_ = deepspeed.initialize(
            model=model.to(device=device, dtype=dtype), optimizer=adamw, config=settings, dist_init_required=False
        )
    return engine


def leave_group() -> None:
    """End the process group, and what DeepSpeed, if it was begun with, keeps of it: this process may join another."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()
