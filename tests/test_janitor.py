"""The janitor's round: what one key does to the others."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from oncegate.observe.reconciling import By
from oncegate.reconcile import janitor
from oncegate.reconcile.janitor import Janitor
from oncegate.reconcile.step import Step, StepResult
from oncegate.store.record import ViewState
from oncegate.store.record_view import RecordView


async def test_a_question_that_fails_is_one_key_s(monkeypatch):
    """Whatever goes wrong with one key is said, and the others are asked about all the same."""
    asked, said = list[bytes](), list[dict[str, Any]]()

    async def take_step(_deps: object, record: RecordView, _rule: object, _by: By, _patience_s: float) -> StepResult:
        asked.append(record.key)
        if record.key[0] % 2:
            raise ZeroDivisionError
        return StepResult(Step.ASKED, 1.0)

    monkeypatch.setattr(janitor, "take_step", take_step)
    rule = SimpleNamespace(policy=SimpleNamespace(reconcile=SimpleNamespace(origin="http://api.test")))
    loop = asyncio.get_running_loop()
    keys = [bytes([number] * 24) for number in range(20)]
    records = [RecordView(key, ViewState.UNKNOWN, b"t" * 16, 1) for key in keys]
    due = [janitor._Due(loop.time(), loop.time(), record, cast(Any, rule)) for record in records]
    worker = Janitor(cast(Any, None), dict, lambda event, **fields: said.append({"event": event, **fields}))
    await worker._ask(due, 0.01, loop.time() + 60)
    assert sorted(asked) == keys
    assert len(said) == 10
    assert {one["event"] for one in said} == {"a question failed"}
    assert all(isinstance(one["exc_info"], ZeroDivisionError) for one in said)
