"""`python -m tune` (or `python tune/search.py`): the search for a configuration, as a run folder.

    SEARCH/search.yaml, base.yaml, space.yaml    what is searched
    SEARCH/study.db                              the Optuna study, up to date after every evaluation
    SEARCH/trials/0000/ …                        a run folder per trial: configuration, curves, logs
    SEARCH/best.yaml, report.md, *.png           the outcome

Ray Tune runs the trials and ASHA or PBT judge them; what is tried, and what came of it, is in the study alone. So a
search that was killed starts a fresh Ray, tells the scheduler what the study knows, and goes on.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

if not __package__:  # started as a script: the checkout, not tune/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import filelock
from pydantic import Field, TypeAdapter, ValidationError

from launch.records import ROOT, snapshot_code, writing_to
from mtbert.config import Config
from mtbert.config_files import DEFAULT_CONFIG, config_of, load_config, to_yaml
from mtbert.environment import redacted
from mtbert.errors import CommandLine, UserError, to_install
from mtbert.files import user_path, written_aside
from mtbert.runs import create_run, independent, usable_cores
from mtbert.stops import STOPPED, UNREAD, give_up, stop_requests
from mtbert.yaml_files import dump_yaml, inline_yaml, read_yaml
from tune.space import Space, anchored, corners, load_space

DEFAULT_SPACE = ROOT / "configs" / "search" / "default.yaml"
PRETRAINED_SPACE = ROOT / "configs" / "search" / "pretrained.yaml"


Count = Annotated[int, Field(ge=1, lt=2**31)]
Scheduler = Literal["asha", "pbt", "none"]


@dataclass(frozen=True)
class Settings:
    """How a search is done; `search.yaml`."""

    source: str
    trials: Count
    examples: Annotated[int, Field(ge=0, lt=2**63)]  # 0: as the configuration, before that is known
    evaluations: Count
    metrics: Annotated[list[str], Field(min_length=1)]
    scheduler: Scheduler
    reduction: Annotated[Count, Field(ge=2)]
    sampler: Literal["tpe", "random"]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    ranks: Count
    cpus: Count
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    concurrent: Count | None
    storage: str
    name: str


def parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="python -m tune",
        description="Search for learning rates, loss weights, σ and anything else that a configuration says.",
        epilog="All trials train on the same number of examples, whatever their σ, and are compared at equal numbers.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to search")
    what.add_argument(
        "--config", type=user_path, metavar="YAML", help="the configuration that is varied (default: quickstart)"
    )
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides")
    what.add_argument(
        "--space",
        type=user_path,
        metavar="YAML",
        help="the space (default: configs/search/default.yaml, or pretrained.yaml beside it)",
    )
    what.add_argument("--trials", type=_count, metavar="N", help="trials in all (default: 16)")
    what.add_argument(
        "--examples", type=_count, metavar="N", help="that a trial trains on (default: as the configuration)"
    )
    what.add_argument("--metric", nargs="+", metavar="NAME", dest="metrics",
                      help="composite, or tasks; several for a Pareto front (default: composite)")  # fmt: skip
    what.add_argument("--resume", type=user_path, metavar="SEARCH", help="continue a search; --trials may ask for more")

    how = parser.add_argument_group("how")
    how.add_argument("--scheduler", choices=("asha", "pbt", "none"), help="asha stops bad trials early (default)")
    how.add_argument("--evaluations", type=_count, metavar="N", help="of each trial, evenly spaced (default: 8)")
    how.add_argument("--reduction", type=_count, metavar="N", help="asha: one in N goes on at each rung (default: 3)")
    how.add_argument("--sampler", choices=("tpe", "random"), help="(default: tpe)")
    how.add_argument("--seed", type=_seed, metavar="N", help="of the search; the trials' own is the configuration's")
    how.add_argument("--name", help="of the search folder and its study (default: run.name, or date, config)")
    how.add_argument("--storage", metavar="URL", help="database of the Optuna study (default: SQLite in the folder)")

    where = parser.add_argument_group("where")
    where.add_argument("--ranks-per-trial", type=_count, metavar="N", help="(default: 1)")
    where.add_argument("--cpus-per-rank", type=_count, metavar="N", help="CPUs, and threads, of a rank (default: 1)")
    where.add_argument("--gpus-per-rank", type=_share, metavar="X", help="1, or a part with one rank (default: 0)")
    where.add_argument("--concurrent", type=_count, metavar="N", help="trials at once (default: as many as fit)")
    where.add_argument("--cluster", choices=("slurm",), help="search on nodes of a cluster instead of this machine")
    where.add_argument("--nodes", type=_count, metavar="N", help="nodes of the cluster (default: 1)")
    where.add_argument("--cpus-per-node", type=_count, metavar="N", help="of the cluster (default: for one trial)")
    where.add_argument("--slurm", nargs="+", action="extend", default=[], metavar="OPTION[=VALUE]",
                       help="options of sbatch, e.g. partition=big time=4:00:00 gpus-per-node=2")  # fmt: skip
    where.add_argument("--address", help=argparse.SUPPRESS)  # of the Ray to join: tune.allocation sets it
    where.add_argument("--dashboard", action="store_true", help="Ray's dashboard, on this machine only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 no trial succeeded, 2 a user's mistake, 130 stopped, 141 nobody reads stdout any more."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(words)
    try:
        code = search(args, ["python", "-m", "tune", *words])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before trials run, or after
        print("interrupted", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # of the word that a job was submitted
        give_up(sys.stdout)
        return UNREAD


def search(args: argparse.Namespace, command: list[str]) -> int:
    for package in ("ray", "optuna"):
        if find_spec(package) is None:
            raise UserError(f"a search needs {package}: {to_install('tune')} (`make search` does it)")
    if args.resume is not None:
        folder, settings = args.resume.absolute(), resumed_settings(args)
        config = load_config(folder / "base.yaml")
        space = load_space(folder / "space.yaml", config)
        if space.stages and settings.trials != space.staged_trials():
            raise UserError(f"--trials {settings.trials}: the stages of the space have {space.staged_trials()} trials")
    else:
        config = independent(load_config(args.config or DEFAULT_CONFIG, args.overrides))
        source = args.space or (PRETRAINED_SPACE if config.encoder.pretrained else DEFAULT_SPACE)
        searched = anchored(read_yaml(source))
        space = load_space(source, config, searched)
        settings = new_settings(args, config, space)
        named = f"run.name={inline_yaml(settings.name)}"
        config = config_of(config.model_dump(mode="json"), [named], f"--name {settings.name}")
    check_place(args, settings)
    from tune.length import of_equal_length, own_examples  # with torch; opens the data, once for all trials

    if args.resume is None:
        check_corners(source, space, settings.metrics)
        settings = replace(settings, examples=settings.examples or own_examples(config))
        of_equal_length(config, settings.examples, settings.evaluations)
        folder = make_folder(searched, settings, config, command)
        config = load_config(folder / "base.yaml")  # with absolute paths
        space = replace(space, base=config.model_dump(mode="json"))
    else:
        of_equal_length(config, settings.examples, settings.evaluations)  # data that are gone would fail every trial
    study = None
    try:
        with _only_search(folder):
            study = open_study(folder, settings, space, config, args.resume is not None)
            with writing_to(folder):
                write_settings(folder, settings)  # a resume may have changed them
        job = None if args.cluster is None else submit(args, folder, settings)
    except BaseException:
        if args.resume is None:
            if study is not None:  # which may lie elsewhere
                study.delete()
            shutil.rmtree(folder)
        raise
    if job is None:
        with _only_search(folder):
            return run(args, folder, settings, space, study)
    # here, too: a job that is cancelled may be ended before it can say so
    print(f"job {job}: search folder {folder}\nwatch with: tail -F {folder}/slurm.log")
    print(f"if it ends before it is done, continue with: {again(args, folder)}")
    return 0


def check_corners(source: Path, space: Space, metrics: Sequence[str]) -> None:
    """Raises `UserError` for trials that cannot be compared, and for a method or option that does not exist, which
    `load_space` without torch cannot know."""
    from mtbert.building import methods_of

    own = _scored(config_of(space.base))
    for enabled, values in corners(space):
        config = enabled.config(values)
        other = {*own} ^ {*_scored(config)}
        if other and (len(metrics) > 1 or metrics[0] in ("composite", *other)):
            name = min(other)
            kept = next((task for task in own if task not in other), "TASK")
            raise UserError(
                f"--metric {' '.join(metrics)}: needs the same tasks in all trials, and {name} is not in all of them "
                f"({source}); judge by --metric {kept}, or leave tasks.{name} out of the space"
            )
        try:
            methods_of(config)
        except UserError as error:
            raise UserError(f"{source}: {error} (tried with {inline_yaml(values)})") from None


def _scored(config: Config) -> list[str]:
    return [name for name, task in config.tasks.items() if task.dev is not None]


def check_place(args: argparse.Namespace, settings: Settings) -> None:
    """Raises `UserError` when a trial does not fit where it is to run; says when GPUs there are left alone."""
    from tune.cluster import check_room

    if args.cluster is None and args.address is None:
        if given := [name for name in ("nodes", "cpus_per_node", "slurm") if getattr(args, name)]:
            raise UserError(f"--{given[0].replace('_', '-')}: of which cluster? add --cluster slurm")
        node = _this_machine()
        check_room([node], settings.ranks, settings.cpus, settings.gpus)
    elif args.cluster is not None:
        if shutil.which("sbatch") is None:
            raise UserError("--cluster slurm: no sbatch here; leave --cluster out to search on this machine")
        node = {"CPU": _cpus_per_node(args, settings), "GPU": _gpus_per_node(args.slurm)}
        check_room([node] * (args.nodes or 1), settings.ranks, settings.cpus, settings.gpus)
    else:
        return
    if node["GPU"] and args.gpus_per_rank is None and args.resume is None:
        print(f"{node['GPU']} GPU(s) stay idle; --gpus-per-rank 1 would use them", file=sys.stderr)


def _cpus_per_node(args: argparse.Namespace, settings: Settings) -> int:
    nodes = args.nodes or 1
    return int(args.cpus_per_node or -(-settings.ranks // nodes) * settings.cpus)


def _gpus_per_node(options: Sequence[str]) -> int:
    """As sbatch reads `gpus-per-node=[TYPE:]N,…` and `gres=gpu[:TYPE][:N],…`."""
    gpus = 0
    for option in options:
        name, _, listed = option.removeprefix("--").partition("=")
        for wanted in listed.split(","):
            *kind, number = wanted.split(":")
            if name == "gpus-per-node":
                if not number.isdecimal():
                    raise UserError(f"--slurm {option}: how many? as in gpus-per-node=4 or gpus-per-node=a100:4")
                gpus += int(number)
            elif name == "gres" and wanted.split(":")[0] == "gpu":
                gpus += int(number) if kind and number.isdecimal() else 1
    return gpus


def submit(args: argparse.Namespace, folder: Path, settings: Settings) -> str:
    from tune import allocation

    options = [option.removeprefix("--") for option in args.slurm]
    cpus = _cpus_per_node(args, settings)
    return allocation.submit(folder, settings.name, args.nodes or 1, cpus, options, _nodes_asked(args))


def run(args: argparse.Namespace, folder: Path, settings: Settings, space: Space, study: Any) -> int:
    from tune import cluster
    from tune.board import Board
    from tune.report import write_best, write_report

    machine = _this_machine()
    ray_here = (
        cluster.local_ray(int(machine["CPU"]), int(machine["GPU"]), args.dashboard)
        if args.address is None
        else cluster.joined_ray(args.address, args.nodes or 1)
    )
    board = Board(study, settings)
    board.say(
        f"search folder {folder}\n"
        f"every trial trains on {settings.examples:,} examples, whatever its σ, and trials are compared at equal "
        f"numbers of examples; {_judged(settings)}"
    )
    started = time.monotonic()
    code = 0
    with board:
        try:
            with ray_here, _terminated():  # in this order: Ray sets a handler of its own
                from tune.conductor import Conductor  # imports Ray, which reads its variables then

                slots = cluster.check_room(cluster.nodes(), settings.ranks, settings.cpus, settings.gpus)
                Conductor(folder, settings, space, study, board).conduct(slots)
        except KeyboardInterrupt:
            code = STOPPED
        except UserError as error:
            raise UserError(f"{error}; then continue with: {again(args, folder)}") from None
        finally:
            study.note_search(seconds=study.notes.get("seconds", 0.0) + time.monotonic() - started)
    best = write_best(folder, settings, study)
    write_report(folder, settings, space, study)
    if best is not None:
        board.say(
            f"best: trial {best.number}, {study.first_metric} {best.scores[study.first_metric]:.4f}: {folder}/best.yaml"
        )
    elif code != STOPPED:
        print("error: no trial saw all its examples; report.md says what became of each", file=sys.stderr)
    board.say(f"report: {folder}/report.md\ncurves: tensorboard --logdir {folder}/trials")
    if code == STOPPED:
        board.say(f"stopped; continue with: {again(args, folder)}")
    if board.unread:
        return UNREAD
    return code or int(best is None)


def again(args: argparse.Namespace, folder: Path) -> str:
    """The command that continues a search."""
    where = ["--cluster", "slurm", *_nodes_asked(args)] if args.address or args.cluster else []
    return shlex.join(["python", "-m", "tune", "--resume", str(folder), *where])


def _nodes_asked(args: argparse.Namespace) -> list[str]:
    """The words that asked for the nodes, for whoever asks for the same."""
    words = ["--nodes", str(args.nodes or 1)]
    if args.cpus_per_node:
        words += ["--cpus-per-node", str(args.cpus_per_node)]
    options = [option.removeprefix("--") for option in args.slurm]  # typed as --slurm=--exclusive
    return words + (["--slurm", *options] if options else [])


def _judged(settings: Settings) -> str:
    if len(settings.metrics) > 1:
        return f"a Pareto front over {', '.join(settings.metrics)}, no trial is stopped early"
    rule = {
        "asha": f"ASHA lets one in {settings.reduction} go on at each rung",
        "pbt": "population-based: after each evaluation the worst quarter goes on from the best quarter's weights",
        "none": "no trial is stopped early",
    }
    return f"judged by {settings.metrics[0]}; {rule[settings.scheduler]}"


# ----------------------------------------------------------------------------------------- before it starts


def new_settings(args: argparse.Namespace, config: Config, space: Space) -> Settings:
    """Raises `UserError` for what does not fit together."""
    metrics = args.metrics or ["composite"]
    valid = ["composite", *_scored(config)]
    for metric in metrics:
        if metric not in valid:
            raise UserError(f"--metric {metric}: no trial reports it; valid: {', '.join(valid)}")
    if len(set(metrics)) < len(metrics):
        raise UserError(f"--metric {' '.join(metrics)}: one is named twice")
    trials: int = args.trials or 16
    scheduler: Scheduler = args.scheduler or "asha"
    if space.stages:
        trials = space.staged_trials()
        if args.trials not in (None, trials):
            raise UserError(f"--trials {args.trials}: the stages of the space have {trials} trials; leave it out")
    if len(metrics) > 1 and args.scheduler not in (None, "none"):
        raise UserError(f"--scheduler {scheduler}: needs one metric to judge by, not {len(metrics)}")
    if scheduler == "pbt" and (space.stages or trials < 4):
        why = "a space without stages" if space.stages else f"a population of at least 4, not --trials {trials}"
        raise UserError(f"--scheduler pbt: needs {why}")
    ranks, gpus = args.ranks_per_trial or 1, args.gpus_per_rank or 0.0
    if gpus > 1:
        raise UserError(f"--gpus-per-rank {gpus:g}: a rank computes on one GPU; --ranks-per-trial takes more of them")
    if gpus % 1 and ranks > 1:
        raise UserError(
            f"--gpus-per-rank {gpus:g}: only one rank per trial can do with part of a GPU; NCCL wants whole ones"
        )
    if args.reduction == 1:
        raise UserError("--reduction 1: nobody would be stopped; give 2 or more, or --scheduler none")
    source = str(args.config or DEFAULT_CONFIG)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Settings(
        source=source,
        trials=trials,
        examples=args.examples or 0,
        evaluations=args.evaluations or 8,
        metrics=metrics,
        scheduler="none" if len(metrics) > 1 else scheduler,
        reduction=args.reduction or 3,
        sampler=args.sampler or "tpe",
        seed=args.seed or 0,
        ranks=ranks,
        cpus=args.cpus_per_rank or 1,
        gpus=gpus,
        concurrent=args.concurrent,
        # found again from any folder
        storage=re.sub(
            r"^sqlite[^:]*:///(?!/|:|file:|$)", lambda start: f"{start[0]}{Path.cwd()}/", args.storage or ""
        ),
        name=args.name or config.run.name or f"{stamp}-search-{Path(source).stem}",
    )


def resumed_settings(args: argparse.Namespace) -> Settings:
    """Those of the search folder; only the number of trials and where they run may change."""
    if not (args.resume / "search.yaml").is_file():
        raise UserError(f"--resume {args.resume}: no search folder, search.yaml is missing there")
    free = {"resume", "trials", "concurrent", "address", "dashboard", "cluster", "nodes", "cpus_per_node", "slurm"}
    if given := [name for name, value in vars(args).items() if name not in free and value not in (None, [])]:
        option = {"overrides": "set", "metrics": "metric"}.get(given[0], given[0].replace("_", "-"))
        raise UserError(f"--resume: a search goes on as it began; leave out --{option}")
    settings = read_settings(args.resume)
    if args.trials is not None and args.trials < settings.trials:
        raise UserError(f"--trials {args.trials}: the search has {settings.trials} already; ask for more")
    return replace(settings, trials=args.trials or settings.trials, concurrent=args.concurrent or settings.concurrent)


_SETTINGS = TypeAdapter(Settings)


def read_settings(folder: Path) -> Settings:
    """Raises `UserError` for a file that no search wrote."""
    path = folder / "search.yaml"
    try:
        return _SETTINGS.validate_python(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {' '.join(where.split())}: {first['msg']}; not what a search wrote") from None


def make_folder(space: dict[str, Any], settings: Settings, config: Config, command: list[str]) -> Path:
    """`space`: as YAML, whatever files it was laid together from."""
    folder = create_run(config, settings.source, command).absolute()
    try:
        (folder / "config.yaml").rename(folder / "base.yaml")
        (folder / "space.yaml").write_text(dump_yaml(space), encoding="utf-8")
        snapshot_code(folder)
        (folder / "trials").mkdir()
    except BaseException:  # Ctrl-C as well: a half-made folder would keep the name
        shutil.rmtree(folder)
        raise
    return folder


def write_settings(folder: Path, settings: Settings) -> None:
    lines = [f"{key}: {inline_yaml(value)}\n" for key, value in asdict(settings).items()]
    with written_aside(folder / "search.yaml") as new, new.open("w", encoding="utf-8") as file:
        if redacted(settings.storage) != settings.storage:
            new.chmod(0o600)  # before the password is in it
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def open_study(folder: Path, settings: Settings, space: Space, config: Config, resume: bool) -> Any:
    from tune.study import Study

    base = to_yaml(config.model_copy(update={"run": config.run.model_copy(update={"dir": "", "name": None})}))
    identity = {
        "space": space.describe(),
        "configuration": base,
        "length": f"{settings.examples} examples, {settings.evaluations} evaluations",
        "metric": ", ".join(settings.metrics),
    }
    return Study(
        space,
        settings.storage or f"sqlite:///{folder}/study.db",
        settings.name,
        identity,
        settings.metrics,
        settings.sampler,
        settings.seed,
        settings.trials,
        resume,
    )


def _this_machine() -> dict[str, float]:
    from launch.local import gpus_here

    return {"CPU": usable_cores(), "GPU": gpus_here()}


@contextmanager
def _only_search(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is searching here; wait for it, or end it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _terminated() -> Iterator[None]:
    """TERM and a hang-up stop the search as Ctrl-C does, unless they are ignored (`nohup`)."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with stop_requests(stop, signal.SIGTERM, signal.SIGHUP):
        yield


def _count(text: str) -> int:
    return _whole(text, 1, 2**31 - 1)


def _seed(text: str) -> int:
    return _whole(text, 0, 2**63 - 1)


def _whole(text: str, low: int, high: int) -> int:
    """As far as `search.yaml` takes it."""
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return share


if __name__ == "__main__":
    sys.exit(main())
