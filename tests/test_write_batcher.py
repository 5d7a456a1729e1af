"""Writes that leave together: in their order, once what is due has run, and each for itself."""

import asyncio

import pytest

from oncegate.buffers.write_batcher import WriteBatcher, write_batcher


class Wire(asyncio.WriteTransport):
    """A transport that keeps what is written, and may be closing or fail."""

    def __init__(self, log: list[bytes], closing: bool = False, fails: bool = False) -> None:
        super().__init__()
        self.log, self.closing, self.fails, self.aborted = log, closing, fails, False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.fails:
            raise RuntimeError("no such thing")
        self.log.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.aborted = True


async def test_what_is_not_held_leaves_at_once():
    log: list[bytes] = []
    write_batcher(asyncio.get_running_loop()).write(Wire(log), b"a")
    assert log == [b"a"]


async def test_what_is_held_leaves_in_order_once_all_that_is_due_has_run():
    """In one turn of the loop: nothing that comes meanwhile is read before."""
    loop, log = asyncio.get_running_loop(), list[bytes]()
    box, wire, other = WriteBatcher(loop), Wire(log), Wire(log)
    for number in range(3):
        loop.call_soon(box.write, (wire, other)[number % 2], b"%d" % number)
    box.hold()
    loop.call_soon(box.hold)  # another one, meanwhile
    loop.call_soon(lambda: log.append(b"next"))
    assert log == []
    await asyncio.sleep(0)
    assert log == [b"0", b"1", b"2", b"next"]
    box.write(wire, b"3")
    assert log[4:] == []
    await asyncio.sleep(0)
    assert log[4:] == [b"3"]
    box.write(wire, b"4")
    assert log[5:] == [b"4"]


async def test_a_flush_lets_all_of_it_go():
    log: list[bytes] = []
    box = WriteBatcher(asyncio.get_running_loop())
    box.hold()
    box.write(Wire(log), b"a")
    box.flush()
    assert log == [b"a"]
    await asyncio.sleep(0)
    assert log == [b"a"]


@pytest.mark.parametrize(("closing", "fails"), [(True, False), (False, True)])
async def test_a_transport_that_takes_nothing_stops_no_other(closing, fails):
    """One that is closing gets nothing; one that fails is broken off."""
    log: list[bytes] = []
    box, odd = WriteBatcher(asyncio.get_running_loop()), Wire(log, closing, fails)
    box.hold()
    for wire in (Wire(log), odd, Wire(log)):
        box.write(wire, b"a")
    await asyncio.sleep(0)
    assert log == [b"a", b"a"]
    assert odd.aborted is fails


async def test_each_loop_has_its_own():
    mine = write_batcher(asyncio.get_running_loop())
    assert write_batcher(asyncio.get_running_loop()) is mine
    other = asyncio.new_event_loop()
    assert write_batcher(other) is not mine
    other.close()
