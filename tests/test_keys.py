"""Keys, scopes and fingerprints: the syntax of a key, and the digests of key, tenant and request."""

import re
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.keys.digests import Digests, Scope, UnstableScope, key_id
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.keys.tenants import TenantFields
from oncegate.store.record_name import store_key
from tests.conftest import searched

many = searched(800)

PRINTABLE = frozenset(range(0x20, 0x7F))
BARE = frozenset(range(0x21, 0x7F)) - set(b'"\\,')
QUOTED = PRINTABLE - set(b'"\\')


def words(alphabet: bytes, least: int, most: int) -> st.SearchStrategy[bytes]:
    return st.text(alphabet.decode("latin-1"), min_size=least, max_size=most).map(lambda text: text.encode("latin-1"))


printable = words(bytes(PRINTABLE), 1, 255)
bare = words(bytes(BARE), 1, 255)
syntax = words(b'"\\a,; \t\x7f\xe9', 0, 12)

DIGESTS = Digests(b"")
NAMES = (b"authorization", b"x-api-key")
TENANT = TenantFields(NAMES)
OTHERS = (b"x-api-key", b"x-auth-token")


def quote(key: bytes) -> bytes:
    return b'"' + key.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def tenant(fields: dict[bytes, list[bytes]], names=NAMES, digests=DIGESTS) -> bytes:
    scope = digests.scope(b"default", fields, TenantFields(names, (b"bare",)))
    assert isinstance(scope, Scope)
    return scope.tenant


def splits(whole: bytes, parts: int) -> list[tuple[bytes, ...]]:
    """Return every way to cut `whole` into so many parts, empty ones included."""
    cuts = combinations_with_replacement(range(len(whole) + 1), parts - 1)
    return [tuple(whole[a:b] for a, b in pairwise((0, *cut, len(whole)))) for cut in cuts]


# The key ...


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"abc", b"abc"),
        (b'"abc"', b"abc"),
        (b"8e03978e-40d5-43dd-bc93-6894a57f9324", b"8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', b"8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (b"stripe-node-retry-1", b"stripe-node-retry-1"),
        (b" abc", b"abc"),
        (b'\t "abc"\t ', b"abc"),
        (b'"a b"', b"a b"),
        (b'" abc "', b" abc "),
        (b'" "', b" "),
        (b'"a, b"', b"a, b"),
        (b'"a;b=c"', b"a;b=c"),
        (b'"abc";v=1', b"abc"),
        (b'"abc"; v', b"abc"),
        (b'"abc";v=?1;w=:YQ==:;x=@1;y=-1.5;z="a;\\"b";t=a/b:c;d=%"%e2%82%ac"', b"abc"),
        (b"a;b=c", b"a;b=c"),
        (rb'"a\"b"', b'a"b'),
        (rb'"a\\b"', rb"a\b"),
        (rb'"\\\""', b'\\"'),
        (rb'"\\"', b"\\"),
        (b"'abc'", b"'abc'"),
        (b":YWJj:", b":YWJj:"),
        (b"{tag}*?[x]", b"{tag}*?[x]"),
    ],
)
def test_a_key_is_what_stands_in_the_quotes_or_the_bare_word(value, key):
    """`"abc"` and `abc` are the same key. Escapes are parsed, and outer white space does not count."""
    assert parse_key([value]) == key


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b" ", b"\t", b'""', b' "" '),
        *(b"a, b", b"a,b", b",", b"a,", b'"a", "b"', b'"a","b"', b'"a", b'),
        *(
            b'"abc" ;v=1',
            b'"abc";',
            b'"abc";V=1',
            b'"abc";v=',
            b'"abc";v="',
            b'"abc";v=1,',
            b'"";v=1',
            b'"abc"x',
            b'x"abc"',
            b'"abc" "abc"',
            b'("abc")',
        ),
        *(b'"abc', b'abc"', b'"', b'"""', b'a"b'),
        *(rb'"a\b"', rb'"\x41"', b'"\\', rb'"\"', rb'"\\\"', b"a\\b", b"\\"),
        *(b"a b", b"a\tb", b'"a\tb"', b'"a\nb"', b"a\r\nb", b'"a\x00b"', b"a\x00", b'"a\x7f"', b"\x7f"),
        *(b"\xe9", b'"\xe9"', "“abc”".encode(), b"\xff"),
    ],
)
def test_what_is_neither_a_plain_string_nor_a_bare_word_is_refused(value):
    """Lists, broken parameters, open quotes, unknown escapes, control characters and non-ASCII are not keys."""
    assert isinstance(parse_key([value]), BadKey)


