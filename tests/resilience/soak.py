"""Ten sweeps in a row of six small trials with early stopping, two at a time, half with Ray's dashboard.

Run: python tests/resilience/soak.py [SWEEPS] [TRIALS]. Prints a line a sweep; exits with 1 if one hangs or leaves
anything behind.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clipfh.cluster import connect
from clipfh.config import sweep_file
from clipfh.data import catalogue
from clipfh.data.prepare import prepare
from clipfh.demo.source import write_source
from clipfh.sweep import sweep

SWEEP = """
name: soak
stage: image
base: {{model.name: clipfh-small, batch.items: 8, budget.images: 384}}
search:
  optimizer.lr: {{loguniform: [1.0e-4, 1.0e-2]}}
  batch.views: {{choice: [2, 4]}}
trials: {trials}
budget: {{first_rung: 64, reduction: 2}}
placement: {{concurrent: 2}}
"""
LIMIT = 1800
"""Seconds after which a sweep is taken to hang."""
RAYS = {"_StatsActor", "_AutoscalingCoordinatorActor", "_DatasetStateActor"}
"""Actors that Ray Data keeps, one of each for a cluster."""


def one(folder: Path, number: int, trials: int, dashboard: bool) -> None:
    """Run a sweep, then wait for the cluster to be as free as before."""
    import ray

    (folder / "soak.yaml").write_text(SWEEP.format(trials=trials))
    connect.connect("local", dashboard=dashboard)
    total = ray.cluster_resources()["CPU"]
    started = time.monotonic()
    opened = catalogue.open_catalogue(folder / "catalogue")
    loaded = sweep_file.load(folder / "soak.yaml", {"seed": number})
    summary = sweep.run(loaded, opened, folder / f"sweep-{number}", log=lambda line: None)
    ended = time.monotonic()
    while held(total) and time.monotonic() - ended < 30:
        time.sleep(0.1)
    rows = (folder / f"sweep-{number}" / "leaderboard.csv").read_text().splitlines()[1:]
    statuses = sorted(row.split(",")[2] for row in rows)
    count = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    print(
        f"sweep {number}, dashboard {'on ' if dashboard else 'off'}: {ended - started:4.0f} s, {count}; "
        f"winner {summary['best_trial']}; all free after {time.monotonic() - ended:.1f} s {held(total) or ''}",
        flush=True,
    )
    left = held(total)
    ray.shutdown()
    sys.exit(1 if left or summary["failed"] or summary["trials"] != trials else 0)


def held(total: float) -> str:
    """What is not free: CPUs, placement groups, actors."""
    import ray
    from ray.util.placement_group import placement_group_table

    cpus = total - ray.available_resources().get("CPU", 0.0)
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    actors = [a["ActorClassName"] for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
    others = sorted(set(actors) - RAYS)
    return f"{cpus:g} CPUs, {len(groups)} groups, actors {others}" if cpus or groups or others else ""


def main(count: int, trials: int) -> int:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_source(folder / "photos", items=40, seed=1, size=64)
        prepare(str(folder / "photos"), folder / "catalogue", image_size=64)
        failures = 0
        for number in range(count):
            again = [sys.executable, __file__, "--one", made, str(number), str(trials)]
            try:
                failures += subprocess.run(again, timeout=LIMIT).returncode != 0
            except subprocess.TimeoutExpired:
                print(f"sweep {number} hangs", flush=True)
                failures += 1
        print(f"{count - failures} of {count} sweeps ended well", flush=True)
        return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), dashboard=int(sys.argv[3]) % 2 == 1)
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*given, *(10, 6)[len(given) :]))
