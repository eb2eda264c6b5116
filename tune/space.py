"""The search space: YAML → `Space` → values → dotted overrides of a configuration. Knows neither Ray nor Optuna.

    parameters:
      optimizer.lr: {loguniform: [1e-4, 1e-2]}
      schedule.length: {logint: [50, 1000], when: {schedule.anneal: 0.8}}   # σ
      surgery.method: {choice: [pcgrad, sum]}
      dropout: {uniform: [0, 0.3], keys: [encoder.dropout, tasks.*.head.dropout]}
      weights: {simplex: 3, keys: [tasks.*.weight], when: {surgery.method: sum}}
    starts:
      - configuration
      - {optimizer.lr: 1e-3, weights: [1, 1, 1]}
    stages: [[optimizer.lr], [dropout]]

A parameter is named after the configuration key it sets, or has any name and lists its `keys` (`*` stands for every
task). `when` names parameters above it, or configuration keys that none sets, and the values under which it is
searched. A simplex is its weights' sum, or `count`: their number, so that their mean is 1; `*` with one task leaves it
out. A start fixes some parameters of a trial, the rest is drawn; `configuration` is what is varied as it is, as far as
it lies in the space. With `stages` nothing is drawn: every combination of a stage's choices is tried, at the best
values of the stages before it.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mtbert.config import Config
from mtbert.config_files import config_of
from mtbert.errors import UserError
from mtbert.files import seen_as_folder, user_path
from mtbert.yaml_files import inline_yaml, merge, parse_override, read_yaml

Values = dict[str, Any]
"""Parameter → value; of a simplex the list of its weights. A parameter whose `when` does not hold is not in it."""

RANGES = ("uniform", "loguniform", "int", "logint")
KINDS = (*RANGES, "choice", "simplex")
OWN_KEYS = ("run", "phases", "checkpoint", "engine.threads", "data.cache")
"""Keys the search sets, or that must be the same in all trials."""
OWN_START = "configuration"
SHARE_BOUNDS = (1e-3, 0.999)
"""Of the uniform numbers behind a simplex: a weight of 0 and one of everything are approached, not reached."""


class Draw(Protocol):
    """Where values come from: the part of `optuna.Trial` that is used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    keys: tuple[str, ...]
    low: float = 0.0
    high: float = 0.0
    options: tuple[Any, ...] = ()
    total: float = 0.0  # of a simplex
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """What Optuna calls it: a simplex is one uniform number per key."""
        return tuple(f"{key} (share)" for key in self.keys) if self.kind == "simplex" else (self.name,)

    def draw(self, draw: Draw) -> Any:
        if self.kind == "simplex":
            shares = np.array([draw.suggest_float(label, *SHARE_BOUNDS) for label in self.labels])
            # −ln u is exponential, and exponentials over their sum are uniform on the simplex
            return (self.total * -np.log(shares) / -np.log(shares).sum()).tolist()
        if self.kind == "choice":
            return self.options[self._texts.index(draw.suggest_categorical(self.name, self._texts))]
        if self.kind in ("int", "logint"):
            return draw.suggest_int(self.name, int(self.low), int(self.high), log=self.kind == "logint")
        return draw.suggest_float(self.name, self.low, self.high, log=self.kind == "loguniform")

    def encode(self, value: Any) -> dict[str, Any]:
        """What `draw` would have to be given to return `value`. Raises `ValueError` when it never would."""
        if self.kind == "simplex":
            numbers = isinstance(value, list) and all(_is_number(weight) for weight in value)
            if not numbers or len(value) != len(self.keys):
                raise ValueError(f"expected {len(self.keys)} weights, one for each of {', '.join(self.keys)}")
            if min(value) < 0 or not math.isclose(sum(value), self.total, rel_tol=1e-6):
                raise ValueError(f"weights are 0 or more and sum to {self.total:g}")
            shares = np.exp(-len(value) * np.array(value, float) / self.total).clip(*SHARE_BOUNDS)
            return dict(zip(self.labels, shares.tolist(), strict=True))
        if self.kind == "choice":
            if (text := inline_yaml(value)) not in self._texts:
                raise ValueError(f"expected one of {', '.join(self._texts)}")
            return {self.name: text}
        whole = self.kind in ("int", "logint")
        number = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, number) or not self.low <= value <= self.high:
            raise ValueError(f"expected a {'whole ' * whole}number from {self.low:g} to {self.high:g}")
        return {self.name: value}

    @property
    def _texts(self) -> list[str]:
        return [inline_yaml(option) for option in self.options]


