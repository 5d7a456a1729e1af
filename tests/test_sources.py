"""Key sources: each alone, joined, and as alternatives; and how a request is identified under a policy."""

import random

import pytest

from oncegate.decision import ANY_AGE
from oncegate.keys.digests import Digests, Scope, UnstableScope, finish_fingerprint, length_prefixed
from oncegate.keys.documents import Missing
from oncegate.keys.extraction import ExtractedKey, SourceInput, extract_key, scope_fields
from oncegate.keys.fingerprint_parts import fingerprint_source
from oncegate.keys.forms import form_of
from oncegate.keys.sources import KeySources, parse_source
from oncegate.keys.syntax import BadKey
from oncegate.known_heads.memo import ConnectionMemo
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.rules.identity import (
    Identity,
    ScopedRequest,
    fingerprint_parts,
    identify,
    key_in_head,
    may_forward_unkeyed,
    scope_of,
)
from oncegate.rules.policy import Policy

FORM = (b"Content-Type", b"application/x-www-form-urlencoded; charset=utf-8")
FILES = (b"Content-Type", b"multipart/form-data; boundary=b")
PARTS = b'--b\r\nContent-Disposition: form-data; name="id"\r\n\r\na\r\n--b--\r\n'


def head(*pairs: tuple[bytes, bytes], target: bytes = b"/v1/orders/42?token=q", method: str = "POST") -> RequestHead:
    return RequestHead(method, target, False, b"api.test", list(pairs), by_name(pairs))


def sources(*alternatives: str, mark: bytes | None = None, unmarked_is_new: bool = False) -> KeySources:
    """Return the sources of a rule; `a + b` are joined."""
    lists = [[parse_source(one.strip()) for one in text.split(" + ")] for text in alternatives]
    return KeySources(tuple(map(tuple, lists)), mark, unmarked_is_new)


def joined(*parts: tuple[str, bytes]) -> bytes:
    return b"\0" + length_prefixed([word for source, value in parts for word in (source.encode(), value)])


SINGLE = {
    "header": ("header:X-Id", head((b"x-id", b"a")), b"", b"a"),
    "header in quotes": ("header:X-Id", head((b"X-ID", b'"a b"')), b"", b"a b"),
    "body": ("body:/id", head(), b'{"id": "a"}', joined(("body:/id", b"sa"))),
    "form": ("form:id", head(FORM), b"id=a", joined(("form:id", b"a"))),
    "form with files": ("form:id", head(FILES), PARTS, joined(("form:id", b"a"))),
    "query": ("query:token", head(), b"", joined(("query:token", b"q"))),
    "path": ("path:3", head(), b"", joined(("path:3", b"42"))),
    "path in disguise": ("path:3", head(target=b"/v1/./orders//%34%32"), b"", joined(("path:3", b"42"))),
    "derived": ("derived:10", head(), b"", joined(("derived:10", b"D"))),
}


@pytest.mark.parametrize("case", SINGLE)
def test_each_source_alone(case):
    """A single header yields the same key as without a rule. Other sources yield keys that no header can have."""
    text, request, body, key = SINGLE[case]
    found = extract_key(sources(text), SourceInput(request, body, derived=b"D"))
    assert isinstance(found, ExtractedKey)
    assert found.key == key


MISSING = {
    "header": ("header:X-Id", head(), b""),
    "body": ("body:/id", head(), b"{}"),
    "form": ("form:id", head(FORM), b"x=1"),
    "form with files": ("form:x", head(FILES), PARTS),
    "query": ("query:id", head(), b""),
    "query of nothing": ("query:id", head(target=b"/"), b""),
    "path": ("path:4", head(), b""),
    "path with a slash": ("path:2", head(target=b"/a/"), b""),
    "all parts": ("header:X-Id + body:/id", head(), b"{}"),
}


@pytest.mark.parametrize("case", MISSING)
def test_where_nothing_stands(case):
    text, request, body = MISSING[case]
    assert isinstance(extract_key(sources(text), SourceInput(request, body)), Missing)


