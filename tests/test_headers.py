"""Heads of requests and responses: which are refused, and which fields are stripped and added."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.messages.admission import Admission, Refused
from oncegate.messages.fields import by_name, tokens
from oncegate.messages.request_head import (
    ForwardedInfo,
    RequestHead,
    one_forward_less,
    preferred_wait_s,
    prefers,
    request_head,
    without_preferences,
)
from oncegate.messages.request_ids import trace_id
from oncegate.messages.response_head import ResponseHead, read_response_head, response_blocks, status_line
from oncegate.messages.target import logged_path
from oncegate.rules.model import Match
from tests.conftest import searched

many = searched(400)

HTTP10, HTTP11 = (1, 0), (1, 1)
HOST = b"api.test"
GATE = Admission((), b"idempotency-key", (b"authorization", b"x-api-key"))


def pairs(*lines: bytes) -> list[tuple[bytes, bytes]]:
    return [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]


def admit(
    *lines: bytes, method="POST", target=b"/v1/charges", version=HTTP11, host: bytes | None = HOST, gate=GATE
) -> RequestHead | Refused:
    named = [] if host is None else [(b"Host", host)]
    return gate.admit(method, target, version, named + pairs(*lines))


def entered(*lines: bytes, **options) -> RequestHead:
    head = admit(*lines, **options)
    assert isinstance(head, RequestHead), head
    return head


def refused(*lines: bytes, **options) -> int:
    head = admit(*lines, **options)
    assert isinstance(head, Refused), head
    return head.status


# Small parts ...


def test_fields_are_found_by_lower_case_name():
    """Values are kept in the order of their lines, whatever the case of their names."""
    assert by_name(pairs(b"A: 1", b"b: 2", b"a: 3", b"B:")) == {b"a": [b"1", b"3"], b"b": [b"2", b""]}


@pytest.mark.parametrize(
    ("values", "members"),
    [
        ([], []),
        ([b""], []),
        ([b" , ,\t"], []),
        ([b"Close"], [b"close"]),
        ([b"a, B ,\tc,,"], [b"a", b"b", b"c"]),
        ([b"a,b", b"", b"C"], [b"a", b"b", b"c"]),
    ],
)
def test_a_list_is_read_across_lines_in_lower_case(values, members):
    """The members of a comma-separated field are read without white space and without empty members."""
    assert tokens(values) == members


# The gate: the request line ...


@pytest.mark.parametrize(
    ("target", "origin_form"),
    [
        *[
            (target, target)
            for target in (
                *(b"/", b"/v1/charges", b"/a?b=c", b"/?", b"/?a?b", b"/a;b=c", b"/a//b", b"//evil.test/x", b"///"),
                *(b"/./a/../b", b"/..", b"/%7Ea/../b?x=%2F", b"/%00%0d%0a", b"/%", b"/%zz", b"/a%2fb%2Fc"),
                *(b'/"<>\\^`{|}', b"/http://evil.test/", b"/@evil.test", b"/:8080", b"/*", b"/\xc3\xa9\xff", b"/~'()!"),
            )
        ],
        (b"http://api.test/x?y", b"/x?y"),
        (b"HTTP://API.Test/x", b"/x"),
        (b"https://api.test//x", b"//x"),
        (b"http://api.test", b"/"),
        (b"http://api.test/", b"/"),
        (b"http://api.test?y", b"/?y"),
        (b"http://api.test/%7Ea/../b@c:d", b"/%7Ea/../b@c:d"),
    ],
)
def test_a_target_is_kept_byte_for_byte(target, origin_form):
    """A path stays as it is. A URL of this host loses its scheme and authority only."""
    assert entered(target=target).target == origin_form


@pytest.mark.parametrize(
    "target",
    [
        *(b"", b"x", b"?x", b"#", b"api.test", b"api.test:443", b"api.test/x", b"\\x", b"*/", b"**", b" /"),
        *(b"/a#b", b"/#", b"/a?b#c", b"http://api.test/#b", b"http://api.test#b", b"http://api.test/a?b#c"),
        *(b"/a b", b"/a\tb", b"/a\r\nb", b"/a\nb", b"/\x00", b"/\x7f", b"/\x1f", b"/a ", b"/a\n"),
        *(b"http://user@api.test/", b"http://api.test@evil.test/", b"http://api.test:80@evil.test/"),
        *(b"http://evil.test\\@api.test/", b"http://api.test\\.evil.test/", b"http://[::1/", b"http://[zz]/"),
        *(b"http:///x", b"http://", b"http:/api.test/x", b"http:api.test/x", b"/api.test x"),
        *(b"ftp://api.test/", b"file:///etc/passwd", b"ws://api.test/", b"javascript:1", b"http://api.test/a b"),
    ],
)
def test_any_other_target_is_refused(target):
    """Fragments, white space, other schemes, user names and URLs of other hosts are refused as targets."""
    assert refused(target=target) == 400


@pytest.mark.parametrize(
    ("target", "host"),
    [
        (b"http://evil.test/x", b"evil.test"),
        (b"HTTPS://EVIL.test", b"EVIL.test"),
        (b"http://api.test:80/x", b"api.test:80"),
        (b"http://api.test./x", b"api.test."),
        (b"http://[::1]:81/x", b"[::1]:81"),
    ],
)
@pytest.mark.parametrize("named", [b"api.test", b"[::1]", None])
def test_the_host_of_a_url_wins_over_the_field(target, host, named):
    """RFC 9112, section 3.2.2: the target names the host, for rules, for the served hosts and for the upstream."""
    if named is None:
        assert refused(target=target, host=None) == 400
    head = entered(target=target, host=named, version=HTTP11 if named else HTTP10)
    assert (head.host, head.fields[b"host"]) == (host, [host])
    served = Admission([b"evil.test"], b"idempotency-key", ())
    admitted = admit(target=target, host=named, version=HTTP11 if named else HTTP10, gate=served)
    assert isinstance(admitted, Refused) is not host.lower().startswith(b"evil.test")


@pytest.mark.parametrize("target", [b"http:///x", b"http://?x"])
def test_a_url_needs_a_host(target):
    assert refused(target=target, version=HTTP10, host=None) == 400


@pytest.mark.parametrize("served", [b"api.test", b"API.test.", b"api.test:8080"])
@pytest.mark.parametrize("host", [b"api.test:8080", b"Api.Test.:8080"])
def test_a_final_dot_names_the_same_host(served, host):
    """A full name may end with a dot; it is the same host for ONCEGATE_HOSTS and for rules."""
    gate = Admission([served], b"idempotency-key", ())
    head = entered(host=host, gate=gate)
    assert head.host == host
    for pattern in ("api.test", "api.test:8080", "*.test"):
        assert Match(host=pattern)(head, b"/v1/charges")
    assert refused(host=b"api.test.x.:8080", gate=gate) == 421


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a?token=secret", "/a"),
        ("http://user:secret@api.test/a?b", "/a"),
        ("http://api.test", "/"),
        ("/a#?", "/a"),
        ("*", "*"),
        ("", ""),
        ("/" + "a" * 2000, "/" + "a" * 1023 + "..."),
    ],
)
def test_a_logged_path_has_no_query_and_nobodys_password(target, path):
    assert logged_path(target) == path


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        ([], "10.0.0.1"),
        ([b"203.0.113.9"], "203.0.113.9"),
        ([b"198.51.100.1, 203.0.113.9", b"10.0.0.2"], "203.0.113.9"),
        ([b"198.51.100.1, unknown, 10.0.0.2"], "10.0.0.2"),
        ([b'203.0.113.9"\r\n'], "10.0.0.1"),
        ([b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ([b"2001:db8::1"], "2001:db8::1"),
        ([b","], "10.0.0.1"),
    ],
)
def test_the_client_behind_trusted_proxies(forwarded_for, client):
    """The last address that is none of theirs; what a client itself wrote in front counts for nothing."""
    networks = [ip_network("10.0.0.0/8")]
    trusted = ForwardedInfo(b"10.0.0.1", b"http", True, lambda text: any(ip_address(text) in one for one in networks))
    assert trusted.client_behind(forwarded_for) == client
    assert replace(trusted, trusted=False).client_behind(forwarded_for) == "10.0.0.1"


TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"


@pytest.mark.parametrize("parent", [b"00-%b-%b-01", b"00-%b-%b-00", b"01-%b-%b-03-more"])
def test_a_trace_is_named_by_traceparent(parent):
    assert trace_id(parent % (TRACE, SPAN)) == TRACE.decode()


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        b"x",
        b"00-%b-%b-01-more",
        b"ff-%b-%b-01",
        b"00-%b-%b",
        b"00-%b-%b-1",
        b"00-%b-%b-01\n",
        b'00-%b-%b-0"',
        b" 00-%b-%b-01",
    ],
)
def test_a_malformed_trace_is_none(parent):
    assert trace_id(parent.replace(b"%b", TRACE, 1).replace(b"%b", SPAN, 1)) == ""
    assert trace_id(b"00-" + b"0" * 32 + b"-" + SPAN + b"-01") == ""


@pytest.mark.parametrize(
    ("values", "forwarded"),
    [
        ([b"0"], None),
        ([b"000"], None),
        ([b"1"], [b"0"]),
        ([b"10"], [b"9"]),
        ([b"9" * 5000], [b"999999998"]),
        ([b"-1"], [b"-1"]),
        ([b"x"], [b"x"]),
        ([b""], [b""]),
        ([b"1", b"1"], [b"1", b"1"]),
    ],
)
def test_max_forwards_is_counted_down(values, forwarded):
    """RFC 9110, section 7.6.2: 0 ends here; a malformed value is the upstream's to judge."""
    head = entered(*[b"Max-Forwards: " + value for value in values], method="OPTIONS")
    counted = one_forward_less(head)
    assert (counted and counted.fields[b"max-forwards"]) == forwarded
    if counted is not None:
        assert [value for name, value in counted.pairs if name == b"Max-Forwards"] == forwarded


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("CONNECT", b"api.test:443", 405),
        ("CONNECT", b"/x", 405),
        ("CONNECT", b"http://api.test/", 405),
        ("TRACE", b"/", 405),
        ("TRACE", b"http://api.test/", 405),
        ("OPTIONS", b"*", 400),
        ("GET", b"*", 400),
        ("POST", b"*", 400),
    ],
)
def test_a_method_or_target_meant_for_the_proxy_itself_is_refused(method, target, status):
    """CONNECT, TRACE and the target * are not served."""
    assert refused(method=method, target=target) == status


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "PURGE"])
def test_every_other_method_is_let_in(method):
    """Every other method is forwarded as it is."""
    assert entered(method=method).method == method


