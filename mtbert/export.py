"""A trained run as files that other programs open; docs/export.md describes every one of them.

    config.json, model.safetensors, tokenizer.json, …      transformers.BertModel / AutoTokenizer
    modules.json, 1_Pooling/, (2_Dense/)                   sentence_transformers.SentenceTransformer
    heads.json, heads.safetensors                          what each task puts on top of the sentence vector
    onnx/model.onnx, onnx/head_TASK.onnx                   on request: encoder and heads for onnxruntime
    README.md                                              model card

Shapes: B sequences padded to L tokens, D width, H heads of the encoder.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing
from torch import Tensor, nn
from torch.nn import functional as F

from mtbert import __version__
from mtbert.config import TaskConfig
from mtbert.data import special_ids
from mtbert.encoder import Encoder, Layer, Pooling
from mtbert.errors import UserError, to_install
from mtbert.files import folder_made_aside, user_path
from mtbert.heads import Head, MultiTaskModel
from mtbert.pages import render
from mtbert.pretrained import save_pretrained
from mtbert.record import RunRecord
from mtbert.trained import Trained, kept_encoder

HEADS_FORMAT = 1
OPSET = 20


def export(run: Trained, folder: Path, onnx: bool = False) -> None:
    """Write `folder`, which must not exist yet; it appears whole or not at all.

    Args:
        run: opened with fp32 weights; those are what is written.

    Raises `UserError` if the folder is taken or cannot be made, or onnx is wanted and not installed.
    """
    assert run.dtype == torch.float32, "load_run(…, precision='fp32')"
    folder = user_path(folder)
    try:
        if folder.exists():  # also . and /, beside which no name can be
            raise UserError(f"{folder}: exists already; name a new folder")
        with folder_made_aside(folder) as new:
            _encoder(run, new)
            _sentence_transformers(run, new)
            _heads(run, new)
            if onnx:
                _onnx(run, new / "onnx")
            _write(new / "README.md", model_card(run))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _write(path: Path, content: str | dict[str, Any] | list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Not `save_file`, which says of a full disk in an exception of its own, no `OSError`."""
    path.write_bytes(safetensors.torch.save(state, {"format": "pt"}))


# ------------------------------------------------------------------------------------------------ encoder


def _encoder(run: Trained, folder: Path) -> None:
    state = {name: tensor.cpu() for name, tensor in run.model.encoder.state_dict().items()}
    save_pretrained(state, run.shape, folder)
    cls_id, sep_id = special_ids(run.tokenizer)
    tokenizer = Tokenizer.from_str(run.tokenizer.to_str())
    tokenizer.post_processor = BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))  # which we do ourselves
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    specials = {f"{kind}_token": token for kind, token in names.items() if tokenizer.token_to_id(token) is not None}
    specials.setdefault("pad_token", "[SEP]")  # attention never sees it
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "model_max_length": run.max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **specials,
    }
    _write(folder / "tokenizer_config.json", tokenizer_config)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"pad_token_id": tokenizer.token_to_id(specials["pad_token"]), "dtype": "float32"}
    _write(folder / "config.json", config)


def _sentence_transformers(run: Trained, folder: Path) -> None:
    """Names as they have been since version 2, which the newest still reads."""
    pooling, width = run.model.pooling, run.shape.hidden_size
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modes = {f"pooling_mode_{mode}": False for mode in ("max_tokens", "mean_sqrt_len_tokens")}
    modes |= {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling != "mean"}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    if pooling == "pooler":
        modules.append(("2_Dense", "Dense"))
        activation = "torch.nn.modules.activation.Tanh"
        dense = {"in_features": width, "out_features": width, "bias": True, "activation_function": activation}
        _write(folder / "2_Dense" / "config.json", dense)
        pooler = {f"linear.{name}": tensor.cpu() for name, tensor in run.model.encoder.pooler.state_dict().items()}
        _write_tensors(folder / "2_Dense" / "model.safetensors", pooler)
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    _write(folder / "sentence_bert_config.json", {"max_seq_length": run.max_length, "do_lower_case": False})


# ------------------------------------------------------------------------------------------------ heads


def _heads(run: Trained, folder: Path) -> None:
    whole = {name: tensor.cpu().contiguous() for name, tensor in run.model.state_dict().items()}
    state = {name.removeprefix("heads."): whole[name] for name in whole if name.startswith(("heads.", "shared."))}
    left_out = {name for name in whole if not name.startswith(("encoder.", "heads.", "shared."))}
    assert not left_out, f"the export has no place for {left_out}"
    _write_tensors(folder / "heads.safetensors", state)
    description = {
        "format": HEADS_FORMAT,
        "pooling": run.model.pooling,
        "max_length": run.max_length,
        "tasks": {name: _head(run, name, task) for name, task in run.config.tasks.items()},
    }
    _write(folder / "heads.json", description)


def _head(run: Trained, name: str, task: TaskConfig) -> dict[str, Any]:
    head = run.model.heads[name]
    assert isinstance(head, Head)
    classes: dict[str, Any] = {"classes": task.class_count}
    if not isinstance(task.classes, int):
        classes["id2label"] = dict(enumerate(task.classes))
    return {
        "kind": task.kind,
        "head": task.head.kind,
        "shared": task.head.shared,
        "hidden": task.head.hidden,
        "scale": head.scale,
        "middle": head.middle,
        "loss": task.loss_kind,
        **({"range": list(task.range)} if task.regression else classes),
    }