BAD = {
    "two headers": ("header:X-Id", head((b"x-id", b"a"), (b"X-Id", b"a")), b""),
    "an empty header": ("header:X-Id", head((b"x-id", b"")), b""),
    "a list": ("header:X-Id", head((b"x-id", b"a, b")), b""),
    "a long header": ("header:X-Id", head((b"x-id", b"a" * 256)), b""),
    "no JSON": ("body:/id", head(), b"{"),
    "no form": ("form:id", head(), b"id=a"),
    "a JSON form": ("form:id", head((b"content-type", b"application/json")), b"id=a"),
    "a form of two types": ("form:id", head(FORM, FORM), b"id=a"),
    "a form with files that was cut": ("form:id", head(FILES), PARTS[:-5]),
    "an encoded body": ("body:/id", head((b"content-encoding", b"gzip")), b'{"id": "a"}'),
    "two parameters": ("query:id", head(target=b"/?id=1&id=2"), b""),
    "a part bad": ("header:X-Id + body:/id", head((b"x-id", b"a")), b"{"),
    "a part twice": ("header:X-Id + query:token", head((b"x-id", b"a"), (b"x-id", b"a")), b""),
    "a long part": ("header:X-Id + query:token", head((b"x-id", b"a" * 1025)), b""),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_key(case):
    """A malformed, repeated or too long value is a bad key, and no alternative is tried after it."""
    text, request, body = BAD[case]
    assert isinstance(extract_key(sources(text), SourceInput(request, body)), BadKey)
    assert isinstance(extract_key(sources(text, "path:1"), SourceInput(request, body)), BadKey)


@pytest.mark.parametrize(
    ("request_", "body"), [(head((b"x-id", b"a")), b"{}"), (head(), b'{"id": 1}')], ids=["in the body", "in the head"]
)
def test_a_part_that_is_missing(request_, body):
    """An alternative without all its parts is no key: the next ones are tried. Without one, it is a bad key."""
    given = SourceInput(request_, body)
    assert isinstance(extract_key(sources("header:X-Id + body:/id"), given), BadKey)
    assert isinstance(extract_key(sources("header:X-Id + body:/id", "header:Y"), given), BadKey)
    assert extract_key(sources("header:X-Id + body:/id", "path:2"), given) == ExtractedKey(
        joined(("path:2", b"orders"))
    )


def test_a_shorter_alternative_is_tried():
    """`[["A", "B"], ["A"]]`: with both the key is joined, with the first alone it is the first."""
    both_or_one = sources("header:A + header:B", "header:A")
    found = [extract_key(both_or_one, SourceInput(head(*pairs))) for pairs in (
        [(b"a", b"1"), (b"b", b"2")], [(b"a", b"1")], [(b"b", b"2")], [],
    )]  # fmt: skip
    assert found[:2] == [
        ExtractedKey(joined(("header:a", b"1"), ("header:b", b"2"))),
        ExtractedKey(joined(("header:a", b"1"))),
    ]
    assert [type(one) for one in found[2:]] == [BadKey, Missing]


def test_a_spooled_body_is_not_looked_into():
    assert isinstance(extract_key(sources("body:/id"), SourceInput(head(), b"", spooled=True)), BadKey)


def test_joined_parts_keep_their_limits():
    """("a", "bc") and ("ab", "c") are two keys. A header's quotes do not count, and any value can be a part."""
    two = sources("header:A + header:B")
    keys = {
        extract_key(two, SourceInput(head((b"a", one), (b"b", other)))).key  # type: ignore[union-attr]
        for one, other in [(b"a", b"bc"), (b"ab", b"c"), (b'"ab"', b'"c"'), (b"a, b", b"c"), (b"c", b"ab")]
    }
    assert len(keys) == 4
    found = extract_key(two, SourceInput(head((b"a", b"a"), (b"b", b"bc"))))
    assert found == ExtractedKey(joined(("header:a", b"a"), ("header:b", b"bc")))


def test_alternatives_in_their_order():
    """The first alternative with a value is the key, whatever the later ones have."""
    either = sources("header:ce-source + header:ce-id", "body:/source + body:/id")
    binary = head((b"ce-source", b"/s"), (b"ce-id", b"1"))
    structured = b'{"source": "/s", "id": "1"}'
    assert extract_key(either, SourceInput(binary, structured)) == ExtractedKey(
        joined(("header:ce-source", b"/s"), ("header:ce-id", b"1"))
    )
    assert extract_key(either, SourceInput(head(), structured)) == ExtractedKey(
        joined(("body:/source", b"s/s"), ("body:/id", b"s1"))
    )
    assert isinstance(extract_key(either, SourceInput(head(), b"{}")), Missing)
    assert extract_key(either, SourceInput(binary)) is not None
    assert extract_key(either, SourceInput(head())) is None  # the body has to tell


def key_of(rule: KeySources, *pairs: tuple[bytes, bytes], body: bytes = b"", **given: bytes) -> bytes:
    found = extract_key(rule, SourceInput(head(*pairs), body, **given))  # type: ignore[arg-type]
    assert isinstance(found, ExtractedKey), found
    return found.key


def test_two_ways_to_one_identity():
    """Sources that name one identity yield one key for one text. The number 1 is not the text 1."""
    either = sources("id=header:X-Id", "id=body:/id", "other=query:token")
    assert key_of(either, (b"x-id", b"1")) == key_of(either, (b"x-id", b'"1"')) == key_of(either, body=b'{"id": "1"}')
    assert len({key_of(either, body=body) for body in (b'{"id": "1"}', b'{"id": 1}', b'{"id": 1.0}', b"{}")}) == 4
    values = [b'{"id": "true"}', b'{"id": true}', b'{"id": "n1"}', b'{"id": 1}']
    assert len({key_of(either, body=body) for body in values}) == 4
    pair = sources("a=header:A + b=header:B", "b=body:/b + a=body:/a", "a=path:1 + b=path:2")
    assert key_of(pair, (b"a", b"1"), (b"b", b"2")) == key_of(pair, body=b'{"a": "1", "b": "2"}')
    assert key_of(pair, (b"a", b"1"), (b"b", b"2")) != key_of(pair, body=b'{"a": "2", "b": "1"}')
    assert key_of(pair, body=b'{"a": "v1", "b": "orders"}') == key_of(pair, body=b"{}")


def test_values_of_different_sources_are_different_keys():
    """Where a rule names no identity, one value in two places is two keys."""
    lists = [
        ("header:A", "header:B"),
        ("header:A", "body:/id"),
        ("a=header:A", "b=header:B"),
        ("id=header:A", "body:/id"),
        ("header:A + path:1", "header:B + path:1"),
    ]
    for first, second in lists:
        rule = sources(first, second)
        keys = {key_of(rule, (b"a", b"1")), key_of(rule, (b"b", b"1"), body=b'{"id": "1"}')}
        assert len(keys) == 2, (first, second)


EVENTS = sources("source=cloudevent:source + id=cloudevent:id", "source=body:/source + id=body:/id")
# The id in the header of a binary event -> in the body of the same structured one.
ATTRIBUTES = {
    b"1": '"1"',
    b"a%20b": '"a b"',
    b'"a b"': '"a b"',
    rb'"a\"%22\\"': r'"a\"\"\\"',
    b"Euro%20%E2%82%AC%20%F0%9F%98%80": r'"Euro \u20ac \ud83d\ude00"',
    b"%e2%82%ac": '"€"',
    "€".encode(): '"€"',
    b"100%25": '"100%"',
    b"a%2520b": '"a%20b"',
    b"100%": '"100%"',
    b"%zz%4": '"%zz%4"',
    b"%C0%A0": '"%C0%A0"',
    b"a%20%FF": '"a%20%FF"',
    b'"': r'"\""',
    b"%00": r'"\u0000"',
    b"a,b": '"a,b"',
    b"%C3%A4" * 512: f'"{"ä" * 512}"',
}


@pytest.mark.parametrize("value", ATTRIBUTES, ids=lambda value: value[:16].decode("latin-1"))
def test_an_event_has_one_key_in_both_modes(value):
    """An attribute in a header is decoded as the HTTP binding of CloudEvents says; a bad escape stays as it came."""
    binary = key_of(EVENTS, (b"ce-source", b"/s%C3%A4"), (b"ce-id", value), body=b'{"id": "d", "source": "d"}')
    structured = key_of(EVENTS, body=b'{"source": "/s\\u00e4", "id": %s}' % ATTRIBUTES[value].encode())
    assert binary == structured


def test_only_attributes_are_decoded():
    """An escape in any other header is a part of its value."""
    rule = sources("id=header:ce-id", "id=body:/id")
    assert key_of(rule, (b"ce-id", b"a%20b")) == key_of(rule, body=b'{"id": "a%20b"}')
    assert key_of(sources("id=cloudevent:id"), (b"ce-id", b"a%20b")) == key_of(rule, body=b'{"id": "a b"}')


@pytest.mark.parametrize("value", [b"", b'""', b"x" * 1025, b"%41" * 1025])
def test_an_attribute_that_is_no_key(value):
    found = extract_key(sources("cloudevent:id"), SourceInput(head((b"ce-id", value))))
    assert isinstance(found, Missing if len(value) < 3 else BadKey)


def test_a_receiver_is_a_part_of_the_key():
    """The same id for another upstream, Host or path is another key. A receiver alone is no lack of a part."""
    rule = sources("receiver + header:X-Id")
    paths = (b"/a", b"/b", b"/a/b", b"/a?x")
    keys = {
        (path, place): extract_key(rule, SourceInput(head((b"x-id", b"1"), target=path), destination=place))
        for path in paths
        for place in (b"", b"a", b"a/b")
    }
    assert len(set(keys.values())) == 9
    assert keys[b"/a", b"a"] == keys[b"/a?x", b"a"]
    assert isinstance(extract_key(rule, SourceInput(head())), Missing)
    assert rule.headers_only
    policy = changed(sources=rule, destination=b"u", pass_host=True)
    hosts = [head((b"x-id", b"1"))._replace(host=host) for host in (b"a.test", b"A.test", b"b.test")]
    one, same, other = (key_in_head(policy, request) for request in hosts)
    assert one == same != other
    assert key_in_head(changed(sources=rule), hosts[0]) == key_in_head(changed(sources=rule), hosts[2])


MARK = b"x-stainless-retry-count"
LLM = sources("header:Idempotency-Key", "derived:3600", mark=MARK)


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        (b"0", (ANY_AGE, True)),
        (b"1", (0, False)),
        (b" 2 ", (0, False)),
        (b"00", (ANY_AGE, True)),
        (b"9999", (0, False)),
    ],
)
def test_a_marked_request(mark, expected):
    """Retry count 0 is a new request and takes over a complete record. A higher one gets that record, however old."""
    found = extract_key(LLM, SourceInput(head((MARK, mark)), b"", derived=b"D"))
    assert isinstance(found, ExtractedKey)
    assert (found.window_ms, found.fresh) == expected


