"""Which key an operator means: by its name and whose it is, or by the id that lists and logs show.

A credential never stands among the arguments, where every process of the machine reads it.
"""

import argparse
import sys

from oncegate.commands.refusal import WRONG, Refusal
from oncegate.keys.digests import Digests, Scope, UnstableScope, identity_settings, parse_record_id
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.fields import by_name
from oncegate.settings.settings import Settings
from oncegate.store.record_view import RecordView, identities, look_at, scan
from oncegate.store.store import Store

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


async def find(settings: Settings, store: Store, options: argparse.Namespace) -> RecordView:
    """Return the record that is meant; Refusal where there is none."""
    key = await _by_id(store, options.id) if options.id else await _by_name(settings, store, options)
    seen = await look_at(store, key)
    if seen is None:
        whose = "" if options.id or options.scope or options.credential else " of the tenant without a credential"
        raise Refusal(f"there is no record of this key{whose}")
    return seen


async def _by_id(store: Store, given: str) -> bytes:
    if digest := parse_record_id(given):
        return digest
    if len(given) < 8 or not set(given) <= set(ALPHABET):
        raise Refusal("an id has 32 characters; its first 8 or more will do", WRONG)
    found = {seen.key async for seen in scan(store, given)}
    if len(found) != 1:
        raise Refusal("there is no such record" if not found else f"{len(found)} records begin like that")
    return found.pop()


async def _by_name(settings: Settings, store: Store, options: argparse.Namespace) -> bytes:
    """Return the digest of a key as the proxies make it, which takes the settings that they have."""
    if options.key is None:
        raise Refusal("name a key, or a record with --id", WRONG)
    key = parse_key([options.key.encode("utf-8", "surrogateescape")])
    if isinstance(key, BadKey):
        raise Refusal(key.detail, WRONG)
    digests = Digests(settings.secret.get_secret_value().encode())
    ours = identity_settings(digests, settings.namespace, settings.key_header, settings.scope_headers)
    theirs = await identities(store)
    if theirs and ours not in theirs:
        raise Refusal("the proxies on this store name keys by other settings than these: run this with theirs")
    return digests.key(_scope(settings, options, digests), key)


def _scope(settings: Settings, options: argparse.Namespace, digests: Digests) -> Scope:
    namespace = (options.namespace or settings.namespace).encode()
    if options.scope:
        try:
            tenant = bytes.fromhex(options.scope)
        except ValueError:
            tenant = b""
        if len(tenant) != 16:
            raise Refusal("a scope is a digest of 32 hexadecimal digits, as `keys list` prints it", WRONG)
        return Scope(namespace, tenant)
    names = [name.lower().encode() for name in settings.scope_headers]
    lines = sys.stdin.buffer.read().splitlines() if options.credential else []
    scope = digests.scope(namespace, by_name(_credential(lines, names)), names)
    if isinstance(scope, UnstableScope):
        raise Refusal("this credential changes with every request; the proxies refuse it as a scope", WRONG)
    return scope


def _credential(lines: list[bytes], names: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the header fields of these lines, which must be what a scope is made of."""
    pairs = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in lines if line)]
    if lines and not all(name.lower() in (*names, b"cookie") for name, _ in pairs):
        wanted = ", ".join(name.decode() for name in names)
        raise Refusal(f"standard input must have `Name: value` lines of the scope headers ({wanted})", WRONG)
    return pairs
