"""The public functions of the package: what the commands do, for Python."""

import subprocess
import sys

import pytest

import clipfh


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", [name for name in clipfh.__all__ if name != "UserError"])
def test_a_public_function_is_there_and_says_what_it_does(name):
    function = getattr(clipfh, name)
    assert callable(function) and function.__name__ == name and "Raises:\n        UserError:" in function.__doc__


@pytest.mark.parametrize(
    "lines",
    [
        ["import clipfh.train.in_process, clipfh.sweep.retention", "clipfh.train, clipfh.sweep"],
        ["clipfh.train, clipfh.sweep", "import clipfh.train.in_process, clipfh.sweep.retention"],
    ],
    ids=["the wing is imported first", "the function is used first"],
)
def test_train_and_sweep_are_functions_and_wings_whichever_comes_first(lines):
    code = ["import clipfh", *lines, "from clipfh.train import run; from clipfh.sweep import run as other"]
    code.append("print(clipfh.train is run.train, clipfh.sweep is other.sweep)")
    assert printed("\n".join(code)) == "True True"


def test_ray_packs_no_folder_under_uv_run():
    code = "import clipfh; from ray._private import ray_constants; print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    assert printed(code) == "False"


def test_what_is_not_public_is_missed():
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        getattr(clipfh, "tune")  # noqa: B009


def test_importing_the_package_loads_none_of_its_wings():
    code = "import sys, clipfh; print([name for name in sys.modules if name.startswith('clipfh.') or name == 'torch'])"
    assert printed(code) == "[]"
