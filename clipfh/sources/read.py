"""Makes a listing (which photos there are, of which item, and where) of a source in any form that people have.

Sources are In-Shop as distributed, the original system's processed metadata, folders of photos, CSV, JSON Lines and
Parquet files, and tar files; on a disk or at any URI that Arrow opens. Names and annotations are read, never an image.
"""

import posixpath
from operator import attrgetter
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from clipfh import UserError
from clipfh.sources import folders, inshop
from clipfh.sources.files import ARCHIVE_SUFFIXES, File, first_file, is_passed_over, printable, walk
from clipfh.sources.folders import read_folders
from clipfh.sources.list_files import find_lists
from clipfh.sources.listing import Listing, ReadOptions
from clipfh.sources.parquet_tables import read_parquet
from clipfh.sources.tables import read_csv, read_json_lines
from clipfh.sources.tar_shards import read_tars
from clipfh.storage import layout
from clipfh.storage.store import locate

_AS_IT_IS = ReadOptions()
MOSTLY = 10
"""How many times as large as the photos beside them Parquet and tar files are that hold the source."""


def read_source(source: str | Path, options: ReadOptions = _AS_IT_IS) -> Listing:
    """List the photos of a source: a path or a URI.

    A CSV, JSON Lines or Parquet file has the columns image_path (relative to the file) and item_id. It may have text,
    split, variant, view, gender, category, color, and a box: x, y, width, height. In place of image_path a Parquet file
    may have a column `image` with the images themselves.

    Raises:
        UserError: the source can't be read or contradicts its form, none of its images is there, or an option is for
            another form of source.
    """
    try:
        store, file = _open(str(source))
        return _read_file(store, file, options) if file else _read_folder(store, options)
    except UnicodeEncodeError as error:  # Arrow opens nothing with such a name
        raise UserError(f"{printable(error.object)}: has a name that is not UTF-8: rename it") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source}: can't be read ({' '.join(str(error).split())}): check --source") from error


def _open(source: str) -> tuple[fs.SubTreeFileSystem, str]:
    """The source's folder and, where the source is a file, its name."""
    base, path = locate(source) if "://" in source else (fs.LocalFileSystem(), Path(source).absolute().as_posix())
    kind = base.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise UserError(f"{source}: no such file or folder: check --source")
    folder, name = (path, "") if kind == fs.FileType.Directory else posixpath.split(path)
    return fs.SubTreeFileSystem(folder, base), name


def _read_file(store: fs.SubTreeFileSystem, name: str, options: ReadOptions) -> Listing:
    where, suffix = f"{store.base_path}{name}", posixpath.splitext(name)[1].lower()
    if suffix in (".csv", ".tsv", ".txt"):
        _require_for(where, inshop_boxes=options.inshop_boxes)
        return read_csv(store, name, options)
    _require_for(where, inshop_boxes=options.inshop_boxes, encoding=options.encoding)
    if suffix == ".jsonl":
        return read_json_lines(store, name, options)
    if suffix == ".parquet":
        return read_parquet(store, [name], options)
    if suffix == ".tar":
        _require_for(where, skip_bad_lines=options.skip_bad_lines)
        return read_tars(store, [name])
    remedy = (
        "unpack it and give the folder" if suffix in ARCHIVE_SUFFIXES else "give a .csv, .jsonl, .parquet or a folder"
    )
    raise UserError(f"{where}: not a source that can be read: {remedy} as --source")


def _require_for(where: str, **options: object) -> None:
    """Refuse an option that means nothing for this source."""
    if names := [name.replace("_", "-") for name, value in options.items() if value]:
        raise UserError(f"{where}: --{names[0]} is for another form of source: leave it out")


def _read_folder(store: fs.SubTreeFileSystem, options: ReadOptions) -> Listing:
    """List a folder by its form. In-Shop may lie one folder deeper, as its archive unpacks."""
    if first_file(store, layout.CATALOGUE):
        raise UserError(f"{store.base_path}: is a catalogue already: give it to evaluate, train or embed")
    where = store.base_path
    files = walk(store)
    deeper = sorted(
        {file.path.partition("/")[0] + "/" for file in files if file.path.isprintable() and "/" in file.path}
    )
    places = ["", *deeper]
    if place := inshop.find_partition(store, places):
        _require_for(where, encoding=options.encoding, skip_bad_lines=options.skip_bad_lines)
        folder, partition = place
        inner = fs.SubTreeFileSystem(store.base_path + folder, store.base_fs)
        return inshop.read_inshop(inner, partition, options.inshop_boxes)
    _require_for(where, encoding=options.encoding, inshop_boxes=options.inshop_boxes)
    return _read_plain_folder(store, files, places, options)


def _read_plain_folder(
    store: fs.SubTreeFileSystem, files: list[File], places: list[str], options: ReadOptions
) -> Listing:
    """List a folder that is not In-Shop: images in folders, else Parquet or tar shards."""
    for folder in ("metadata/", ""):
        if first_file(store, folder + "image_paths.json"):
            return inshop.read_processed(store, folder)
    inshop.require_partition(store, files)
    if read_lists := find_lists(store, places):
        _require_for(store.base_path, skip_bad_lines=options.skip_bad_lines)
        return read_lists()
    tables, tars = (_list_shards(files, suffix) for suffix in (".parquet", ".tar"))
    if images := folders.pass_over(files)[0]:
        _require_for(store.base_path, skip_bad_lines=options.skip_bad_lines)
        _refuse_pictures_beside(tables + tars, images, store.base_path)
        return read_folders(store, files)
    if tables:
        return read_parquet(store, [table.path for table in tables], options)
    _require_for(store.base_path, skip_bad_lines=options.skip_bad_lines)
    return read_tars(store, [tar.path for tar in tars]) if tars else read_folders(store, files)


def _list_shards(files: list[File], suffix: str) -> list[File]:
    its = (file for file in files if file.path.lower().endswith(suffix) and not is_passed_over(file.path))
    return sorted(its, key=attrgetter("path"))


def _refuse_pictures_beside(shards: list[File], images: list[File], where: str) -> None:
    """Refuse a few pictures, such as those of a README, beside shards that hold far more: these are the source."""
    if sum(shard.num_bytes for shard in shards) > MOSTLY * sum(image.num_bytes for image in images):
        raise UserError(
            f"{where}: {printable(shards[0].path)} and its like hold far more than the photos beside them, e.g. "
            f"{printable(images[0].path)}: move these away, or give the folder or file of one kind as --source"
        )
