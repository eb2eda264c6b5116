"""minBERT without padding: the encoder of Devlin et al. (2019), readable in one sitting.

A batch is *packed*: its sequences lie end to end, so the layers that look at one token at a time (embeddings, linear
layers, GELU, LayerNorm) never touch padding. Only attention needs to know where a sequence ends: on CPU it works on
blocks of nearly equal length, on CUDA in half precision on a variable-length kernel.

Shapes: B sequences, T tokens of all sequences together, D width (hidden size), H heads, F inner width of the
feed-forward layer; inside a block N sequences padded to L tokens. Activations have the dtype of the weights.

Dropout is on when a `torch.Generator` is passed, off when it is None; `module.training` plays no part. It falls on the
embeddings and before both residual connections, as in BERT, but not on attention probabilities, which BERT drops too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mtbert.packing import Packed

# oneDNN and its wrapper keep the last 1,024 products with all that they needed, half a megabyte each. Hardly two packed
# batches have the same number of tokens: memory would grow by hundreds of megabytes, nearly none of it used again.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "256")

Pooling = Literal["pooler", "cls", "mean"]


@dataclass(frozen=True)
class EncoderShape:
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    max_positions: int  # longest sequence, in tokens
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class Linear(nn.Linear):
    """Without weights until `initialise` sets them: torch's own would come from its global generator."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """As `Linear`."""

    def reset_parameters(self) -> None:
        pass


class Encoder(nn.Module):
    """BERT: embeddings, `layers` transformer layers, and the tanh layer on [CLS] that makes a sentence vector."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        super().__init__()
        width = shape.hidden_size
        self.shape = shape
        self.dropout = dropout
        self.words = WordEmbedding(shape.vocab_size, width)
        self.positions = Embedding(shape.max_positions, width)
        self.types = Embedding(shape.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=shape.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.pooler = Linear(width, width)

    @property
    def reads_blocks(self) -> bool:
        """Whether attention goes by the blocks of a packed batch where and as the weights are now."""
        weight = self.pooler.weight
        return not _has_kernel(weight.device, weight.dtype, self.shape.hidden_size // self.shape.heads)

    def load_weights(self, state: Mapping[str, Tensor]) -> list[str]:
        """Copy the weights that `load_pretrained` read; answers the names it left as they were (`pooler.*` or none)."""
        kept, extra = self.load_state_dict(state, strict=False)
        assert not extra and all(name.startswith("pooler.") for name in kept), (kept, extra)
        return list(kept)

    def forward(self, packed: Packed, generator: Generator | None = None) -> Tensor:
        """Hidden states of all tokens after the last layer, (T, D)."""
        hidden_TD = self._embed(packed, generator)
        for layer in self.layers:
            hidden_TD = layer(hidden_TD, packed, generator)
        return hidden_TD

    def sentence_vectors(self, packed: Packed, pooling: Pooling, generator: Generator | None = None) -> Tensor:
        """One vector per sequence in the caller's order, (B, D).

        pooler: BERT's tanh layer on [CLS]; cls: [CLS] itself; mean: over all tokens, as sentence-transformers does.
        """
        if pooling == "mean":
            hidden_TD = self(packed, generator).float()  # bf16 would round every partial sum
            sums_BD = hidden_TD.new_zeros(len(packed.lengths_B), hidden_TD.shape[1])
            sums_BD = sums_BD.index_add(0, packed.sequence_T, hidden_TD)
            means_BD: Tensor = (sums_BD / packed.lengths_B[:, None]).to(self.pooler.weight.dtype)
            return means_BD
        hidden_TD = self._embed(packed, generator)
        for layer in self.layers[:-1]:
            hidden_TD = layer(hidden_TD, packed, generator)
        cls_BD: Tensor = self.layers[-1](hidden_TD, packed, generator, packed.first_B)
        return torch.tanh(self.pooler(cls_BD)) if pooling == "pooler" else cls_BD

    def _embed(self, packed: Packed, generator: Generator | None) -> Tensor:
        assert packed.longest <= self.shape.max_positions, "sequences are truncated where they are tokenised"
        hidden_TD = self.words(packed.ids_T) + self.positions(packed.positions_T) + self.types(packed.types_T)
        return dropout(self.norm(hidden_TD), self.dropout, generator)


class WordEmbedding(Embedding):
    """Where a gradient buffer is there already, only the rows of the words that occurred are added to it.

    Elsewhere the gradient is dense, as usual: most of it zeros, which would be written, added and thrown away.
    While it is `narrowed`, to a copy (U, D) of some rows and each word's place among them (V,), −1 where it has none,
    words are looked up there, and there the gradients go.
    """

    narrowed: tuple[Tensor, Tensor] | None = None

    def forward(self, ids_T: Tensor) -> Tensor:
        if self.narrowed is None:
            return F.embedding(ids_T, self.weight, sparse=self.weight.grad is not None)
        rows_UD, places_V = self.narrowed
        return F.embedding(places_V[ids_T], rows_UD, sparse=True)


class Layer(nn.Module):
    """Self-attention and a feed-forward layer, each with dropout, a residual connection and a LayerNorm after it."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        super().__init__()
        width, eps = shape.hidden_size, shape.layer_norm_eps
        self.heads = shape.heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width)
        self.attended = Linear(width, width)
        self.attended_norm = nn.LayerNorm(width, eps=eps)
        self.up = Linear(width, shape.intermediate_size)
        self.down = Linear(shape.intermediate_size, width)
        self.down_norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self, hidden_TD: Tensor, packed: Packed, generator: Generator | None, rows: Tensor | None = None
    ) -> Tensor:
        """`rows`: the only tokens whose output is wanted; all others serve as keys and values alone."""
        context_TD = attention(self.qkv(hidden_TD), packed, self.heads)
        if rows is not None:
            hidden_TD, context_TD = hidden_TD.index_select(0, rows), context_TD.index_select(0, rows)
        hidden_TD = self.attended_norm(hidden_TD + dropout(self.attended(context_TD), self.dropout, generator))
        inner_TF = F.gelu(self.up(hidden_TD))
        result_TD: Tensor = self.down_norm(hidden_TD + dropout(self.down(inner_TF), self.dropout, generator))
        return result_TD


