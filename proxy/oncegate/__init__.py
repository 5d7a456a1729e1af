"""oncegate: a reverse proxy that makes unsafe HTTP requests safe to retry.

A request enters in `downstream` (the client's connection) and goes through `gateway`, which reads top to bottom from
`gateway.handler`. `rules` and `keys` say which policy and which key it has, `store` claims the key, `upstream` forwards
the request once, and `decision` has every rule about what a duplicate gets. `messages`, `buffers`, `settings` and
`observe` serve all of them, and `known_heads` saves the work on message heads that came before. `service` builds one
worker of these parts, `server` is the life of the process, and `commands` is what a person types. `testing` injects
faults for tests of oncegate itself, and `examples` are the files that `oncegate init` writes.
"""

__version__ = "0.2.0.dev0"
