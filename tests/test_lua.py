"""The scripts: each opens with its contract, and header and body agree."""

import re
import time
from importlib.resources import files

import pytest

from oncegate.store.redis.server import load_scripts
from oncegate.store.redis.wire import listed

RECORD_VERBS = ("append", "claim", "drop", "follow", "read", "renew", "resolve", "settle")
STORE_VERBS = {
    "epoch": "epoch",
    "identity": "identities",
    "members": "members",
    "post": "mailbox",
    "swap": "mark",
}  # about a whole store; what they call their key
VERBS = (*RECORD_VERBS, *STORE_VERBS)
VARIANTS = ("put", "store", "release", "unknown", "answer")  # of `action`
ALLOW_OOM = "#!lua flags=allow-oom"
TEXTS = {verb: (files("oncegate.store.redis.lua") / f"{verb}.lua").read_text() for verb in VERBS}
KEY = "once:{test}"


# The contract, as the header states it ...


def lines(verb: str) -> list[str]:
    """Return the script's lines without its `#!lua` line."""
    found = TEXTS[verb].splitlines()
    return found[1:] if found[0].startswith("#!") else found


def header(verb: str) -> list[str]:
    """Return the comment that the script opens with."""
    found = lines(verb)
    end = next(number for number, line in enumerate(found) if not line.startswith("--"))
    return [line.removeprefix("--") for line in found[:end]]


def body(verb: str) -> str:
    """Return the script's code, without its comments."""
    return "\n".join(line for line in lines(verb) if not line.lstrip().startswith("--"))


def section(verb: str, name: str) -> list[str]:
    """Return the lines of one part of the contract."""
    found: list[str] = []
    current = ""
    for line in header(verb):
        if start := re.match(r" (KEYS|ARGV|Returns): ", line):
            current = start[1]
        if current == name:
            found.append(line.removeprefix(f" {name}: "))
    return found


def arguments(verb: str, variant: str = "") -> list[str]:
    """Return the names of the arguments in their order, for one value of `action` where that matters."""
    common, *more = [re.sub(r" *\(.*| *, then$", "", line) for line in section(verb, "ARGV")]
    variants = dict(line.strip().split(": ", 1) for line in more)
    return common.split() + variants.get(variant, "").split()


def longest(verb: str) -> int:
    return max(len(arguments(verb, variant)) for variant in ("", *VARIANTS))


def names_at(verb: str, position: int) -> set[str]:
    """Return the names that the header gives one argument: several where `action` decides."""
    every = [arguments(verb, variant) for variant in ("", *VARIANTS)]
    return {names[position - 1] for names in every if len(names) >= position}


def as_arrays(text: str) -> str:
    """Return a text with `tag .. ' word ' .. other`, one string of words, written as the array of these words."""

    def array(found: re.Match[str]) -> str:
        elements = [one.strip() for one in found[1].split("..") if one.strip() != "' '"]
        return "{tag, " + re.sub(r"' *([a-z_]+) *'", r"'\1'", ", ".join(elements)) + "}"

    return re.sub(r"\btag \.\. ((?:[^|\n]|\| )*?)(?= *(?:\||\n|$))", array, text)


def replies(text: str, more: dict[str, str]) -> dict[str, set[tuple[int, str]]]:
    """Return the words of all `{tag, ...}` in a text, with the number of elements and the words after it.

    `more`: what else a name stands for.
    """
    found: dict[str, set[tuple[int, str]]] = {}
    for literal in re.findall(r"\{tag, ([^{}]*)\}", as_arrays(text)):
        elements = re.sub(r"\([^()]*\)", "", literal).split(", ")
        if elements[-1] == "...":  # any number of what stands before it
            elements = elements[:-2]
        words = [re.findall(r"'([a-z_]+)'", more.get(element, element)) for element in elements]
        for word in words[0] or [elements[0]]:
            for after in (words[1] if len(words) > 1 else []) or [""]:
                found.setdefault(word, set()).add((len(elements), after))
    return found


def test_there_is_a_script_for_each_verb():
    """Every verb is one file, and all of them are loaded."""
    assert sorted(load_scripts()) == sorted(VERBS)
    for verb, script in load_scripts().items():
        assert script.body.decode() == TEXTS[verb]


@pytest.mark.parametrize("verb", VERBS)
def test_a_script_opens_with_its_contract(verb):
    """One sentence, then KEYS, ARGV and Returns, in this order and once each."""
    sentence, *rest = header(verb)
    assert re.fullmatch(r" [A-Z][^.]*\.", sentence), sentence
    starts = [match[1] for line in rest if (match := re.match(r" (KEYS|ARGV|Returns):", line))]
    assert starts == ["KEYS", "ARGV", "Returns"]
    assert rest[0] == " KEYS: " + STORE_VERBS.get(verb, "record")


@pytest.mark.parametrize("verb", VERBS)
def test_what_may_exceed_the_memory_limit(verb):
    """Running work (renew, settle) may exceed it; a `#!lua` line on the others would stop replays as well."""
    first = TEXTS[verb].splitlines()[0]
    if verb in ("drop", "renew", "resolve", "settle", *STORE_VERBS):
        assert first == ALLOW_OOM
        assert TEXTS[verb].count("#!") == 1
    else:
        assert "#!" not in TEXTS[verb]


