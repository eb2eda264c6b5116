"""Who may import whom, and nobody may draw from a global generator: read from the sources with `ast`."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = [
    ["errors", "stops", "environment"],
    ["yaml_files", "files"],
    ["config"],
    ["config_files", "word_gradients", "zero"],
    ["runs", "ranks", "randomness", "baselines", "reference", "manifest", "methods"],
    ["record", "lock"],
    ["packing", "encoder", "schedule", "surgery", "metrics", "figures", "tracking", "synthetic", "readers", "pages"],
    ["heads", "losses", "ranking", "pretrained", "flops", "phases", "weighting"],
    ["tasks", "data", "token_cache"],
    ["engine", "evaluate", "checkpoint", "trained"],
    ["building", "window"],
    ["trainer", "export", "predict", "serve", "datasets", "compare", "report"],
    ["cli"],
]
"""Modules of mtbert from the ground up. One may import those below it, and its own floor where that makes no circle."""

FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}

ROOMS: dict[str, str | tuple[str, ...]] = {
    "deepspeed": "mtbert/zero.py",
    "submitit": "launch/",
    "ray": "tune/",
    "optuna": "tune/",
    "matplotlib": ("mtbert/figures.py", "tune/report.py"),
    "jinja2": "mtbert/pages.py",
    "tensorboard": "mtbert/tracking.py",
    "fastapi": "mtbert/serve.py",
    "uvicorn": "mtbert/serve.py",
    "onnxscript": "mtbert/export.py",
    "torch.utils.tensorboard": "mtbert/tracking.py",
}
"""Third parties that only one file or package knows."""

KNOW_NO_RANKS = ["packing", "encoder", "schedule", "phases", "methods", "surgery", "weighting", "metrics", "heads"]
"""Pure functions of their arguments, on one rank or many: no torch.distributed."""

GLOBAL_DRAWS_ALLOWED: dict[tuple[str, str], str] = {}
"""(file, call) → the reason why this one draw from, or seeding of, a global generator is right."""

OWN_GENERATORS = {"Generator", "PCG64", "Philox", "SeedSequence", "default_rng", "BitGenerator", "Random"}
SEEDING = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"}
DROPOUT = {"F.dropout", "nn.Dropout", "nn.functional.dropout", "torch.nn.Dropout", "torch.nn.functional.dropout"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like"}
DRAWS_IN_PLACE = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "trunc_normal_",
    "xavier_uniform_",
    "kaiming_uniform_",
}
"""torch functions, and methods of a tensor, that draw from the global generator unless given `generator=`."""


def sources() -> list[Path]:
    return sorted(path for package in ("mtbert", "launch", "tune") for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names a module imports, wherever in it; `from a import b` counts as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write the whole name"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def dotted(node: ast.expr) -> str:
    """`np.random.rand` for that expression; "" when it is no chain of names."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def global_draws(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that reads or seeds a generator shared by the whole process."""
    modules = set(imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in OWN_GENERATORS]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Attribute):
            *base, last = dotted(node).split(".")
            if last not in OWN_GENERATORS and (
                base in (["np", "random"], ["numpy", "random"]) or (base == ["random"] and "random" in modules)
            ):
                yield node.lineno, dotted(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, last = dotted(node.func), node.func.attr
            addressed = any(keyword.arg == "generator" for keyword in node.keywords)
            draws = last in DRAWS_IN_PLACE or (name == f"torch.{last}" and last in DRAWS)
            if name in SEEDING | DROPOUT or (draws and not addressed):
                yield node.lineno, name or last


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sorted((ROOT / "mtbert").glob("*.py")), ids=where)
def test_imports_point_downwards(path: Path) -> None:
    module = path.stem
    if module in ("__init__", "__main__"):
        return
    assert module in FLOOR, f"{module} is new: give it a floor in FLOORS (and in the architecture page)"
    for target in {target.split(".")[1] for target in imported(parse(path)) if target.startswith("mtbert.")}:
        if target in FLOOR:
            assert FLOOR[target] <= FLOOR[module], f"{module} imports {target}, which stands above it"


