"""What a sweep loses when something is killed: a real cluster of three nodes on this machine, one kill a sweep.

Run: python tests/resilience/kill_matrix.py [--bucket] [WHAT ...]. With --bucket the nodes share
nothing else: each has its own /tmp, with its home and working folder. Prints a Markdown table, a line as each is known;
exits with 1 where a finished trial was lost or run again, more than one checkpoint interval was lost, a checkpoint is
not whole, or something was left behind.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from nodes import FIRST, HEAD, SECOND, THIRD, Nodes, leaderboard, reports, until

from clipfh.data.prepare import prepare
from clipfh.demo.source import write_source
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder

sys.path.append(str(Path(__file__).parents[1]))
import object_store

SWEEP = """
name: killed
stage: image
base: {model.name: clipfh-small, batch.items: 8, batch.views: 2, budget.report_every: 256, augment.crop_min: 0.5}
search:
  optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
trials: 4
budget: {images: 2560}
placement: {concurrent: 2}
"""
TRIALS, INTERVAL, TOTAL = 4, 16, 160
"""Trials; steps between two checkpoints, and of a trial."""
OVER = ("done", "stopped")


@dataclass
class Sweep:
    """A sweep under way on the cluster."""

    nodes: Nodes
    out: Folder
    catalogue: Folder
    store: object_store.ObjectStore | None = None
    process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        return self.nodes.folder / f"{self.out.name}.log"

    def start(self, *options: str) -> None:
        (self.nodes.folder / HEAD / "sweep.yaml").write_text(SWEEP)
        words = ["sweep", "sweep.yaml", self.catalogue, "--out", self.out, *options]
        command = self.nodes.on_head("-m", "clipfh", *words, "--address", f"127.0.0.1:{self.nodes.port}")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(**command, stdout=log, stderr=log, start_new_session=True)

    def until(self, condition: Callable[[], object], seconds: float = 900) -> None:
        """Wait for the condition, or for the end of the sweep."""
        until(lambda: condition() or self.process.poll() is not None, seconds, 1.0 if self.store else 0.1)

    def finished(self) -> set[str]:
        """Trials that are over."""
        return {trial for trial, row in leaderboard(self.out).items() if row["status"] in OVER}

    def running(self) -> dict[str, int]:
        """Trials that have a checkpoint and more than a step to go, and the step of their last report."""
        last = {trial: lines[-1]["step"] for trial, lines in reports(self.out).items()}
        return {trial: step for trial, step in last.items() if step < TOTAL}

    def in_the_middle(self) -> dict[str, int]:
        """Wait for one trial at least to be over and two others to have a checkpoint."""
        self.until(lambda: len(self.running()) == 2 and self.finished())
        assert self.process.poll() is None, f"the sweep is over: {self.log}"
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
    asks = sweep.nodes.on_head("-c", NODE_IDS, f"127.0.0.1:{sweep.nodes.port}")
    listed = subprocess.run(**asks, capture_output=True, text=True, check=True)
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
    """A minute without the folder of the sweep, as when a share is not mounted, or without an answer of the store."""
    with sweep.store.failing(lambda request: "cut") if sweep.store else moved_away(sweep.out.local_path()):
        time.sleep(60)
    if sweep.process.poll() is not None:
        sweep.start("--resume")


@contextmanager
def moved_away(out: Path) -> Iterator[None]:
    away = out.with_suffix(".away")
    out.rename(away)
    yield
    if out.exists():  # what was written meanwhile is not the sweep's
        shutil.rmtree(out)
    away.rename(out)


def storage_busy(sweep: Sweep) -> None:
    with sweep.store.failing(lambda request: 503):
        time.sleep(60)


@contextmanager
def uploading(store: object_store.ObjectStore, name: str, runs: int) -> Iterator[None]:
    """Wait until some runs send objects of this name, and go no further with these until the block has ended."""
    held, is_over = set(), threading.Event()

    def hold(request: object_store.Request) -> str | None:
        if is_over.is_set() or request.kind not in ("PUT", "part") or name not in request.path:
            return None
        held.add(request.path.partition(name)[0])
        is_over.wait()
        return "cut"

    with store.failing(hold):
        try:
            until(lambda: len(held) >= runs)
            yield
        finally:
            is_over.set()


def worker_sending(sweep: Sweep) -> None:
    with uploading(sweep.store, layout.RAW_WEIGHTS, runs=2):
        worker(sweep)


def sweep_driver_sending(sweep: Sweep) -> None:
    with uploading(sweep.store, layout.LEADERBOARD, runs=1):
        os.killpg(sweep.process.pid, signal.SIGKILL)
        sweep.process.wait()
    sweep.start("--resume")


def disk_full(sweep: Sweep) -> None:
    """Fill up the file system until the sweep says so, then free it. If the sweep ends of that, it goes on."""
    filler = sweep.out.local_path().parent / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"0" * 2**20)
        except OSError:
            pass
    sweep.until(lambda: "No space left" in sweep.log.read_text(), 120)
    filler.unlink()
    with suppress(subprocess.TimeoutExpired):  # it says so, and then it may take a while to end
        sweep.process.wait(60)
        sweep.start("--resume")


KILLS: dict[str, Callable[[Sweep], None]] = {
    "a training worker": worker,
    "a trial's driver": trial_driver,
    "the sweep's driver": sweep_driver,
    "Ctrl-C": ctrl_c,
    "a worker node": worker_node,
    "a node after a notice of 30 s": notice,
    "the head and all nodes": head,
    "storage away for 60 s": storage_away,
}
DISK = {"a full disk": disk_full}
BUCKET = {
    "503s for 60 s": storage_busy,
    "a training worker as it sends a checkpoint": worker_sending,
    "the sweep's driver as it sends the leaderboard": sweep_driver_sending,
}
HEADINGS = ("killed", "over before", "over at the end", "of these run again", "steps lost", "whole checkpoints")
HEADINGS += ("seconds", "left behind", "good")
TRAFFIC = ("requests a trial-minute", "lists a second, in the busiest 10 s", "renames")


def one(name: str, sweep: Sweep) -> tuple[list[object], bool]:
    """A line of the table, and whether all is as it should be."""
    out, nodes = sweep.out, sweep.nodes
    requests = len(sweep.store.requests) if sweep.store else 0
    sweep.start()
    before_kill = sweep.in_the_middle()
    over = {trial: out.read_text(f"{layout.TRIALS}/{trial}/{layout.REPORTS}") for trial in sweep.finished()}
    begun = time.monotonic()
    {**KILLS, **DISK, **BUCKET}[name](sweep)
    seconds, lost = recovery(sweep, before_kill, begun)
    code, ended = sweep.wait(), sweep.finished()
    again = [
        trial for trial, text in over.items() if out.read_text(f"{layout.TRIALS}/{trial}/{layout.REPORTS}") != text
    ]
    whole, broken = checkpoints(out)
    left = held(nodes)
    good = code == 0 and len(ended) == TRIALS and not again and lost <= INTERVAL and whole and not broken and not left
    cells = [name, len(over), len(ended), len(again), lost, f"{whole} of {whole + broken}", f"{seconds:.0f}"]
    cells += [left or "nothing", "yes" if good else "NO"]
    return cells + (traffic(sweep.store.requests[requests:], out) if sweep.store else []), bool(good)


def recovery(sweep: Sweep, before: dict[str, int], begun: float) -> tuple[float, int]:
    """Seconds until each of the trials that ran is further than before, and the most steps that one did again.

    A run's stream.jsonl is cut back to the checkpoint it goes on from; what it had beyond its last report is not seen
    from outside, and is less than an interval.
    """
    lost = 0

    def further() -> bool:
        nonlocal lost
        now = {trial: lines[-1]["step"] for trial, lines in reports(sweep.out).items()}
        for trial, step in before.items():
            lost = max(lost, step - now.get(trial, step))
        return all(now.get(trial, 0) > step for trial, step in before.items())

    sweep.until(further)
    return time.monotonic() - begun, lost


def checkpoints(out: Folder) -> tuple[int, int]:
    """How many of a sweep's files of weights are whole, and how many are not, or are listed and are not there."""
    whole = broken = 0
    for trial in reports(out):
        run = out / layout.TRIALS / trial
        freed, folder = run_folder.read_freed(run), run / layout.CHECKPOINTS
        best = freed["kept"] if freed else run_folder.find_best_checkpoint(run)
        names = {name for name in folder.files() if name.endswith(".safetensors")}
        for name in names | ({f"{best}/{layout.RAW_WEIGHTS}"} if best else set()):
            try:
                safetensors.torch.load(folder.read_bytes(name))
                whole += 1
            except (safetensors.SafetensorError, FileNotFoundError):
                broken += 1
    return whole, broken