def test_a_key_header_stands_once():
    """Two header lines are refused, even with the same value."""
    assert isinstance(parse_key([b"abc", b"abc"]), BadKey)
    assert isinstance(parse_key([b"abc", b""]), BadKey)
    assert isinstance(parse_key([]), BadKey)


@pytest.mark.parametrize(
    ("one", "unit"),
    [(b"%s", b"a"), (b'"%s"', b"a"), (b'"%s"', b" "), (b'"%s"', rb"\""), (b'"%s"', rb"\\")],
    ids=["bare", "quoted", "spaces", "escaped quotes", "escaped backslashes"],
)
def test_a_key_has_1_to_255_bytes_counted_after_unescaping(one, unit):
    """255 bytes are a key and 256 are not, counted without escapes."""
    for size in (1, 2, 254, 255):
        key = parse_key([one % (unit * size)])
        assert isinstance(key, bytes)
        assert len(key) == size
    for size in (256, 257, 1000):
        assert isinstance(parse_key([one % (unit * size)]), BadKey)


def test_every_single_byte_is_a_key_or_not():
    """Bare: 0x21 to 0x7E without quote, backslash and comma; quoted: 0x20 to 0x7E, those two escaped."""
    for code in range(256):
        byte = bytes([code])
        assert (parse_key([byte]) == byte) is (code in BARE), byte
        assert isinstance(parse_key([byte]), bytes) is (code in BARE), byte
        assert (parse_key([b'"' + byte + b'"']) == byte) is (code in QUOTED), byte
        assert isinstance(parse_key([b'"' + byte + b'"']), bytes) is (code in QUOTED), byte
        assert (parse_key([b'"\\' + byte + b'"']) == byte) is (byte in b'"\\'), byte


def test_every_pair_of_bytes_is_a_key_or_not():
    """A bare word of two bytes is a key only if both may stand in one."""
    for first in range(256):
        for second in range(256):
            pair = bytes((first, second))
            stripped = pair.strip(b" \t")
            allowed = bool(stripped) and BARE.issuperset(stripped)
            assert (parse_key([pair]) == stripped) is allowed, pair


@many
@given(printable)
def test_quoting_a_key_and_parsing_it_gives_the_key(key):
    """Every key of printable ASCII survives being quoted."""
    assert parse_key([quote(key)]) == key


@many
@given(bare)
def test_a_bare_key_is_the_same_key_quoted(key):
    """A bare key and its quoted form are the same key."""
    assert parse_key([key]) == parse_key([quote(key)]) == key


def are_parameters(rest: bytes) -> bool:
    """Read parameters without values, as RFC 9651, section 4.2.3.2, tells it."""
    while rest:
        if rest[:1] != b";":
            return False
        rest = rest[1:].lstrip(b" ")
        without_name = rest.lstrip(b"abcdefghijklmnopqrstuvwxyz")
        if without_name == rest:
            return False
        rest = without_name
    return True


def reference(value: bytes) -> bytes | None:
    """Read a key byte by byte, as RFC 9651, section 4.2.5, tells it; a bare word is a word of BARE."""
    value = value.strip(b" \t")
    if not value.startswith(b'"'):
        return value if value and BARE.issuperset(value) else None
    key, rest = bytearray(), list(value[1:])
    while rest:
        byte = rest.pop(0)
        if byte == ord("\\"):
            if not rest or rest[0] not in b'"\\':
                return None
            key.append(rest.pop(0))
        elif byte == ord('"'):
            return bytes(key) if key and are_parameters(bytes(rest)) else None
        elif byte in PRINTABLE:
            key.append(byte)
        else:
            return None
    return None


