"""Completion in the shells themselves: what a person gets who installs the script as the page says, and presses Tab."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.real.parts import INSTALLED

pytestmark = INSTALLED
# What is typed, and the word that it becomes: each is the only one that begins so.
TYPED = [
    ("oncegate health", "healthcheck"),
    ("oncegate keys wat", "watch"),
    ("oncegate keys list --sta", "--state"),
    ("oncegate keys list --state in_", "in_flight"),
    ("oncegate completion fi", "fish"),
]
PATIENCE_S = 30.0
# A key that shows what the line is now.
ZSH = """
fpath=({folder} $fpath)
autoload -Uz compinit
compinit -u -d {folder}/dump
show() {{ print -r -- "<$BUFFER>" }}
zle -N show
bindkey '^T' show
PS1='ready> '
"""


def installed(shell: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as script:
        subprocess.run([sys.executable, "-m", "oncegate", "completion", shell], stdout=script, check=True)


@pytest.mark.parametrize(("typed", "word"), TYPED)
def test_fish(tmp_path: Path, typed: str, word: str) -> None:
    """It finds the script in the folder of its user, and says what may come."""
    installed("fish", tmp_path / "fish/completions/oncegate.fish")
    # It completes commands that are there.
    found = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "PATH": found}
    asked = ["fish", "-c", 'complete -C "$argv[1]"', typed]
    told = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    assert told.stderr == ""
    assert [line.partition("\t")[0] for line in told.stdout.splitlines()] == [word]


def test_zsh(tmp_path: Path) -> None:
    """At a terminal, Tab completes each of them."""
    installed("zsh", tmp_path / "_oncegate")
    (tmp_path / ".zshrc").write_text(ZSH.format(folder=tmp_path))
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe("zsh", ["zsh", "-i"], {"ZDOTDIR": str(tmp_path), "TERM": "dumb", "PATH": os.environ["PATH"]})
    try:
        _read_until(terminal, "ready> ")
        for typed, word in TYPED:
            # The line, Tab, what it is now; then it is cleared.
            os.write(terminal, typed.encode() + b"\t\x14\x15")
            (line,) = _read_until(terminal, r"<([^>]*)>")
            assert line.rstrip() == f"{typed.rpartition(' ')[0]} {word}"
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def _read_until(terminal: int, pattern: str) -> tuple[str, ...]:
    """Read until the pattern comes, and return its groups."""
    shown, ends = "", time.monotonic() + PATIENCE_S
    while (found := re.search(pattern, shown)) is None:
        assert time.monotonic() < ends, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 65536).decode("utf-8", "replace")
    return found.groups()
