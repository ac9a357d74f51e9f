"""File systems at URIs: opened with the usual credentials, waited for while they are away, written object by object.

Credentials are those of the environment, the configuration files or the machine's role, as AWS's and Google's own tools
take them. None is ever part of a URI, and so of a file or a log.
"""

from __future__ import annotations

import configparser
import functools
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as fs

from clipfh import UserError

PATIENCE = 600.0
"""Seconds for which a store that does not answer is waited for."""
QUIET = 5.0
"""Seconds of that before a line says so."""
PAUSES = (0.2, 10.0)
"""Seconds between two attempts: the first pause, which doubles, and the longest."""
CHUNK = 8 * 2**20
"""Bytes that are read or sent at a time."""

REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|INVALID_SIGNATURE|SIGNATURE_DOES_NOT_MATCH|"
    r"UNRECOGNIZED_CLIENT|MISSING_AUTH|NOT_INITIALIZED|EXPIRED|HTTP status (?!408|429)4\d\d|"
    r"PERMISSION_DENIED|UNAUTHENTICATED|Bucket .* not found|specified bucket does not exist"
)
"""Words of a store's errors that say no: waiting does not help."""

OF_THE_STORE = re.compile(r"AWS Error|HTTP status|google::cloud|curl|timed? ?out|connect|unavailable|temporar", re.I)
"""Words of errors that come from a store or from the way there. Others tell of what was asked for."""

T = TypeVar("T")


def locate(uri: str) -> tuple[fs.FileSystem, str]:
    """File system of a URI, and the path there.

    Raises:
        UserError: no file system takes it, or it holds credentials.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    user, at, _ = bucket.rpartition("@")
    if at and (":" in user or scheme not in ("abfs", "abfss")):  # these name a container there
        raise UserError(
            f"{scheme}://...@...: credentials in an address end up in logs: set them as the store's own tools take "
            "them, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    # Where there are no buckets, paths are absolute
    is_rooted = scheme in ("hdfs", "viewfs") or (not bucket and scheme.startswith("fsspec+"))
    filesystem, root = _open(scheme, bucket, endpoint() if scheme == "s3" else "")
    inside = "/".join(part for part in ("" if is_rooted else root, *path.split("/")) if part)
    return filesystem, f"/{inside}" if is_rooted else inside


@functools.lru_cache(maxsize=32)
def _open(scheme: str, bucket: str, endpoint_url: str) -> tuple[fs.FileSystem, str]:
    """The file system of all addresses that begin alike, and the path of that beginning."""
    if scheme == "s3":
        base, root = _open_s3(endpoint_url), bucket
    else:
        try:
            base, root = fs.FileSystem.from_uri(f"{scheme}://{bucket}")
        except pa.ArrowInvalid:
            base, root = _open_by_fsspec(scheme, bucket)
    return fs.PyFileSystem(Patient(base, f"{scheme}://{bucket}")), root


@functools.lru_cache(maxsize=4)
def _open_s3(endpoint_url: str, for_large_files: bool = False) -> fs.S3FileSystem:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint_url and not region:
        region = _profile().get("region", "us-east-1")
    # A small object in one request, and not in the three of an upload in parts
    how: dict[str, Any] = {"allow_delayed_open": not for_large_files, "connect_timeout": 10.0, "request_timeout": 60.0}
    return fs.S3FileSystem(endpoint_override=endpoint_url or None, region=region, **how)


def endpoint() -> str:
    """Address of a store that speaks S3, where one is named as AWS's tools take it; else empty, for AWS itself."""
    addresses = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    return next((each for each in addresses if each), "") or _profile().get("endpoint_url", "")


def _profile() -> dict[str, str]:
    """The profile in use of AWS's configuration file."""
    file = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    name = os.environ.get("AWS_PROFILE") or "default"
    parser = configparser.RawConfigParser()
    parser.read(file)
    section = name if name == "default" else f"profile {name}"
    return dict(parser.items(section)) if parser.has_section(section) else {}