@pytest.mark.parametrize("pairs", [[], [(MARK, b"")], [(MARK, b"x")], [(MARK, b"-1")], [(MARK, b"0"), (MARK, b"1")]])
def test_an_unmarked_request_has_no_derived_key(pairs):
    """Without a retry count a request has no derived key, and its body is not needed to know that."""
    assert isinstance(extract_key(LLM, SourceInput(head(*pairs))), Missing)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], (ANY_AGE, True)),
        ([(MARK, b"0")], (ANY_AGE, True)),
        ([(MARK, b"1")], (600_000, False)),
        ([(MARK, b"x")], None),
    ],
)
def test_a_client_that_marks_its_retries_alone(pairs, expected):
    """Without a mark a request is new. A retry gets the response within the window, and a mark that is none, no key."""
    rule = sources("header:Idempotency-Key", "derived:600", mark=MARK, unmarked_is_new=True)
    found = extract_key(rule, SourceInput(head(*pairs), b"", derived=b"D"))
    assert (found[1:] if isinstance(found, ExtractedKey) else None) == expected


def test_a_key_beats_the_mark():
    assert extract_key(LLM, SourceInput(head((MARK, b"0"), (b"idempotency-key", b"k")))) == ExtractedKey(b"k")


@pytest.mark.parametrize(
    "text",
    [
        "", "Idempotency-Key", "header:", "header:a b", "header:Content-Length", "cookie:a", "body:", "body:id",
        "body:/a~3", "form:", "query:", "path:", "path:0", "path:-1", "path:x", "path:100", "derived:", "derived:0",
        "derived:0.0", "derived:-1", "derived:1e3", "derived:86401", "derived:x", "Header:a", "header", "receiver:",
        "id=", "id=a=header:A", "id=derived:10", "id=receiver", "Id=header:A", "=header:A", "cloudevent:",
        "cloudevent:a-b", "cloudevent:ID", "id= header:A",
    ],
)  # fmt: skip
def test_what_is_no_source(text):
    with pytest.raises(ValueError, match=r"^'"):  # the message repeats what was written
        parse_source(text)


