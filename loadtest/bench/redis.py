"""A minimal client for the bench's Redis, over a plain socket."""

import socket

from loadtest.bench.scenarios import request_bytes

# A stored answer has two fields, its meta of about 330 bytes and the body.
FILL = """
for i = ARGV[1], ARGV[2] do
  local key = 'once:{' .. redis.sha1hex(i) .. '}'
  redis.call('HSET', key, 'meta', string.rep('m', 330), 'b0', string.rep('b', 110))
  redis.call('PEXPIRE', key, 86400000)
end
return 'OK'
"""
BATCH = 10_000


def command(port: int, *words: str) -> str:
    """Send one command and return its reply as text. Raises RuntimeError for an error."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection, connection.makefile("rb") as replies:
        parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
        connection.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
        kind, line = (head := replies.readline())[:1], head[1:].strip()
        if kind == b"-":
            raise RuntimeError(line.decode())
        return (replies.read(int(line)) if kind == b"$" else line).decode()


def fill(port: int, count: int) -> None:
    """Create so many records, each of the size that a small response has."""
    for first in range(1, count + 1, BATCH):
        command(port, "EVAL", FILL, "0", str(first), str(min(count, first + BATCH - 1)))


def raw_answer_bytes(upstream_port: int) -> int:
    """Return the size of the upstream's response on the wire: head and body."""
    with socket.create_connection(("127.0.0.1", upstream_port), 5) as connection:
        connection.sendall(request_bytes("/v1/charges", ""))
        return len(connection.recv(65536))
