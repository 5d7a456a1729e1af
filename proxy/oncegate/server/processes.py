"""Child processes: wait for their exit, and end them together with their parent."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

# linux/prctl.h
PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Return a function that ties the calling process to its parent: signal `number` arrives when the parent dies.

    The kernel watches the thread that forked, not the whole parent (prctl(2), PR_SET_PDEATHSIG). Raises OSError on
    other systems than Linux. The returned function raises OSError where the kernel refuses the call.
    """
    if sys.platform != "linux":
        raise OSError("oncegate needs Linux here: no other system ends a process together with its parent")
    # Looked up now: the function may run between fork and exec, where another thread may hold the loader's locks.
    prctl = ctypes.CDLL(None).prctl

    def set_signal() -> None:
        if prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            raise OSError("PR_SET_PDEATHSIG was refused")
        # A parent that died before the call sends no signal any more.
        if os.getppid() != parent_pid:
            os._exit(1)

    return set_signal


async def wait_for_exit(process: "subprocess.Popen[bytes]") -> int:
    """Wait until the process exits. Return its exit status, or minus the number of the signal that killed it."""
    # A process that was reaped already has no pid any more: the number may belong to another process.
    if process.poll() is not None:
        return process.returncode
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        # Kernels before 5.3 and some sandboxes have no pidfd_open.
        while process.poll() is None:
            await asyncio.sleep(0.1)
        return process.wait()
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()
