"""What lies over what; every mistake told in one line that names the key and the way out; the documented keys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from mtbert.config import Config, Section
from mtbert.config_files import config_of, load_config, schema, to_yaml
from mtbert.errors import UserError
from mtbert.reference import reference
from mtbert.yaml_files import parse_yaml

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/papers/*.yaml")])
MINIMAL: dict[str, Any] = {"tasks": {"sst": {"kind": "classification", "train": "t.csv", "dev": "d.csv"}}}


def write(path: Path, values: dict[str, Any] | str | bytes) -> Path:
    text = yaml.safe_dump(values) if isinstance(values, dict) else values
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "minimal.yaml", MINIMAL)


def error(path: Path | None, *overrides: str) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message and "Config" not in message  # names of ours, which users do not know
    return message


# ------------------------------------------------------------------------------------------- layers


def test_defaults_under_base_under_file_under_overrides(tmp_path: Path) -> None:
    write(tmp_path / "sub.yaml", {**MINIMAL, "optimizer": {"lr": 1.0, "head_lr": 1.0, "eps": 1.0}, "seed": 1})
    over = {"base": "sub.yaml", "optimizer": {"lr": 2.0, "head_lr": 2.0}}
    config = load_config(write(tmp_path / "over.yaml", over), ["optimizer.lr=3", "optimizer.lr=4"])
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.head_lr, optimizer.eps, optimizer.warmup) == (4.0, 2.0, 1.0, 0.06)
    assert config.seed == 1


def test_a_chain_of_bases_each_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "root.yaml", {**MINIMAL, "seed": 1, "surgery": {"method": "sum"}})
    write(tmp_path / "below" / "middle.yaml", {"base": "../root.yaml", "seed": 2})
    top = write(tmp_path / "top.yaml", {"base": "below/middle.yaml", "engine": {"zero": 3}})
    config = load_config(top)
    assert (config.seed, config.surgery.method, config.engine.zero) == (2, "sum", 3)


def test_lists_are_replaced_as_a_whole(minimal: Path) -> None:
    config = load_config(minimal, ["phases=[{steps: 1}, {steps: 2, trainable: heads}]", "phases=[{epochs: 4}]"])
    assert [(phase.epochs, phase.steps) for phase in config.phases] == [(4, None)]


def test_overrides_reach_and_add_tasks(minimal: Path) -> None:
    config = load_config(
        minimal, ["tasks.sst.head.hidden=[3]", "tasks.new={kind: classification, train: a, dev: b}", "tasks.new.dev=c"]
    )
    assert config.tasks["sst"].head.hidden == [3]
    assert config.tasks["new"].dev == "c"


def test_a_task_set_to_null_is_left_out(tmp_path: Path) -> None:
    assert list(load_config(QUICKSTART, ["tasks.para=null"]).tasks) == ["sst", "sts"]
    over = write(tmp_path / "over.yaml", {"base": str(QUICKSTART), "tasks": {"sst": None}})
    assert list(load_config(over).tasks) == ["para", "sts"]
    assert "at least one task" in error(QUICKSTART, "tasks.sst=", "tasks.para=", "tasks.sts=")


def test_null_for_a_task_that_nothing_defines_is_refused(tmp_path: Path) -> None:
    """Else the task that was meant would be trained."""
    told = "tasks.stss: null leaves it out, but nothing before defines it; "
    assert f"{told}did you mean 'sts'? there: sst, para, sts" in error(QUICKSTART, "tasks.stss=null")
    assert error(QUICKSTART, "tasks.sts=null", "tasks.new=").endswith("defines it; there: sst, para")
    over = write(tmp_path / "over.yaml", {"base": str(QUICKSTART), "tasks": {"stss": None}})
    assert error(over).startswith(f"{over}: {told}did you mean 'sts'?")
    assert f"{told}did you mean 'sts'?" in error(write(tmp_path / "top.yaml", {"base": "over.yaml", "seed": 1}))
    alone = write(tmp_path / "alone.yaml", {"tasks": {**MINIMAL["tasks"], "stss": None}})
    assert error(alone).endswith(f"{told}there: none")


PAPERS = QUICKSTART.parent / "papers"


def test_another_method_starts_without_the_options_of_the_one_before(tmp_path: Path) -> None:
    assert load_config(PAPERS / "A5.yaml").surgery.options == {"reduction": "mean"}
    assert load_config(PAPERS / "A5.yaml", ["surgery.method=sum"]).surgery.options == {}
    assert load_config(PAPERS / "A5.yaml", ["surgery.method=pcgrad"]).surgery.options == {"reduction": "mean"}
    over = write(tmp_path / "over.yaml", {"base": str(PAPERS / "A8.yaml"), "weighting": {"method": "fixed"}})
    assert load_config(PAPERS / "A8.yaml").weighting.options and not load_config(over).weighting.options
    for order in (["surgery.method=cagrad", "surgery.options.c=1"], ["surgery.options.c=1", "surgery.method=cagrad"]):
        assert load_config(PAPERS / "A5.yaml", order).surgery.options == {"c": 1}


def test_null_takes_out_what_a_base_brings() -> None:
    cagrad = PAPERS / "E-cagrad.yaml"
    assert load_config(cagrad).surgery.options == {"c": 0.4}
    for nothing in ("surgery.options=null", "surgery.options.c=null"):
        assert load_config(cagrad, [nothing]).surgery.options == {}
    adaptive = PAPERS / "E-adaptive.yaml"
    config = load_config(adaptive, ["tasks.sts=null", "schedule.targets.sts=null"])
    assert list(config.tasks) == list(config.schedule.targets) == ["sst", "para"]
    plain = load_config(adaptive, ["schedule.kind=round_robin", "schedule.alpha=1", "schedule.targets=null"])
    assert plain.schedule.targets == {}
    apart = ["shared_layers=null", "tasks.para.head.shared=null", "tasks.sts.head.shared=null"]
    assert load_config(PAPERS / "B4.yaml", apart).shared_layers == {}
    assert "surgery.options.cc: null leaves it out, but nothing before defines it; did you mean 'c'?" in error(
        cagrad, "surgery.options.cc=null"
    )


def test_values_given_as_dictionaries_are_left_alone() -> None:
    values = {**MINIMAL, "surgery": {"method": "cagrad", "options": {"c": 0.4}}}
    before = json.dumps(values)
    assert config_of(values, ["surgery.options.c=null"]).surgery.options == {}
    assert json.dumps(values) == before


def test_a_task_left_out_can_be_left_out_again_or_brought_back(tmp_path: Path) -> None:
    middle = {"base": str(QUICKSTART), "tasks": {"sts": None}}
    write(tmp_path / "middle.yaml", middle)
    top = write(tmp_path / "top.yaml", {"base": "middle.yaml", "tasks": {"sts": None}})
    assert list(load_config(top, ["tasks.sts=null"]).tasks) == ["sst", "para"]
    assert "sst" in load_config(top, ["tasks.sst=null", f"tasks.sst={json.dumps(MINIMAL['tasks']['sst'])}"]).tasks


@pytest.mark.parametrize(
    ("written", "number"), [("3e-4", 3e-4), ("3E-4", 3e-4), ("3.0e-4", 3e-4), ("1_0e1", 100.0), ("+2e+1", 20.0)]
)
def test_numbers_in_scientific_notation(minimal: Path, written: str, number: float) -> None:
    """YAML 1.1, which PyYAML reads, takes 3e-4 for a text."""
    assert load_config(minimal, [f"optimizer.lr={written}"]).optimizer.lr == number


@pytest.mark.parametrize(
    ("written", "text"),
    [("2026-01-02", "2026-01-02"), ("2024-13-45", "2024-13-45"), ("'1e5'", "1e5"), ("1.2.3", "1.2.3")],
)
def test_texts_that_look_like_something_else(minimal: Path, written: str, text: str) -> None:
    assert load_config(minimal, [f"run.name={written}"]).run.name == text


def test_an_override_s_value_may_hold_equals_signs(minimal: Path) -> None:
    assert load_config(minimal, ["data.dir=/x/a=b"]).data.dir == "/x/a=b"


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = """
        tasks:
          one: &one {kind: classification, train: a.csv, dev: b.csv}
          two: {<<: *one, train: c.csv}
    """
    config = load_config(write(tmp_path / "a.yaml", text))
    assert (config.tasks["two"].train, config.tasks["two"].dev) == ("c.csv", "b.csv")


def test_without_a_file_there_are_the_defaults_and_the_overrides() -> None:
    config = load_config(None, ["tasks.sst={kind: classification, train: a, dev: b}", "seed=7"])
    assert config == Config.model_validate(
        {"seed": 7, "tasks": {"sst": {**MINIMAL["tasks"]["sst"], "train": "a", "dev": "b"}}}
    )


@pytest.mark.parametrize("kind", ["sampled", "adaptive"])
def test_keys_that_act_are_taken(minimal: Path, kind: str) -> None:
    hidden = [COSINE, "tasks.c.head={hidden: [3], lr: 0.1}", "tasks.c.range=[0, 9]", "tasks.sst.classes=7"]
    schedule = f"schedule={{kind: {kind}, alpha: 0.3, tasks_per_step: 4}}"
    assert load_config(minimal, [*hidden, schedule]).schedule.tasks_per_step == 4


@pytest.mark.parametrize("classes", ["[world, sport, 'no']", "['1', '2', '3']", "[on the one hand, 'Yes', été]"])
def test_classes_have_names(minimal: Path, tmp_path: Path, classes: str) -> None:
    """In the order of their numbers; labels are the names then, and nothing else is."""
    config = load_config(minimal, [f"tasks.sst.classes={classes}"])
    task, names = config.tasks["sst"], yaml.safe_load(classes)
    assert (task.classes, task.class_names, task.class_count, task.highest_label) == (names, names, 3, 2)
    for number, name in enumerate(names):
        assert task.number_of(name) == task.number_of(f" {name} ") == number
        assert task.label_of(float(number)) == name
    for wrong in (0, 2.0, "0", True, None, names[0].upper() + "x", ""):
        with pytest.raises(ValueError, match=re.escape(f"{wrong!r} is none of the classes {', '.join(names)}")):
            task.number_of(wrong)
    assert load_config(write(tmp_path / "again.yaml", to_yaml(config))) == config
    numbered = load_config(minimal, ["tasks.sst.classes=3"]).tasks["sst"]
    assert (numbered.class_names, numbered.class_count, numbered.label_of(2.0)) == (["0", "1", "2"], 3, 2)


def test_what_kinds_take_by_default() -> None:
    tasks = load_config(QUICKSTART).tasks
    assert [(task.texts, task.loss_kind, task.metric_kind) for task in tasks.values()] == [
        (1, "cross_entropy", "accuracy"),
        (2, "bce", "accuracy"),
        (2, "mse", "pearson"),
    ]


# ------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_configuration_we_ship_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    overrides = [] if path == QUICKSTART else ["data.dir=DATA", "encoder.pretrained=MODEL"]
    config = load_config(path, overrides)
    assert load_config(write(tmp_path / "again.yaml", to_yaml(config))) == config


NAMES = st.one_of(
    st.text(min_size=1), st.sampled_from(["1e5", "-3e-4", "null", "yes", "2024-01-01", "~", "1_0", "0x1F"])
)


@given(NAMES, NAMES, st.floats(0, 1e300), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,6}", fullmatch=True))
def test_what_is_written_out_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, column: str, number: float, task: str
) -> None:
    values = {
        "data": {"dir": name},
        "optimizer": {"lr": number},
        "tasks": {task: {**MINIMAL["tasks"]["sst"], "columns": {"text": [column], "label": column + name}}},
    }
    config = Config.model_validate(values)
    assert load_config(write(tmp_path_factory.mktemp("again") / "a.yaml", to_yaml(config))) == config


# ------------------------------------------------------------------------------------------- mistakes

PAIR = "tasks.p={kind: pair_classification, train: a, dev: b, columns: {text: [a, b]}, head: {kind: joint}}"
COSINE = "tasks.c={kind: pair_regression, train: a, dev: b, columns: {text: [a, b]}, head: {kind: cosine}}"
TRIPLETS = "tasks.t={kind: triplets, train: a, columns: {text: [a, b, c]}, head: {kind: cosine}}"
REGRESSION = "tasks.r={kind: pair_regression, train: a, dev: b, columns: {text: [a, b]}, head: {kind: joint}}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        # unknown keys, with the nearest name
        (["optimiser.lr=3"], "optimiser: unknown key; did you mean 'optimizer'?"),
        (["optimizer.learning_rate=3"], "optimizer.learning_rate: unknown key; valid keys: lr, head_lr, layer_decay"),
        (["tasks.sst.head.kid=linear"], "tasks.sst.head.kid: unknown key; did you mean 'kind'?"),
        (["tasks.sst.colums.label=x"], "tasks.sst.colums: unknown key; did you mean 'columns'?"),
        (["phases=[{epochs: 1}, {epoch: 3}]"], "phases.1.epoch: unknown key; did you mean 'epochs'?"),
        (["data.generate={sed: 3}"], "data.generate.sed: unknown key; did you mean 'seed'?"),
        (["encoder.shape={layer: 3}"], "encoder.shape.layer: unknown key; did you mean 'layers'?"),
        (["tasks.new={knd: classification}"], "tasks.new.knd: unknown key; did you mean 'kind'?"),
        (["optimizer.decay={milestones: [5], gama: 0.7}"], "optimizer.decay.gama: unknown key; did you mean 'gamma'?"),
        (
            ["phases=[{epochs: 1, decay: {milestone: [5], gamma: 0.7}}]"],
            "phases.0.decay.milestone: unknown key; did you mean 'milestones'?",
        ),
        # tasks called like keys
        (["tasks.length={kind: foo}"], "tasks.length.kind: input should be 'classification'"),
        (["tasks.decay={kind: classification}"], "tasks.decay.train: missing; it has no default"),
        (["tasks.columns={tran: a}"], "tasks.columns.tran: unknown key; did you mean 'train'?"),
        # wrong types
        (["optimizer.decay={milestones: [5]}"], "optimizer.decay: expected constant, linear, cosine or steps such as"),
        (["phases=[{epochs: 1, decay: fast}]"], "phases.0.decay: expected constant, linear, cosine or steps such as {"),
        (["phases=[{epochs: 1, trainable: 3}]"], "phases.0.trainable: expected all, heads or a list of parts such as"),
        (
            ["phases=[{epochs: 1, trainable: [encoder, heads]}]"],
            "phases.0.trainable: no 'heads' here; valid: encoder, sst",
        ),
        (
            ["weighting.method=gls", "tasks.sst.weight=0"],
            "tasks.sst.weight 0: weighting.method gls goes by logarithms of",
        ),
        (
            ["surgery.method=pcd", "schedule.kind=sampled"],
            "surgery.method pcd: needs all tasks in every step: schedule.ki",
        ),
        (
            ["surgery.method=pcd", "phases=[{epochs: 1, leave_out: [sst]}, {epochs: 1}]"],
            "surgery.method pcd: needs all tasks in every step, and sst does not reach the encoder in phases.0",
        ),
        (["optimizer.lr=fast"], "optimizer.lr: input should be a valid number, unable to parse"),
        (["optimizer.lr=[1]"], "optimizer.lr: input should be a valid number"),
        (["seed=1.5"], "seed: input should be a valid integer, got a number with a fractional part (got 1.5)"),
        (["seed=true"], "seed: is neither true nor false"),
        (["run.name=yes"], "run.name: is neither true nor false; a name such as yes or on needs quotes"),
        (["run.name=2026"], "run.name: expected text; put it in quotes (got 2026)"),
        (
            ["tasks.sst.columns.text=sentence"],
            "tasks.sst.columns.text: expected a list, such as [a, b] (got 'sentence')",
        ),
        (["optimizer.betas=0.9"], "optimizer.betas: expected a list"),
        (["phases.0.steps=3"], "phases: expected a list"),
        (["optimizer=3"], "optimizer: expected keys and values below it (got 3)"),
        (["tasks.sst=3"], "tasks.sst: expected keys and values below it (got 3)"),
        (["tasks=[sst]"], "tasks: expected keys and values below it"),
        (["surgery.options=sum"], "surgery.options: expected keys and values below it"),
        (["tasks={1: {kind: classification}}"], "tasks.1: expected text; put it in quotes (got 1)"),
        # values that cannot be
        (["optimizer.lr=-1"], "optimizer.lr: input should be greater than or equal to 0 (got -1)"),
        (["optimizer.lr=.inf"], "optimizer.lr: input should be a finite number (got inf)"),
        (["optimizer.lr=.nan"], "optimizer.lr: input should be a finite number (got nan)"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1: input should be less than 1 (got 1.0)"),
        (["seed=9223372036854775808"], "seed: input should be less than 9223372036854775808"),
        (["tasks.sst.head.hidden=[yes]"], "tasks.sst.head.hidden: is neither true nor false"),
        (
            ["tasks.sst.columns={text: [label]}"],
            "tasks.sst.columns: label: column 'label' is a text; a task that reads",
        ),
        # names of classes, and what YAML takes them for
        (
            ["tasks.sst.classes=[yes, no]"],
            "tasks.sst.classes: is neither true nor false; a name such as yes or on needs",
        ),
        (["tasks.sst.classes=[on, a]"], "tasks.sst.classes: is neither true nor false; a name such as yes or on needs"),
        (
            ["tasks.sst.classes=[1, 2]"],
            "tasks.sst.classes: expected how many classes, from 2 on, or a list of their na",
        ),
        (
            ["tasks.sst.classes=[a, 1e3]"],
            "such as [world, sport]; a name that YAML reads as a number or null needs quot",
        ),
        (
            ["tasks.sst.classes=[null, a]"],
            "such as [world, sport]; a name that YAML reads as a number or null needs quo",
        ),
        (
            ["tasks.sst.classes=[a]"],
            "tasks.sst.classes: expected how many classes, from 2 on, or a list of their names",
        ),
        (
            ["tasks.sst.classes=1"],
            "tasks.sst.classes: expected how many classes, from 2 on, or a list of their names, s",
        ),
        (
            ["tasks.sst.classes=two"],
            "tasks.sst.classes: expected how many classes, from 2 on, or a list of their names,",
        ),
        (["tasks.sst.classes=[a, b, a]"], "tasks.sst: classes: names 'a' twice"),
        (
            ["tasks.sst.classes=[a, ' b']"],
            "tasks.sst: classes: ' b' is no name; blanks stand singly, and between words",
        ),
        (["tasks.sst.classes=[a, '']"], "tasks.sst: classes: '' is no name; blanks stand singly, and between words"),
        ([PAIR, "tasks.p.classes=[a, b, c]"], "tasks.p: loss bce needs classes 2, not 3; use loss cross_entropy"),
        (
            [REGRESSION, "tasks.r.classes=[a, b]"],
            "tasks.r: classes belongs to kind classification and pair_classificat",
        ),
        (["tasks.sst.columns.text=[a, a]"], "tasks.sst.columns: text: names a column twice (a, a)"),
        (["schedule={kind: sequential, length: shortest}"], "schedule: length: an epoch of kind sequential ends with"),
        (["surgery.method=pcgard"], "or 'pcd'; did you mean 'pcgrad'? (got 'pcgard')"),
        (
            ["engine.precision=fp16"],
            "engine.precision: input should be 'auto', 'fp32' or 'bf16'; did you mean 'bf16'? (got",
        ),
        (["engine.zero=2"], "engine.zero: stages 0 and 2 are not offered: 0 shards nothing, and 2 adds nothing"),
        (["engine.zero=0"], "engine.zero: stages 0 and 2 are not offered"),
        (["engine.zero=5"], "engine.zero: input should be 1 or 3 (got 5)"),
        (["schedule.length=half"], "schedule.length: expected shortest, longest, unbalanced or a number of steps"),
        (["schedule.length=0"], "schedule.length: expected shortest, longest, unbalanced or a number of steps from 1"),
        (
            ["schedule.length=unbalanced", "schedule.kind=sampled"],
            "schedule: length unbalanced belongs to kind round_robin",
        ),
        (["schedule.anneal=2"], "schedule: anneal 2.0 would take alpha 1.0 below 0"),
        (["encoder.shape={hidden_size: 10, heads: 3}"], "encoder.shape: hidden_size 10 is not a multiple of heads 3"),
        (["data.dir=x", "data.generate={}"], "data: dir and generate exclude each other; set one of them to null"),
        (["phases=[]"], "phases: list should have at least 1 item"),
        (["phases=[{steps: 1, epochs: 1}]"], "phases.0: phase 'train' needs either epochs or steps"),
        (["phases=[{name: probe}]"], "phases.0: phase 'probe' needs either epochs or steps"),
        (["tasks.a.b=x"], "tasks.a.b: unknown key; valid keys: kind, train, dev"),
        (["tasks.new.train=x"], "tasks.new.kind: missing; it has no default"),
        *[
            ([f"tasks.{name}={{kind: classification, train: a, dev: b}}"], f"tasks.{name}: this name belongs to")
            for name in ("encoder",)
        ],
        (["tasks.a b={kind: classification, train: a, dev: b}"], "a task's name is made of letters, digits, - and _"),
        (["tasks.sst.kind=sentiment"], "tasks.sst.kind: input should be 'classification', 'pair_classification', 'p"),
        (
            ["tasks.sst.train=hub:owner/rows.csv"],
            "tasks.sst.train: 'hub:owner/rows.csv' is not hub:owner/name/path/in/",
        ),
        (["tasks.sst.dev=hub:owner/name@/a.csv"], "tasks.sst.dev: 'hub:owner/name@/a.csv' is not hub:owner/name/path/"),
        # what does not fit together
        (
            ["tasks.sst.kind=pair_regression"],
            "tasks.sst: kind pair_regression takes 2 text column(s), columns.text names 1",
        ),
        (
            ["tasks.sst.columns.text=[a, b]"],
            "tasks.sst: kind classification takes 1 text column(s), columns.text names 2",
        ),
        (["tasks.sst.head.kind=joint"], "tasks.sst: head.kind 'joint' does not fit kind classification; valid: linear"),
        (
            [PAIR, "tasks.p.head.kind=linear"],
            "tasks.p: head.kind 'linear' does not fit kind pair_classification; valid: joint",
        ),
        (["tasks.sst.loss=mse"], "tasks.sst: loss 'mse' does not fit kind classification; valid: cross_entropy"),
        ([REGRESSION, "tasks.r.loss=bce"], "tasks.r: loss 'bce' does not fit kind pair_regression; valid: mse, huber"),
        (
            ["tasks.sst.metric=pearson"],
            "tasks.sst: metric 'pearson' does not fit kind classification; valid: accuracy, f1",
        ),
        ([PAIR, "tasks.p.classes=3"], "tasks.p: loss bce needs classes 2, not 3; use loss cross_entropy"),
        (
            [PAIR, "tasks.p.head.kind=cosine", "tasks.p.loss=cross_entropy"],
            "tasks.p: loss cross_entropy does not fit head.kind 'cosine'; valid: bce, cosine_embedding, mnrl",
        ),
        (
            [PAIR, "tasks.p.loss=cosine_embedding"],
            "loss cosine_embedding does not fit head.kind 'joint'; valid: head.kind cosine or relu_cosine",
        ),
        ([REGRESSION, "tasks.r.loss=mnrl"], "loss mnrl does not fit head.kind 'joint'; valid: head.kind cosine"),
        ([REGRESSION, "tasks.r.margin=0.1"], "tasks.r: margin belongs to loss cosine_embedding, not mse"),
        # what would do nothing
        ([REGRESSION, "tasks.r.classes=7"], "tasks.r: classes belongs to kind classification and pair_classification,"),
        (
            [TRIPLETS, "tasks.t.classes=3"],
            "tasks.t: classes belongs to kind classification and pair_classification, no",
        ),
        (["tasks.sst.range=[0, 9]"], "tasks.sst: range belongs to kind pair_regression, not classification; leave it"),
        (["schedule.alpha=0.3"], "schedule: alpha belongs to kind sampled and adaptive, not round_robin; leave it out"),
        (
            ["schedule={kind: sequential, tasks_per_step: 4}"],
            "schedule: tasks_per_step belongs to kind sampled and adaptive, not sequential; leave it out, or set it",
        ),
        (["schedule={kind: adaptive, anneal: 0.5}"], "schedule: anneal belongs to kind sampled, not adaptive; leave"),
        (["schedule.targets={sst: 0.5}"], "schedule: targets belongs to kind adaptive, not round_robin; leave it out"),
        ([COSINE, "tasks.c.head.lr=0.1"], "tasks.c: head.lr: a cosine head without hidden layers has no parameters;"),
        (
            [COSINE, "tasks.c.loss=cosine_embedding", "tasks.c.head.scale=5"],
            "tasks.c: loss cosine_embedding works on plain cosines; leave head.scale out",
        ),
        # ranking
        ([REGRESSION, "tasks.r.mnrl={}"], "tasks.r: mnrl ranks texts that are encoded one by one; valid: a pair task"),
        (["tasks.sst.mnrl={}"], "tasks.sst: mnrl ranks texts that are encoded one by one; valid: a pair task"),
        ([COSINE, "tasks.c.mnrl={threshold: label}"], "tasks.c.mnrl: threshold label needs start"),
        ([COSINE, "tasks.c.mnrl={rise: 0.1}"], "tasks.c.mnrl: start and rise need threshold: label or cosine"),
        ([COSINE, "tasks.c.mnrl={threshold: cosine, start: 4.4}"], "tasks.c.mnrl: start 4.4 is no cosine"),
        (
            [COSINE, "tasks.c.mnrl={threshold: label, start: 5.1}"],
            "tasks.c: mnrl.start 5.1 is above the highest label, 5",
        ),
        (
            [COSINE, "tasks.c.loss=mnrl", "tasks.c.head.hidden=[3]"],
            "tasks.c: loss mnrl trains the encoder alone; leave head.hidden and head.shared out, or add a loss",
        ),
        ([COSINE, "tasks.c.mnrl={}", "schedule.batch_size=1"], "tasks.c: mnrl cannot rank within a batch of 1; use"),
        ([TRIPLETS, "tasks.t.batch_size=1"], "tasks.t: mnrl cannot rank within a batch of 1; use batch_size 2 or more"),
        (
            [TRIPLETS, "tasks.t.batch_size=7", "engine.accumulation=4"],
            "within a batch of 7 cut into 4 micro-batches; lower engine.accumulation or use batch_size 8 or more",
        ),
        ([TRIPLETS, "tasks.t.head.kind=linear"], "head.kind 'linear' does not fit kind triplets; valid: cosine"),
        ([TRIPLETS, "tasks.t.loss=bce"], "tasks.t: loss 'bce' does not fit kind triplets; valid: mnrl"),
        ([TRIPLETS, "tasks.t.columns.text=[a, b]"], "kind triplets takes 3 text column(s), columns.text names 2"),
        (
            [TRIPLETS, "tasks.t.mnrl={threshold: label, start: 1}"],
            "tasks.t: mnrl.threshold: every triplet is a positive; leave it out",
        ),
        ([TRIPLETS, "tasks.sst=null"], "tasks: none has a dev file, so nothing would be scored; give one to at least"),
        (["tasks.sst.dev=null"], "tasks.sst: dev: missing; only triplets can do without a development file"),
        # layers that heads share
        (["tasks.sst.head.shared=p"], "tasks.sst.head.shared: no 'p' in shared_layers; there: none; define it there"),
        (
            ["tasks.sst.head.shared=p", "shared_layers={pair: {}, other: {}}"],
            "tasks.sst.head.shared: no 'p' in shared_layers; there: pair, other",
        ),
        (["shared_layers={pair: {}}"], "shared_layers.pair: no head uses it; name it in tasks.TASK.head.shared"),
        (
            ["tasks.sst.head.shared=sst", "shared_layers={sst: {}}"],
            "shared_layers.sst: a layer's name is made of letters, digits, - and _, and is no task's",
        ),
        (["tasks.sst.head.scale=0"], "tasks.sst.head.scale: input should be greater than 0 (got 0)"),
        ([REGRESSION, "tasks.r.range=[5, 0]"], "tasks.r: range [5.0, 0.0] is upside down; give [lowest, highest]"),
        ([REGRESSION, "tasks.r.range=[0, .nan]"], "tasks.r.range.1: input should be a finite number"),
        ([REGRESSION, "tasks.r.range=[-5, 0]", "tasks.r.head.kind=cosine"], "the highest label, which must be above 0"),
        # overrides that are none
        (["optimizer.lr"], "--set optimizer.lr: expected key=value, for example optimizer.lr=3e-5"),
        (["=3"], "--set =3: expected key=value"),
        (["optimizer..lr=3"], "--set optimizer..lr=3: expected key=value"),
        (["optimizer.lr={"], "--set optimizer.lr line 1: not valid YAML"),
        (["optimizer=!!map [1]"], "--set optimizer line 1: not valid YAML: not a mapping"),
        (["optimizer={lr: 1, lr: 2}"], "--set optimizer line 1: not valid YAML: key 'lr' is given twice"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_with_its_key_and_the_way_out(minimal: Path, overrides: list[str], told: str) -> None:
    assert told in error(minimal, *overrides)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 200))
"""Each line twice the one before: more values than there are atoms."""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task:\n  sst: {}\n", "task: unknown key; did you mean 'tasks'?"),  # not: tasks is missing
        ("", "tasks: missing; it has no default"),
        ("seed: 1\nrun: {}\nseed: 2\n", " line 3: not valid YAML: key 'seed' is given twice"),
        ("run:\n  log_every: 1\n  log_every: 2\n", " line 3: not valid YAML: key 'log_every' is given twice"),
        ("seed: 1\nrun: [a\n", " line 3: not valid YAML"),
        ("seed: 1\nrun: a: b\n", " line 2: not valid YAML: mapping values are not allowed here"),
        ("run:\n\tdir: x\n", " line 2: not valid YAML: found character '\\t'"),
        ("seed: 1\n---\nseed: 2\n", " line 2: not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", " line 1: not valid YAML: could not determine a constructor"),
        ("? [a, b]\n: 1\n", " line 1: not valid YAML: a key must be text"),
        ("a: &x [*x]\n", " line 1: not valid YAML"),
        (LAUGHS, " line 1: not valid YAML: more than 100,000 values once its aliases are written out"),
        ("seed: " + "9" * 5000 + "\n", ": not valid YAML: Exceeds the limit"),
        ("seed: 0b_\n", ": not valid YAML: invalid literal"),
        ("seed: " + "[" * 5000 + "\n", ": not valid YAML: nested too deeply"),
        ("seed: !!int ''\n", ": not valid YAML: a value is not what its tag says; leave tags (!!…) out"),
        ("seed: !!bool maybe\n", ": not valid YAML: a value is not what its tag says; leave tags (!!…) out"),
        ("seed: !!binary aGk=\n", " line 1: not valid YAML: could not determine a constructor"),
        ("#" * 2**20 + "\n", ": more than 1,048,576 bytes, which no configuration or search space needs"),
        ("run: {name: ../x}\ntasks: {}\n", ": run.name: expected a name that stays inside of run.dir"),
        ("run: {name: /etc/x}\ntasks: {}\n", ": run.name: expected a name that stays inside of run.dir"),
        ("1: 2\n", ": 1: a key must be text; put it in quotes"),
        ('"a\\nb": 2\n', ": a b: unknown key"),
        ("seed: \x00\n", ": not valid YAML"),
        ("- seed\n", ": the top level must be keys and values, not a list"),
        ("seed\n", ": the top level must be keys and values, not a str"),
        (b"seed: 1 # caf\xe9\n", ": byte 13 is not UTF-8; save the file as UTF-8"),
        ("base: nowhere.yaml\n", "nowhere.yaml is no file; name one YAML file, relative to this one"),
        ("base: [a, b]\n", "is no file; name one YAML file"),
        ("base: bad.yaml\n", "the files are based on each other in a circle"),
        # names that pydantic's own locations also use
        ("tasks: {int: {kind: x, train: a, dev: b}}", ": tasks.int.kind: input should be 'classification'"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, text: str | bytes, told: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    message = error(path)
    assert message.startswith(str(path))
    assert told in message


def test_a_missing_file_a_folder_and_a_longer_circle(tmp_path: Path) -> None:
    assert error(tmp_path / "no.yaml").endswith("no.yaml: cannot be read: No such file or directory")
    assert error(tmp_path).endswith("cannot be read: Is a directory")
    write(tmp_path / "a.yaml", {"base": "b.yaml"})
    write(tmp_path / "b.yaml", {"base": "c.yaml"})
    write(tmp_path / "c.yaml", {"base": "a.yaml"})
    assert "circle" in error(tmp_path / "a.yaml")


def test_the_same_base_on_two_branches_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", MINIMAL)
    write(tmp_path / "a.yaml", {"base": "root.yaml"})
    assert load_config(write(tmp_path / "b.yaml", {"base": "a.yaml"})) == load_config(tmp_path / "root.yaml")


# ------------------------------------------------------------------------------------------- the page


def dotted(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, from the annotations: an own walk, beside the page's over the JSON schema."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        inner = re.search(r"mtbert\.config\.(\w+)", str(field.annotation))
        if inner and issubclass(below := getattr(sys.modules["mtbert.config"], inner[1]), Section):
            many = {"dict": ".<name>", "list": "[]"}.get(str(field.annotation).partition("[")[0], "")
            yield from dotted(below, f"{key}{many}.")


def rows() -> dict[str, list[str]]:
    """Key → type, default, meaning, as the page has them."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    cells = [re.split(r"(?<!\\) \| ", line.strip("| \n")) for line in page.splitlines() if line.startswith("| `")]
    return {key.strip("`"): rest for key, *rest in cells}