@pytest.mark.parametrize("version", [(0, 9), (0, 0), (1, 2), (1, 9), (2, 0), (3, 0), (9, 9), (11, 0), (0, 1)])
def test_another_version_is_refused(version):
    """Any version but HTTP/1.0 and HTTP/1.1 gets 505."""
    assert refused(version=version) == 505


@pytest.mark.parametrize(("version", "http10"), [(HTTP10, True), (HTTP11, False)])
def test_the_version_is_remembered(version, http10):
    """The head of a request says whether it came in HTTP/1.0."""
    assert entered(version=version).http10 is http10


# ... framing, expectations, Connection, imitations ...


@pytest.mark.parametrize(
    "lines",
    [
        [b"Transfer-Encoding: chunked"],
        [b"transfer-encoding: Chunked"],
        [b"TRANSFER-ENCODING:\t CHUNKED "],
        [b"Content-Length: 0"],
        [b"Content-Length: 12"],
        [b"TE: trailers"],
        [],
    ],
)
def test_a_body_is_chunked_or_has_a_length(lines):
    """A body has a length or is chunked, never both."""
    assert entered(*lines).fields == by_name([(b"host", HOST), *pairs(*lines)])


@pytest.mark.parametrize(
    "lines",
    [
        [b"Transfer-Encoding: chunked, gzip"],
        [b"Transfer-Encoding: chunked, chunked"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: chunked;q=1"],
        [b'Transfer-Encoding: "chunked"'],
        [b"Transfer-Encoding: chun\x0bked"],
        [b"Transfer-Encoding:"],
        [b"Transfer-Encoding: ,"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 2"],
        [b"Content-Length: 2", b"transfer-encoding: Chunked"],
        [b"Transfer-Encoding:", b"Content-Length: 2"],
        [b"Transfer-Encoding: identity", b"Content-Length: 2"],
        [b"Transfer-Encoding: chunked", b"Content-Length:"],
    ],
)
def test_any_other_framing_is_refused(lines):
    """A request is refused where two parsers could disagree about the end of its body."""
    assert refused(*lines) == 400


@pytest.mark.parametrize(
    "lines",
    [
        [b"Transfer-Encoding: gzip"],
        [b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Transfer-Encoding: gzip", b"transfer-encoding: Chunked"],
        [b"Transfer-Encoding: gzip;q=1 , chunked"],
        [b"Transfer-Encoding: chunkedx"],
    ],
)
def test_a_coding_that_is_unknown_is_not_implemented(lines):
    """RFC 9112, section 6.1: 501 for a well-formed coding that nobody here understands."""
    assert refused(*lines) == 501


@pytest.mark.parametrize("coding", [b"chunked", b"identity", b"gzip", b""])
def test_http_1_0_has_no_transfer_coding(coding):
    """A chunked body in HTTP/1.0 is refused, because only some parsers read it as chunked."""
    assert refused(b"Transfer-Encoding: " + coding, version=HTTP10) == 400


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue", b" 100-CONTINUE\t"])
def test_the_only_expectation_is_100_continue(value):
    """`Expect: 100-continue` is accepted in upper and lower case."""
    assert entered(b"Expect: " + value).fields[b"expect"] == [value.strip()]


@pytest.mark.parametrize(
    "lines",
    [
        [b"Expect: 200-ok"],
        [b"Expect: 100-continue, x"],
        [b"Expect: x, 100-continue"],
        [b"Expect: 100-continue", b"Expect: x"],
        [b"Expect: 100-continue", b"Expect: 100-continue"],
        [b"Expect: 100-continue;q=1"],
        [b"Expect: 100"],
        [b"Expect:"],
        [b"expect: payload"],
    ],
)
def test_any_other_expectation_is_refused(lines):
    """Any other expectation gets 417, rather than being ignored."""
    assert refused(*lines) == 417


HOP_BY_HOP = (
    *(b"Connection", b"Keep-Alive", b"Proxy-Connection", b"TE", b"Trailer", b"Transfer-Encoding", b"Upgrade"),
    *(b"HTTP2-Settings", b"Proxy-Authorization"),
)
ACTED_ON = (
    *(b"Idempotency-Key", b"Authorization", b"X-Api-Key", b"Cookie", b"Prefer"),
    *(b"Host", b"Content-Type", b"Content-Encoding", b"Content-Length", b"Transfer-Encoding", b"Expect"),
    *(b"Forwarded", b"Via", b"X-Real-Ip", b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Port"),
    *(b"X-Forwarded-Prefix", b"X-Forwarded-Proto", b"X-Forwarded-Server", b"Idempotency-Fence", b"Oncegate-Execution"),
)


@pytest.mark.parametrize("name", ACTED_ON)
@pytest.mark.parametrize(
    "form", [b"%s", b" %s\t", b"close, %s", b"%s,close", b"keep-alive ,\t%s ,", b"x-custom,%s,x-custom"]
)
@pytest.mark.parametrize("spelled", [bytes, bytes.lower, bytes.upper])
def test_connection_names_no_field_that_we_act_on(name, form, spelled):
    """Nominating a key, a credential or framing in Connection is refused, whether the field is present or not."""
    nominated = form % spelled(name)
    assert refused(b"Connection: " + nominated) == 400
    assert refused(b"Connection: close", b"connection: " + nominated) == 400
    assert refused(b"X-Custom: 1", b"CONNECTION: " + nominated, version=HTTP10) == 400


@pytest.mark.parametrize(
    "value",
    [
        *(b"close", b"Keep-Alive", b"keep-alive, TE", b"Upgrade, HTTP2-Settings", b"x-custom", b"", b","),
        *(b"x-idempotency-key", b"idempotency", b"authorization-x", b"hosts", b"upgrade"),
    ],
)
def test_connection_may_name_anything_else(value):
    """Connection may nominate any field that oncegate does not act on."""
    assert entered(b"Connection: " + value)


def test_what_a_deployment_acts_on_is_guarded_like_the_rest():
    """The deployment's key header and scope headers can neither be nominated nor imitated."""
    gate = Admission((), b"x-request-id", (b"x-tenant-id",))
    for name in (b"x-request-id", b"X-Tenant-Id"):
        assert refused(b"Connection: " + name, gate=gate) == 400
        assert refused(name.replace(b"-", b"_") + b": 1", gate=gate) == 400
        assert entered(b"Connection: " + name)
    assert entered(b"Connection: Idempotency-Key", gate=gate)


IMITABLE = [name for name in ACTED_ON + HOP_BY_HOP if b"-" in name]


@pytest.mark.parametrize("name", IMITABLE)
@pytest.mark.parametrize("spelled", [bytes, bytes.lower, bytes.upper])
def test_an_underscore_imitates_no_field_that_we_act_on(name, spelled):
    """A name with _ is refused where an upstream that maps _ to - would see a field that oncegate acts on."""
    head, _, tail = name.rpartition(b"-")
    imitations = {name.replace(b"-", b"_"), name.replace(b"-", b"_", 1), head + b"_" + tail}
    for imitation in sorted(imitations):
        assert refused(spelled(imitation) + b": 1") == 400
        assert refused(name + b": 1", spelled(imitation) + b": 1", b"X: 1") in (400, 417, 501)


@pytest.mark.parametrize("name", [b"X_Custom", b"_", b"my_key", b"idempotency_keys", b"x__forwarded_for", b"_host"])
def test_another_name_may_have_an_underscore(name):
    """Any other name with _ is forwarded as it is."""
    assert (name, b"1") in entered(name + b": 1").pairs


def test_a_key_header_may_have_an_underscore_itself():
    """A key header may itself have an underscore."""
    for name in (b"request_id", b"x_api_key"):
        assert entered(name.title() + b": 1", gate=Admission((), name, ()))


# ... and the host.


@pytest.mark.parametrize(
    "host",
    [
        *(b"api.test", b"API.Test", b"api.test:8080", b"api", b"api.test.", b"a-b_c~d", b"xn--bcher-kva.test"),
        *(b"192.0.2.1", b"192.0.2.1:80", b"[::1]", b"[::1]:8080", b"[2001:DB8::192.0.2.1]", b"a%20b", b"a!$&'()*+,;=b"),
    ],
)
def test_a_host_with_an_optional_port_is_let_in(host):
    """A host with an optional port is accepted and stays as it was sent."""
    assert entered(host=host).host == host


@pytest.mark.parametrize(
    "host",
    [
        *(b"", b" ", b"a b", b"a\tb", b"a/b", b"/", b"a/", b"a?b", b"a#b", b"user@a", b"@a", b"a\\b", b'"a"', b"<a>"),
        *(b"a:b", b"a:", b":80", b"a:80:80", b"a:123456", b"a:-1", b"a:8 0", b"a:+80", b"a:80a", b"http://a", b"a:80/"),
        *(b"::1", b"[::1", b"::1]", b"[]", b"[::1]x", b"[::1]:", b"[::1]:x", b"[::g]", b"x[::1]", b"[[::1]]"),
        b"[fe80::1%1]",
        *(b"a\x00b", b"a\nb", b"a\n", b"a\x7f", b"\xe9.test", b"b\xc3\xbccher.test", b"a^b", b"a|b", b"{a}", b"`a`"),
        *(b"%", b"a%", b"a%2", b"a%zz", b"%%41"),
    ],
)  # fmt: skip
def test_any_other_host_is_refused(host):
    """User names, paths, white space, odd ports and bytes beyond ASCII are refused as hosts."""
    assert refused(host=host) == 400
    assert refused(host=host, version=HTTP10) == 400


def test_a_host_is_named_once():
    """HTTP/1.1 needs exactly one Host, HTTP/1.0 at most one."""
    assert refused(host=None) == 400
    assert entered(host=None, version=HTTP10).host == b""
    for version in (HTTP10, HTTP11):
        assert refused(b"Host: api.test", version=version) == 400
        assert refused(b"host: other.test", version=version) == 400


@pytest.mark.parametrize(
    ("ours", "host", "served"),
    [
        ([], b"anything.test", True),
        ([b"api.test"], b"api.test", True),
        ([b"api.test"], b"API.TEST", True),
        ([b"api.test"], b"api.test:8080", True),
        ([b"api.test"], b"Api.test:1", True),
        ([b"api.test"], b"www.api.test", False),
        ([b"api.test"], b"api.test.evil.test", False),
        ([b"api.test"], b"api.test.", True),
        ([b"api.test"], b"evil.test", False),
        ([b"api.test:8080"], b"api.test:8080", True),
        ([b"api.test:8080"], b"API.test:8080", True),
        ([b"api.test:8080"], b"api.test", False),
        ([b"api.test:8080"], b"api.test:80", False),
        ([b"api.test:8080"], b"api.test:80800", False),
        ([b"a.test", b"b.test:81"], b"a.test:81", True),
        ([b"a.test", b"b.test:81"], b"b.test:81", True),
        ([b"a.test", b"b.test:81"], b"b.test:82", False),
        ([b"[::1]"], b"[::1]", True),
        ([b"[::1]"], b"[::1]:8080", True),
        ([b"[::1]"], b"[::2]", False),
        ([b"[::1]:8080"], b"[::1]:8080", True),
        ([b"[::1]:8080"], b"[::1]", False),
        ([b"[2001:db8::1]"], b"[2001:DB8::1]:80", True),
        ([b"192.0.2.1"], b"192.0.2.1:80", True),
        ([b"192.0.2.1"], b"192.0.2.10", False),
    ],
)
def test_a_host_that_is_not_ours_is_misdirected(ours, host, served):
    """A host in the list serves every port, and one with a port only that port. Others get 421, with any method."""
    gate = Admission(ours, b"idempotency-key", ())
    for method in ("GET", "POST"):
        if served:
            assert entered(host=host, method=method, gate=gate).host == host
        else:
            assert refused(host=host, method=method, gate=gate) == 421


def test_who_names_no_host_is_not_known_to_mean_ours():
    """HTTP/1.0 without a Host gets 421 if there is a list of hosts."""
    assert refused(host=None, version=HTTP10, gate=Admission([b"api.test"], b"idempotency-key", ())) == 421


def test_a_head_that_is_let_in_is_told_whole():
    """A head that passes has all fields as they were sent, and by name."""
    lines = [b"X-A: 1", b"x-a: \xe9", b"ETag: x"]
    head = entered(*lines, target=b"/x")
    assert head.pairs == [(b"Host", HOST), *pairs(*lines)]
    assert head.fields == {b"host": [HOST], b"x-a": [b"1", b"\xe9"], b"etag": [b"x"]}


@many
@given(st.binary(max_size=30), st.binary(max_size=12), st.sampled_from([HTTP10, HTTP11]))
def test_whatever_comes_is_let_in_or_refused(target, host, version):
    """The checks never raise, never repeat the input, and never accept white space in a request line."""
    head = admit(target=b"/" + target, host=host, version=version)
    if isinstance(head, Refused):
        assert len(target) < 6 or target.decode("latin-1") not in head.detail
    else:
        assert head.target == b"/" + target
        assert not set(head.target + head.host) & set(b" \t\r\n\x00#")


# A request's head for the upstream ...

HOP = ForwardedInfo(b"192.0.2.7", b"http", False)
TRUSTED = ForwardedInfo(b"192.0.2.7", b"https", True)


def written(*lines: bytes, hop=HOP, host=b"up.test", prefix=b"", length: int | None = 2, **options) -> list[bytes]:
    """Return the lines of the head for the upstream."""
    raw = request_head(entered(*lines, **options), hop, host, prefix, length)
    *lines_of_it, end = raw.split(b"\r\n")
    assert end == b""
    assert all(lines_of_it)
    return lines_of_it


def values(lines: list[bytes], name: bytes) -> list[bytes]:
    fields = by_name(pairs(*lines[1:]))
    return fields.get(name.lower(), [])


def test_a_request_is_written_anew():
    """A forwarded request has its line, Host, the client's fields in order, forwarding fields and framing, nothing
    else."""
    raw = request_head(
        entered(b"Idempotency-Key: k", b"x-A: \xe9", b"Connection: x-b", b"X-B: 1", b"Content-Length: 99", b"X-a: "),
        HOP,
        b"up.test:81",
        b"/base",
        2,
    )
    assert raw == (
        b"POST /base/v1/charges HTTP/1.1\r\nHost: up.test:81\r\nIdempotency-Key: k\r\nx-A: \xe9\r\nX-a: \r\n"
        b"X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\nVia: 1.1 oncegate\r\nX-Forwarded-Host: api.test\r\n"
        b"Content-Length: 2\r\n"
    )


@pytest.mark.parametrize("prefix", [b"", b"/base", b"/a/b%20c"])
@pytest.mark.parametrize(
    "target",
    [
        *(b"/", b"/%7Ea/../b?x=%2F", b"//evil.test/x", b"/a//b/./..", b"/a%2fb%2Fc%zz", b"/?", b"/?a=b?c/../d"),
        *(b"/;a=b", b'/"<>\\^`{|}', b"/http://evil.test/", b"/\xc3\xa9\xff"),
    ],
)  # fmt: skip
def test_the_target_goes_on_byte_for_byte(target, prefix):
    """The target follows the upstream's path prefix byte for byte, with escapes, dot segments and double slashes."""
    assert written(target=target, prefix=prefix)[0] == b"POST " + prefix + target + b" HTTP/1.1"


@pytest.mark.parametrize("version", [HTTP10, HTTP11])
def test_the_upstream_is_spoken_to_in_http_1_1(version):
    """The upstream gets HTTP/1.1, and Via has the client's version."""
    lines = written(version=version)
    assert lines[0].endswith(b" HTTP/1.1")
    assert values(lines, b"via") == [b"1.%d oncegate" % version[1]]


@pytest.mark.parametrize("host", [b"up.test", b"up.test:81", b"[::1]:81", HOST])
def test_the_host_is_the_one_given(host):
    """Host is sent once and first. The client's own Host is in X-Forwarded-Host."""
    lines = written(host=host)
    assert lines[1] == b"Host: " + host
    assert values(lines, b"host") == [host]
    assert values(lines, b"x-forwarded-host") == [HOST]


@pytest.mark.parametrize(
    ("length", "framing"),
    [
        (None, [b"Transfer-Encoding: chunked"]),
        (-1, []),
        (0, [b"Content-Length: 0"]),
        (5, [b"Content-Length: 5"]),
        (2**40, [b"Content-Length: 1099511627776"]),
    ],
)
@pytest.mark.parametrize("sent", [[], [b"Content-Length: 7"], [b"transfer-encoding: Chunked"]])
def test_the_framing_is_ours(length, framing, sent):
    """The framing is that of the body that is sent, never that of the client's head."""
    lines = written(*sent, length=length)
    assert [line for line in lines if line.lower().startswith((b"content-length", b"transfer-encoding"))] == framing


def test_expectations_and_the_hop_end_here():
    """Expect, hop-by-hop fields and nominated ones never reach the upstream."""
    stripped = (b"Expect: 100-continue", b"Connection: x-custom", b"X-Custom: 1", b"Keep-Alive: 1", b"TE: gzip")
    assert written(*stripped, b"X: 1") == written(b"X: 1")


def test_a_wish_for_trailers_is_repeated_as_ours():
    """Trailers of the response are passed on, so the upstream is told of it on this hop, too."""
    assert {b"TE: trailers", b"Connection: TE"} < set(written(b"te: gzip;q=0.5, Trailers", b"Connection: close, te"))


@pytest.mark.parametrize("name", [b"traceparent", b"tracestate", b"baggage", b"Accept-Encoding", b"Idempotency-Key"])
def test_the_clients_own_fields_reach_the_upstream(name):
    """Trace context, the key and Accept-Encoding are forwarded unchanged."""
    assert name + b": \xe9,1" in written(name + b": \xe9,1")


CLAIMED = (
    *(b"Forwarded: for=203.0.113.9", b"Via: 1.0 edge", b"X-Real-IP: 203.0.113.9", b"x-forwarded-for: 203.0.113.9"),
    *(b"X-Forwarded-Host: shop.test", b"X-Forwarded-Port: 444", b"X-Forwarded-Prefix: /p"),
    *(b"X-Forwarded-Proto: gopher", b"X-Forwarded-Server: edge"),
)  # fmt: skip


def test_what_a_stranger_claims_of_its_way_is_dropped():
    """The forwarding fields of an untrusted client are replaced by what this proxy knows."""
    assert written(*CLAIMED) == written()
    lines = written(*CLAIMED, *CLAIMED, b"X-Forwarded-For: 198.51.100.1, 198.51.100.2")
    assert values(lines, b"x-forwarded-for") == [b"192.0.2.7"]
    assert values(lines, b"x-forwarded-proto") == [b"http"]
    assert values(lines, b"x-forwarded-host") == [HOST]
    assert values(lines, b"via") == [b"1.1 oncegate"]
    assert not [line for line in lines if b"203.0.113.9" in line or b"edge" in line or b"198.51.100" in line]


def test_what_a_trusted_proxy_says_is_kept():
    """For a trusted proxy, this hop is added to X-Forwarded-For and Via, and its scheme and host stay."""
    lines = written(*CLAIMED, hop=TRUSTED)
    assert values(lines, b"x-forwarded-for") == [b"203.0.113.9, 192.0.2.7"]
    assert values(lines, b"x-forwarded-proto") == [b"gopher"]
    assert values(lines, b"x-forwarded-host") == [b"shop.test"]
    assert values(lines, b"via") == [b"1.0 edge, 1.1 oncegate"]
    assert values(lines, b"forwarded") == [b"for=203.0.113.9"]
    assert values(lines, b"x-real-ip") == [b"203.0.113.9"]
    assert values(lines, b"x-forwarded-port") == [b"444"]
    assert values(lines, b"x-forwarded-prefix") == [b"/p"]
    assert values(lines, b"x-forwarded-server") == [b"edge"]


def test_several_lines_of_a_trusted_proxy_stay_in_order():
    """Several lines of a trusted proxy are joined in their order, and this hop comes last."""
    more = (b"X-Forwarded-For: 1.1.1.1, 2.2.2.2", b"x-forwarded-for: 3.3.3.3", b"via: 1.1 a", b"Via: 2 b, 1.1 c")
    lines = written(*more, hop=TRUSTED)
    assert values(lines, b"x-forwarded-for") == [b"1.1.1.1, 2.2.2.2, 3.3.3.3, 192.0.2.7"]
    assert values(lines, b"via") == [b"1.1 a, 2 b, 1.1 c, 1.1 oncegate"]


def test_of_several_schemes_and_hosts_the_nearest_hop_counts():
    """Of several X-Forwarded-Proto and X-Forwarded-Host lines, the last is the trusted proxy's own."""
    claimed = (b"X-Forwarded-Proto: gopher", b"X-Forwarded-Host: evil.test", b"x-forwarded-proto: https")
    lines = written(*claimed, b"x-forwarded-host: shop.test", hop=replace(TRUSTED, scheme=b"http"))
    assert values(lines, b"x-forwarded-proto") == [b"https"]
    assert values(lines, b"x-forwarded-host") == [b"shop.test"]


def test_a_trusted_proxy_that_says_nothing_is_the_client():
    """A trusted proxy without forwarding fields is itself the client."""
    lines = written(hop=TRUSTED)
    assert values(lines, b"x-forwarded-for") == [b"192.0.2.7"]
    assert values(lines, b"x-forwarded-proto") == [b"https"]
    assert values(lines, b"x-forwarded-host") == [HOST]


def test_a_client_without_a_host_has_no_forwarded_host():
    """A request without a Host has no X-Forwarded-Host."""
    assert values(written(version=HTTP10, host=b"up.test"), b"x-forwarded-host") == [HOST]
    head = entered(version=HTTP10, host=None)
    assert b"X-Forwarded-Host" not in request_head(head, HOP, b"up.test", b"", 0)


# What goes past this hop, in both directions ...

END_TO_END = (
    *(b"Idempotency-Key", b"Authorization", b"Cookie", b"Content-Type", b"Content-Encoding", b"Accept-Encoding"),
    *(b"Date", b"ETag", b"Cache-Control", b"Retry-After", b"X-Custom", b"X_Custom", b"Prefer", b"Keep-Alive-Not"),
    *(b"traceparent", b"tracestate", b"baggage", b"X-Connection", b"X-Upgrade", b"Accept", b"Allow", b"Content-MD5"),
)


def past_this_hop(*sent: tuple[bytes, bytes]) -> list[bytes]:
    """Return the lines that go on of these fields: the same in a request, an answer and a replay."""
    head = entered(version=HTTP11)._replace(pairs=list(sent), fields=by_name(list(sent)))
    request = request_head(head, HOP, HOST, b"", -1).removesuffix(b"\r\n").split(b"\r\n")
    own = request_head(entered(), HOP, HOST, b"", -1).removesuffix(b"\r\n").split(b"\r\n")
    passed_on, kept = response_blocks(list(sent), by_name(list(sent)))
    past = [line for line in request if line not in own]
    assert passed_on == kept == b"".join(line + b"\r\n" for line in past)
    return past


@pytest.mark.parametrize("name", HOP_BY_HOP)
@pytest.mark.parametrize("spelled", [bytes, bytes.lower, bytes.upper])
def test_a_hop_by_hop_field_ends_here(name, spelled):
    """A hop-by-hop field is dropped from requests and responses, in any spelling and any number."""
    assert past_this_hop((b"A", b"1"), (spelled(name), b"x"), (b"B", b"2"), (name, b"x")) == [b"A: 1", b"B: 2"]


@pytest.mark.parametrize("name", END_TO_END)
def test_an_end_to_end_field_goes_on_as_it_came(name):
    """An end-to-end field keeps its name, value and place, byte for byte."""
    sent = [(b"A", b"1"), (name, b"\xe9 \tx"), (name.swapcase(), b""), (b"a", b"2")]
    assert past_this_hop(*sent) == [b"%s: %s" % pair for pair in sent]


@pytest.mark.parametrize(
    "connection",
    [
        [b"x-custom"],
        [b"X-CUSTOM"],
        [b"close, X-Custom"],
        [b"keep-alive ,\tx-custom ,"],
        [b"close", b"x-custom"],
        [b"x-custom", b"x-custom"],
    ],
)
def test_a_nominated_field_ends_here(connection):
    """A field that Connection nominates is dropped, in any case, spacing and line."""
    nominated = [(b"Connection", value) for value in connection]
    assert past_this_hop(*nominated, (b"X-Custom", b"1"), (b"X-Custom-2", b"2")) == [b"X-Custom-2: 2"]


# An upstream's answer ...


def answer(status=200, reason=b"OK", pairs=(), head_only=False) -> ResponseHead:
    head = read_response_head(status, reason, list(pairs), head_only)
    assert isinstance(head, ResponseHead), head
    return head


LENGTH, CHUNKED = [(b"Content-Length", b"5")], [(b"transfer-encoding", b"Chunked")]


@pytest.mark.parametrize(
    ("status", "sent", "head_only", "length", "bodiless", "close_delimited"),
    [
        (200, LENGTH, False, 5, False, False),
        (200, [(b"content-length", b"0")], False, 0, False, False),
        (200, [(b"CONTENT-LENGTH", b"007")], False, 7, False, False),
        (200, [(b"Content-Length", b"5 \t")], False, 5, False, False),
        (200, [(b"Content-Length", b"9" * 18)], False, 10**18 - 1, False, False),
        (200, CHUNKED, False, None, False, False),
        (200, [], False, None, False, True),
        (200, [(b"Connection", b"close")], False, None, False, True),
        (201, CHUNKED, False, None, False, False),
        (205, [], False, None, False, True),
        (205, LENGTH, False, 5, False, False),
        (205, CHUNKED, False, None, False, False),
        (307, LENGTH, False, 5, False, False),
        (599, [], False, None, False, True),
        (204, [], False, None, True, False),
        (204, LENGTH, False, 5, True, False),
        (204, CHUNKED, False, None, True, False),
        (304, [], False, None, True, False),
        (304, LENGTH, False, 5, True, False),
        (200, [], True, None, True, False),
        (200, LENGTH, True, 5, True, False),
        (200, CHUNKED, True, None, True, False),
        (404, LENGTH, True, 5, True, False),
        (304, LENGTH, True, 5, True, False),
    ],
)
def test_how_the_end_of_an_answer_is_told(status, sent, head_only, length, bodiless, close_delimited):
    """A body ends by its length, its chunks or the closing. 204, 304 and responses to HEAD have none, 205 has one."""
    head = answer(status, pairs=sent, head_only=head_only)
    assert (head.length, head.bodiless, head.close_delimited) == (length, bodiless, close_delimited)


@pytest.mark.parametrize(("status", "stated"), [(204, b""), (304, b"Content-Length: 5\r\n")])
def test_an_answer_without_content_states_no_length(status, stated):
    """A 204 has no Content-Length, a 304 may have one (RFC 9110, section 8.6)."""
    head = answer(status, pairs=LENGTH)
    assert head.forwarded_block == head.replayed_block == stated


@pytest.mark.parametrize("status", [0, 99, 100, 103, 199, 1000, -1])
def test_a_status_that_is_no_final_answer_makes_it_unusable(status):
    """A status is final only from 200 to 999, and 101."""
    assert isinstance(read_response_head(status, b"", [], False), str)


def test_what_follows_a_switch_has_no_framing():
    """After 101 the connection speaks another protocol to its end, whatever the fields say."""
    head = answer(101, pairs=[(b"Content-Length", b"3"), (b"Transfer-Encoding", b"chunked")])
    assert (head.length, head.bodiless, head.close_delimited) == (None, False, True)


@pytest.mark.parametrize("status", [200, 299, 300, 400, 451, 500, 599])
def test_every_final_status_is_usable(status):
    """Every final status can be used, registered or not."""
    assert answer(status).status == status


@pytest.mark.parametrize(
    "sent",
    [
        *[[(b"Content-Length", value)] for value in (b"", b"-1", b"+5", b"5.0", b"0x5", b"5 5", b"5, 5", b"five")],
        *[[(b"Content-Length", value)] for value in (b"5;", b"1e3", b"\xb2", b"\xd9\xa5", b"9" * 19)],
        [(b"Content-Length", b"9" * 5000)],
        [(b"Content-Length", b"5"), (b"Content-Length", b"5")],
        [(b"Content-Length", b"5"), (b"content-length", b"6")],
        [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")],
        *[[(b"Transfer-Encoding", value)] for value in (b"gzip", b"identity", b"gzip, chunked", b"chunked, gzip")],
        *[[(b"Transfer-Encoding", value)] for value in (b"", b"chunked, chunked", b"xchunked", b"chunked;a")],
        [(b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")],
        [(b"Transfer-Encoding", b"gzip"), (b"Transfer-Encoding", b"chunked")],
    ],
    ids=lambda sent: repr(sent)[:60],
)  # fmt: skip
@pytest.mark.parametrize(("status", "head_only"), [(200, False), (205, False), (204, False), (200, True)])
def test_an_answer_whose_end_could_be_read_in_two_ways_is_unusable(sent, status, head_only):
    """Bad or repeated lengths, other codings, and a length beside chunks make a response unusable."""
    assert isinstance(read_response_head(status, b"OK", sent, head_only), str)


CONTROLS = [code for code in range(32) if code != 9] + [127]


@pytest.mark.parametrize("place", ["name", "value", "second value", "reason"])
@pytest.mark.parametrize("form", [b"%sab", b"a%sb", b"ab%s", b"%s"])
def test_a_control_character_makes_an_answer_unusable(place, form):
    """A control character makes a response unusable, because it could split a message. Any other byte stays."""
    for code in range(256):
        text = form % bytes([code])
        sent = [(b"A", b"1"), (b"B", b"2")]
        reason = b"OK"
        match place:
            case "name":
                sent[0] = (text, b"1")
            case "value":
                sent[0] = (b"A", text)
            case "second value":
                sent[1] = (b"B", text)
            case "reason":
                reason = text
        head = read_response_head(200, reason, sent, False)
        assert isinstance(head, str) is (code in CONTROLS), bytes([code])
        if isinstance(head, ResponseHead):
            assert (head.reason, head.pairs) == (reason, sent)


def test_a_head_has_64_kib():
    """A head with its reason, names, values and separators has at most 64 KiB."""
    most = 65536 - len(b"OK" + b"A: \r\n")
    assert answer(pairs=[(b"A", b"x" * most)])
    assert isinstance(read_response_head(200, b"OK", [(b"A", b"x" * (most + 1))], False), str)
    assert isinstance(read_response_head(200, b"OK.", [(b"A", b"x" * most)], False), str)
    assert answer(pairs=[(b"A", b"x" * 11)] * 4095)
    assert isinstance(read_response_head(200, b"OK", [(b"A", b"x" * 11)] * 4096, False), str)


@pytest.mark.parametrize(
    ("content_type", "streamed"),
    [
        ([b"text/event-stream"], True),
        ([b"Text/Event-Stream; charset=utf-8"], True),
        ([b"text/event-stream;x"], True),
        ([b"text/plain"], False),
        ([b"application/json"], False),
        ([b"x; y=text/event-stream"], False),
        ([], False),
    ],
)
def test_an_event_stream_is_known_by_its_type(content_type, streamed):
    """A response of the type text/event-stream is known as an event stream."""
    assert answer(pairs=[(b"Content-Type", value) for value in content_type]).is_event_stream is streamed


# ... and its fields for the client.


def both(head: ResponseHead) -> bytes:
    """Return the fields that the first client gets, which are those of a replay."""
    passed_on, kept = head.forwarded_block, head.replayed_block
    assert passed_on == kept
    return passed_on


DROPPED = [
    *(b"Oncegate-Status", b"oncegate-status", b"ONCEGATE-X", b"Oncegate-", b"Idempotent-Replayed"),
    b"IDEMPOTENT-REPLAYED",
]


@pytest.mark.parametrize("name", DROPPED)
def test_an_upstream_does_not_speak_in_our_name(name):
    """Oncegate-* and Idempotent-Replayed that come from it are dropped."""
    assert both(answer(pairs=[(b"A", b"1"), (name, b"true"), (b"B", b"2")])) == b"A: 1\r\nB: 2\r\n"


@pytest.mark.parametrize("name", [b"X-Oncegate-Status", b"Oncegate", b"Idempotent-Replayed-At", b"Idempotency-Key"])
def test_a_name_like_ours_is_the_upstreams_own(name):
    """A name that only resembles ours is forwarded."""
    assert both(answer(pairs=[(name, b"x")])) == name + b": x\r\n"


@pytest.mark.parametrize(
    "name",
    [
        *(b"Set-Cookie", b"set-cookie", b"WWW-Authenticate", b"Authentication-Info", b"AUTHENTICATION-INFO", b"Age"),
        *(b"Proxy-Authenticate", b"Proxy-Authentication-Info", b"proxy-status", b"Proxy-X"),
    ],
)
def test_a_replay_leaves_out_what_belongs_to_the_first_exchange(name):
    """Cookies, challenges and Proxy-* go to the first client alone; Age is written anew."""
    head = answer(pairs=[(b"A", b"1"), (name, b"x"), (name.lower(), b"y"), (b"B", b"2")])
    passed_on, kept = head.forwarded_block, head.replayed_block
    assert kept == b"A: 1\r\nB: 2\r\n"
    assert passed_on == b"A: 1\r\n%s: x\r\n%s: y\r\nB: 2\r\n" % (name, name.lower())


def test_what_connection_nominates_ends_here_in_a_replay_too():
    """A replay drops hop-by-hop and nominated fields, and keeps the rest."""
    sent = pairs(b"Connection: close, X-Hop", b"X-Hop: 1", b"Date: d", b"Keep-Alive: timeout=5", b"Trailer: x", b"X: 2")
    assert both(answer(pairs=sent)) == b"Date: d\r\nX: 2\r\n"


def test_a_length_cannot_be_nominated_away():
    """Content-Length stays though Connection nominates it, because it is the end of the response."""
    sent = pairs(b"Connection: close, Content-Length", b"A: 1", b"Content-Length: 5", b"B: 2")
    head = answer(pairs=sent)
    assert head.length == 5
    assert both(head) == b"A: 1\r\nContent-Length: 5\r\nB: 2\r\n"


@pytest.mark.parametrize(
    "name", [b"Date", b"Server", b"ETag", b"Location", b"Retry-After", b"Content-Encoding", b"Vary", b"Link", b"X_Y"]
)
def test_a_replay_keeps_everything_else(name):
    """A replay repeats all other fields byte for byte, the original's Date included."""
    head = answer(pairs=[(name, b"\xe9"), (name.upper(), b""), (name, b"a\tb")])
    assert both(head) == b"%s: \xe9\r\n%s: \r\n%s: a\tb\r\n" % (name, name.upper(), name)


names = st.text("abcXYZ019-_.", min_size=1, max_size=8).map(lambda text: b"x" + text.encode())
texts = st.binary(max_size=12).map(lambda raw: bytes(byte for byte in raw if byte not in CONTROLS).strip(b" \t"))


@many
@given(st.lists(st.tuples(names, texts), max_size=8))
def test_an_answers_own_fields_stay_as_they_are(sent):
    """Order, duplicates, case and bytes of a response's fields stay, now and on a replay."""
    assert both(answer(pairs=sent)) == b"".join(b"%s: %s\r\n" % pair for pair in sent)


@pytest.mark.parametrize("reason", [b"OK", b"", b"Very Created", b"\xe9t\xe9", b"a\tb", b" "])
def test_a_reason_stays_as_it_is(reason):
    """The reason phrase is that of the upstream, whatever the status."""
    assert status_line(201, answer(201, reason).reason) == b"HTTP/1.1 201 " + reason + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "age_s"),
    [
        ([], 0),
        ([b"0"], 0),
        ([b"7"], 7),
        ([b" 7 "], 7),
        ([b"7", b"9"], 7),
        ([b"999999999"], 999_999_999),
        *[([value], 0) for value in (b"", b"-1", b"1.5", b"x", b"1 2", b"9999999999", b"9" * 5000, b"\xb2")],
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_answer_may_have_an_age_already(sent, age_s):
    """The age is the first Age field in seconds, and 0 for a malformed one."""
    assert answer(pairs=[(b"Age", value) for value in sent]).age_s == age_s


@pytest.mark.parametrize(
    ("sent", "wait_s"),
    [
        ([b"wait=10"], 10),
        ([b"wait=0"], 0),
        ([b"Wait=10"], 10),
        ([b"WAIT = 10"], 10),
        ([b'wait="10"'], 10),
        ([b"wait=10; foo=bar"], 10),
        ([b"respond-async, wait=10"], 10),
        ([b"wait=10, respond-async"], 10),
        ([b"return=minimal", b"wait=10"], 10),
        ([b"wait=10", b"wait=20"], 10),
        ([b"wait=10, wait=20"], 10),
        ([b"wait=999999999"], 999_999_999),
        *[
            ([b"wait=" + value], 999_999_999)
            for value in (b"1000000000", b"99999999999", b"9" * 5000, b"0099999999999")
        ],
        ([b"wait=" + b"0" * 5000 + b"7"], 7),
        ([b"wait=00"], 0),
        ([], None),
        ([b""], None),
        ([b"respond-async"], None),
        ([b"wait"], None),
        ([b"waits=10"], None),
        ([b"x-wait=10"], None),
        ([b"return=minimal; wait=10"], None),
        *[
            ([b"wait=" + value], None)
            for value in (b"", b"-1", b"1.5", b"ten", b"1 0", b"1e1", b"\xb2", b"9" * 20 + b"x")
        ],
        ([b"wait=ten, wait=20"], None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_client_may_prefer_to_wait(sent, wait_s):
    """Only the first `Prefer: wait=N` counts, and a malformed one does not."""
    assert preferred_wait_s(sent) == wait_s


@pytest.mark.parametrize(
    "sent",
    [
        [b"respond-async"],
        [b"wait=5, Respond-Async"],
        [b"handling=lenient", b" respond-async ; x=y"],
        [b'a="x, y", respond-async'],
    ],
)
def test_a_client_may_prefer_not_to_wait(sent):
    assert prefers(sent, b"respond-async")


@pytest.mark.parametrize("sent", [[b""], [b"respond"], [b'a="x, respond-async"'], [b"x-respond-async"]])
def test_another_preference_is_not_taken_for_it(sent):
    assert not prefers(sent, b"respond-async")


@pytest.mark.parametrize(
    ("sent", "forwarded"),
    [
        ("respond-async", []),
        ("respond-async, wait=5", []),
        ("Respond-Async;x=1 , return=minimal", ["return=minimal"]),
        ('a="x, respond-async", wait=3,respond-async', ['a="x, respond-async"']),
        ("return=minimal; foo, b", ["return=minimal; foo, b"]),
    ],
)
def test_what_oncegate_does_itself_is_not_asked_of_the_api(sent, forwarded):
    """The other preferences go on as they came."""
    pairs = [(b"Host", b"a"), (b"PREFER", sent.encode()), (b"X", b"respond-async")]
    head = without_preferences(RequestHead("POST", b"/", False, b"a", pairs, {}), (b"respond-async", b"wait"))
    assert head.pairs == [(b"Host", b"a"), *[(b"PREFER", one.encode()) for one in forwarded], (b"X", b"respond-async")]