def traffic(requests: list[object_store.Request], out: Folder) -> list[object]:
    """What the nodes asked of the store: cells of `TRAFFIC`."""
    minutes = sum(run_folder.spent(lines)[1] for lines in reports(out).values()) / 60
    lists = [each.time for each in requests if each.kind == "list"]
    busiest = max((sum(0 <= other - each < 10 for other in lists) for each in lists), default=0)
    renames = sum(each.kind == "copy" for each in requests)
    return [f"{len(requests) / minutes:.0f}", f"{busiest / 10:.1f}", renames]


def held(nodes: Nodes) -> str:
    """What the cluster's nodes have not got back within ten seconds."""
    ran = subprocess.run(**nodes.on_head("-c", HELD, f"127.0.0.1:{nodes.port}"), capture_output=True, text=True)
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


def row(cells: list[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(names: list[str], store: object_store.ObjectStore | None) -> int:
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))
    place = Folder(store.uri(folder.name) if store else folder)
    write_source(folder / "photos", items=40, seed=1, size=64)
    prepare(str(folder / "photos"), place / "catalogue", image_size=64)
    nodes, good = Nodes(folder, apart=store is not None, env=store.env if store else None), True
    headings = [*HEADINGS, *(TRAFFIC if store else ())]
    print(f"{row(headings)}\n|{'---|' * len(headings)}", flush=True)
    try:
        nodes.start_all()
        for number, name in enumerate(names):
            with small_disk(folder / "small", 1000) if name in DISK else nullcontext(place) as within:
                cells, fine = one(name, Sweep(nodes, Folder(within) / f"sweep-{number}", place / "catalogue", store))
            print(row(cells), flush=True)
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
    words = [word for word in sys.argv[1:] if word != "--bucket"]
    with object_store.serve_to_nodes() if "--bucket" in sys.argv else nullcontext() as storage:
        kinds = {**KILLS, **(BUCKET if storage else DISK)}
        chosen = [name for name in kinds if not words or any(word in name for word in words)]
        sys.exit(main(chosen, storage))
