"""The arguments that describe a request: its header fields, its body, and what of them may not be an argument."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oncegate.operating.errors import usage_error
from oncegate.operating.request_identity import AskedRequest
from oncegate.settings.credentials import CREDENTIALS

# Every process of the machine can read the arguments of the others.
_SECRET = frozenset(name.lower() for name in (*CREDENTIALS, "Cookie", "Proxy-Authorization"))
STANDARD_INPUT = "-"


def add_header_arguments(command: Any, headers_file: str, header: str = "") -> None:
    """Add the options for header fields. `headers_file`, `header`: their help; empty for no option of single ones."""
    if header:
        command.add_argument("-H", "--header", action="append", default=[], metavar="'Name: value'", help=header)
    command.add_argument("--headers-file", metavar="FILE", help=headers_file)


def add_request_arguments(command: argparse.ArgumentParser, body_option: str = "--body-file") -> None:
    """Add the options for a whole request whose key is meant. `body_option`: the name of that of its body."""
    command.add_argument(
        "--request", metavar="'METHOD PATH'", help="the key of this request, as the rules make it; nothing is sent"
    )
    command.add_argument(
        body_option, dest="request_body", metavar="FILE", help="the body of that request; - is standard input"
    )


def header_lines(options: argparse.Namespace) -> list[bytes] | None:
    """Return the header fields that are given, as lines; None where no option gives any. Raises OperatorError."""
    given: list[str] = getattr(options, "header", None) or []
    for line in given:
        name = line.partition(":")[0].strip()
        if name.lower() in _SECRET:
            raise usage_error(
                f"-H would show {name} to every user of this machine: write it to standard input, one "
                "`Name: value` per line, with --headers-file -"
            )
    reads = getattr(options, "credential", False)
    name = STANDARD_INPUT if reads else options.headers_file
    if name is None and not given:
        return None
    lines = read_file(name).splitlines() if name else []
    return [*(line.encode("utf-8", "surrogateescape") for line in given), *(line for line in lines if line.strip())]


def read_file(name: str | None) -> bytes:
    """Return what is in a file, nothing for no name. Raises OperatorError."""
    try:
        if name == STANDARD_INPUT:
            return sys.stdin.buffer.read()
        return Path(name).read_bytes() if name else b""
    except OSError as error:
        raise usage_error(f"{name}: {error.strerror}") from None


def asked_request(line: Sequence[str], options: argparse.Namespace, body: str | None) -> AskedRequest:
    """Return the request that the options describe. `line`: method and URL. `body`: its file. Raises OperatorError."""
    if len(line) != 2:
        raise usage_error("a request is a method and a path, such as 'POST /v1/orders'")
    if body == options.headers_file == STANDARD_INPUT:
        raise usage_error("standard input can be the header fields or the body, not both: write one to a file")
    lines = [line.decode("utf-8", "surrogateescape") for line in header_lines(options) or []]
    return AskedRequest(line[0], line[1], lines, read_file(body))