@dataclass(frozen=True)
class Space:
    """Parameters in the order in which they are drawn.

    Args:
        base: the configuration that the parameters vary, as nested dictionaries.
    """

    parameters: tuple[Parameter, ...]
    starts: tuple[Values, ...]
    stages: tuple[tuple[str, ...], ...]
    base: dict[str, Any]

    def draw(self, draw: Draw) -> Values:
        values: Values = {}
        for parameter in self.parameters:
            if self._applies(parameter, values):
                values[parameter.name] = parameter.draw(draw)
        return values

    def encode(self, values: Values) -> dict[str, Any]:
        """What Optuna has to fix so that `draw` gives these values."""
        encoded: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name in values:
                encoded |= parameter.encode(values[parameter.name])
        return encoded

    def config(self, values: Values, where: str = "configuration") -> Config:
        """The base with these values laid over it. Raises `UserError`, which begins with `where`."""
        pairs = [pair for name, value in values.items() for pair in self._settings(self[name], value)]
        base = self.base
        for key, value in pairs:
            base = _freed(base, key, value)
        return config_of(base, [f"{key}={inline_yaml(value)}" for key, value in pairs], where)

    def describe(self) -> str:
        """All that makes it this space, as text."""
        return json.dumps([[asdict(each) for each in self.parameters], self.starts, self.stages], default=str)

    def __getitem__(self, name: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)

    def perturb(self, values: Values, rng: np.random.Generator) -> Values:
        """Near `values`: numbers times 0.8 or 1.25, kept in their range; whole numbers and choices stay.

        What population-based training explores (Jaderberg et al. 2017). Choices stay because weights and optimizer
        state are carried over, and those of one method or schedule mean nothing to another.
        """
        moved = dict(values)
        for name, value in values.items():
            parameter = self[name]
            if parameter.kind in ("uniform", "loguniform"):
                moved[name] = float(np.clip(value * rng.choice([0.8, 1.25]), parameter.low, parameter.high))
            elif parameter.kind == "simplex":
                weights = np.array(value) * rng.choice([0.8, 1.25], len(value))
                moved[name] = (parameter.total * weights / weights.sum()).tolist()
        return moved

    def stage_of(self, number: int) -> int:
        """The stage that trial `number` belongs to; past the last, the number of stages."""
        return sum(number >= self.staged_trials(stage + 1) for stage in range(len(self.stages)))

    def staged_trials(self, stages: int | None = None) -> int:
        """Trials of the first `stages` stages, of all by default."""
        return sum(math.prod(len(self[name].options) for name in names) for names in self.stages[:stages])

    def staged(self, number: int, best: Values) -> Values:
        """Values of trial `number`: its stage's combination; the rest as in `best`, the first start, the first option.

        Args:
            best: values of the best trial of the stages before.
        """
        stage = self.stage_of(number)
        names = self.stages[stage]
        combinations = list(itertools.product(*(self[name].options for name in names)))
        chosen = dict(zip(names, combinations[number - self.staged_trials(stage)], strict=True))
        known = {**(self.starts[0] if self.starts else {}), **best, **chosen}
        return {each.name: known.get(each.name, each.options[0]) for each in self.parameters}

    def _applies(self, parameter: Parameter, values: Values) -> bool:
        searched = {each.name for each in self.parameters}
        return all(
            (values.get(name, MISSING) if name in searched else _at(self.base, name)) in wanted
            for name, wanted in parameter.when.items()
        )

    @staticmethod
    def _settings(parameter: Parameter, value: Any) -> list[tuple[str, Any]]:
        if parameter.kind == "simplex":
            return list(zip(parameter.keys, value, strict=True))
        return [(key, value) for key in parameter.keys]


