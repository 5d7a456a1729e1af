"""`oncegate init`: writes a rules file and an environment file into the current folder, to start from."""

import sys
from importlib.resources import files
from pathlib import Path

CASES = ("payments", "payments-postgres", "webhooks", "consumers", "llm", "agents", "double-click")
GENERAL = "general"
FILES = ("rules.toml", "oncegate.env")

# Also in docs/start.md and in the general example.
WHICH = """\
Choose on_duplicate = "wait" where an SDK, an agent, a form or a webhook sender calls: most of them give up within 3 s
on a 409, and a duplicate that waits gets the response. Choose "reject", the default (409 at once), where you write the
clients yourself and they obey Retry-After: then no duplicate holds a connection.
"""
NEXT = """\
Wrote {names} ({case}). Set ONCEGATE_UPSTREAM in oncegate.env to your API and the paths in rules.toml to its own,
then run:

  set -a; . ./oncegate.env; set +a
  oncegate check && oncegate serve

While the first request with a key is running: {waits}
"""
# What an example does with a duplicate.
WAITS, REJECTS = "its duplicates wait for the response.", "its duplicates get 409 at once."


def example(case: str, name: str) -> bytes:
    """Return one file of an example that is part of the package, such as ("payments", "rules.toml")."""
    return files("oncegate").joinpath("examples", case, name).read_bytes()


def run(case: str, folder: Path) -> int:
    """Write both files of a case into `folder` and print the next command. Return 2 and write nothing on any error."""
    try:
        _write_all({folder / name: example(case, name) for name in FILES})
    except FileExistsError as error:
        print(f"{error.filename} exists already; oncegate init overwrites nothing and wrote nothing", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    waits = REJECTS if case == GENERAL else WAITS
    print(NEXT.format(names=" and ".join(FILES), case=case, waits=waits) + WHICH, end="")
    return 0


def _write_all(contents: dict[Path, bytes]) -> None:
    """Write new files, all or none."""
    written: list[Path] = []
    try:
        for path, content in contents.items():
            # "x" fails if the path exists, also as a dangling link, so that no check can go stale before the write.
            with path.open("xb") as file:
                written.append(path)
                file.write(content)
    except OSError:
        # One file without the other would look like a complete example.
        for path in written:
            path.unlink()
        raise