def _open_by_fsspec(scheme: str, bucket: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(f"{scheme}://{bucket}")
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{scheme}://{bucket}: no file system for it ({error}): s3://, gs:// and abfs:// are built in"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), root


class Patient(fs.FileSystemHandler):
    """A file system in which each operation is tried again while the store fails, for up to `PATIENCE`.

    A file is sent whole when it is closed, so what is there is never half of one.

    Args:
        base: the file system.
        name: of the store, for people.
    """

    def __init__(self, base: fs.FileSystem, name: str) -> None:
        self.base, self.name = base, name
        self.has_folders = not isinstance(base, fs.S3FileSystem | fs.GcsFileSystem)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patient) and (self.base, self.name) == (other.base, other.name)

    __hash__ = None  # type: ignore[assignment]

    def _try(self, work: Callable[..., T], *args: Any) -> T:
        return patiently(work, *args, name=self.name)

    def get_type_name(self) -> str:
        return str(self.base.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.base.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self._try(self.base.get_file_info, paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self._try(self.base.get_file_info, selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        if self.has_folders:
            self._try(lambda: self.base.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._try(_unless_gone, self.base.delete_dir, path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._try(_unless_gone, self.base.delete_dir_contents, path)

    def delete_root_dir_contents(self) -> None:
        raise PermissionError(f"{self.name}: a whole store is not emptied")

    def delete_file(self, path: str) -> None:
        self._try(_unless_gone, self.base.delete_file, path)

    def move(self, src: str, dest: str) -> None:
        self._try(self.base.move, src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._try(self.base.copy_file, src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(io.BufferedReader(_RemoteFile(self, path), CHUNK), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_RemoteFile(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Upload(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError(f"{self.name}: objects do not grow: write them whole")

    def read_whole(self, path: str) -> bytes:
        """Content of a file, of one version, also where another one takes its place meanwhile.

        Arrow asks for the size first, and then for that number of bytes. If the object is another one by then, it gets
        the first bytes of a longer one, or a shorter one with whatever lay in memory behind it.
        """
        while True:
            with _RemoteFile(self, path) as file:
                content = file.read()
            if self.get_file_info([path])[0].size in (None, len(content)):  # some stores of fsspec tell no size
                return content

    def send(self, file: Path, path: str) -> None:
        """Send a local file."""
        self._try(self._send, file, path)

    def _send(self, file: Path, path: str) -> None:
        # Not by `copy_files`, which passes over the error of the last request, that of closing the stream. In one call,
        # since Ctrl-C between two would close the stream too, which sends what it has by then
        is_large = isinstance(self.base, fs.S3FileSystem) and file.stat().st_size > CHUNK
        # An upload in parts that can't be begun later, by the first part, would send an empty object as it is closed
        base = _open_s3(endpoint(), for_large_files=True) if is_large else self.base
        with pa.memory_map(str(file)) as content, base.open_output_stream(path) as object_:
            object_.write(content.read_buffer())

    def fetch(self, path: str, file: Path) -> None:
        """Fetch a file to a local one."""
        self._try(lambda: fs.copy_files(path, str(file), self.base, fs.LocalFileSystem(), chunk_size=CHUNK))


class Holding(Patient):
    """`Patient`, where a folder is known to be there: to ask the store would list it.

    Args:
        base: the file system.
        name: of the store, for people.
        folder: path of the folder.
    """

    def __init__(self, base: fs.FileSystem, name: str, folder: str) -> None:
        super().__init__(base, name)
        self.folder = folder

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        if paths == [self.folder]:
            return [fs.FileInfo(self.folder, fs.FileType.Directory)]
        return super().get_file_info(paths)


def _unless_gone(delete: Callable[[str], None], path: str) -> None:
    """Delete what may be gone already, such as by an attempt whose answer was lost."""
    try:
        delete(path)
    except FileNotFoundError:
        return


class _RemoteFile(io.RawIOBase):
    """A file at a URI, to read from any place."""

    def __init__(self, store: Patient, path: str) -> None:
        self.store, self.at = store, 0
        self.file = store._try(store.base.open_input_file, path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at}.get(whence)
        self.at = offset + (self.file.size() if start is None else start)
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.file.size() - self.at)
        content = self.store._try(self.file.read_at, rest if size is None or size < 0 else min(size, rest), self.at)
        self.at += len(content)
        return bytes(content)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _Upload(io.RawIOBase):
    """A file at a URI, which is sent when it is closed."""

    def __init__(self, store: Patient, path: str) -> None:
        self.store, self.path = store, path
        self.content = tempfile.NamedTemporaryFile(prefix="clipfh-")  # noqa: SIM115  closed in `close`

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self.content.write(content)

    def tell(self) -> int:
        return self.content.tell()

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self.content:
                self.content.flush()
                self.store.send(Path(self.content.name), self.path)


def patiently(work: Callable[..., T], *args: Any, name: str, patience: float | None = None) -> T:
    """Return what work comes to; while the store does not answer, try again.

    Args:
        work: what to do, as often as it takes.
        args: its arguments.
        name: of the store, for people.
        patience: seconds, in place of `PATIENCE`.

    Raises:
        UserError: the store refuses, or does not come back.
    """
    began, pause, is_told = time.monotonic(), PAUSES[0], False
    patience = PATIENCE if patience is None else patience
    while True:
        try:
            result = work(*args)
        except Exception as error:
            if not _is_of_the_store(error):
                raise
            reason, waited = _reason(error), time.monotonic() - began
            if REFUSED.search(str(error)):
                raise UserError(
                    f"{name} refuses ({reason}): check the address, the credentials and their rights"
                ) from error
            if waited > patience:
                raise UserError(
                    f"{name} has not answered for {waited:.0f} s ({reason}): bring it back or check the address "
                    "(AWS_ENDPOINT_URL, for a store of your own), then give the same command again, with --resume "
                    "where it trains"
                ) from error
            if waited > QUIET and not is_told:
                _tell(f"{name} does not answer ({reason}): waits for it, for up to {_duration(patience)}")
                is_told = True
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
        else:
            if is_told:
                _tell(f"{name} answers again, after {time.monotonic() - began:.0f} s")
            return result


def _is_of_the_store(error: Exception) -> bool:
    """Whether an error comes from a store, or from the way there: httpx, which reaches hf://, has errors of its own."""
    names = {cls.__name__ for cls in type(error).__mro__}  # of httpx or httpx2, which need not be there
    if {"ConnectionError", "TimeoutError", "TransportError"} & names:
        return True
    return isinstance(error, OSError) and not error.errno and bool(OF_THE_STORE.search(str(error)))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """What the store said, without numbers of requests."""
    words = " ".join(str(error).split()).partition("AWS Error ")
    return re.sub(r" ?\(Request ID:.*?\)", "", words[2] or words[0])[:160]
