"""BERT weights in and out of Hugging Face folders: config.json, model.safetensors, a tokenizer. No pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2
from safetensors import SafetensorError
from torch import Tensor

from mtbert.encoder import Encoder, EncoderShape
from mtbert.errors import UserError
from mtbert.files import read_small, seen_as_folder, user_path, write_atomically
from mtbert.manifest import sha256
from mtbert.runs import PRETRAINED_FILES, local_folder

_TO_HUGGING_FACE = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "attended": "attention.output.dense",
    "attended_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "down_norm": "output.LayerNorm",
}
_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
}
_CONFIG_DEFAULTS = {"type_vocab_size": 2, "layer_norm_eps": 1e-12}
# what config.json may say of the things this encoder does in one way only; the last is right when it says nothing
_CONFIG_MUST_BE = {
    "model_type": ("bert",),
    "hidden_act": ("gelu", None),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
}
MAX_LAYERS, MAX_SIZE = 1000, 10**8
"""Of a shape: far beyond any BERT, and few enough to be counted up in memory before the weights are looked at."""
_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]


def _hugging_face_names(name: str) -> list[str]:
    """Hugging Face's names for our parameter: three for the fused qkv, else one."""
    *module, kind = name.split(".")
    prefix = f"encoder.layer.{module[1]}." if module[0] == "layers" else ""
    if module[-1] == "qkv":
        return [f"{prefix}attention.self.{part}.{kind}" for part in ("query", "key", "value")]
    return [f"{prefix}{_TO_HUGGING_FACE[module[-1]]}.{kind}"]


def load_pretrained(name_or_folder: str, revision: str | None = None) -> tuple[EncoderShape, dict[str, Tensor], Path]:
    """Shape, fp32 weights under our names, and the folder (for the tokenizer) of a Hugging Face BERT.

    Args:
        revision: of a hub name: the commit to take; default the newest. The download shows its progress on a terminal,
            and what was downloaded is held to the checksum that the hub gave for it.

    Only `model.safetensors` is ever opened, never a pickle. Weights of heads in the file are ignored. A file without
    a pooler gives a state without `pooler.*`; `Encoder.load_weights` then leaves it as initialised and says so.

    Raises `UserError` naming the file or hub and what would be right.
    """
    folder = _folder(name_or_folder, revision)
    shape = read_shape(folder / "config.json")
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder}: no model.safetensors (pickled weights are not opened); convert once where you trust the file: "
            f"transformers.BertModel.from_pretrained({name_or_folder!r}).save_pretrained(FOLDER)"
        )
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
    found = {
        name.removeprefix("bert.")
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias"): t
        for name, t in tensors.items()
    }
    with torch.device("meta"):
        expected = Encoder(shape, 0.0).state_dict()
    state = {}
    for name, parameter in expected.items():
        parts = _hugging_face_names(name)
        if name.startswith("pooler.") and parts[0] not in found:
            continue
        wanted = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        for part in parts:
            if part not in found:
                raise UserError(f"{path}: no tensor {part}; a BERT of the shape in config.json has one")
            if found[part].shape != wanted:
                raise UserError(
                    f"{path}: {part} has shape {tuple(found[part].shape)}, the config.json beside it means {wanted}"
                )
        state[name] = torch.cat([found[part].float() for part in parts])
    return shape, state, folder


def save_pretrained(state: Mapping[str, Tensor], shape: EncoderShape, folder: Path) -> None:
    """Write config.json and model.safetensors as `transformers.BertModel.from_pretrained` opens them."""
    tensors = {}
    for name, tensor in state.items():
        parts = _hugging_face_names(name)
        for part, chunk in zip(parts, tensor.detach().cpu().chunk(len(parts)), strict=True):
            tensors[part] = chunk.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    write_shape(shape, folder / "config.json")


def write_shape(shape: EncoderShape, path: Path) -> None:
    """Write a shape as the config.json of `transformers.BertModel`."""
    config: dict[str, Any] = {key: getattr(shape, field) for field, key in _CONFIG_KEYS.items()}
    config |= {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu"}
    write_atomically(path, json.dumps(config, indent=2) + "\n")


def origin(name_or_folder: str, folder: Path) -> dict[str, str | None]:
    """What tells these pretrained weights from others: their name, the hub's commit (of a folder None), a SHA-256."""
    revision = None if seen_as_folder(user_path(name_or_folder)) else folder.name
    return {"pretrained": name_or_folder, "revision": revision, "sha256": sha256(folder / "model.safetensors")}


def _folder(name_or_folder: str, revision: str | None) -> Path:
    if (folder := local_folder(name_or_folder)) is not None:
        return folder
    what = f"encoder.pretrained {name_or_folder}"
    instead = (
        f"no folder here either: give one with {PRETRAINED_FILES}, or a name such as google-bert/bert-base-uncased"
    )
    with hub_errors(what, instead):
        fetched = Path(snapshot_download(name_or_folder, revision=revision, allow_patterns=_FILES))
    for path in fetched.iterdir():
        refuse_damaged(path, what)
    return fetched


@contextmanager
def hub_errors(what: str, instead: str = "") -> Iterator[None]:
    """Every failure of the hub's client as a `UserError`. What breaks on the way, or at a proxy, is no `OSError`."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what}: cannot fetch it from the hub: {reason}{instead and '; '}{instead}") from None


def hub_file(repository: str, path: str, what: str, revision: str | None = None) -> Path:
    """A file of a data set, fetched. Raises `UserError` where the hub does not give it, or it is not what the hub gave.

    Args:
        what: it is for, in messages.
    """
    with hub_errors(what):
        fetched = Path(hf_hub_download(repository, path, repo_type="dataset", revision=revision))
    refuse_damaged(fetched, what)
    return fetched


def refuse_damaged(path: Path, what: str) -> None:
    """Hold a large file that the hub's client has fetched to the hub's checksum. Raises `UserError` saying what to do.

    The client's cache calls a file what the hub gave as its ETag: of large files, weights and most data, the SHA-256.
    Small ones are known by git's name for them, and not checked.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        raise UserError(f"{what}: {blob} is damaged; remove it, and it is fetched again")


def read_shape(path: Path) -> EncoderShape:
    """The shape in a Hugging Face config.json. Raises `UserError` for what this encoder cannot be."""
    try:
        config = json.loads(read_small(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a Hugging Face BERT folder has this file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    for key, right in _CONFIG_MUST_BE.items():
        if config.get(key) not in right:
            raise UserError(f"{path}: {key} is {config.get(key)!r}; only BERT with {right[0]!r} can be loaded")
    shape: dict[str, Any] = {field: config.get(key, _CONFIG_DEFAULTS.get(key)) for field, key in _CONFIG_KEYS.items()}
    for field, key in _CONFIG_KEYS.items():
        kind = float if field == "layer_norm_eps" else int
        most = MAX_LAYERS if field == "layers" else MAX_SIZE
        if type(shape[field]) is not kind or not 0 < shape[field] <= most:
            raise UserError(
                f"{path}: {key} is {shape[field]!r}; it must be a positive {kind.__name__}, at most {most:,}"
            )
    if shape["hidden_size"] % shape["heads"]:
        raise UserError(
            f"{path}: hidden_size {shape['hidden_size']} is no multiple of num_attention_heads {shape['heads']}"
        )
    return EncoderShape(**shape)