# ------------------------------------------------------------------------------------------------- reading


def anchored(raw: dict[str, Any]) -> dict[str, Any]:
    """What a file of a space holds, with absolute paths wherever folders or files are chosen: trials are drawn, and the
    search is continued, from anywhere."""
    parameters, starts = raw.get("parameters"), raw.get("starts")
    if not isinstance(parameters, dict):
        return raw  # `load_space` says what is wrong

    def value_of(name: Any, value: Any) -> Any:
        """Of a parameter, or of a key of the configuration."""
        how = parameters.get(name)
        keys = how.get("keys") if isinstance(how, dict) else None
        for key in keys if isinstance(keys, list) else [name]:
            value = _placed(key, value)
        return value

    def values_of(name: Any, values: Any) -> Any:
        return [value_of(name, value) for value in values] if isinstance(values, list) else value_of(name, values)

    def by_name(values: Any) -> Any:
        return {name: values_of(name, value) for name, value in values.items()} if isinstance(values, dict) else values

    def told(name: Any, how: Any) -> Any:
        if not isinstance(how, dict):
            return how
        changed = {"choice": values_of(name, how.get("choice")), "when": by_name(how.get("when"))}
        return {key: changed.get(key, value) for key, value in how.items()}

    anchored = {**raw, "parameters": {name: told(name, how) for name, how in parameters.items()}}
    if isinstance(starts, list):
        anchored["starts"] = [by_name(start) for start in starts]
    return anchored


def _placed(key: Any, value: Any) -> Any:
    """A value at a key of the configuration, absolute where it is a path, also within a section."""
    if isinstance(value, dict):
        return {inner: _placed(f"{key}.{inner}", each) for inner, each in value.items()}
    if not isinstance(value, str) or key not in (*PATHS, *MODELS):
        return value
    path = user_path(value)
    return str(path.absolute()) if key in PATHS or seen_as_folder(path) else value


def load_space(path: Path, config: Config, raw: Mapping[str, Any] | None = None) -> Space:
    """Read and check a space against the configuration it varies; `raw` is what `path` holds, where that was read.

    Raises `UserError` naming the parameter: for a key the configuration does not have, a range upside down, a log
    range that touches zero, a simplex of one, and for values that the configuration refuses.
    """
    raw = read_yaml(path) if raw is None else raw
    if unknown := raw.keys() - {"parameters", "starts", "stages"}:
        raise UserError(f"{path}: {sorted(map(str, unknown))[0]}: unknown key; valid keys: parameters, starts, stages")
    if not isinstance(raw.get("parameters"), dict) or not raw["parameters"]:
        raise UserError(
            f"{path}: parameters: missing; list what is to be searched, e.g. optimizer.lr: {{loguniform: …}}"
        )
    values = config.model_dump(mode="json")
    parameters: list[Parameter] = []
    for name, spec in raw["parameters"].items():
        try:
            if parameter := _parameter(str(name), spec, parameters, values):
                parameters.append(parameter)
        except (ValueError, OverflowError) as error:  # OverflowError: of an integer that is no float
            raise UserError(f"{path}: {name}: {error}") from None
    if not parameters:
        raise UserError(f"{path}: parameters: nothing to search with this configuration: it has a single task")
    _check_conditions(path, parameters)
    space = Space(tuple(parameters), (), _stages(path, raw, parameters), values)
    space = replace(space, starts=_starts(path, raw, space))
    _try_out(path, space)
    return space