@pytest.mark.parametrize("verb", VERBS)
def test_a_script_touches_its_record_alone(verb):
    """Every command names KEYS[1], which is passed in: nothing is built from strings, so Cluster works.

    But for the index of open keys, which a proxy on a cluster leaves out of the scripts. It never fails a call.
    """
    code = re.sub(r"redis\.pcall\('Z(?:ADD|REM)', index, [^\n]*KEYS\[1\]\)\n", "\n", body(verb))
    code = code.replace("local index = 'once:open'\n", "")
    calls = re.findall(r"redis\.p?call\(([^,)]*)(?:, ([^,)]*))?", code)
    assert len(calls) == code.count("redis.")
    for command, key in calls:
        assert re.fullmatch(r"'[A-Z]+'", command)
        assert key == ("" if command == "'TIME'" else "KEYS[1]")
    assert set(re.findall(r"KEYS\S\d*\S?", code)) == {"KEYS[1]"}
    assert not re.search(r"\.\. *KEYS|KEYS\[1\] *\.\.|#KEYS|once:|loadstring", code)


def test_the_commands_that_the_scripts_need():
    """An operator's ACL can list them; read writes nothing."""
    commands = {verb: set(re.findall(r"redis\.p?call\('([A-Z]+)'", body(verb))) for verb in VERBS}
    assert set().union(*commands.values()) == {
        *("TIME", "HGET", "HGETALL", "HMGET", "HLEN", "HSTRLEN", "EXISTS", "HSET", "HDEL", "UNLINK", "PEXPIRE", "PTTL"),
        *("GET", "SET", "SETRANGE", "APPEND", "ZADD", "ZREM"),
    }
    assert commands["read"] == {"GET", "HGET", "HMGET", "HSTRLEN", "TIME"}
    # It writes for a reader alone.
    assert commands["follow"] == commands["read"] | {"HLEN", "HSET"}


@pytest.mark.parametrize("verb", VERBS)
def test_the_header_names_every_argument(verb):
    """As many as the body uses, each of which it does use, by fixed positions."""
    code = body(verb)
    used = {int(position) for position in re.findall(r"ARGV\[(\d+)\]", code)}
    assert used == set(range(1, longest(verb) + 1))
    assert len(re.findall("ARGV", code)) == len(re.findall(r"ARGV\[\d+\]", code))
    assert not re.search(r"(?<!struct\.)unpack(?!\(written\))|#ARGV(?!\[)", code)


@pytest.mark.parametrize("verb", VERBS)
def test_the_header_names_the_arguments_in_their_order(verb):
    """Locals, fields and the TTL that take an argument bear the name which the header gives that position."""
    code = body(verb)
    bound: list[tuple[str, str]] = []
    for names, taken in re.findall(r"local ([\w, ]+) = (ARGV.*)", code):
        bound += zip(names.split(", "), taken.split(", "), strict=True)
    bound += re.findall(r"'([a-z]+)', (ARGV\[\d+\])", code)
    bound += [("retention", taken) for taken in re.findall(r"'PEXPIRE', KEYS\[1\], (ARGV\[\d+\])", code)]
    direct = [(name, int(at[1])) for name, taken in bound if (at := re.fullmatch(r"ARGV\[(\d+)\]", taken))]
    assert direct[:2] == [("tag", 1), (names_at(verb, 2).pop(), 2)]
    for name, position in direct:
        assert name in {word.removesuffix("_ms") for word in names_at(verb, position)}, (name, position)


@pytest.mark.parametrize("verb", VERBS)
def test_the_header_names_every_reply(verb):
    """Each word that the body returns stands under Returns with its company, and the other way round."""
    code = body(verb)
    stands_for = dict(re.findall(r"local (\w+) = .* and ('[\w ]+' or '[\w ]+')", code))
    stands_for = {name: re.sub(r"' *(\w+) *'", r"'\1'", words) for name, words in stands_for.items()}
    promised = replies("\n".join(section(verb, "Returns")), {})
    assert promised == replies(code, stands_for)
    assert promised


@pytest.mark.parametrize("verb", VERBS)
def test_every_reply_begins_with_the_tag(verb):
    """Every reply begins with the tag of its call."""
    code = body(verb)
    named = set(re.findall(r"local (\w+) = \{tag,", code))
    returned = re.findall(r"\breturn\b *(.*)", code)
    assert code.rstrip().splitlines()[-1].startswith("return ")
    for reply in returned:
        assert reply in named or re.fullmatch(r"\{tag, .*\}|tag \.\. .*", reply), reply


# ... and as a caller finds it who has read nothing else.


@pytest.fixture
def called(valkey):
    """Call a verb with its arguments by the names of its header, in the order of its header."""
    with valkey.client() as client:

        def called(verb: str, variant: str = "", **given: object) -> list:
            names = arguments(verb, variant)
            assert set(given) == set(names)
            reply = listed(client.eval(TEXTS[verb], 1, KEY, *[given[name] for name in names]))
            if reply[1] in (b"claimed", b"late"):
                reply[2] = int(reply[2])
            return reply

        called.client = client
        yield called


