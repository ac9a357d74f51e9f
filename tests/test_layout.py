"""The wings of the package: which may import which, where Ray may be imported, and what loads neither torch nor Ray.

All of it by syntax tree, in whatever way a thing is imported.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import clipfh
from clipfh.storage import layout

LEVELS = [{"storage", "config"}, {"sources"}, {"data", "cluster"}, {"model", "report"}]
LEVELS += [{wing} for wing in ("retrieval", "learn", "train", "sweep", "demo", "cli")]
LEVEL = {wing: level for level, wings in enumerate(LEVELS) for wing in wings}
WITHOUT_RAY = {"retrieval.metrics", "retrieval.rerank"}
WINGS_WITHOUT_RAY = {"storage", "config", "sources", "data", "learn"}
PACKAGE = Path(clipfh.__file__).parent
TREES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): ast.parse(file.read_text())
    for file in PACKAGE.rglob("*.py")
    if file.parent != PACKAGE and file.name != "__init__.py"
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in a module: `a.b` of `from a import b` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(module: str) -> set[str]:
    """Modules of ours that a module imports, as "wing.module"."""
    names = (name.removeprefix("clipfh.").split(".") for name in imported(TREES[module]) if name.startswith("clipfh."))
    return {".".join(name[:2]) for name in names if name[0] in LEVEL}


def test_the_package_is_its_wings():
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {module.split(".")[0] for module in TREES} == set(LEVEL)
    assert [file for file in PACKAGE.glob("*/__init__.py") if file.read_text()] == []


def test_a_wing_imports_only_from_wings_above_it():
    def level(module: str) -> int:
        return LEVEL[module.split(".")[0]]

    wrong = {
        (module, other)
        for module in TREES
        for other in ours(module)
        if module.split(".")[0] != other.split(".")[0] and level(other) >= level(module)
    }
    assert wrong == set()


def test_imports_make_no_circle():
    TopologicalSorter({module: ours(module) for module in TREES}).prepare()


@pytest.mark.parametrize("module", sorted(TREES))
def test_what_is_pure_knows_nothing_of_ray(module):
    if module in WITHOUT_RAY or module.split(".")[0] in WINGS_WITHOUT_RAY:
        assert [name for name in imported(TREES[module]) if name.split(".")[0] == "ray"] == []


NAMES = {value for name, value in vars(layout).items() if name.isupper()}
FILES = {name for name in NAMES if "." in name}
FOLDERS = NAMES - FILES


def literal_names(tree: ast.AST) -> Iterator[str]:
    """Strings of a module that name a file or folder of a command: as a path, not in a sentence for people."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    templates = {id(each) for call in calls if getattr(call.func, "attr", "") == "get_template" for each in call.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in templates:
            parts = node.value.split("/")
            if " " not in node.value and (parts[-1] in FILES or (len(parts) > 1 and FOLDERS & {*parts})):
                yield node.value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            operands = [side.value for side in (node.left, node.right) if isinstance(side, ast.Constant)]
            yield from (value for value in operands if value in FOLDERS)


@pytest.mark.parametrize("module", sorted(TREES.keys() - {"storage.layout"}))
def test_file_names_of_commands_stand_in_the_layout_alone(module):
    assert sorted(literal_names(TREES[module])) == []


BY_THE_STORE = {"storage.run_folder", "train.inputs", "train.in_process", "train.track", "retrieval.evaluate"}
BY_THE_STORE |= {"report.artifacts", "report.status", "report.examples", "report.model_charts", "report.sweep_charts"}
BY_THE_STORE |= {
    "report.page",
    "retrieval.embedding_file",
    "retrieval.review",
    "train.driver",
    "train.run",
    "train.export",
}
BY_THE_STORE |= {f"sweep.{name}" for name in ("finalists", "leaderboard", "race", "retention", "run", "sweep", "trial")}
PATH_METHODS = {"write_text", "write_bytes", "is_file", "is_dir", "iterdir", "glob", "rglob", "mkdir", "unlink", "stat"}
PATH_METHODS |= {"rename", "rmdir", "touch", "symlink_to"}


@pytest.mark.parametrize("module", sorted(BY_THE_STORE))
def test_what_reads_and_writes_below_out_does_so_by_the_store(module):
    """Modules to which a bucket may be given, and which have no other way: a list to grow."""
    called = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    assert [func.id for func in called if isinstance(func, ast.Name) and func.id == "open"] == []
    assert [func.attr for func in called if isinstance(func, ast.Attribute) and func.attr in PATH_METHODS] == []
    assert {"os", "shutil", "tempfile"} & {*imported(TREES[module])} <= {"os"}  # its environment


def private(module: str) -> Iterator[str]:
    """What a module takes of Ray beyond its public API: modules, names and attributes that say so themselves."""
    tree, words = TREES[module], ("_internal", "core.generated", "internal_kv", "train.v2")
    for name in imported(tree):
        if name.startswith("ray.") and (any(w in name for w in words) or any(p[0] == "_" for p in name.split("."))):
            yield name
    rays = {name.asname or name.name.split(".")[0] for name in names_from_ray(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and root(node) in rays:
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "__internal" in node.value:
            yield node.value
        elif rays and isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            yield from (word for word in (ast.unparse(node.args[1]),) if word.startswith("'_"))


def names_from_ray(tree: ast.AST) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name for name in node.names if name.name.split(".")[0] == "ray")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            yield from node.names


def root(node: ast.expr) -> str:
    """The name that a chain of attributes, calls and subscripts begins with."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("module", sorted(TREES))
def test_what_is_private_to_ray_is_in_one_module(module):
    assert set(private(module)) == set() or module == "cluster.ray_private"


def test_no_class_overrides_what_is_private_to_ray():
    def of_ray(module: str) -> Iterator[type]:
        rays = {name.asname or name.name.split(".")[0] for name in names_from_ray(TREES[module])}
        for node in TREES[module].body:
            if isinstance(node, ast.ClassDef) and any(root(base) in rays for base in node.bases):
                yield getattr(importlib.import_module(f"clipfh.{module}"), node.name)

    classes = [each for module in TREES for each in of_ray(module)]
    assert {"Trial", "Watch", "_Steps"} <= {each.__name__ for each in classes}
    assert [(each, name) for each in classes for name in overridden(each)] == []


def overridden(cls: type) -> list[str]:
    """Private names of a class that its base has too."""
    names = [name for name in vars(cls) if name.startswith("_") and not name.endswith("__")]
    return [name for name in names if name not in ("_abc_impl",) and hasattr(cls.__base__, name)]


def test_what_is_private_to_ray_is_seen():
    seen = set(private("cluster.ray_private"))
    assert {"ray.experimental.internal_kv._internal_kv_put", "node:__internal_head__"} <= seen
    assert {"ray.train.v2._internal.execution.controller.TrainController", "ray._private"} <= seen


def test_the_command_line_loads_neither_torch_nor_ray():
    heavy = ("torch", "ray", "open_clip", "optuna", "pyarrow")
    code = f"import sys, clipfh.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert printed(code) == "[]"


def test_a_trials_process_loads_no_torch():
    """Of all trials of a sweep they are on the head; their workers have torch."""
    code = "import sys, clipfh.sweep.trial; print([m for m in ('torch', 'optuna') if m in sys.modules])"
    assert printed(code) == "[]"


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
