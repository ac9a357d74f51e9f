"""Memory of a sweep: four trials at a time beside one at a time, on a catalogue of any size.

Run: python tests/benchmarks/memory.py CATALOGUE

Each sweep is a process of its own with its own Ray cluster. Its memory is the sum of what its processes hold, what
they share counted once (PSS, which Linux alone tells), at its highest. The target: four trials take less than 1.3 times
what one takes, and three models more.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from clipfh.data import catalogue as catalogues

TRIALS = 4
SWEEP = """
name: memory
stage: image
base: {{model.name: clipfh-small, batch.items: 16, batch.views: 4}}
search:
  optimizer.lr: {{loguniform: [1.0e-4, 1.0e-2]}}
trials: {trials}
budget: {{images: 2048, report_every: 1024}}
placement: {{concurrent: {trials}, cpus_per_worker: 1}}
"""


def search(catalogue: str, at_once: int, folder: Path) -> None:
    """As many trials as go at once, and no test split."""
    from clipfh.cluster import connect
    from clipfh.config import sweep_file
    from clipfh.config.experiment import Placement

    pass
    from clipfh.sweep import sweep

    (folder / "sweep.yaml").write_text(SWEEP.format(trials=at_once))
    connect.connect("local", Placement(workers=TRIALS // 2))  # for as many at once, whatever the machine

    def tell(line: str) -> None:
        print(line, flush=True)
        if line.startswith("winner"):
            connect.disconnect()
            sys.exit()

    sweep.run(sweep_file.load(folder / "sweep.yaml"), catalogues.open_catalogue(catalogue), folder / "sweep", log=tell)


def peak(catalogue: str, at_once: int) -> tuple[float, list[tuple[float, str]]]:
    """The highest memory of such a sweep in MiB, and what its processes held then."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, catalogue, str(at_once), folder]
        running = subprocess.Popen(command, stdout=sys.stderr)
        highest: list[tuple[float, str]] = []
        while running.poll() is None:
            now = list(held(psutil.Process(running.pid)))
            highest = max(highest, now, key=lambda held: sum(mib for mib, _ in held))
            time.sleep(2)
        if running.returncode:
            sys.exit(running.returncode)
    return sum(mib for mib, _ in highest), sorted(highest, reverse=True)


def held(root: psutil.Process) -> list[tuple[float, str]]:
    """MiB and name of a process and all its descendants."""
    found = []
    for process in [root, *root.children(recursive=True)]:
        try:
            found.append((process.memory_full_info().pss / 2**20, " ".join(process.cmdline())[:60].strip()))
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return found


def model_mib() -> float:
    """Of a trial's model: weights, their average, gradients and the optimiser's two moments."""
    from clipfh.config import presets
    from clipfh.config.experiment import SMALL_MODEL
    from clipfh.model.clip import load_initial_model

    weights = load_initial_model(presets.resolve("image", "scratch", {"model.name": SMALL_MODEL}).model, 0)
    return 5 * sum(tensor.numel() * tensor.element_size() for tensor in weights.state_dict().values()) / 2**20


def main() -> None:
    catalogue = sys.argv[1]
    found = {at_once: peak(catalogue, at_once) for at_once in (1, TRIALS)}
    for at_once, (total, processes) in found.items():
        print(f"{at_once} at once: {total:.0f} MiB")
        for mib, name in processes[:16]:
            print(f"  {mib:6.0f} {name}")
    ratio = (found[TRIALS][0] - (TRIALS - 1) * model_mib()) / found[1][0]
    print(f"four trials, their models apart, beside one: {ratio:.2f} (target 1.3)")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        search(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
