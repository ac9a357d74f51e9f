"""Parquet tables of photos, which lie in files or, as dataset hubs write them, inside the table itself."""

import json
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from clipfh import UserError
from clipfh.sources.files import locate, read_stamp
from clipfh.sources.listing import BOX_COLUMNS, COLUMNS, Listing, Photo, ReadOptions, split_named
from clipfh.sources.tables import TableRows, check_columns, column_names


def read_parquet(store: fs.SubTreeFileSystem, files: Sequence[str], options: ReadOptions) -> Listing:
    """List the rows of one or several Parquet files. Their images are files, or stand in a column `image`.

    Where there is no column item_id beside the images, items are the values of `label`, by their names. Where several
    files name no splits, theirs are in the files' names: `train-00000-of-00002.parquet`.
    """
    several, notes, num_unlabelled = len(files) > 1, dict[str, None](), 0
    rows = TableRows(store.base_path if several else store.base_path + files[0], options.skip_bad_lines)
    for file in files:
        with store.open_input_file(file) as stream:
            table = pq.ParquetFile(stream)
            columns = _choose_columns(table.schema_arrow, f"{store.base_path}{file}")
            notes |= dict.fromkeys(columns.notes)
            place = {"file": file, "stamp": read_stamp(store, file)} if columns.image else {}
            for number, part, row in _rows(table, columns):
                if columns.has_labels and row["item_id"] == UNLABELLED:
                    num_unlabelled += 1
                    continue
                row["image_path"] = row.get("image_path") or (file if place else "")
                row["split"] = row.get("split") or (split_of_shard(file) if several else "")
                where = f"{posixpath.basename(file)} row {number}" if several else f"row {number}"
                rows.add(where, row, **(place | {"part": part} if place else {}))
    if num_unlabelled:
        notes[f"{num_unlabelled:,} rows have the label {UNLABELLED}, which is none, and were left out"] = None
    return locate(store, name_inner(rows.photos), notes, rows.left_out())


UNLABELLED = -1
"""Label of a row without one, as dataset hubs write it."""


@dataclass(frozen=True)
class _Columns:
    """The columns of a Parquet file to read."""

    names: Mapping[str, str]
    """Column of the file to its name in COLUMNS."""
    image: str
    """Column of images that are inside the table; empty where images are files."""
    inner_path: str
    """Column of the paths that images inside once had; empty where there is none."""
    has_labels: bool
    """Whether items are the values of `label`."""
    labels: Mapping[Any, str]
    """Number of a label to its name."""
    notes: list[str]


def _choose_columns(schema: pa.Schema, where: str) -> _Columns:
    """UserError: a column is missing, there twice, or of another type."""
    names = column_names(schema.names)
    at = names.index("image") if "image" in names else -1
    is_inside = at >= 0 and holds_images(schema.field(at).type)
    item = "label" if is_inside and "item_id" not in names and "label" in names else "item_id"
    if at >= 0 and not is_inside and "image_path" not in names:
        raise UserError(
            f"{where}: column image holds {schema.field(at).type}: store the bytes of the files in it, as binary or as "
            "struct<bytes, path>, or their paths in image_path"
        )
    notes = check_columns(names, where, ("image" if is_inside else "image_path", item))
    notes += ["there is no item_id: items are the values of label"] if item == "label" else []
    ours = {*COLUMNS, item, *(BOX_COLUMNS if {*BOX_COLUMNS} <= {*names} else ())}
    columns = {field.name: name for field, name in zip(schema, names, strict=True) if name in ours}
    for column in columns:
        _check_type(schema.field(column), where)
    image = schema.names[at] if is_inside else ""
    has_path = (
        is_inside and pa.types.is_struct(schema.field(at).type) and schema.field(at).type.get_field_index("path") >= 0
    )
    renamed = {column: "item_id" if name == item else name for column, name in columns.items()}
    path, labels = f"{image}.path" if has_path else "", _label_names(schema, item)
    return _Columns(renamed, image, path, item == "label", labels, notes)


def _rows(table: pq.ParquetFile, columns: _Columns) -> Iterator[tuple[int, tuple[int, int], dict[str, Any]]]:
    """Number of each row, its row group and place there, and its fields by their names in COLUMNS."""
    names, number = [*columns.names, *filter(None, [columns.inner_path])], 0
    for group in range(table.num_row_groups):
        batches = table.iter_batches(row_groups=[group], columns=names)
        for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            number += 1
            fields = {name: row[column] for column, name in columns.names.items()}
            fields["item_id"] = columns.labels.get(fields["item_id"], fields["item_id"])
            if columns.inner_path:
                fields["image_path"] = fields.get("image_path") or (row[columns.image] or {}).get("path")
            yield number, (group, index), fields


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column holds encoded images, as Hugging Face's datasets write them, as plain bytes or as numbers."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return bool(pa.types.is_uint8(kind.value_type))
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return _has_field(kind, "bytes") or any(is_a(kind) for is_a in binary)


