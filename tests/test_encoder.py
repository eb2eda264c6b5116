"""The packed encoder against transformers' BertModel, against itself padded, and its weights in and out."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from harness import PATIENCE_S
from hub import stand_in_hub, use_hub
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel

from mtbert.data import load_tokenizer
from mtbert.encoder import Encoder, EncoderShape, attention, dropout, initialise
from mtbert.errors import UserError
from mtbert.packing import Packed, pack
from mtbert.pretrained import load_pretrained, save_pretrained

ROOT = Path(__file__).parent.parent
SMALL = EncoderShape(
    vocab_size=97, hidden_size=24, layers=3, heads=4, intermediate_size=40, max_positions=64, layer_norm_eps=1e-12
)
MINILM = EncoderShape(vocab_size=1000, hidden_size=384, layers=6, heads=12, intermediate_size=1536, max_positions=128)
RAGGED = [9, 2, 30, 9, 17, 3, 64, 10, 9, 5]
POOLINGS = ("pooler", "cls", "mean")


def oracle(shape: EncoderShape, seed: int = 0) -> BertModel:
    """transformers' model with random weights, LayerNorms and biases included."""
    model = BertModel(
        BertConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.max_positions,
        )
    ).eval()
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("LayerNorm.weight" in name), 0.05, generator=generator)
    return model


def ours(model: BertModel, folder: Path, p: float = 0.1) -> Encoder:
    model.save_pretrained(folder)
    shape, state, _ = load_pretrained(str(folder))
    encoder = Encoder(shape, p)
    assert encoder.load_weights(state) == []
    return encoder


