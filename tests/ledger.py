"""An API with a ledger, which executes an order and then cuts the connection; and an index of it that is not perfect.

Of ten orders two are cut before they are executed, and one is declined. Every second answer is cut in the middle of its
body. The index answers by a variant: see `VARIANTS`.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.parts import Answer, Proxy, RawUpstream, Received, abort, ask, request

HEAD = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@dataclass(frozen=True)
class Variant:
    """How the index answers. Times in seconds at full size.

    `lag_s`: until it has an order, at random up to this, or surely so long (`is_fixed`). `down_s`: nobody answers for
    so long from the first question on. `forgets_s`: it has an order no more. `wrong_s`: it answers with another's order
    for so long. `after_s`, `before_s`: when an absence counts.
    """

    name: str
    lag_s: float = 0
    is_fixed: bool = False
    down_s: float = 0
    forgets_s: float = 0
    wrong_s: float = 0
    after_s: float = 5
    before_s: float = 3600


VARIANTS = (
    Variant("plain"),
    Variant("lags", lag_s=20, after_s=30),
    Variant("late", lag_s=30, is_fixed=True, after_s=40),
    Variant("down", down_s=60),
    Variant("forgets", forgets_s=60, before_s=55),
    Variant("another", wrong_s=20),
)


def rules(urls: Mapping[str, str], scale: float, rate_per_s: float, **changed: object) -> str:
    """Return a rule for each variant, with all times divided by `scale`. `urls`: of the API of each one."""
    return "".join(_rule(one, urls[one.name], scale, rate_per_s, changed) for one in VARIANTS if one.name in urls)


def _rule(variant: Variant, url: str, scale: float, rate_per_s: float, changed: dict[str, object]) -> str:
    table = {
        "absent_after_s": variant.after_s / scale,
        "absent_before_s": variant.before_s / scale,
        "absent_agree": 2,
        "first_after_s": max(0.1, 2 / scale),
        "most_s": max(0.1, 10 / scale),
        "timeout_s": 5,
        "rate_per_s": rate_per_s,
        **changed,
    }
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in table.items())
    return f"""