def _has_field(kind: pa.DataType, name: str) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index(name) >= 0


def _label_names(schema: pa.Schema, item: str) -> dict[Any, str]:
    """Number to name of a label, as Hugging Face's datasets keep them in the schema."""
    feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for key in ("info", "features", item):
        feature = feature.get(key) if isinstance(feature, dict) else None
    return dict(enumerate(feature.get("names") or [])) if isinstance(feature, dict) else {}


def split_of_shard(file: str) -> str:
    """The split in the name of a shard or its folder, `train-00000-of-00002.parquet`; empty where it names none."""
    folder, name = posixpath.split(file)
    return split_named(re.split(r"[-_.]", name)[0]) or split_named(posixpath.basename(folder))


def name_inner(photos: list[Photo]) -> list[Photo]:
    """Give images inside a file distinct paths: their own if distinct, else one with the file and the place."""
    counts = Counter(photo.path for photo in photos if photo.part)
    return [
        photo._replace(path=f"{photo.file}/{photo.part[0]}-{photo.part[1]}/{posixpath.basename(photo.path)}")
        if photo.part and counts[photo.path] > 1
        else photo
        for photo in photos
    ]


def _check_type(field: pa.Field, where: str) -> None:
    """A used column must hold text or numbers."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(is_a(kind) for is_a in (*text, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)):
        raise UserError(f"{where}: column {field.name} holds {kind}: store it as text")


# The images themselves

SUFFIX = ".parquet"
MOST_READS = 2
"""How often on average row groups are read before their images are gathered in a file."""
NOWHERE = (0, -1)
"""Place in a gathered file of a row without an image."""
_BATCH = 16


def stands_in_table(photo: Photo) -> bool:
    """Whether the photo's image stands inside a Parquet file."""
    return photo.part is not None and photo.file.lower().endswith(SUFFIX)


def iterate_images(store: fs.SubTreeFileSystem, file: str, group: int) -> Iterator[bytes | None]:
    """The images of a row group, encoded as they are; None for a row without one.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with store.open_input_file(file) as stream:
            table = pq.ParquetFile(stream)
            name = table.schema_arrow.names[column_names(table.schema_arrow.names).index("image")]
            for batch in table.iter_batches(_BATCH, row_groups=[group], columns=[name]):
                values = batch.column(0).to_pylist()
                images = (value["bytes"] if isinstance(value, dict) else value for value in values)
                yield from (bytes(image) if isinstance(image, list) else image for image in images)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{store.base_path}{file}: can't be read ({error}): get it whole and readable") from error


def is_scattered(photos: Iterable[Photo]) -> bool:
    """Whether images inside Parquet files, read in this order, would have row groups read again and again."""
    groups = [_group_of(photo) for photo in photos if stands_in_table(photo)]
    return sum(1 for _ in groupby(groups)) > MOST_READS * len(set(groups))


def _group_of(photo: Photo) -> tuple[str, int]:
    """File and row group of a photo in a table."""
    assert photo.part is not None
    return photo.file, photo.part[0]


@contextmanager
def gathered(
    store: fs.SubTreeFileSystem, photos: Iterable[Photo], folder: Path | None
) -> Iterator[tuple[fs.SubTreeFileSystem, Mapping[Photo, Photo]]]:
    """The images of photos in tables, one after another in a temporary file in `folder`: its folder, and their places.

    Each row group is read once, some images at a time. The file takes as much of the disk as the images do.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix="images-", suffix=".new") as file:
        moved, where = dict[Photo, Photo](), Path(file.name)
        for (table, group), its in groupby(sorted(photos, key=_group_of), key=_group_of):
            of_row = {photo.part: photo for photo in its}
            for row, image in enumerate(iterate_images(store, table, group)):
                if photo := of_row.get((group, row)):
                    part = NOWHERE if image is None else (file.tell(), file.write(image))
                    moved[photo] = photo._replace(file=where.name, part=part)
        file.flush()
        yield fs.SubTreeFileSystem(str(where.parent), fs.LocalFileSystem()), moved
