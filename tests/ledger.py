"""An API with a ledger, which executes an order and then cuts the connection; and an index of it that is not perfect.

Of ten orders two are cut before they are executed, and one is declined. Every second answer is cut in the middle of its
body. The index answers by a variant: see `VARIANTS`.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.parts import RawUpstream, Received, abort

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
        "timeout_s": max(0.5, 5 / scale),
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
    seen: set[str] = field(default_factory=set)
    # Called with the reference of each order before it is executed, and of each question before it is answered.
    on_order: Callable[[str], object] = lambda _: None
    hold_s: float = 0
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    async def script(
        self, _: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Received
    ) -> None:
        method, target, _version = request.line.decode().split(" ")
        variant = next(one for one in VARIANTS if target.startswith(f"/{one.name}/"))
        if method == "GET":
            await self._answer(writer, variant, target.partition("reference=")[2])
        else:
            self._execute(writer, variant, request.header("Idempotency-Key")[0].decode().strip('"'))
        await writer.drain()

    def _execute(self, writer: asyncio.StreamWriter, variant: Variant, reference: str) -> None:
        number, is_first = int(reference.rpartition("-")[2]), reference not in self.seen
        self.seen.add(reference)
        if is_first and number % 10 in (3, 8):
            return abort(writer)
        body = self.execute(reference, variant)
        if not is_first:
            return writer.write(HEAD % (201, len(body)) + body)
        if number % 2:
            writer.write(HEAD % (201, len(body)) + body[:10])
            # What is written leaves first.
            asyncio.get_running_loop().call_later(0.02, writer.close)
            return None
        return abort(writer)

    def execute(self, reference: str, variant: Variant = VARIANTS[0]) -> bytes:
        """Execute an order, and return its document."""
        self.executed[reference] += 1
        now_s, lag_s = time.monotonic(), variant.lag_s if variant.is_fixed else self.chance.uniform(0, variant.lag_s)
        state = "declined" if reference.endswith("5") else "paid"
        self.orders[reference] = Order(now_s, now_s + lag_s / self.scale, state)
        return self.orders[reference].document(reference)

    async def _answer(self, writer: asyncio.StreamWriter, variant: Variant, reference: str) -> None:
        first_s = min((at_s for at_s, one in self.asked if one.startswith(variant.name)), default=time.monotonic())
        now_s, order = time.monotonic(), self.orders.get(reference)
        self.asked.append((now_s, reference))
        if self.hold_s:
            await asyncio.sleep(self.hold_s)
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
