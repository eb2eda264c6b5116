"""A training step of what users have instead: each rival is a function of the step's number.

Weights and dropout come from torch's global generator, which the benchmark's process seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torchjd.aggregation import PCGrad
from torchjd.autojac import backward, jac_to_grad
from transformers import BertConfig, BertModel

from benchmarks.workload import TASKS, Batch, Batches, loss_of
from mtbert.encoder import EncoderShape
from mtbert.randomness import addressed_rng
from mtbert.ranks import local_device
from mtbert.runs import Rank

Step = Callable[[int], None]


class Rival(nn.Module):
    """The papers' model: one encoder pass per text, padded to the longest of the batch, pooler, concat heads.

    `attention_dropout`: of the attention's weights, which ours has not: random numbers it need not draw.
    """

    def __init__(self, shape: EncoderShape, attention: str = "sdpa", attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                hidden_size=shape.hidden_size,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                intermediate_size=shape.intermediate_size,
                attention_probs_dropout_prob=attention_dropout,
                attn_implementation=attention,
            )
        )
        self.drop = nn.Dropout(0.3)
        wide = shape.hidden_size
        self.heads = nn.ModuleDict(
            {"sst": nn.Linear(wide, 5), "para": nn.Linear(2 * wide, 1), "sts": nn.Linear(2 * wide, 1)}
        )

    def loss(self, task: str, texts: list[list[np.ndarray]], labels: Tensor) -> Tensor:
        device = self.bert.device
        vectors = [self.drop(self.bert(*(part.to(device) for part in padded(text))).pooler_output) for text in texts]
        answers = self.heads[task](torch.cat(vectors, -1)).float()
        return loss_of(task, answers if task == "sst" else answers.squeeze(-1), labels.to(device))

    def losses(self, batch: Batch) -> list[Tensor]:
        return [self.loss(task, batch.sentences[task], batch.labels[task]) for task in TASKS]


def build(shape: EncoderShape, attention: str = "sdpa", attention_dropout: float = 0.0) -> Rival:
    return Rival(shape, attention, attention_dropout).train().to(local_device(Rank()))


def padded(text: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, text))
    ids, mask = np.zeros((len(text), longest), np.int64), np.zeros((len(text), longest), np.int64)
    for row, tokens in enumerate(text):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def papers(shape: EncoderShape, batches: Batches) -> Step:
    """transformers in fp32, random batches padded to their longest, PCGrad over whole gradients (Pytorch-PCGrad)."""
    model = build(shape, attention_dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    parameters = list(model.parameters())

    def step(number: int) -> None:
        project(parameters, optimizer, model.losses(batches(number)), number)
        optimizer.step()

    return step


def autocast(shape: EncoderShape, batches: Batches, attention: str, compiled: bool = False) -> Step:
    """transformers with bf16 autocast, dynamic padding and a fused AdamW (its Trainer's), losses summed, no surgery."""
    model = build(shape, attention)
    if compiled:
        model.bert.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(number: int) -> None:
        with torch.autocast(model.bert.device.type, torch.bfloat16):
            losses = model.losses(batches(number))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def autojac(shape: EncoderShape, batches: Batches) -> Step:
    """The same model in fp32 with TorchJD's own way: a Jacobian of the losses, then its PCGrad.

    The losses one at a time (`parallel_chunk_size=1`): the vmap of all at once needs three times the memory. The heads
    have one task each and are differentiated with the rest.
    """
    model = build(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    aggregator = PCGrad()

    def step(number: int) -> None:
        losses = model.losses(batches(number))
        optimizer.zero_grad()
        backward(losses, parallel_chunk_size=1)
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()

    return step


def project(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[Tensor], step: int) -> None:
    """PCGrad over whole flattened gradients, shared ones averaged, as the papers' package does it."""
    rows, present = [], []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
        present.append(torch.cat([torch.full((p.numel(),), p.grad is not None, device=p.device) for p in parameters]))
    shared = torch.stack(present).all(0)
    rng = addressed_rng(0, "order", step)
    projected = [row.clone() for row in rows]
    for gradient in projected:
        for other in rng.permutation(len(rows)):
            dot = torch.dot(gradient, rows[other])
            if dot < 0:
                gradient -= dot * rows[other] / rows[other].norm() ** 2
    stacked = torch.stack(projected)
    merged = torch.where(shared, stacked.mean(0), stacked.sum(0))
    for parameter, piece in zip(parameters, merged.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter).clone()