def sentences(lengths: Sequence[int], vocab_size: int = 97, seed: int = 0) -> list[np.ndarray]:
    """Random ids but 0, which is [PAD]: transformers gives it no gradient."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, length) for length in lengths]


def padded(sequences: Sequence[np.ndarray], second_starts: Sequence[int] | None) -> dict[str, Tensor]:
    """The same batch as transformers wants it."""
    longest = max(map(len, sequences))
    batch = {name: torch.zeros(len(sequences), longest, dtype=torch.int64) for name in ("ids", "mask", "types")}
    for b, ids in enumerate(sequences):
        batch["ids"][b, : len(ids)] = torch.from_numpy(ids)
        batch["mask"][b, : len(ids)] = 1
        if second_starts is not None:
            batch["types"][b, second_starts[b] : len(ids)] = 1
    return {"input_ids": batch["ids"], "attention_mask": batch["mask"], "token_type_ids": batch["types"]}


def in_order(hidden_TD: Tensor, packed: Packed) -> list[Tensor]:
    """Each sequence's tokens, in the caller's order."""
    spans = zip(packed.first_B.tolist(), packed.lengths_B.tolist(), strict=True)
    return [hidden_TD[first : first + length] for first, length in spans]


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------- transformers as the oracle


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("shape", [SMALL, MINILM], ids=["small", "minilm"])
def test_equals_transformers(shape: EncoderShape, pair: bool, tmp_path: Path) -> None:
    model = oracle(shape)
    encoder = ours(model, tmp_path)
    sequences = sentences(RAGGED, shape.vocab_size)
    second_starts = [len(ids) // 2 for ids in sequences] if pair else None
    packed = pack(sequences, second_starts)
    expected = model(**padded(sequences, second_starts))
    hidden_TD = encoder(packed)
    for b, own in enumerate(in_order(hidden_TD, packed)):
        close(own, expected.last_hidden_state[b, : len(own)])
    close(encoder.sentence_vectors(packed, "pooler"), expected.pooler_output)
    close(encoder.sentence_vectors(packed, "cls"), expected.last_hidden_state[:, 0])
    mean = torch.stack([expected.last_hidden_state[b, :length].mean(0) for b, length in enumerate(RAGGED)])
    close(encoder.sentence_vectors(packed, "mean"), mean)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("shape", [SMALL, MINILM], ids=["small", "minilm"])
def test_gradients_equal_transformers(shape: EncoderShape, pooling: Any, tmp_path: Path) -> None:
    model = oracle(shape)
    encoder = ours(model, tmp_path / "in")
    sequences = sentences(RAGGED, shape.vocab_size)
    second_starts = [len(ids) // 3 for ids in sequences]
    direction_BD = torch.randn(len(RAGGED), shape.hidden_size, generator=Generator().manual_seed(1)) / 100
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    (encoder.sentence_vectors(pack(sequences, second_starts), pooling) * direction_BD).sum().backward()

    result = model(**padded(sequences, second_starts))
    hidden = result.last_hidden_state
    vectors = {
        "pooler": result.pooler_output,
        "cls": hidden[:, 0],
        "mean": torch.stack([hidden[b, :length].mean(0) for b, length in enumerate(RAGGED)]),
    }[pooling]
    (vectors * direction_BD).sum().backward()
    with torch.no_grad():  # the oracle's gradients under our names: write them out as weights, read them back
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    _, expected, _ = load_pretrained(str(tmp_path / "gradients"))
    for name, gradient in gradients(encoder).items():
        close(gradient, expected[name])
        assert expected[name].abs().max() > 1e-4 or "pooler" in name or name.endswith("qkv.bias"), name


def test_all_tokens_have_gradients_too(tmp_path: Path) -> None:
    """`forward` (all tokens) against transformers: the sum over real tokens of a random projection."""
    model = oracle(SMALL)
    encoder = ours(model, tmp_path)
    sequences = sentences(RAGGED)
    packed = pack(sequences)
    direction_D = torch.randn(SMALL.hidden_size, generator=Generator().manual_seed(2))
    (encoder(packed) @ direction_D).square().sum().backward()
    batch = padded(sequences, None)
    projected_BL = model(**batch).last_hidden_state @ direction_D
    (projected_BL * batch["attention_mask"]).square().sum().backward()
    expected = model.embeddings.word_embeddings.weight.grad
    close(encoder.words.weight.grad, expected, 2e-5 * float(expected.abs().max()))


# ------------------------------------------------------------------------------- packing


def test_order_of_sequences_does_not_matter() -> None:
    encoder = seeded()
    sequences = sentences(RAGGED)
    starts = [len(ids) // 2 for ids in sequences]
    shuffled = np.random.default_rng(3).permutation(len(sequences)).tolist()
    for pooling in POOLINGS:
        vectors_BD = encoder.sentence_vectors(pack(sequences, starts), pooling)
        again_BD = encoder.sentence_vectors(
            pack([sequences[b] for b in shuffled], [starts[b] for b in shuffled]), pooling
        )
        close(again_BD, vectors_BD[shuffled], 1e-6)


def test_packed_equals_one_by_one() -> None:
    encoder = seeded()
    sequences = sentences(RAGGED)
    packed = pack(sequences)
    for own, ids in zip(in_order(encoder(packed), packed), sequences, strict=True):
        close(own, encoder(pack([ids])), 1e-6)


@pytest.mark.parametrize("lengths", [[7] * 5, [1], [1, 64], list(range(1, 60)), [20, 21, 22, 23, 24, 25]], ids=str)
def test_cls_only_last_layer_equals_full(lengths: list[int]) -> None:
    encoder = seeded()
    packed = pack(sentences(lengths))
    close(encoder.sentence_vectors(packed, "cls"), encoder(packed)[packed.first_B], 1e-6)


@pytest.mark.parametrize("lengths", [[3, 1, 3, 12], [2, 2], [9, 10, 11, 12], [8]], ids=str)
def test_attention_gradient(lengths: list[int]) -> None:
    """Finite differences in fp64, for blocks with and without padding, rows shorter and longer than a register."""
    packed = pack(sentences(lengths))
    qkv_T3D = torch.randn(sum(lengths), 3 * 6, dtype=torch.float64, generator=Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: attention(x, packed, heads=2), qkv_T3D.requires_grad_())


def test_gradients_are_the_same_with_and_without_a_buffer() -> None:
    """Added in place where the engine has laid out a buffer (in fp32 for bf16 weights too), made afresh elsewhere."""
    packed = pack(sentences(RAGGED))
    fresh, buffered = seeded().to(torch.bfloat16), seeded().to(torch.bfloat16)
    buffers = {}
    for name, parameter in buffered.named_parameters():
        parameter.grad_dtype = torch.float32
        buffers[name] = parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    for encoder in (fresh, buffered):
        encoder.sentence_vectors(packed, "pooler").float().square().sum().backward()
    for name, parameter in buffered.named_parameters():
        assert parameter.grad is buffers[name]
        expected = gradients(fresh)[name].float()
        close(buffers[name], expected, 2**-6 * float(expected.abs().max()))  # bf16 has 8 bits


def test_blocks_cover_all_tokens_with_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(4, 60, 200)
    packed = pack(sentences(lengths.tolist()))
    assert packed.tokens == lengths.sum()
    assert packed.padded == 200 * lengths.max()
    assert [block.tokens.start for block in packed.blocks] == [0, *(block.tokens.stop for block in packed.blocks[:-1])]
    assert packed.blocks[-1].tokens.stop == packed.tokens
    assert sum(block.count for block in packed.blocks) == 200
    assert sum(block.count * block.longest for block in packed.blocks) <= 1.3 * packed.tokens


def test_packed_fields_speak_of_the_callers_order() -> None:
    sequences = sentences([5, 2, 9])
    packed = pack(sequences, [3, 1, 4])
    assert packed.lengths_B.tolist() == [5, 2, 9]
    for b, (ids, types, positions, owner) in enumerate(
        zip(
            *(in_order(x, packed) for x in (packed.ids_T, packed.types_T, packed.positions_T, packed.sequence_T)),
            strict=True,
        )
    ):
        assert ids.tolist() == sequences[b].tolist()
        assert types.tolist() == [int(t >= [3, 1, 4][b]) for t in range(len(ids))]
        assert positions.tolist() == list(range(len(ids)))
        assert set(owner.tolist()) == {b}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_examples_give_zero_gradients(pooling: Any, dtype: torch.dtype) -> None:
    encoder = seeded().to(dtype)
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    vectors_BD = encoder.sentence_vectors(pack([]), pooling, Generator().manual_seed(0))
    assert vectors_BD.shape == (0, SMALL.hidden_size)
    vectors_BD.sum().backward()
    assert all(gradient.eq(0).all() for gradient in gradients(encoder).values())


def test_to_moves_every_tensor() -> None:
    moved = pack(sentences(RAGGED), [1] * len(RAGGED)).to("meta")
    records = [moved, *moved.blocks]
    tensors = [value for record in records for value in vars(record).values() if isinstance(value, Tensor)]
    assert len(tensors) > 7
    assert all(tensor.is_meta for tensor in tensors)
    assert pack(sentences(RAGGED)).to("meta", blocks=False).blocks == ()


def test_bf16_stays_close_to_fp32() -> None:
    encoder = seeded()
    packed = pack(sentences(RAGGED))
    exact_TD = encoder(packed)
    rough_TD = encoder.to(torch.bfloat16)(packed)
    assert rough_TD.dtype == torch.bfloat16
    assert (rough_TD.float() - exact_TD).square().mean().sqrt() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="MTBERT_GPU=1 make test ARGS=tests/test_encoder.py, on a GPU")
def test_variable_length_kernel_equals_blocks() -> None:
    encoder = Encoder(MINILM, 0.1)
    initialise(encoder, 0)
    packed = pack(sentences(RAGGED, MINILM.vocab_size))
    exact_BD = encoder.sentence_vectors(packed, "pooler")
    exact_BD.square().sum().backward()
    exact = gradients(encoder)
    encoder.zero_grad(set_to_none=True)
    close(encoder.cuda().sentence_vectors(packed.to("cuda"), "pooler").cpu(), exact_BD)  # fp32: blocks on the GPU
    rough_BD = encoder.to(torch.bfloat16).sentence_vectors(packed.to("cuda"), "pooler")
    rough_BD.float().square().sum().backward()
    assert torch.cosine_similarity(rough_BD.float().cpu(), exact_BD).min() > 0.999
    for name, gradient in gradients(encoder).items():
        assert torch.cosine_similarity(gradient.float().cpu().flatten(), exact[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize(
    ("capability", "size", "kernel"),
    [((8, 0), 64, True), ((9, 0), 192, True), ((7, 5), 64, False), ((8, 6), 200, False), ((8, 0), 12, False)],
)
def test_the_kernel_gets_only_what_it_takes(
    capability: tuple[int, int], size: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU in name only, which torch has for such tests; the kernel alone can do without blocks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    shape = replace(SMALL, hidden_size=2 * size, heads=2)
    packed = replace(pack(sentences([5, 3])), blocks=())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        qkv_T3D = torch.empty(8, 6 * size, dtype=torch.bfloat16)
        packed = replace(packed, starts=torch.empty(3, dtype=torch.int32))
        with nullcontext() if kernel else pytest.raises(AssertionError, match="without its blocks"):
            assert attention(qkv_T3D, packed, 2).shape == (8, 2 * size)
        encoder = Encoder(shape, 0.1)
        assert encoder.reads_blocks, "fp32"
        encoder.pooler.weight = torch.nn.Parameter(torch.empty(1, dtype=torch.bfloat16))
        assert encoder.reads_blocks is not kernel
    assert Encoder(shape, 0.1).bfloat16().reads_blocks, "on a CPU"


# ------------------------------------------------------------------------------- initialisation and dropout


def seeded(p: float = 0.1, seed: int = 0) -> Encoder:
    encoder = Encoder(SMALL, p)
    initialise(encoder, seed)
    return encoder


def test_initialisation_is_berts_and_addressed() -> None:
    first, again, other = seeded(seed=1).state_dict(), seeded(seed=1).state_dict(), seeded(seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["words.weight"], other["words.weight"])
    for name, tensor in first.items():
        if tensor.dim() == 2:
            assert tensor.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(tensor.numel())), name
            assert abs(tensor.mean().item()) < 5 * 0.02 / math.sqrt(tensor.numel()), name
        else:
            assert tensor.unique().tolist() == [float(name.endswith("norm.weight"))], name


def test_dropout_is_addressed_and_off_without_a_generator() -> None:
    encoder = seeded(0.3)
    packed = pack(sentences(RAGGED))

    def run(seed: int | None) -> Tensor:
        return encoder(packed, None if seed is None else Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(run(7), run(7))
    assert not torch.equal(run(7), run(8))
    assert torch.equal(run(None), encoder.train()(packed))
    assert torch.equal(run(None), encoder.eval()(packed))
    assert torch.equal(state, torch.get_rng_state())  # the global generator was left alone


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_expectation(p: float) -> None:
    n = 1_000_003
    dropped = dropout(torch.ones(n), p, Generator().manual_seed(0))
    kept = (dropped > 0).double().mean().item()
    assert abs(kept - (1 - p)) < 1 / 512 + 5 * math.sqrt(p * (1 - p) / n)
    exact = 1 - round(p * 256) / 256
    assert abs(kept - exact) < 5 * math.sqrt(p * (1 - p) / n)
    assert dropped.max().item() == pytest.approx(1 / exact, rel=1e-6)
    assert dropped.double().mean().item() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / n))
    masks_8 = (dropped[: n // 8 * 8] > 0).view(-1, 8).double()  # the eight masks of one draw are independent
    assert (torch.corrcoef(masks_8.T) - torch.eye(8)).abs().max() < 5 / math.sqrt(n / 8)


def test_dropout_of_bf16_keeps_the_expectation() -> None:
    dropped = dropout(torch.ones(1_000_000, dtype=torch.bfloat16), 0.1, Generator().manual_seed(0))
    assert dropped.double().mean().item() == pytest.approx(1, abs=5e-3)


def test_dropout_gradient_has_the_mask_of_the_forward() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x, 0.4, Generator().manual_seed(0))
    y.sum().backward()
    assert torch.equal(x.grad, y)


# ------------------------------------------------------------------------------- weights in and out


def test_saved_weights_come_back_and_open_in_transformers(tmp_path: Path) -> None:
    encoder = seeded()
    save_pretrained(encoder.state_dict(), SMALL, tmp_path / "new" / "folder")
    shape, state, folder = load_pretrained(str(tmp_path / "new" / "folder"))
    assert (shape, folder) == (SMALL, tmp_path / "new" / "folder")
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state_dict().items())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]

    model = BertModel.from_pretrained(folder).eval()
    sequences = sentences(RAGGED)
    close(model(**padded(sequences, None)).pooler_output, encoder.sentence_vectors(pack(sequences), "pooler"))


def test_old_names_and_heads_of_other_models_are_read(tmp_path: Path) -> None:
    encoder = seeded()
    save_pretrained(encoder.state_dict(), SMALL, tmp_path)
    tensors = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t.half()
        for name, t in safetensors.torch.load_file(tmp_path / "model.safetensors").items()
    }
    tensors["cls.predictions.bias"] = torch.zeros(97)
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    _, state, _ = load_pretrained(str(tmp_path))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name, tensor in encoder.state_dict().items():
        close(state[name], tensor, 1e-4)


def test_missing_pooler_is_left_as_initialised(tmp_path: Path) -> None:
    encoder = seeded()
    state = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("pooler.")}
    save_pretrained(state, SMALL, tmp_path)
    _, state, _ = load_pretrained(str(tmp_path))
    other = seeded(seed=5)
    fresh = other.pooler.weight.clone()
    assert other.load_weights(state) == ["pooler.weight", "pooler.bias"]
    assert torch.equal(other.pooler.weight, fresh)
    assert torch.equal(other.words.weight, encoder.words.weight)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(seeded().state_dict(), SMALL, tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path | str, *fragments: str) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("model_type", None),
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("num_hidden_layers", 0),
        ("hidden_size", "24"),
        ("vocab_size", None),
        ("num_attention_heads", 5),
        ("num_attention_heads", 2.5),
        ("layer_norm_eps", "small"),
    ],
)
def test_unfit_config_is_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(folder, str(path), key)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json", "JSON")


def test_missing_files_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "aside")
    refused(folder, "no model.safetensors", "save_pretrained")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "No such file")
    refused(folder / "config.json", "no such folder")
    refused("/no/such/folder", "/no/such/folder", "no such folder")
    refused("~/no-such-folder", "no such folder")
    refused("a/b/c", "no such folder")


class Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert load_pretrained(str(folder))[0] == SMALL
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors", "convert")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "model.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_corrupt_weights_are_refused(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused(folder, str(path), "not a readable safetensors file")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "encoder.layer.1.attention.self.key.weight"
    safetensors.torch.save_file({**tensors, name: torch.zeros(24, 23)}, path)
    refused(folder, str(path), name, "(24, 23)", "(24, 24)")
    safetensors.torch.save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    refused(folder, str(path), name)


# ------------------------------------------------------------------------------- a stand-in hub on loopback


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    """Serves `folder` as `some-org/small`."""
    with stand_in_hub({"models/some-org/small": {"0" * 40: read_files(folder)}}) as endpoint:
        yield endpoint


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_elsewhere(names: Sequence[str], endpoint: str, home: Path) -> list[list[str]]:
    """`load_pretrained` in a process of its own, since the hub's client reads its environment when imported."""
    program = (
        "import sys; from mtbert.errors import UserError; from mtbert.pretrained import load_pretrained\n"
        "for name in sys.argv[1:]:\n"
        "    try: shape, state, folder = load_pretrained(name); print(shape, len(state), folder, sep='\\t')\n"
        "    except UserError as error: print('UserError', error, sep='\\t')"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *names], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_hub_names_are_fetched_once(hub: str, folder: Path, tmp_path: Path) -> None:
    names = ["some-org/small", "some-org/other", "not a name"]
    fetched, *refusals = load_elsewhere(names, hub, tmp_path)
    assert fetched[:2] == [str(SMALL), str(len(seeded().state_dict()))]
    assert (Path(fetched[2]) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    cached, unreachable = load_elsewhere(names[:2], "http://127.0.0.1:9", tmp_path)
    assert cached == fetched
    for name, (kind, message) in zip([*names[1:], names[1]], [*refusals, unreachable], strict=True):
        assert kind == "UserError"
        assert name in message and "from the hub" in message, message


def test_a_cased_model_from_the_hub_stays_cased(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {**read_files(folder), "vocab.txt": b"[UNK]\n[CLS]\n[SEP]\nUs\nus\n"}
    files["tokenizer_config.json"] = b'{"do_lower_case": false}'
    with stand_in_hub({"models/some-org/cased": {"0" * 40: files}}) as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        _, _, fetched = load_pretrained("some-org/cased")
    assert load_tokenizer(fetched).encode("Us us", add_special_tokens=False).tokens == ["Us", "us"]


def test_a_damaged_download_is_refused(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, hub, tmp_path)
    _, _, fetched = load_pretrained("some-org/small")
    blob = (fetched / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    refused("some-org/small", "encoder.pretrained some-org/small:", f"{blob} is damaged; remove it")
    blob.unlink()
    assert load_pretrained("some-org/small")[2] == fetched


def test_shape_is_plain_data() -> None:
    assert EncoderShape(**asdict(SMALL)) == SMALL
