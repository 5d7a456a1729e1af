"""The log says once why a worker is not ready, and when it is again."""

from typing import Any

from oncegate.service.readiness import ReadinessLog


class Lines:
    def __init__(self) -> None:
        self.lines: list[Any] = []

    def warning(self, event: str, **fields: Any) -> None:
        assert fields.pop("after_s", 0) >= 0
        self.lines.append((event, *fields.values()))


def test_each_change_is_one_line() -> None:
    """A reason that stays is one line, also while a number in it counts down; another reason is another line."""
    seen: list[list[str] | None] = [[], ["down"], ["down"], ["for 12 s"], ["for 9 s"], None, [], []]
    looks, log = iter(seen), Lines()
    readiness = ReadinessLog(lambda: next(looks), log)
    for _ in seen:
        readiness.look()
    assert log.lines == [("not ready", ["down"]), ("not ready", ["for 12 s"]), ("ready again", ["for 12 s"])]