def test_windows():
    assert sources("derived:0.5 + header:a").window_ms == 500
    assert sources("header:a").window_ms == 0


# Under a policy ...

POLICY = Policy(
    methods=frozenset({"POST"}),
    key_header=b"idempotency-key",
    key_required=False,
    namespace=b"default",
    scope_headers=(b"authorization",),
    pass_host=False,
    retention_ms=1000,
    unknown_retention_ms=1000,
    lease_ms=1000,
    wait_for_duplicates=False,
    wait_max_s=1,
    max_stored_bytes=1,
)
DIGESTS = Digests(b"")
SCOPE = Scope(b"default", b"t" * 16)


class Content:
    def __init__(self, data: bytes, spooled: bool = False) -> None:
        self.data, self.spooled = data, spooled

    def blocks(self):
        return (self.data,)


def named(policy: Policy, request: RequestHead, body: bytes = b"", key: bytes | None = None) -> Identity:
    found = identify(policy, DIGESTS, ScopedRequest(request, SCOPE, key, Content(body)))
    assert isinstance(found, Identity), found
    return found


def changed(**changes: object) -> Policy:
    from dataclasses import replace

    return replace(POLICY, **changes)  # type: ignore[arg-type]


OTHERS = {
    "method": {"method": "PATCH"},
    "target": {"target": b"/v1/orders/42"},
    "type": {"pairs": [(b"content-type", b"text/plain")]},
    "encoding": {"pairs": [(b"content-encoding", b"gzip")]},
    "body": {"body": b"other"},
}
PARTS = {
    None: set(OTHERS),
    frozenset(): set(),
    frozenset({"body"}): {"encoding", "body"},
    frozenset({"method", "target"}): {"method", "target"},
    frozenset({"type", "host"}): {"type"},
}


