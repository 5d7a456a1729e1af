"""A real Prometheus: the alerts under planted faults, and the dashboard's expressions on what it scraped of a proxy."""

import asyncio
import json
import math
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.grafana.dashboard import expressions
from loadtest.ports import free_port
from tests.parts import OK, answering, ask, request, until
from tests.real.parts import INSTALLED, NODE_MODULES

pytestmark = INSTALLED
CONFIG = Path(__file__).parent.parent.parent / "config"
RULES = """
[[upstream]]
name = "api"
url = "{url}"

[[rule]]
name = "charges"
path = "/charges"
upstream = "api"
"""
PROMETHEUS = """
global: {{ scrape_interval: 1s, evaluation_interval: 1s }}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: oncegate
    static_configs: [{{ targets: ["127.0.0.1:{port}"] }}]
"""
# What Grafana puts in their place.
VARIABLES = {"$__rate_interval": "30s", "$__range": "60s", "$job": "oncegate"}


class Prometheus:
    """A running Prometheus, asked over its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and the value of each series that an expression has now."""
        found = self.get("/api/v1/query", query=expression)
        assert found["resultType"] == "vector", expression
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]


@contextmanager
def prometheus(admin_port: int, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes a proxy every second, with the shipped rules."""
    config, port = folder / "prometheus.yml", free_port()
    config.write_text(PROMETHEUS.format(rules=CONFIG / "alerts.yml", port=admin_port))
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", ["check rules alerts.yml", "test rules alerts_test.yml"])
def test_promtool(command: str) -> None:
    """The rules are valid, each planted fault lets its alert fire, and each planted quiet leaves it quiet."""
    done = subprocess.run(["promtool", *command.split()], cwd=CONFIG, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_3_takes_each_expression(tmp_path: Path) -> None:
    """By the grammar of the release that docker-compose.yml runs. Debian's is of version 2."""
    rules = [
        rule["expr"]
        for group in yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    wrong = ["sum by (job (up)", "increase(up[)"]
    version = json.loads((NODE_MODULES / "@prometheus-io/lezer-promql/package.json").read_text())["version"]
    assert (
        f"prom/prometheus:v3.{int(version.split('.')[1]) - 300}.0" in (CONFIG.parent / "docker-compose.yml").read_text()
    )
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    script = tmp_path / "promql.cjs"
    script.write_bytes((Path(__file__).parent / "node/promql.cjs").read_bytes())
    text = json.dumps([*rules, *map(filled, expressions()), *wrong])
    done = subprocess.run(["node", script], input=text, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wrong


async def test_the_dashboard_and_the_alerts_on_real_traffic(proxies, upstream, own_valkey, tmp_path: Path) -> None:
    """Each expression has a series with a number, no alert is active in peace, and one is when the store is gone."""
    (tmp_path / "rules.toml").write_text(RULES.format(url=upstream.url))
    upstream.script = answering(OK)
    gate = proxies(upstream, own_valkey.url, RULES_FILE="rules.toml")
    number = 0

    async def traffic() -> None:
        nonlocal number
        for _ in range(5):
            number += 1
            for raw in (request(key=f"key-{number}"), request("GET", "/", None, b"")):
                assert (await ask(gate.port, raw)).status == 200
                assert (await ask(gate.port, raw)).status == 200

    with prometheus(gate.admin_port, tmp_path) as asked:
        await until(lambda: _is_ready(asked), 30)
        for _ in range(12):
            await traffic()
            await asyncio.sleep(0.5)
        missing = [one for one in expressions() if not has_number(await asyncio.to_thread(asked.ask, filled(one)))]
        assert missing == [], "these expressions of the dashboard have no series with a number"
        rules = [rule for group in asked.get("/api/v1/rules")["groups"] for rule in group["rules"]]
        assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
        assert asked.ask("ALERTS") == []
        own_valkey.kill()
        for key in range(5):
            assert (await ask(gate.port, request(key=f"lost-{key}"))).status == 503
        await until(lambda: "OncegateStoreUnavailable" in active(asked), 20)


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def has_number(series: list[tuple[dict[str, str], float]]) -> bool:
    return any(not math.isnan(value) for _, value in series)


def active(asked: Prometheus) -> set[str]:
    """Return the alerts that fire, or will if it goes on."""
    return {labels["alertname"] for labels, _ in asked.ask("ALERTS")}


def _is_ready(asked: Prometheus) -> bool:
    try:
        return bool(asked.ask("oncegate_ready == 1"))
    except OSError:
        return False