@searched(2000)
@given(syntax)
def test_a_key_is_parsed_as_the_standard_tells_it(value):
    """Any mixture of quotes, backslashes, separators and letters is parsed as RFC 9651 parses it."""
    parsed = parse_key([value])
    assert (parsed if isinstance(parsed, bytes) else None) == reference(value)


@pytest.mark.fault(3)
@many
@given(st.binary(max_size=300))
def test_any_bytes_are_a_key_or_a_reason(value):
    """Any bytes yield a usable key, or a reason that does not repeat them."""
    parsed = parse_key([value])
    if isinstance(parsed, BadKey):
        assert len(value) < 8 or value.decode("latin-1") not in parsed.detail
    else:
        assert 1 <= len(parsed) <= 255
        assert PRINTABLE.issuperset(parsed)


# The scope ...

A, B = b"Bearer alice", b"Bearer bob"

TENANTS = [
    {b"authorization": [A]},
    {b"authorization": [B]},
    {b"authorization": [A, B]},
    {b"authorization": [B, A]},
    {b"authorization": [A + b", " + B]},
    {b"authorization": [A, A]},
    {b"authorization": [b""]},
    {b"x-api-key": [A]},
    {b"x-api-key": [b""]},
    {b"authorization": [A], b"x-api-key": [B]},
    {b"authorization": [B], b"x-api-key": [A]},
    {b"authorization": [A], b"x-api-key": [b""]},
    {b"authorization": [A, b"x-api-key", B]},
    {b"authorization": [A, b"x-api-key", b"1", B]},
    {b"cookie": [A]},
    {b"cookie": [A, B]},
    {b"authorization": [b""], b"cookie": [A]},
    {b"authorization": [b""], b"cookie": [B]},
    {b"authorization": [b""], b"x-api-key": [b""], b"cookie": [B]},
    {},
]


def test_another_credential_is_another_tenant():
    """The names, values, lines and order of the scope headers identify the tenant."""
    assert len({tenant(fields) for fields in TENANTS}) == len(TENANTS)


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({b"authorization": [A]}, {b"cookie": [b"s=1"]}),
        ({b"x-api-key": [A]}, {b"cookie": [b"s=1"]}),
        ({b"authorization": [A]}, {b"user-agent": [b"x"], b"date": [b"today"], b"x-forwarded-for": [b"192.0.2.1"]}),
        ({b"cookie": [b"s=1"]}, {b"user-agent": [b"x"]}),
        ({}, {b"user-agent": [b"x"], b"proxy-authorization": [A]}),
    ],
)
def test_nothing_but_the_credential_tells_the_tenant(fields, more):
    """Other headers do not count, and neither does a cookie beside a credential."""
    assert tenant(fields) == tenant({**more, **fields})


@pytest.mark.parametrize(
    ("fields", "names", "without_credential"),
    [
        ({b"authorization": [A]}, NAMES, False),
        ({b"x-api-key": [b"k"]}, NAMES, False),
        ({b"cookie": [b"s=1"]}, NAMES, False),
        ({b"user-agent": [b"x"]}, NAMES, True),
        ({}, NAMES, True),
        ({b"authorization": [A]}, (b"x-tenant",), False),
        ({b"x-tenant": [b"t"]}, (b"x-tenant",), False),
        ({b"cookie": [b"s=1"]}, (b"x-tenant",), False),
        ({b"cookie": [b"s=1"]}, (), False),
        ({}, (), False),
        ({b"x-account": [b"a"]}, NAMES, False),
        ({b"x-account": [b"a"]}, (*NAMES, b"x-account"), False),
    ],
)
def test_requests_without_a_credential_share_one_tenant(fields, names, without_credential):
    """All requests without a credential have one tenant, and are marked if there are scope headers."""
    scope = DIGESTS.scope(b"default", fields, TenantFields(names))
    assert isinstance(scope, Scope)
    assert scope.without_credential is without_credential
    assert (scope.tenant == tenant({})) is (without_credential or not names)