@pytest.mark.parametrize(
    "parts", PARTS, ids=lambda parts: "all" if parts is None else "+".join(sorted(parts)) or "none"
)
def test_the_parts_of_a_fingerprint(parts):
    """Parts that a rule leaves out of the fingerprint can differ under the same key; all others cannot."""
    policy = changed(fingerprint=parts)
    usual = named(policy, head(), b"body", b"k").fingerprint
    differs = set()
    for part, other in OTHERS.items():
        request = head(
            *other.get("pairs", ()),
            target=other.get("target", b"/v1/orders/42?token=q"),
            method=other.get("method", "POST"),
        )
        found = named(policy, request, other.get("body", b"body"), b"k")
        assert found.key == named(policy, head(), b"body", b"k").key
        if found.fingerprint != usual:
            differs.add(part)
    assert differs == PARTS[parts]


def test_what_a_connection_says_again_is_named_as_if_it_were_new():
    """With the memo of a connection, each request has the same scope and fingerprint as without it."""
    dice, memo = random.Random(3), ConnectionMemo()
    policies = [
        POLICY,
        changed(namespace=b"other"),
        changed(scope_headers=()),
        changed(scope_headers=(b"authorization", b"x-api-key")),
        changed(pass_host=True),
    ]
    values: dict[bytes, list[bytes]] = {
        b"authorization": [b"Bearer a", b"Bearer b", b"", b"Digest x"],
        b"x-api-key": [b"Bearer a", b""],
        b"cookie": [b"a=1", b"a=2"],
        b"content-type": [b"text/plain", b"text/html"],
    }
    seen = set()
    for _ in range(3000):
        policy = dice.choice(policies)
        named = [name for name in values for _ in range(dice.choice((0, 0, 1, 1, 2)))]
        request = head(*[(name, dice.choice(values[name])) for name in named], target=dice.choice((b"/a", b"/b")))
        content = Content(dice.choice((b"", b"1")))
        scope = memo.scope(DIGESTS, policy, request.fields)
        fingerprint = finish_fingerprint(memo.fingerprint_prefix(DIGESTS, policy, request), content.blocks())
        assert scope == scope_of(policy, Digests(b""), request)
        assert fingerprint == DIGESTS.fingerprint(fingerprint_parts(policy, request), content.blocks())
        seen.add((scope if isinstance(scope, Scope) else None, fingerprint))
    assert len(seen) > 500


