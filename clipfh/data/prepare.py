"""The photos of a source become a catalogue: listed photos, splits, plan of shards, shards, manifest.

Listing, splits and plan are cheap and done at once. Then a pool of processes makes the shards: each shard is read,
encoded and written by one process, a row group at a time, and survives a kill when it is finished.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from clipfh import UserError
from clipfh.config import cores
from clipfh.data.audit import Looks, OnProgress, describe_copies, find_copies, save_copies, temporary_looks, write_looks
from clipfh.data.catalogue import (
    COLUMNS,
    FORMAT,
    SCHEMA,
    VERSION,
    Catalogue,
    open_catalogue,
    partial_folder,
    read_columns,
)
from clipfh.data.encode import DecodingMemory, encode_listed, leads_out, start_encoding
from clipfh.data.splits import GALLERY_OF, SPLITS, assign_splits, digest
from clipfh.sources import read as read_module
from clipfh.sources.files import is_local
from clipfh.sources.listing import GALLERY_NOT_WANTED, NOT_WANTED, UNBLAMED, LeftOut, Photo, ReadOptions, lacks_heif
from clipfh.sources.parquet_tables import gathered, is_scattered
from clipfh.storage import layout, store
from clipfh.storage.output import require_writable
from clipfh.storage.store import Folder

# Size of a process's task, which a kill may lose; smaller where there would be too few shards for the cores
SHARD_IMAGES = 512
ROW_GROUP_IMAGES = 64  # number of images that a process has in memory
LEFT_OUT_LISTED = 1000
# Encoded images are all different, and zstd makes nothing of them
_STORED = {
    "compression": {"image": "none"} | dict.fromkeys(COLUMNS, "zstd"),
    "use_dictionary": list(COLUMNS),
    "write_statistics": list(COLUMNS),
}
NO_GALLERY = "query without a gallery image of its item"

_row_of = attrgetter(*COLUMNS)


def prepare(
    source: str | Path,
    out: str | Path | Folder,
    *,
    val_fraction: float = 0.1,
    image_size: int = 256,
    max_bad: float = 0.01,
    seed: int = 0,
    follow_links: bool = False,
    skip_bad_lines: bool = False,
    encoding: str = "",
    inshop_boxes: bool = False,
    without: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    compare_progress: OnProgress = lambda done, total: None,
) -> Catalogue:
    """Make the catalogue `out` of `source` on all cores. A catalogue that is there and up to date is reused.

    The work is done in `<out>.partial`, which is renamed at the end; in a bucket, which has no renames, at its place,
    and the manifest is written last. After a kill, the next start continues behind the last finished shard. The
    manifest's `hash` (rows and image bytes) does not depend on kills or cores.

    Args:
        source: path or URI of a source in any form that `read_source` takes.
        val_fraction: share of the train items held out for validation, but at least 50 items, or a fifth if that is
            fewer. Whole categories are, and so perhaps some more, where the source's test has none of train's.
        image_size: pixels of the short side; larger images are shrunk to it, others keep their bytes.
        max_bad: share of the listed images that may be left out (missing, unreadable, refused).
        seed: seed that items and query images are drawn with.
        follow_links: take links that lead out of the source.
        skip_bad_lines: leave out lines of a table that can't be used, in place of an error.
        encoding: of a CSV file, such as cp1252; empty finds it out.
        inshop_boxes: cut In-Shop's photos to the boxes of its own file.
        without: text file with a path a line, as the source writes it: photos to leave out, such as those that `audit`
            lists. The splits of the others stay as they are.
        progress: called with the number of images done and of all images.
        compare_progress: called likewise while the finished images are compared to find copies.

    Raises:
        UserError: the source, a setting or the disk needs the user's help.
    """
    if not (0 <= val_fraction < 1 and 0 <= max_bad <= 1 and image_size > 0):
        raise UserError("--val-fraction must be in [0, 1), --max-bad in [0, 1], --image-size above 0: change it")
    require_writable(out)
    source, out = str(source), Folder(store.absolute(out))
    with _processes() as pool:
        options = ReadOptions(follow_links, skip_bad_lines, encoding, inshop_boxes)
        listing = read_module.read_source(source, options)
        tally = _PhotoCount(len(listing.photos) + len(listing.left_out), max_bad, progress)
        tally.add(0, listing.left_out)
        photos, split_notes = assign_splits(listing.photos, val_fraction, seed)
        photos = _leave_out(without, photos, tally)
        shards = _cut_into_shards(photos)
        settings = {"val_fraction": val_fraction, "image_size": image_size, "seed": seed, "follow_links": follow_links}
        plan = digest(json.dumps([FORMAT, VERSION, settings]), *(digest(json.dumps(shard.photos)) for shard in shards))
        if not out.is_empty() and (out.is_local or out.exists(layout.CATALOGUE)):
            return _reuse_up_to_date(out, plan, tally)

        folder = partial_folder(out)
        with _user_errors(folder):
            _claim(folder, plan)
            with temporary_looks(folder, {shard.name: len(shard.photos) for shard in shards}) as looks:
                with _in_order(_Reader(listing.store, image_size, follow_links), shards, folder) as (reader, ordered):
                    _write_shards(pool, folder, ordered, reader, looks, tally)
                pool.shutdown()  # what follows needs memory, the processes none any more
                contents = _describe_contents(folder, shards)
                copies = find_copies([f"{folder.address}/{shard.name}" for shard in shards], compare_progress, looks)
            save_copies(folder, copies, contents["hash"])
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "plan": plan,
                "settings": {"source": source, **settings, "max_bad": max_bad},
                **contents,
                "left_out": tally.summary(),
                "notes": listing.notes + split_notes + contents["notes"] + describe_copies(copies),
            }
            _finish(folder, out, manifest)
        return open_catalogue(out)


def _leave_out(without: str | Path | None, photos: list[Photo], tally: "_PhotoCount") -> list[Photo]:
    """The photos that a file does not list, without queries of which it lists all of the gallery.

    Raises:
        UserError: the file can't be read, or lists none of the photos.
    """
    if without is None:
        return photos
    try:
        with Path(without).open(encoding="utf-8-sig") as file:
            listed = {line.rstrip("\n") for line in file} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--without {without}: can't be read ({error}): give a text file with a path a line") from error
    if listed and listed.isdisjoint(photo.path for photo in photos):
        raise UserError(
            f"--without {without}: none of its {len(listed):,} paths is of a photo here, the first is "
            f"{min(listed)!r}: write paths as the source does, such as {photos[0].path!r}"
        )
    kept = {(photo.item_id, photo.split) for photo in photos if photo.path not in listed}
    gone = {(photo.item_id, photo.split) for photo in photos} - kept

    def explain(photo: Photo) -> str:
        if photo.path in listed:
            return NOT_WANTED
        return GALLERY_NOT_WANTED if (photo.item_id, GALLERY_OF.get(photo.split)) in gone else ""

    tally.add(0, [(photo.path, why) for photo in photos if (why := explain(photo))])
    return [photo for photo in photos if not explain(photo)]


@dataclass(frozen=True)
class _Reader:
    """How the processes read photos."""

    store: fs.SubTreeFileSystem
    image_size: int
    follow_links: bool


@dataclass(frozen=True)
class _Shard:
    name: str
    split: str
    photos: list[Photo]


def _cut_into_shards(photos: list[Photo]) -> list[_Shard]:
    """Cut the photos, sorted by split and item, into shards of nearly equal size. No item is in two shards."""
    size = min(SHARD_IMAGES, max(64, len(photos) // 32))
    ordered = sorted(photos, key=lambda photo: (SPLITS.index(photo.split), photo.item_id, photo.path))
    shards = []
    for split, of_split in groupby(ordered, key=lambda photo: photo.split):
        cuts: list[list[Photo]] = [[]]
        for _, of_item in groupby(of_split, key=lambda photo: photo.item_id):
            views = list(of_item)
            if cuts[-1] and len(cuts[-1]) + len(views) > size:
                cuts.append([])
            cuts[-1] += views
        shards += [_Shard(f"{split}-{number:05d}.parquet", split, cut) for number, cut in enumerate(cuts)]
    return shards


@contextmanager
def _in_order(reader: _Reader, shards: list[_Shard], folder: Folder) -> Iterator[tuple[_Reader, list[_Shard]]]:
    """What reads the shards, and these: where tables have their images scattered, they are gathered in a file first."""
    source, photos = reader.store, [photo for shard in shards for photo in shard.photos]
    is_free = reader.follow_links or not is_local(source)
    may_read = is_free or not any(leads_out(source.base_path, file) for file in {photo.file for photo in photos})
    if not (may_read and is_scattered(photos)):
        yield reader, shards
        return
    with gathered(source, photos, folder.local_path() if folder.is_local else None) as (place, moved):
        ordered = [replace(shard, photos=[moved[photo] for photo in shard.photos]) for shard in shards]
        yield replace(reader, store=place), ordered


@contextmanager
def _processes() -> Iterator[ProcessPoolExecutor]:
    """A pool with one process for each core, started at once. If the block fails, waiting tasks are dropped."""
    # Spawned, not forked: the caller may have threads
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        cores.available(), mp_context=spawn, initializer=_start_worker, initargs=(DecodingMemory(spawn),)
    )
    with _main_module_hidden():
        for _ in range(cores.available()):  # they start while the source is read
            pool.submit(os.getpid)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """A spawned process imports the caller's script: slow, and it runs all of a script that has no main guard.

    Workers need no more than this module.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker(memory: DecodingMemory) -> None:
    start_encoding(memory)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    pa.array([""])  # at its first array pyarrow imports pandas: best while the source is still being read
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent can't stop its workers, and they would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass
class _PhotoCount:
    """Counts the photos written and left out. Leaving out more than the share `max_bad` stops the work."""

    total: int
    max_bad: float
    progress: Callable[[int, int], None] | None
    done: int = 0
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, images: int, left_out: Sequence[LeftOut]) -> None:
        """Count written images, and photos that were left out, each given as path and reason."""
        self.left_out += left_out
        self.done += images + len(left_out)
        if self.progress:
            self.progress(self.done, self.total)
        self.check(self.left_out)

    def check(self, left_out: Sequence[Sequence[str]], more: int = 0) -> None:
        """Check that photos left out, and `more` that are not listed, are not too many.

        Raises:
            UserError: there are too many.
        """
        bad = [(path, why) for path, why in left_out if not why.startswith(UNBLAMED)]
        if (count := len(bad) + more) > self.max_bad * self.total:
            first = ", ".join(f"{path} ({why})" for path, why in bad[:3])
            raise UserError(
                f"{count:,} of {self.total:,} images had to be left out so far, more than --max-bad {self.max_bad:g}; "
                f"first {first}: fix them or raise --max-bad"
            )

    def summary(self) -> dict[str, Any]:
        """The manifest's account of photos left out: counts, and a list of the first."""
        listed = sorted(map(tuple, self.left_out))
        reasons = dict(sorted(Counter(why for _, why in listed).items()))
        return {"count": len(listed), "reasons": reasons, "list": listed[:LEFT_OUT_LISTED]}