CLAIM = {
    "tag": "7",
    "token": "T" * 16,
    "terms": b"0000040000-ih" + b"S" * 32 + b"F" * 16 + bytes(2),
    "retention_ms": 500_000,
    "layout": "hash",
    "window_ms": 0,
    "expected_token": "",
    "not_after_ms": 2**52,
}
OWNER = {"tag": "8", "token": "T" * 16}
# Of an append, but for the chunk.
CHUNK = {**OWNER, "retention_ms": 500_000, "layout": "hash", "head": "H"}


RETRY = CLAIM["terms"].replace(b"ih", b"ir")


def meta(token: str = "T" * 16, digest: str = "D" * 16) -> str:
    """Return the part of a complete record's meta that the scripts read."""
    return f"1{token}{1234:016}{5678:016}{digest}"


def record(called) -> dict[str, bytes]:
    return {name.decode(): value for name, value in called.client.hgetall(KEY).items()}


def about(value: object, most: int) -> bool:
    """Whether something that counts down from `most` was set a moment ago."""
    return most - 20_000 <= int(value) <= most


def test_claim_as_its_header_says(called):
    """A free key is claimed with these arguments; another token gets the record; a late claim changes nothing."""
    tag, word, now_ms, fence, created_ms = called("claim", **CLAIM)
    assert (tag, word) == (b"7", b"claimed")
    assert abs(now_ms - time.time() * 1000) < 20_000
    assert int(created_ms) == now_ms
    found = record(called)
    assert about(int(found.pop("lease")) - now_ms, 40_000)
    assert about(called.client.pttl(KEY), 500_000)
    assert found == {
        "token": b"T" * 16,
        "fingerprint": b"F" * 16,
        "self": b"S" * 32,
        "mode": b"hold",
        "state": b"in_flight",
        "fence": fence,
        "created": created_ms,
        "lease_ms": b"40000",
    }
    tag, state, _, token, fence_told, mode, fingerprint, self_check, left_ms, created_told, status, more = called(
        "claim", **{**CLAIM, "tag": "9", "token": "U" * 16}
    )
    assert (tag, state, token, fence_told) == (b"9", b"in_flight", b"T" * 16, fence)
    assert (mode, fingerprint, self_check) == (b"hold", b"F" * 16, b"S" * 32)
    assert about(left_ms, 40_000)
    assert (created_told, status, more) == (created_ms, None, None)
    called.client.hset(KEY, mapping={"state": "unknown", "status": "200"})
    assert called("claim", **{**CLAIM, "token": "U" * 16})[-2] == b"200"
    called.client.delete(KEY)
    tag, word, _ = called("claim", **{**CLAIM, "not_after_ms": now_ms - 1})
    assert (tag, word) == (b"7", b"late")
    assert record(called) == {}


@pytest.mark.parametrize("state", ["in_flight", "unknown"])
@pytest.mark.parametrize("mode", ["hold", "retry"])
def test_claim_takes_over_from_the_token_that_was_seen_alone(called, state, mode):
    """A takeover needs the mode retry, a lease that is over, and the token of the record."""
    claim = {**CLAIM, "terms": RETRY if mode == "retry" else CLAIM["terms"]}
    called("claim", **claim)
    called.client.hset(KEY, mapping={"state": state, "lease": 1})
    before = record(called)
    for seen in ("", "U" * 16):
        assert called("claim", **{**CLAIM, "token": "V" * 16, "expected_token": seen})[1] == state.encode()
    assert record(called) == before
    word = called("claim", **{**CLAIM, "token": "V" * 16, "expected_token": "T" * 16})[1]
    assert word == (b"claimed" if mode == "retry" else state.encode())
    assert record(called)["token"] == (b"V" if mode == "retry" else b"T") * 16


@pytest.mark.parametrize(
    ("chunks", "brought"),
    [
        ({}, None),
        ({"b0": "x" * 5}, b"x" * 5),
        ({"b0": "x" * 65536}, b"x" * 65536),
        ({"b0": "x" * 65537}, None),
        ({"b0": "x", "b1": "y"}, None),
    ],
    ids=["none", "small", "at the limit", "over the limit", "two"],
)
def test_claim_brings_a_small_answer_along(called, chunks, brought):
    """A body of one chunk up to 64 KiB comes with a complete record."""
    called.client.hset(KEY, mapping={"meta": meta(), **chunks})
    before = record(called)
    tag, word, _, told, body, more = called("claim", **CLAIM)
    assert (tag, word, told, body, more) == (b"7", b"complete", meta().encode(), brought, None)
    assert record(called) == before
    assert called.client.ttl(KEY) == -1


def test_append_as_its_header_says(called):
    """A chunk is stored under its index, and the lease stays; the replies are those of the header."""
    chunk = {**OWNER, "index": 0, "chunk": "abc", "retention_ms": 500_000, "layout": "hash", "head": "H"}
    assert called("append", **chunk) == [b"8", b"absent"]
    now_ms = called("claim", **CLAIM)[2]
    assert called("append", **chunk) == [b"8", b"appended"]
    assert called("append", **{**chunk, "index": 1, "chunk": "de"}) == [b"8", b"appended"]
    assert called("append", **chunk) == [b"8", b"appended"]
    assert called("append", **{**chunk, "chunk": "abd"}) == [b"8", b"torn"]
    assert called("append", **{**chunk, "token": "U" * 16}) == [b"8", b"fenced"]
    for until_ms, word in ((now_ms, b"appended"), (2**52, b"read")):
        called.client.hset(KEY, "readers_until", until_ms)
        assert called("append", **chunk) == [b"8", word]
    found = record(called)
    assert (found["b0"], found["b1"], found["bytes"], found["head"]) == (b"abc", b"de", b"5", b"H")
    assert int(found["lease"]) == now_ms + 40_000
    called.client.delete(KEY)
    called.client.hset(KEY, "meta", meta())
    assert called("append", **chunk) == [b"8", b"complete"]
    assert called("append", **{**chunk, "token": "U" * 16}) == [b"8", b"fenced"]


