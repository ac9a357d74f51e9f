"""The notebook: its code runs from top to bottom, without Ray, and is kept without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "sweeps/notebook.ipynb"
SOURCES = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_in_order_and_starts_no_cluster(tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in SOURCES) + "\nimport sys; print('ray' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["TMPDIR"] = str(tmp_path)
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    *_, first, _, _, error, ray_loaded = done.stdout.splitlines()
    assert first.startswith("1.000 ") and "is not empty" in error and ray_loaded == "False"


def test_the_notebook_is_kept_without_outputs():
    assert [cell["source"] for cell in SOURCES if cell["outputs"] or cell["execution_count"] is not None] == []
