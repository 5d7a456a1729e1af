"""What a response says about its request's execution: by its status, by its fields, by a member of its body. Pure.

The lists of an operator come first. A response can take a release back, or allow one, in its own words:

- `x-should-retry: false` or `Stripe-Should-Retry: false`: the API wants no retry. Nothing is released.
- `true` in these says "you may", not "nothing ran". It releases only where the API itself executes a key once.
- Marks of a gateway: it makes up a 5xx of its own though the API behind it may have executed the request. Such a
  response is never released.
"""

import zlib
from collections.abc import Iterable
from typing import Any

from oncegate.adaptation.json_rpc import FinalMessage
from oncegate.decision import Disposition
from oncegate.keys.documents import Missing, json_value, parse_pointer, value_at
from oncegate.keys.syntax import BadKey
from oncegate.messages.fields import Fields, tokens
from oncegate.settings.statuses import StatusEntry, read_status

# Each proves that this request was not executed here: it goes elsewhere (307, 308), or was refused before anybody
# looked at it. docs/reference/rules.md has the table of all.
RELEASE_STATUSES = ("307", "308", "401", "421", "425", "429")
# A gateway says these whether the request ran or not. 520 to 530 are those of Cloudflare, 598 and 599 of others.
AMBIGUOUS_STATUSES = (
    *("408", "502", "503", "504"),
    *("520", "521", "522", "523", "524", "525", "526", "527", "530", "598", "599"),
)
# Released in addition where nothing stands between oncegate and the API.
DIRECT_STATUS = "503+retry-after"
# The longest body that is read for a condition, before and after it is unpacked.
MAX_BODY_BYTES = 65536

# A JSON body that is parsed, in a tuple of one.
Parsed = tuple[Any]

_STORE, _RELEASE, _AMBIGUOUS = Disposition.STORE, Disposition.RELEASE, Disposition.AMBIGUOUS
_ADVICE = (b"x-should-retry", b"stripe-should-retry")
# What every policy without an entry for a 2xx says of them: they are stored, without a look at the response.
_SUCCESSES = dict.fromkeys(range(200, 300), _STORE)


class Statuses:
    """Which responses release a key, and which leave it unknown. All others are stored.

    `via`: the names that the API itself writes into `Via`, in lower case. `runs_once`: the API itself executes a key
    only once. `by_message`: messages of JSON-RPC decide (`read_message`). Raises ValueError for a malformed entry, and
    for one in both lists.

    `by_status`: what a status means whatever its response says; one that is missing is for `read`.
    """

    def __init__(
        self,
        release: Iterable[str],
        ambiguous: Iterable[str],
        via: frozenset[bytes] = frozenset(),
        runs_once: bool = False,
        by_message: bool = False,
    ) -> None:
        self._via, self._runs_once, self.by_message = via, runs_once, by_message
        self._entries: dict[StatusEntry, Disposition] = {}
        # Those with and without a condition, by the status or the class that they name.
        self._conditional: dict[str, list[StatusEntry]] = {}
        self._plain: dict[str, Disposition] = {}
        for texts, disposition in ((release, _RELEASE), (ambiguous, _AMBIGUOUS)):
            for text in texts:
                self._add(read_status(text), disposition)
        named = {*self._conditional, *self._plain, *(("2xx",) if by_message else ())}
        self.by_status = (
            {status: _STORE for status in _SUCCESSES if named.isdisjoint(_names(status))}
            if any(name.startswith("2") for name in named)
            else _SUCCESSES
        )

    def _add(self, entry: StatusEntry, disposition: Disposition) -> None:
        if self._entries.setdefault(entry, disposition) is not disposition:
            raise ValueError(f"{entry.text!r} is in both lists")
        if not entry.is_conditional:
            self._plain[entry.status] = disposition
        elif entry not in (entries := self._conditional.setdefault(entry.status, [])):
            entries.append(entry)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statuses) and self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[object, ...]:
        return frozenset(self._entries.items()), self._via, self._runs_once, self.by_message

    def entries(self, disposition: Disposition) -> list[str]:
        """Return the entries of one list, as they are written."""
        return [entry.text for entry, meaning in self._entries.items() if meaning is disposition]

    def read_message(self, status: int, fields: Fields, final: FinalMessage | None) -> Disposition:
        """Return what a response to a JSON-RPC request means for its key; `final`: None where it cannot be read.

        The lists come first. Then a result is stored, an error by which JSON-RPC says that nothing ran frees the key,
        and all else is unknown.
        """
        # A stream has the message in one of its events, and its conditions are those of a document.
        listed = self.read(status, {**fields, b"content-type": [b"application/json"]}, final and final.document)
        if listed is _AMBIGUOUS or final is None:
            return _RELEASE if listed is _RELEASE else _AMBIGUOUS
        # What came before it was executed.
        if listed is _RELEASE:
            return _RELEASE if final.is_only else _AMBIGUOUS
        if final.is_error:
            return _RELEASE if final.proves_nothing_ran and _advice(fields) is not False else _AMBIGUOUS
        return _STORE if 200 <= status < 300 else _AMBIGUOUS

    def read(self, status: int, fields: Fields, body: bytes | Parsed | None = None) -> Disposition:
        """Return what a response means for its key. `body`: as it came, None where it is not known."""
        listed, advice = self._listed(status, fields, body), _advice(fields)
        if listed is _RELEASE:
            if advice is False:
                return _STORE
            return _AMBIGUOUS if status >= 500 and self._came_through_gateway(status, fields) else _RELEASE
        if advice and self._runs_once and status >= 400:
            return _RELEASE
        return _AMBIGUOUS if status >= 500 and _is_made_up(status, fields) else listed

    def reads_body(self, status: int, fields: Fields) -> bool:
        """Return whether a member of the body decides, too, and the body can be read."""
        pointers = (entry.pointer for name in _names(status) for entry in self._conditional.get(name, ()))
        return any(pointers) and _is_json(fields)

    def _listed(self, status: int, fields: Fields, body: bytes | Parsed | None) -> Disposition:
        """Return what the lists say. A condition beats a code, and a code beats a class."""
        names, in_doubt = _names(status), False
        for name in names:
            met: set[Disposition] = set()
            for entry in self._conditional.get(name, ()):
                disposition, is_met = self._entries[entry], _is_met(entry, fields, body)
                if is_met:
                    met.add(disposition)
                in_doubt = in_doubt or (is_met is None and disposition is _AMBIGUOUS)
            # In doubt a key is unknown.
            if met:
                return _AMBIGUOUS if in_doubt or _AMBIGUOUS in met else _RELEASE
        plain = self._plain.get(names[0]) or self._plain.get(names[1]) or _STORE
        return _AMBIGUOUS if in_doubt and plain is _RELEASE else plain

    def _came_through_gateway(self, status: int, fields: Fields) -> bool:
        """Return whether somebody between oncegate and the API may have made a response up."""
        if b"x-varnish" in fields or _is_made_up(status, fields):
            return True
        # RFC 9110, section 7.6.3: protocol, name, comment.
        members = [member.split() for line in fields.get(b"via", ()) for member in line.lower().split(b",")]
        return any(len(member) < 2 or member[1] not in self._via for member in members if member)


