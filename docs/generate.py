"""Writes the generated parts of the pages and the copies of the examples in config/: `make docs`.

A page marks such a part with two lines. What is between them is written anew:

    <!-- generated: by make docs from SOURCE -->
    <!-- end -->

SOURCE is a key of `SOURCES`, or a file of an example, such as oncegate/examples/payments/rules.toml.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.core import Metric

from oncegate.commands import init
from oncegate.commands.cli import parser
from oncegate.messages.problems import PROBLEM_KINDS
from oncegate.observe.families import SEPARATOR
from oncegate.observe.gauges import GAUGE_LABELS, GAUGES
from oncegate.observe.labels import UPSTREAM_STATES
from oncegate.observe.metrics import Metrics
from oncegate.rules.presets import FAMILIES, PRESETS, Preset
from oncegate.settings import loading
from oncegate.settings.credentials import ACCOUNTS, CREDENTIALS
from oncegate.settings.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "docs/**/*.md", "config/**/*.md")
BLOCK = re.compile(r"(<!-- generated: by make docs from (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
EXAMPLE = re.compile(r"oncegate/examples/([\w-]+)/([\w.]+)")
LANGUAGES = {".toml": "toml", ".env": "ini"}


# The settings by what an operator wants to do, in the order of the page.
GROUPS = {
    "Where to listen and where to forward": """upstream listen tls_cert_file tls_key_file admin_listen hosts
        trusted_proxies pass_host upstream_ca_file upstream_cert_file upstream_key_file rules_file pages_dir
        docs_url""",
    "Who may see the admin pages": """admin_tokens_file admin_session_s admin_local_view admin_hosts admin_user_header
        admin_user_proxies admin_users admin_tls_cert_file admin_tls_key_file admin_tls_ca_file""",
    "The store": """store_url store_password store_ca_file store_cert_file store_key_file data_dir
        embedded_max_bytes store_schema store_timeout_ms settle_timeout_s durability promotion audit
        audit_retention_s migrate_url store_max_bytes on_store_down on_store_loss quarantine_s record_layout""",
    "What names a key": """methods key_header key_required scope_headers stable_schemes namespace secret
        identity_change""",
    "What happens to a key": """retention_s tombstone_s lease_ms on_duplicate wait_max_s on_unknown release_statuses
        unknown_retention_s max_stored_bytes ask_keys""",
    "The upstream": """connect_timeout_s connect_retries dns_ttl_s upstream_timeout_s pass_interim
        upstream_reuse_idle_s
        upstream_rest_s max_upstream_connections upstream_spare_connections""",
    "Streams": "own_path public_base",
    "Browsers": "cors_origins cors_credentials cors_by rewrite_location rewrite_cookie_path cookie_domain",
    "Limits of a worker": """max_in_flight max_connections max_waiters max_followers max_request_bytes
        max_buffered_bytes spool_dir max_spool_bytes max_head_bytes max_head_line_bytes max_head_fields client_stall_s
        client_min_bytes_per_s""",
    "Processes": "workers run_dir drain_delay_s drain_s",
    "Logs": "log_level log_format access_log access_log_path request_id_header",
    "Tracing": "trace_rate_per_s trace_ratio",
    "For tests of oncegate": "head_cache testing fault",
}


def settings() -> str:
    """Return a table of settings for each group; those that no group names come last."""
    fields = Settings.model_fields
    groups = {title: [name for name in names.split() if name in fields] for title, names in GROUPS.items()}
    groups["Others"] = [name for name in fields if not any(name in names for names in groups.values())]
    return "".join(f"\n### {title}\n\n{loading.table(names)}" for title, names in groups.items() if names) + "\n"


def problems() -> str:
    """Return the table of oncegate's own answers that have a type."""
    words = {True: "yes", False: "no", None: ""}
    rows = [
        f"| `{slug}` | {kind.status} | {kind.title} | {words[kind.retryable]} | {words[kind.reuse_key]} |"
        for slug, kind in PROBLEM_KINDS.items()
    ]
    return _table("| type | status | title | retry? | with the same key? |", rows)


def credentials() -> str:
    """Return the table of the header fields that are known to identify a tenant."""
    rows = [
        f"| `{name}` | {kind} | {sender} |"
        for kind, names in (("credential", CREDENTIALS), ("account", ACCOUNTS))
        for name, sender in names.items()
    ]
    return _table("| header | kind | used by |", rows)


# The labels whose values an operator names. A scrape has OTHER for those past the 50th.
OPEN_LABELS = ("rule", "upstream")


def empty_metrics() -> Metrics:
    """Return all metrics, each with all values of its labels, and with one rule and its upstream."""
    plain = {name: lambda: 0.0 for name in GAUGES.keys() - GAUGE_LABELS.keys()}
    states = {SEPARATOR.join(("upstream_pool", "api", state)): 0.0 for state in UPSTREAM_STATES}
    states[SEPARATOR.join(("probe_breakers_open", "api"))] = 0.0
    empty = Metrics("0", {name: plain[name] for name in GAUGES if name in plain}, lambda: states)
    empty.follow([("charges", "api")])
    empty.upstream_connections.of("api")
    empty.reconciling.follow("charges")
    return empty


def metrics() -> str:
    """Return the table of the metrics, with their labels and the labels' values."""
    empty = empty_metrics()
    rows = [f"| `{_full_name(one)}` | {one.type} | {_labels(one)} | {one.documentation} |" for one in empty.collect()]
    return _table("| metric | type | labels | meaning |", rows)


