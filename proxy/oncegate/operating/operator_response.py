"""The response that an operator gives for a key with an unknown outcome."""

from collections.abc import Sequence

from oncegate.operating.errors import usage_error
from oncegate.reconcile.answers import GivenResponse, given_response

OperatorResponse = GivenResponse


def operator_response(status: int, headers: Sequence[str], body: bytes) -> OperatorResponse:
    """Return the response that an operator describes. `headers`: lines `Name: value`. Raises OperatorError."""
    given = given_response(status, headers, body)
    if isinstance(given, str):
        raise usage_error(given)
    return given