def _parameter(name: str, spec: Any, above: Sequence[Parameter], values: Mapping[str, Any]) -> Parameter | None:
    """None for a simplex over all tasks where there is one task."""
    kinds = [kind for kind in KINDS if isinstance(spec, dict) and kind in spec]
    if len(kinds) != 1:
        raise ValueError(f"expected one of {', '.join(KINDS)}, for example {{uniform: [0, 0.3]}}")
    kind = kinds[0]
    if unknown := spec.keys() - {kind, "keys", "when"}:
        raise ValueError(f"unknown key {sorted(map(str, unknown))[0]!r}; beside {kind}: keys, when")
    listed = spec.get("keys", [name])
    if not isinstance(listed, list) or not listed or not all(isinstance(key, str) for key in listed):
        raise ValueError("keys: expected a list of configuration keys")
    keys = tuple(key for pattern in listed for key in _expand(pattern, values))
    options = spec[kind] if kind == "choice" and isinstance(spec[kind], list) else []
    for inner in [*keys, *(inner for key in keys for option in options for inner in _keys_in(key, option))]:
        if any(f"{inner}.".startswith(f"{own}.") for own in OWN_KEYS):
            raise ValueError(f"{inner} is set by the search itself: it gives all trials the same length and place")
    for key in keys:
        if any(key in each.keys for each in above) or keys.count(key) > 1:
            raise ValueError(f"{key} is set twice; one parameter sets a key")
    conditions = spec.get("when") or {}
    if not isinstance(conditions, dict):
        raise ValueError("when: expected parameters and the values that they must have")
    when = {str(key): _condition(str(key), wanted, above, values) for key, wanted in conditions.items()}
    given = spec[kind]
    if kind == "simplex":
        given = len(keys) if given == "count" else given
        if isinstance(given, bool) or not isinstance(given, int | float) or given <= 0:
            raise ValueError(f"simplex {given!r}: expected the sum of the weights, a number above 0, or count")
        if len(keys) < 2:
            if "*" in "".join(listed):
                return None
            raise ValueError(f"a simplex of one: its only weight is always {given:g}; name two or more keys")
        return Parameter(name, kind, keys, total=float(given), when=when)
    if kind == "choice":
        if not isinstance(given, list) or len({inline_yaml(option) for option in given}) < max(2, len(given)):
            raise ValueError(f"choice {given!r}: expected a list of two or more different options")
        return Parameter(name, kind, keys, options=tuple(given), when=when)
    number = int if kind in ("int", "logint") else (int, float)
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(isinstance(end, number) and not isinstance(end, bool) and math.isfinite(end) for end in given)
    ):
        raise ValueError(f"{kind} {given!r}: expected [lowest, highest], {'whole ' if number is int else ''}numbers")
    low, high = given
    if low >= high:
        raise ValueError(f"{kind} {given} is upside down; give [lowest, highest]")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{kind} {given}: a log range cannot reach {low:g}; begin above 0, or use {kind[3:]}")
    return Parameter(name, kind, keys, low, high, when=when)


def _expand(pattern: str, values: Mapping[str, Any]) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    if not pattern.startswith("tasks.*."):
        raise ValueError(f"key {pattern}: * stands for the name of a task, as in tasks.*.weight")
    return [pattern.replace("*", task, 1) for task in values["tasks"]]


def _keys_in(key: str, option: Any) -> list[str]:
    """What an option that is a section sets."""
    if not isinstance(option, Mapping):
        return []
    return [each for name, value in option.items() for each in (f"{key}.{name}", *_keys_in(f"{key}.{name}", value))]


def _condition(key: str, wanted: Any, above: Sequence[Parameter], values: Mapping[str, Any]) -> tuple[Any, ...]:
    options = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    parameter = next((each for each in above if each.name == key), None)
    if parameter is None:
        if _at(values, key) is MISSING:
            names = ", ".join(each.name for each in above) or "none"
            raise ValueError(f"when: {key} is neither a parameter above this one ({names}) nor a configuration key")
        return options
    for option in options:
        if parameter.kind == "choice" and option not in parameter.options:
            raise ValueError(
                f"when: {key} is never {option!r}; its options: {', '.join(map(inline_yaml, parameter.options))}"
            )
    if parameter.kind != "choice":
        raise ValueError(f"when: {key} is a {parameter.kind}; only a choice can be a condition")
    return options


def _check_conditions(path: Path, parameters: Sequence[Parameter]) -> None:
    """Refuses a condition on a configuration key that a parameter sets: the configuration's own value is no trial's."""
    for place, parameter in enumerate(parameters):
        for key in parameter.when.keys() - {each.name for each in parameters[:place]}:
            for other in parameters:
                if any(f"{key}.".startswith(f"{each}.") or each.startswith(f"{key}.") for each in other.keys):
                    raise UserError(
                        f"{path}: {parameter.name}: when: {key} is set by the parameter {other.name}; "
                        f"name that parameter and its values instead, and put it above this one"
                    )