def test_renew_as_its_header_says(called):
    """Lease and retention start anew for the owner alone; the replies are those of the header."""
    renewal = {**OWNER, "lease_ms": 90_000, "retention_ms": 900_000, "stage": "sent", "layout": "hash"}
    assert called("renew", **renewal) == [b"8", b"absent"]
    now_ms = called("claim", **CLAIM)[2]
    assert called("renew", **{**renewal, "token": "U" * 16}) == [b"8", b"fenced"]
    assert about(called.client.pttl(KEY), 500_000)
    assert called("renew", **renewal) == [b"8", b"renewed"]
    assert 90_000 <= int(record(called)["lease"]) - now_ms < 110_000
    assert about(called.client.pttl(KEY), 900_000)
    assert record(called)["stage"] == b"sent"
    called.client.hset(KEY, "state", "unknown")
    assert called("renew", **renewal) == [b"8", b"unknown"]
    called.client.delete(KEY)
    called.client.hset(KEY, "meta", meta())
    assert called("renew", **renewal) == [b"8", b"complete"]
    assert called("renew", **{**renewal, "token": "U" * 16}) == [b"8", b"fenced"]


SETTLE = {**OWNER, "retention_ms": 900_000}
ANSWER = {
    "action": "store",
    "meta": meta(),
    "digest": "D" * 16,
    "chunks": 1,
    "bytes": 3,
    "last": "abc",
    "tombstone_ms": 0,
    "more": "",
}


def test_settle_stores_as_its_header_says(called):
    """A small response becomes meta and one chunk; another one under the same token changes nothing."""
    assert called("settle", "store", **SETTLE, **ANSWER) == [b"8", b"stored", b"absent"]
    called.client.delete(KEY)
    called("claim", **CLAIM)
    assert called("settle", "store", **{**SETTLE, "token": "U" * 16}, **ANSWER) == [b"8", b"fenced"]
    assert called("settle", "store", **SETTLE, **{**ANSWER, "chunks": 2}) == [b"8", b"torn"]
    assert called("settle", "store", **SETTLE, **ANSWER) == [b"8", b"stored", b"found"]
    assert record(called) == {"meta": meta().encode(), "b0": b"abc"}
    assert about(called.client.pttl(KEY), 900_000)
    assert called("settle", "store", **SETTLE, **ANSWER) == [b"8", b"stored", b"found"]
    other = {**ANSWER, "meta": meta(digest="E" * 16), "digest": "E" * 16, "last": "xyz"}
    assert called("settle", "store", **SETTLE, **other) == [b"8", b"complete"]
    assert record(called) == {"meta": meta().encode(), "b0": b"abc"}


def test_what_has_a_tombstone_expires_with_its_retention(called):
    """The record outlives its retention by tombstone_ms; from `until` on, the response is there for nobody."""
    now_ms = called("claim", **CLAIM)[2]
    kept = {**SETTLE, **ANSWER, "tombstone_ms": 500_000}
    assert called("settle", "store", **kept) == [b"8", b"stored", b"found"]
    found = record(called)
    assert set(found) == {"meta", "b0", "until"}
    assert 900_000 <= int(found["until"]) - now_ms < 920_000
    assert about(called.client.pttl(KEY), 1_400_000)
    # A small body still comes along.
    assert called("claim", **CLAIM)[1::2] == [b"complete", meta().encode(), None]
    assert called("claim", **CLAIM)[-2] == b"abc"
    reading = {**OWNER, "first": 0, "limit_bytes": 9}
    assert called("read", **reading) == [b"8", b"chunks", b"abc"]
    assert called("settle", "store", **kept) == [b"8", b"stored", b"found"]
    called.client.hset(KEY, "until", now_ms)
    tag, word, _, told = called("claim", **CLAIM)
    assert (tag, word, told) == (b"7", b"expired", meta().encode())
    assert called("read", **reading) == [b"8", b"gone"]
    assert called("settle", "store", **kept) == [b"8", b"complete"]


@pytest.mark.parametrize("purge", [0, 1])
def test_drop_as_its_header_says(called, purge):
    """The tombstone alone is left, as long as the record was to be; a purge does not wait for the retention."""
    tombstone = "\x03" + meta()[1:49] + "left"
    dropping = {**OWNER, "meta": tombstone, "purge": purge, "layout": "hash"}
    assert called("drop", **dropping) == [b"8", b"absent"]
    now_ms = called("claim", **CLAIM)[2]
    assert called("drop", **dropping) == [b"8", b"absent"]
    called("settle", "store", **{**SETTLE, **ANSWER, "tombstone_ms": 500_000})
    before = record(called)
    assert called("drop", **{**dropping, "token": "U" * 16}) == [b"8", b"fenced"]
    if not purge:
        assert called("drop", **dropping) == [b"8", b"kept"]
        assert record(called) == before
        called.client.hset(KEY, "until", now_ms)
    for _ in range(2):
        assert called("drop", **dropping) == [b"8", b"dropped"]
        assert record(called) == {"meta": tombstone.encode()}
        assert about(called.client.pttl(KEY), 1_400_000)
    assert called("claim", **CLAIM)[1::2] == [b"expired", tombstone.encode()]


