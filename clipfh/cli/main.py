"""The command line: runs a command, turns errors into a line and an exit code, and answers signals."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from clipfh import LOST, causes, fixable
from clipfh.cli.options import parse
from clipfh.storage import layout

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHORT_OF = {
    "OutOfMemoryError": "Ray ended a process because its machine's memory was nearly full: run fewer at once "
    "(placement.concurrent, --workers), take smaller parts (--batch.chunk, --keep-gib), or end other programs",
    "OutOfDiskError": "Ray's memory for data is full, and so is the disk of its temporary folder, to which it would "
    "move data: free some of that disk, or set RAY_TMPDIR to a folder on another",
}
"""What Ray says by its errors of these names, and remedies."""

WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command and its arguments; None takes those of this process, and keeps the signal handlers to its end.

    Returns:
        0 on success, 2 on what the user can fix; the job's exit code with submit. Bugs are raised.
    """
    args = None
    try:
        with _signal_handlers(restore=argv is not None):
            args = parse(sys.argv[1:] if argv is None else argv)
            code = args.function(args) or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"clipfh: stopped; {_remedy(args)}", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if _is_told_to_end or stop.code == signal.SIGTERM:  # Ray waits for results, and leaves with a code of its own
            print(f"clipfh: told to end; {_remedy(args)}", file=sys.stderr)
            return 128 + signal.SIGTERM
        raise
    except Exception as error:
        line = explain(error, args)
        if line is None:
            raise
        print(f"clipfh: {' '.join(line.split())}", file=sys.stderr)
        return 2


def explain(error: BaseException, args: argparse.Namespace | None) -> str | None:
    """The one line for an error that the user can fix, wherever it stands in the chain of causes; None for a bug."""
    if line := fixable(error):
        return line
    for each in causes(error):
        if getattr(each, "errno", None) in NO_ROOM or any(os.strerror(code) in str(each) for code in NO_ROOM):
            where = getattr(each, "filename", None) or getattr(args, "out", None) or "what is written"
            return f"no room on disk for {where}: free some; {_remedy(args)}"
        if isinstance(each, WRONG_PATH) and each.filename and each.strerror:
            return f"{each.filename}: {each.strerror.lower()}: check the path"
    for name, line in SHORT_OF.items():
        if any(type(each).__name__ == name or f"ray.exceptions.{name}:" in str(each) for each in causes(error)):
            return f"{line}; {_remedy(args)}"
    cause = next((each for each in causes(error) if type(each).__name__ in LOST), None)
    return f"Ray lost a process or a node ({' '.join(str(cause).split())[:160]}): {_remedy(args)}" if cause else None


def _remedy(args: argparse.Namespace | None) -> str:
    """How to go on after a stop."""
    from clipfh.storage.store import Folder  # loads pyarrow, which `clipfh --help` does without

    out = Folder(getattr(args, "out", None) or ".")
    if any(out.exists(file) for file in (layout.RUN, layout.SWEEP)):
        return "the same command with --resume goes on from the last checkpoint"
    return "give the same command again"


@contextlib.contextmanager
def _signal_handlers(restore: bool) -> Iterator[None]:
    """Answer Ctrl-C and SIGTERM while the block runs; afterwards too, unless the handlers before are restored."""
    global _is_told_to_end
    _is_told_to_end = False
    before = {signal.SIGINT: signal.signal(signal.SIGINT, _stop), signal.SIGTERM: signal.signal(signal.SIGTERM, _end)}
    try:
        yield
    finally:
        if restore:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop(*_: object) -> None:
    """Ctrl-C: bring all to an end; a second one ends at once."""
    signal.signal(signal.SIGINT, _stop_at_once)
    raise KeyboardInterrupt


_is_told_to_end = False


def _end(number: int, *_: object) -> NoReturn:
    """SIGTERM, by which Slurm and Kubernetes announce the end."""
    global _is_told_to_end
    _is_told_to_end = True
    raise SystemExit(number)


def _stop_at_once(*_: object) -> NoReturn:
    os.write(sys.stderr.fileno(), b"\nclipfh: stopped at once\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