def test_the_host_counts_where_it_is_passed_on():
    """A Host that is passed on decides where a request goes, so it counts whatever the fingerprint leaves out."""
    other = head()._replace(host=b"other.test")
    for parts in (frozenset({"host"}), frozenset(), None):
        passed = changed(pass_host=True, fingerprint=parts)
        assert named(passed, head(), key=b"k").fingerprint != named(passed, other, key=b"k").fingerprint
    assert named(POLICY, head(), key=b"k").fingerprint == named(POLICY, other, key=b"k").fingerprint


def test_without_a_destination_fingerprints_are_those_of_old():
    """A retry that crosses an upgrade finds its original: the digest of a plain request is that of version 0.1."""
    request = head((b"content-type", b"text/plain"))
    old = [b"POST", b"", b"/v1/orders/42?token=q", b"text/plain", b""]
    assert named(POLICY, request, b"x", b"k").fingerprint == DIGESTS.fingerprint(old, [b"x"])


@pytest.mark.parametrize("parts", [None, frozenset(), frozenset({"method"})])
def test_where_a_request_goes_counts_always(parts):
    """A response of one upstream is no answer to a request for another, and two such requests have two derived keys."""
    here, there = (changed(fingerprint=parts, destination=name) for name in (b"a", b"b"))
    assert named(here, head(), key=b"k").fingerprint != named(there, head(), key=b"k").fingerprint
    here, there = (changed(sources=sources("derived:10"), fingerprint=parts, destination=name) for name in (b"a", b"b"))
    assert named(here, head()).key != named(there, head()).key


def upload(boundary: bytes, value: bytes = b"1") -> tuple[RequestHead, bytes]:
    body = b'--%b\r\nContent-Disposition: form-data; name="a"\r\n\r\n%b\r\n--%b--\r\n' % (boundary, value, boundary)
    return head((b"content-type", b"multipart/form-data; boundary=" + boundary)), body


@pytest.mark.parametrize(
    "parts", [None, frozenset({"body"}), frozenset({"type", "body"}), frozenset({"type"})],
    ids=["all", "body", "type and body", "type"],
)  # fmt: skip
@pytest.mark.parametrize("key", [b"k", None], ids=["sent", "derived"])
def test_a_form_that_is_sent_again_is_the_same_request(parts, key):
    """The boundary of a multipart body is no part of a fingerprint or a derived key; its content is."""
    policy = changed(sources=sources("derived:10"), fingerprint=parts)
    one, again, other = upload(b"a1"), upload(b"b2"), upload(b"a1", b"2")
    assert named(policy, *one, key) == named(policy, *again, key)
    assert (named(policy, *one, key) == named(policy, *other, key)) is (key is not None and parts == {"type"})
    # A form that cannot be read counts as it came, with its boundary.
    cut = [(request, body[:-4]) for request, body in (one, again)]
    assert named(policy, *cut[0], key) != named(policy, *cut[1], key)
    # What stands for a form in its fingerprint is no body that a client could send.
    form = form_of(one[0].fields, [one[1]])
    assert form is not None
    disguised = head((b"content-type", form.kind[1:]), (b"content-encoding", b"form"))
    assert named(policy, *one, key) != named(policy, disguised, form.digest, key)