def _reuse_up_to_date(out: Folder, plan: str, tally: _PhotoCount) -> Catalogue:
    try:
        catalogue = open_catalogue(out)
    except UserError as error:
        raise UserError(f"{out}: is there and no whole catalogue: delete it or choose another --out") from error
    if catalogue.manifest["plan"] != plan:
        raise UserError(f"{out}: holds the catalogue of another source or settings: delete it or choose another --out")
    left_out = catalogue.manifest["left_out"]
    if lacks_heif(left_out["reasons"]):
        raise UserError(f"{out}: was made without pillow-heif and lacks HEIC photos: delete it and run this again")
    blamed = sum(count for why, count in left_out["reasons"].items() if not why.startswith(UNBLAMED))
    listed = [each for each in left_out["list"] if not each[1].startswith(UNBLAMED)]
    tally.check(listed, blamed - len(listed))
    return catalogue


@contextmanager
def _user_errors(folder: Folder) -> Iterator[None]:
    """Turn failures of the machine during the work into a UserError that says what to do."""
    again = "then run the same command again, it goes on where it stopped"
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(f"a process that reads images was killed, perhaps for memory: free some, {again}") from error
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error}): make room or fix that, {again}") from error


def _claim(folder: Folder, plan: str) -> None:
    """Claim the folder for this plan: reuse what the same plan left there, clear what another plan left."""
    folder.make()
    content = json.dumps({"plan": plan})
    is_claimed = folder.exists(layout.PLAN)
    if is_claimed and folder.read_text(layout.PLAN) == content:
        for stale in (name for name in folder.files() if name.endswith(".new")):
            folder.remove_file(stale)
        return
    if is_claimed:
        folder.clear()
    elif not folder.is_empty():
        raise UserError(f"{folder}: is needed to work in, and holds something else: move it or choose another --out")
    folder.write(layout.PLAN, content)


