"""The keys that values make under a rule's sources: `evt_9` from a person, in place of the request that had it. Pure.

It is for finding a record, so each way in which a request may have carried the values is a candidate: in a body `7` may
have been a text or a number.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from oncegate.keys.extraction import SourceInput, joined_key, read_source
from oncegate.keys.sources import Derived, Header, KeySources, Member, Receiver, Source
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.request_head import RequestHead

# A number as JSON has it (RFC 8259, section 6).
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def asked_values(alternative: Sequence[Source]) -> list[Source]:
    """Return the sources of an alternative for which a person has to give a value: each but the receiver."""
    return [source for source in alternative if not isinstance(source.kind, Receiver)]


def is_derived(alternative: Iterable[Source]) -> bool:
    """Return whether the whole request is a part of the key, so that no value makes it."""
    return any(isinstance(source.kind, Derived) for source in alternative)


def keys_of_values(sources: KeySources, values: Sequence[bytes], head: RequestHead, destination: bytes) -> list[bytes]:
    """Return the keys that the values may make, in the order of the rule's alternatives.

    `values`: one for each source but the receiver, in the rule's order. `head`, `destination`: for the receiver.
    """
    given = SourceInput(head, b"", destination=destination)
    found: list[bytes] = []
    for number, alternative in enumerate(sources.alternatives):
        if is_derived(alternative) or len(asked_values(alternative)) != len(values):
            continue
        if number == 0 and len(alternative) == 1 and alternative[0].plain_header is not None:
            key = parse_key(values)
            found += [] if isinstance(key, BadKey) else [key]
        else:
            found += _joined(alternative, values, given)
    return found


def _joined(alternative: Sequence[Source], values: Sequence[bytes], given: SourceInput) -> Iterator[bytes]:
    left = iter(values)
    choices = [list(_parts(source, left, given)) for source in alternative]
    for parts in product(*choices):
        yield joined_key(alternative, [(source.name, part) for source, part in zip(alternative, parts, strict=True)])


def _parts(source: Source, values: Iterator[bytes], given: SourceInput) -> Iterator[bytes]:
    """Yield what a source may have read, as it enters a joined key."""
    match source.kind:
        case Receiver():
            value = read_source(source.kind, given)
            assert isinstance(value, bytes)
            yield value
        case Member():
            value = next(values)
            yield b"s" + value
            if _NUMBER.fullmatch(value):
                yield b"n" + value
            if value in (b"true", b"false"):
                yield value
        case Header() as kind:
            value = next(values)
            key = BadKey("") if kind.cloudevent else parse_key([value])
            yield (b"s" if source.identity else b"") + (value if isinstance(key, BadKey) else key)
        case _:
            yield (b"s" if source.identity else b"") + next(values)
