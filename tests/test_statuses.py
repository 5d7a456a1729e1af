"""Which responses release a key, which leave it unknown, and which are stored."""

import gzip
import json

import pytest

from oncegate.adaptation.json_rpc import ResponseReader
from oncegate.decision import Disposition
from oncegate.rules.policy import DEFAULT_STATUSES
from oncegate.rules.statuses import AMBIGUOUS_STATUSES, MAX_BODY_BYTES, RELEASE_STATUSES, Statuses

STORE, RELEASE, AMBIGUOUS = Disposition.STORE, Disposition.RELEASE, Disposition.AMBIGUOUS
RETRY_AFTER = {b"retry-after": [b"5"]}
DIRECT = Statuses((*RELEASE_STATUSES, "503+retry-after"), AMBIGUOUS_STATUSES)
JSON = {b"content-type": [b"application/json"]}


def meaning(statuses: Statuses, status: int, fields: dict[bytes, list[bytes]] | None = None) -> Disposition:
    """What a status means, looked up as the request path does."""
    return statuses.by_status.get(status) or statuses.read(status, fields or {})


@pytest.mark.parametrize("fields", [{}, RETRY_AFTER])
def test_the_defaults(fields):
    """What proves that nothing ran releases. What a gateway says of itself is ambiguous. All else is stored."""
    release = {307, 308, 401, 421, 425, 429}
    ambiguous = {408, 502, 503, 504, *range(520, 528), 530, 598, 599}
    for status in range(200, 1000):
        expected = RELEASE if status in release else AMBIGUOUS if status in ambiguous else STORE
        assert meaning(DEFAULT_STATUSES, status, fields) is expected, status


@pytest.mark.parametrize(
    ("release", "ambiguous", "status", "retry_after", "disposition"),
    [
        # a condition beats a code ...
        (["503+retry-after"], ["503"], 503, True, RELEASE),
        (["503+retry-after"], ["503"], 503, False, AMBIGUOUS),
        (["503"], ["503+retry-after"], 503, True, AMBIGUOUS),
        (["503"], ["503+retry-after"], 503, False, RELEASE),
        # ... and a class,
        (["503+retry-after"], ["5xx"], 503, True, RELEASE),
        (["503+retry-after"], ["5xx"], 503, False, AMBIGUOUS),
        (["503+retry-after"], ["5xx"], 500, True, AMBIGUOUS),
        (["5xx"], ["503+retry-after"], 503, True, AMBIGUOUS),
        # a code beats a class,
        (["429"], ["4xx"], 429, False, RELEASE),
        (["429"], ["4xx"], 429, True, RELEASE),
        (["429"], ["4xx"], 428, False, AMBIGUOUS),
        (["4xx"], ["429"], 429, False, AMBIGUOUS),
        (["4xx"], ["429"], 430, False, RELEASE),
        # a class is that class alone,
        (["5xx"], [], 500, False, RELEASE),
        (["5xx"], [], 599, True, RELEASE),
        (["5xx"], [], 499, False, STORE),
        (["2xx"], ["3xx"], 200, False, RELEASE),
        (["2xx"], ["3xx"], 399, False, AMBIGUOUS),
        (["2xx"], ["3xx"], 400, False, STORE),
        # a condition alone says nothing of answers without it,
        (["429+retry-after"], [], 429, False, STORE),
        (["429+retry-after"], [], 429, True, RELEASE),
        (["429+retry-after"], [], 503, True, STORE),
        # a condition on a class beats a plain code, and a condition on a code beats one on a class,
        (["5xx+retry-after"], ["503"], 503, True, RELEASE),
        (["5xx+retry-after"], ["503"], 503, False, AMBIGUOUS),
        (["503+retry-after=5"], ["5xx+retry-after"], 503, True, RELEASE),
        # of two that are met the ambiguous one counts,
        (["503+retry-after=5"], ["503+retry-after"], 503, True, AMBIGUOUS),
        # a status that HTTP does not know is one of the 5xx,
        (["5xx"], [], 600, False, RELEASE),
        (["5xx"], ["999"], 999, False, AMBIGUOUS),
        # what is in neither is stored, and case does not count.
        ([], [], 401, False, STORE),
        ([], [], 502, True, STORE),
        ([], [], 503, True, STORE),
        (["503+Retry-After", "4XX"], [], 503, True, RELEASE),
        (["503+Retry-After", "4XX"], [], 404, False, RELEASE),
        (["429", "429"], [], 429, False, RELEASE),
    ],
)
def test_a_condition_beats_a_code_and_a_code_beats_a_class(release, ambiguous, status, retry_after, disposition):
    """The most specific entry of both lists decides. A status in neither list is stored."""
    assert meaning(Statuses(release, ambiguous), status, RETRY_AFTER if retry_after else {}) is disposition