def _names(status: int) -> tuple[str, str]:
    """Return the names of a status in a list: its code and its class."""
    # A status that HTTP does not know is to be taken for a 5xx (RFC 9110, section 15).
    return str(status), f"{min(status // 100, 5)}xx"


def _advice(fields: Fields) -> bool | None:
    """Return whether the API itself wants a retry, None where it does not say."""
    words = [line.strip().lower() for name in _ADVICE if name in fields for line in fields[name]]
    return False if b"false" in words else True if b"true" in words else None


def _is_made_up(status: int, fields: Fields) -> bool:
    """Return whether a gateway may have made up this 5xx, which does not come from one by its code alone.

    `Proxy-Status` says it (RFC 9209, section 2.1.1). lighttpd answers 500 where the program behind it broke off, with
    the same `Server` as under a 500 of a program that sends none.
    """
    if b"proxy-status" in fields and any(b"error=" in line.lower() for line in fields[b"proxy-status"]):
        return True
    return status == 500 and any(line.lower().startswith(b"lighttpd") for line in fields.get(b"server", ()))


# Conditions ...


def _is_met(entry: StatusEntry, fields: Fields, body: bytes | Parsed | None) -> bool | None:
    """Return whether a response meets the condition of an entry, None where its body cannot be read for that."""
    if entry.pointer:
        member = _member(fields, body, entry.pointer)
        return None if member is None else member == (entry.value or "").encode()
    lines = fields.get(entry.field.encode(), ())
    # A field may come in several lines, and its reader may take any one of them.
    value = None if entry.value is None else entry.value.encode()
    return bool(lines) and (value is None or all(line.strip().lower() == value for line in lines))


def _is_json(fields: Fields) -> bool:
    kinds = fields.get(b"content-type", ())
    kind = kinds[-1].partition(b";")[0].strip().lower() if kinds else b""
    return kind == b"application/json" or kind.endswith(b"+json")


def _member(fields: Fields, body: bytes | Parsed | None, pointer: str) -> bytes | None:
    """Return the text of a string, a number or a truth value in a JSON body, empty for none.

    None: the body cannot be read, or not in one way alone.
    """
    if not _is_json(fields):
        return b""
    place = parse_pointer(pointer)
    if isinstance(body, tuple):
        value: bytes | Missing | BadKey | None = value_at(body[0], place)
    else:
        plain = None if body is None else _unpacked(fields, body)
        value = None if plain is None else json_value(plain, place)
    if value is None or isinstance(value, BadKey):
        return None
    if isinstance(value, Missing):
        return b""
    # `json_value` tells the text "1" from the number 1 by a letter before them.
    return value if value in (b"true", b"false") else value[1:]


def _unpacked(fields: Fields, body: bytes) -> bytes | None:
    """Return a body without its gzip coding, None where it is too long or coded otherwise."""
    codings = tokens(fields.get(b"content-encoding", ()))
    if codings in ([b"gzip"], [b"x-gzip"]):
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            body = unpacker.decompress(body, MAX_BODY_BYTES)
        except zlib.error:
            return None
        return body if unpacker.eof and not unpacker.unused_data else None
    return body if not codings and len(body) <= MAX_BODY_BYTES else None
