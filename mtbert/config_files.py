"""From files to `Config` and back: defaults < YAML (and the file it is `base`d on) < dotted overrides.

A mistake is told by its dotted key, with what would be right there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from mtbert.config import Config, Section, SurgeryConfig, WeightingConfig
from mtbert.errors import UserError
from mtbert.yaml_files import dump_yaml, merge, parse_override, read_layers

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
"""Of this checkout: the generated three-task quick start."""


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in `path` with dotted overrides (`a.b=value`, the value read as YAML) laid over it.

    What is the user's to name (tasks, shared layers, options, targets) is left out by null, and the options of a method
    by naming another one. Raises `UserError` naming the key and the nearest valid one.
    """
    return _laid(read_layers(Path(path)) if path is not None else [], overrides, str(path or "configuration"))


def config_of(values: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> Config:
    """The same from nested dictionaries; `where` begins the message of what is wrong with them."""
    return _laid([dict(values)], overrides, where)


def _laid(layers: Iterable[dict[str, Any]], overrides: Iterable[str], where: str) -> Config:
    merged: dict[str, Any] = {}
    # methods first: their options, which would go with another one, may be typed before them
    typed = sorted(overrides, key=lambda text: not text.startswith(("surgery.method=", "weighting.method=")))
    for layer in (*layers, *map(parse_override, typed)):
        _check_left_out(merged, layer, where)
        merged = merge(_without_options_of_another(merged, layer), layer)
    for path in _OPEN:
        merged = _without_nulls(merged, path)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


_OPEN = (("tasks",), ("shared_layers",), ("surgery", "options"), ("weighting", "options"), ("schedule", "targets"))
"""Where the names are the user's own: laid over each other they could only grow, if null did not take one out."""


def _inside(values: Any, path: Sequence[str]) -> dict[str, Any]:
    """The dictionary at a path; empty where there is none: `Config` complains of what is there instead."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _without_nulls(values: Any, path: Sequence[str]) -> Any:
    """Without the dictionary at a path if it is null, or without its entries that are."""
    key, *rest = path
    if not isinstance(values, dict) or key not in values:
        return values
    inner = _without_nulls(values[key], rest) if rest else values[key]
    if isinstance(inner, dict) and not rest:
        inner = {name: value for name, value in inner.items() if value is not None}
    kept = {name: value for name, value in values.items() if name != key}
    return kept if inner is None else {**kept, key: inner}


def _check_left_out(under: dict[str, Any], over: dict[str, Any], where: str) -> None:
    """A misspelt name set to null would leave in what was meant."""
    for path in _OPEN:
        known = _inside(under, path)
        for name, value in _inside(over, path).items():
            if value is None and name not in known:
                there = [str(other) for other, value in known.items() if value is not None]
                near = difflib.get_close_matches(str(name), there, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UserError(
                    f"{where}: {'.'.join(path)}.{name}: null leaves it out, but nothing before defines it; "
                    f"{hint}there: {', '.join(there) or 'none'}"
                )


def _without_options_of_another(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` without the options of a method that `over` replaces: no other one takes them."""
    for section, kind in (("surgery", SurgeryConfig), ("weighting", WeightingConfig)):
        old, new = _inside(under, [section]), _inside(over, [section])
        before = old.get("method", kind.model_fields["method"].default)
        if old and new.get("method", before) != before:
            under = {**under, section: {key: value for key, value in old.items() if key != "options"}}
    return under


_INSTEAD = {
    "model_type": "expected keys and values below it",
    "dict_type": "expected keys and values below it",
    "list_type": "expected a list, such as [a, b]",
    "tuple_type": "expected a list, such as [0, 1]",
    "string_type": "expected text; put it in quotes",
    "invalid_key": "a key must be text; put it in quotes",
}
"""What users are told where pydantic would speak of its own classes."""

_DECAY = "expected constant, linear, cosine or steps such as {milestones: [5, 25], gamma: 0.7}"
_UNIONS = {
    ("tasks", "<name>", "classes"): "expected how many classes, from 2 on, or a list of their names, such as "
    "[world, sport]; a name that YAML reads as a number or null needs quotes",
    ("schedule", "length"): "expected shortest, longest, unbalanced or a number of steps from 1 on",
    ("optimizer", "decay"): _DECAY,
    ("phases", "[]", "decay"): _DECAY,
    ("phases", "[]", "trainable"): "expected all, heads or a list of parts such as [encoder, sst]",
    ("phases", "[]", "lr_scale"): "expected a number above 0, or one for each part such as {encoder: 0.5}",
}
"""Keys of several types: pydantic adds each type's name, and complains of each."""


def _explain(error: ValidationError) -> str:
    """The first complaint in one line: dotted key, what is wrong, what would be right.

    An unknown key comes before everything else: it is why another one is missing.
    """
    errors = error.errors()
    first = next((each for each in errors if each["type"] in ("extra_forbidden", "invalid_key")), errors[0])
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    message = _INSTEAD.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | type(None)) else ""
    places = tuple(
        "[]" if isinstance(part, int) else "<name>" if first["loc"][:at] == ("tasks",) else part
        for at, part in enumerate(first["loc"])
    )
    union = next((path for path in _UNIONS if places[: len(path)] == path), ())
    if union and first["type"] != "extra_forbidden":
        return f"{'.'.join(parts[: len(union)])}: {_UNIONS[union]}{shown}"
    if union:
        del parts[len(union)]  # the name of the type
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(parts[:-1])
        near = difflib.get_close_matches(parts[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{key}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{key}: missing; it has no default"
    if first["type"] == "boolean":
        return f"{key}.{message}" if key else message
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        near = difflib.get_close_matches(str(given), choices, n=1)
        message += f"; did you mean {near[0]!r}?" if near else ""
    message = message[0].lower() + message[1:]
    return f"{key}: {message}{shown}" if key else message


def _valid_keys(parents: list[str]) -> list[str]:
    """Names valid under a dotted location of `Config`."""
    section: type[Section] = Config
    names = iter(parents)
    for name in names:
        annotation = section.model_fields[name].annotation
        section = _section(annotation) or section
        if get_origin(annotation) in (dict, list):
            next(names, None)  # a task's or a layer's, which may be that of a key; or an index
    return list(section.model_fields)


def _section(annotation: Any) -> type[Section] | None:
    """The Section inside `X`, `X | None`, `list[X]` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)


def schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors. No key is required of it: its `base` may bring every one."""
    schema: dict[str, Any] = Config.model_json_schema()
    meaning = "YAML file that this one is laid over, relative to it"
    schema["properties"]["base"] = {"anyOf": [{"type": "string"}, {"type": "null"}], "description": meaning}
    tasks = schema["properties"]["tasks"]
    tasks["additionalProperties"] = {"anyOf": [tasks["additionalProperties"], {"type": "null"}]}
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    return schema


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults written out, readable by `load_config`."""
    return dump_yaml(config.model_dump(mode="json"))
