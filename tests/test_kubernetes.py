"""The manifests in config/kubernetes/: Kubernetes would take each, and what they name exists. No cluster is needed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from oncegate.commands.cli import parser
from oncegate.rules.loading import load_rules
from oncegate.settings.settings import SECRETS, Settings

FOLDER = Path(__file__).parent.parent / "config/kubernetes"
KUSTOMIZATION = FOLDER / "kustomization.yaml"
FILES = sorted(set(FOLDER.glob("*.yaml")) - {KUSTOMIZATION})
SCHEMA = json.loads((Path(__file__).parent / "schemas/service-monitor.json").read_text())
# The oldest one with what the sidecar needs, and the newest one that the validator knows.
VERSIONS = ("1.30", "1.37")

Manifest = dict[str, Any]


def manifests(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


ALL = [manifest for path in FILES for manifest in manifests(path)]
MONITORS = [manifest for manifest in ALL if manifest["kind"] == "ServiceMonitor"]


def pods() -> Iterator[Manifest]:
    """Yield the template of each pod."""
    for manifest in ALL:
        spec = manifest.get("spec", {})
        spec = spec["jobTemplate"]["spec"] if "jobTemplate" in spec else spec
        if "template" in spec:
            yield spec["template"]


PODS = list(pods())


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


OURS = [(pod, one) for pod in PODS for one in containers(pod) if "/oncegate:" in one["image"]]
PROXIES = [(pod, one) for pod, one in OURS if "args" not in one]
each_of_ours = pytest.mark.parametrize(("pod", "container"), OURS)
each_proxy = pytest.mark.parametrize(("pod", "container"), PROXIES)


def environment(container: Manifest) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"]}


# What Kubernetes would say ...


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_each_manifest(version: str, tmp_path: Path) -> None:
    """Also without a warning: the validator warns of a kind that it has no schema for. ServiceMonitor has ours."""
    known = tmp_path / "known.yaml"
    known.write_text(yaml.safe_dump_all([manifest for manifest in ALL if manifest not in MONITORS]))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, str(known)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if line]
    assert (said.returncode, [line for line in lines if not line.startswith("INFO")]) == (0, [])
    assert len(lines) == len(ALL) - len(MONITORS)


def test_the_operator_takes_the_monitor() -> None:
    """So would it not a misspelt field."""
    [monitor] = MONITORS
    jsonschema.validate(monitor, SCHEMA)
    monitor["spec"]["endpoints"][0]["scrapeTimeOut"] = "5s"
    with pytest.raises(jsonschema.ValidationError, match="scrapeTimeOut"):
        jsonschema.validate(monitor, SCHEMA)
    del monitor["spec"]["endpoints"][0]["scrapeTimeOut"]


def test_the_kustomization_is_one_list() -> None:
    """It names each file once: those that are applied, and in comments those that a choice adds."""
    text = KUSTOMIZATION.read_text()
    kustomization = yaml.safe_load(text)
    assert kustomization.keys() == {"apiVersion", "kind", "resources"}
    named = [line.split("- ")[1] for line in text.splitlines() if "- " in line and line.endswith(".yaml")]
    assert sorted(named) == [path.name for path in FILES]
    names = [(one["kind"], one["metadata"]["name"]) for one in ALL]
    assert len(set(names)) == len(names)


# What they name ...


@each_of_ours
def test_its_settings_exist(pod: Manifest, container: Manifest) -> None:
    """Every variable is a setting, or the file of one that may come from a file, and oncegate takes their values."""
    given = environment(container)
    files = {f"ONCEGATE_{name.upper()}_FILE" for name in SECRETS}
    names = {f"ONCEGATE_{name.upper()}" for name in Settings.model_fields}
    assert given.keys() <= names | files
    plain = {name.removeprefix("ONCEGATE_").lower(): value for name, value in given.items() if name not in files}
    plain.pop("rules_file", None)
    Settings(**({"upstream": "http://orders:9000"} | plain))


@each_of_ours
def test_its_command_exists(pod: Manifest, container: Manifest) -> None:
    """oncegate knows what its containers run, and what their hooks run."""
    hooks = container.get("lifecycle", {}).values()
    commands = [container.get("args", ["serve"]), *(hook["exec"]["command"][1:] for hook in hooks)]
    for command in commands:
        parser().parse_args(command)


@each_of_ours
def test_its_files_are_mounted(pod: Manifest, container: Manifest) -> None:
    """Every file that a setting names is a key of a Secret or ConfigMap that is mounted there, read-only."""
    sources = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    places = {mount["mountPath"]: sources[mount["name"]] for mount in container["volumeMounts"]}
    named = [Path(value) for name, value in environment(container).items() if name.endswith("_FILE")]
    for path in named:
        source = places[str(path.parent)]
        kind, key = ("Secret", "secretName") if "secret" in source else ("ConfigMap", "name")
        name = source["secret" if kind == "Secret" else "configMap"][key]
        [found] = [one for one in ALL if (one["kind"], one["metadata"]["name"]) == (kind, name)]
        assert path.name in found.get("stringData", found.get("data"))
    written = {"/tmp", environment(container).get("ONCEGATE_RUN_DIR")}
    assert all(mount.get("readOnly") or mount["mountPath"] in written for mount in container["volumeMounts"])


def test_the_rules_are_valid(tmp_path: Path) -> None:
    """oncegate takes the file that the ConfigMap has."""
    [rules] = [one["data"]["rules.toml"] for one in ALL if one["kind"] == "ConfigMap"]
    (tmp_path / "rules.toml").write_text(rules)
    settings = Settings(upstream="http://orders:9000", rules_file=tmp_path / "rules.toml")
    assert load_rules(settings).rules


def test_selectors_find_their_pods() -> None:
    """Each Service, policy and budget that selects our pods selects some, and each port that is named is there."""
    labels = [pod["metadata"]["labels"] for pod in PODS]
    for manifest in ALL:
        spec = manifest.get("spec", {})
        wanted = spec.get("podSelector", {}).get("matchLabels") or (
            spec.get("selector", {}) if manifest["kind"] == "Service" else spec.get("selector", {}).get("matchLabels")
        )
        if wanted and manifest["kind"] != "ServiceMonitor":
            assert any(wanted.items() <= have.items() for have in labels), manifest["metadata"]["name"]
    [monitor] = MONITORS
    services = [one for one in ALL if one["kind"] == "Service"]
    wanted = monitor["spec"]["selector"]["matchLabels"]
    [found] = [one for one in services if wanted.items() <= one["metadata"].get("labels", {}).items()]
    assert {one["port"] for one in monitor["spec"]["endpoints"]} <= {port["name"] for port in found["spec"]["ports"]}


# Their rights and their end ...


@each_of_ours
def test_it_has_few_rights(pod: Manifest, container: Manifest) -> None:
    """Kubernetes's restricted profile, a root file system that cannot be written, no token, and a limit of memory."""
    rights, spec = container["securityContext"], pod["spec"]
    assert rights == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert spec["automountServiceAccountToken"] is False
    assert container["resources"]["limits"].keys() == {"memory"}


