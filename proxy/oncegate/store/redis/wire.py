"""How commands are written in RESP, the Redis protocol, and what identifies their replies.

Commands are written here and not by hiredis, because hiredis formats every argument anew: a claim costs 23k
instructions that way, and 4k this way (measured). Each script gets a tag as its first argument and returns it as the
first element of its reply, so a reply says which call it belongs to.
"""

from hashlib import sha1
from typing import Any

from oncegate.store.record import Claim
from oncegate.values import Value

# Tags that a connection gives in turn: far more than the calls that wait on one connection.
TAG_COUNT = 4096
# Sizes and numbers that stay cached. Values may have any size, so the caches are bounded.
CACHED = 4096


class ErrorReply(Exception):
    """An error that the server returned. The first word of its text is the kind, such as NOSCRIPT or OOM."""


class _Sizes(dict[int, bytes]):
    """The RESP header of a bulk string, by its size in bytes."""

    def __missing__(self, size: int) -> bytes:
        header = b"$%d\r\n" % size
        if size < CACHED:
            self[size] = header
        return header


class _Numbers(dict[int, bytes]):
    """Numbers as RESP bulk strings."""

    def __missing__(self, number: int) -> bytes:
        if len(self) >= CACHED:
            self.clear()
        written = self[number] = resp(number)
        return written


SIZE = _Sizes()
NUMBER = _Numbers()
# The RESP header of a script call, by its number of words.
COMMAND = [b"*%d\r\n" % count for count in range(17)]


def resp(*words: bytes | str | int) -> bytes:
    """Return words of a command as RESP bulk strings."""
    written = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"".join([SIZE[len(word)] + word + b"\r\n" for word in written])


# Each tag as it comes back in a reply, and as a word of a command. All have the same length.
TAGS = [(tag, resp(tag)) for tag in (b"%04d" % number for number in range(TAG_COUNT))]


def listed(reply: Any) -> list[Any]:
    """Return a script's reply as a list. Those of requests write one that is words alone as a string.

    An array costs the server 5,500 instructions, a string 300 (Redis 7.0, counted).
    """
    return reply.split(b" ") if isinstance(reply, bytes) else reply


class Script:
    """A Lua script under the name of its verb.

    `by_sha` and `by_body` are the beginnings of its calls with one key (EVALSHA and EVAL), by the number of arguments
    after the tag.
    """

    def __init__(self, verb: str, body: bytes) -> None:
        self.verb, self.body = verb, body
        # Its replies are large, so that it has a connection of its own.
        self.brings_chunks = verb in ("read", "follow")
        self.sha = sha1(body).hexdigest().encode()
        evalsha, evaluate = resp(b"EVALSHA", self.sha, 1), resp(b"EVAL", body, 1)
        # A call has five words besides its arguments: the command, the sha or body, the count of keys, key and tag.
        self.by_sha = [header + evalsha for header in COMMAND[5:]]
        self.by_body = [header + evaluate for header in COMMAND[5:]]


class ScriptCall(Value):
    """A call of a script that has one key, without its arguments."""

    script: Script
    key: bytes
    # Arguments after the tag.
    arg_count: int
    # The loop's time in seconds.
    deadline: float
    # Send the script itself, to a server that does not know its sha.
    by_body: bool = False
    # Send ASKING first, to a cluster node that is importing the key's slot.
    asking: bool = False
    # The claim that is claimed, renewed or settled: in a cluster, its entry in the index of open keys follows.
    owner: Claim | None = None
