"""The search space: what it draws, how that becomes a configuration, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtbert.building import methods_of
from mtbert.config import Config
from mtbert.config_files import config_of, load_config
from mtbert.errors import UserError
from tune.space import Space, anchored, corners, load_space

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(QUICKSTART)


class Uniform:
    """Draws evenly, and remembers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.seen: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        ends = np.log([low, high]) if log else np.array([low, high])
        number = self.rng.uniform(*ends)
        self.seen[name] = float(np.exp(number) if log else number)
        return float(self.seen[name])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        self.seen[name] = int(self.rng.integers(low, high, endpoint=True))
        return int(self.seen[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.seen[name] = choices[self.rng.integers(len(choices))]
        return self.seen[name]


class Given:
    """Draws what it is given."""

    def __init__(self, encoded: dict[str, Any]) -> None:
        self.encoded = encoded

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self.encoded[name])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self.encoded[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.encoded[name]


def space_of(tmp_path: Path, config: Config, text: str) -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return load_space(path, config)


ALL_KINDS = """
parameters:
  optimizer.lr: {loguniform: [1e-5, 1e-2]}
  dropout: {uniform: [0, 0.3], keys: [encoder.dropout, tasks.*.head.dropout]}
  schedule.kind: {choice: [round_robin, sampled]}
  schedule.alpha: {uniform: [0.1, 1], when: {schedule.kind: sampled}}
  schedule.length: {logint: [10, 1000]}
  schedule.bucket: {int: [1, 8]}
  weights: {simplex: 3, keys: [tasks.*.weight]}
  engine.clip_norm: {choice: [null, 0.5, 1]}
  surgery: {choice: [{method: pcgrad}, {method: pcgrad, options: {reduction: mean}}, {method: "sum"}]}
"""


def test_every_kind_reaches_its_keys_and_stays_in_range(tmp_path: Path, config: Config) -> None:
    space = space_of(tmp_path, config, ALL_KINDS)
    kinds = set()
    for seed in range(60):
        values = space.draw(Uniform(seed))
        tried = space.config(values)
        assert 1e-5 <= tried.optimizer.lr == values["optimizer.lr"] <= 1e-2
        assert {tried.encoder.dropout, *(task.head.dropout for task in tried.tasks.values())} == {values["dropout"]}
        assert sum(task.weight for task in tried.tasks.values()) == pytest.approx(3)
        assert [task.weight for task in tried.tasks.values()] == values["weights"]
        assert tried.schedule.kind == values["schedule.kind"]
        assert ("schedule.alpha" in values) == (tried.schedule.kind == "sampled")
        assert tried.engine.clip_norm == values["engine.clip_norm"]
        assert tried.surgery.model_dump(exclude_defaults=True) == {
            key: value for key, value in values["surgery"].items() if value != "pcgrad"
        }
        kinds.add(tried.schedule.kind)
    assert kinds == {"round_robin", "sampled"}


@pytest.mark.parametrize("space", ["default", "pretrained"])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_the_default_spaces_suit_any_number_of_tasks(config: Config, space: str, tasks: int) -> None:
    """And begin with the configuration itself, as far as it lies in them."""
    values = config.model_dump(mode="json")
    given = [*values["tasks"].items(), ("fourth", values["tasks"]["sst"]), ("fifth", values["tasks"]["sst"])][:tasks]
    own = config_of({**values, "tasks": dict(given)}, ["optimizer.lr=1.5e-4", "optimizer.head_lr=1"])
    found = load_space(ROOT / "configs" / "search" / f"{space}.yaml", own)
    (start,) = found.starts
    assert start.items() >= {"optimizer.lr": 1.5e-4, "dropout": 0, "schedule": {"kind": "round_robin"}}.items()
    assert start.keys().isdisjoint({"optimizer.head_lr", "schedule.length"})
    drawn = found.draw(Uniform(0))
    assert ("weights" in drawn) == ("weights" in start) == (tasks > 1)
    if tasks > 1:
        assert sum(drawn["weights"]) == pytest.approx(tasks) == sum(start["weights"])
        assert start["weights"][0] == start["weights"][1]
    if tasks == 3:
        assert start["weights"][2] == pytest.approx(0.3 * start["weights"][0])  # as in the quick start


def test_the_default_space_searches_sigma_where_it_acts(config: Config) -> None:
    space = load_space(ROOT / "configs" / "search" / "default.yaml", config)
    for seed in range(20):
        values = space.draw(Uniform(seed))
        assert ("schedule.length" in values) == (space.config(values).schedule.anneal > 0)


def test_a_simplex_is_drawn_evenly(tmp_path: Path, config: Config) -> None:
    """Uniform on the triangle: each weight has mean 1/3 and variance 1/18 of the total (Dirichlet of ones)."""
    space = space_of(tmp_path, config, "parameters: {weights: {simplex: 1, keys: [tasks.*.weight]}}")
    weights = np.array([space.draw(Uniform(seed))["weights"] for seed in range(4000)])
    assert weights.mean(0) == pytest.approx(np.full(3, 1 / 3), abs=0.01)
    assert weights.var(0) == pytest.approx(np.full(3, 1 / 18), abs=0.005)


def test_a_start_is_drawn_as_it_was_given(tmp_path: Path, config: Config) -> None:
    space = space_of(tmp_path, config, ALL_KINDS)
    for seed in range(20):
        values = space.draw(Uniform(seed))
        again = space.draw(Given(space.encode(values)))
        assert again.keys() == values.keys()
        for name, value in values.items():
            assert again[name] == (pytest.approx(value) if name == "weights" else value)


def test_perturbing_keeps_choices_and_ranges(tmp_path: Path, config: Config) -> None:
    space = space_of(tmp_path, config, ALL_KINDS)
    for seed in range(50):
        values = space.draw(Uniform(seed))
        moved = space.perturb(values, np.random.default_rng(seed))
        space.config(moved)
        space.encode(moved)  # raises outside the ranges
        for name, value in values.items():
            parameter = space[name]
            if parameter.kind in ("choice", "int", "logint"):
                assert moved[name] == value
            elif parameter.kind != "simplex":
                steps = [parameter.low, parameter.high, 0.8 * value, 1.25 * value]
                assert moved[name] != value and any(moved[name] == pytest.approx(step) for step in steps)


def test_stages_try_every_choice_at_the_best_of_the_stages_before(tmp_path: Path, config: Config) -> None:
    space = load_space(ROOT / "configs" / "search" / "c7.yaml", config)
    assert space.staged_trials() == 6
    first = [space.staged(number, {}) for number in range(3)]
    assert [values["optimizer.lr"] for values in first] == [1e-4, 1e-5, 1e-6]
    assert {values["dropout"] for values in first} == {0.3}
    second = [space.staged(number, first[1]) for number in range(3, 6)]
    assert [values["dropout"] for values in second] == [0.2, 0.3, 0.4]
    assert {values["optimizer.lr"] for values in second} == {1e-5}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "search").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_spaces_that_come_with_us_fit_the_quick_start(path: Path, config: Config) -> None:
    load_space(path, config)


def test_the_default_space_suits_every_configuration_that_comes_with_us() -> None:
    for path in sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "papers").glob("*.yaml")]):
        space = load_space(ROOT / "configs" / "search" / "default.yaml", load_config(path))
        for enabled, values in corners(space):
            methods_of(enabled.config(values))


