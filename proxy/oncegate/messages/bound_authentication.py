"""Authentication that holds for a connection, not for a request: whoever uses the connection next is that user. Pure.

NTLM and Negotiate (RFC 4559) authenticate a connection, against HTTP's rule that each request stands for itself
(RFC 9110, section 3.3).
"""

import re
from collections.abc import Iterable

_SCHEMES = rb"(?:ntlm|negotiate|kerberos|nego2|credssp)\b"
# A value of Authorization that authenticates a connection, as an expression.
BINDING_FORM = rb"(?i:%b)" % _SCHEMES
_in_request_head = re.compile(rb"\nauthorization:[ \t]*" + _SCHEMES, re.IGNORECASE).search
_in_challenges = re.compile(rb"(?:^|,)[ \t]*" + _SCHEMES, re.IGNORECASE).search


def request_binds_connection(head: bytes) -> bool:
    """Return whether a request's head, as it goes to the upstream, authenticates its connection."""
    return _in_request_head(head) is not None


def challenge_binds_connection(challenges: Iterable[bytes]) -> bool:
    """Return whether one of the challenges of WWW-Authenticate is for a whole connection."""
    return any(_in_challenges(challenge) is not None for challenge in challenges)