def test_no_circles() -> None:
    graph = {path.stem: set(imported(parse(path))) for path in (ROOT / "mtbert").glob("*.py")}
    below = {module: {other for other in graph if f"mtbert.{other}" in names} for module, names in graph.items()}
    while free := [module for module, others in below.items() if not others]:
        below = {module: others.difference(free) for module, others in below.items() if module not in free}
    assert not below, f"modules that import each other, or need ones that do: {below}"


@pytest.mark.parametrize("path", sources(), ids=where)
def test_third_parties_stay_in_their_room(path: Path) -> None:
    for target in imported(parse(path)):
        for package, room in ROOMS.items():
            assert not belongs(target, package) or where(path).startswith(room), f"{target} belongs in {room}"


@pytest.mark.parametrize("path", sorted((ROOT / "mtbert").glob("*.py")), ids=where)
def test_library_knows_neither_launcher_nor_tuner(path: Path) -> None:
    for target in imported(parse(path)):
        assert not belongs(target, "launch"), target
        assert not belongs(target, "tune"), target


@pytest.mark.parametrize("module", KNOW_NO_RANKS)
def test_pure_modules_know_no_ranks(module: str) -> None:
    path = ROOT / "mtbert" / f"{module}.py"
    tree = parse(path)
    assert not [target for target in imported(tree) if belongs(target, "torch.distributed")]
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed"
    ]


@pytest.mark.parametrize("path", sources(), ids=where)
def test_randomness_is_addressed(path: Path) -> None:
    draws = [
        f"{where(path)}:{line}: {call}"
        for line, call in global_draws(parse(path))
        if (where(path), call) not in GLOBAL_DRAWS_ALLOWED
    ]
    assert not draws, "global generator; draw from one made from (seed, step, rank, purpose)"


def test_every_exception_is_still_needed() -> None:
    found = {(where(path), call) for path in sources() for _, call in global_draws(parse(path))}
    assert set(GLOBAL_DRAWS_ALLOWED) <= found


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("np.random.rand(3)", True),
        ("numpy.random.seed(0)", True),
        ("from numpy.random import shuffle", True),
        ("from random import choice", True),
        ("import random; random.shuffle(xs)", True),
        ("def f(random): random.shuffle(xs)", False),
        ("weight.normal_(0, 0.02)", True),
        ("weight.normal_(0, 0.02, generator=own)", False),
        ("F.dropout(x, 0.1)", True),
        ("torch.manual_seed(0)", True),
        ("torch.randn(3)", True),
        ("torch.randn(3, generator=own)", False),
        ("np.random.Generator(np.random.PCG64(7))", False),
        ("own.random.seed", False),
        ("generator.manual_seed(7)", False),
    ],
)
def test_the_reader_of_global_draws(line: str, seen: bool) -> None:
    assert bool(list(global_draws(ast.parse(line)))) == seen


def test_the_first_step_waits_for_no_import_it_can_do_without() -> None:
    """Each of these takes up to a second, on every rank; they are imported when they are first used."""
    heavy = ["sklearn", "scipy", "matplotlib", "tensorboard", "torch._dynamo", "torch.nn.attention.varlen"]
    code = f"import sys, mtbert.trainer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_wheel_holds_the_packages_and_no_tests(tmp_path: Path) -> None:
    """Built from a copy, so that no build folder is left behind and none that lies about gets in."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", tmp_path, copy], check=True, env={**os.environ, "PIP_FIND_LINKS": ""})
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {entry.split("/")[0] for entry in names if entry.endswith(".py")}
    assert packages == {"mtbert", "launch", "tune"}
    assert {f"mtbert/templates/{page.name}" for page in (ROOT / "mtbert" / "templates").iterdir()} <= set(names)
    assert not [entry for entry in names if "test" in entry]


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their last name: of two, the second is not collected where the same process meets both."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
