"""Which heads authenticate a connection instead of a request."""

import pytest

from oncegate.messages.bound_authentication import challenge_binds_connection, request_binds_connection

HEAD = b"POST /a HTTP/1.1\r\nHost: api.test\r\n%s\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("scheme", [b"NTLM", b"Negotiate", b"ntlm", b"NEGOTIATE", b"Kerberos", b"Nego2", b"CredSSP"])
@pytest.mark.parametrize("line", [b"Authorization: %s YII=", b"authorization:%s", b"AUTHORIZATION: \t %s  YII="])
def test_a_request_with_such_a_scheme(scheme, line):
    """However the field and its scheme are spelled."""
    assert request_binds_connection(HEAD % (line % scheme))


@pytest.mark.parametrize(
    "line",
    [
        b"Authorization: Bearer NTLM",
        b"Authorization: Basic negotiate",
        b"Authorization: NTLMv9x",
        b"X-Authorization: NTLM a",
        b"X-Note: authorization: ntlm",
        b"X-Api-Key: negotiate",
    ],
)
def test_other_requests(line):
    """A token of another scheme may say anything, and so may other fields."""
    assert not request_binds_connection(HEAD % line)


@pytest.mark.parametrize(
    ("challenges", "binds"),
    [
        ([b"NTLM"], True),
        ([b"Negotiate oYG3"], True),
        ([b'Basic realm="a", NTLM'], True),
        ([b'Basic realm="a"', b"negotiate"], True),
        ([b'Bearer realm="negotiate"'], False),
        ([b"Basic realm=a, charset=NTLM"], False),
        ([b""], False),
        ([], False),
    ],
)
def test_challenges(challenges, binds):
    """One such challenge among others is enough."""
    assert challenge_binds_connection(challenges) is binds
