"""The operations and their failures, from the seed alone: both sides of a run get the same."""

import random
from dataclasses import dataclass
from typing import NamedTuple

# Chances of an execution to be slow, declined or cut: as usual, and in the brownout, the middle third of the run.
USUAL = {"slow": 0.02, "busy": 0.02, "cut": 0.01}
BROWNOUT = {"slow": 0.40, "busy": 0.20, "cut": 0.06}
SLOW = (1.1, 2.2)  # in multiples of the clients' patience
QUICK_S = (0.02, 0.15)


@dataclass(frozen=True)
class Plan:
    """One run. `rate`: operations started per second; `patience_s`: how long a client waits at each try."""

    seed: int = 1
    seconds: float = 45.0
    rate: float = 30.0
    patience_s: float = 1.0

    @property
    def brownout(self) -> tuple[float, float]:
        """The time in which the API fails most, in seconds from the start."""
        return self.seconds / 3, self.seconds * 2 / 3


class Operation(NamedTuple):
    """One thing to do once. `price`: in cents for a charge, in tokens for a prompt."""

    number: int
    begins_s: float
    kind: str  # charges or prompts
    price: int

    @property
    def path(self) -> str:
        return f"/v1/{self.kind}/{self.number}"


class Fate(NamedTuple):
    """The fate of one execution: fine, slow (done, late response), cut (done, no response) or busy (not done)."""

    how: str
    takes_s: float


def operations(plan: Plan) -> list[Operation]:
    """Return the operations in the order of their start."""
    rng = random.Random(f"operations {plan.seed}")
    made: list[Operation] = []
    at = rng.expovariate(plan.rate)
    while at < plan.seconds:
        kind = rng.choice(("charges", "charges", "prompts"))
        price = rng.randint(500, 10_000) if kind == "charges" else rng.randint(200, 4000)
        made.append(Operation(len(made), at, kind, price))
        at += rng.expovariate(plan.rate)
    return made


def fate(plan: Plan, operation: Operation, nth: int) -> Fate:
    """Return the fate of the nth request of an operation that reaches the API."""
    rng = random.Random(f"fate {plan.seed} {operation.number} {nth}")
    begins, ends = plan.brownout
    chances = BROWNOUT if begins <= operation.begins_s < ends else USUAL
    (how,) = rng.choices([*chances, "fine"], [*chances.values(), 1 - sum(chances.values())])
    return Fate(how, plan.patience_s * rng.uniform(*SLOW) if how == "slow" else rng.uniform(*QUICK_S))