def test_another_kind_or_method_starts_without_what_belonged_to_the_one_before(tmp_path: Path) -> None:
    base = ["schedule={kind: sampled, alpha: 1, anneal: 0.8, tasks_per_step: 2, length: 132}"]
    base += ["surgery={method: pcgrad, options: {reduction: mean}}"]
    annealed = load_config(QUICKSTART, base)
    kinds = "schedule.kind: {choice: [round_robin, sampled]}, surgery.method: {choice: [pcgrad, cagrad]}"
    space = space_of(tmp_path, annealed, f"parameters: {{{kinds}}}")
    assert space.config({"schedule.kind": "sampled", "surgery.method": "pcgrad"}) == annealed
    other = space.config({"schedule.kind": "round_robin", "surgery.method": "cagrad"})
    assert (other.schedule.alpha, other.schedule.anneal, other.schedule.length) == (1, 0, 132)
    assert other.surgery.options == {}

    sections = "schedule: {choice: [{kind: sampled, alpha: 0.5}, {kind: sequential, length: longest}]}"
    space = space_of(
        tmp_path, annealed, f"parameters: {{{sections}, surgery: {{choice: [{{method: pcgrad}}, {{method: sum}}]}}}}"
    )
    one = space.config({"schedule": {"kind": "sampled", "alpha": 0.5}, "surgery": {"method": "pcgrad"}})
    assert (one.schedule.alpha, one.schedule.anneal, one.schedule.tasks_per_step, one.schedule.length) == (
        0.5,
        0,
        1,
        132,
    )
    assert one.surgery.options == {}
    unbalanced = load_config(QUICKSTART, ["schedule.length=unbalanced"])
    space = space_of(tmp_path, unbalanced, "parameters: {schedule.kind: {choice: [round_robin, sampled]}}")
    assert space.config({"schedule.kind": "sampled"}).schedule.length == "longest"


