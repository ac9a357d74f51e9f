"""`prepare` at the size of In-Shop: 52,712 photos of 256 pixels, and some as large as the high-resolution ones.

The plain loop does the same to the images with Pillow alone, on one core: each is decoded, shrunk where it is large,
and written to Parquet. It reads no annotations, and does not hash what it writes.
"""

import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import inshop
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 256


def rows() -> list[dict]:
    """All measurements, as {name, value, target, ok}."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = inshop.write(root / "small", inshop.FULL.scaled(10))
        full = inshop.write(root / "full")
        large = inshop.write(root / "large", inshop.FULL.scaled(4), (750, 1101), "Img/img_highres")
        ratio, large_ratio = speed(full, root / "work", 6_000), speed(large, root / "work", 1_500)
        small_memory, full_memory = (peak_memory(source, root / "work/catalogue") for source in (small, full))
        same = killed_and_started_again(full, root / "work")
    return [
        row("prepare: a plain one-core loop, our time (256 pixels)", ratio, at_least=1.9),
        row("prepare: a plain one-core loop, our time (750 x 1101)", large_ratio, at_least=1.9),
        row("prepare: memory at 52,712 images, that at 5,270", full_memory / small_memory, at_most=1.3),
        row("prepare: killed and started again, the same hash", same, at_least=1),
    ]


def row(name: str, value: float, at_most: float | None = None, at_least: float | None = None) -> dict:
    ok = value <= at_most if at_least is None else value >= at_least
    return {"name": name, "value": round(value, 2), "target": at_most if at_least is None else at_least, "ok": bool(ok)}


def speed(source: Path, work: Path, loop_images: int, rounds: int = 3) -> float:
    """How much faster than the loop an image is done, the whole command counted; the median of rounds in turn."""
    files = sorted(source.rglob("*.jpg"))
    some, ratios = files[:: max(1, len(files) // loop_images)], []
    for _ in range(rounds):
        loop, ours = plain_loop(some, work / "loop") / len(some), prepare(source, work / "catalogue") / len(files)
        ratios.append(loop / ours)
        print(f"  {1 / loop:,.0f} images/s by the loop, {1 / ours:,.0f} by prepare", file=sys.stderr)
    return median(ratios)


def plain_loop(files: list[Path], out: Path) -> float:
    """Seconds."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start = time.perf_counter()
    for first in range(0, len(files), 1024):
        some = files[first : first + 1024]
        table = pa.table({"image": [shrunk(file) for file in some], "path": [str(file) for file in some]})
        pq.write_table(table, out / f"{first}.parquet")
    return time.perf_counter() - start


def shrunk(file: Path) -> bytes:
    data = file.read_bytes()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    excess = min(image.size) / SIDE
    if excess <= 1:
        return data
    stream = io.BytesIO()
    size = (round(image.width / excess), round(image.height / excess))
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def prepare(source: Path, out: Path) -> float:
    """Seconds of the whole command."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(command(source, out), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def peak_memory(source: Path, out: Path) -> float:
    """MiB of all its processes at the peak."""
    shutil.rmtree(out, ignore_errors=True)
    process, peak = subprocess.Popen(command(source, out), stdout=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0
    return peak


def command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "clipfh", "prepare", "--source", str(source), "--out", str(out)]


def memory(pid: int) -> float:
    """MiB of a process and of those that it started; what they share is counted once."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0
    own = int(rollup.split("\nPss:")[1].split()[0]) if "\nPss:" in rollup else 0
    return own / 1024 + sum(memory(int(child)) for child in children)


def killed_and_started_again(source: Path, work: Path) -> bool:
    """Whether prepare ends with the hash of `work/catalogue` and the right counts, killed in the middle."""
    prepare(source, work / "catalogue")
    process = subprocess.Popen(command(source, work / "again"), stdout=subprocess.PIPE, text=True)
    while int(next(process.stdout).split()[0].replace(",", "")) < inshop.FULL.images // 2:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (work / "again").exists() and any((work / "again.partial").glob("*.parquet"))
    prepare(source, work / "again")
    whole, again = (json.loads((work / name / "catalogue.json").read_text()) for name in ("catalogue", "again"))
    images = {split: counts["images"] for split, counts in again["counts"].items()}
    shape = inshop.FULL
    assert (images["query"], images["gallery"]) == (shape.query, shape.gallery)
    assert sum(images.values()) == shape.images and again["left_out"]["count"] == 0
    return whole["hash"] == again["hash"]


if __name__ == "__main__":
    for each in rows():
        print(f"{each['name']:55} {each['value']:8} (target {each['target']:5}) {'ok' if each['ok'] else 'MISSED'}")
