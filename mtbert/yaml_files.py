"""YAML as configurations and search spaces use it: numbers such as 3e-4, `base` files, overrides; nothing else."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from mtbert.errors import UserError

MAX_YAML = 2**20  # bytes
MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number and a date as text, and refuses a key given twice."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around a text that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):  # YAML 1.1 wants 3.0e-4
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    if not isinstance(node, yaml.MappingNode):  # `!!map [1]`
        raise yaml.constructor.ConstructorError(None, None, "not a mapping", node.start_mark)
    for key, _ in node.value:  # before `<<` brings in keys that may well be given again
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


def _refuse(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    return loader.construct_undefined(node)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text)
for _tag in ("binary", "omap", "pairs", "set"):  # no key takes them, and JSON has none
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refuse)


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` holds, in bounded memory. Raises `UserError`, which begins with `where`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MAX_VALUES:
            what = f"more than {MAX_VALUES:,} values once its aliases are written out"
            raise UserError(f"{where} line {node.start_mark.line + 1}: not valid YAML: {what}")
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # of a number, such as one of 5000 digits
        raise UserError(f"{where}: not valid YAML: {error}") from None
    except LookupError:  # of `!!int ''` and `!!bool maybe`
        raise UserError(f"{where}: not valid YAML: a value is not what its tag says; leave tags (!!…) out") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: not valid YAML: {' '.join(problem.split())}") from None


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node has with its aliases written out; aliases of aliases double a document line by line."""
    if id(node) not in sizes:
        sizes[id(node)] = MAX_VALUES + 1  # what it is if it turns out to be inside of itself
        values = node.value if isinstance(node, yaml.CollectionNode) else ()
        children = itertools.chain(*values) if isinstance(node, yaml.MappingNode) else values
        sizes[id(node)] = 1 + sum(_written_out(child, sizes) for child in children)
    return sizes[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file laid over the file its `base` names (relative to itself). Raises `UserError`."""
    return functools.reduce(merge, read_layers(path))


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """What `read_yaml` lays over each other, the undermost first; `seen` led here."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_YAML:
        raise UserError(f"{path}: more than {MAX_YAML:,} bytes, which no configuration or search space needs")
    values = parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level must be keys and values, not a {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return [values]
    parent = (path.parent / str(base)).resolve()
    if not parent.is_file():
        raise UserError(f"{path}: base: {parent} is no file; name one YAML file, relative to this one")
    if parent in (*seen, path.resolve()):
        raise UserError(f"{path}: base {base}: the files are based on each other in a circle; take one base out")
    return [*read_layers(parent, (*seen, path.resolve())), values]


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`: sections key by key, all else whole."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value`, the value read as YAML, as nested dictionaries. Raises `UserError`."""
    key, equals, value = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"--set {text}: expected key=value, for example optimizer.lr=3e-5")
    *parents, last = key.split(".")
    nested: dict[str, Any] = {last: parse_yaml(value, f"--set {key}")}
    for parent in reversed(parents):
        nested = {parent: nested}
    return nested


def inline_yaml(value: Any) -> str:
    """A value on one line, such that `--set key=…` reads it back."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def dump_yaml(value: Any) -> str:
    """A document such that `parse_yaml` reads the value back; keys stay in their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
