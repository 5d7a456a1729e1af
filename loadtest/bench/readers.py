"""What reads streams and large responses in a process of its own, and how much memory a contender takes meanwhile."""

import json
import subprocess
import threading
from typing import Any

from loadtest.bench.contenders import Running, Site
from loadtest.bench.machine import PYTHON, ROOT, pinned

SAMPLE_S = 0.02


def read(site: Site, *words: object, module: str = "streams") -> dict[str, Any]:
    """Run this module of the bench with these words on the core of the load; return what it found."""
    command = [PYTHON, "-m", f"loadtest.bench.{module}", *map(str, words)]
    said = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=pinned(site.cores.other),
        timeout=120,
        check=True,
    ).stdout
    return json.loads(said.splitlines()[-1])  # type: ignore[no-any-return]


class Peak:
    """The largest resident memory of a contender inside this context, above its level before."""

    def __init__(self, running: Running) -> None:
        self._process, self._over = running.process, threading.Event()
        self.idle = self.most = running.process.rss_bytes()

    def __enter__(self) -> "Peak":
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.most = max(self.most, self._process.rss_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def above(self) -> int:
        return self.most - self.idle