@pytest.mark.parametrize(
    ("release", "ambiguous"),
    [
        (["429"], ["429"]),
        (["5xx"], ["5xx"]),
        (["5XX"], ["5xx"]),
        (["503+retry-after"], ["503+Retry-After"]),
        (["401", "425", "503"], ["502", "503"]),
    ],
)
def test_the_same_entry_in_both_lists_is_an_error(release, ambiguous):
    """An entry in both lists is an error, and the message has the entry."""
    with pytest.raises(ValueError, match="is in both lists"):
        Statuses(release, ambiguous)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "entry",
    [
        *("", " ", "x", "4x", "xx", "xxx", "4xxx", "40x", "4", "42", "4290", "0429", "00429", "429 ", " 429", "+429"),
        *("-429", "429.0", "4_29", "0x1ad", "4e2", "four", "*", "429,503", "429-431", "9" * 5000),
        *("0", "000", "100", "101", "199", "0xx", "1xx", "6xx", "9xx", "1000"),
        *("+retry-after", "503+", "503 +retry-after", "503+retry-after ", "503+=1", "503+retry after", "503+a="),
        *("503+retry-after+retry-after", "503-retry-after", "retry-after", "199+retry-after", "default"),
        *("409+/a", "409+/a=", "409+a/b=c", "409+/a~2=b", "409+/a~=b", "409+/a=\u0131", "409+/a=b\n", "409+/=", "409+"),
        *("409+\u212aey", "503+a= b", "503+a=b ", "503+a=" + "b" * 256),
        *("\u0664\u0662\u0669", "\uff14\uff12\uff19", "4\u00b29", "42\uff19"),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_malformed_entry_is_an_error(place, entry):
    """An entry of either list is a final status, a class of statuses, or a status with a condition."""
    lists: list[list[str]] = [["429"], ["502"]]
    lists[place].append(entry)
    with pytest.raises(ValueError, match="is not a status such as"):
        Statuses(*lists)


# The API's own word ...


@pytest.mark.parametrize("name", [b"x-should-retry", b"stripe-should-retry"])
@pytest.mark.parametrize("value", [b"false", b" False "])
def test_the_api_forbids_a_retry(name, value):
    """`false` means that the answer stays: nothing is released by it, whatever a list says."""
    fields = {name: [value], b"retry-after": [b"1"]}
    everything = Statuses(["2xx", "3xx", "4xx", "5xx"], [])
    for statuses, status in ((DEFAULT_STATUSES, 429), (DIRECT, 503), (everything, 200), (everything, 302)):
        assert meaning(statuses, status, fields) is STORE
    # It says nothing of a status that a list leaves open.
    assert meaning(DEFAULT_STATUSES, 502, fields) is AMBIGUOUS
    # Where two contradict each other, the cautious one counts.
    other = b"stripe-should-retry" if name == b"x-should-retry" else b"x-should-retry"
    assert meaning(DEFAULT_STATUSES, 429, {name: [value], other: [b"true"]}) is STORE
    assert meaning(DEFAULT_STATUSES, 429, {name: [b"true", value]}) is STORE


@pytest.mark.parametrize("name", [b"x-should-retry", b"stripe-should-retry"])
def test_the_api_allows_a_retry(name):
    """`true` is "you may", not "nothing ran": it counts where the API executes a key only once, and in a rule."""
    fields = {name: [b"true"]}
    once = Statuses(RELEASE_STATUSES, AMBIGUOUS_STATUSES, runs_once=True)
    named = Statuses([f"5xx+{name.decode()}=true"], AMBIGUOUS_STATUSES)
    for status, listed in ((400, STORE), (409, STORE), (500, STORE), (502, AMBIGUOUS), (503, AMBIGUOUS)):
        assert meaning(DEFAULT_STATUSES, status, fields) is listed
        assert meaning(once, status, fields) is RELEASE
        assert meaning(once, status, {name: [b"maybe"]}) is meaning(once, status) is listed
        assert meaning(named, status, fields) is (RELEASE if status >= 500 else listed)
    # A result is a result.
    assert meaning(once, 200, fields) is meaning(once, 303, fields) is STORE


def test_a_rule_names_a_field():
    """A field by its name alone, or with a value; every line of it must have the value."""
    statuses = Statuses(["4xx+transient-error=true", "500+x-nothing-ran"], [])
    assert meaning(statuses, 422, {b"transient-error": [b"true"]}) is RELEASE
    assert meaning(statuses, 422, {b"transient-error": [b" TRUE\t"]}) is RELEASE
    assert meaning(statuses, 422, {b"transient-error": [b"true", b"false"]}) is STORE
    assert meaning(statuses, 422, {b"transient-error": [b"false"]}) is STORE
    assert meaning(statuses, 422) is STORE
    assert meaning(statuses, 500, {b"transient-error": [b"true"]}) is STORE
    assert meaning(statuses, 500, {b"x-nothing-ran": [b""]}) is RELEASE


# Made-up answers of gateways ...


@pytest.mark.parametrize(
    "mark",
    [
        {b"x-varnish": [b"32770"], b"via": [b"1.1 varnish (Varnish/7.1)"]},
        {b"x-varnish": [b"5"]},
        {b"via": [b"1.1 varnish (Varnish/7.1)"]},
        {b"via": [b"HTTP/1.1 GWA"]},
        {b"via": [b"1.1 api, 1.1 gateway"]},
        {b"via": [b"1.1 api", b"1.1 gateway"]},
        {b"via": [b"1.1 api (one, two)"]},
        {b"via": [b"nonsense"]},
        {b"proxy-status": [b"cdn; error=connection_terminated"]},
    ],
    ids=str,
)
def test_a_gateway_may_have_made_it_up(mark):
    """A 5xx with the mark of a gateway is unknown, wherever its status was named: the API may have executed."""
    for statuses in (DIRECT, Statuses(["503"], []), Statuses(["5xx"], [], frozenset((b"api",)))):
        assert meaning(statuses, 503, RETRY_AFTER) is RELEASE
        assert meaning(statuses, 503, RETRY_AFTER | mark) is AMBIGUOUS
    # Gateways pass answers on, too: what proves that nothing ran still does, and a result is a result.
    assert meaning(DIRECT, 429, mark) is RELEASE
    assert meaning(DIRECT, 200, mark) is STORE


def test_a_via_that_the_api_itself_sends():
    """The names that an upstream is said to send are no gateway. An empty Via names nobody."""
    statuses = Statuses(["503"], [], frozenset((b"vegur", b"api:8080")))
    for via in ([b"1.1 vegur"], [b"1.1 Vegur (a b)", b"2 API:8080"], [b"1.1 vegur, , HTTP/1.1 api:8080"], [b""]):
        assert meaning(statuses, 503, {b"via": via}) is RELEASE
    assert meaning(statuses, 503, {b"via": [b"1.1 vegur, 1.1 varnish"]}) is AMBIGUOUS


def test_a_made_up_500():
    """lighttpd answers 500 where the program behind it broke off; Proxy-Status says it itself."""
    for fields in ({b"server": [b"lighttpd/1.4.69"]}, {b"proxy-status": [b"a; Error=destination_unavailable"]}):
        assert meaning(DEFAULT_STATUSES, 500, fields) is AMBIGUOUS
        assert meaning(Statuses(["5xx"], []), 500, fields) is AMBIGUOUS
    for fields in ({b"server": [b"nginx"]}, {b"server": [b"mine"]}, {}, {b"proxy-status": [b"a; received-status=500"]}):
        assert meaning(DEFAULT_STATUSES, 500, fields) is STORE
    assert meaning(DEFAULT_STATUSES, 501, {b"server": [b"lighttpd"]}) is STORE
    assert meaning(DEFAULT_STATUSES, 404, {b"proxy-status": [b"a; error=dns_error"]}) is STORE


# A member of the body ...

IN_USE = Statuses(["409+/error/code=idempotency_key_in_use"], ["409+/error/code=7"])


@pytest.mark.parametrize(
    ("body", "fields", "expected"),
    [
        (b'{"error":{"code":"idempotency_key_in_use"}}', JSON, RELEASE),
        (b'{"error":{"code":"idempotency_key_in_use"}}', {b"content-type": [b"application/x+json; a=b"]}, RELEASE),
        (b'{"error":{"code":"Idempotency_Key_In_Use"}}', JSON, STORE),
        (b'{"error":{"code":"lock_timeout"}}', JSON, STORE),
        (b'{"error":{"code":7}}', JSON, AMBIGUOUS),
        (b'{"error":{"code":"7"}}', JSON, AMBIGUOUS),
        (b'{"error":{"code":7.0}}', JSON, STORE),
        (b'{"error":{"code":null}}', JSON, STORE),
        (b'{"error":{"code":["idempotency_key_in_use"]}}', JSON, STORE),
        (b'{"error":{"code":"idempotency_key_in_use","code":"a"}}', JSON, STORE),
        (b'{"error":"idempotency_key_in_use"}', JSON, STORE),
        (b'{"error":{"code":"idempotency_key_in_use"}', JSON, STORE),
        (b"[" * 100_000, JSON, STORE),
        (b"", JSON, STORE),
        (None, JSON, STORE),
        (b'{"error":{"code":"idempotency_key_in_use"}}', {}, STORE),
        (b'{"error":{"code":"idempotency_key_in_use"}}', {b"content-type": [b"text/html"]}, STORE),
        (b'{"error":{"code":"idempotency_key_in_use"}}', JSON | {b"content-encoding": [b"br"]}, STORE),
        (b'{"error":{"code":"idempotency_key_in_use"}}', JSON | {b"content-encoding": [b"gzip"]}, STORE),
        (b'{"error":{"code":"idempotency_key_in_use"}}' + b" " * MAX_BODY_BYTES, JSON, STORE),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_a_rule_names_a_member_of_the_body(body, fields, expected):
    """A member of a small JSON body decides; a body that cannot be read decides nothing."""
    assert IN_USE.reads_body(409, fields) is (fields.get(b"content-type", [b"t"])[0][:11] == b"application")
    assert IN_USE.read(409, fields, body) is expected


def test_a_packed_body_is_unpacked_within_a_limit():
    """APIs compress what a client takes compressed. A body that grows over the limit is not read."""
    answer = json.dumps({"error": {"code": "idempotency_key_in_use"}}).encode()
    fields = JSON | {b"content-encoding": [b"GZIP"]}
    assert IN_USE.read(409, fields, gzip.compress(answer)) is RELEASE
    assert IN_USE.read(409, fields, gzip.compress(answer)[:-9]) is STORE
    assert IN_USE.read(409, fields, gzip.compress(answer + b" " * 10_000_000)) is STORE


UNLESS_MAYBE = Statuses(["409", "409+retry-after"], ["4xx+/code=maybe", "409+/code=maybe"])
UNREADABLE = {
    "not here": (None, JSON),
    "cut": (b'{"code":"maybe"', JSON),
    "doubled": (b'{"code":"no","code":"maybe"}', JSON),
    "too long": (b'{"code":"maybe"}' + b" " * MAX_BODY_BYTES, JSON),
    "coded": (b'{"code":"maybe"}', JSON | {b"content-encoding": [b"br"]}),
    "half unpacked": (gzip.compress(b'{"code":"no"') + gzip.compress(b"}"), JSON | {b"content-encoding": [b"gzip"]}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_body_that_cannot_be_read_frees_no_key_that_it_could_forbid(case):
    """Where a member of the body would make the key unknown, a body that cannot be read leaves it unknown."""
    body, fields = UNREADABLE[case]
    for more in ({}, RETRY_AFTER):
        assert UNLESS_MAYBE.read(409, fields | more, body) is AMBIGUOUS
        # It has no such member.
        assert UNLESS_MAYBE.read(409, JSON | more, b'{"code":"no"}') is RELEASE
        assert UNLESS_MAYBE.read(409, JSON | more, b"{}") is RELEASE
        assert UNLESS_MAYBE.read(409, {b"content-type": [b"text/html"]} | more, body) is RELEASE
    # A condition on a code beats one on a class, and what is stored stays stored.
    assert Statuses(["409+retry-after"], ["4xx+/code=maybe"]).read(409, fields | RETRY_AFTER, body) is RELEASE
    assert Statuses([], ["409+/code=maybe"]).read(409, fields, body) is STORE


def test_only_the_named_statuses_wait_for_their_body():
    """A body is read for a status that a list names with a member, and for no other."""
    assert not any(IN_USE.reads_body(status, JSON) for status in range(200, 600) if status != 409)
    assert not any(DIRECT.reads_body(status, JSON) for status in range(200, 600))
    assert Statuses(["4xx+/a=b"], []).reads_body(422, JSON)


# Messages of JSON-RPC ...

CALL = Statuses(
    [*RELEASE_STATUSES, "2xx+/result/resultType=input_required"],
    [*AMBIGUOUS_STATUSES, "2xx+/error/code=-32600"],
    by_message=True,
)
MESSAGES: list[tuple[int, dict[bytes, list[bytes]], str, Disposition]] = [
    (200, {}, '{"id":1,"result":{}}', STORE),
    (400, {}, '{"id":1,"result":{}}', AMBIGUOUS),
    (200, {}, '{"id":1,"error":{"code":-32601}}', RELEASE),
    (404, {}, '{"id":1,"error":{"code":-32601}}', RELEASE),
    (200, {}, '{"id":1,"error":{"code":"-32601"}}', AMBIGUOUS),  # a text is no code
    (200, {}, '{"id":1,"error":-32601}', AMBIGUOUS),
    (200, {b"x-should-retry": [b"false"]}, '{"id":1,"error":{"code":-32601}}', AMBIGUOUS),
    (200, {}, '{"id":1,"error":{"code":-32600}}', AMBIGUOUS),  # the operator's list comes first
    (400, {}, '{"id":1,"error":{"code":-32600}}', RELEASE),
    (200, {}, '{"id":1,"error":{"code":-32602}}', AMBIGUOUS),  # also said after a tool ran
    (200, {}, '{"id":1,"error":{"code":[-32601]}}', AMBIGUOUS),
    (200, {}, '{"id":1,"result":{"resultType":"input_required"}}', RELEASE),
    (200, {}, '{"id":1,"result":{"resultType":"input_required","x":"' + "a" * 100_000 + '"}}', RELEASE),
    (429, {}, '{"id":1,"error":{"code":-32000}}', RELEASE),
    (502, {}, '{"id":1,"error":{"code":-32601}}', AMBIGUOUS),
    (200, {}, "", AMBIGUOUS),
    (401, {}, "", RELEASE),
    (404, {}, "", AMBIGUOUS),
]


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
@pytest.mark.parametrize("case", range(len(MESSAGES)))
def test_what_a_message_means(case, kind):
    """A result is stored and a refusal of JSON-RPC's own frees the key; the lists come first, and doubt is unknown."""
    status, fields, message, expected = MESSAGES[case]
    fields = {**fields, b"content-type": [kind]}
    reader = ResponseReader(fields, b"1")
    reader.add((message if kind == b"application/json" else f"data: {message}\n\n").encode())
    assert CALL.read_message(status, fields, reader.final()) is expected


def test_no_status_decides_alone_about_a_message():
    """With messages, no 2xx is stored without a look at them."""
    assert CALL.by_status == {}
    assert Statuses(CALL.entries(RELEASE), CALL.entries(AMBIGUOUS)) != CALL
