"""The ways in which this software fails on purpose.

What they say is shown, logged and recorded, and often holds text of others: it shows no secret of an address, and
commands no terminal.
"""

from yolov8_nas.credentials import redacted
from yolov8_nas.foreign import lines


class Said(Exception):
    """An error whose message is fit to be shown."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(told(part) if isinstance(part, str) else part for part in parts))


def told(text: object) -> str:
    """Text of an error, or of anything else that others had a hand in, as it may be shown and recorded."""
    return lines(redacted(str(text)))


class InputError(Said, ValueError):
    """Input that cannot be used: the message names the file, the value and the remedy.

    The command line prints it as one line and exits with status 2.
    """


class StageError(Said, RuntimeError):
    """A stage that ran as it should and ended in a result that must not ship.

    It is deterministic: running the same stage again gives the same answer, so it is recorded and not retried.
    """


class WaitingError(StageError):
    """A stage that cannot go on before something is done elsewhere: the message says what, and where.

    What it has done so far is kept, and the next run goes on from there.
    """


class NoRoomError(WaitingError):
    """A disk that is full, a quota that is used up, or a file that is larger than this process may write.

    What has been done is kept, and the same command goes on when there is room.
    """
