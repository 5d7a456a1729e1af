"""Finds the record or tenant that an operator means: by key and scope, or by the id that lists and logs show."""

import argparse
import sys

from oncegate.commands.store_command import CommandError, usage_error
from oncegate.keys.digests import Digests, Scope, UnstableScope, identity_settings
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.keys.tenants import TenantFields
from oncegate.messages.fields import by_name
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


async def find_record(settings: Settings, store: Store, options: argparse.Namespace) -> RecordView:
    """Return the record that the arguments name. Raises CommandError if there is none, StoreError without a reply."""
    record = await store.records.read(await find_key(settings, store, options))
    if record is None:
        is_scoped = options.id or options.scope or options.credential
        tenant = "" if is_scoped else ", for the tenant without a credential"
        # Lists and logs show ids, which are well-formed as keys, too.
        is_id = not options.id and parse_record_id(options.key) is not None
        raise CommandError(f"there is no record of this key{tenant}{'; name a record by its id with --id' * is_id}")
    return record


async def find_key(settings: Settings, store: Store, options: argparse.Namespace) -> bytes:
    """Return the digest of the key that the arguments name; it may have no record. Raises as `find_record` does."""
    if options.id:
        return await _digest_by_id(store, options.id)
    return await _digest_by_key(settings, store, options)


async def _digest_by_id(store: Store, record_id: str) -> bytes:
    """Return the digest of the key whose id is `record_id`, or is the only one that begins with it."""
    if digest := parse_record_id(record_id):
        return digest
    if len(record_id) < MIN_ID_CHARACTERS or not set(record_id) <= _ID_CHARACTERS:
        raise usage_error(f"an id has 32 characters; give at least its first {MIN_ID_CHARACTERS}")
    # SCAN may return a record more than once, so that a list would count it twice.
    matches = {record.key async for record in store.records.scan(record_id)}
    if not matches:
        raise CommandError("there is no record with this id")
    if len(matches) > 1:
        raise CommandError(f"{len(matches)} records have ids that begin with {record_id}: give more of the id")
    return matches.pop()


async def _digest_by_key(settings: Settings, store: Store, options: argparse.Namespace) -> bytes:
    """Return the digest of the key that `KEY` and the scope options name, as the proxies on this store compute it."""
    if options.key is None:
        raise usage_error("give a key, or a record's id with --id")
    # A key may have bytes that are not UTF-8: Python passes those of an argument on as surrogates (PEP 383).
    key = parse_key([options.key.encode("utf-8", "surrogateescape")])
    if isinstance(key, BadKey):
        raise usage_error(key.detail)
    digests = await _digests(settings, store)
    return digests.key(_scope(settings, options, digests), key)


async def find_tenant(settings: Settings, store: Store, options: argparse.Namespace) -> bytes:
    """Return the digest of the tenant that the arguments name. Raises CommandError, StoreError without a reply."""
    return _scope(settings, options, await _digests(settings, store)).tenant


async def _digests(settings: Settings, store: Store) -> Digests:
    """Return what computes digests as the proxies on this store do. Raises CommandError if the settings differ."""
    digests = Digests(settings.secret.get_secret_value().encode())
    ours = identity_settings(digests, settings.namespace, settings.key_header, settings.scope_headers)
    # With other settings the same key has another digest: "no such record" would be wrong.
    theirs = await store.records.identities()
    if theirs and ours not in theirs:
        raise CommandError("the proxies on this store compute digests with other settings: run this with theirs")
    return digests


def _scope(settings: Settings, options: argparse.Namespace, digests: Digests) -> Scope:
    """Return the scope that the options name: a digest, a credential from standard input, or no credential."""
    namespace = (options.namespace or settings.namespace).encode()
    if options.scope:
        return Scope(namespace, _scope_digest(options.scope))
    names = [name.lower().encode() for name in expanded(settings.scope_headers)]
    tenant = TenantFields(names, [scheme.encode() for scheme in settings.stable_schemes])
    # Standard input, because every process of the machine can read the arguments.
    lines = sys.stdin.buffer.read().splitlines() if options.credential else []
    scope = digests.scope(namespace, by_name(_credential(lines, tenant)), tenant)
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
    """Return the header fields in `lines`. Raises CommandError if one of them is not part of a scope."""
    pairs = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in lines if line)]
    if not all(name.lower() in tenant.read for name, _ in pairs):
        raise usage_error("standard input must have lines `Name: value` of headers that identify the tenant")
    return pairs
