"""What can go wrong, as one tree. The command line turns it into one line and an exit code.

MaskDMError                 exit 1: the run failed
├── TrainingDiverged        the loss stayed non-finite
├── OutOfMemory             a training step does not fit the device
├── FederationError         no quorum, a lost server, a dead child process
├── GateRefused             the site's own gate stopped an outgoing message
└── UsageError              exit 2: something the user can put right
    ├── DataError           images that are missing, unreadable or of the wrong kind
    └── CheckpointError     a file that is not a whole MaskDM checkpoint

Interrupted                 exit 130: Ctrl-C or SIGTERM, after the state was saved
"""


class MaskDMError(Exception):
    """Any failure that MaskDM reports on purpose; the message names cause and remedy."""

    exit_code = 1


class TrainingDiverged(MaskDMError):
    """Too many steps in a row had a non-finite gradient."""


class OutOfMemory(MaskDMError):
    """A training step does not fit into the device's memory."""


class FederationError(MaskDMError):
    """The federation could not go on."""


class GateRefused(MaskDMError):
    """The site's outbound gate stopped a message; nothing was sent."""


class UsageError(MaskDMError):
    """A mistake in an option, a file or a folder that the user can put right."""

    exit_code = 2


class DataError(UsageError):
    """Images are missing, unreadable, too small, or of the wrong kind."""


class CheckpointError(UsageError):
    """A checkpoint is truncated, foreign, or does not fit the model it describes."""


class Interrupted(Exception):
    """The user asked to stop; what could be saved was saved."""

    exit_code = 130


def plain(text: str, longest: int = 200) -> str:
    """What others chose, as it may be shown: short, in one line, and without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text[:longest])
