"""The command `oncegate`, also as `python -m oncegate`."""

import sys

from oncegate.server import early_signals


def main() -> int:
    """Run the command that the arguments name; return its exit code."""
    if sys.argv[1:2] == ["serve"]:
        early_signals.catch_signals()
    # The import takes a third of a second, in which a signal may come.
    from oncegate.commands import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
