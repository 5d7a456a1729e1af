"""Finds the record or tenant that an operator means: by key and scope, or by the id that lists and logs show."""

from dataclasses import dataclass

from oncegate.keys.digests import Digests, Scope, UnstableScope, identity_settings
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.keys.tenants import TenantFields
from oncegate.messages.fields import by_name
from oncegate.operating.errors import OperatorError, usage_error
from oncegate.settings.credentials import expanded
from oncegate.settings.settings import Settings
from oncegate.store.record_name import parse_record_id
from oncegate.store.record_view import RecordView
from oncegate.store.store import Store

# 48 bits: with a million records, the chance that any two share them is 0.2 %.
MIN_ID_CHARACTERS = 8
SCOPE_BYTES = 16
# base64url, RFC 4648, section 5
_ID_CHARACTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordName:
    """What an operator says of a record: its id, or its key and scope. Without a key, it names a tenant."""

    # As the client sent it.
    key: bytes | None = None
    # Whole, or its first characters.
    id: str = ""
    # Empty for that of the settings.
    namespace: str = ""
    # The digest of the tenant, as a list shows it.
    scope: str = ""
    # Lines `Name: value` of the header fields that identify the tenant.
    credential: list[bytes] | None = None

    @property
    def is_scoped(self) -> bool:
        """Whether this says whose key it is."""
        return bool(self.id or self.scope or self.credential is not None)


async def find_record(settings: Settings, store: Store, name: RecordName) -> RecordView:
    """Return the record that is named. Raises OperatorError if there is none, StoreError without a reply."""
    record = await store.records.read(await find_key(settings, store, name))
    if record is None:
        tenant = "" if name.is_scoped else ", for the tenant without a credential"
        # Lists and logs show ids, which are well-formed as keys, too.
        is_id = not name.id and parse_record_id((name.key or b"").decode("latin-1")) is not None
        raise OperatorError(f"there is no record of this key{tenant}{'; name a record by its id with --id' * is_id}")
    return record


async def find_key(settings: Settings, store: Store, name: RecordName) -> bytes:
    """Return the digest of the key that is named; it may have no record. Raises as `find_record` does."""
    if name.id:
        return await _digest_by_id(store, name.id)
    return await _digest_by_key(settings, store, name)


async def _digest_by_id(store: Store, record_id: str) -> bytes:
    """Return the digest of the key whose id is `record_id`, or is the only one that begins with it."""
    if digest := parse_record_id(record_id):
        return digest
    if len(record_id) < MIN_ID_CHARACTERS or not set(record_id) <= _ID_CHARACTERS:
        raise usage_error(f"an id has 32 characters; give at least its first {MIN_ID_CHARACTERS}")
    # SCAN may return a record more than once, so that a list would count it twice.
    matches = {record.key async for record in store.records.scan(record_id)}
    if not matches:
        raise OperatorError("there is no record with this id")
    if len(matches) > 1:
        raise OperatorError(f"{len(matches)} records have ids that begin with {record_id}: give more of the id")
    return matches.pop()


async def _digest_by_key(settings: Settings, store: Store, name: RecordName) -> bytes:
    """Return the digest of a key in its scope, as the proxies on this store compute it."""
    if name.key is None:
        raise usage_error("give a key, or a record's id with --id")
    key = parse_key([name.key])
    if isinstance(key, BadKey):
        raise usage_error(key.detail)
    digests = await _digests(settings, store)
    return digests.key(_scope(settings, name, digests), key)


async def find_tenant(settings: Settings, store: Store, name: RecordName) -> bytes:
    """Return the digest of the tenant that is named. Raises OperatorError, StoreError without a reply."""
    return _scope(settings, name, await _digests(settings, store)).tenant


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
