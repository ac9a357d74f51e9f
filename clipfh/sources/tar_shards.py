"""Tar files of photos: a tree of item folders that was packed, or samples as WebDataset writes them."""

import json
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pyarrow import fs

from clipfh import UserError
from clipfh.sources.files import File, is_image, locate, printable, read_stamp
from clipfh.sources.folders import below_split, note_splits, pass_over, split_folders
from clipfh.sources.listing import BadRow, LeftOut, Listing, Photo, make_photo
from clipfh.sources.parquet_tables import split_of_shard

NO_IMAGE = "a sample without an image"
_FIELDS = {"cls": "item_id", "txt": "text"}
"""Suffix of a file of a WebDataset sample, and what it holds. Its `json` holds fields by their own names."""


def read_tars(store: fs.SubTreeFileSystem, files: Sequence[str]) -> Listing:
    """List the images in uncompressed tar files, which are read in place.

    Files whose names are equal up to the first dot are a sample, whose `.json` has item_id and further columns, or
    whose `.cls` is its item and whose `.txt` its text. The item of an image without these is its folder. Splits come
    from folders, or from the shards' names: `train-0000.tar`.
    """
    photos, left_out, notes = list[Photo](), list[LeftOut](), dict[str, None]()
    of_shard = {file: split_of_shard(file) for file in files}
    split_of = of_shard if len({*of_shard.values()}) > 1 and all(of_shard.values()) else {}
    for file in files:
        its_photos, imageless = _read_tar(store, file, notes)
        photos += [photo._replace(split=photo.split or split_of.get(file, "")) for photo in its_photos]
        left_out += [(f"{file}/{printable(key)}", NO_IMAGE) for key in imageless]
    return locate(store, photos, notes, left_out)


def _read_tar(store: fs.SubTreeFileSystem, file: str, notes: dict[str, None]) -> tuple[list[Photo], list[str]]:
    """The photos of a tar file, and the keys of samples without an image."""
    where, stamp = f"{store.base_path}{file}", read_stamp(store, file)
    with store.open_input_file(file) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                members, num_links = _list_members(tar)
                texts = {
                    name: _read_field(tar, members[name]) for name in members if _suffix(name) in ("json", *_FIELDS)
                }
        except tarfile.TarError as error:
            raise UserError(f"{where}: not a whole, uncompressed tar file ({error}): unpack it") from error
    images, others = pass_over(File(name, "") for name in members if name not in texts)
    base, splits = split_folders(images)
    links = [f"{file}: {num_links:,} links were passed over: pack the files themselves"] if num_links else []
    notes |= dict.fromkeys([*others, *links, *note_splits(base, splits)])
    samples: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, text in texts.items():
        samples[_key(name)] |= _fields(text, name, where)
    photos = []
    for image in images:
        member = members[image.path]
        split, path = below_split(image.path, base, splits)
        row = {"item_id": printable(posixpath.dirname(path)), "split": split, **samples[_key(image.path)]}
        row |= {"image_path": f"{file}/{printable(image.path)}"}
        try:
            photo = make_photo(row)
        except BadRow as error:
            raise UserError(
                f"{where}, {image.path}: {error}: a sample needs an item_id in its .json, or a .cls, or a folder"
            ) from error
        photos.append(photo._replace(file=file, stamp=stamp, part=(member.offset_data, member.size)))
    with_image = {_key(image.path) for image in images}
    return photos, [key for key, fields in samples.items() if "item_id" in fields and key not in with_image]


def _list_members(tar: tarfile.TarFile) -> tuple[dict[str, tarfile.TarInfo], int]:
    """The files in a tar by their names, and the number of other links. A hard link is the file that it leads to."""
    members, num_links = dict[str, tarfile.TarInfo](), 0
    for member in tar:
        file = members.get(member.linkname.removeprefix("./")) if member.islnk() else member
        if file and file.isfile():
            members[member.name.removeprefix("./")] = file
        num_links += member.issym() or not file
    return members, num_links


def _suffix(name: str) -> str:
    return "" if is_image(name) else name.rpartition("/")[2].rpartition(".")[2].lower()


def _key(name: str) -> str:
    """The key that the files of a sample share: the path up to the first dot of the name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _read_field(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None  # it is a file
    return file.read().decode("utf-8-sig", "replace")


def _fields(text: str, name: str, where: str) -> dict[str, Any]:
    """Fields of a sample, by the names of a table's columns."""
    if (suffix := _suffix(name)) in _FIELDS:
        return {_FIELDS[suffix]: text.strip()}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}, {name}: not valid JSON ({error}): fix it") from error
    if not isinstance(fields, dict):
        return {}
    return {key: value for key, value in fields.items() if isinstance(value, str | int | float)}