def attention(qkv_T3D: Tensor, packed: Packed, heads: int) -> Tensor:
    """Softmax(q kᵀ / √d) v within each sequence, (T, D)."""
    size = qkv_T3D.shape[1] // (3 * heads)
    if packed.tokens > 0 and _has_kernel(qkv_T3D.device, qkv_T3D.dtype, size):
        from torch.nn.attention.varlen import varlen_attn  # a second to import, and of use on GPUs only

        q_THd, k_THd, v_THd = qkv_T3D.view(packed.tokens, 3, heads, size).unbind(1)
        spans = packed.starts, packed.starts, packed.longest, packed.longest
        context_THd = varlen_attn(q_THd, k_THd, v_THd, *spans)
        assert isinstance(context_THd, Tensor)
        return context_THd.reshape(packed.tokens, -1)
    context_TD: Tensor = BlockAttention.apply(qkv_T3D, packed, heads)  # type: ignore[no-untyped-call]
    return context_TD


def _has_kernel(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether torch's variable-length attention takes heads of this size. From 200 on some GPUs have no backward."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return size % 8 == 0 and size <= 192 and torch.cuda.get_device_capability(device) >= (8, 0)


class BlockAttention(torch.autograd.Function):
    """Attention block by block. With d = D / H and M = N·H, a block's q, k, v are (M, L, d) and its scores (M, L, L).

    Written out, because autograd would zero and add a whole (T, 3D) gradient for every block, and because
    `scaled_dot_product_attention` in bf16 is many times slower on CPU than two matrix products and a softmax.
    """

    @staticmethod
    def forward(ctx: Any, qkv_T3D: Tensor, packed: Packed, heads: int) -> Tensor:
        tokens, width = qkv_T3D.shape[0], qkv_T3D.shape[1] // 3
        size = width // heads
        assert packed.blocks or not tokens, "this batch was moved without its blocks"
        context_TD = qkv_T3D.new_empty(tokens, width)
        saved = []
        for block in packed.blocks:
            rows = qkv_T3D[block.tokens] if block.padded_NL is None else qkv_T3D.index_select(0, block.padded_NL)
            qkv_3MLd = rows.view(block.count, block.longest, 3, heads, size).permute(2, 0, 3, 1, 4)
            qkv_3MLd = qkv_3MLd.reshape(3, -1, block.longest, size)
            q, k, v = qkv_3MLd
            if block.mask_N1L is None:
                scores = _scaled_bmm(q, k.mT, size**-0.5)
            else:
                mask_M1L = block.mask_N1L.to(q.dtype).repeat_interleave(heads, dim=0)
                scores = torch.baddbmm(mask_M1L, q, k.mT, alpha=size**-0.5)
            shares = _softmax(scores)
            context = (shares @ v).view(block.count, heads, block.longest, size).transpose(1, 2).reshape(-1, width)
            context_TD[block.tokens] = context if block.places is None else context.index_select(0, block.places)
            saved += [qkv_3MLd, shares]
        ctx.save_for_backward(*saved)
        ctx.packed, ctx.heads = packed, heads
        return context_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        tokens, width = grad_TD.shape
        size = width // ctx.heads
        grad_T3D = grad_TD.new_empty(tokens, 3 * width)
        for block, qkv_3MLd, shares in zip(
            ctx.packed.blocks, ctx.saved_tensors[::2], ctx.saved_tensors[1::2], strict=True
        ):
            q, k, v = qkv_3MLd
            grad = grad_TD[block.tokens]
            if block.places is not None:  # queries at padding must not send anything back
                grad = grad.new_zeros(block.count * block.longest, width).index_add_(0, block.places, grad)
            grad = grad.view(block.count, -1, ctx.heads, size).transpose(1, 2).reshape(-1, block.longest, size)
            grad_scores = _softmax_backward(grad @ v.mT, shares)
            grad_3MLd = torch.empty_like(qkv_3MLd)
            _scaled_bmm(grad_scores, k, size**-0.5, out=grad_3MLd[0])
            _scaled_bmm(grad_scores.mT, q, size**-0.5, out=grad_3MLd[1])
            torch.bmm(shares.mT, grad, out=grad_3MLd[2])
            rows = grad_3MLd.view(3, block.count, ctx.heads, block.longest, size).permute(1, 3, 0, 2, 4)
            rows = rows.reshape(-1, 3 * width)
            grad_T3D[block.tokens] = rows if block.places is None else rows.index_select(0, block.places)
        return grad_T3D, None, None


def _scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """a @ b · scale, rounded once."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale, out=out)


def _short(scores: Tensor) -> bool:
    """Rows shorter than a vector register: torch then takes softmax scalar by scalar, but not along dimension 0."""
    return scores.shape[-1] * scores.element_size() < 64


def _softmax(scores: Tensor) -> Tensor:
    return scores.movedim(-1, 0).softmax(0).movedim(0, -1) if _short(scores) else scores.softmax(-1)


def _softmax_backward(grad: Tensor, shares: Tensor) -> Tensor:
    backward = torch.ops.aten._softmax_backward_data
    if _short(shares):
        result: Tensor = backward(grad.movedim(-1, 0), shares.movedim(-1, 0), 0, grad.dtype).movedim(0, -1)
    else:
        result = backward(grad, shares, -1, grad.dtype)
    return result


def initialise(module: nn.Module, seed: int) -> None:
    """BERT's initialisation, from a generator of its own: matrices N(0, 0.02²), biases 0, LayerNorm gains 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(float(name.endswith("norm.weight")))


# ------------------------------------------------------------------------------------------------ dropout


def dropout(x: Tensor, p: float, generator: Generator | None) -> Tensor:
    """Zero elements with probability p, rounded to 1/256, and scale the others so that the expectation stays.

    Eight masks come out of one random 64-bit integer: drawing numbers one by one would cost more than the layer.
    """
    threshold = min(round(p * 256), 255)
    if generator is None or threshold == 0:
        return x
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    bytes_ = words.view(torch.uint8)[: x.numel()].view(x.shape)
    keep = torch.ge(bytes_, threshold, out=torch.empty_like(x, requires_grad=False))
    # the scale stays out of the mask: it is a Python number, exact, and a mask in bf16 would round it
    return (x * keep) * (256 / (256 - threshold))
