"""The wings of the package: which may import which, where Ray may be imported, and what loads neither torch nor Ray.

All of it by syntax tree, in whatever way a thing is imported.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import clipfh
from clipfh.storage import layout

LEVELS = [{"storage", "config"}, {"data", "cluster"}, {"model", "report"}]
LEVELS += [{wing} for wing in ("retrieval", "learn", "train", "sweep", "demo", "cli")]
LEVEL = {wing: level for level, wings in enumerate(LEVELS) for wing in wings}
WITHOUT_RAY = {"retrieval.metrics", "retrieval.rerank", "data.sampler"}
WINGS_WITHOUT_RAY = {"storage", "config", "learn"}
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


@pytest.mark.parametrize("module", sorted(TREES.keys() - {"storage.layout", "sweep.trial"}))
def test_file_names_of_commands_stand_in_the_layout_alone(module):
    assert sorted(literal_names(TREES[module])) == []


BY_THE_STORE = {"storage.run_folder", "train.inputs", "train.in_process", "train.track", "retrieval.evaluate"}
BY_THE_STORE |= {"report.artifacts", "report.status", "report.examples", "report.model_charts", "report.sweep_charts"}
PATH_METHODS = {"write_text", "write_bytes", "is_file", "is_dir", "iterdir", "glob", "rglob", "mkdir", "unlink", "stat"}
PATH_METHODS |= {"rename", "rmdir", "touch", "symlink_to"}


@pytest.mark.parametrize("module", sorted(BY_THE_STORE))
def test_what_reads_and_writes_below_out_does_so_by_the_store(module):
    """Modules to which a bucket may be given one day: a list to grow."""
    called = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    assert [func.id for func in called if isinstance(func, ast.Name) and func.id == "open"] == []
    assert [func.attr for func in called if isinstance(func, ast.Attribute) and func.attr in PATH_METHODS] == []
    assert {"os", "shutil", "tempfile"} & {*imported(TREES[module])} <= {"os"}  # its environment


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
