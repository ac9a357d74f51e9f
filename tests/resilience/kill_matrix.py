"""What a sweep loses when something is killed: a real cluster of three nodes on this machine, one kill a sweep.

Run: python tests/resilience/kill_matrix.py [WHAT ...]. Prints a Markdown table, a line as each is known; exits with 1
where a finished trial was lost or run again, more than one checkpoint interval was lost, or something was left behind.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nodes import FIRST, HEAD, SECOND, THIRD, Nodes, leaderboard, reports, until

from clipfh.data.prepare import prepare
from clipfh.demo.source import write_source

SWEEP = """
name: killed
stage: image
base: {model.name: clipfh-small, batch.items: 8, batch.views: 2, budget.report_every: 256, augment.crop_min: 0.5}
search:
  optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
trials: 4
budget: {images: 1536}
placement: {concurrent: 2}
"""
TRIALS, INTERVAL, TOTAL = 4, 16, 96
"""Trials; steps between two checkpoints, and of a trial."""
OVER = ("done", "stopped")


@dataclass
class Sweep:
    """A sweep under way on the cluster."""

    nodes: Nodes
    out: Path
    catalogue: Path
    process: subprocess.Popen | None = None

    def start(self, *options: str) -> None:
        words = ["sweep", self.nodes.folder / "work/sweep.yaml", self.catalogue, "--out", self.out, *options]
        log = self.out.with_suffix(".log").open("a")
        command = [sys.executable, "-m", "clipfh", *map(str, words), "--address", f"127.0.0.1:{self.nodes.port}"]
        self.process = subprocess.Popen(command, env=self.nodes.env, stdout=log, stderr=log, start_new_session=True)

    def finished(self) -> set[str]:
        """Trials that are over."""
        board = leaderboard(self.out) if (self.out / "leaderboard.csv").exists() else {}
        return {trial for trial, row in board.items() if row["status"] in OVER}

    def running(self) -> dict[str, int]:
        """Trials that have a checkpoint and more than a step to go, and the step of their last report."""
        over = {trial for trial, lines in reports(self.out).items() if lines and lines[-1]["step"] >= TOTAL}
        return {t: lines[-1]["step"] for t, lines in reports(self.out).items() if lines and t not in over}

    def in_the_middle(self) -> dict[str, int]:
        """Wait for one trial at least to be over and two others to have a checkpoint."""
        assert self.process
        middle = until(lambda: (len(self.running()) == 2 and self.finished()) or self.process.poll() is not None)
        assert isinstance(middle, set), f"the sweep is over: {self.out.with_suffix('.log')}"
        return self.running()

    def wait(self) -> int:
        assert self.process
        return self.process.wait(timeout=900)


def kill_processes(title: str) -> None:
    """One process of Ray's by its title."""
    found = subprocess.run(["pgrep", "-f", f"^ray::{title}"], capture_output=True, text=True).stdout.split()
    assert found, f"no process {title}"
    os.kill(int(found[0]), signal.SIGKILL)


def worker(sweep: Sweep) -> None:
    kill_processes("RayTrainWorker")


def trial_driver(sweep: Sweep) -> None:
    """The trial's part of Tune and its Train controller are one process."""
    kill_processes("(ResourceTrainable|Trial)")


def sweep_driver(sweep: Sweep) -> None:
    os.killpg(sweep.process.pid, signal.SIGKILL)
    sweep.process.wait()
    sweep.start("--resume")


def ctrl_c(sweep: Sweep) -> None:
    sweep.process.send_signal(signal.SIGINT)
    assert sweep.process.wait(timeout=120) == 130
    sweep.start("--resume")


def worker_node(sweep: Sweep) -> None:
    sweep.nodes.kill(FIRST)
    sweep.nodes.start_worker(THIRD)