def test_the_namespace_is_passed_on_as_it_is():
    """A scope has the namespace as it is and a digest of 16 bytes, which does not reveal the credential."""
    scope = DIGESTS.scope(b"orders", {b"authorization": [A]}, TENANT)
    assert isinstance(scope, Scope)
    assert (scope.namespace, len(scope.tenant)) == (b"orders", 16)
    assert b"alice" not in scope.tenant


@many
@given(
    *[st.dictionaries(st.sampled_from(OTHERS), st.lists(st.binary(max_size=3), min_size=1, max_size=3), min_size=1)] * 2
)
def test_two_credentials_are_one_tenant_only_if_they_are_equal(one, other):
    """No two sets of scope headers share a tenant."""
    assert (tenant(one, OTHERS) == tenant(other, OTHERS)) is (one == other)


SCHEMES = [
    b"AWS4-HMAC-SHA256 Credential=AKIA/20260101/eu/s3/aws4_request, Signature=ab",
    b"AWS4-ECDSA-P256-SHA256 Credential=x",
    b"AWS4-HMAC-SHA256\tCredential=x",
    b'Digest username="u", nonce="n", response="r"',
    b'OAuth oauth_consumer_key="k", oauth_nonce="n", oauth_signature="s"',
    b'Signature keyId="k",algorithm="hs2019",signature="s"',
    b'Hawk id="i", ts="1", nonce="n", mac="m"',
    b"Digest",
    b"Hawk\t",
    b"Negotiate YIIJ",
    b"NTLM TlRMTVNTUAAB",
    b"HMAC-SHA256 Credential=a&SignedHeaders=x-ms-date&Signature=s",
    b'WECHATPAY2-SHA256-RSA2048 mchid="1",nonce_str="n",signature="s"',
    b"TC3-HMAC-SHA256 Credential=a, Signature=s",
    b"ACS3-HMAC-SHA256 Credential=a,Signature=s",
    b"SCRAM-SHA-256 data=YmFzZTY0",
    b"SharedKey account:signature",
    b"vapid t=e30, k=a",
    b"AWS AKID:signature",
    b"DPoP token",
    b"Basic,Digest x",
    b"sk_test_1",
    b"eyJhbGciOi",
]


@pytest.mark.parametrize("value", SCHEMES)
@pytest.mark.parametrize("spelled", [bytes, bytes.lower, bytes.upper, bytes.swapcase])
@pytest.mark.parametrize("before", [b"", b" ", b"\t  "])
def test_a_credential_made_for_one_request_is_no_scope(value, spelled, before):
    """Every scheme but the few known ones may make its credential anew, in any case and spacing."""
    line = before + spelled(value)
    assert DIGESTS.scope(b"default", {b"authorization": [line]}, TENANT) == UnstableScope()
    assert DIGESTS.scope(b"default", {b"authorization": [A, line]}, TENANT) == UnstableScope()
    assert DIGESTS.scope(b"default", {b"authorization": [line], b"x-api-key": [b"k"]}, TENANT) == UnstableScope()
    assert DIGESTS.scope(b"default", {b"authorization": [line], b"cookie": [b"s=1"]}, TENANT) == UnstableScope()


@pytest.mark.parametrize("value", SCHEMES)
def test_a_named_scope_header_makes_a_per_request_credential_harmless(value):
    """Where another header is the scope, Authorization can have any scheme."""
    with_it = {b"authorization": [value], b"x-tenant": [b"t"]}
    assert tenant(with_it, (b"x-tenant",)) == tenant({b"x-tenant": [b"t"]}, (b"x-tenant",))
    assert tenant({b"authorization": [value]}, ()) == tenant({}, ())


