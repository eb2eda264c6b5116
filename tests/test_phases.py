"""Phases as data: which tasks, parts and rates at which step, and what the configuration refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mtbert.config import Config
from mtbert.config_files import load_config
from mtbert.errors import UserError
from mtbert.phases import Phase, plan

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TOKENS = [np.full(count, 5) for count in (40, 90, 60)]  # of sst, para, sts; 10 a step: 4, 9 and 6 batches


def config(tmp_path: Path, phases: list[dict[str, Any]], **sections: Any) -> Config:
    values = {"base": str(QUICKSTART), "schedule": {"batch_size": 10}, "phases": phases, **sections}
    path = tmp_path / "phases.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


def tasks_at(phases: list[Phase], step: int) -> list[int]:
    phase = next(phase for phase in phases if step <= phase.last)
    return [share.task for share in phase.schedule.shares(phase.schedule_step(step), 0, 1)]


def examples_at(phases: list[Phase], step: int, task: int) -> list[int]:
    phase = next(phase for phase in phases if step <= phase.last)
    shares = phase.schedule.shares(phase.schedule_step(step), 0, 1)
    return next(share.micro_batches[0].tolist() for share in shares if share.task == task)


def test_phases_name_their_tasks_and_count_their_own_epochs(tmp_path: Path) -> None:
    first = {"name": "one", "epochs": 2, "tasks": ["sst"]}
    phases = plan(config(tmp_path, [first, {"epochs": 1}, {"steps": 3, "tasks": ["sts", "para"]}]), TOKENS)
    assert [(phase.first, phase.last) for phase in phases] == [(0, 7), (8, 16), (17, 19)]
    assert [tasks_at(phases, step) for step in (0, 7, 8, 16, 17, 19)] == [
        [0],
        [0],
        [0, 1, 2],
        [0, 1, 2],
        [1, 2],
        [1, 2],
    ]
    assert [step for phase in phases for step in range(phase.first, phase.last + 1) if phase.ends_epoch(step)] == [
        *[3, 7, 16]
    ]
    assert [phases[0].epoch(step) for step in (0, 3, 4, 7)] == [0, 0, 1, 1]
    assert phases[1].epoch(8) == phases[1].epoch(16) == 2 and phases[2].epoch(17) == 3


def test_phases_with_the_same_tasks_go_on_through_the_data(tmp_path: Path) -> None:
    """Split or not, the same examples at the same step; also with another phase in between."""
    whole = plan(config(tmp_path, [{"steps": 12}]), TOKENS)
    parts = plan(config(tmp_path, [{"steps": 5}, {"steps": 4, "tasks": ["para"]}, {"steps": 7}]), TOKENS)
    for step in range(12):
        later = step if step < 5 else step + 4
        for task in range(3):
            assert examples_at(parts, later, task) == examples_at(whole, step, task)


def test_phases_with_other_tasks_draw_their_data_anew(tmp_path: Path) -> None:
    """Else a curriculum would go through the same beginning of its data again and again."""
    grown = plan(config(tmp_path, [{"steps": 3, "tasks": ["para"]}, {"steps": 3, "tasks": ["sst", "para"]}]), TOKENS)
    first, second = ([examples_at(grown, start + step, 1) for step in range(3)] for start in (0, 3))
    assert first != second
    apart = plan(config(tmp_path, [{"steps": 3, "tasks": ["para"]}, {"steps": 3, "tasks": ["sst"]}]), TOKENS)
    alone = plan(config(tmp_path, [{"steps": 3, "tasks": ["sst"]}]), TOKENS)
    for step in range(3):
        assert examples_at(apart, 3 + step, 0) == examples_at(alone, step, 0), "nothing of it was seen before"


def factors(tmp_path: Path, phases: list[dict[str, Any]], **optimizer: Any) -> list[float]:
    made = config(tmp_path, phases, optimizer=optimizer)
    planned = plan(made, TOKENS)
    return [phase.rate_factor(step, made.optimizer) for phase in planned for step in range(phase.first, phase.last + 1)]


@pytest.mark.parametrize(("decay", "halfway"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_warm_up_then_decay(decay: str, halfway: float, tmp_path: Path) -> None:
    found = factors(tmp_path, [{"steps": 100}], warmup=0.1, decay=decay)
    assert found[0] == pytest.approx(0.1) and found[9] == pytest.approx(1.0) == found[10]
    assert found[55] == pytest.approx(halfway)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_milestones_count_the_epochs_of_the_run_like_multisteplr(tmp_path: Path) -> None:
    import torch

    phases = [{"epochs": 2, "trainable": "heads"}, {"epochs": 3}, {"epochs": 1, "trainable": "heads"}]
    found = factors(tmp_path, phases, warmup=0, decay={"milestones": [2, 5], "gamma": 0.7})
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    course = torch.optim.lr_scheduler.MultiStepLR(sgd, [2, 5], 0.7)
    expected = []
    for _ in range(6):
        expected += [sgd.param_groups[0]["lr"]] * 9
        sgd.step()
        course.step()
    assert found == pytest.approx(expected)


def test_a_phase_s_own_course_and_rates(tmp_path: Path) -> None:
    phases = [{"steps": 4, "decay": "constant", "warmup": 0.5}, {"steps": 4}]
    assert factors(tmp_path, phases, warmup=0, decay="linear") == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    made = config(
        tmp_path,
        [
            {"steps": 1},
            {"steps": 1, "lr": 3e-5, "head_lr": 2e-3},
            {"steps": 1, "lr_scale": {"encoder": 0.5, "sts": 4}},
            {"steps": 1, "lr_scale": 0.1},
        ],
        tasks={"sst": {"head": {"lr": 9.5e-4}}, "sts": {"head": {"kind": "difference"}}},
        optimizer={"lr": 2e-5, "head_lr": 1e-4},
    )
    rates = [[made.rate(phase, part) for part in ("encoder", "sst", "sts")] for phase in made.phases]
    expected = [[2e-5, 9.5e-4, 1e-4], [3e-5, 9.5e-4, 2e-3], [1e-5, 9.5e-4, 4e-4], [2e-6, 9.5e-5, 1e-5]]
    np.testing.assert_allclose(rates, expected)


def test_trainable_parts(tmp_path: Path) -> None:
    phases = [{"steps": 1}, {"steps": 1, "trainable": "heads"}, {"steps": 1, "trainable": ["encoder", "sst"]}]
    found = [
        [part for part in ("encoder", "sst", "para") if phase.trains(part)] for phase in config(tmp_path, phases).phases
    ]
    assert found == [["encoder", "sst", "para"], ["sst", "para"], ["encoder", "sst"]]


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"tasks": ["stt"]}, r"phases\.0\.tasks: no 'stt' here; valid: sst, para, sts"),
        ({"leave_out": ["nli"]}, r"phases\.0\.leave_out: no 'nli' here; valid: sst, para, sts"),
        (
            {"trainable": ["encodr"]},
            r"phases\.0\.trainable: no 'encodr' here; valid: encoder, sst, para; a list names parts",
        ),
        ({"trainable": []}, r"phases\.0\.trainable: expected all, heads or a list of parts"),
        ({"trainable": "head"}, r"phases\.0\.trainable: expected all, heads or a list of parts.* \(got 'head'\)"),
        ({"tasks": []}, r"phases\.0\.tasks"),
        ({"trainable": "heads", "tasks": ["sts"]}, r"trains nothing.*valid parts for trainable: encoder"),
        ({"trainable": ["sst"], "tasks": ["para"]}, r"trains nothing.*valid parts for trainable: encoder, para"),
        ({"trainable": ["encoder"], "leave_out": ["sst", "para", "sts"]}, r"phases\.0: phase 'train' trains nothing"),
        ({"lr": 0, "trainable": ["encoder"]}, r"trains nothing: .* a rate of 0"),
        ({"lr_scale": {"encoder": 0}}, r"phases\.0\.lr_scale: expected a number above 0"),
        ({"lr_scale": {"nli": 1}}, r"phases\.0\.lr_scale: no 'nli' here; valid: encoder, sst, para"),
        ({"decay": "step"}, r"phases\.0\.decay: expected constant, linear, cosine or steps.* \(got 'step'\)"),
        ({"decay": {"milestones": []}}, r"phases\.0\.decay: expected constant, linear, cosine or steps"),
    ],
)
def test_impossible_phases_are_refused(phase: dict[str, Any], message: str, tmp_path: Path) -> None:
    """In the quick start sts has a cosine head, which has no parameters."""
    with pytest.raises(UserError, match=message):
        config(tmp_path, [{"steps": 1, **phase}])
