"""A source of drawn garments, in the file layout of In-Shop."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from clipfh import UserError
from clipfh.config import cores
from clipfh.demo.drawing import VIEWS, draw
from clipfh.demo.garments import describe, make_garment, make_rng
from clipfh.storage import store


def _write_photos(task: tuple[Path, int, int, int]) -> list[str]:
    """Write three to six views of every variant of one item. Return the photos' paths, relative to the root."""
    root, seed, index, size = task
    item, paths = make_garment(seed, index), []
    (root / item.folder).mkdir(parents=True)
    for variant in range(len(item.colors)):
        rng = make_rng(seed, index, variant, len(VIEWS))  # no view has this number
        omissions = rng.choice(len(VIEWS), rng.integers(4), replace=False)
        for view in np.delete(VIEWS, omissions):
            paths.append(f"{item.folder}/{variant + 1:02d}_{view}.jpg")
            draw(item, variant, str(view), seed, size).save(root / paths[-1], quality=int(rng.integers(75, 96)))
    return paths


def _partition(photos: list[list[str]], train_share: float, seed: int) -> list[tuple[str, str, str]]:
    """Return the rows of In-Shop's list. An item is train or test; a third of a test item's photos are queries."""
    rng = make_rng(seed)
    train = set(rng.permutation(len(photos))[: round(len(photos) * train_share)].tolist())
    rows = []
    for i, paths in enumerate(photos):
        queries = set(rng.permutation(len(paths))[: max(1, len(paths) // 3)].tolist())
        for k, path in enumerate(paths):
            status = "train" if i in train else "query" if k in queries else "gallery"
            rows.append((path, path.split("/")[3], status))
    return rows


def write_source(out: Path, *, items: int, seed: int, size: int = 96, train_share: float = 0.75) -> None:
    """Write photos and texts of drawn items in the file layout of In-Shop: `img/`, `Eval/`, `Anno/`.

    Args:
        out: folder to write. The folder appears only when all its files are written.
        items: number of items.
        seed: seed of the garments, the photos and the splits.
        size: side of the square photos, pixels.
        train_share: share of the items for training.

    Raises:
        UserError: `out` exists already.
    """
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or choose another folder")
    with store.whole_folder(out) as folder:
        for name in ("Eval", "Anno"):
            (folder / name).mkdir()
        numbers = range(1, items + 1)
        with ProcessPoolExecutor(min(8, cores.available()), multiprocessing.get_context("spawn")) as pool:
            photos = list(pool.map(_write_photos, [(folder, seed, i, size) for i in numbers], chunksize=4))
        rows = _partition(photos, train_share, seed)
        lines = [str(len(rows)), "image_name item_id evaluation_status", *(" ".join(row) for row in rows)]
        (folder / "Eval/list_eval_partition.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        garments = [make_garment(seed, i) for i in numbers]
        texts = [{"item": g.item_id, "color": g.colors[0].name, "description": describe(g)} for g in garments]
        (folder / "Anno/list_description_inshop.json").write_text(json.dumps(texts, indent=1), encoding="utf-8")
