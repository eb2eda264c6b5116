"""`docs/configuration.md`, written from the configuration's own types and descriptions, so that it cannot be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from mtbert.config import Config

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m mtbert show-config --reference > docs/configuration.md`; a test fails when it is stale. -->

A run is one YAML file. What it leaves out has the default given here; `base: other.yaml` lays it over another file
(relative to it); `--set key=value …` lies on top of both, with the dotted keys of this page and values read as YAML:

```
python -m mtbert train --config mine.yaml --set optimizer.lr=3e-5 tasks.sts=null schedule.length=400
```

Sections are merged key by key, lists are replaced as a whole. `<name>` stands for a name of your own: a task is added
by giving it one, and left out by setting it to `null`; so are shared layers, the options of a method and targets of a
schedule. Another method starts without the options of the one before. An unknown key is an error. Folders and files are
relative to where the command is typed, not to the YAML file: only `base` is, and the tasks' files are to `data.dir`.
`python -m mtbert show-config` prints a whole configuration, and with `--schema` the JSON schema for an editor.
"""


def reference() -> str:
    """The page: a table for every section, keys in the order in which they are declared."""
    root = Config.model_json_schema()
    parts = [_INTRODUCTION]
    for title, section in _sections(root, root["$defs"], ""):
        parts += [
            f"\n## {f'`{title}`' if title else 'Top level'}\n\n",
            "| key | type or choices | default | meaning |\n| --- | --- | --- | --- |\n",
            *(f"| {' | '.join(row)} |\n" for row in _rows(title, section, root["$defs"])),
        ]
    return "".join(parts)


def _sections(
    section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Dotted name and JSON schema of a section and of all those below it, in the order of the page."""
    yield prefix, section
    for key, value in section["properties"].items():
        name, below = _below(_join(prefix, key), value, definitions)
        if below is not None:
            yield from _sections(below, definitions, name)


def _below(key: str, value: Any, definitions: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """The section that a key holds, or holds many of, and the name of one of them."""
    if isinstance(value.get("additionalProperties"), dict):
        return _below(f"{key}.<name>", value["additionalProperties"], definitions)
    if "items" in value:
        return _below(f"{key}[]", value["items"], definitions)
    for branch in value.get("anyOf", [value]):
        if "$ref" in branch:
            return key, definitions[branch["$ref"].rpartition("/")[2]]
    return key, None


def _rows(prefix: str, section: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in section["properties"].items():
        name, below = _below(_join(prefix, key), value, definitions)
        if below is None:
            kind = _type(value)
        else:
            others = [_type(branch) for branch in value.get("anyOf", []) if "$ref" not in branch]
            kind = " or ".join([*others, f"section [`{name}`](#{_anchor(name)})"])
        default = "required" if key in section.get("required", []) else _default(value)
        yield f"`{_join(prefix, key)}`", kind, default, value["description"].replace("|", "\\|")


def _type(value: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in value:
        return " or ".join(_type(branch) for branch in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "prefixItems" in value:
        return f"list of {' and '.join(_type(item) for item in value['prefixItems'])}"
    if value["type"] == "array":
        least, most = value.get("minItems"), value.get("maxItems")
        count = f"{least} to {most} " if most else f"{least} or more " if least else ""
        return f"list of {count}{_type(value['items'])}"
    names = {"string": "text", "null": "null", "object": "keys and values"}
    limits = [
        f"{sign} {value[bound]:g}"
        for bound, sign in [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
        if bound in value
    ]
    return " ".join([names.get(value["type"], value["type"]), ", ".join(limits)]).strip()


def _default(value: Mapping[str, Any]) -> str:
    if "default" not in value:
        return ""  # a section's is that of its keys
    text: str = yaml.safe_dump(value["default"], default_flow_style=True, allow_unicode=True, width=1000)
    return f"`{text.strip().removesuffix('...').strip()}`"


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading: lower case without punctuation."""
    return "".join(character for character in title.lower() if character.isalnum() or character in "-_ ")
