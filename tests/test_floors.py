"""A module imports only from lower floors; the base loads neither torch nor ray."""

import ast
import subprocess
import sys
from pathlib import Path

import clipfh

FLOORS = [
    {"config", "metrics", "rerank", "losses", "gather", "prompts", "images", "augment", "gates", "sources"}
    | {"drawing", "files", "runs", "cores", "transfer"},
    {"catalogue", "batches", "model", "objective", "optimizer", "checkpoint", "embeddings"}
    | {"space", "cluster", "submit", "track", "tally"},
    {"decoding", "stream", "embed", "embed_ray", "evaluate", "learner", "search", "onnx", "results", "inputs"}
    | {"origins"},
    {"fit", "train", "worker", "ray_worker", "in_process", "export", "plots", "searched", "finds", "status"},
    {"report", "trial", "trials", "final", "keep", "estimate"},
    {"sweep"},
    {"cli", "demo"},
]
# Within a floor these build on one that comes first.
NEIGHBOURS = {
    "embed_ray": {"embed"},
    "evaluate": {"embed", "embed_ray"},
    "stream": {"decoding"},
    "ray_worker": {"worker"},
    "in_process": {"worker"},
    "inputs": {"decoding"},
    "rerank": {"metrics"},
    "augment": {"transfer"},
    "optimizer": {"model"},
    "trials": {"trial"},
    "final": {"trial"},
    "keep": {"final"},
    "cli": {"demo"},
}
FLOOR_OF = {module: i for i, modules in enumerate(FLOORS) for module in modules}
PACKAGE = Path(clipfh.__file__).parent


def imported(module: str) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "clipfh":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipfh."):
            names.add(node.module.removeprefix("clipfh."))
    return names & set(FLOOR_OF)


def test_every_module_has_a_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(FLOOR_OF)


def test_imports_go_down():
    upward = {
        (module, other)
        for module in FLOOR_OF
        for other in imported(module)
        if FLOOR_OF[other] >= FLOOR_OF[module] and other not in NEIGHBOURS.get(module, ())
    }
    assert upward == set()


def test_losses_metrics_prompts_and_batches_know_nothing_of_ray():
    for module in (
        "losses",
        "metrics",
        "rerank",
        "prompts",
        "batches",
        "gather",
        "config",
        "images",
        "augment",
        "learner",
    ):
        assert "ray" not in (PACKAGE / f"{module}.py").read_text().replace("array", "").split()


def test_the_command_line_loads_neither_torch_nor_ray():
    heavy = ("torch", "ray", "open_clip", "optuna", "pyarrow")
    code = f"import sys, clipfh.cli; print([m for m in {heavy} if m in sys.modules])"
    assert printed(code) == "[]"


def test_a_trials_process_loads_no_torch():
    """Of all trials of a sweep they are on the head; their workers have torch."""
    assert printed("import sys, clipfh.trial; print([m for m in ('torch', 'optuna') if m in sys.modules])") == "[]"


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
