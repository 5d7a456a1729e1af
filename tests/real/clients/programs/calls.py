"""Runs calls of one client as they are ordered: a line of JSON comes for each, and a line with its result goes back.

An order has the `url` of the proxy, a `prompt`, the `key` to send or none, whether to `stream`, and `timeout_s`.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

# Frames of other libraries print as well: the results go to where standard output was.
RESULTS = sys.stdout
sys.stdout = sys.stderr


def headers(order: dict[str, Any]) -> dict[str, str]:
    """Return the header with the key of a call, if it has one."""
    return {"Idempotency-Key": order["key"]} if order["key"] else {}


def run(call: Callable[[dict[str, Any]], Any], package: str) -> None:
    """Say the version, then run one call for each order."""
    _say(version=version(package))
    for line in sys.stdin:
        try:
            answer = call(json.loads(line))
        except Exception as error:
            status = getattr(error, "status_code", None) or getattr(error, "code", None)
            status = status or getattr(error, "http_status", None)
            _say(error=type(error).__name__, status=status if isinstance(status, int) else None, text=str(error))
        else:
            _say(answer=answer)


def _say(**result: Any) -> None:
    print(json.dumps(result), file=RESULTS, flush=True)