def _starts(path: Path, raw: Mapping[str, Any], space: Space) -> tuple[Values, ...]:
    starts = raw.get("starts") or []
    if not isinstance(starts, list) or not all(isinstance(start, dict) or start == OWN_START for start in starts):
        raise UserError(
            f"{path}: starts: expected a list of points, each with parameters and their values, or {OWN_START}"
        )
    if space.stages and len(starts) > 1:
        raise UserError(
            f"{path}: starts: stages begin from one start, and here are {len(starts)}; leave the others out"
        )
    starts = [_own_start(space) if start == OWN_START else start for start in starts]
    for number, start in enumerate(starts, 1):
        for name, value in start.items():
            parameter = _named(f"{path}: start {number}", name, space.parameters)
            try:
                parameter.encode(value)
            except ValueError as error:
                raise UserError(f"{path}: start {number}: {name}: {error} (got {value!r})") from None
            if not space.stages and not space._applies(parameter, start):  # in stages others may yet make it apply
                only = ", ".join(f"{key}: {inline_yaml([*wanted])}" for key, wanted in parameter.when.items())
                raise UserError(
                    f"{path}: start {number}: {name} is searched only when {only}; give that too, or leave it out"
                )
    return tuple(starts)


def _own_start(space: Space) -> Values:
    """The configuration's own values, without those that no draw would give."""
    start: Values = {}
    for parameter in space.parameters:
        value = _own_option(space, parameter) if parameter.kind == "choice" else _own_number(space, parameter)
        if value is MISSING or not space._applies(parameter, start):
            continue
        with contextlib.suppress(ValueError):
            parameter.encode(value)
            start[parameter.name] = value
    return start


def _own_option(space: Space, parameter: Parameter) -> Any:
    """That which changes nothing, whatever a section leaves out."""
    own = config_of(space.base)
    for option in parameter.options:
        with contextlib.suppress(UserError):  # of an option that does not fit
            if space.config({parameter.name: option}) == own:
                return option
    return MISSING


def _own_number(space: Space, parameter: Parameter) -> Any:
    found: list[Any] = [_at(space.base, key) for key in parameter.keys]
    if parameter.kind == "simplex":
        if not all(_is_number(weight) for weight in found):
            return MISSING
        return [weight * parameter.total / (sum(found) or 1) for weight in found]
    return found[0] if found.count(found[0]) == len(found) else MISSING


def _stages(path: Path, raw: Mapping[str, Any], parameters: Sequence[Parameter]) -> tuple[tuple[str, ...], ...]:
    stages = raw.get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(stage, list) and stage for stage in stages):
        raise UserError(f"{path}: stages: expected lists of parameters, as in [[optimizer.lr], [dropout]]")
    named = [name for stage in stages for name in stage]
    for name in named:
        if _named(f"{path}: stages", name, parameters).kind != "choice":
            raise UserError(f"{path}: stages: {name}: only choices can be tried one by one; list its values")
    if stages and sorted(named) != sorted(each.name for each in parameters):
        raise UserError(f"{path}: stages: every parameter belongs to one stage, and to no other")
    return tuple(tuple(stage) for stage in stages)