def _write_shards(
    pool: ProcessPoolExecutor, folder: Folder, shards: list[_Shard], reader: _Reader, looks: Looks, tally: _PhotoCount
) -> None:
    """Write the missing shards, each in one process: first all others, then those of queries, which need a gallery."""
    for of_queries in (False, True):
        matched = {
            q: _item_ids(folder, [s for s in shards if s.split == g]) for q, g in GALLERY_OF.items() if of_queries
        }
        under_way = []
        for shard in (shard for shard in shards if (shard.split in GALLERY_OF) == of_queries):
            footer = _footer(folder, shard.name)
            if footer and not lacks_heif(why for _, why in footer["left_out"]):
                tally.add(footer["images"], footer["left_out"])
                continue
            items = matched.get(shard.split)
            place = looks.path, looks.starts[shard.name]
            under_way.append(pool.submit(_write_shard, folder, shard.name, shard.photos, reader, items, place))
            looks.filled.add(shard.name)
        for done in as_completed(under_way):
            tally.add(*done.result())


def _write_shard(
    folder: Folder,
    name: str,
    photos: list[Photo],
    reader: _Reader,
    matched: set[str] | None,
    place_of_looks: tuple[str, int],
) -> tuple[int, list[LeftOut]]:
    """Write a shard whole or not at all, and the looks of its photos.

    Its footer holds the hash of its rows and what was left out, for a later run that finds it finished. Returns the
    number of images and what was left out: also a query whose item is not in `matched`.
    """
    num_images, hashes, left_out = 0, [], list[LeftOut]()
    rows, (file_of_looks, start) = _rows(photos, reader, matched, left_out), place_of_looks
    with folder.replacing(name, is_kept=True) as file, pq.ParquetWriter(file, SCHEMA, **_STORED) as writer:
        while group := list(islice(rows, ROW_GROUP_IMAGES)):
            looks, images, *columns = zip(*group, strict=True)
            write_looks(file_of_looks, start + num_images, looks)
            hashes.append(digest(json.dumps(columns), *images))
            writer.write_table(pa.table([pa.array(values) for values in (images, *columns)], schema=SCHEMA))
            num_images += len(group)
        writer.add_key_value_metadata({"clipfh": json.dumps({"hash": digest(*hashes), "left_out": left_out})})
    return num_images, left_out