@each_proxy
def test_its_probes(pod: Manifest, container: Manifest) -> None:
    """Liveness never asks for the store; all ask the admin port, which no Service of clients has."""
    paths = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {
        "startupProbe": {"path": "/healthz", "port": "admin"},
        "livenessProbe": {"path": "/healthz", "port": "admin"},
        "readinessProbe": {"path": "/readyz", "port": "admin"},
    }
    assert {one["name"]: one["containerPort"] for one in container["ports"]} == {"http": 8080, "admin": 8081}


@each_proxy
def test_it_is_not_killed_while_it_drains(pod: Manifest, container: Manifest) -> None:
    """The grace of the pod is longer than all that comes before the end of the process, three seconds included."""
    given = environment(container)
    settings = Settings(upstream="http://orders:9000", drain_s=float(given["ONCEGATE_DRAIN_S"]))
    before = float(given.get("ONCEGATE_DRAIN_DELAY_S", 0))
    hooks = [one["lifecycle"]["preStop"] for one in pod["spec"]["containers"] if "lifecycle" in one]
    before = max([before, *(hook["sleep"]["seconds"] for hook in hooks)])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= before + settings.drain_s + 3
    assert settings.drain_s == Settings.model_fields["drain_s"].default


def test_a_sidecar_outlives_its_api() -> None:
    """It is an init container that restarts: it starts first and gets its SIGTERM last. A hook tells it of the end."""
    sidecars = [one for pod in PODS for one in pod["spec"].get("initContainers", []) if "/oncegate:" in one["image"]]
    assert [one["restartPolicy"] for one in sidecars] == ["Always"]
    assert sidecars[0]["lifecycle"]["preStop"]["exec"]["command"][:2] == ["oncegate", "drain"]


def test_one_image() -> None:
    """All containers of oncegate are of one version."""
    assert len({container["image"] for _, container in OURS}) == 1
    assert list(chain.from_iterable(containers(pod) for pod in PODS))
