"""Pack what a bare machine with a GPU lacks: gpu-pack/site.tar.xz, which tests/gpu.sh unpacks there.

Run: make gpu-pack. That machine has Linux on x86-64, Python 3.12 and what PRESENT names, and needs no network.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
WANTED = ("clipfh", "pytest", "pytest-timeout")
PRESENT = ("torch", "torchvision", "pyarrow", "pandas")
"""there, with what they need"""
MACHINE = {"python_version": "3.12", "python_full_version": "3.12.0"}
PLATFORMS = ("manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{n}" for n in (17, 24, 27, 28, 34)))
"""of wheels: pip takes none whose own is not named"""
SPARED = {"cryptography", "cffi", "distlib", "hf-xet", "pycparser", "virtualenv"}
"""what is needed by metadata, and by no run there"""
DEAD = ("bin", "share", "ray/cpp", "ray/jars", "ray/rllib", "ray/llm", "ray/dashboard/client", "**/tests", "**/*.c")
"""what only takes room in packages"""


def main() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    wanted = sorted((needed(*WANTED) - needed(*PRESENT) - SPARED) & pins.keys())
    out = ROOT / "gpu-pack/site.tar.xz"
    out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        site = Path(made, "site")
        install([pins[name] for name in wanted], site)
        for dead in [path for pattern in DEAD for path in site.glob(pattern)]:
            shutil.rmtree(dead) if dead.is_dir() else dead.unlink()
        subprocess.run(["tar", "--xz", "-cf", out, "-C", made, "site"], check=True, env={"XZ_OPT": "-9 -T0"})
    print(f"{len(wanted)} packages, {out.stat().st_size / 2**20:.0f} MiB: {out}")


def needed(*wanted: str) -> set[str]:
    """Names of these packages and of all that they need there in turn, by the metadata of what is installed here."""
    found: dict[str, set[str]] = {}
    todo = [Requirement(text) for text in wanted]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        extras = {"", *one.extras} - found.get(name, set())
        if not extras:
            continue
        found[name] = found.get(name, set()) | extras
        try:
            inner = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:  # of an extra that make install leaves out
            continue
        todo += [r for r in inner if not r.marker or any(r.marker.evaluate({**MACHINE, "extra": e}) for e in extras)]
    return set(found)


def install(pins: list[str], site: Path) -> None:
    """Their wheels for that machine. pip unpacks them: a plain unzip leaves Ray's programs not executable."""
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", f"--target={site}"]
    bare = ["--no-deps", "--no-compile", "--only-binary=:all:", "--python-version=3.12"]
    subprocess.run([*pip, *bare, *platforms, *pins], check=True)


if __name__ == "__main__":
    main()
