"""Catalogues beyond memory: a stream by windows beside one from memory, a driver at 10 million images, a billion.

The catalogue of the stream is ten times the object store that Ray is given. Its photos are a few hundred drawn ones,
written many times over: what is measured is how they are read. The others have no photos, only rows.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from clipfh.config.experiment import AugmentSettings, BatchSettings
from clipfh.data.catalogue import COLUMNS, SCHEMA, Catalogue
from clipfh.data.decoding import BatchSpec, StreamPart, open_sampler
from clipfh.data.sampler import ItemRows, PKSampler
from clipfh.storage.store import Folder

STORE = 256 * 2**20
TIMES = 10
SHARD, VIEWS = 64, 4
SPEC = BatchSpec(BatchSettings(items=32, views=4), AugmentSettings(), seed=0, size=64, singles=False)
MANY, BILLION = 10_000_000, 1_000_000_000


def rows() -> list[dict]:
    """All measurements, as {name, value, target, ok}."""
    with tempfile.TemporaryDirectory() as folder:
        beyond = stream_rows(Path(folder))
        beyond += in_process_rows(Path(folder))
        gib = float(subprocess.run([sys.executable, __file__, folder], stdout=subprocess.PIPE, check=True).stdout)
    return [*beyond, row(f"driver at {MANY:,} images: GiB", gib, at_most=2.0), *plan_rows()]


def stream_rows(folder: Path) -> list[dict]:
    """A pass over a catalogue of ten times the object store, and the same from memory, twice in turn."""
    photos = drawn_photos()
    images = int(STORE * TIMES / np.mean([len(photo) for photo in photos]))
    catalogue = write_catalogue(folder / "photos", {"train": images}, photos)
    by_windows, from_memory = [], []
    for _ in range(2):
        by_windows.append(one_pass(catalogue, "auto", STORE))
        from_memory.append(one_pass(catalogue, 0, 3 * TIMES * STORE))
    print(f"  {by_windows}\n  {from_memory}", file=sys.stderr)
    speed = max(each["speed"] for each in by_windows) / max(each["speed"] for each in from_memory)
    return [
        row("windows: images/s, those from memory", speed, at_least=0.8),
        row("windows: bytes read a pass, the catalogue's", max(each["read"] for each in by_windows), at_most=1.1),
        row(
            "windows: the reader's memory late in a pass, early",
            max(each["growth"] for each in by_windows),
            at_most=1.1,
        ),
        row("windows: MiB spilled to disk", max(each["spilled"] for each in by_windows), at_most=0),
    ]


def one_pass(catalogue: Catalogue, window: object, store: int) -> dict[str, float]:
    """A pass in a Ray of its own: images/s, bytes read by the catalogue's, growth of memory, MiB spilled."""
    import ray

    from clipfh.train import stream

    class Counting(stream._Windows):
        """The actor, which counts the bytes of the shards that it reads."""

        def __init__(self, part: StreamPart, ranks: int) -> None:
            super().__init__(part, ranks)
            self.bytes, read = 0, self.reader.read

            def counted(shard: int) -> object:
                self.bytes += Path(part.images.shards[shard]).stat().st_size
                return read(shard)

            self.reader.read = counted

        async def bytes_read(self) -> int:
            return self.bytes

    actors: list = []
    start = ray.remote(Counting).options(num_cpus=0, max_concurrency=stream.WAITING)
    stream._start_actor = lambda *given, **_: actors.append(start.remote(*given)) or actors[-1]
    context = ray.init(num_cpus=4, object_store_memory=store, include_dashboard=False, log_to_driver=False)
    try:
        images = stream.share(catalogue, "train", window=window)
        ray.wait([each for each in images.shards if not isinstance(each, str)] or [ray.put(0)], fetch_local=False)
        plan = open_sampler(images, SPEC)
        steps, memory, times = plan.num_items // plan.items, [], []
        spilled = Spilled(Path(context.address_info["session_dir"]))
        for _ in stream.batches(StreamPart(images, SPEC, 0, steps, tasks=3)):
            times.append(time.perf_counter())
            memory.append(psutil.Process().memory_full_info().uss if len(times) % 20 == 0 else 0)
        begin = len(times) // 10  # what starts is not what streams
        taken = [each for each in memory if each]
        third = len(taken) // 3
        size = catalogue.size("train")[1]
        return {
            "speed": (len(times) - begin) * SPEC.batch.images / (times[-1] - times[begin]),
            "read": ray.get(actors[0].bytes_read.remote()) / size if actors else 1.0,
            "growth": max(taken[-third:]) / max(taken[:third]),
            "spilled": spilled.stop() / 2**20,
        }
    finally:
        ray.shutdown()


def in_process_rows(folder: Path) -> list[dict]:
    """A pass in this process over a catalogue of ten times its memory, and the same from memory; times are CPU's."""
    photos, memory_bytes = drawn_photos(), STORE // 4
    images = int(memory_bytes * TIMES / np.mean([len(photo) for photo in photos]))
    catalogue = write_catalogue(folder / "in-process", {"train": images}, photos)
    with mock.patch("clipfh.config.memory.available", lambda: memory_bytes):
        by_windows, from_memory = (one_pass_here(catalogue, window) for window in ("auto", 0))
    print(f"  {by_windows}\n  {from_memory}", file=sys.stderr)
    return [
        row(
            "windows in a process: images/s, those from memory",
            by_windows["speed"] / from_memory["speed"],
            at_least=0.8,
        ),
        row("windows in a process: bytes read a pass, the catalogue's", by_windows["read"], at_most=1.1),
        row("windows in a process: memory late in a pass, early", by_windows["growth"], at_most=1.1),
    ]


