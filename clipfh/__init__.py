"""clipfh tunes CLIP to find the same item again in a catalogue of photos.

The functions `prepare`, `open_catalogue`, `audit`, `evaluate`, `train`, `sweep`, `export`, `embed` and `search` do what
the commands do. A function is loaded when it is first used, so importing this package loads neither torch nor ray.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipfh.data.catalogue import open_catalogue
    from clipfh.data.prepare import prepare
    from clipfh.retrieval.evaluate import evaluate
    from clipfh.retrieval.lookup import embed, search
    from clipfh.retrieval.review import audit
    from clipfh.sweep.run import sweep
    from clipfh.train.export import export
    from clipfh.train.run import train

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "audit",
    "embed",
    "evaluate",
    "export",
    "open_catalogue",
    "prepare",
    "search",
    "sweep",
    "train",
]

_MODULES = {
    "audit": "clipfh.retrieval.review",
    "embed": "clipfh.retrieval.lookup",
    "evaluate": "clipfh.retrieval.evaluate",
    "export": "clipfh.train.export",
    "open_catalogue": "clipfh.data.catalogue",
    "prepare": "clipfh.data.prepare",
    "search": "clipfh.retrieval.lookup",
    "sweep": "clipfh.sweep.run",
    "train": "clipfh.train.run",
}
"""The module of each public function."""


# Under `uv run`, Ray would otherwise pack the folder that the command is run in, and send it to every process
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


class _Package(ModuleType):
    """This package, whose public functions are loaded when they are first used.

    `train` and `sweep` name a function and a wing each. When a wing is first imported, the import system sets the wing
    as an attribute of its package. That would hide the function of the same name or not, depending on which was loaded
    first. So the assignment of a module is ignored: `clipfh.train` is always the function, and `from clipfh.train
    import driver` finds the wing, because the import system looks modules up in `sys.modules`.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong, where, remedy. Commands exit with 2."""


LOST = (
    "ActorDiedError",
    "ActorUnavailableError",
    "NodeDiedError",
    "ObjectLostError",
    "OwnerDiedError",
    "RaySystemError",
)
"""Names of Ray's errors for a process, node or object that is gone. The classes themselves would load Ray."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, also those in other processes."""
    if error is None:
        return
    yield error
    inner = [getattr(error, name, None) for name in ("cause", "controller_failure")]
    for cause in (*inner, *getattr(error, "worker_failures", {}).values(), error.__cause__ or error.__context__):
        yield from causes(cause)


def fixable(error: BaseException) -> str | None:
    """Return the message of the UserError that caused an error; None where no UserError did.

    Ray often has only the traceback's text of an error in another process, so the text is searched too.
    """
    for each in causes(error):
        if isinstance(each, UserError) and not hasattr(each, "cause"):
            return str(each)
        if line := re.search(r"^clipfh\.UserError: (.+)", str(each), re.MULTILINE):
            return line[1]
    return None