def _rows(
    photos: list[Photo], reader: _Reader, matched: set[str] | None, left_out: list[LeftOut]
) -> Iterator[tuple[Any, ...]]:
    """Looks and rows in the order of SCHEMA of the photos that have an image and, where that counts, a match."""
    for photo in photos:
        encoded = encode_listed(reader.store, photo, reader.image_size, reader.follow_links)
        if isinstance(encoded, str):
            left_out.append((photo.path, encoded))
        elif matched is not None and photo.item_id not in matched:
            left_out.append((photo.path, NO_GALLERY))
        else:
            image, look = encoded
            yield look, image, *_row_of(photo)


def _footer(folder: Folder, name: str) -> dict[str, Any] | None:
    """A shard's hash, number of images and left-out photos, or None where the shard is not there or not whole."""
    try:
        metadata = store.open_parquet(folder / name).metadata
    except (OSError, pa.ArrowException):
        return None
    return {"images": metadata.num_rows, **json.loads(metadata.metadata[b"clipfh"])}


def _item_ids(folder: Folder, shards: Iterable[_Shard]) -> set[str]:
    tables = (read_columns(f"{folder.address}/{shard.name}", ["item_id"]) for shard in shards)
    return {item for table in tables for item in table["item_id"].unique().to_pylist()}


