"""Finds the record or tenant that an operator means.

By key and scope; by values and the rule that makes a key of them; by a whole request; by the id that lists and logs
show, or its beginning; by the note that its rule keeps with it.
"""

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass

from oncegate.keys.digests import Digests, Scope, UnstableScope, identity_settings
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.keys.tenants import TenantFields
from oncegate.messages.fields import by_name
from oncegate.operating.errors import OperatorError, usage_error
from oncegate.operating.request_identity import (
    AskedRequest,
    GivenValues,
    Keyless,
    identify_request,
    keys_under_rule,
    rule_named,
)
from oncegate.rules.model import Rule, Rules
from oncegate.settings.credentials import expanded
from oncegate.settings.settings import Settings
from oncegate.store.open_keys.listing import open_keys
from oncegate.store.record_name import parse_record_id
from oncegate.store.record_name import record_id as id_of
from oncegate.store.record_view import OpenKind, RecordView
from oncegate.store.store import Store

# 48 bits: with a million records, the chance that any two share them is 0.2 %.
MIN_ID_CHARACTERS = 8
SCOPE_BYTES = 16
# Open records that are read at once.
PAGE = 500
# base64url, RFC 4648, section 5
_ID_CHARACTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordName:
    """What an operator says of a record: one of id, note, request, rule with values, or key, and whose it is.

    Without any of these, it names a tenant.
    """

    # The key as the client sent it, or with `rule` the values of its sources, in the rule's order.
    values: Sequence[bytes] = ()
    # Whole, or its first characters.
    id: str = ""
    note: str = ""
    request: AskedRequest | None = None
    # The name of a rule, and the path of the request where the rule has several.
    rule: str = ""
    path: str = ""
    # Empty for that of the settings.
    namespace: str = ""
    # The digest of the tenant, as a list shows it.
    scope: str = ""
    # Lines `Name: value` of the header fields that identify the tenant.
    credential: list[bytes] | None = None

    @property
    def names_record(self) -> bool:
        """Whether this says which record, not only whose."""
        return bool(self.values or self.id or self.note or self.request)

    @property
    def is_scoped(self) -> bool:
        """Whether this says whose key it is."""
        return bool(self.id or self.note or self.request or self.scope or self.credential is not None)


def say_nothing(_: str) -> None:
    """Do nothing with what a search says while it goes on."""


@dataclass(frozen=True, slots=True)
class Finder:
    """Finds records in a store, by the settings and rules of its proxies.

    `say(text)` is called before what may take long. All raise OperatorError, and StoreError without a reply.
    """

    settings: Settings
    store: Store
    rules: Rules
    say: Callable[[str], None] = say_nothing

    async def record(self, name: RecordName) -> RecordView:
        """Return the record that is named."""
        record = await self.store.records.read(await self.key(name))
        if record is None:
            raise OperatorError(await self._absence(name))
        return record

    async def key(self, name: RecordName) -> bytes:
        """Return the digest of the key that is named; it may have no record."""
        if name.id:
            return await self._key_by_id(name.id)
        if name.note:
            return await self._key_by_note(name.note)
        digests = await _digests(self.settings, self.store)
        if name.request is not None:
            return self._key_of_request(name.request)
        if name.rule:
            found = await self._key_by_rule(rule_named(self.rules, name.rule), name, digests)
        else:
            found = _key_by_settings(self.settings, name, digests)
        return found

    async def tenant(self, name: RecordName) -> bytes:
        """Return the digest of the tenant that is named."""
        return _scope(self.settings, name, await _digests(self.settings, self.store)).tenant

    # By what an operator has ...

    async def _key_by_id(self, record_id: str) -> bytes:
        """Return the digest of the key whose id is `record_id`, or is the only one that begins with it."""
        if digest := parse_record_id(record_id):
            return digest
        if len(record_id) < MIN_ID_CHARACTERS or not set(record_id) <= _ID_CHARACTERS:
            raise usage_error(f"an id has 32 characters; give at least its first {MIN_ID_CHARACTERS}")
        matches = await self._matching(lambda record: id_of(record.key).startswith(record_id), record_id)
        if not matches:
            raise OperatorError("there is no record with this id")
        if len(matches) > 1:
            raise OperatorError(f"{len(matches)} records have ids that begin with {record_id}: give more of the id")
        return matches.pop()

    async def _key_by_note(self, note: str) -> bytes:
        matches = await self._matching(lambda record: record.kept.note == note)
        if not matches:
            raise OperatorError("there is no record with this note: only rules with a `note` keep one")
        if len(matches) > 1:
            ids = ", ".join(sorted(map(id_of, matches)))
            raise OperatorError(f"{len(matches)} records have this note: name one of them with --id: {ids}")
        return matches.pop()

    async def _matching(self, is_wanted: Callable[[RecordView], bool], prefix: str = "") -> set[bytes]:
        """Return the keys of the open records that match, or else of all that do and whose ids begin with `prefix`."""
        records, is_quick = self.store.records, bool(prefix) and self.store.records.finds_prefixes
        if not is_quick:
            if await has_index(self.store):
                if matches := {one.key async for one in open_records(self.store) if is_wanted(one)}:
                    return matches
                self.say("no open key matches: looking through all keys")
            else:
                self.say("the index of open keys is not complete yet: looking through all keys")
        # A scan may return a record more than once.
        return {one.key async for one in records.scan(prefix) if is_wanted(one)}

    def _key_of_request(self, request: AskedRequest) -> bytes:
        try:
            found = identify_request(self.settings, self.rules, request)
        except ValueError as error:
            raise usage_error(str(error)) from None
        if isinstance(found, Keyless):
            rule = f' (rule "{found.rule.name}")' if found.rule is not None and found.rule.name else ""
            raise OperatorError(f"this request has no key{rule}: {found.reason}")
        return found.identity.key

    async def _key_by_rule(self, rule: Rule, name: RecordName, digests: Digests) -> bytes:
        """Return the digest of the key that the values are under a rule; of several, that of one with a record."""
        keys = keys_under_rule(rule, _given(name), digests)
        for key in keys:
            if len(keys) > 1 and await self.store.records.read(key) is not None:
                return key
        return keys[0]

    # What is not there ...

    async def _absence(self, name: RecordName) -> str:
        """Return why no record was found, and how to name the one that was meant."""
        text = f"there is no record of this key{'' if name.is_scoped else ', for the tenant without a credential'}"
        # Lists and logs show ids, which are well-formed as keys, too.
        if len(name.values) == 1 and parse_record_id(name.values[0].decode("latin-1")) is not None:
            text += "; name a record by its id with --id"
        if not name.values or name.rule:
            return text
        there = [rule.name for rule in self.rules.rules if await self._has_record(rule, name)]
        if there:
            rules = ", ".join(f'"{one}"' for one in there)
            return f"under the settings {text}, but the rule {rules} has one of this value: name it with --rule"
        others = [f'"{rule.name}"' for rule in self.rules.rules if rule.policy.sources or rule.policy.namespace]
        return f"{text}; rules may name it otherwise (--rule): {', '.join(others)}" if others else text

    async def _has_record(self, rule: Rule, name: RecordName) -> bool:
        """Return whether a rule makes a key of the values that has a record."""
        try:
            keys = keys_under_rule(rule, _given(name), await _digests(self.settings, self.store))
        except OperatorError:
            return False
        return any([await self.store.records.read(key) is not None for key in keys])


