"""`oncegate drain`: the proxy on this machine gets no new clients, and serves those that it has until SIGTERM."""

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from oncegate.server.control import socket_path
from oncegate.settings.settings import Settings

# How long the proxy may take to answer: with several workers, each of them is asked.
ANSWER_S = 5.0
# Longer than any grace period.
MAX_WAIT_S = 86_400.0
FAILED = 1


def run(settings: Settings, wait_s: float) -> int:
    """Begin the drain, wait for `wait_s` seconds or until the proxy ends, and return the exit code."""
    path = socket_path(settings)
    if path is None:
        print("ONCEGATE_RUN_DIR: is not set; the proxy needs it, too, to be reached by this command", file=sys.stderr)
        return FAILED
    ends = time.monotonic() + min(wait_s, MAX_WAIT_S)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(str(path))
            _print(_drain(connection))
            if _has_ended(connection, ends):
                print("the proxy has ended")
            elif wait_s:
                _print(_drain(connection))
    except (OSError, ValueError) as error:
        print(_failure(path, error), file=sys.stderr)
        return FAILED
    return 0


def _drain(connection: socket.socket) -> dict[str, Any]:
    """Send the command and return the answer. Raises OSError, and ValueError where the answer is none."""
    connection.settimeout(ANSWER_S)
    connection.sendall(b"drain\n")
    with connection.makefile("rb") as lines:
        answer: dict[str, Any] = json.loads(lines.readline())
    return answer


def _has_ended(connection: socket.socket, ends: float) -> bool:
    """Wait until the proxy closes the connection, or until a moment of the monotonic clock."""
    while (left_s := ends - time.monotonic()) > 0:
        connection.settimeout(left_s)
        try:
            return not connection.recv(1)
        except TimeoutError:
            continue
    return False


def _print(progress: dict[str, Any]) -> None:
    print(
        f"draining: {progress['in_flight']} requests in flight, {progress['connections']} connections open", flush=True
    )


def _failure(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "no answer in time"
    return f"no proxy answers at {path}: {reason}"
