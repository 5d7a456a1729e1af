"""What the requests of one connection have in common."""

from hashlib import blake2b

from oncegate.keys.digests import Digests, Scope, UnstableScope
from oncegate.messages.fields import Fields
from oncegate.messages.request_head import RequestHead
from oncegate.rules.identity import fingerprint_parts
from oncegate.rules.policy import Policy


class ConnectionMemo:
    """What a connection's last request made known, for the next one that says the same.

    It decides nothing: whatever is in here is compared with the request at hand before it is used, and computed anew
    where it differs. Without it, digesting what is repeated takes 2 % of an execution (measured).
    """

    __slots__ = ("_fingerprint_parts", "_fingerprint_prefix", "_policy", "_scope", "_scope_values", "key_label")

    def __init__(self, key_label: bytes = b"") -> None:
        self.key_label = key_label
        self._policy: Policy | None = None
        self._scope_values: Fields = {}
        self._fingerprint_parts: tuple[bytes, ...] = ()

    def scope(self, digests: Digests, policy: Policy, fields: Fields) -> Scope | UnstableScope:
        """Return whose key a request carries, where header fields name the tenant."""
        # One pass over the few fields of a request, not over the many that could identify a tenant.
        read = policy.tenant.read
        values = {name: fields[name] for name in fields if name in read}
        if policy is not self._policy or values != self._scope_values:
            self._scope = digests.scope(policy.namespace, values, policy.tenant)
            self._policy, self._scope_values = policy, values
        return self._scope

    def fingerprint_prefix(self, digests: Digests, policy: Policy, head: RequestHead) -> blake2b:
        """Return the running fingerprint of a request before its body is added. Copy it before that."""
        parts = fingerprint_parts(policy, head)
        if parts != self._fingerprint_parts:
            self._fingerprint_parts, self._fingerprint_prefix = parts, digests.fingerprint_prefix(parts)
        return self._fingerprint_prefix
