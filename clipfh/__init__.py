"""clipfh tunes CLIP to find the same item again in a catalogue of photos.

Importing this package loads neither torch nor ray: the modules that need them import them when they run.
"""

import re
from collections.abc import Iterator

__version__ = "0.1.0"


class UserError(ValueError):
    """Something that the user can mend. The message is one line: what, where, remedy. Commands exit with 2."""


LOST = (
    "ActorDiedError",
    "ActorUnavailableError",
    "NodeDiedError",
    "ObjectLostError",
    "OwnerDiedError",
    "RaySystemError",
)
"""Ray's errors, by name, of something that went away: to have them would load Ray."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, also in other processes."""
    if error is None:
        return
    yield error
    inner = [getattr(error, name, None) for name in ("cause", "controller_failure")]
    for cause in (*inner, *getattr(error, "worker_failures", {}).values(), error.__cause__ or error.__context__):
        yield from causes(cause)


def mendable(error: BaseException) -> str | None:
    """What the UserError says that an error came of; None where it came of none.

    Of errors in other processes Ray often keeps the text of the traceback alone.
    """
    for each in causes(error):
        if isinstance(each, UserError) and not hasattr(each, "cause"):
            return str(each)
        if told := re.search(r"^clipfh\.UserError: (.+)", str(each), re.MULTILINE):
            return told[1]
    return None