async def has_index(store: Store) -> bool:
    """Return whether the open keys of a store are known without a look at all others."""
    return all([await server.index.is_complete() for server in store.records.servers])


async def open_records(store: Store, kinds: Collection[OpenKind] = tuple(OpenKind)) -> AsyncIterator[RecordView]:
    """Yield the open records of these kinds, the oldest first; without an index in any order, and perhaps twice."""
    if not await has_index(store):
        async for record in store.records.scan():
            if record.open_kind in kinds:
                yield record
        return
    after = ""
    while True:
        page = await open_keys(store.records, PAGE, after, kinds)
        for record in page.records:
            yield record
        if not (after := page.after):
            break


def _given(name: RecordName) -> GivenValues:
    tenant = _scope_digest(name.scope) if name.scope else None
    return GivenValues(name.values, name.credential or (), tenant, name.path)


def _key_by_settings(settings: Settings, name: RecordName, digests: Digests) -> bytes:
    """Return the digest of a key in its scope, as the proxies on this store compute it without any rule."""
    if len(name.values) != 1:
        raise usage_error("give a key, or a record's id with --id" if not name.values else "give one key, or --rule")
    key = parse_key(name.values)
    if isinstance(key, BadKey):
        raise usage_error(key.detail)
    return digests.key(_scope(settings, name, digests), key)


async def _digests(settings: Settings, store: Store) -> Digests:
    """Return what computes digests as the proxies on this store do. Raises OperatorError if the settings differ."""
    digests = Digests(settings.secret.get_secret_value().encode())
    ours = identity_settings(digests, settings.namespace, settings.key_header, settings.scope_headers)
    # With other settings the same key has another digest: "no such record" would be wrong.
    theirs = await store.records.identities()
    if theirs and ours not in theirs:
        raise OperatorError("the proxies on this store compute digests with other settings: run this with theirs")
    return digests


def _scope(settings: Settings, name: RecordName, digests: Digests) -> Scope:
    """Return the scope that it names: a digest, header fields, or no credential."""
    namespace = (name.namespace or settings.namespace).encode()
    if name.scope:
        return Scope(namespace, _scope_digest(name.scope))
    names = [field.lower().encode() for field in expanded(settings.scope_headers)]
    tenant = TenantFields(names, [scheme.encode() for scheme in settings.stable_schemes])
    scope = digests.scope(namespace, by_name(_credential(name.credential or [], tenant)), tenant)
    if isinstance(scope, UnstableScope):
        raise usage_error("the proxies refuse this credential as a scope: its scheme is not known to stay the same")
    return scope


def _scope_digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != SCOPE_BYTES:
        raise usage_error("a scope is a digest of 32 hexadecimal digits, as `oncegate keys list` prints it")
    return digest


def _credential(lines: list[bytes], tenant: TenantFields) -> list[tuple[bytes, bytes]]:
    """Return the header fields in `lines`. Raises OperatorError if one of them is not part of a scope."""
    pairs = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in lines if line)]
    if not all(name.lower() in tenant.read for name, _ in pairs):
        raise usage_error("standard input must have lines `Name: value` of headers that identify the tenant")
    return pairs
