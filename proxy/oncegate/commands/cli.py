"""The commands: serve, check, demo, healthcheck, keys."""

import argparse
import os
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oncegate import __version__
from oncegate.commands import explain
from oncegate.rules.loading import load as load_rules
from oncegate.rules.model import Rules
from oncegate.settings.loading import describe, load
from oncegate.settings.settings import Settings, SettingsError

PROBE_S = 3.0
STATES = ("unknown", "in_flight", "complete", "released", "corrupt", "any")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="oncegate", description="Makes unsafe HTTP requests safe to retry.")
    top.add_argument("--version", action="version", version=f"oncegate {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the proxy (settings: environment variables ONCEGATE_*)")
    check = commands.add_parser("check", help="validate the configuration and print what is in effect")
    check.add_argument("--explain", nargs=2, metavar=("METHOD", "URL"), help="say what becomes of one request instead")
    check.add_argument("-H", "--header", action="append", default=[], metavar="LINE", help="a header of that request")
    check.add_argument("--body-file", type=Path, metavar="FILE", help="its body")
    demo = commands.add_parser("demo", help="run the main job against a built-in upstream and show it")
    demo.add_argument("--upstream-only", action="store_true", help="only serve the demo upstream, until stopped")
    demo.add_argument("--listen", default="127.0.0.1:9000", metavar="HOST:PORT", help="of the demo upstream")
    demo.add_argument("--proxy", metavar="URL", help="show it on a running proxy that has the demo upstream")
    health = commands.add_parser("healthcheck", help="ask the running proxy whether it is alive")
    health.add_argument("--ready", action="store_true", help="ask whether it is ready instead")
    _add_keys(commands)
    return top


def _add_keys(commands: Any) -> None:
    """Add `keys` and its commands to the command line."""
    keys = commands.add_parser("keys", help="look at keys in the store, and decide what nobody else can")
    acts = keys.add_subparsers(dest="act", required=True, metavar="COMMAND")
    listing = acts.add_parser("list", help="list keys; changes nothing, and never blocks the store")
    listing.add_argument("--state", choices=STATES, default="unknown")
    listing.add_argument("--limit", type=int, default=0, metavar="N", help="stop after so many")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    show = acts.add_parser("show", help="tell what is known of one key")
    show.add_argument("--json", action="store_true")
    resolve = acts.add_parser("resolve", help="give an unknown key its answer: replays from then on")
    resolve.add_argument("--status", type=int, required=True, metavar="CODE")
    resolve.add_argument("--body-file", metavar="FILE", help="the body; none without it")
    resolve.add_argument("-H", "--header", action="append", default=[], metavar="'Name: value'")
    release = acts.add_parser("release", help="free a key: the next request with it executes, maybe again")
    for one in (show, resolve, release):
        one.add_argument("key", nargs="?", metavar="KEY", help="as the client sent it")
        one.add_argument("--id", metavar="ID", help="instead: as `list` and the log name it (12 characters will do)")
        one.add_argument("--namespace", help="of the key, where it is not the setting's")
        whose = one.add_mutually_exclusive_group()
        whose.add_argument("--scope", metavar="DIGEST", help="whose key: as `list` and `show` print it")
        whose.add_argument(
            "--credential",
            action="store_true",
            help="whose key: read the scope headers from standard input, `Name: value` a line",
        )
    for one in (resolve, release):
        one.add_argument("--yes", action="store_true", help="do not ask, even where the owner may still live")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(argv)
    if options.command == "demo":
        from oncegate.commands import demo

        if options.upstream_only:
            return demo.serve_upstream(options.listen)
        return demo.run(options.proxy)
    try:
        settings = load()
        rules = load_rules(settings)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    if options.command == "check":
        return _check(settings, rules, options)
    if options.command == "healthcheck":
        return _probe(settings, "/readyz" if options.ready else "/healthz")
    if options.command == "keys":
        from oncegate.commands import keys

        try:
            return keys.run(settings, options)
        except BrokenPipeError:  # its reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            return 1
    return _serve(settings)


def _check(settings: Settings, rules: Rules, options: argparse.Namespace) -> int:
    if options.explain is None:
        print(describe(settings))
        if settings.rules_file is not None:
            print(f"\n{explain.table(rules)}")
        return 0
    try:
        body = options.body_file.read_bytes() if options.body_file else b""
        method, url = options.explain
        print(explain.Explanation(settings, rules).explain(method, url, options.header, body))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _serve(settings: Settings) -> int:
    from oncegate.observe import logs
    from oncegate.server.serve import serve

    os.umask(0o077)  # what it writes, spool and embedded store, is nobody else's business
    return serve(settings, logs.configure(settings.log_level, settings.log_format))


def _probe(settings: Settings, path: str) -> int:
    """Ask the admin listener; print what it says; 0 where it says yes."""
    address = settings.admin_listen
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address.host, address.host)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{address.port}{path}", timeout=PROBE_S) as answer:
            print(answer.read().decode())
            return 0
    except urllib.error.HTTPError as error:
        print(error.read().decode(), file=sys.stderr)
    except OSError as error:
        print(f"no answer from {host}:{address.port}: {error}", file=sys.stderr)
    return 1
