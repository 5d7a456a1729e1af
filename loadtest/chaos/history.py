"""The history of a run, read from its files alone: clients' attempts, upstream's executions, and faults."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Name = tuple[str, str]  # tenant and key
STORED = frozenset(("executed", "replayed", "joined", "reconciled"))


class Attempt(NamedTuple):
    """One line of a client's log.

    Times are CLOCK_MONOTONIC, in seconds; `how`: whole, cut, none, timeout, refused, left.
    """

    begun: float
    ended: float
    tenant: str
    key: str
    variant: str
    replica: int
    how: str
    status: int
    word: str
    replayed: bool
    slug: str
    digest: str
    execution: str
    echo: str

    @property
    def whole(self) -> bool:
        return self.how == "whole"

    @property
    def stored(self) -> bool:
        """Whether this client has a response that every other client must get, too."""
        return self.how == "whole" and not self.slug and self.word in STORED


class Act(NamedTuple):
    """One line of what a client did besides: `stop` an execution, or `ask` about a key. `said`: the key's state."""

    begun: float
    ended: float
    act: str
    tenant: str
    key: str
    replica: int
    status: int
    said: str


@dataclass(slots=True)
class Execution:
    """What the upstream logged about one request. `how`: running, whole, declined, cut, lost."""

    id: str
    begun: float
    tenant: str
    key: str
    variant: str
    replica: int
    kind: str
    ended: float = float("inf")
    how: str = "running"
    digest: str = ""


class Fault(NamedTuple):
    """One line of the timeline."""

    kind: str
    place: str
    replica: int | None
    begun: float
    ended: float
    detail: str
    loses: str = ""  # as in `faults.Kind`

    def touches(self, since: float, until: float, tail_s: float = 0.3) -> bool:
        return self.begun <= until and since <= self.ended + tail_s


@dataclass
class Case:
    """Everything known about one key of one tenant, in the order of time."""

    name: Name
    attempts: list[Attempt] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)

    @property
    def counted(self) -> list[Execution]:
        """The executions that count: those that the upstream did not decline."""
        return [one for one in self.executions if one.how != "declined"]


class History:
    """A run."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
        self.faults = _faults(folder / "faults.jsonl")
        self.stalls = _faults(folder / "stalls.jsonl")  # times in which the machine gave a process no processor
        self.reports = [float(line["at"]) for line in _json_lines(folder / "reports.jsonl")]
        self.mixed: list[str] = []
        self.idle: list[Fault] = []  # times at which the API ended an idle connection with a 408
        self.executions: dict[str, Execution] = {}
        self.cases: dict[Name, Case] = {}
        self._read_upstream(folder / "upstream.log")
        self._disturbances = sorted([*self.faults, *self.stalls, *self.idle], key=lambda one: one.begun)
        for path in sorted(folder.glob("client-*.tsv")):
            self._read_client(path)
        for path in sorted(folder.glob("acts-*.tsv")):
            self._read_acts(path)
        for case in self.cases.values():
            case.attempts.sort()
            case.acts.sort()
            case.executions.sort(key=lambda one: one.begun)

    def case(self, name: Name) -> Case:
        if name not in self.cases:
            self.cases[name] = Case(name)
        return self.cases[name]

    def _read_upstream(self, path: Path) -> None:
        for kind, at, *words in _lines(path):
            if kind == "begin":
                one = Execution(words[0], float(at), words[1], words[2], words[3], int(words[4]), words[5])
                self.executions[one.id] = one
                self.case((one.tenant, one.key)).executions.append(one)
            elif kind == "end":
                one = self.executions[words[0]]
                one.ended, one.how, one.digest = float(at), words[1], words[2]
            elif kind == "idle":
                self.idle.append(Fault("upstream-idle", "upstream", int(words[0]), float(at), float(at), "a 408"))
            else:
                self.mixed.append(" ".join([at, *words]))

    def _read_client(self, path: Path) -> None:
        again = sys.intern
        for words in _lines(path):
            begun, ended, tenant, key, variant, replica, how, status, word, replayed, slug, digest, execution, echo = (
                words
            )
            attempt = Attempt(
                float(begun), float(ended), again(tenant), key, again(variant), int(replica), again(how), int(status),
                again(word), replayed == "1", again(slug), digest, execution, echo,
            )  # fmt: skip
            self.case((attempt.tenant, key)).attempts.append(attempt)

    def _read_acts(self, path: Path) -> None:
        for begun, ended, act, tenant, key, replica, status, said in _lines(path):
            one = Act(float(begun), float(ended), act, tenant, key, int(replica), int(status), said)
            self.case((tenant, key)).acts.append(one)

    def touching(self, since: float, until: float) -> Iterator[Fault]:
        """Yield the disturbances of the run between two times, stalls of the machine included."""
        for fault in self._disturbances:
            if fault.begun > until:
                return
            if fault.touches(since, until):
                yield fault


def _faults(path: Path) -> list[Fault]:
    return sorted((Fault(**line) for line in _json_lines(path)), key=lambda one: one.begun)


def _lines(path: Path) -> Iterator[list[str]]:
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield line[:-1].split("\t")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())