def _describe_contents(folder: Folder, shards: list[_Shard]) -> dict[str, Any]:
    """The manifest's account of the shards in `folder`: hash, counts, notes, sizes."""
    sizes = folder.files()
    footers = {shard.name: _footer(folder, shard.name) or {} for shard in shards}
    filled = {split: [s for s in shards if s.split == split and footers[s.name]["images"]] for split in SPLITS}
    if not any(filled.values()):
        raise UserError(f"{folder}: none of the images can be read: fix them or check --source")
    names = ["item_id", "split", *_NOTED]
    rows = pa.concat_tables(
        read_columns(f"{folder.address}/{shard.name}", names) for its in filled.values() for shard in its
    )
    items = rows.group_by(["item_id", "split"]).aggregate([("item_id", "count")])
    return {
        "hash": digest(*(footer["hash"] for footer in footers.values())),
        "counts": {
            split: {
                "images": sum(footers[s.name]["images"] for s in its),
                "items": pc.sum(pc.equal(items["split"], split)).as_py() or 0,
            }
            for split, its in filled.items()
        },
        "notes": _note_oddities(rows, items),
        "shards": {split: {s.name: sizes[s.name] for s in its} for split, its in filled.items()},
    }


_NOTED = ("category", "variant", "color", "text")


def _note_oddities(rows: pa.Table, items: pa.Table) -> list[str]:
    """Notes for readers of metrics on these rows; `items` has the number of images by item and split."""
    for name in _NOTED:
        values = pc.if_else(pc.equal(rows[name], ""), pa.scalar(None, pa.string()), rows[name])
        rows = rows.set_column(rows.column_names.index(name), name, values)
    of_item = rows.group_by("item_id").aggregate([(name, "count_distinct") for name in _NOTED])
    category, variant, color, text = (of_item[f"{name}_count_distinct"].to_numpy() for name in _NOTED)
    single = pc.and_(pc.equal(items["split"], "train"), pc.equal(items["item_id_count"], 1))
    counts = {
        "train items have one image: terms that need a positive leave them out": pc.sum(single).as_py() or 0,
        "items lie in several categories": (category > 1).sum(),
        "items have several variants but one color": ((variant > 1) & (color == 1)).sum(),
        "items have no text: their prompts name what else is known of them": (text == 0).sum(),
    }
    notes = [f"{count:,} {what}" for what, count in counts.items() if count]
    splits = set(items["split"].to_pylist())
    lacking = {
        "train": "no train items: the catalogue can be embedded and measured on, not trained on",
        "val_query": "no validation items, which need two photos each: train and sweep can't select on this catalogue",
        "query": "no test items, which need two photos each: evaluate can't measure on this catalogue",
    }
    return [*notes, *(note for split, note in lacking.items() if split not in splits)]


def _finish(folder: Folder, out: Folder, manifest: dict[str, Any]) -> None:
    with folder.replacing(layout.CATALOGUE, is_kept=True) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    if folder != out:
        folder.local_path().rename(out)
    out.remove_file(layout.PLAN)
