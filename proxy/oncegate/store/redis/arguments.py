"""The arguments of the scripts about records, as RESP bulk strings.

Each function names its script and the number of arguments that it writes after the tag. The header of the script says
what they mean.
"""

import os
import struct
from dataclasses import replace

from oncegate.decision import HOLD
from oncegate.store.kept import of_complete
from oncegate.store.record import TOKEN_BYTES, Claim, StoredResponse, pack
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding
from oncegate.store.redis.layouts.packed import TERMS_BYTES, pack_complete, pack_unknown, terms_begin
from oncegate.store.redis.talk import Question, call
from oncegate.store.redis.wire import NUMBER, SIZE, Script, resp
from oncegate.store.stages import CLAIMED

# About how much of a larger body one `read` returns.
READ_BYTES = 262144

# RESP headers of bulk strings whose sizes are fixed: tokens and digests have 16 bytes, a self check has 32.
_16, _NEXT_16 = b"$16\r\n", b"\r\n$16\r\n"
# Behind the fixed part of a claim's terms: the length of its numbered fields.
_COUNT = struct.Struct(">H")
_PUT, _STORE, _RELEASE, _UNKNOWN = resp(b"put"), resp(b"store"), resp(b"release"), resp(b"unknown")

CLAIM_COUNT, APPEND_COUNT, APPEND_HEAD_COUNT, RENEW_COUNT, READ_COUNT, FOLLOW_COUNT = 7, 5, 6, 5, 3, 4
PUT_COUNT, STORE_COUNT, RELEASE_COUNT, MARK_UNKNOWN_COUNT = 5, 10, 4, 11
RESOLVE_COUNT, RELEASE_BY_OPERATOR_COUNT, DROP_COUNT, POST_COUNT, SWAP_COUNT = 8, 5, 4, 2, 3

# The layout that a script writes, or looks for first, by whether it is the packed one.
LAYOUT = {False: b"hash", True: b"packed"}

# By mode, lease_ms and unknown_retention_ms of a claim, and the size of its numbered fields: the beginning of its
# terms, and its retention as a bulk string. There is one entry for each policy and size.
_terms: dict[tuple[bytes, int, int, int], tuple[bytes, bytes]] = {}


def claim_head(claim: Claim) -> bytes:
    """Return the arguments of `claim` before its deadline. The node that executes the claim writes the deadline."""
    # A claim may end unknown without anybody to say so, so that its record has to last as long as an unknown one.
    mode, lease_ms, retention_ms = claim.mode, claim.lease_ms, claim.unknown_retention_ms
    more = claim.kept
    terms = _terms.get((mode, lease_ms, retention_ms, len(more)))
    if terms is None:
        begin = b"\r\n" + SIZE[TERMS_BYTES + len(more)] + terms_begin(mode, lease_ms)
        terms = _terms[mode, lease_ms, retention_ms, len(more)] = begin, b"\r\n" + resp(retention_ms)
    begin, end = terms
    # Joined here: this takes 15k instructions less than writing word by word (measured).
    return b"".join((_16, claim.token, begin, claim.self_check, claim.fingerprint, _COUNT.pack(len(more)), more, end))


def claim_tail(packed: bool, window_ms: int, expected_token: bytes) -> bytes:
    """Return the arguments of `claim` after the deadline.

    `packed`: which layout the record gets. `expected_token`: the claim may take over a record that is open and has this
    token; empty for none.
    """
    return b"\r\n" + resp(LAYOUT[packed], window_ms, expected_token)


def resend_tail(packed: bool, expected_token: bytes) -> bytes:
    """Return the same for a claim whose request is sent once more: a record in the mode hold is open to it, too."""
    return claim_tail(packed, 0, expected_token + b"h")


# The tail of a first try for a key that is not derived, by whether its record is packed.
FIRST_TAIL = {packed: claim_tail(packed, 0, b"") for packed in (False, True)}


def unowned_claim(key: bytes, lease_ms: int) -> Claim:
    """Return a claim whose token nobody has."""
    return Claim(
        key=key,
        token=bytes(TOKEN_BYTES),
        fence=b"",
        mode=b"",
        fingerprint=bytes(16),
        self_check=bytes(32),
        created_ms=0,
        lease_ms=lease_ms,
        retention_ms=0,
        unknown_retention_ms=0,
    )


def peek(unowned: Claim, packed: bool) -> bytes:
    """Return the arguments of a `claim` whose deadline has passed: it reads the record and changes nothing."""
    return claim_head(unowned) + b"$1\r\n0" + FIRST_TAIL[packed]


def put(claim: Claim, response: StoredResponse, body: bytes) -> bytes | None:
    """Return the arguments of `settle` for a response whose body is one small piece: PUT_COUNT. None for any other."""
    if (
        not response.body_stored
        or len(body) != response.size
        or (value := pack_complete(claim, response, body)) is None
    ):
        return None
    number = NUMBER
    head = (_16, claim.token, b"\r\n", _PUT, number[claim.retention_ms], SIZE[len(value)], value, b"\r\n")
    return b"".join((*head, number[claim.tombstone_ms]))


def store(claim: Claim, response: StoredResponse, last_chunk: bytes) -> bytes:
    """Return the arguments of `settle` for a response: STORE_COUNT."""
    meta, number, size = pack(claim, response), NUMBER, SIZE
    # The script expects no chunks where the body is not stored.
    counts = number[response.chunks] + number[response.size] if response.body_stored else number[0] * 2
    chunk_size = size[len(last_chunk)]
    head = (_16, claim.token, b"\r\n", _STORE, number[claim.retention_ms], size[len(meta)], meta)
    tail = (counts, chunk_size, last_chunk, b"\r\n", number[claim.tombstone_ms], resp(of_complete(claim.kept)))
    return b"".join((*head, _NEXT_16, response.digest, b"\r\n", *tail))


