"""The exit codes of `oncegate keys`, and the error with which it stops."""

from enum import IntEnum


class KeysExit(IntEnum):
    """The exit code of an `oncegate keys` command."""

    DONE = 0
    # Nothing was changed, or the store did not confirm the change.
    NOT_DONE = 1
    USAGE_ERROR = 2


class CommandError(Exception):
    """Why a command stops without a change. The text is for the operator, `code` for the shell."""

    def __init__(self, text: str, code: KeysExit = KeysExit.NOT_DONE) -> None:
        super().__init__(text)
        self.code = code


def usage_error(text: str) -> CommandError:
    """Return the error for arguments that make no sense."""
    return CommandError(text, KeysExit.USAGE_ERROR)
