"""Tables of photos: code for all of them, CSV as the spreadsheets of every country write it, JSON Lines."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pyarrow import fs

from clipfh import UserError
from clipfh.sources.files import SPELLINGS, below, locate, look, read_lines
from clipfh.sources.listing import (
    BAD_LINE,
    BOX_COLUMNS,
    COLUMNS,
    BadRow,
    LeftOut,
    Listing,
    Photo,
    ReadOptions,
    make_photo,
)

_SHOWN = 10


class TableRows:
    """Collects the photos of a table's rows, and the rows that can't be used."""

    def __init__(self, table: str, skip_bad: bool) -> None:
        self.table, self.skip_bad = table, skip_bad
        self.photos: list[Photo] = []
        self.bad: list[tuple[str, str]] = []

    def add(self, where: str, row: dict[str, Any], **more: Any) -> None:
        try:
            self.photos.append(make_photo(row)._replace(**more))
        except BadRow as error:
            self.bad.append((where, str(error)))

    def left_out(self) -> list[LeftOut]:
        """The bad rows, to leave out if `skip_bad`. Else a UserError names them."""
        if self.bad and not self.skip_bad:
            examples = "; ".join(f"{where}: {why}" for where, why in self.bad[:_SHOWN])
            more = f"; and {len(self.bad) - _SHOWN:,} more" if len(self.bad) > _SHOWN else ""
            raise UserError(f"{self.table} {examples}{more}: fix them, or leave them out by --skip-bad-lines")
        return [(f"{self.table} {where}", f"{BAD_LINE}: {why}") for where, why in self.bad]


# CSV


def read_csv(store: fs.SubTreeFileSystem, name: str, options: ReadOptions) -> Listing:
    """List the rows of a CSV file: any of the separators , ; tab |, and any encoding that can be made out."""
    with store.open_input_file(name) as file:
        data = file.read()
    table = f"{store.base_path}{name}"
    text, notes = _decode(store, data, table, options.encoding)
    text, separator, num_before = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines, rows = _lines(reader, num_before), TableRows(table, options.skip_bad_lines)
    where, header, error = next(lines, ("", [], ""))
    if error:
        raise UserError(f"{table} {where}: malformed ({error}): it names the columns, so fix it")
    columns = column_names(header)
    notes += check_columns(columns, table)
    for where, fields, error in lines:
        if error or len(fields) != len(columns):
            rows.bad.append((where, f"malformed ({error or f'{len(fields)} fields, not {len(columns)}'})"))
        else:
            rows.add(where, dict(zip(columns, fields, strict=True)))
    return locate(store, rows.photos, notes, rows.left_out())


def _lines(reader: Any, num_before: int) -> Iterator[tuple[str, list[str], str]]:
    """Last line, fields and error of each record. Empty records are passed over."""
    while True:
        try:
            fields, error = next(reader), ""
        except StopIteration:
            return
        except csv.Error as malformed:
            fields, error = [], str(malformed)
        if error or any(map(str.strip, fields)):
            yield f"line {reader.line_num + num_before}", fields, error


def _separator(text: str) -> tuple[str, str, int]:
    """The text without a line `sep=;`, as spreadsheets write it, the separator, and the number of lines taken off."""
    if match := re.match(r"sep=(.)\r?\n", text):
        return text[match.end() :], match[1], 1
    match = re.search(r".*\w.*", text)
    head = match[0] if match else ""
    headers = {sign: set(column_names(head.split(sign))) for sign in ",;\t|"}
    return text, max(headers, key=lambda sign: (len(headers[sign] & {*COLUMNS}), len(headers[sign]))), 0


def column_names(header: Sequence[str]) -> list[str]:
    """Names of columns as they are meant: the ones of COLUMNS in any case, with blanks and quotes around them.

    Without an image_path, the column that Hugging Face or open_clip use for it takes the name.
    """
    names = [name.strip().strip('"') for name in header]
    columns = (*COLUMNS, *BOX_COLUMNS, *_OTHER_PATHS)
    names = [name.casefold() if name.casefold() in columns else name for name in names]
    other = next((name for name in _OTHER_PATHS if name in names and "image_path" not in names), None)
    return ["image_path" if name == other else name for name in names]


_OTHER_PATHS = ("file_name", "filepath")


# JSON Lines


def read_json_lines(store: fs.SubTreeFileSystem, name: str, options: ReadOptions) -> Listing:
    """List a file with a JSON object a line, such as the `metadata.jsonl` of Hugging Face's image folders."""
    table = f"{store.base_path}{name}"
    rows, columns = TableRows(table, options.skip_bad_lines), dict[str, None]()
    for number, line in enumerate(read_lines(store, name), start=1):
        try:
            row = json.loads(line or "{}")
        except ValueError as error:
            row = str(error)
        if not isinstance(row, dict):
            rows.bad.append((f"line {number}", f"not a JSON object ({row!r:.80})"))
        elif row:
            names = column_names(list(row))
            columns |= dict.fromkeys(names)
            rows.add(f"line {number}", dict(zip(names, row.values(), strict=True)))
    return locate(store, rows.photos, check_columns(list(columns), table), rows.left_out())


_ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874"),
    *("mac_roman", "cp437", "cp850", "cp852", "cp857", "cp866", "koi8_r"),
    *("gb18030", "big5", "cp932", "euc_jp", "cp949"),
)


def _decode(store: fs.SubTreeFileSystem, data: bytes, table: str, encoding: str) -> tuple[str, list[str]]:
    """The text of a table, and a note where its encoding is other than UTF-8.

    An old encoding doesn't say which one it is. It is the first in which all files that the table names are there.
    """
    for certain in [encoding] if encoding else [*_utf16(data), "utf-8-sig"]:
        try:
            return data.decode(certain).removeprefix("\ufeff"), [] if certain == "utf-8-sig" else [
                f"the table is read as {certain}"
            ]
        except (UnicodeDecodeError, LookupError) as error:
            reason = str(error)
    if encoding:
        raise UserError(f"{table}: can't be read by --encoding {encoding} ({reason}): name its encoding")
    for guess in _ENCODINGS:
        if (text := _decode_bytes(data, guess)) and _names_files(store, text):
            return text, [f"the table is read as {guess}, in which the files that it names are there"]
    raise UserError(
        f"{table}: not UTF-8 ({reason}): save it as UTF-8, or name its encoding, e.g. --encoding cp1252 for one of "
        "Windows in western Europe"
    )


def _utf16(data: bytes) -> list[str]:
    if data[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return ["utf-32"]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return ["utf-16"]
    odd, even, few = data[1:400:2].count(0), data[:400:2].count(0), len(data[:400]) // 8
    return ["utf-16-le"] if odd > few else ["utf-16-be"] if even > few else []


def _decode_bytes(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return ""


def _names_files(store: fs.SubTreeFileSystem, text: str) -> bool:
    """Whether the text names files with letters beyond ASCII, of which the first hundred are there."""
    text, separator, _ = _separator(text)
    lines = _lines(csv.reader(io.StringIO(text, newline=""), delimiter=separator), 0)
    columns = column_names(next(lines, ("", [], ""))[1])
    at = columns.index("image_path") if "image_path" in columns else len(columns)
    paths = [row[at] for _, row, _ in lines if len(row) > at and not row[at].isascii()][:100]
    spelled = [[below(spelling(path), store.base_path) for spelling in SPELLINGS] for path in paths]
    return bool(paths) and all(any(look(store, filter(None, each))) for each in spelled)


def check_columns(names: Sequence[str], table: str, required: Sequence[str] = ("image_path", "item_id")) -> list[str]:
    """Notes on columns that are not used.

    Raises:
        UserError: a column that must be there is not, or a column is there twice.
    """
    ours = (*COLUMNS, *(BOX_COLUMNS if {*BOX_COLUMNS} <= {*names} else ()))
    if twice := [name for name in ours if names.count(name) > 1]:
        raise UserError(f"{table}: several columns are called {twice[0]}: keep one of them")
    if missing := {*required} - {*names}:
        header = ", ".join(names)[:200]
        remedy = "rename it" if {*names} & {*COLUMNS} else "call them so in its first line"
        raise UserError(f"{table}: no column {' or '.join(sorted(missing))} (found: {header}): {remedy}")
    unused = [name for name in names if name and name not in (*ours, *required)]
    return [f"columns that were not used: {', '.join(unused)}"] if unused else []
