"""What the commands on a store share: what their arguments name, the operator, and exit codes."""

import argparse
import os
import pwd
import socket
import sys
from enum import IntEnum

from oncegate.operating.decisions import Operator
from oncegate.operating.errors import OperatorError
from oncegate.operating.find_record import RecordName


class KeysExit(IntEnum):
    """The exit code of an `oncegate keys` command."""

    DONE = 0
    # Nothing was changed, or the store did not confirm the change.
    NOT_DONE = 1
    USAGE_ERROR = 2


def exit_code(error: OperatorError) -> KeysExit:
    """Return the exit code of a command that ended with this error."""
    return KeysExit.USAGE_ERROR if error.is_usage else KeysExit.NOT_DONE


def record_name(options: argparse.Namespace) -> RecordName:
    """Return what the arguments say of a record or a tenant; `--credential` reads its fields from standard input."""
    key, record_id = getattr(options, "key", None), getattr(options, "id", None)
    # Standard input, because every process of the machine can read the arguments.
    reads = options.credential and not record_id
    return RecordName(
        # A key may have bytes that are not UTF-8: Python passes those of an argument on as surrogates (PEP 383).
        key=None if key is None else key.encode("utf-8", "surrogateescape"),
        id=record_id or "",
        namespace=options.namespace or "",
        scope=options.scope or "",
        credential=sys.stdin.buffer.read().splitlines() if reads else None,
    )


def this_operator() -> Operator:
    """Return who runs this command."""
    return Operator(_user_name(), socket.gethostname())


def _user_name() -> str:
    """Return the name of who runs this command: `root`, or `alice as root` behind sudo."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        # A container may run as a user id without a name.
        name = str(os.getuid())
    sudo_user = os.environ.get("SUDO_USER")
    return f"{sudo_user} as {name}" if sudo_user else name
