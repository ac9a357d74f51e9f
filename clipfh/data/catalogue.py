"""A catalogue as `prepare` leaves it: a folder of Parquet shards, a row an image, with a manifest."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from clipfh import UserError
from clipfh.data.splits import SPLITS
from clipfh.storage import layout, store
from clipfh.storage.store import Folder

FORMAT, VERSION = "clipfh-catalogue", 2
COLUMNS = ("item_id", "variant", "view", "gender", "category", "path", "split", "text", "color")
SCHEMA = pa.schema([("image", pa.binary()), *((name, pa.string()) for name in COLUMNS)])


@dataclass(frozen=True)
class Catalogue:
    """A finished catalogue; `manifest` is what `catalogue.json` holds."""

    path: Folder
    manifest: dict[str, Any]

    def shards(self, split: str) -> list[str]:
        """Paths or URIs of the Parquet files of a split, in order. A train item is never cut by the end of a shard."""
        return [f"{self.path.address}/{name}" for name in self.manifest["shards"][split]]

    def rows(self, split: str) -> pa.Table:
        """The rows of a split, one an image, without the images."""
        return self._read(split, COLUMNS)

    def stream_rows(self, split: str) -> Iterator[dict[str, str]]:
        """The rows of a split, one an image, without the images; one shard's rows are in memory at a time."""
        for path in self.shards(split):
            yield from read_columns(path, COLUMNS).to_pylist()

    def columns(self, split: str, names: Sequence[str]) -> pa.Table:
        """Some columns of the rows of a split."""
        return self._read(split, names)

    def images(self, split: str) -> pa.Table:
        """The rows of a split, one an image, with the encoded images: the whole split in memory."""
        return self._read(split, SCHEMA.names)

    def images_at(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Encoded images by their paths. Only the row groups that may hold one of them are read."""
        paths_in_store = [store.locate(shard)[1] for split in SPLITS for shard in self.shards(split)]
        shards = ds.dataset(paths_in_store, filesystem=self.path.filesystem, format="parquet", partitioning=None)
        rows = shards.to_table(columns=["path", "image"], filter=ds.field("path").isin(list(paths)))
        return dict(zip(rows["path"].to_pylist(), rows["image"].to_pylist(), strict=True))

    def size(self, *splits: str) -> tuple[int, int]:
        """Number of images of splits, and bytes of their shards."""
        shards = self.manifest["shards"]
        return sum(map(self.num_images, splits)), sum(sum(shards[split].values()) for split in splits)

    def num_images(self, split: str) -> int:
        return self.manifest["counts"][split]["images"]

    def num_items(self, split: str) -> int:
        return self.manifest["counts"][split]["items"]

    def require(self, *splits: str) -> None:
        """Check that each of these splits has an image.

        Raises:
            UserError: one of them has none.
        """
        for split in splits:
            if not self.num_images(split):
                counts = ", ".join(f"{self.num_images(name)} {name}" for name in SPLITS)
                raise UserError(
                    f"{self.path}: no {split} images (it has {counts}): prepare it from a source with more items of "
                    "two photos or more, or with splits that have some; clipfh embed and search work without"
                )

    def _read(self, split: str, columns: Sequence[str]) -> pa.Table:
        tables = [read_columns(path, columns) for path in self.shards(split)]
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table().select(columns)


def open_catalogue(path: str | Path | Folder | Catalogue) -> Catalogue:
    """Open what `prepare` wrote; a catalogue that is open comes back as it is.

    Raises:
        UserError: no catalogue, one of another version, or one that is not whole.
    """
    if isinstance(path, Catalogue):
        return path
    path = Folder(store.absolute(path))  # workers of a cluster have another working directory
    file = path / layout.CATALOGUE
    if not file.is_file():
        if partial_folder(path).exists() or path.exists(layout.PLAN):
            raise UserError(f"{path}: half-written: run the same clipfh prepare again, it goes on where it stopped")
        raise UserError(f"{path}: not a catalogue (it has no catalogue.json): make one with clipfh prepare")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: can't be read ({error}): delete {path} and run clipfh prepare again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file}: not the manifest of a catalogue: make one with clipfh prepare")
    if (version := manifest.get("version")) != VERSION:
        raise UserError(
            f"{path}: a catalogue of version {version}, and this clipfh reads version {VERSION}: "
            "delete it and run clipfh prepare again"
        )
    sizes = path.files()
    for name, size in [shard for shards in manifest["shards"].values() for shard in shards.items()]:
        if sizes.get(name) != size:
            raise UserError(f"{path / name}: missing or cut short: delete {path} and run clipfh prepare again")
    return Catalogue(path, manifest)


def partial_folder(out: Folder) -> Folder:
    """The folder of a catalogue while it is made; in a bucket, which has no renames, it is `out` itself."""
    return Folder(f"{out}.partial") if out.is_local else out


def read_columns(path: str, columns: Sequence[str]) -> pa.Table:
    return store.open_parquet(path).read(list(columns)).replace_schema_metadata()
