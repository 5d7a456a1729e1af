"""Which fields of a request identify its tenant, and which credentials stay the same from try to try. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from oncegate.settings.credentials import ACCOUNTS, BARE, CREDENTIALS, STABLE_SCHEMES

# They choose among what a credential may do, and prove nothing: beside them alone, a cookie still counts.
_NO_CREDENTIALS = frozenset((*(name.lower().encode() for name in ACCOUNTS), b"host"))
# What counts where a scope finds no credential.
_LAST_RESORT = (b"cookie", *(name.lower().encode() for name in (*CREDENTIALS, *ACCOUNTS)))
_STABLE = frozenset(scheme.lower().encode() for scheme in STABLE_SCHEMES)
_BARE = BARE.encode()


class TenantFields:
    """The fields and further sources that identify a tenant, as far as a request has them.

    `names`: lower-case names of header fields, and spellings of other sources, in the order in which they enter the
    tenant's digest. `schemes`: lower-case Authorization schemes that are stable beside the known ones. Where a request
    has no credential among these, all of its Cookie counts as well, and the known credentials: one that changes too
    often makes a retry execute again, but without it one user could get another's response.
    """

    __slots__ = ("_chosen", "_credentials", "_last_resort", "_positions", "_secrets", "_stable", "names", "read")

    def __init__(self, names: Iterable[bytes], schemes: Iterable[bytes] = ()) -> None:
        self.names = tuple(names)
        self._stable = _STABLE.union(schemes)
        self._chosen = chosen = frozenset(self.names)
        # A scope without any name is one tenant for all.
        self._last_resort = frozenset(_LAST_RESORT) - chosen if chosen else chosen
        # An operator who names nothing but accounts says that these do.
        self._credentials = chosen - _NO_CREDENTIALS or chosen
        chosen_secrets = {name for name in chosen - _NO_CREDENTIALS if b":" not in name or name.startswith(b"cookie:")}
        self._secrets = chosen_secrets | {name.lower().encode() for name in CREDENTIALS}
        self._positions = {
            name: at
            for at, name in enumerate((*self.names, *_LAST_RESORT))
            if name not in chosen or at < len(self.names)
        }
        # What of a request's fields has to be looked at.
        self.read = chosen | self._last_resort

    def counted(self, fields: Mapping[bytes, Sequence[bytes]]) -> list[bytes]:
        """Return the names of those `fields` that identify the tenant, in their order."""
        names = [name for name in fields if name in self.read]
        if not self._last_resort.isdisjoint(names) and self._has_credential(fields, names):
            names = [name for name in names if name in self._chosen]
        # In the order of the scope, however the client orders its fields.
        return names if len(names) < 2 else sorted(names, key=self._positions.__getitem__)

    def _has_credential(self, fields: Mapping[bytes, Sequence[bytes]], names: Iterable[bytes]) -> bool:
        return any(name in self._credentials and any(fields[name]) for name in names)

    def shows_credential(self, fields: Mapping[bytes, Sequence[bytes]]) -> bool:
        """Return whether a request shows what only its client should know.

        An account, a host, or a part of the target is no secret; and a cookie that the scope does not name may be one
        of a choice of language, which many have.
        """
        return any(name in self._secrets and any(fields[name]) for name in self.counted(fields))

    def is_stable(self, credential: bytes) -> bool:
        """Return whether a value of Authorization is the same when its request is sent again."""
        if credential.startswith((b"Bearer ", b"Basic ")):
            return True
        scheme, space, _ = credential.strip(b" \t").replace(b"\t", b" ").lower().partition(b" ")
        return not scheme or scheme in self._stable or (not space and _BARE in self._stable)
