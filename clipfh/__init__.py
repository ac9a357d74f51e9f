"""clipfh tunes CLIP to find the same item again in a catalogue of photos.

Importing this package loads neither torch nor ray: the modules that need them import them when they run.
"""

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
