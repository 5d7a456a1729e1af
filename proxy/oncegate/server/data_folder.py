"""The data folder of an embedded store: whether it is one, and which server programs can read what is in it."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

# The lock that an embedded store takes before it writes anything else, and the program that wrote last.
LOCK, WRITER = "lock", "written-by"
# What servers of other programs leave in their folders. An embedded store would load it, or overwrite it.
FOREIGN = ("*.rdb", "*.aof", "appendonlydir", "nodes.conf")
# The last Redis whose files Valkey reads. From here on both have formats of their own.
LAST_COMMON = (7, 2)


class Program(NamedTuple):
    """A server program. `name`: `valkey` or `redis`."""

    name: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))}"


def parse_program(text: str) -> Program | None:
    """Return the program of `Redis server v=7.0.15 sha=...` or of `redis 7.0.15`; None for any other text."""
    match = re.match(r"(valkey|redis) (?:server v=)?(\d+(?:\.\d+)*)", text, re.IGNORECASE)
    return Program(match[1].lower(), tuple(map(int, match[2].split(".")))) if match else None


def program_at(path: str | Path) -> Program | None:
    """Return which program a file is, as it says itself. Raises OSError where it cannot be run."""
    try:
        # The proxy's environment has secrets in it.
        done = subprocess.run([path, "--version"], capture_output=True, timeout=5, check=False, env={})
    except subprocess.SubprocessError:
        return None
    return parse_program(done.stdout.decode("ascii", "replace"))


def can_read(program: Program, writer: Program) -> bool:
    """Return whether a program reads what another one wrote: a later version does, and Valkey reads old Redis files."""
    if program.name == writer.name:
        return program.version[:2] >= writer.version[:2]
    return program.name == "valkey" and writer.version[:2] <= LAST_COMMON


def foreign_data(folder: Path) -> str:
    """Return why a folder that no embedded store has used yet cannot be its own; empty if it can."""
    if (folder / LOCK).exists():
        return ""
    names = sorted(path.name for pattern in FOREIGN for path in folder.glob(pattern))
    advice = "name a folder that belongs to oncegate alone in ONCEGATE_DATA_DIR"
    return f"the data folder {folder} has data of another program ({', '.join(names)}): {advice}" if names else ""


def unreadable_data(folder: Path, program: Program) -> str:
    """Return why a program must not open the data in a folder; empty if it may."""
    writer = writer_of(folder)
    if writer is None or can_read(program, writer):
        return ""
    advice = f"start it with {writer} or later, or name another folder in ONCEGATE_DATA_DIR"
    return f"the data in {folder} were written by {writer}, which {program} cannot be trusted to read: {advice}"


def writer_of(folder: Path) -> Program | None:
    """Return the program that wrote the data; None in a new folder, and in one of oncegate 0.1."""
    try:
        return parse_program((folder / WRITER).read_text(errors="replace"))
    except FileNotFoundError:
        return None


def note_writer(folder: Path, program: Program) -> None:
    """Note that a program writes the data from now on."""
    if writer_of(folder) != program:
        new = folder / f"{WRITER}.new"
        new.touch(mode=0o600)
        new.write_text(f"{program}\n")
        new.replace(folder / WRITER)
