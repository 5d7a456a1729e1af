"""Keys as an attacker makes them: none escapes into the store's language, a log or another key (T4, T19)."""

import asyncio
import random
import re
from contextlib import closing
from pathlib import Path

import pytest

import oncegate
from tests.parts import RawClient, Received, request

BARE = bytes(byte for byte in range(0x21, 0x7F) if byte not in b'"\\,')
STORED = re.compile(rb"once:\{[A-Za-z0-9_-]{32}\}")
# What means something to Redis, Lua, a shell, a log, a template or a parser of headers.
MEANING = (
    "*", "?", "[a-z]", "once:*", "{a}{b}", "{}", "}{", "once:{x}", "*1$4PING", "$6FLUSHALL", "+OK", ":1", "-ERR",
    "EVAL", "redis.call('FLUSHALL')", "'..x..'", "]]", "--", "%00", "%0d%0a", "%s%n%x", "${jndi:ldap://x}", "{{7*7}}",
    "$(id)", "`id`", "../../etc/passwd", "/etc/passwd", "<script>", "';DROP--", "1:a", "24:", "default", "key", "a=b;c",
    "a|b", "nil", "NaN", "-1", "0", "9" * 255, "k" * 255, "~" * 255, "{" * 255,
)  # fmt: skip


def generated(count: int) -> list[tuple[str, bytes]]:
    """Return header values with the key that each must name: every byte, every pair of some, and random ones."""
    dice = random.Random(4)
    keys = [bytes((byte,)) for byte in range(0x20, 0x7F)]
    keys += [value.encode() for value in MEANING]
    while len(keys) < count:
        size = dice.choice((1, 2, 2, 3, 8, 36, 64, 200, 254, 255))
        keys.append(bytes(dice.choices(range(0x20, 0x7F), k=size)))
    values = []
    for number, key in enumerate(keys):
        quoted = '"' + key.decode().replace("\\", "\\\\").replace('"', '\\"') + '"'
        bare = all(byte in BARE for byte in key) and number % 2
        values.append((key.decode() if bare else quoted, key))
    return values


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.full)])
async def test_so_many_keys_are_so_many_records(standing, behind, valkey, count):
    """T4, T19: each generated key executes once under a digest of fixed form, and nothing else is in the store."""
    values = generated(count)
    distinct = {key for _, key in values}
    executed: list[bytes] = []

    async def echo(_, __, writer: asyncio.StreamWriter, received: Received) -> None:
        (value,) = received.header("idempotency-key")
        executed.append(value)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(value), value))

    behind.script = echo

    async def send(mine: list[tuple[str, bytes]]) -> None:
        with closing(await RawClient.open(standing.port)) as client:
            for value, key in mine:
                answer = await client.ask(request("POST", "/x", value, b""))
                assert answer is not None
                if answer.status != 200:  # a short key that another client has in flight
                    assert (answer.slug, len(key) < 4) == ("in-flight", True)
                    continue
                named = answer.body.decode()
                assert named in (value, f'"{value}"', value.strip('"')), value

    await asyncio.gather(*(send(values[start::20]) for start in range(20)))
    assert len(executed) == len(distinct)
    with valkey.client() as store:
        names = list(store.scan_iter("once:{*", count=count))
    assert len(names) == len(distinct)
    assert [name for name in names if not STORED.fullmatch(name)] == []
    assert "Traceback" not in standing.log()


UNUSABLE = [bytes((byte,)) for byte in (*range(0x20), 0x7F, *range(0x80, 0x100))]


async def test_no_other_byte_is_in_a_key(standing, behind, valkey):
    """T4: each byte that a key cannot have, in front, within and behind, gets 400 and leaves nothing anywhere."""
    refused = 0
    for byte in UNUSABLE:
        for value in (b"k" + byte + b"k", byte + b"k", b"k" + byte, b'"k' + byte + b'k"'):
            trimmed = value.strip(b" \t")
            if trimmed in (b"k", b'"k k"'):
                continue
            raw = request("POST", "/x", "KEY", b"").replace(b"KEY", value)
            with closing(await RawClient.open(standing.port)) as client:
                answer = await client.ask(raw)
            assert answer is not None
            assert answer.status == 400, value
            refused += 1
    assert refused > 600
    assert behind.received == []
    assert valkey.records() == {}


@pytest.mark.parametrize(
    "script", sorted((Path(oncegate.__file__).parent / "store/redis/lua").glob("*.lua")), ids=lambda path: path.stem
)
def test_scripts_are_fixed(script):
    """T19: a script builds no code and no command's name from what it is given."""
    code = re.sub(r"--.*", "", script.read_text())
    assert not re.search(r"\b(?:loadstring|load|dofile|require|setfenv|debug)\b", code)
    calls = re.findall(r"redis\.p?call\(\s*([^,)]+)", code)
    assert calls
    assert [name for name in calls if not re.fullmatch(r"""['"][A-Z]+['"]""", name)] == []


def test_no_script_is_made_of_strings():
    """T19: what goes to the store as a script is a file of the package, nothing formatted."""
    for module in Path(oncegate.__file__).parent.rglob("*.py"):
        assert not re.search(r"f[\"'].*redis\.call|redis\.call.*%|\.format\(.*redis\.call", module.read_text())
