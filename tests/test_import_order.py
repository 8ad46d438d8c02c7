"""Imports point one way: down the list of rooms."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

HOME = Path(__file__).parents[1]
ROOMS = [
    {"run"},
    {"dsjax.commands"},
    {"configs"},
    {"dsjax.rl"},
    {"dsjax.infer"},
    {"dsjax.bench"},
    {"dsjax.train"},
    {"dsjax.checkpoint"},
    {"dsjax.hf"},
    {"dsjax.parallel"},
    {"dsjax.model"},
    {"dsjax.data"},
    {"dsjax.config", "dsjax.shapes"},
    {"pallas_kernels"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
KERNELS_RUN_ON = {"jax", "numpy"}
RUN_TIME_PACKAGES = {
    "pallas_kernels": KERNELS_RUN_ON,
    "dsjax.model": KERNELS_RUN_ON | {"flax"},
}
BANNED = {"torch", "tensorflow", "pickle", "_pickle"}


class Import(NamedTuple):
    target: str
    at_run_time: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room a module lies in, `dsjax` for the bare package, None for code of others."""
    parts = module.split(".")
    for room in (".".join(parts[:2]), parts[0]):
        if room in RANK:
            return room
    return "dsjax" if parts[0] == "dsjax" else None


def imports(module: str, source: str, package: bool = False) -> list[Import]:
    """Every import of a source text, nested and literal dynamic ones included."""
    found: list[Import] = []

    def visit(node: ast.AST, at_run_time: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name.name, at_run_time) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, package)
            found.extend(Import(f"{base}.{name.name}", at_run_time) for name in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            named = node.args[0] if node.args else None
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                found.append(Import(named.value, at_run_time))
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_run_time)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, at_run_time)

    visit(ast.parse(source), True)
    return found


def absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - package
    base = module.split(".")[: -up or None]
    return ".".join([*base, *([node.module] if node.module else [])])


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).rsplit(".", 1)[-1]


def violations(module: str, source: str, package: bool = False) -> list[str]:
    """What the imports of one file break, in words; empty if nothing."""
    room, broken = room_of(module), []
    for target, at_run_time in imports(module, source, package):
        top, other = target.split(".")[0], room_of(target)
        if top in BANNED:
            broken.append(f"{module} imports {top}")
        elif top == "orbax" and room != "dsjax.checkpoint":
            broken.append(f"{module} names orbax")
        elif other is not None and not may_import(room, other):
            broken.append(f"{module} imports {target}")
        elif other is None and at_run_time and room in RUN_TIME_PACKAGES:
            allowed = RUN_TIME_PACKAGES[room] | sys.stdlib_module_names
            if top not in allowed:
                broken.append(f"{module} imports {top} at run time")
    return broken


def may_import(room: str | None, other: str) -> bool:
    if room == "configs":
        return other in ("configs", "dsjax.config")
    if room == "dsjax.bench":
        return other in ("dsjax.bench", "pallas_kernels")
    if room == "dsjax":
        return other.startswith("dsjax.")
    if other == "dsjax" or room is None:
        return False
    return RANK[room] <= RANK[other]


def project_files() -> list[Path]:
    folders = ("configs", "dsjax", "pallas_kernels")
    return [HOME / "run.py", *(path for f in folders for path in sorted((HOME / f).rglob("*.py")))]


def test_imports_point_down():
    broken = [
        line
        for path in project_files()
        for line in violations(module_name(path), path.read_text(), path.name == "__init__.py")
    ]
    assert not broken, "\n".join(broken)


def test_tests_import_nothing_banned():
    for path in sorted((HOME / "tests").rglob("*.py")):
        tops = {found.target.split(".")[0] for found in imports("tests", path.read_text())}
        assert not tops & BANNED, path


def test_every_room_is_in_the_list():
    inside = [
        path.stem
        for path in (HOME / "dsjax").iterdir()
        if (path.is_dir() and any(path.rglob("*.py"))) or path.suffix == ".py"
    ]
    assert {f"dsjax.{name}" for name in inside if name != "__init__"} <= set(RANK)


def test_top_level_holds_no_other_code():
    with_code = {
        path.stem
        for path in HOME.iterdir()
        if not path.name.startswith(".")
        and (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))))
    }
    assert with_code <= {"run", "configs", "dsjax", "pallas_kernels", "tests", "docs"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsjax.model.mla", "import dsjax.train.loop"),
        ("dsjax.model.mla", "from dsjax import train"),
        ("dsjax.model.mla", "from dsjax.infer.generate import generate"),
        ("dsjax.model.mla", "from ..train import loop"),
        ("dsjax.model.mla", "def f():\n    from dsjax.hf import load"),
        ("dsjax.model.mla", "import importlib\nimportlib.import_module('dsjax.hf.load')"),
        ("dsjax.model.mla", "if TYPE_CHECKING:\n    from dsjax.train import loop"),
        ("dsjax.config", "import dsjax.data"),
        ("dsjax.bench.gemm", "from dsjax.model import Transformer"),
        ("dsjax.train.loop", "from dsjax import generate"),
        ("dsjax.train.loop", "import dsjax"),
        ("dsjax.infer.generate", "from dsjax.commands.terminal import say"),
        ("dsjax.commands.train", "import run"),
        ("dsjax.data.stream", "import run"),
        ("dsjax.hf.load", "import configs.tiny"),
        ("configs.tiny", "from dsjax.model import Transformer"),
        ("configs.tiny", "import pallas_kernels"),
        ("configs.tiny", "from dsjax import shapes"),
        ("pallas_kernels.gemm", "from dsjax.config import Model"),
        ("pallas_kernels.gemm", "import flax"),
        ("pallas_kernels.gemm", "from jaxtyping import Array"),
        ("dsjax.model.mla", "from jaxtyping import Array"),
        ("dsjax.model.mla", "if TYPE_CHECKING:\n    pass\nelse:\n    import jaxtyping"),
        ("dsjax.model.mla", "import optax"),
        ("dsjax.train.loop", "import orbax.checkpoint"),
        ("run", "import torch.nn"),
        ("dsjax.data.stream", "from pickle import loads"),
        ("dsjax.train.plots", "import tensorflow as tf"),
    ],
)
def test_planted_import_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsjax.train.loop", "from dsjax import config"),
        ("dsjax.train.loop", "from dsjax.model import Transformer\nimport optax"),
        ("dsjax.model.mla", "from . import rope\nfrom ..config import Model"),
        ("dsjax.model.mla", "if TYPE_CHECKING:\n    from jaxtyping import Array"),
        ("dsjax.checkpoint.store", "import orbax.checkpoint as ocp"),
        ("dsjax.bench.gemm", "from pallas_kernels.fp8_gemm import fp8_gemm"),
        ("configs.tiny", "from dataclasses import replace\nfrom dsjax.config import Run"),
        ("configs.tiny_twin", "from configs.tiny import recipe"),
        ("run", "from dsjax.commands import COMMANDS"),
        ("dsjax.commands.train", "def f():\n    from dsjax.infer import generate"),
        ("dsjax", "import importlib\nfrom dsjax.train import train"),
        ("dsjax.config", "import dsjax.shapes"),
    ],
)
def test_allowed_import_passes(module, source):
    assert violations(module, source) == []


def test_relative_import_of_a_package_is_resolved():
    assert violations("dsjax.model", "from . import mla", package=True) == []
    assert violations("dsjax.model", "from ..train import loop", package=True) == [
        "dsjax.model imports dsjax.train.loop"
    ]