def release(claim: Claim, packed: bool = False) -> bytes:
    """Return the arguments of `settle` that free the key: RELEASE_COUNT."""
    return b"".join((_16, claim.token, b"\r\n", _RELEASE, resp(claim.retention_ms, LAYOUT[packed])))


def put_unknown(claim: Claim, reason: str, status: int) -> bytes:
    """Return the arguments of `settle` that mark the key unknown in the packed layout: PUT_COUNT."""
    value = pack_unknown(claim, reason, status)
    return b"".join((_16, claim.token, b"\r\n", _PUT, resp(claim.unknown_retention_ms, value, 0)))


def mark_unknown(claim: Claim, reason: str, status: int) -> bytes:
    """Return the arguments of `settle` that mark the key unknown: MARK_UNKNOWN_COUNT."""
    written = (
        claim.unknown_retention_ms,
        claim.fence,
        claim.mode,
        claim.fingerprint,
        claim.self_check,
        claim.created_ms,
    )
    return b"".join((_16, claim.token, b"\r\n", _UNKNOWN, resp(*written, reason, status, claim.kept)))


# An operator ...


def resolve(claim: Claim, seen: Deciding, meta: bytes, body: bytes) -> bytes:
    """Return the arguments of `resolve` that give the key its response: RESOLVE_COUNT."""
    kept = of_complete(claim.kept)
    return resp(*_seen(b"answer", seen), claim.retention_ms, meta, body, claim.tombstone_ms, kept)


def release_by_operator(seen: Deciding, operator: bytes, fence: bytes) -> bytes:
    """Return the arguments of `resolve` that free the key: RELEASE_BY_OPERATOR_COUNT."""
    return resp(*_seen(b"release", seen), operator, fence)


def _seen(action: bytes, seen: Deciding) -> tuple[bytes, bytes, bytes]:
    return seen.token, action, b"" if seen.seen_lease is None else b"%d" % seen.seen_lease


# A probe ...

# Retention of a probe's record, should its release be lost.
PROBE_RETENTION_MS, PACKED_PROBE_RETENTION_MS = 10_000, 500
# A deadline that is not over by any server's clock: nobody waits for a probe that comes late.
NO_DEADLINE = b"$15\r\n" + b"9" * 15


def probe_claim(key: bytes) -> Claim:
    """Return the claim of a digest that no request has."""
    token, empty = os.urandom(TOKEN_BYTES), bytes(16)
    return Claim(
        key, token, b"%016d" % 1, HOLD, empty, empty * 2, 0, PROBE_RETENTION_MS, PROBE_RETENTION_MS, PROBE_RETENTION_MS
    )


def claim_and_free(scripts: dict[str, Script], claim: Claim) -> list[Question]:
    """Return what claims a probe's key and frees it again, also where the claim failed half-way."""
    head = claim_head(claim) + NO_DEADLINE + FIRST_TAIL[False]
    return [
        _call(scripts, "claim", claim, CLAIM_COUNT, head),
        _call(scripts, "settle", claim, RELEASE_COUNT, release(claim)),
    ]


def execute(scripts: dict[str, Script], claim: Claim) -> list[Question]:
    """Return what an exchange does with a probe's key. It is freed in the end, where it could not be stored."""
    response = _probe_response(2)
    brief, name = replace(claim, retention_ms=1), store_key(claim.key)
    claims, frees = claim_and_free(scripts, claim)
    return [
        claims,
        *_stream(scripts, claim, claim.retention_ms, LAYOUT[False]),
        _call(scripts, "settle", claim, STORE_COUNT, store(brief, response, b"2")),
        call(_silent(scripts, "read"), name, claim.token, 0, READ_BYTES),
        frees,
    ]


def execute_packed(scripts: dict[str, Script], claim: Claim) -> list[Question]:
    """Return the same for the packed layout: a streamed exchange, and one whose response is small.

    Its record does not last: a user who may claim so may lack the right to free it.
    """
    claim = replace(claim, unknown_retention_ms=PACKED_PROBE_RETENTION_MS)
    brief = replace(claim, retention_ms=1)
    claims = _call(scripts, "claim", claim, CLAIM_COUNT, claim_head(claim) + NO_DEADLINE + FIRST_TAIL[True])
    frees = _call(scripts, "settle", claim, RELEASE_COUNT, release(claim, packed=True))
    return [
        claims,
        *_stream(scripts, claim, claim.unknown_retention_ms, LAYOUT[True]),
        frees,
        claims,
        _call(scripts, "settle", claim, PUT_COUNT, put(brief, _probe_response(1), b"1") or b""),
        frees,
    ]


def _stream(scripts: dict[str, Script], claim: Claim, retention_ms: int, layout: bytes) -> list[Question]:
    """Return a renewal of the claim, and the first chunk of its response."""
    name, token, lease_ms = store_key(claim.key), claim.token, claim.lease_ms
    return [
        call(_silent(scripts, "renew"), name, token, lease_ms, retention_ms, CLAIMED.wire, layout),
        call(_silent(scripts, "append"), name, token, 0, b"1", retention_ms, layout),
    ]


def _probe_response(size: int) -> StoredResponse:
    return StoredResponse(200, b"", b"", bytes(16), size, size, True, False, True, 0, 0, 0)


def _call(scripts: dict[str, Script], verb: str, claim: Claim, count: int, args: bytes) -> Question:
    return Question((), _silent(scripts, verb), store_key(claim.key), count, args)


def _silent(scripts: dict[str, Script], verb: str) -> Script:
    """Return a copy without a verb, so that metrics do not count a probe among the request path's calls."""
    return Script("", scripts[verb].body)
