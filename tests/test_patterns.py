"""The patterns of rules: what they match, which includes which, and which paths are equivalent."""

import time

import pytest

from oncegate.messages.target import normalized_path
from oncegate.rules.patterns import (
    host_includes,
    host_matches,
    parse_host_pattern,
    parse_path,
    path_includes,
    path_matcher,
    text_includes,
    text_matcher,
)

PLAIN = {
    b"/a": b"/a",
    b"/a?b=/c/../d": b"/a",
    b"/": b"/",
    b"/%61%7E%2d": b"/a~-",
    b"/a%2Fb": b"/a%2Fb",
    b"/a%2fb%00": b"/a%2fb%00",
    b"/a/./b": b"/a/b",
    b"/a/../b": b"/b",
    b"/../../b": b"/b",
    b"/a/..": b"/",
    b"/a/.": b"/a/",
    b"/a/b/..": b"/a/",
    b"/%2e%2E/b": b"/b",
    b"/a/%2e./b": b"/b",
    b"//a///b/": b"/a/b/",
    b"/a//../b": b"/b",
    b"/.a/..b/c.": b"/.a/..b/c.",
    b"/%": b"/%",
    b"/%zz": b"/%zz",
}


@pytest.mark.parametrize(("target", "path"), PLAIN.items(), ids=repr)
def test_what_means_the_same_path_is_the_same(target, path):
    """Escapes of unreserved characters, dot segments and doubled slashes cannot evade a rule."""
    assert normalized_path(target) == path


MATCHES = {
    "/a": ([b"/a"], [b"/", b"/a/", b"/ab", b"/a/b", b"/A", b"x/a"]),
    "/": ([b"/"], [b"/a"]),
    "/a/": ([b"/a/"], [b"/a"]),
    "/a/*": ([b"/a/b", b"/a/"], [b"/a", b"/a/b/c"]),
    "/*/b": ([b"/a/b"], [b"/b", b"/a/a/b", b"/a/b/"]),
    "/a*": ([b"/a", b"/ab"], [b"/a/b", b"/b"]),
    "/a*b*c": ([b"/abc", b"/abbcc", b"/aXbYc"], [b"/abcd", b"/acb", b"/a/b/c"]),
    "/*.json": ([b"/a.json", b"/.json", b"/a.json.json"], [b"/a.jsonx", b"/a/b.json", b"/axjson"]),
    "/**": ([b"/", b"/a", b"/a/b/"], []),
    "/a/**": ([b"/a", b"/a/", b"/a/b/c"], [b"/ab", b"/b/a"]),
    "/**/a": ([b"/a", b"/b/a", b"/b/c/a"], [b"/a/b", b"/ba"]),
    "/a/**/b": ([b"/a/b", b"/a/x/b", b"/a/b/b"], [b"/a", b"/ab", b"/a/bb", b"/a/b/c"]),
    "/**/a/*/**/z": ([b"/q/a/1/z", b"/a/a/z", b"/a/1/2/z"], [b"/a/z", b"/a/1/2", b"/b/1/z"]),
    "/**/a/*": ([b"/a/b/a/c", b"/a/b"], [b"/a/b/a/c/d", b"/a"]),
    "/a.b+c(d)": ([b"/a.b+c(d)"], [b"/aXb+c(d)"]),
}


@pytest.mark.parametrize("pattern", MATCHES)
def test_a_path_pattern(pattern):
    """`*` matches within a segment, `**` any number of segments, and every other character itself."""
    matcher = path_matcher(parse_path(pattern))
    good, bad = MATCHES[pattern]
    assert [path for path in good if not matcher.fullmatch(path)] == []
    assert [path for path in bad if matcher.fullmatch(path)] == []


@pytest.mark.parametrize(
    "text", ["", "a", "a/b", "http://a/b", "/a?b", "/a#b", "/a b", "/ä", "/a**", "/**a", "/***", "/a/../b", "/./a",
             "//a", "/%61", "/a/%7Eb"]
)  # fmt: skip
def test_what_is_no_path_pattern(text):
    """A pattern that could never match, or that is equivalent to another, is refused."""
    with pytest.raises(ValueError):  # noqa: PT011 - the kind is what the reader of rules catches
        parse_path(text)


