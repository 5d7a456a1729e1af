"""The arguments of `oncegate keys` and of `oncegate audit show`: what names a record."""

import argparse
from typing import Any

from oncegate.commands.described_request import add_header_arguments, add_request_arguments
from oncegate.store.record import ViewState

STATES = (*[state.value for state in ViewState], "any")
# Of `watch`: how often it asks the store.
LEAST_INTERVAL_S, INTERVAL_S, LONGEST_S = 0.2, 1.0, 3600.0


def add_keys(commands: Any) -> None:
    """Add the command `keys`."""
    keys = commands.add_parser("keys", help="find, list and watch keys, decide unknown outcomes, purge tenants")
    keys_commands = keys.add_subparsers(dest="keys_command", required=True, metavar="COMMAND")
    listing = keys_commands.add_parser(
        "list",
        help="list keys, without changing or blocking anything",
        description="List keys. Unknown ones come by their age, the oldest first, those in flight in the order in "
        "which their leases end, and all others in no order.",
    )
    listing.add_argument("--state", choices=STATES, default="unknown", help="the state to list (%(default)s)")
    listing.add_argument("--limit", type=int, default=0, metavar="N", help="stop after N keys")
    listing.add_argument("--note", metavar="NOTE", help="only keys with this note, which their rule keeps with them")
    listing.add_argument("--rule", metavar="RULE", help="only keys of this rule")
    show = keys_commands.add_parser("show", help="show what the store knows about one key")
    resolve = keys_commands.add_parser("resolve", help="store your response for an unknown key: retries replay it")
    resolve.add_argument("--status", type=int, required=True, metavar="CODE", help="the status of your response")
    resolve.add_argument("--body-file", metavar="FILE", help="its body (empty by default)")
    resolve.add_argument(
        "-H", "--header", action="append", default=[], metavar="'Name: value'", help="a header field of it"
    )
    release = keys_commands.add_parser("release", help="free a key: the next request with it executes, maybe again")
    cancel = keys_commands.add_parser(
        "cancel", help="end a request in flight: its key is unknown, and no retry executes"
    )
    probe = keys_commands.add_parser("probe", help="ask the API about an unknown key now, as its rule says")
    probe.add_argument(
        "--dry-run", action="store_true", help="show what is asked and what the answer means; change nothing"
    )
    watch = keys_commands.add_parser("watch", help="print what changes of one key, or of all open keys, until Ctrl-C")
    _add_watch(watch)
    purge = keys_commands.add_parser("purge", help="drop the responses of one tenant: retries get 410 instead")
    for command in (show, resolve, release, cancel, probe, watch):
        add_record_arguments(command, "--request-body" if command is resolve else "--body-file")
    tenant = purge.add_mutually_exclusive_group(required=True)
    tenant.add_argument("--tenant", dest="scope", metavar="DIGEST", help="its scope, as `list` and `show` print it")
    _add_credential(tenant, "its header fields, one `Name: value` per line, from standard input")
    purge.set_defaults(namespace="", headers_file=None)
    quarantine = keys_commands.add_parser(
        "quarantine", help="refuse first-time keys for a while, as after a loss that no proxy could notice"
    )
    unpack = keys_commands.add_parser(
        "unpack", help="write packed records as older versions read them, before the way back to one"
    )
    for command in (resolve, release, purge, quarantine):
        command.add_argument("--yes", action="store_true", help="do not ask before a risky decision")
    for command in (listing, show, probe, watch, resolve, release, cancel, purge, quarantine, unpack):
        command.add_argument("--json", action="store_true", help="print one JSON object per line")


def _add_watch(watch: argparse.ArgumentParser) -> None:
    watch.add_argument(
        "--interval", type=_interval, default=INTERVAL_S, metavar="S", help="how often to ask the store (%(default)s)"
    )
    watch.add_argument("--for", dest="lasts_s", type=_interval, metavar="S", help="end after so many seconds")


def _interval(text: str) -> float:
    seconds = float(text)
    if not LEAST_INTERVAL_S <= seconds <= LONGEST_S:
        raise argparse.ArgumentTypeError(f"must be {LEAST_INTERVAL_S:g} to {LONGEST_S:g} seconds")
    return seconds


def add_record_arguments(command: argparse.ArgumentParser, body_option: str = "--body-file") -> None:
    """Add the arguments that name one record. `body_option`: that of the body of a request whose key is meant."""
    command.add_argument(
        "key",
        nargs="*",
        metavar="KEY",
        help="the key, as the client sent it; with --rule, the values that it is made of",
    )
    command.add_argument(
        "--id",
        metavar="ID",
        help="the record's id instead of a key, as `list` and the logs show it (its first 8 characters are enough)",
    )
    command.add_argument("--note", metavar="NOTE", help="the note that its rule keeps with it, such as an order number")
    command.add_argument("--rule", metavar="RULE", help="the rule whose sources the KEYs are values of, in its order")
    command.add_argument("--path", metavar="PATH", help="the path of the request, where a rule with several reads it")
    add_request_arguments(command, body_option)
    command.add_argument("--namespace", help="the namespace of the key, if a rule sets another than the settings")
    scope = command.add_mutually_exclusive_group()
    scope.add_argument("--scope", metavar="DIGEST", help="the scope of the key, as `list` and `show` print it")
    _add_credential(scope, "whose key it is: the same as --headers-file -")
    add_header_arguments(
        scope, "the header fields that say whose key it is, one `Name: value` per line; - is standard input"
    )


def _add_credential(group: Any, text: str) -> None:
    group.add_argument("--credential", action="store_true", help=text)
