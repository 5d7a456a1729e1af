"""The image, the compose file and their configuration: what they name exists, parses and starts."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from packaging.utils import canonicalize_name

from oncegate.server.embedded import find_server
from oncegate.settings.settings import Settings
from tests.parts import parsed

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service.get("build")]


def instructions(name: str) -> list[str]:
    """The arguments of each such instruction in the Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    text = re.sub(r"\s*\\\n\s*", " ", text)
    return re.findall(rf"^{name} (.+)$", text, re.MULTILINE)


def image_environment() -> dict[str, str]:
    final = shlex.split(instructions("ENV")[-1])
    return {name: value for name, value in (pair.split("=", 1) for pair in final) if name.startswith("ONCEGATE_")}


def oncegate_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours that the Dockerfile, the compose file and the Makefile name."""
    yield "Dockerfile CMD", json.loads(instructions("CMD")[-1])
    health = instructions("HEALTHCHECK")[-1].split("CMD ", 1)[1]
    yield "Dockerfile HEALTHCHECK", json.loads(health)[1:]
    for name in OURS:
        if command := SERVICES[name].get("command"):
            yield f"{name} command", command
        match SERVICES[name].get("healthcheck", {}).get("test", []):
            case ["CMD", "oncegate", *arguments]:
                yield f"{name} healthcheck", arguments
    for arguments in re.findall(r"\(BIN\)/oncegate (.+)", (ROOT / "Makefile").read_text()):
        yield f"make: {arguments}", shlex.split(re.sub(r"\$\(if .*\)", "", arguments))


def mounted_files() -> list[str]:
    volumes = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", [])]
    return [source for source, *_ in volumes if source.startswith(".")]


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


# The Dockerfile ...


def test_dockerfile_lint() -> None:
    """The Dockerfile passes hadolint without an exception."""
    lint = subprocess.run([SCRIPTS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_copied_paths() -> None:
    """Every path that the Dockerfile copies exists and is let through by .dockerignore."""
    let_through = (ROOT / ".dockerignore").read_text().splitlines()
    for copied in instructions("COPY"):
        if copied.startswith("--from="):
            continue
        for path in copied.split()[:-1]:
            assert (ROOT / path).exists(), path
            assert f"!{path}" in let_through


def test_user_is_a_number() -> None:
    """The image runs as a user that is not root, named by number."""
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions("USER")[-1])


def test_imports_are_installed() -> None:
    """Whatever proxy/ imports comes with Python or is installed in the image."""
    installed = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements-image.lock").read_text(), re.MULTILINE)
    distributions = packages_distributions()
    for module in (ROOT / "proxy").rglob("*.py"):
        for name in imported(parsed(module)) - sys.stdlib_module_names - {"oncegate"}:
            assert any(canonicalize_name(each) in installed for each in distributions[name]), f"{module}: {name}"


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name.split(".")[0] for alias in aliases}
            case ast.ImportFrom(module=str(name), level=0):
                names.add(name.split(".")[0])
    return names


# Commands and settings ...


@pytest.mark.parametrize(("where", "arguments"), list(oncegate_commands()))
def test_commands_parse(where: str, arguments: list[str]) -> None:
    """Every command of ours in the Dockerfile, the compose file and the Makefile is one that exists."""
    from oncegate.commands.cli import parser

    parser().parse_args(arguments)


@pytest.mark.parametrize(
    ("name", "command"), [("proxy", "check"), ("proxy-postgres", "check"), ("migrate", "migrate --sql")]
)
def test_settings_hold(name: str, command: str) -> None:
    """The image and the compose file set what holds. `migrate` needs no upstream, and no folder to write to."""
    settings = image_environment() | SERVICES[name]["environment"]
    if "tmpfs" not in SERVICES[name]:
        settings["ONCEGATE_SPOOL_DIR"] = "/proc"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
    check = subprocess.run(
        [sys.executable, "-m", "oncegate", *command.split()],
        cwd=ROOT,
        env=outside | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


# docker-compose.yml ...


def test_compose_schema() -> None:
    """docker-compose.yml is valid by the schema of the Compose specification."""
    check = [
        SCRIPTS / "check-jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        ROOT / "docker-compose.yml",
    ]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_dependencies() -> None:
    """Whoever waits for a service to be healthy waits for one that has a health check."""
    waits = [(name, each) for name, service in SERVICES.items() for each in service.get("depends_on", {}).items()]
    assert waits
    for name, (other, wait) in waits:
        assert other in SERVICES, f"{name} waits for {other}"
        assert wait["condition"] != "service_healthy" or "healthcheck" in SERVICES[other], other


def test_compose_files() -> None:
    """Every file that a service mounts exists."""
    assert [path for path in mounted_files() if not (ROOT / path).is_file()] == []


def test_compose_roles() -> None:
    """The proxies' role is the one that is made, and `migrate` alone connects as another."""
    (role,) = re.findall(r"CREATE ROLE (\w+) LOGIN PASSWORD '(\w+)'", (ROOT / "config/postgres-roles.sql").read_text())
    proxies = SERVICES["proxy-postgres"]["environment"]
    assert proxies["ONCEGATE_STORE_URL"].startswith(f"postgresql://{role[0]}:{role[1]}@postgres/")
    owner = SERVICES["postgres"]["environment"]
    migrate = SERVICES["migrate"]["environment"]
    owner_url = f"postgresql://{owner['POSTGRES_USER']}:{owner['POSTGRES_PASSWORD']}@postgres/{owner['POSTGRES_DB']}"
    assert migrate == {"ONCEGATE_MIGRATE_URL": owner_url, "ONCEGATE_STORE_URL": proxies["ONCEGATE_STORE_URL"]}