def test_the_page_is_what_the_command_writes() -> None:
    """A key added, renamed or given another default is a change that users see: it has to show in the page."""
    command = [sys.executable, "-m", "mtbert", "show-config", "--reference"]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert written == reference()
    assert written == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), (
        "docs/configuration.md is stale: python -m mtbert show-config --reference > docs/configuration.md"
    )


def test_the_page_has_every_key_and_says_what_each_means() -> None:
    assert set(rows()) == set(dotted(Config))
    assert all(len(row) == 3 and row[0] and row[2] for row in rows().values())


WITHOUT_DEFAULT = ("phases[]", "data.generate.", "tasks.<name>.mnrl.", "shared_layers.<name>.")
"""Sections that are not there unless asked for."""


def test_the_defaults_in_the_page_are_the_defaults() -> None:
    plain = load_config(None, ["tasks.x={kind: classification, train: t, dev: d}", "encoder.shape={}"])
    tried = 0
    for key, (_, default, _) in rows().items():
        if not default.startswith("`") or key.startswith(WITHOUT_DEFAULT):
            continue
        value: Any = plain
        for part in key.replace("<name>", "x").split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        if key not in ("encoder.shape", "tasks.<name>.dev"):  # both are given above
            dumped = json.loads(json.dumps(value, default=lambda section: section.model_dump(mode="json")))
            assert dumped == yaml.safe_load(default.strip("`")), key
            tried += 1
    assert tried > 40


