"""The clients: each sends every operation with its key, and retries it at most three times.

They interpret responses as the clients in `config/` do.
"""

import asyncio
import random
import time
from dataclasses import dataclass

from config.clients.sending import Answer, Outcome, judge
from loadtest.chaos.wire import Answer as Wire
from loadtest.retry_storm.plan import Operation, Plan, operations

RETRIES = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 2.0


@dataclass(frozen=True)
class Ended:
    """One operation as its client saw it. `outcome`: answered, unknown (as the response said), or open (given up)."""

    operation: Operation
    outcome: Outcome
    begun: float  # CLOCK_MONOTONIC, s
    took_s: float
    tries: int


async def attempt(port: int, raw: bytes, patience_s: float) -> Answer:
    """Send it once. Raises OSError or TimeoutError if no complete response arrives in time."""
    wire = Wire()
    async with asyncio.timeout(patience_s):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(raw)
            while data := await reader.read(65536):
                if wire.feed(data):
                    fields = {name.decode(): value.decode() for name, value in wire.fields.items()}
                    return Answer(int(wire.lines[0].split(b" ")[1]), fields, bytes(wire.body))
        finally:
            writer.transport.abort()
    raise ConnectionError


def request(plan: Plan, operation: Operation, *fields: str) -> bytes:
    """Return an operation's bytes, the same for each try."""
    body = b'{"price": %d}' % operation.price
    lines = [
        f"POST {operation.path} HTTP/1.1",
        "Host: api.test",
        "Authorization: Bearer storm",
        f"Idempotency-Key: {plan.seed}-{operation.number}",
        f"Content-Length: {len(body)}",
        *fields,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def carry_out(plan: Plan, operation: Operation, port: int) -> Ended:
    """Try an operation until its outcome is known or the tries are used up."""
    raw, dice = request(plan, operation), random.Random(f"pauses {plan.seed} {operation.number}")
    begun, outcome = time.monotonic(), Outcome.OPEN
    for number in range(1, RETRIES + 2):
        pause_s = 0.0
        try:
            answer = await attempt(port, raw, plan.patience_s)
        except (OSError, TimeoutError):
            pass
        else:
            if settled := judge(answer):
                outcome = settled
                break
            pause_s = answer.retry_after_s
        if number <= RETRIES:
            longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1))
            await asyncio.sleep(pause_s + dice.uniform(0, longest_s))
    return Ended(operation, outcome, begun, time.monotonic() - begun, number)


async def storm(plan: Plan, port: int, begins: float) -> list[Ended]:
    """Start each operation at its time, and return how all of them ended."""
    tasks = []
    for operation in operations(plan):
        await asyncio.sleep(begins + operation.begins_s - time.monotonic())
        tasks.append(asyncio.ensure_future(carry_out(plan, operation, port)))
    return await asyncio.gather(*tasks)


async def learn(plan: Plan, port: int, ended: list[Ended], patience_s: float = 15.0) -> int:
    """Ask once more for each operation whose outcome is unknown; return how many have an answer by then."""
    unknown = [one.operation for one in ended if one.outcome is Outcome.UNKNOWN]
    raw = [request(plan, operation, f"Prefer: wait={patience_s:g}") for operation in unknown]
    answers = await asyncio.gather(*[attempt(port, one, patience_s + 5) for one in raw], return_exceptions=True)
    return sum(isinstance(answer, Answer) and judge(answer) is Outcome.ANSWERED for answer in answers)
