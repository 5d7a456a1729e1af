"""A stored body in a coding that the requester does not accept: when it is decoded, and what becomes of its head."""

import gzip
import random
import zlib

import pytest

from oncegate.adaptation.content_codings import (
    PIECE_BYTES,
    Decoder,
    Undecodable,
    accepts,
    coding_to_decode,
    decoded_block,
    may_be_coded,
)

GZIP = b"Content-Encoding: gzip\r\n"
BODY = random.Random(1).randbytes(3000) + b"a" * 500_000


@pytest.mark.parametrize(
    ("accepted", "gzip_too", "identity_too"),
    [
        ([b"gzip"], True, True),
        ([b"gzip, deflate, br"], True, True),
        ([b"br;q=1.0, X-GZIP;q=0.1"], True, True),
        ([b"identity"], False, True),
        ([b""], False, True),
        ([b"br", b"zstd"], False, True),
        ([b"gzip;q=0"], False, True),
        ([b"gzip;q=0.000, *"], False, True),
        ([b"gzip; q=0.001"], True, True),
        ([b"*"], True, True),
        ([b"*;q=0"], False, False),
        ([b"*;q=0, identity"], False, True),
        ([b"identity;q=0"], False, False),
        ([b"identity;q=0, gzip"], True, False),
        ([b"gzip;q=0, *;q=0.5, identity;q=0"], False, False),
    ],
)
def test_what_is_accepted(accepted, gzip_too, identity_too):
    """RFC 9110, section 12.5.3, weights, wildcards and old names included."""
    assert accepts(accepted, b"gzip") is accepts(accepted, b"x-gzip") is gzip_too
    assert accepts(accepted, b"identity") is identity_too
    wanted = b"gzip" if identity_too and not gzip_too else b""
    assert coding_to_decode(200, GZIP, accepted) == wanted


@pytest.mark.parametrize(
    ("status", "block", "wanted"),
    [
        (200, GZIP, b"gzip"),
        (500, b"content-encoding: X-GZip\r\nX: 1\r\n", b"x-gzip"),
        (200, b"CONTENT-ENCODING: deflate\r\n", b"deflate"),
        (200, b"Content-Encoding: br\r\n", b""),
        (200, b"Content-Encoding: zstd\r\n", b""),
        (200, b"Content-Encoding: gzip, gzip\r\n", b""),
        (200, GZIP + GZIP, b""),
        (200, GZIP + b"Cache-Control: private, no-transform\r\n", b""),
        (206, GZIP, b""),
        (200, GZIP + b"Content-Range: bytes 0-1/2\r\n", b""),
        (200, b"Vary: Accept-Encoding\r\n", b""),
        (200, b"", b""),
    ],
)
def test_what_is_decoded(status, block, wanted):
    """One coding that can be decoded, of a whole body that may be changed. Without Accept-Encoding nothing is."""
    assert coding_to_decode(status, block, [b"identity"]) == wanted
    assert coding_to_decode(status, block, None) == b""
    assert may_be_coded(block) or not wanted


def raw_deflate(body: bytes) -> bytes:
    coder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return coder.compress(body) + coder.flush()


@pytest.mark.parametrize(
    ("coding", "coded", "body"),
    [
        (b"gzip", gzip.compress(BODY), BODY),
        (b"x-gzip", gzip.compress(BODY[:1000]) + gzip.compress(BODY[1000:]) + b"\0" * 9, BODY),
        (b"gzip", gzip.compress(b""), b""),
        (b"gzip", b"", b""),
        (b"deflate", zlib.compress(BODY), BODY),
        (b"deflate", raw_deflate(BODY), BODY),
        (b"gzip", gzip.compress(b"a" * (4 * PIECE_BYTES)), b"a" * (4 * PIECE_BYTES)),
    ],
    ids=["gzip", "members", "empty", "nothing", "deflate", "raw deflate", "whole pieces"],
)
def test_a_body_is_decoded(coding, coded, body):
    """However the coded bytes come, and in pieces of a bounded size."""
    for size in (len(coded) or 1, 1000, 7, 1):
        decoder, pieces = Decoder(coding), list[bytes]()
        for at in range(0, len(coded), size):
            pieces += decoder.feed(coded[at : at + size])
        assert decoder.is_at_end
        assert b"".join(pieces) == body
        assert max(map(len, pieces), default=0) <= PIECE_BYTES


@pytest.mark.parametrize(
    ("coding", "coded"),
    [
        (b"gzip", b"no gzip at all"),
        (b"gzip", gzip.compress(BODY)[:-1]),
        (b"gzip", gzip.compress(BODY)[:-8] + bytes(8)),
        (b"gzip", gzip.compress(BODY) + b"more"),
        (b"deflate", zlib.compress(BODY) + b"more"),
        (b"deflate", b"\xff\xff"),
    ],
    ids=["no gzip", "cut", "another check", "rest", "rest of deflate", "no deflate"],
)
def test_a_damaged_body_is_noticed(coding, coded):
    """It is not taken for a whole one."""
    decoder = Decoder(coding)
    try:
        list(decoder.feed(coded))
    except Undecodable:
        return
    assert not decoder.is_at_end


def test_the_head_of_a_decoded_body():
    """What describes the coded bytes is left out, a strong tag becomes weak, and Vary names Accept-Encoding, once."""
    kept = b"Content-Type: text/plain\r\nX: 1\r\n"
    gone = (
        GZIP + b"content-length: 9\r\nAccept-Ranges: bytes\r\nContent-MD5: x\r\nDigest: x\r\nContent-Digest: x\r\n"
        b"Repr-Digest: x\r\n"
    )
    vary = b"Vary: Accept-Encoding\r\n"
    assert decoded_block(kept + gone) == kept + vary
    assert decoded_block(b'ETag: "a"\r\n' + gone) == b'ETag: W/"a"\r\n' + vary
    assert decoded_block(b'ETag: W/"a"\r\nVary: Origin\r\n') == b'ETag: W/"a"\r\nVary: Origin\r\n' + vary
    for known in (b"vary: origin, accept-encoding\r\n", b"Vary: *\r\n"):
        assert decoded_block(known + gone) == known
