"""Jobs in a file: a key and what is to be sent under it are one row, on disk before the first try.

A program that dies anywhere finds its jobs again, and goes on with the keys they had.
"""

import sqlite3
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from config.clients.sending import Answer, Outcome, Result

TABLE = (
    "CREATE TABLE IF NOT EXISTS jobs (key TEXT PRIMARY KEY, made REAL, body BLOB, outcome TEXT, status INT, told BLOB)"
)


@dataclass(frozen=True)
class Job:
    """What is to be done, and the key under which it is done once."""

    key: str
    made: float  # seconds of the wall clock
    body: bytes


class Jobs:
    """The file. In a service this is a table of its own database, written with the order itself."""

    def __init__(self, path: str) -> None:
        self._rows = sqlite3.connect(path, isolation_level=None)  # each statement is a transaction
        self._rows.execute(TABLE)

    def add(self, body: bytes) -> str:
        """Store a job and return its new key."""
        key = str(uuid.uuid4())
        self._rows.execute("INSERT INTO jobs (key, made, body) VALUES (?, ?, ?)", (key, time.time(), body))
        return key

    def open(self) -> list[Job]:
        """Return the jobs whose outcome is not known, the oldest first."""
        rows = self._rows.execute("SELECT key, made, body FROM jobs WHERE outcome IS NULL ORDER BY made")
        return [Job(*row) for row in rows]

    def close(self, job: Job, outcome: Outcome, answer: Answer | None) -> None:
        """Write what became of a job."""
        told = (answer.status, answer.body) if answer else (None, None)
        values = (outcome.value, *told, job.key)
        self._rows.execute("UPDATE jobs SET outcome = ?, status = ?, told = ? WHERE key = ?", values)


def work(jobs: Jobs, longest_s: float, send: Callable[[Job], Result]) -> int:
    """Do what is open, tell each outcome on a line, and return an exit code: 0 where nothing stays open.

    `longest_s`: a job that is older is not sent any more. Its key may have been forgotten by then, and would
    execute again; so this must be shorter than the retention of the rule.
    """
    left = 0
    for job in jobs.open():
        if time.time() - job.made > longest_s:
            outcome, answer = Outcome.UNKNOWN, None
        else:
            result = send(job)
            outcome, answer = result.outcome, result.answer
        if outcome is Outcome.OPEN:
            left += 1
        else:
            jobs.close(job, outcome, answer)
        print(job.key, outcome.value, answer.status if answer else "-", flush=True)
    return 1 if left else 0
