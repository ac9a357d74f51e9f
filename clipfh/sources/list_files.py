"""Public retrieval data sets whose text files say what the items are: Stanford Online Products, CUB-200-2011."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from pyarrow import fs

from clipfh import UserError
from clipfh.sources.files import first_file, locate, read_lines
from clipfh.sources.listing import Listing, require_photo


def find_lists(store: fs.SubTreeFileSystem, folders: Iterable[str]) -> Callable[[], Listing] | None:
    """Function that reads the lists of one of these data sets in the first of `folders` with them; None if none has."""
    for folder in folders:
        inner = fs.SubTreeFileSystem(store.base_path + folder, store.base_fs) if folder else store
        for names, read in ((_EBAY.values(), read_online_products), ((_IMAGES, _CLASSES), read_birds)):
            if all(first_file(inner, name) for name in names):
                return partial(read, inner)
    return None


_EBAY = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}


def read_online_products(store: fs.SubTreeFileSystem) -> Listing:
    """Stanford Online Products (Song et al. 2016): a line an image with its number, item, category and path."""
    photos = []
    for split, file in _EBAY.items():
        for where, (_, item, _, path) in _lines(store, file, "image_id class_id super_class_id path"):
            category = path.partition("/")[0].removesuffix("_final")
            row = {"image_path": path, "item_id": item, "category": category, "split": split}
            photos.append(require_photo(row, where))
    return locate(store, photos, ["the items and splits are those of Ebay_train.txt and Ebay_test.txt"])


_IMAGES, _CLASSES = "images.txt", "image_class_labels.txt"


def read_birds(store: fs.SubTreeFileSystem) -> Listing:
    """CUB-200-2011. As is usual in retrieval, the first half of the classes is train and the other half test."""
    class_of = {image: int(label) for _, (image, label) in _lines(store, _CLASSES, "image_id class_id")}
    half, photos = max(class_of.values(), default=0) / 2, []
    for where, (image, path) in _lines(store, _IMAGES, "image_id path"):
        if image not in class_of:
            raise UserError(f"{where}: image {image} has no class in {_CLASSES}: get the whole file")
        split = "train" if class_of[image] <= half else "test"
        row = {"image_path": f"images/{path}", "item_id": path.partition("/")[0], "split": split}
        photos.append(require_photo(row, where))
    return locate(store, photos, ["items are the classes; the first half of them is train, as is usual in retrieval"])


def _lines(store: fs.SubTreeFileSystem, file: str, columns: str) -> Iterator[tuple[str, list[str]]]:
    """Place and fields of each line, without a line that names the columns. UserError: a field is missing."""
    count = len(columns.split())
    for number, line in enumerate(read_lines(store, file), start=1):
        where, fields = f"{store.base_path}{file} line {number}", line.split(None, count - 1)
        if fields and not (number == 1 and not fields[0].isdecimal()):
            if len(fields) != count or not all(field.isdecimal() for field in fields[:-1]):
                raise UserError(f"{where}: {line.strip()[:80]!r} is not '{columns}': fix it")
            yield where, fields