[[rule]]
name = "{variant.name}"
path = "/{variant.name}/**"
upstream = "{url}"
[rule.reconcile]
url = "/{variant.name}/orders?reference={{key}}"
keep = ["key"]
reference = {{ "/reference" = "{{key}}" }}
succeeded = [{{ status = "200", when = {{ "/state" = "paid" }} }}]
failed = [{{ status = "200", when = {{ "/state" = "declined" }} }}]
absent = [{{ status = "404" }}]
answers.failed.status = 402
{lines}
"""


@dataclass
class Order:
    at_s: float
    visible_s: float
    state: str

    def document(self, reference: str) -> bytes:
        return json.dumps({"reference": reference, "id": f"id-of-{reference}", "state": self.state}).encode()


@dataclass
class Ledger:
    """The API, as a script of RawUpstream. `executed`: how often each order was. `asked`: when each question came."""

    scale: float
    executed: Counter[str] = field(default_factory=Counter)
    orders: dict[str, Order] = field(default_factory=dict)
    asked: list[tuple[float, str]] = field(default_factory=list)
    first_s: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    async def script(
        self, _: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Received
    ) -> None:
        method, target, _version = request.line.decode().split(" ")
        variant = next(one for one in VARIANTS if target.startswith(f"/{one.name}/"))
        if method == "GET":
            self._answer(writer, variant, target.partition("reference=")[2])
        else:
            reference = request.header("Idempotency-Key")[0].decode().strip('"')
            if self._execute(writer, variant, reference):
                # What is written leaves first.
                await writer.drain()
                await asyncio.sleep(0.02)
                return writer.close()
        await writer.drain()
        return None

    def _execute(self, writer: asyncio.StreamWriter, variant: Variant, reference: str) -> bool:
        """Execute an order, and answer it, or not. Return whether the rest of the answer is cut."""
        number, is_first = int(reference.rpartition("-")[2]), reference not in self.seen
        self.seen.add(reference)
        if is_first and number % 10 in (3, 8):
            abort(writer)
            return False
        body = self.execute(reference, variant)
        if not is_first:
            writer.write(HEAD % (201, len(body)) + body)
        elif number % 2:
            writer.write(HEAD % (201, len(body)) + body[:10])
            return True
        else:
            abort(writer)
        return False

    def execute(self, reference: str, variant: Variant = VARIANTS[0]) -> bytes:
        """Execute an order, and return its document."""
        self.executed[reference] += 1
        now_s, lag_s = time.monotonic(), variant.lag_s if variant.is_fixed else self.chance.uniform(0, variant.lag_s)
        state = "declined" if reference.endswith("5") else "paid"
        self.orders[reference] = Order(now_s, now_s + lag_s / self.scale, state)
        return self.orders[reference].document(reference)

    def _answer(self, writer: asyncio.StreamWriter, variant: Variant, reference: str) -> None:
        now_s, order = time.monotonic(), self.orders.get(reference)
        first_s = self.first_s.setdefault(variant.name, now_s)
        self.asked.append((now_s, reference))
        if now_s < first_s + variant.down_s / self.scale:
            return abort(writer)
        if order is not None and variant.wrong_s and now_s < order.at_s + variant.wrong_s / self.scale:
            other = next((one for one in self.orders if one.startswith(variant.name) and one != reference), "nobody-1")
            return self._write(writer, 200, Order(0, 0, "paid").document(other))
        is_over = order is not None and variant.forgets_s and now_s > order.at_s + variant.forgets_s / self.scale
        if order is None or now_s < order.visible_s or is_over:
            return self._write(writer, 404, b'{"error": "not found"}')
        return self._write(writer, 200, order.document(reference))

    def _write(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        writer.write(HEAD % (status, len(body)) + body)


class Api:
    """A ledger behind an upstream for each variant, and a file with a rule for each."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.ledger, self._file, self._scale = Ledger(scale), folder / "rules.toml", scale
        self.upstreams = {variant.name: RawUpstream() for variant in VARIANTS}

    async def start(self) -> None:
        for upstream in self.upstreams.values():
            upstream.script = self.ledger.script
            await upstream.start()

    def rules(self, *names: str, rate_per_s: float = 200, **changed: object) -> str:
        """Write the rules of these variants, and return their file."""
        urls = {name: self.upstreams[name].url for name in names}
        self._file.write_text(rules(urls, self._scale, rate_per_s, **changed))
        return str(self._file)

    async def close(self) -> None:
        # Connections that were accepted a moment ago become some that can be closed, and then they are.
        await asyncio.sleep(0.05)
        for upstream in self.upstreams.values():
            await upstream.close()
        await asyncio.sleep(0.05)


async def order(port: int, variant: str, number: int, *extra: str) -> Answer:
    return await ask(port, request("POST", f"/{variant}/orders", f"{variant}-{number}", b'{"amount": 1}', *extra), 120)


async def lose(port: int, variant: str, numbers: range, at_once: int = 20) -> None:
    """Send orders whose answers are lost."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with places:
            answer = await order(port, variant, number)
            assert answer.status == 502 or not answer.complete, answer
            # A client that heeds it comes back, and gets the verdict.
            assert answer.status != 502 or answer.header("x-should-retry") == b"true"

    await asyncio.gather(*[one(number) for number in numbers])


def settled(*proxies: Proxy) -> Counter[str]:
    """Return how many keys were settled, by whom."""
    found: Counter[str] = Counter()
    for proxy in proxies:
        for by in ("janitor", "duplicate"):
            found[by] += int(proxy.metric(f'reconciled_total{{by="{by}"}}'))
    return found


async def judge(ledger: Ledger, port: int, variant: str, numbers: range, at_once: int = 20) -> Counter[str]:
    """Retry each order, and return what became of them."""
    places, found = asyncio.Semaphore(at_once), Counter[str]()

    async def one(number: int) -> None:
        reference = f"{variant}-{number}"
        before = ledger.executed[reference]
        async with places:
            answer = await order(port, variant, number)
        status = (answer.header("oncegate-status") or b"").decode()
        if status == "reconciled":
            found["reconciled" if before == 1 and is_true(answer, ledger, reference) else "wrong"] += 1
        elif status == "executed":
            found["freed" if before == 0 else "wrong"] += 1
        else:
            found[f"left: {status} {answer.status}"] += 1
        found["second executions"] += ledger.executed[reference] > 1

    await asyncio.gather(*[one(number) for number in numbers])
    return found


def is_true(answer: Answer, ledger: Ledger, reference: str) -> bool:
    """Return whether an answer is what really became of an order."""
    order = ledger.orders[reference]
    return (answer.status, answer.body) == ({"paid": 200, "declined": 402}[order.state], order.document(reference))