@pytest.mark.parametrize("renewed", [False, True])
def test_settle_stores_appended_chunks_as_its_header_says(called, renewed):
    """chunks and bytes count every chunk; last is the one that was not appended."""
    called("claim", **CLAIM)
    called("append", **CHUNK, index=0, chunk="abc")
    called("append", **CHUNK, index=1, chunk="de")
    if renewed:
        called("renew", **OWNER, lease_ms=40_000, retention_ms=900_000, stage="answered", layout="hash")
    answer = {**ANSWER, "chunks": 3, "bytes": 6, "last": "f"}
    for wrong in ({"chunks": 4}, {"chunks": 2}, {"bytes": 5}, {"last": ""}):
        assert called("settle", "store", **SETTLE, **{**answer, **wrong}) == [b"8", b"torn"]
    assert called("settle", "store", **SETTLE, **answer) == [b"8", b"stored", b"found"]
    assert record(called) == {"meta": meta().encode(), "b0": b"abc", "b1": b"de", "b2": b"f"}


def test_settle_releases_as_its_header_says(called):
    """The key is free, and a repeat finds no record."""
    called("claim", **CLAIM)
    assert called("settle", "release", **{**SETTLE, "token": "U" * 16}, action="release", layout="hash") == [
        b"8",
        b"fenced",
    ]
    assert called("settle", "release", **SETTLE, action="release", layout="hash") == [b"8", b"released", b"found"]
    assert record(called) == {}
    assert called("settle", "release", **SETTLE, action="release", layout="hash") == [b"8", b"released", b"absent"]
    called.client.hset(KEY, "meta", meta())
    assert called("settle", "release", **SETTLE, action="release", layout="hash") == [b"8", b"complete"]


def test_settle_marks_unknown_as_its_header_says(called):
    """The record has the given fields, and its chunks are gone."""
    given = {"fence": "12", "mode": "retry", "fingerprint": "G" * 16, "self": "s" * 32, "created": 99, "why": "lost"}
    given["status"] = 200
    marked = {**SETTLE, "action": "unknown", "more": "", **given}
    expected = {
        **{name: str(value).encode() for name, value in given.items()},
        "state": b"unknown",
        "token": b"T" * 16,
        "lease": b"0",
    }
    assert called("settle", "unknown", **marked) == [b"8", b"unknown", b"absent"]
    assert record(called) == expected
    called.client.delete(KEY)
    called("claim", **CLAIM)
    called("append", **CHUNK, index=0, chunk="abc")
    assert called("settle", "unknown", **{**marked, "token": "U" * 16}) == [b"8", b"fenced"]
    assert called("settle", "unknown", **marked) == [b"8", b"unknown", b"found"]
    assert record(called) == expected
    assert about(called.client.pttl(KEY), 900_000)
    assert called("settle", "unknown", **{**marked, "status": 0}) == [b"8", b"unknown", b"found"]
    assert record(called) == {name: value for name, value in expected.items() if name != "status"}
    called.client.delete(KEY)
    called.client.hset(KEY, "meta", meta())
    assert called("settle", "unknown", **marked) == [b"8", b"complete"]


@pytest.mark.parametrize(
    ("first", "limit_bytes", "chunks"),
    [
        (0, 100, ["ab", "cde", "f"]),
        (0, 6, ["ab", "cde", "f"]),
        (0, 5, ["ab", "cde"]),
        (0, 4, ["ab"]),
        (0, 0, ["ab"]),
        (1, 100, ["cde", "f"]),
        (1, 1, ["cde"]),
        (2, 100, ["f"]),
        (3, 100, None),
        (4, 100, None),
    ],
)
def test_read_as_its_header_says(called, first, limit_bytes, chunks):
    """The chunks from the first on that fit, at least one; torn where the first is missing."""
    called.client.hset(KEY, mapping={"meta": meta(), "b0": "ab", "b1": "cde", "b2": "f"})
    expected = [b"8", b"torn"] if chunks is None else [b"8", b"chunks", *map(str.encode, chunks)]
    assert called("read", **OWNER, first=first, limit_bytes=limit_bytes) == expected


FOLLOWING = {**OWNER, "first": 0, "limit_bytes": 4, "reading_ms": 0}


