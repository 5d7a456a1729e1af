"""What the commands on a store share: what their arguments name, the operator, and exit codes."""

import argparse
import os
import pwd
import socket
from enum import IntEnum

from oncegate.commands.described_request import asked_request, header_lines
from oncegate.operating.decisions import Operator
from oncegate.operating.errors import OperatorError, usage_error
from oncegate.operating.find_record import RecordName
from oncegate.operating.request_identity import AskedRequest


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
    """Return what the arguments say of a record or a tenant. Raises OperatorError where they say two things."""
    given = {name: getattr(options, name, None) or "" for name in ("id", "note", "rule", "path", "request")}
    keys, request = getattr(options, "key", None) or [], _request(options, given["request"])
    named = [name for name in ("id", "note", "request") if given[name]]
    if len(named) > 1 or (named and (keys or given["rule"])):
        raise usage_error("name a record in one way: a key, --rule with values, --id, --note or --request")
    return RecordName(
        # A key may have bytes that are not UTF-8: Python passes those of an argument on as surrogates (PEP 383).
        values=[key.encode("utf-8", "surrogateescape") for key in keys],
        id=given["id"],
        note=given["note"],
        rule=given["rule"],
        path=given["path"],
        request=request,
        namespace=options.namespace or "",
        scope=options.scope or "",
        credential=None if named else header_lines(options),
    )


def _request(options: argparse.Namespace, described: str) -> AskedRequest | None:
    if not described:
        return None
    return asked_request(described.split(maxsplit=1), options, options.request_body)


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