@pytest.mark.parametrize(
    "value",
    [
        *(b"Bearer eyJhbGciOi", b"bearer x", b"Basic dTpw", b"BASIC dTpw", b"Token t", b"token\tt", b"ApiKey k"),
        *(b"  Bearer x", b"Bearer Digest", b"Basic OAuth", b"Token AWS4-HMAC-SHA256", b"apikey Negotiate x"),
    ],
)
def test_a_credential_that_stays_is_a_scope(value):
    """Basic, Bearer, Token and ApiKey have a credential that stays the same, and identify a tenant."""
    scope = DIGESTS.scope(b"default", {b"authorization": [value]}, TENANT)
    assert isinstance(scope, Scope)
    assert not scope.without_credential


@pytest.mark.parametrize(
    ("schemes", "value", "is_named"),
    [
        ((b"dpop",), b"DPoP token", True),
        ((b"dpop",), b"Basic dTpw", True),
        ((b"dpop",), b"Key k", False),
        ((b"dpop",), b"sk_test_1", False),
        ((b"bare",), b"sk_test_1", True),
        ((b"bare",), b"\tsk_test_1 ", True),
        ((b"bare",), b"bare x", True),
        ((b"bare",), b"Negotiate x", False),
        ((), b"", True),
    ],
)
def test_a_scheme_that_the_operator_names_is_a_scope(schemes, value, is_named):
    """Further schemes count as stable once they are named, and `bare` names the credential without a scheme."""
    scope = DIGESTS.scope(b"default", {b"authorization": [value]}, TenantFields(NAMES, schemes))
    assert isinstance(scope, Scope if is_named else UnstableScope)


# How they are composed ...

# The last ones look like parts with their length before them.
WHOLES = [b"abc", b"aaaaaa", b"\x00\x00\x00\x00\x00", b"\x00\x00\x00\x01a\x00\x00\x00\x01b", b"1:a1:b0:", b"0:0:3:0:a"]


@pytest.mark.parametrize("whole", WHOLES)
def test_a_key_belongs_to_its_scope_however_the_bytes_are_split(whole):
    """("a", "bc") and ("ab", "c") differ: no split of namespace, tenant and key collides with another."""
    digests = {DIGESTS.key(Scope(namespace, tenant), key) for namespace, tenant, key in splits(whole, 3)}
    assert len(digests) == len(set(splits(whole, 3)))
    assert {len(digest) for digest in digests} == {24}


@pytest.mark.parametrize("whole", WHOLES)
def test_a_fingerprint_tells_its_parts_however_the_bytes_are_split(whole):
    """No split of method, host, target, type, encoding and body collides with another."""
    whole = whole[:8]
    digests = {DIGESTS.fingerprint(parts, [body]) for *parts, body in splits(whole, 6)}
    assert len(digests) == len(set(splits(whole, 6)))
    assert {len(digest) for digest in digests} == {16}


def test_a_part_less_is_another_fingerprint():
    """A body that looks like further parts is not taken for them."""
    for framed in (b"1:b", b"1:b,", b"\x00\x00\x00\x01b", b"b"):
        assert DIGESTS.fingerprint([b"a", b"b"], [b"c"]) != DIGESTS.fingerprint([b"a"], [framed + b"c"])
        assert DIGESTS.fingerprint([b"a", b"b"], []) != DIGESTS.fingerprint([b"a"], [framed])
        assert DIGESTS.fingerprint([], [framed]) != DIGESTS.fingerprint([b"b"], [])
    assert DIGESTS.fingerprint([b"a", b""], []) != DIGESTS.fingerprint([b"a"], [])


few = st.binary(max_size=4)


@many
@given(st.tuples(few, few, few), st.tuples(few, few, few))
def test_two_keys_are_one_only_in_the_same_scope(one, other):
    """The same key in two scopes is two keys."""
    digests = [DIGESTS.key(Scope(namespace, tenant), key) for namespace, tenant, key in (one, other)]
    assert (digests[0] == digests[1]) is (one == other)


@pytest.mark.fault(17)
@many
@given(*[st.lists(few, min_size=5, max_size=6)] * 2)
def test_two_requests_have_one_fingerprint_only_if_they_are_equal(one, other):
    """Requests that differ in any part have different fingerprints."""
    digests = [DIGESTS.fingerprint(parts, [body]) for *parts, body in (one, other)]
    assert (digests[0] == digests[1]) is (one == other)


