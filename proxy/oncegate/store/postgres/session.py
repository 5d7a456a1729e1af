"""One connection to a server, which runs one statement at a time. It is never cancelled."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asyncpg

SETTINGS = {
    "default_transaction_isolation": "read committed",
    "client_min_messages": "warning",
    "jit": "off",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to one statement, whose commit is over. `is_below`: it may be on fewer servers than the level asks."""

    rows: list[Any]
    is_below: bool = False


class Lost(Exception):
    """A statement has no reply, and never will. `maybe_executed`: it left, so the server may execute it at any time."""

    def __init__(self, reason: str, maybe_executed: bool = True, backend: Any = None) -> None:
        super().__init__(reason)
        self.reason, self.maybe_executed, self.backend = reason, maybe_executed, backend


class Refused(Exception):
    """The server refused a statement, and has undone all of it."""

    def __init__(self, reason: str, sqlstate: str) -> None:
        super().__init__(reason)
        self.reason, self.sqlstate = reason, sqlstate


class Session:
    """One connection. `changed(session)` is called when it is free again, and when it is lost."""

    def __init__(self, connection: Any, backend: Any, changed: Callable[["Session"], None]) -> None:
        self._connection, self._backend, self._changed = connection, backend, changed
        self._loop = asyncio.get_running_loop()
        self.is_lost, self.is_busy, self._is_below = False, False, False
        connection.add_log_listener(self._note_message)
        connection.add_termination_listener(self._note_end)

    async def run(self, statement: str, *args: object) -> Answer:
        """Run one statement. Raises Refused, and Lost for any other end without a reply."""
        return await asyncio.shield(self._loop.create_task(self._run(statement, args)))

    async def _run(self, statement: str, args: tuple[object, ...]) -> Answer:
        self._is_below = False
        try:
            rows = await self._connection.fetch(statement, *args)
            return Answer(rows, self._is_below)
        except asyncpg.PostgresError as error:
            if error.severity_en == "ERROR":
                raise Refused(str(error), error.sqlstate or "") from error
            raise self._lost(error) from error
        except Exception as error:
            raise self._lost(error) from error
        finally:
            self.free()

    def _lost(self, error: Exception) -> Lost:
        self.is_lost = True
        self._connection.terminate()
        return Lost(str(error) or type(error).__name__, backend=self._backend)

    def free(self) -> None:
        self.is_busy = False
        self._changed(self)

    def end(self) -> None:
        self.is_lost = True
        self._connection.terminate()

    def _note_message(self, _connection: Any, message: Any) -> None:
        self._is_below |= message.sqlstate == "01000"

    def _note_end(self, _connection: Any) -> None:
        self.is_lost = True
        self._changed(self)
