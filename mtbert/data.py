"""Examples, tokenised once into memory-mapped arrays, and batches out of them.

    N examples, S texts of an example (1 to 3), B examples of a batch, P texts of a batch, T tokens of a batch

A file is read once (`readers.py`), its texts are split into wordpieces in chunks, and everything that training needs
lies from then on in a folder of flat arrays: opening ten million examples makes no Python object per example, and the
ranks of a host share the pages. The folder's name is a hash of all that its content depends on.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from mtbert.config import HUB_FILE, DataConfig, TaskConfig
from mtbert.errors import UserError
from mtbert.files import permitted, read_small, user_path
from mtbert.packing import Packed, pack
from mtbert.pretrained import hub_file
from mtbert.readers import Quarantined
from mtbert.token_cache import Progress, ensure

T = TypeVar("T")
# ------------------------------------------------------------------------------------------------ tokenizer


MAX_TOKENIZER = 2**27
"""Bytes; five times that of the largest vocabularies in use."""
_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}  # what tokenizer_config.json says → argument of BertNormalizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, a BERT vocab.txt, or a folder with one of them (tokenizer.json first).

    With vocab.txt, texts are lower-cased, lose their accents with that and are split at Chinese characters, unless a
    tokenizer_config.json beside it says otherwise. The tokenizer never truncates or pads. Raises `UserError` if there
    is none, it cannot be read, it lacks [CLS], [SEP] or the token for unknown words, or tokenizer_config.json
    contradicts tokenizer.json: transformers goes by the former.
    """
    path = user_path(path)
    with permitted(str(path)):
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
            if not found:
                raise UserError(f"{path}: no tokenizer.json and no vocab.txt in this folder")
            path = found[0]
        elif not path.is_file():
            raise UserError(f"{path}: no such file; name a tokenizer.json, a vocab.txt or a folder with one")
    if path.stat().st_size > MAX_TOKENIZER:
        raise UserError(f"{path}: more than {MAX_TOKENIZER:,} bytes, which is no tokenizer")
    beside = path.with_name("tokenizer_config.json")
    try:
        settings = json.loads(read_small(beside)) if beside.is_file() else {}
        chosen = {ours: settings[key] for key, ours in _NORMALIZER.items() if key in settings}
        tokenizer = Tokenizer.from_file(str(path)) if path.suffix == ".json" else _word_piece(path, chosen)
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(f"{path}: not a readable tokenizer: {' '.join(str(error).split())}") from None
    normalizer, theirs = tokenizer.normalizer, str(settings.get("tokenizer_class", "BertTokenizer"))
    if isinstance(normalizer, normalizers.BertNormalizer) and theirs.startswith("BertTokenizer"):
        for key, ours in _NORMALIZER.items():
            has = getattr(normalizer, ours)
            if (said := chosen.get(ours, has)) != has:
                differs = f"{key} is {json.dumps(said)}, {path.name} beside it has {ours} {json.dumps(has)}"
                raise UserError(f"{beside}: {differs}; change the one that is wrong")
    for token in ("[CLS]", "[SEP]"):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path}: the vocabulary has no {token}; a BERT tokenizer is needed")
    unknown = getattr(tokenizer.model, "unk_token", None)  # what is added beside the model's own does not count
    if unknown is not None and tokenizer.model.token_to_id(unknown) is None:
        raise UserError(f"{path}: the vocabulary has no {unknown!r}, as which unknown words are read")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _word_piece(path: Path, chosen: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**chosen)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
    tokenizer.add_special_tokens([token for token in specials if tokenizer.token_to_id(token) is not None])
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    if cls_id is not None and sep_id is not None:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of [CLS] and [SEP], as `collate` takes them."""
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    assert cls_id is not None and sep_id is not None, "load_tokenizer checks"
    return cls_id, sep_id


# ------------------------------------------------------------------------------------------------ dataset


class Strings(Sequence[str]):
    """Strings laid end to end as UTF-8 in one array; each is decoded when it is asked for."""

    def __init__(self, utf8: NDArray[np.uint8], starts: NDArray[np.int64]) -> None:
        self._utf8 = utf8
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # counts negative ones from the end, raises IndexError
        return self._utf8[self._starts[index] : self._starts[index + 1]].tobytes().decode()


@dataclass(frozen=True)
class Dataset:
    """One split of one task, memory-mapped; cheap to open and safe to open from every rank."""

    file: str
    texts: int  # S, 1 to 3
    labels_N: NDArray[np.float32]
    lengths_NS: NDArray[np.int32]  # wordpieces without special tokens
    lines_N: NDArray[np.int64]  # line of the file that the row begins on
    ids: Sequence[str]  # the id column, or else the line
    quarantined: list[Quarantined]
    all_tokens: np.ndarray  # uint16 or uint32; text s of example i is number i · S + s
    token_starts: NDArray[np.int64]  # N · S + 1
    all_texts: Strings

    def __len__(self) -> int:
        return len(self.labels_N)

    def tokens(self, i: int) -> tuple[np.ndarray, ...]:
        """Wordpiece ids of each text of example i, without special tokens."""
        starts = self.token_starts[i * self.texts : (i + 1) * self.texts + 1].tolist()
        return tuple(self.all_tokens[start:end] for start, end in itertools.pairwise(starts))

    def raw(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[tuple[str, ...]]:
        """The texts of these examples as they stood in the file."""
        return [tuple(self.all_texts[i * self.texts : (i + 1) * self.texts]) for i in map(int, indices)]


def load_dataset(
    task: TaskConfig,
    name: str,
    split: Literal["train", "dev"],
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
) -> Dataset:
    """The examples of a task's split, tokenised on the first call and opened from the cache after that.

    Args:
        name: the task's, for messages.
        progress: called about twice a second once tokenising has taken two.

    Malformed rows, and rows whose text or label is empty, are left out and listed in `quarantined`. A label that is no
    number, or not one of the task's, is an error: a wrong label column must not pass as a small file. So is a file of
    which more than 1 % (and more than 5 rows) would be left out.

    Raises `UserError` naming the file, the line and the column.
    """
    file = task.train if split == "train" else task.dev
    assert file is not None, "only asked for where the task has one"
    shown, path = locate_file(file, f"tasks.{name}.{split}", config)
    source = task.columns.source if split == "dev" else None  # only development examples are scored by it
    return load_file(path, shown, task, config, tokenizer, progress, source)


def load_file(
    path: Path,
    shown: str,
    task: TaskConfig,
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    source: str | None = None,
) -> Dataset:
    """The examples of any file with a task's columns; all else as `load_dataset`, which finds the task's own.

    Args:
        shown: what messages call the file.
        source: column that the file must have as well, for reports.
    """
    cache = user_path(config.cache) / "tokens"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache {config.cache}: cannot make {cache}: {error.strerror}") from None
    if not os.access(cache, os.W_OK | os.X_OK):
        raise UserError(f"data.cache {config.cache}: cannot write to {cache}; name a folder of your own")
    try:
        folder = ensure(cache, path, shown, task, tokenizer, progress, source)
    except BrokenPipeError:  # of who reads what is told of the progress
        raise
    except OSError as error:  # what is wrong with the file itself is a `UserError`
        raise UserError(f"data.cache {config.cache}: cannot keep {shown} there: {error.strerror or error}") from None
    return _open(folder, shown)


def locate_file(file: str, where: str, config: DataConfig) -> tuple[str, Path]:
    """What messages call a task's file, and where it lies on this machine; downloads `hub:owner/name/path`.

    Raises `UserError` where the hub does not give it, or it is not what the hub gave.
    """
    if not (named := HUB_FILE.fullmatch(file)):
        path = user_path(config.dir or ".") / user_path(file)
        if config.dir is None and not Path(file).is_absolute() and not os.access(path, os.F_OK):
            raise UserError(f"{where}: {path}: no such file in {Path.cwd()}; data.dir is not set")
        return str(path), path
    repository, revision, path_in_repository = named.groups()
    return file, hub_file(repository, path_in_repository, f"{where}: {file}", revision)


def _open(folder: Path, shown: str) -> Dataset:
    manifest = json.loads((folder / "manifest.json").read_text())
    texts, named = manifest["texts"], manifest["named"]

    def array(name: str, dtype: Any) -> np.ndarray:
        if manifest["sizes"][name] == 0:  # ids may all be empty; mmap refuses an empty file
            return np.empty(0, dtype)
        # a plain array over the mapping: slices of np.memmap itself cost several times as much
        return np.asarray(np.memmap(folder / name, dtype, mode="r"))

    return Dataset(
        file=shown,
        texts=texts,
        labels_N=array("labels", np.float32),
        lengths_NS=array("lengths", np.int32).reshape(-1, texts),
        lines_N=array("lines", np.int64),
        ids=Strings(array("ids", np.uint8), array("id_starts", np.int64))
        if named
        else _LineIds(array("lines", np.int64)),
        quarantined=[Quarantined(shown, *entry) for entry in manifest["quarantined"]],
        all_tokens=array("tokens", manifest["token_dtype"]),
        token_starts=array("token_starts", np.int64),
        all_texts=Strings(array("texts", np.uint8), array("text_starts", np.int64)),
    )


class _LineIds(Sequence[str]):
    """Names rows by their lines, where the task has no id column."""

    def __init__(self, lines_N: NDArray[np.int64]) -> None:
        self._lines_N = lines_N

    def __len__(self) -> int:
        return len(self._lines_N)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        lines = self._lines_N[index]
        return [str(line) for line in lines] if isinstance(index, slice) else str(lines)


# ------------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    packed: Packed  # texts encoded separately: all first ones, then all second ones, …
    labels_B: Tensor  # float32 for regression, int64 for classes


def kept_lengths(lengths_NS: NDArray[np.int32], joint: bool, max_length: int) -> NDArray[np.int32]:
    """Wordpieces of each text that fit into `max_length` tokens, special tokens included.

    Joint pairs lose from the longer text first, as tokenizers' `longest_first` does: once both have half of the room,
    the second keeps the odd one unless it was the shorter.
    """
    if not joint:
        return np.minimum(lengths_NS, np.int32(max_length - 2))
    room = max_length - 3
    shorter_N = np.minimum(lengths_NS.min(axis=1), room // 2)
    longer_N = np.minimum(lengths_NS.max(axis=1), room - shorter_N)
    first_longer_N = lengths_NS[:, 0] > lengths_NS[:, 1]
    first_N = np.where(first_longer_N, longer_N, shorter_N)
    return np.stack([first_N, shorter_N + longer_N - first_N], axis=1)


def sequence_lengths(dataset: Dataset, joint: bool, max_length: int) -> NDArray[np.int32]:
    """Tokens that each example costs in the encoder, after truncation and with special tokens, (N,).

    Texts encoded separately cost the sum of their sequences.
    """
    kept_NS = kept_lengths(dataset.lengths_NS, joint, max_length)
    lengths_N: NDArray[np.int32] = kept_NS.sum(axis=1, dtype=np.int32)
    lengths_N += 3 if joint else 2 * dataset.texts
    return lengths_N


def collate(
    dataset: Dataset,
    indices: NDArray[np.integer[Any]],
    task: TaskConfig,
    tokenizer_specials: tuple[int, int],
    max_length: int,
) -> Batch:
    """The examples at `indices`, packed; no index gives a batch with B = 0.

    A joint pair is `[CLS] a [SEP] b [SEP]`, any other text `[CLS] a [SEP]`.

    Args:
        tokenizer_specials: ids of [CLS] and [SEP] (`special_ids`).
        max_length: of a sequence, in tokens; what is longer is truncated.
    """
    indices_B = np.asarray(indices, dtype=np.int64)
    joint = task.head.kind == "joint"
    kept_BS = kept_lengths(dataset.lengths_NS[indices_B], joint, max_length)
    text_BS = indices_B[:, None] * dataset.texts + np.arange(dataset.texts)
    if joint:  # texts in the order they are laid end to end, and how many special tokens come before each
        kept_P, text_P = kept_BS.ravel(), text_BS.ravel()
        before_P = 3 * (np.arange(len(kept_P)) // 2) + 1 + np.arange(len(kept_P)) % 2
        lengths = (kept_BS.sum(axis=1) + 3).tolist()
    else:
        kept_P, text_P = kept_BS.T.ravel(), text_BS.T.ravel()
        before_P = 2 * np.arange(len(kept_P)) + 1
        lengths = (kept_P + 2).tolist()
    cls_id, sep_id = tokenizer_specials
    bounds = [0, *itertools.accumulate(lengths)]
    ids_T = np.full(bounds[-1], sep_id, dtype=np.int64)
    ids_T[bounds[:-1]] = cls_id
    laid_P = kept_P.cumsum() - kept_P  # where each text would start without special tokens
    word = np.arange(kept_P.sum())
    source = word + np.repeat(dataset.token_starts[text_P] - laid_P, kept_P)
    ids_T[word + np.repeat(before_P, kept_P)] = dataset.all_tokens[source]
    sequences = [ids_T[start:end] for start, end in itertools.pairwise(bounds)]
    labels_B = torch.from_numpy(dataset.labels_N[indices_B])
    return Batch(
        packed=pack(sequences, (kept_BS[:, 0] + 2).tolist() if joint else None),
        labels_B=labels_B if task.regression else labels_B.long(),
    )


def prefetch(make: Callable[[int], T], start: int, stop: int, ahead: int = 2) -> Generator[T, None, None]:
    """`make(start)`, …, `make(stop − 1)` in order, up to `ahead` of them made in a thread before they are asked for.

    An exception in `make` is raised here, with its traceback. Closing the generator ends the thread.
    """
    assert ahead >= 1
    steps = iter(range(start, stop))
    with ThreadPoolExecutor(1, "prefetch") as pool:
        pending: deque[Future[T]] = deque(pool.submit(make, step) for step in itertools.islice(steps, ahead))
        try:
            while pending:
                item = pending.popleft().result()
                pending.extend(pool.submit(make, step) for step in itertools.islice(steps, 1))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


__all__ = [
    "Batch",
    "Dataset",
    "Quarantined",
    "collate",
    "load_dataset",
    "load_file",
    "load_tokenizer",
    "locate_file",
    "prefetch",
    "sequence_lengths",
    "special_ids",
]