def test_the_configuration_is_found_among_whole_sections(tmp_path: Path) -> None:
    """An option is the configuration's own when it changes nothing, whatever it leaves out."""
    sections = (
        "surgery: {choice: [{method: sum}, {method: pcgrad}]},"
        " schedule: {choice: [{kind: sampled, alpha: 0.5}, {kind: sampled, alpha: 0.5, tasks_per_step: 3}]}"
    )
    own = load_config(QUICKSTART, ["schedule={kind: sampled, alpha: 0.5, tasks_per_step: 3}"])
    space = space_of(tmp_path, own, f"parameters: {{{sections}}}\nstarts: [configuration]")
    assert space.starts == (
        {"surgery": {"method": "pcgrad"}, "schedule": {"kind": "sampled", "alpha": 0.5, "tasks_per_step": 3}},
    )
    assert space.config(space.starts[0]) == own


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "parameters: {optimizer.head_rl: {uniform: [0, 1]}}",
            "optimizer.head_rl: unknown key; did you mean 'head_lr'?",
        ),
        (
            "parameters: {optimizer.lr: {uniform: [0.1, 0.01]}}",
            "uniform [0.1, 0.01] is upside down; give [lowest, highest]",
        ),
        ("parameters: {optimizer.lr: {uniform: [0.1, 0.1]}}", "is upside down"),
        (
            "parameters: {optimizer.lr: {loguniform: [0, 0.1]}}",
            "loguniform [0, 0.1]: a log range cannot reach 0; begin above",
        ),
        ("parameters: {schedule.length: {logint: [0, 10]}}", "logint [0, 10]: a log range cannot reach 0"),
        ("parameters: {schedule.length: {int: [0.5, 10]}}", "int [0.5, 10]: expected [lowest, highest], whole numbers"),
        (
            "parameters: {schedule.length: {int: [0, 10]}}",
            "schedule.length: expected shortest, longest, unbalanced or a number",
        ),
        ("parameters: {encoder.dropout: {uniform: [0, 1]}}", "encoder.dropout: input should be less than 1"),
        ("? \n: 1\nstarts: []\nx: 1\n", "None: unknown key; valid keys: parameters, starts, stages"),
        ("parameters: {optimizer.lr: {uniform: [0, 1], when: [a]}}", "when: expected parameters and the values"),
        (f"parameters: {{optimizer.lr: {{uniform: [0, {10**400}]}}}}", "optimizer.lr: int too large"),
        ("parameters: {w: {simplex: 1, keys: [tasks.sst.weight]}}", "w: a simplex of one: its only weight is always 1"),
        ("parameters: {w: {simplex: 0, keys: [tasks.*.weight]}}", "w: simplex 0: expected the sum of the weights"),
        ("parameters: {surgery.method: {choice: [pcgrad]}}", "expected a list of two or more different options"),
        ("parameters: {surgery.method: {choice: [pcgrad, pcgrad]}}", "two or more different options"),
        ("parameters: {optimizer.lr: {normal: [0, 1]}}", "expected one of uniform, loguniform, int"),
        ("parameters: {optimizer.lr: {uniform: [0, 1], step: 3}}", "unknown key 'step'"),
        ("parameters: {phases: {choice: [[{epochs: 1}], [{epochs: 2}]]}}", "phases is set by the search itself"),
        ("parameters: {run.evaluate_every: {int: [1, 3]}}", "run.evaluate_every is set by the search itself"),
        ("parameters: {run: {choice: [{seed: 1}, {seed: 2}]}}", "run: run is set by the search itself"),
        ("parameters: {checkpoint: {choice: [{keep: 1}, {keep: 2}]}}", "checkpoint is set by the search itself"),
        ("parameters: {engine: {choice: [{threads: 1}, {threads: 2}]}}", "engine.threads is set by the search itself"),
        (
            "parameters: {place: {choice: [{cache: a}, {}], keys: [data]}}",
            "place: data.cache is set by the search itself",
        ),
        ("parameters: {lr: {uniform: [0, 1], keys: [optimizer.lr]}, optimizer.lr: {uniform: [0, 1]}}", "set twice"),
        (
            "parameters: {optimizer.lr: {uniform: [0, 1], when: {nothing: 3}}}",
            "when: nothing is neither a parameter above",
        ),
        (
            "parameters: {schedule.kind: {choice: [round_robin, sampled]},"
            " schedule.alpha: {uniform: [0, 1], when: {schedule.kind: sample}}}",
            "when: schedule.kind is never 'sample'; its options: round_robin, sampled",
        ),
        (
            "parameters: {schedule: {choice: [{kind: round_robin}, {kind: sampled}]},"
            " dropout: {uniform: [0, 0.3], keys: [encoder.dropout], when: {schedule.kind: sampled}}}",
            "dropout: when: schedule.kind is set by the parameter schedule; name that parameter",
        ),
        (
            "parameters: {kind: {choice: [round_robin, sampled], keys: [schedule.kind]},"
            " schedule.alpha: {uniform: [0, 1], when: {schedule.kind: sampled}}}",
            "schedule.alpha: when: schedule.kind is set by the parameter kind; name that parameter",
        ),
        (
            "parameters: {encoder.dropout: {uniform: [0, 0.3], when: {schedule.kind: sampled}},"
            " schedule.kind: {choice: [round_robin, sampled]}}",
            "encoder.dropout: when: schedule.kind is set by the parameter schedule.kind; name that parameter and its",
        ),
        (
            "parameters: {schedule.alfa: {uniform: [0, 1], when: {schedule.kind: sampled}}}",
            "schedule.alfa: unknown key; did you mean 'alpha'?",
        ),
        (
            "parameters: {optimizer.lr: {uniform: [0, 1]},"
            " encoder.dropout: {uniform: [0, 0.3], when: {optimizer.lr: 1}}}",
            "when: optimizer.lr is a uniform; only a choice can be a condition",
        ),
        (
            "parameters: {optimizer.lr: {uniform: [0, 1]}}\nstarts: [{optimizer.lrr: 0.5}]",
            "did you mean 'optimizer.lr'?",
        ),
        (
            "parameters: {optimizer.lr: {uniform: [0, 1]}}\nstarts: [{optimizer.lr: 2}]",
            "expected a number from 0 to 1 (got 2)",
        ),
        (
            "parameters: {schedule.length: {int: [10, 100]}}\nstarts: [{schedule.length: 20.5}]",
            "expected a whole number from 10 to 100 (got 20.5)",
        ),
        *(
            (
                "parameters: {schedule.kind: {choice: [round_robin, sampled]},"
                f" schedule.alpha: {{uniform: [0, 1], when: {{schedule.kind: sampled}}}}}}\nstarts: [{start}]",
                "start 1: schedule.alpha is searched only when schedule.kind: [sampled]; give that too, or",
            )
            for start in ("{schedule.alpha: 0.5}", "{schedule.kind: round_robin, schedule.alpha: 0.5}")
        ),
        (
            "parameters: {optimizer.lr: {choice: [0.1, 0.2]}}\nstages: [[optimizer.lr]]\nstarts: [configuration, {}]",
            "starts: stages begin from one start, and here are 2",
        ),
        (
            "parameters: {optimizer.lr: {uniform: [0, 1]}}\nstages: [[optimizer.lr]]",
            "only choices can be tried one by one",
        ),
        (
            "parameters: {schedule.kind: {choice: [round_robin, adaptive]}, tasks.sst.batch_size: {int: [8, 16]}}",
            "give the tasks one batch_size, not ",
        ),
        (
            "parameters: {schedule.kind: {choice: [round_robin, sequential]}, schedule.length: {int: [10, 20]}}",
            "leave length out, or set it to longest (tried with {schedule.kind: ",
        ),
        (
            "parameters: {surgery.method: {choice: [sum, pcgrad]}, weighting.method: {choice: [fixed, homoscedastic], "
            "when: {surgery.method: pcgrad}}, optimizer.lr: {uniform: [0, 1], when: {surgery.method: sum, "
            "weighting.method: homoscedastic}}}",
            "optimizer.lr: when: never holds: what it asks for, it asks of surgery.method two ways",
        ),
        *(
            (
                f"parameters: {{weights: {{simplex: 3, keys: [tasks.*.weight]}}}}\nstarts: [{{weights: {weights}}}]",
                "start 1: weights: expected 3 weights, one for each of tasks.sst.weight",
            )
            for weights in ("[a, 1, 1]", "[null, 1, 1]", "[true, 1, 1]", "[1, 1]", "3")
        ),
        (
            "parameters: {weights: {simplex: 2, keys: [tasks.sst.wieght, tasks.sts.weight]}}\nstarts: [configuration]",
            "tasks.sst.wieght",
        ),
        ("parameters: {x.*.weight: {uniform: [0, 1]}}", "* stands for the name of a task"),
        ("params: {}", "params: unknown key; valid keys: parameters, starts, stages"),
        ("starts: []", "parameters: missing"),
        ("parameters: [", "not valid YAML"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line(tmp_path: Path, config: Config, text: str, complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        space_of(tmp_path, config, text)
    message = str(refused.value)
    assert message.startswith(str(tmp_path / "space.yaml"))
    assert complaint in message
    assert "\n" not in message


def test_when_may_look_at_the_configuration(tmp_path: Path, config: Config) -> None:
    alpha = "schedule.alpha: {uniform: [0.1, 1], when: {schedule.kind: sampled}}"
    text = f"parameters: {{{alpha}, optimizer.lr: {{uniform: [0, 1]}}}}"
    assert set(space_of(tmp_path, config, text).draw(Uniform(0))) == {"optimizer.lr"}
    sampled = load_config(QUICKSTART, ["schedule.kind=sampled"])
    assert set(space_of(tmp_path, sampled, text).draw(Uniform(0))) == {"optimizer.lr", "schedule.alpha"}


def test_conditions_may_lead_to_another_by_two_ways(tmp_path: Path, config: Config) -> None:
    """In whatever order they are given."""
    surgery = "surgery.method: {choice: [sum, pcgrad]}"
    weighting = "weighting.method: {choice: [fixed, homoscedastic], when: {surgery.method: [sum, pcgrad]}}"
    for when in ("surgery.method: pcgrad, weighting.method: fixed", "weighting.method: fixed, surgery.method: pcgrad"):
        rate = f"optimizer.lr: {{uniform: [0.5, 1], when: {{{when}}}}}"
        space = space_of(tmp_path, config, f"parameters: {{{surgery}, {weighting}, {rate}}}")
        assert any("optimizer.lr" in values for _, values in corners(space))


def test_folders_to_choose_from_are_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    raw = {
        "parameters": {
            "encoder.pretrained": {"choice": ["models/a", "models/hub"]},
            "data.dir": {"choice": ["here"]},
            "optimizer.lr": {"uniform": [0, 1]},
        },
        "starts": ["configuration", {"encoder.pretrained": "models/a", "optimizer.lr": 0.5}],
    }
    there = f"{tmp_path}/models/a"
    placed = anchored(raw)
    assert placed["parameters"]["encoder.pretrained"] == {"choice": [there, "models/hub"]}
    assert placed["parameters"]["data.dir"] == {"choice": [f"{tmp_path}/here"]}
    assert placed["starts"] == ["configuration", {"encoder.pretrained": there, "optimizer.lr": 0.5}]
    assert anchored(placed) == placed
    by_another_name = {
        "parameters": {
            "model": {"choice": ["models/a"], "keys": ["encoder.pretrained"]},
            "encoder": {"choice": [{"pretrained": "models/a", "pooling": "mean"}]},
            "optimizer.lr": {"uniform": [0, 1], "when": {"model": "models/a", "data.dir": ["here"]}},
        },
        "starts": [{"model": "models/a"}],
    }
    assert anchored(by_another_name) == {
        "parameters": {
            "model": {"choice": [there], "keys": ["encoder.pretrained"]},
            "encoder": {"choice": [{"pretrained": there, "pooling": "mean"}]},
            "optimizer.lr": {"uniform": [0, 1], "when": {"model": there, "data.dir": [f"{tmp_path}/here"]}},
        },
        "starts": [{"model": there}],
    }
    for odd in ({}, {"parameters": 3}, {"parameters": {"data.dir": {"choice": 3}}, "starts": 3}):
        assert anchored(odd) == odd