def _full_name(family: Metric) -> str:
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def _labels(family: Metric) -> str:
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label not in ("le", "version"):
                values.setdefault(label, []).append("its name" if label in OPEN_LABELS else f"`{value}`")
    return "; ".join(f"`{label}`: {', '.join(dict.fromkeys(each))}" for label, each in values.items())


def command_line() -> str:
    """Return the help of every command, each under a heading of its own."""
    pages = [f"### `{one.prog}`\n\n```text\n{_help(one)}```\n" for one in _commands(parser())]
    return "\n" + "\n".join(pages) + "\n"


def _commands(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _commands(one)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Writes the same text on every version of Python and in every terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"


def _help(one: argparse.ArgumentParser) -> str:
    one.formatter_class = _Formatter
    return one.format_help()


# Presets ...


def preset_sections() -> str:
    """Return the reference of all presets, as Markdown: one section for each family, one for each other preset."""
    families = {family: {name: one for name, one in PRESETS.items() if one.family == family} for family in FAMILIES}
    alone = {name: one for name, one in PRESETS.items() if not one.family}
    sections = [*map(_section, alone, alone.values()), *map(_family_section, families, families.values())]
    return "\n" + "\n".join(sections)


def _section(name: str, preset: Preset) -> str:
    lines = [f"{field} = {_toml(value)}" for field, value in preset.fields.items()]
    return "\n".join([f"### {name}", "", preset.about, "", "```toml", *lines, "```", "", preset.caution, ""])


def _family_section(family: str, presets: Mapping[str, Preset]) -> str:
    """Return one section for presets that have most fields in common, with a table of their differences."""
    first = next(iter(presets.values()))
    common = [
        name for name, value in first.fields.items() if all(one.fields[name] == value for one in presets.values())
    ]
    differing = [name for name in first.fields if name not in common]
    texts = {one.about for one in presets.values()}
    fields = [f"{name} = {_toml(first.fields[name])}" for name in common]
    header = ["preset", *(f"`{name}`" for name in differing), *(["for"] if len(texts) > 1 else [])]
    rows = [
        [f'<a id="{name}"></a>`{name}`', *(f"`{_toml(one.fields[field])}`" for field in differing), one.about]
        for name, one in presets.items()
    ]
    table = [f"| {' | '.join(row[: len(header)])} |" for row in (header, ["---"] * len(header), *rows)]
    about = [first.about, ""] if len(texts) == 1 else []
    same = ["These fields are the same in all of them:", "", "```toml", *fields, "```", ""]
    return "\n".join(
        [f"### {FAMILIES[family]}", "", *about, *same, "They differ in these:", "", *table, "", first.caution, ""]
    )


def _toml(value: Any) -> str:
    """Return a value as TOML has it. JSON writes strings, numbers and lists in the same way."""
    return json.dumps(value)


def _table(header: str, rows: list[str]) -> str:
    return "\n".join([header, re.sub(r"[^|]+", "---", header), *rows, ""])


# Monitoring ...


def alerts() -> str:
    """Return the table of the alerts, with what each says."""
    rules = [rule for group in _yaml("config/alerts.yml")["groups"] for rule in group["rules"] if "alert" in rule]
    rows = [
        f"| `{rule['alert']}` | {rule['labels']['severity']} | {rule['annotations']['summary']} |" for rule in rules
    ]
    return _table("| alert | severity | says |", rows)


def alert_tests() -> str:
    """Return the table of the tests of the alerts: what is planted, and which alerts it lets fire."""
    rows = []
    for test in _yaml("config/alerts_test.yml")["tests"]:
        subject, _, planted = test["name"].partition(": ")
        fired = re.findall(r'alertname="(\w+)"', str(test["promql_expr_test"][0]["exp_samples"]))
        rows.append(f"| {subject} | {planted} | {', '.join(f'`{one}`' for one in fired) or 'none'} |")
    return _table("| test | what is planted | alerts that fire |", rows)


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


SOURCES: dict[str, Callable[[], str]] = {
    "oncegate.settings.loading": settings,
    "oncegate.rules.presets": preset_sections,
    "oncegate.settings.credentials": credentials,
    "oncegate.messages.problems": problems,
    "oncegate.observe.metrics": metrics,
    "oncegate.commands.cli": command_line,
    "config/alerts.yml": alerts,
    "config/alerts_test.yml": alert_tests,
}


def content(source: str) -> str:
    """Return what belongs between the markers; KeyError for a source that does not exist."""
    if example := EXAMPLE.fullmatch(source):
        text = init.example(*example.groups()).decode()
        return f"```{LANGUAGES[Path(source).suffix]}\n{text}```\n"
    return SOURCES[source]()


def pages() -> list[Path]:
    """Return every page that may have generated parts."""
    return sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})


def filled(text: str) -> str:
    """Return the text of a page with its generated parts as they should be."""
    return BLOCK.sub(lambda match: match[1] + content(match[2]) + match[4], text)


def copies() -> dict[Path, bytes]:
    """Return what the files of the examples in config/ should hold."""
    return {ROOT / "config" / case / name: init.example(case, name) for case in init.CASES for name in init.FILES}


def main() -> None:
    """Write all of it, and say which files changed."""
    wanted = {page: filled(page.read_text()).encode() for page in pages()} | copies()
    for path, data in wanted.items():
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