def test_follow_as_its_header_says(called):
    """What there is of a running and of a complete response, for its token alone; readers are noted on request."""
    assert called("follow", **FOLLOWING) == [b"8", b"gone"]
    now_ms = called("claim", **CLAIM)[2]
    called("append", **CHUNK, index=0, chunk="abc")
    called("append", **CHUNK, index=1, chunk="de")
    assert called("follow", **{**FOLLOWING, "token": "U" * 16}) == [b"8", b"gone"]
    lease = b"%d" % (now_ms + 40_000)
    before = record(called)
    tag, word, then_ms, *found = called("follow", **FOLLOWING)
    assert (tag, word, then_ms >= now_ms) == (b"8", b"hash", True)
    assert found == [None, None, b"in_flight", lease, b"40000", b"H", None, None, 2, b"abc"]
    assert called("follow", **{**FOLLOWING, "first": 1})[8:] == [None, None, None, 2, b"de"]
    assert called("follow", **{**FOLLOWING, "limit_bytes": 5})[11:] == [2, b"abc", b"de"]
    assert record(called) == before
    then_ms = called("follow", **{**FOLLOWING, "reading_ms": 5000})[2]
    assert record(called) == before | {"readers_until": b"%d" % (then_ms + 5000)}
    whole = {**ANSWER, "chunks": 3, "bytes": 6, "last": "f", "tombstone_ms": 500_000}
    assert called("settle", "store", **SETTLE, **whole) == [b"8", b"stored", b"found"]
    until = record(called)["until"]
    found = called("follow", **{**FOLLOWING, "limit_bytes": 6})[3:]
    assert found == [meta().encode(), until, *[None] * 6, 3, b"abc", b"de", b"f"]
    called.client.hset(KEY, "until", now_ms)
    assert called("follow", **FOLLOWING)[11:] == [3]
    called.client.delete(KEY)
    called.client.set(KEY, "\x05" + "T" * 16 + "whatever")
    assert called("follow", **FOLLOWING)[1::2] == [b"packed", b"\x05" + b"T" * 16 + b"whatever"]


def test_post_as_its_header_says(called):
    """A repeated note is one, and the mailbox lasts from the last one on."""
    for note in ("one", "two", "one"):
        called.client.pexpire(KEY, 1000)
        assert called("post", tag="8", note=note, lasts_ms=60_000) == [b"8", b"posted"]
        assert about(called.client.pttl(KEY), 60_000)
    assert record(called) == {"one": b"", "two": b""}


def test_swap_as_its_header_says(called):
    """A mark changes from the value that is expected alone, and an empty one is none."""
    swap = {"tag": "8", "before": "", "after": "one", "lasts_ms": 60_000}
    assert called("swap", **swap) == [b"8", b"swapped"]
    assert called("swap", **swap) == [b"8", b"kept"]
    assert (called.client.get(KEY), about(called.client.pttl(KEY), 60_000)) == (b"one", True)
    assert called("swap", **{**swap, "before": "two", "after": "three"}) == [b"8", b"kept"]
    assert called("swap", **{**swap, "before": "one", "after": "two"}) == [b"8", b"swapped"]
    assert called.client.get(KEY) == b"two"
    assert called("swap", **{**swap, "before": "two", "after": ""}) == [b"8", b"swapped"]
    assert called.client.exists(KEY) == 0


def test_claim_says_that_it_replaced_a_record(called):
    """So does the record, which tells its owner again."""
    claim = {**CLAIM, "terms": RETRY}
    called("claim", **claim)
    called.client.hset(KEY, mapping={"state": "unknown"})
    taking = {**claim, "token": "V" * 16, "expected_token": "T" * 16}
    assert called("claim", **taking)[5:] == [b"replaced"]
    assert record(called)["more"] == b"\x0c\x00\x00"
    assert called("claim", **taking)[5:] == [b"replaced"]


def test_read_gives_nothing_of_another_answer(called):
    """For another token, a key in flight and a free key the reply is gone."""
    asked = {**OWNER, "first": 0, "limit_bytes": 100}
    assert called("read", **asked) == [b"8", b"gone"]
    called("claim", **CLAIM)
    called("append", **CHUNK, index=0, chunk="abc")
    assert called("read", **asked) == [b"8", b"gone"]
    called.client.delete(KEY)
    called.client.hset(KEY, mapping={"meta": meta("U" * 16), "b0": "ab"})
    assert called("read", **asked) == [b"8", b"gone"]


EPOCH = {"tag": "8", "fresh": "E1", "run": "R1", "quarantine_ms": 5000, "begin": 0}


def test_epoch_as_its_header_says(called):
    """An epoch is founded once; another run, or a loss that the caller has found, begins a quarantine."""
    assert called("epoch", **EPOCH) == [b"8", b"founded", b"E1", 5000]
    other = {**EPOCH, "fresh": "E2"}
    tag, word, epoch, left_ms = called("epoch", **other)
    assert (tag, word, epoch) == (b"8", b"stands", b"E1")
    assert 0 < left_ms <= 5000
    assert called("epoch", **{**other, "quarantine_ms": 0}) == [b"8", b"stands", b"E1", 0]
    called.client.hset(KEY, "until", 0)
    assert called("epoch", **other) == [b"8", b"stands", b"E1", 0]
    assert called("epoch", **{**other, "run": ""}) == [b"8", b"stands", b"E1", 0]
    assert called("epoch", **{**other, "run": "R2"}) == [b"8", b"moved", b"E1", 5000]
    assert record(called)["run"] == b"R2"
    called.client.hset(KEY, "until", 0)
    assert called("epoch", **{**other, "run": "R2", "begin": 1}) == [b"8", b"stands", b"E1", 5000]
    called.client.hset(KEY, "until", 2**53)
    assert called("epoch", **{**other, "run": "R2"}) == [b"8", b"stands", b"E1", 5000]
    assert called.client.ttl(KEY) == -1