def test_anchors_lead_to_headings() -> None:
    page = reference()
    headings = re.findall(r"^## `(.+)`$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()) for heading in headings}
    links = re.findall(r"\]\(#(.+?)\)", page)
    assert links and set(links) == anchors
    assert len(anchors) == len(headings)


def refused(values: Any) -> list[str]:
    """Where an editor would draw its red lines."""
    kind = jsonschema.validators.validator_for(schema())
    kind.check_schema(schema())
    return [each.json_path for each in kind(schema()).iter_errors(values)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_takes_every_file_we_ship_as_it_stands(path: Path) -> None:
    """Not what it becomes with its base: an editor sees one file."""
    assert refused(parse_yaml(path.read_text(encoding="utf-8"), str(path))) == []


@pytest.mark.parametrize(
    "text", ["{}", "{base: a.yaml, tasks: {sts: null}}", "{base: a.yaml, tasks: {sts: {weight: 2}}}"]
)
def test_the_schema_takes_what_is_laid_over_a_base(text: str) -> None:
    assert refused(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    "text", ["{bass: a.yaml}", "{base: 3}", "{tasks: {a: {knd: x}}}", "{tasks: {a: 3}}", "{seed: x}"]
)
def test_the_schema_refuses_mistakes(text: str) -> None:
    assert refused(yaml.safe_load(text))