# ------------------------------------------------------------------------------------------------ ONNX


class PaddedEncoder(nn.Module):
    """The same weights on a padded batch, for exporters that know no packing. As slow as padding is."""

    def __init__(self, encoder: Encoder, pooling: Pooling) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states after the last layer (B, L, D), and sentence vectors (B, D); inputs are int64 (B, L)."""
        encoder = self.encoder
        positions_L = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_BLD = encoder.words(input_ids) + encoder.positions(positions_L) + encoder.types(token_type_ids)
        hidden_BLD = encoder.norm(hidden_BLD)
        real_BL = attention_mask.bool()
        for layer in encoder.layers:
            assert isinstance(layer, Layer)
            hidden_BLD = _padded_layer(layer, hidden_BLD, real_BL[:, None, None, :])
        if self.pooling == "mean":
            real_BL1 = real_BL[:, :, None].to(hidden_BLD.dtype)
            return hidden_BLD, (hidden_BLD * real_BL1).sum(1) / real_BL1.sum(1)
        cls_BD = hidden_BLD[:, 0]
        return hidden_BLD, torch.tanh(encoder.pooler(cls_BD)) if self.pooling == "pooler" else cls_BD


def _padded_layer(layer: Layer, hidden_BLD: Tensor, real_B11L: Tensor) -> Tensor:
    q, k, v = layer.qkv(hidden_BLD).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H) each
    context_BHLd = F.scaled_dot_product_attention(q, k, v, attn_mask=real_B11L)
    context_BLD = context_BHLd.transpose(1, 2).flatten(2)
    hidden_BLD = layer.attended_norm(hidden_BLD + layer.attended(context_BLD))
    result_BLD: Tensor = layer.down_norm(hidden_BLD + layer.down(F.gelu(layer.up(hidden_BLD))))
    return result_BLD


class _HeadOfTexts(nn.Module):
    def __init__(self, model: MultiTaskModel, task: str) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, vectors: Tensor) -> Tensor:
        return self.model.answer(self.task, vectors)


class _HeadOfPairs(_HeadOfTexts):
    """A head that compares two vectors, with the two apart."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([first, second]))


def _onnx(run: Trained, folder: Path) -> None:
    folder.mkdir()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=run.shape.max_positions)
    example = {  # three tensors: one that is given twice would count as one input
        name: torch.ones(2, 7, dtype=torch.int64) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    _export_onnx(
        PaddedEncoder(run.model.encoder, run.model.pooling).cpu(),
        example,
        {key: {0: batch, 1: length} for key in example},
        ["last_hidden_state", "sentence_embedding"],
        folder / "model.onnx",
    )
    for name, task in run.config.tasks.items():
        if task.kind == "triplets":  # trains the encoder; it has no head of its own
            continue
        apart = len(task.columns.text) == 2 and task.head.kind != "joint"
        names = ["first", "second"] if apart else ["vectors"]
        _export_onnx(
            (_HeadOfPairs if apart else _HeadOfTexts)(run.model.cpu(), name),
            {key: torch.zeros(3, run.shape.hidden_size) for key in names},
            {key: {0: batch} for key in names},
            ["answers"],
            folder / f"head_{name}.onnx",
        )


def _export_onnx(
    module: nn.Module,
    example: dict[str, Tensor],
    dynamic: dict[str, Any],
    outputs: list[str],
    path: Path,
) -> None:
    try:
        import onnxscript  # noqa: F401 - what torch's exporter needs
    except ImportError:
        raise UserError(f"--onnx: needs onnx and onnxscript: {to_install('onnx')}") from None
    chatty = logging.getLogger("torch.onnx")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations
            program = torch.onnx.export(
                module,
                kwargs=example,
                dynamic_shapes=dynamic,
                input_names=list(example),
                output_names=outputs,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)
    finally:
        chatty.setLevel(level)


# ------------------------------------------------------------------------------------------------ model card


def model_card(run: Trained) -> str:
    """What someone who finds the folder must know, from what the run recorded; Markdown with the hub's front matter."""
    kept = kept_encoder(run.run_dir)
    base = kept.origin.get("pretrained") if kept else None
    hub_name = base if kept and kept.origin.get("revision") else None
    scores = _scores(run)
    rows = []
    for name, task in run.config.tasks.items():
        score = scores.get(f"metric/{name}/{task.metric_kind}")
        shown = "not evaluated at this step" if score is None else f"{score:.4f}"
        source = _cell(Path(task.train).name)
        rows.append([name, task.kind, task.head.kind, task.loss_kind, source, task.metric_kind, shown])
    return render(
        "model_card.md",
        name=run.run_dir.resolve().name,
        version=__version__,
        hub_name=hub_name,
        pretrained=hub_name or (Path(base).name if base else None),
        shape=run.shape,
        step=run.step,
        max_length=run.max_length,
        config=run.config,
        tasks=rows,
        classes={
            name: ", ".join(map(_cell, task.classes))
            for name, task in run.config.tasks.items()
            if not isinstance(task.classes, int)
        },
    )


def _cell(text: str) -> str:
    """On one line, without what ends a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _scores(run: Trained) -> dict[str, float]:
    """What was logged when these weights were evaluated; nothing if they were not."""
    curves = RunRecord(run.run_dir).curves
    return {
        tag: float(curve.values[curve.steps == run.step - 1][-1])
        for tag, curve in curves.items()
        if tag.startswith("metric/") and run.step - 1 in curve.steps
    }