def test_an_epoch_that_asks_for_no_quarantine(called):
    """A proxy without a quarantine founds an epoch, and leaves the quarantine of others alone."""
    assert called("epoch", **{**EPOCH, "quarantine_ms": 0}) == [b"8", b"founded", b"E1", 0]
    called.client.delete(KEY)
    called("epoch", **EPOCH)
    before = record(called)["until"]
    assert called("epoch", **{**EPOCH, "quarantine_ms": 0, "run": "R2"})[1] == b"moved"
    assert record(called)["until"] == before


IDENTITY = {"tag": "8", "identity": "I1", "settings": "a=1", "write_mode": "found", "retention_ms": 60_000}


def test_identity_as_its_header_says(called):
    """The first identity is written, an equal one is the same, another differs unless it is accepted."""
    assert called("identity", **{**IDENTITY, "write_mode": "ask"}) == [b"8", b"free"]
    assert called("identity", **IDENTITY) == [b"8", b"same"]
    assert called("identity", **{**IDENTITY, "write_mode": "ask"}) == [b"8", b"same"]
    other = {**IDENTITY, "identity": "I2", "settings": "a=2"}
    assert called("identity", **other) == [b"8", b"differs", b"a=1"]
    assert called("identity", **{**other, "write_mode": "ask"}) == [b"8", b"differs", b"a=1"]
    assert set(record(called)) == {"I1"}
    assert called("identity", **{**other, "write_mode": "accept"}) == [b"8", b"accepted"]
    assert called("identity", **{**other, "write_mode": "accept"}) == [b"8", b"same"]
    assert called("identity", **IDENTITY) == called("identity", **other) == [b"8", b"same"]
    third = called("identity", **{**IDENTITY, "identity": "I3", "settings": "a=3"})
    assert (third[:2], sorted(third[2:])) == ([b"8", b"differs"], [b"a=1", b"a=2"])
    assert about(called.client.pttl(KEY), 60_000)


def test_an_identity_is_forgotten_with_its_keys(called):
    """An identity that was not renewed for the retention has no records left, and is forgotten."""
    called("identity", **IDENTITY)
    called.client.hset(KEY, "I1", f"{int(time.time() * 1000) - 61_000} a=1")
    assert called("identity", **{**IDENTITY, "identity": "I2", "settings": "a=2"}) == [b"8", b"same"]
    assert set(record(called)) == {"I2"}


MEMBERS = {
    "tag": "8",
    "identity": "I1",
    "rules": "R1",
    "before": "R1",
    "layout": 2,
    "live_ms": 5000,
    "retention_ms": 60_000,
    "found": "",
    "prefix": "P1",
    "name": "a host",
}


def test_members_as_its_header_says(called):
    """What others say counts while they are live; a proxy with new rules removes its old ones."""
    _, verdict, layout, age_ms, quiet_ms, new, now_ms, seen_ms, identities = called("members", **MEMBERS)
    assert (verdict, layout, age_ms, quiet_ms, new, seen_ms, identities) == (b"same", 2, 0, 0, None, 0, b"I1")
    other = {**MEMBERS, "identity": "I2", "rules": "R2", "before": "R2"}
    differs = called("members", **other)
    assert differs[1] == called("members", **MEMBERS)[1] == b"differ"
    assert differs[7] >= now_ms
    assert set(differs[8].split()) == {b"I1", b"I2"}
    assert called("members", **{**MEMBERS, "rules": "R2"})[1] == called("members", **other)[1] == b"same"
    called("members", **MEMBERS)
    called.client.hset(KEY, "I1 R1 2", f"{int(time.time() * 1000) - 5100}")
    called.client.hset(KEY, "I1 R2 2", f"{int(time.time() * 1000) - 5100}")
    assert called("members", **other)[1] == b"same"
    called.client.hset(KEY, "name:P2", f"{int(time.time() * 1000) - 5100} gone")
    called("members", **other)
    assert set(record(called)) == {"I2 R2 2", "since", "seen", "name:P1"}
    assert record(called)["name:P1"].split(b" ", 1)[1] == b"a host"
    assert about(called.client.pttl(KEY), 60_000)


def test_members_agree_on_the_lowest_layout(called):
    """One that lets only an old layout be written holds the others to it, for as long as it lives."""
    called("members", **MEMBERS)
    assert called("members", **{**MEMBERS, "layout": 1})[1:3] == [b"same", 1]
    assert called("members", **MEMBERS)[2] == 1
    called.client.hset(KEY, "I1 R1 1", f"{int(time.time() * 1000) - 5100}")
    assert called("members", **MEMBERS)[2] == 2


def test_members_know_how_long_a_store_has_been_without_older_versions(called):
    """A store is new if nobody found an older version on it."""
    called("members", **MEMBERS)
    called.client.hset(KEY, "since", f"{int(time.time() * 1000) - 5100}")
    age_ms, quiet_ms, new = called("members", **{**MEMBERS, "found": "new"})[3:6]
    assert 5100 <= age_ms == quiet_ms
    assert new is not None
    age_ms, quiet_ms, new = called("members", **{**MEMBERS, "found": "older"})[3:6]
    assert quiet_ms < 5100 <= age_ms
    assert new is None