def one_pass_here(catalogue: Catalogue, window: object) -> dict[str, float]:
    """A pass in this process: images a second of CPU, bytes read by the catalogue's, growth of memory."""
    from clipfh.data import decoding
    from clipfh.train.in_process import InProcessFeed

    spec = dataclasses.replace(SPEC, batch=BatchSettings(items=16, views=4))
    begun = time.process_time()
    with mock.patch.object(decoding, "read_shard", side_effect=decoding.read_shard) as read:
        feed = InProcessFeed()
        images = feed.share(catalogue, "train", window=window)
        plan, memory = open_sampler(images, spec), []
        steps = plan.num_items // plan.items
        for step, _, _ in feed.batches(StreamPart(images, spec, 0, steps)):
            if step % 5 == 0:
                memory.append(psutil.Process().memory_info().rss)
    third = len(memory) // 3
    return {
        "speed": steps * spec.batch.images / (time.process_time() - begun),
        "read": sum(Path(call.args[0]).stat().st_size for call in read.call_args_list) / catalogue.size("train")[1],
        "growth": max(memory[-third:]) / max(memory[:third]),
    }


class Spilled:
    """Looks, until it is stopped, how many bytes a Ray has spilled to disk at most."""

    def __init__(self, session: Path) -> None:
        self.session, self.most, self.over = session, 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.over.wait(0.5):
            sizes = []
            for file in self.session.glob("ray_spilled_objects*/*"):
                try:
                    sizes.append(file.stat().st_size)
                except FileNotFoundError:  # deleted meanwhile
                    continue
            self.most = max(self.most, sum(sizes))

    def stop(self) -> int:
        self.over.set()
        self.thread.join()
        return self.most


def plan_rows() -> list[dict]:
    """A plan for a billion images in shards of 512, four of each item, in windows of 320,000 images. Times: CPU."""
    starts = np.arange(0, BILLION + 1, VIEWS)
    ends = np.append(np.arange(512, BILLION, 512), BILLION)
    item = np.broadcast_to(np.int32(0), BILLION)  # a plan that knows where each item's rows are does not read it
    begun = time.process_time()
    plan = PKSampler(item, 64, 4, window=320_000, shard_ends=ends, rows=ItemRows(starts, None))
    made = time.process_time()
    plan.batch(10**9)
    resumed = time.process_time()
    for step in range(10**9 + 1, 10**9 + 1001):
        plan.batch(step)
    ended = time.process_time()
    shared = starts.nbytes + ends.nbytes + 4 * BILLION + 4 * BILLION // VIEWS
    own = plan.item_ends.nbytes + plan.plan.images.nbytes + plan.plan.items.nbytes
    print(f"  {made - begun:.1f} s to make the plan, {own / 2**20:.0f} MiB in each process", file=sys.stderr)
    return [
        row("a billion images: bytes of the index an image, shared by a node", shared / BILLION, at_most=16),
        row("a billion images: ms to resume at step 10^9", 1000 * (resumed - made), at_most=1000),
        row("a billion images: ms a batch", ended - resumed, at_most=5),
    ]


def driver(folder: Path) -> float:
    """GiB that the driver of a run takes at most, with all that it makes of a catalogue before workers have it."""
    from clipfh.train.in_process import InProcessFeed
    from clipfh.train.inputs import validation_codes

    splits = {"train": MANY, "val_query": MANY // 20, "val_gallery": MANY // 20}
    catalogue = write_catalogue(folder / "many", splits, [b""], shard=5000)
    images = InProcessFeed().share(catalogue, "train", window=100_000)
    open_sampler(images, SPEC).batch(10**6)
    validation_codes(catalogue)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def drawn_photos() -> list[bytes]:
    """JPEGs of 256 pixels and some 50 KB, of blurred noise."""
    import io

    from PIL import Image

    photos = []
    for seed in range(64):
        coarse = np.random.default_rng(seed).integers(0, 255, (150, 150, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((256, 256)).save(file, "JPEG", quality=95)
        photos.append(file.getvalue())
    return photos


def write_catalogue(folder: Path, splits: dict[str, int], photos: list[bytes], shard: int = SHARD) -> Catalogue:
    """A catalogue as `prepare` leaves one, whose items have four of the photos each."""
    folder.mkdir()
    shards: dict[str, dict[str, int]] = {}
    for split, images in splits.items():
        for number, start in enumerate(range(0, images, shard)):
            rows = np.arange(start, min(start + shard, images))
            text = {name: pa.array([""] * len(rows)) for name in COLUMNS}
            text |= {"item_id": pa.array(np.char.mod("item-%09d", rows // VIEWS))}
            text |= {"path": pa.array(np.char.mod(f"{split}/%010d.jpg", rows)), "split": pa.array([split] * len(rows))}
            text |= {"category": pa.array(np.char.mod("category %d", rows // VIEWS % 40))}
            image = pa.array([photos[row % len(photos)] for row in rows.tolist()], pa.binary())
            file = folder / f"{split}-{number:05}.parquet"
            pq.write_table(pa.table({"image": image, **text}, schema=SCHEMA), file, compression="none")
            shards.setdefault(split, {})[file.name] = file.stat().st_size
    counts = {split: {"images": images, "items": images // VIEWS} for split, images in splits.items()}
    manifest = {"counts": counts, "shards": shards, "hash": json.dumps(counts)}
    return Catalogue(Folder(folder), manifest)


def row(name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> dict:
    ok = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"name": name, "value": round(value, 3), "target": at_most if at_least is None else at_least, "ok": ok}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(driver(Path(sys.argv[1])))
    else:
        for each in rows():
            print(f"{each['name']:65} {each['value']:8} (target {each['target']:5}) {'ok' if each['ok'] else 'MISSED'}")