def _named(where: str, name: Any, parameters: Sequence[Parameter]) -> Parameter:
    for parameter in parameters:
        if parameter.name == name:
            return parameter
    near = difflib.get_close_matches(str(name), [each.name for each in parameters], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"parameters: {', '.join(each.name for each in parameters)}"
    raise UserError(f"{where}: {name}: no such parameter; {hint}")


@dataclass(frozen=True)
class _Corner:
    """Draws what `places` says (0 the lowest value or first option, 1 the next), and the rest at random."""

    places: Mapping[str, int]
    rng: np.random.Generator

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return (low, high)[self.places[name]] if name in self.places else float(self.rng.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return (low, high)[self.places[name]] if name in self.places else int(self.rng.integers(low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[self.places.get(name, int(self.rng.integers(len(choices))))]


def _try_out(path: Path, space: Space) -> None:
    """Builds a configuration at every corner. Raises what it complains of, and names the values."""
    for parameter in space.parameters:
        try:
            _enabling(space, parameter)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    for enabled, values in corners(space):
        try:
            check_countable(enabled.config(values, str(path)))
        except UserError as error:
            told = str(error).removeprefix(f"{path}: ")
            raise UserError(f"{path}: {told} (tried with {inline_yaml(values)})") from None


def corners(space: Space) -> Iterator[tuple[Space, Values]]:
    """Values at both ends of every range and with every option, and the space that they belong to.

    A parameter that this configuration leaves out is tried with one that does not.
    """
    rng = np.random.default_rng(0)  # not addressed: nothing but this check sees it
    for parameter in space.parameters:
        places, settings = _enabling(space, parameter)
        base = space.base
        for key, value in settings:
            base = merge(_freed(base, key, value), parse_override(f"{key}={inline_yaml(value)}"))
        enabled = replace(space, base=base)
        for label in parameter.labels:
            for place in range(len(parameter.options) or 2):
                values = enabled.draw(_Corner({**places, label: place}, rng))
                assert parameter.name in values
                yield enabled, values


def check_countable(config: Config) -> None:
    """Raises `UserError` where nobody can say before training how many examples a step will have."""
    sizes = [task.batch_size or config.schedule.batch_size for task in config.tasks.values()]
    if config.schedule.kind == "adaptive" and len(set(sizes)) > 1:
        raise UserError(
            "schedule.kind adaptive: scores decide which tasks are drawn, so trials would see unequal numbers of "
            f"examples; give the tasks one batch_size, not {', '.join(map(str, sizes))}"
        )


def _enabling(space: Space, parameter: Parameter) -> tuple[dict[str, int], list[tuple[str, Any]]]:
    """Options of other parameters, and overrides of the configuration, under which `parameter` is searched. Raises
    `UserError` where there are none."""
    places: dict[str, int] = {}
    settings: list[tuple[str, Any]] = []
    for name, wanted in _conditions(space, parameter).items():
        if not wanted:
            raise UserError(f"{parameter.name}: when: never holds: what it asks for, it asks of {name} two ways")
        other = next((each for each in space.parameters if each.name == name), None)
        if other is not None:
            places[name] = other.options.index(wanted[0])
        elif _at(space.base, name) not in wanted:
            settings.append((name, wanted[0]))
    return places, settings


def _conditions(space: Space, parameter: Parameter) -> dict[str, list[Any]]:
    """Under which it is searched, those of the parameters in them too: the values of each name that satisfy all."""
    found: dict[str, list[Any]] = {}
    for name, wanted in parameter.when.items():
        above = next((_conditions(space, each) for each in space.parameters if each.name == name), {})
        for key, values in [*above.items(), (name, [*wanted])]:
            found[key] = [value for value in values if value in found.get(key, values)]
    return found


# ------------------------------------------------------------------------------------------------- small things


MISSING = object()

PATHS = ("data.dir", "encoder.tokenizer")
MODELS = ("encoder.pretrained",)  # folders, or names on the hub


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


BELONGING = {
    "schedule": ("kind", ("alpha", "anneal", "targets", "tasks_per_step")),
    "surgery": ("method", ("options",)),
    "weighting": ("method", ("options",)),
}
"""Section → the key that says which of these others mean anything. More than what `Config` refuses: to adaptive, α is
another thing than to sampled."""


def _freed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`values` without what belonged to the kind or method that `value` at `key` replaces; a section always does."""
    section, _, inner = key.partition(".")
    if section not in BELONGING:
        return values
    name, belonging = BELONGING[section]
    before = values[section]
    whole = not inner and isinstance(value, dict)
    chosen = value.get(name) if whole else value if inner == name else None
    if chosen is None or (not whole and chosen == before[name]):
        return values
    if before.get("length") == "unbalanced" and chosen != "round_robin":
        belonging = (*belonging, "length")
    return {**values, section: {name: each for name, each in before.items() if name not in belonging}}


def _at(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key."""
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return MISSING
        found = found[part]
    return found