ANSWERED = {
    **OWNER,
    "action": "answer",
    "seen_lease": "",
    "retention_ms": 900_000,
    "meta": meta("O" * 16),
    "body": "abc",
    "tombstone_ms": 0,
    "more": "",
}
FREED = {**OWNER, "action": "release", "seen_lease": "", "operator": "O" * 16, "fence": "99"}


@pytest.mark.parametrize(("variant", "given"), [("answer", ANSWERED), ("release", FREED)])
def test_resolve_changes_only_what_the_operator_saw(called, variant, given):
    """Without a record, with another token or a complete record, each has its reply and nothing changes."""
    assert called("resolve", variant, **given) == [b"8", b"absent"]
    called("claim", **CLAIM)
    before = record(called)
    assert called("resolve", variant, **{**given, "token": "U" * 16}) == [b"8", b"fenced"]
    assert record(called) == before
    called("settle", "store", **SETTLE, **ANSWER)
    assert called("resolve", variant, **given) == [b"8", b"complete"]
    assert record(called) == {"meta": meta().encode(), "b0": b"abc"}


@pytest.mark.parametrize(("body_given", "kept"), [("abc", {"b0": b"abc"}), ("", {})])
def test_resolve_answers_as_its_header_says(called, body_given, kept):
    """The record becomes complete under the operator's token; its owner is fenced in every verb."""
    called("claim", **CLAIM)
    called("append", **CHUNK, index=0, chunk="xyz")
    assert called("resolve", "answer", **{**ANSWERED, "body": body_given}) == [b"8", b"resolved"]
    whole = {"meta": ANSWERED["meta"].encode(), **kept}
    assert record(called) == whole
    assert about(called.client.pttl(KEY), 900_000)
    for told in owners_tries(called):
        assert told == [b"8", b"fenced"]
    assert record(called) == whole
    assert called("claim", **CLAIM)[1] == b"complete"
    assert called("resolve", "answer", **ANSWERED) == [b"8", b"resolved"]
    assert called("resolve", "answer", **{**ANSWERED, "meta": meta("P" * 16)}) == [b"8", b"complete"]
    assert record(called) == whole


@pytest.mark.parametrize(("variant", "given"), [("answer", ANSWERED), ("release", FREED)])
@pytest.mark.parametrize("layout", ["hash", "packed"])
def test_resolve_depends_on_the_lease_that_was_seen(called, layout, variant, given):
    """If it is told to: it has to be over by the server's own time, and the same."""
    called("claim", **{**CLAIM, "layout": layout})

    def lapse(lease: int) -> None:
        if layout == "packed":
            called.client.setrange(KEY, 46, f"{lease - 40_000:013}")
        else:
            called.client.hset(KEY, "lease", lease)

    now_ms = int(time.time() * 1000)
    for lease, seen in ((now_ms + 30_000, now_ms + 30_000), (now_ms - 1, now_ms - 2), (now_ms - 1, 0)):
        lapse(lease)
        before = called.client.dump(KEY)
        assert called("resolve", variant, **{**given, "seen_lease": seen}) == [b"8", b"running"]
        assert called("resolve", variant, **{**given, "seen_lease": seen, "token": "U" * 16}) == [b"8", b"fenced"]
        assert called.client.dump(KEY) == before
    lapse(now_ms - 1)
    assert called("resolve", variant, **{**given, "seen_lease": now_ms - 1})[1] in (b"resolved", b"released")


def owners_tries(called) -> list:
    """Return the replies to everything that a paused owner may try when it wakes up."""
    return [
        called("append", **CHUNK, index=1, chunk="abc"),
        called("renew", **OWNER, lease_ms=90_000, retention_ms=900_000, stage="sent", layout="hash"),
        called("settle", "store", **SETTLE, **ANSWER),
        called("settle", "release", **SETTLE, action="release", layout="hash"),
        called(
            "settle", "unknown", **SETTLE, action="unknown",
            fence="1", mode="hold", fingerprint="F" * 16, self="S" * 32, created=1, why="lost", status=0, more="",
        ),
    ]  # fmt: skip


def test_resolve_releases_as_its_header_says(called):
    """The key is free for anybody, under a greater fence; its owner is fenced before and after that."""
    fence = called("claim", **CLAIM)[3]
    called("append", **CHUNK, index=0, chunk="xyz")
    assert called("resolve", "release", **{**FREED, "fence": fence}) == [b"8", b"released"]
    assert record(called) == {"state": b"released", "token": b"O" * 16, "fence": fence}
    assert about(called.client.pttl(KEY), 500_000)
    assert owners_tries(called) == [[b"8", b"fenced"]] * 5
    assert called("resolve", "release", **{**FREED, "fence": fence}) == [b"8", b"released"]
    assert called("resolve", "release", **{**FREED, "operator": "P" * 16}) == [b"8", b"absent"]
    assert called("claim", **{**CLAIM, "not_after_ms": 0})[1] == b"late"
    other = {**CLAIM, "token": "U" * 16, "terms": CLAIM["terms"].replace(b"F", b"G")}
    _, word, _, later, _, replaced = called("claim", **other)
    assert (word, int(later) > int(fence), replaced) == (b"claimed", True, b"replaced")
    assert owners_tries(called) == [[b"8", b"fenced"]] * 5
    assert record(called)["token"] == b"U" * 16