@pytest.mark.parametrize("pattern", ["/**/a/**/a/**/a/**/b", "/*a*a*a*a*a*b", "/**/*a*a/**/*a*a*/**/b", "/**/**/**/b"])
@pytest.mark.parametrize("path", [b"/a" * 8000, b"/" + b"a" * 16000, b"/aa" * 5000], ids=["segments", "one", "pairs"])
def test_matching_takes_linear_time(pattern, path):
    """No pattern makes the longest target take long."""
    matcher = path_matcher(pattern)
    began = time.process_time()
    assert not matcher.fullmatch(path)
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        ("Stripe/*", b"Stripe/1.0 (+x)", True),
        ("Stripe/*", b"stripe/1.0", False),
        ("*", b"", True),
        ("", b"", True),
        ("", b"x", False),
        ("a*z", b"a\xff\nz", True),
        ("*b*", b"abc", True),
        ("a.c", b"abc", False),
    ],
)
def test_a_value_pattern(pattern, value, matches):
    """In the pattern of a header's value, `*` matches any text."""
    assert bool(text_matcher(pattern).fullmatch(value)) is matches


@pytest.mark.parametrize(
    ("pattern", "host", "matches"),
    [
        ("api.test", "api.test", True),
        ("api.test", "api.test:8080", True),
        ("api.test", "xapi.test", False),
        ("api.test", "", False),
        ("api.test:80", "api.test:80", True),
        ("api.test:80", "api.test", False),
        ("api.test:80", "api.test:8080", False),
        ("*.api.test", "a.api.test", True),
        ("*.api.test", "a.b.api.test:80", True),
        ("*.api.test", "api.test", False),
        ("*.api.test", ".api.test", False),
        ("*.api.test", "xapi.test", False),
        ("[::1]", "[::1]:80", True),
        ("[::1]", "[::2]", False),
        ("[::1]:80", "[::1]:80", True),
        ("[::1]:80", "[::1]", False),
    ],
)
def test_a_host_pattern(pattern, host, matches):
    """A host without a port matches any port, and `*.` any subdomain."""
    assert parse_host_pattern(pattern.upper()) == pattern
    assert host_matches(pattern, host) is matches


@pytest.mark.parametrize(
    "text", ["", "*", "a.*", "*.*.a", "a b", "http://a", "a/b", "a:port", "ä.test", "[::1", "a..b"]
)
def test_what_is_no_host_pattern(text):
    with pytest.raises(ValueError, match="must be a host"):
        parse_host_pattern(text)


@pytest.mark.parametrize(
    ("one", "other", "includes"),
    [
        (None, "/a", True),
        ("/a", None, False),
        ("/**", "/a/*/b", True),
        ("/a", "/a", True),
        ("/a", "/b", False),
        ("/a/*", "/a/b", True),
        ("/a/*", "/a/*", True),
        ("/a/*", "/a/b*c", True),
        ("/a/*", "/a/**", False),
        ("/a/b", "/a/*", False),
        ("/a/**", "/a/*/c/**", True),
        ("/a/**", "/a", True),
        ("/**/c", "/a/**/c", True),
        ("/**/c", "/a/**", False),
        ("/a*", "/ab*", True),
        ("/ab*", "/a*", False),
        ("/**/x/**", "/a/x/b/**", True),
        ("/**/x/**", "/a/**", False),
    ],
)
def test_one_path_pattern_includes_another(one, other, includes):
    """A pattern includes another only where it surely matches everything that the other matches."""
    assert path_includes(one, other) is includes


def test_other_patterns_include_others():
    """Patterns of values and of hosts include others by the same rule."""
    assert text_includes("a*", "ab*")
    assert not text_includes("ab*", "a*")
    assert host_includes(None, "a.test")
    assert not host_includes("a.test", None)
    assert host_includes("a.test", "a.test:80")
    assert not host_includes("a.test:80", "a.test")
    assert host_includes("*.test", "a.test")
    assert host_includes("*.test", "*.a.test")
    assert not host_includes("*.a.test", "*.test")