def test_compose_outlasts_the_drain() -> None:
    """The proxy is given more time to stop than its drain takes."""
    environment = SERVICES["proxy"]["environment"]
    drain = sum(
        float(environment.get(f"ONCEGATE_{name.upper()}", Settings.model_fields[name].default))
        for name in ("drain_delay_s", "drain_s")
    )
    assert seconds(SERVICES["proxy"]["stop_grace_period"]) > drain


def test_spool_fits() -> None:
    """The spool's limit is below the size of the tmpfs it lies on."""
    (tmpfs,) = SERVICES["proxy"]["tmpfs"]
    folder, size = re.fullmatch(r"(.+):size=(\d+)m", tmpfs).groups()
    assert folder == image_environment()["ONCEGATE_SPOOL_DIR"]
    assert int(SERVICES["proxy"]["environment"]["ONCEGATE_MAX_SPOOL_BYTES"]) < int(size) << 20


@pytest.mark.parametrize("name", OURS)
def test_read_only_and_without_privileges(name: str) -> None:
    """Our containers have a read-only root, no capabilities and no way to more of them."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]


# The store and Prometheus ...


def test_redis_conf_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store started with config/redis.conf evicts nothing and keeps an append-only file."""
    monkeypatch.chdir(tmp_path)  # a relative socket path never gets too long for a socket
    command = [find_server(), ROOT / "config" / "redis.conf", "--port", "0", "--unixsocket", "store.sock"]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as server,
        redis.Redis(unix_socket_path="store.sock", decode_responses=True) as store,
    ):
        try:
            wait_for(tmp_path / "store.sock")
            assert store.config_get("maxmemory-policy", "maxmemory", "appendonly", "appendfsync", "save") == {
                "maxmemory-policy": "noeviction",
                "maxmemory": str(256 << 20),
                "appendonly": "yes",
                "appendfsync": "everysec",
                "save": "",
            }
            assert store.info("persistence")["aof_enabled"] == 1
        finally:
            server.terminate()
    assert server.returncode == 0
    assert list(tmp_path.glob("appendonlydir/*.aof"))


def wait_for(path: Path, patience_s: float = 10) -> None:
    deadline = time.monotonic() + patience_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_prometheus_scrapes_the_admin_listener() -> None:
    """Prometheus asks the proxy's admin port, and loads the alerts from where they are mounted."""
    prometheus = yaml.safe_load((ROOT / "config/prometheus.yml").read_text())
    ((job,), rules) = prometheus["scrape_configs"], prometheus["rule_files"]
    admin_port = image_environment()["ONCEGATE_ADMIN_LISTEN"].rpartition(":")[2]
    assert job["static_configs"] == [{"targets": [f"proxy:{admin_port}"]}]
    mounted = {Path(volume.split(":")[1]) for volume in SERVICES["prometheus"]["volumes"]}
    assert mounted == {Path("/etc/prometheus", name) for name in ["prometheus.yml", *rules]}


def test_grafana_is_provisioned() -> None:
    """Grafana asks the Prometheus of the compose file, and finds the dashboard where it is mounted."""
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    folder = "/etc/grafana/provisioning"
    for source, target in mounts.items():
        if target.startswith(folder):
            assert source == f"./config/grafana/provisioning{target.removeprefix(folder)}"
    source, providers = (
        yaml.safe_load((ROOT / f"config/grafana/provisioning/{name}").read_text())
        for name in ("datasources/prometheus.yml", "dashboards/oncegate.yml")
    )
    url = source["datasources"][0]["url"]
    assert (url, SERVICES["prometheus"]["ports"][0].rpartition(":")[2]) == ("http://prometheus:9090", "9090")
    path = providers["providers"][0]["options"]["path"]
    assert mounts["./config/grafana/oncegate.json"] == f"{path}/oncegate.json"
    interval = yaml.safe_load((ROOT / "config/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["datasources"][0]["jsonData"]["timeInterval"] == interval
