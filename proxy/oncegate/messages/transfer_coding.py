"""The transfer codings of a request's body: which are refused as unknown, and which as malformed. Pure."""

import re
from collections.abc import Sequence

UNKNOWN = "the only transfer coding understood is chunked"
# The values of Transfer-Encoding in the bytes of a head.
values_in = re.compile(rb"\ntransfer-encoding:[ \t]*([^\r\n]*)", re.IGNORECASE).findall
_CODING = re.compile(rb"([!#$%&'*+.^_`|~0-9a-z-]+)(?:[ \t]*;[^,]*)?")


def are_unknown(values: Sequence[bytes]) -> bool:
    """Return whether codings are well-formed, and some unknown: they get 501 (RFC 9112, section 6.1).

    Chunked may be there as the last one alone: else nobody can tell where the body ends (section 6.3).
    """
    codings = [member.strip(b" \t") for member in b",".join(values).lower().split(b",")]
    names = [coding[1] if (coding := _CODING.fullmatch(member)) else b"" for member in codings]
    if codings and codings[-1] == b"chunked":
        names.pop()
    return bool(names) and b"" not in names and b"chunked" not in names