def test_the_parts_that_a_rule_names():
    """A header and values of a JSON body can be parts of a fingerprint. Derived keys have the whole request."""
    names = {"method", "header:x-account", "body:/amount"}
    ordered = tuple(source for name in sorted(names) if (source := fingerprint_source(name)))
    policy = changed(fingerprint=frozenset(names), fingerprint_sources=ordered, sources=sources("derived:10"))
    account = (b"x-account", b"a")
    one = named(policy, head(account), b'{"amount": 1, "at": 2}', b"k")
    assert one == named(policy, head(account, (b"x", b"y")), b'{"at": 3, "amount": 1}', b"k")
    for request, body in [
        (head(account), b'{"amount": 2, "at": 2}'),
        (head(account), b'{"amount": 1, "amount": 1}'),
        (head(), b'{"amount": 1, "at": 2}'),
        (head(account, (b"content-encoding", b"gzip")), b'{"amount": 1, "at": 2}'),
        (head(account, method="PUT"), b'{"amount": 1, "at": 2}'),
    ]:
        assert named(policy, request, body, b"k").fingerprint != one.fingerprint
    assert (
        named(policy, head(account), b'{"amount": 1}').key != named(policy, head(account), b'{"amount": 1, "b": 1}').key
    )
    spooled = [
        identify(policy, DIGESTS, ScopedRequest(head(account), SCOPE, b"k", Content(data, spooled=True)))
        for data in (b'{"amount": 1}', b'{"amount":  1}')
    ]
    assert spooled[0] != spooled[1]


@pytest.mark.parametrize("parts", [None, frozenset(), frozenset({"method"})])
def test_a_derived_key_is_the_whole_request(parts):
    """A derived key depends on body, method, target and type, whatever the fingerprint leaves out."""
    policy = changed(sources=sources("derived:10"), fingerprint=parts)
    usual = named(policy, head(), b"body")
    assert usual.window_ms == 10_000
    assert usual == named(policy, head((b"x-try", b"2")), b"body")
    keys = {
        named(policy, head(*other.get("pairs", ()), target=other.get("target", b"/v1/orders/42?token=q"),
                           method=other.get("method", "POST")), other.get("body", b"body")).key
        for other in OTHERS.values()
    }  # fmt: skip
    assert len(keys | {usual.key}) == len(OTHERS) + 1


@pytest.mark.parametrize(
    ("key", "required", "pass_bad", "missing_passes", "bad_passes"),
    [
        ("header:A", False, False, True, False),
        ("header:A", True, False, False, False),
        ("header:A", False, True, True, True),
        ("header:A + header:B", False, False, True, False),
        ("body:/id", False, False, False, False),
        ("body:/id", False, True, True, True),
        ("body:/id", True, False, False, False),
        ("header:A + query:b", False, False, False, False),
        ("derived:10", False, False, False, False),
    ],
)
def test_what_becomes_of_a_request_without_a_key(key, required, pass_bad, missing_passes, bad_passes):
    """A missing header is allowed unless the rule requires a key. Any other lack of a key is refused unless the rule
    passes it."""
    for policy in (
        changed(sources=sources(key), key_required=required, pass_bad_keys=pass_bad),
        *([changed(key_required=required, pass_bad_keys=pass_bad)] if key == "header:A" else []),
    ):
        assert may_forward_unkeyed(policy, Missing("x")) is missing_passes
        assert may_forward_unkeyed(policy, BadKey("x")) is bad_passes


def test_without_a_rule_the_head_has_the_key():
    assert key_in_head(POLICY, head((b"Idempotency-Key", b'"a"'))) == b"a"
    assert isinstance(key_in_head(POLICY, head()), Missing)
    assert isinstance(key_in_head(POLICY, head((b"Idempotency-Key", b'"a'))), BadKey)
    assert key_in_head(changed(sources=sources("header:A + query:token")), head((b"a", b"1"))) is not None
    assert key_in_head(changed(sources=sources("body:/id")), head()) is None


def test_scopes_beyond_headers():
    """A path segment or a query parameter can identify the tenant. An ambiguous value is refused."""
    policy = changed(scope_headers=(b"authorization", b"path:1"), scope_sources=(parse_source("path:1"),))
    scopes = [
        scope_of(policy, DIGESTS, head(*pairs, target=target))
        for target in (b"/a/x", b"/b/x", b"/")
        for pairs in ([], [(b"authorization", b"Bearer 1")])
    ]
    assert len({scope.tenant for scope in scopes if isinstance(scope, Scope)}) == 6
    assert scopes[4].without_credential
    assert isinstance(scope_of(policy, DIGESTS, head((b"authorization", b"Digest x"))), UnstableScope)
    query = changed(scope_headers=(b"query:t",), scope_sources=(parse_source("query:t"),))
    assert isinstance(scope_of(query, DIGESTS, head(target=b"/?t=1&t=2")), BadKey)
    assert scope_fields((), head()) == {}
