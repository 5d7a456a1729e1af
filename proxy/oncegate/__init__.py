"""oncegate: a reverse proxy that makes unsafe HTTP requests safe to retry.

The map. A request enters in `handler` (read it first, it reads top to bottom), is let in by
`gate.Gate`, named by `keys`, read whole by `body`, and claimed by `store` (`lua/claim.lua`). With a
Claim it goes through `exchange`: forwarded once over `upstream`, passed on and stored at the same time
(`recording`), settled, and only then ended. Without one, `decision` says what it gets: a `replay`, a
`problems` answer, or a wait in `waiters`. `leases` keeps the claims of a worker alive.
`listener` and `client` are the public side; `relay` is everything that no key guards. `app` builds it
all from `settings`; `server` is the life of the process; `cli` has the commands.
"""

__version__ = "0.2.0.dev0"