def notice(sweep: Sweep) -> None:
    """A spot machine's: half a minute, then it is gone."""
    listed = subprocess.run(
        [sys.executable, "-c", NODE_IDS, f"127.0.0.1:{sweep.nodes.port}"],
        env=sweep.nodes.env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    node = json.loads(listed.stdout.splitlines()[-1])[FIRST]
    drain = ["ray", "drain-node", f"--address=127.0.0.1:{sweep.nodes.port}", f"--node-id={node}"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=30"]
    subprocess.run(drain, env=sweep.nodes.env, check=True, capture_output=True)
    sweep.nodes.start_worker(THIRD)
    time.sleep(30)  # the notice's own time
    sweep.nodes.kill(FIRST)


NODE_IDS = """
import json, sys, ray
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps({n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}))
"""


def head(sweep: Sweep) -> None:
    """With it go its workers' nodes, and the driver's connection."""
    sweep.nodes.kill_all()
    sweep.process.wait(timeout=300)
    sweep.nodes.start_all()
    sweep.start("--resume")


def storage_away(sweep: Sweep) -> None:
    """A minute without the folder of the sweep, as when a share is not mounted."""
    away = sweep.out.with_suffix(".away")
    sweep.out.rename(away)
    time.sleep(60)
    if sweep.out.exists():  # what was written meanwhile is not the sweep's
        shutil.rmtree(sweep.out)
    away.rename(sweep.out)
    if sweep.process.poll() is not None:
        sweep.start("--resume")


def disk_full(sweep: Sweep) -> None:
    """Fill up the file system until the sweep ends or ten seconds have gone, then free it."""
    filler = sweep.out.parent / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"0" * 2**20)
        except OSError:
            pass
    until(lambda: sweep.process.poll() is not None or "No space left" in log_of(sweep), 120)
    filler.unlink()
    if sweep.process.poll() is not None:
        sweep.start("--resume")


def log_of(sweep: Sweep) -> str:
    return sweep.out.with_suffix(".log").read_text()


KILLS: dict[str, Callable[[Sweep], None]] = {
    "a training worker": worker,
    "a trial's driver": trial_driver,
    "the sweep's driver": sweep_driver,
    "Ctrl-C": ctrl_c,
    "a worker node": worker_node,
    "a node after a notice of 30 s": notice,
    "the head and all nodes": head,
    "storage away for 60 s": storage_away,
    "a full disk": disk_full,
}


def one(name: str, nodes: Nodes, made: Path, out: Path) -> tuple[str, bool]:
    """A line of the table, and whether all is as it should be."""
    sweep = Sweep(nodes, out, made)
    sweep.start()
    before_kill = sweep.in_the_middle()
    over, lines = sweep.finished(), {t: (out / "trials" / t / "metrics.jsonl").read_text() for t in sweep.finished()}
    begun = time.monotonic()
    KILLS[name](sweep)
    seconds, lost = recovery(sweep, before_kill, begun)
    code = sweep.wait()
    board = leaderboard(out) if (out / "leaderboard.csv").exists() else {}
    ended = {trial for trial, row in board.items() if row["status"] in OVER}
    again = [t for t in over if (out / "trials" / t / "metrics.jsonl").read_text() != lines[t]]
    left = held(nodes)
    good = code == 0 and len(ended) == TRIALS and not again and lost <= INTERVAL and not left
    cells = (
        name,
        len(over),
        len(ended),
        len(again),
        lost,
        f"{seconds:.0f}",
        left or "nothing",
        "yes" if good else "NO",
    )
    return f"| {' | '.join(map(str, cells))} |", good


def recovery(sweep: Sweep, before: dict[str, int], begun: float) -> tuple[float, int]:
    """Seconds until each of the trials that ran is further than before, and the most steps that one did again.

    A run's stream.jsonl is cut back to the checkpoint it goes on from; what it had beyond its last report is not seen
    from outside, and is less than an interval.
    """
    lost = 0

    def further() -> bool:
        nonlocal lost
        now = {t: lines[-1]["step"] for t, lines in reports(sweep.out).items() if lines}
        for trial, step in before.items():
            lost = max(lost, step - now.get(trial, step))
        return all(now.get(trial, 0) > step for trial, step in before.items())

    until(lambda: further() or sweep.process.poll() is not None, 900)
    return time.monotonic() - begun, lost


def held(nodes: Nodes) -> str:
    """What the cluster's nodes have not got back within ten seconds."""
    ran = subprocess.run(
        [sys.executable, "-c", HELD, f"127.0.0.1:{nodes.port}"], env=nodes.env, capture_output=True, text=True
    )
    return ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr[-200:]


HELD = """
import sys, time, ray
from ray.util.placement_group import placement_group_table
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
end = time.monotonic() + 10
while True:
    cpus = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
    groups = sum(g["state"] not in ("REMOVED",) for g in placement_group_table().values())
    actors = sorted({a["ActorClassName"] for a in ray._private.state.actors().values() if a["State"] != "DEAD"} -
                    {"_StatsActor", "_AutoscalingCoordinatorActor", "_DatasetStateActor", "JobSupervisor"})
    left = ", ".join([f"{cpus:g} CPUs"] * bool(cpus) + [f"{groups} groups"] * bool(groups) + actors)
    if not left or time.monotonic() > end:
        print(left)
        break
    time.sleep(.2)
"""


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own, where we may mount one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main(names: list[str]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))
    (folder / "work").mkdir()
    (folder / "work/sweep.yaml").write_text(SWEEP)
    write_source(folder / "photos", items=40, seed=1, size=64)
    made = prepare(str(folder / "photos"), folder / "catalogue", image_size=64)
    nodes, good = Nodes(folder), True
    print("| killed | over before | over at the end | of these run again | steps lost | seconds | left behind | good |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    try:
        nodes.start_all()
        for number, name in enumerate(names):
            out = folder / f"sweep-{number}"
            if name == "a full disk":
                with small_disk(folder / "small", 400) as small:
                    line, fine = one(name, nodes, made.path, small / "sweep")
            else:
                line, fine = one(name, nodes, made.path, out)
            print(line, flush=True)
            good &= fine
            if nodes.started.keys() != {HEAD, FIRST, SECOND}:  # a new cluster, which knows of no lost node
                nodes.kill_all()
                nodes.start_all()
    finally:
        nodes.kill_all()
    if good:
        shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    chosen = [name for name in KILLS if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    sys.exit(main(chosen))
