"""A name server for tests, in the place of the system's resolver."""

import socket
import threading
import time

from oncegate.hostnames.system import AddressInfo


def info(address: str) -> AddressInfo:
    """What the system says of an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    rest = (0, 0) if ":" in address else ()
    return family, socket.SOCK_STREAM, 6, "", (address, 0, *rest)


class NameServer:
    """Answers for every name with `addresses`, or with `error`, and is silent while `open` is not set."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.error: OSError | None = None
        self.delay_s = 0.0
        self.open = threading.Event()
        self.open.set()
        self.asked: list[str] = []
        # Look-ups under way, and the most at one time.
        self.running = self.most_running = 0

    def __call__(self, host: str) -> list[AddressInfo]:
        self.asked.append(host)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        time.sleep(self.delay_s)
        self.open.wait(30)
        self.running -= 1
        if self.error is not None:
            raise self.error
        return [info(one) for one in self.addresses]