PARTS = {
    "method": b"POST",
    "host": b"api.test",
    "target": b"/a?b",
    "type": b"text/plain",
    "encoding": b"",
    "body": b"x",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("other", [b"", b"PATCH", b"x ", b"X", b"/a?b#"])
def test_each_part_matters(part, other):
    """A request that differs in one part has another fingerprint."""
    *parts, body = PARTS.values()
    *changed, changed_body = {**PARTS, part: other}.values()
    same = DIGESTS.fingerprint(parts, [body]) == DIGESTS.fingerprint(changed, [changed_body])
    assert same is (PARTS[part] == other)


@many
@given(st.lists(st.binary(max_size=20), max_size=8))
def test_a_body_in_blocks_has_the_fingerprint_of_the_whole(blocks):
    """A body has the same fingerprint, however it is cut into blocks."""
    assert DIGESTS.fingerprint([b"POST"], blocks) == DIGESTS.fingerprint([b"POST"], [b"".join(blocks)])


def test_a_digest_is_made_anew_each_time():
    """The digests of one request do not change those of the next."""
    for _ in range(2):
        assert tenant({b"authorization": [A]}) == tenant({b"authorization": [A]}, digests=Digests(b""))
        assert DIGESTS.key(Scope(b"n", b"t"), b"k") == Digests(b"").key(Scope(b"n", b"t"), b"k")
        assert DIGESTS.fingerprint([b"a"], [b"b"]) == Digests(b"").fingerprint([b"a"], [b"b"])


def test_another_secret_makes_every_digest_another():
    """Without the secret nobody can compute a tenant, a key or a fingerprint."""
    every = [Digests(secret) for secret in (b"", b"a", b"b", b"a\x00", b"a" * 64, b"a" * 65, b"a" * 1000)]
    assert len({tenant({b"authorization": [A]}, digests=digests) for digests in every}) == len(every)
    assert len({tenant({}, digests=digests) for digests in every}) == len(every)
    assert len({digests.key(Scope(b"n", b"t"), b"k") for digests in every}) == len(every)
    assert len({digests.fingerprint([b"POST"], [b"x"]) for digests in every}) == len(every)


def test_a_tenant_a_key_and_a_fingerprint_of_the_same_bytes_differ():
    """Tenant, key and fingerprint of the same bytes differ."""
    key = DIGESTS.key(Scope(b"a", b"b"), b"c")
    assert DIGESTS.fingerprint([b"a", b"b", b"c"], []) != key[:16]
    assert tenant({b"a": [b"b"]}, (b"a",)) not in (key[:16], DIGESTS.fingerprint([b"a", b"b"], []))


# Its name in the store ...


@searched(300)
@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='"\\,'), min_size=6))
def test_the_name_in_the_store_is_a_digest_in_braces(text):
    """A record's name is in one Cluster slot, and does not reveal the key, the namespace or the tenant."""
    key = text[:255].encode()
    digest = DIGESTS.key(Scope(b"namespace", b"t" * 16), key)
    name = store_key(digest)
    assert re.fullmatch(rb"once:\{[A-Za-z0-9_-]{32}\}", name)
    assert key not in name
    assert b"namespace" not in name


def test_the_name_in_the_store_tells_all_of_the_digest():
    """Digests that differ in one bit alone have different names."""
    digest = int.from_bytes(DIGESTS.key(Scope(b"n", b"t"), b"k"), "big")
    names = {store_key((digest ^ 1 << bit).to_bytes(24, "big")) for bit in range(192)}
    assert len(names) == 192


def test_what_a_log_shows_finds_the_record():
    """The id of a key in logs is the first 12 of the 32 characters of its name in the store."""
    digest = DIGESTS.key(Scope(b"n", b"t"), b"k")
    assert len(key_id(digest)) == 32
    assert store_key(digest).startswith(b"once:{" + key_id(digest).encode())
