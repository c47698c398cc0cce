"""
What the Helm chart promises, rendered by Helm and held against Kubernetes' own schemas.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from controller.settings import RunSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "sniroute"
DEFAULTS = CHART / "values.yaml"
EVERYTHING = CHART / "ci" / "everything.yaml"
ROUTES = CHART / "ci" / "routes.yaml"
RELAY = CHART / "ci" / "relay.yaml"
VALUES = [DEFAULTS, *sorted((CHART / "ci").glob("*.yaml"))]
HELM = Path(sys.executable).with_name("helm")
SNIROUTE = Path(sys.executable).with_name("sniroute")
FOUR = ["BPF", "PERFMON", "NET_ADMIN", "NET_BIND_SERVICE"]

each_values_file = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)


def helm(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HELM, *map(str, args)], capture_output=True, text=True, check=False, timeout=60
    )


def render(*args: object, chart: Path = CHART) -> dict[str, Any]:
    done = helm("template", "example", chart, *args)
    assert 0 == done.returncode, done.stderr
    return {doc["kind"]: doc for doc in yaml.safe_load_all(done.stdout) if doc}


def pod(*args: object) -> dict[str, Any]:
    return render(*args)["DaemonSet"]["spec"]["template"]


def container(*args: object) -> dict[str, Any]:
    (only,) = pod(*args)["spec"]["containers"]
    return only


def notes(tmp_path: Path, *args: object) -> str:
    # Helm prints the notes only with a cluster at hand; a template may include them without.
    chart = shutil.copytree(CHART, tmp_path / "sniroute")
    (chart / "templates" / "notes.yaml").write_text(
        'kind: Notes\ntext: {{ include (print .Template.BasePath "/NOTES.txt") . | quote }}\n'
    )
    return render(*args, chart=chart)["Notes"]["text"]


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    # The values that README tells: objects of the chart's own making are opened, those that
    # are handed on to Kubernetes are not.
    own = {"image", "metrics", "timeouts", "limits"}
    found = {}
    for key, value in values.items():
        found.update(leaves(value, f"{key}.") if key in own else {prefix + key: value})
    return found


@each_values_file
def test_helm_finds_nothing_to_say(values: Path) -> None:
    """
    The chart passes `helm lint --strict` with every set of values.
    """
    done = helm("lint", "--strict", CHART, "--values", values)

    assert 0 == done.returncode, done.stdout


@pytest.mark.parametrize("version", ["1.25.0", "1.29.0", "1.33.0", "1.37.0"])
@each_values_file
def test_kubernetes_knows_every_field(values: Path, version: str) -> None:
    """
    All that the chart renders is valid for Kubernetes, with no field that it does not know.
    """
    objects = render("--values", values, "--kube-version", version)

    for document in objects.values():
        kubernetes_validate.validate(document, version, strict=True)
    assert "DaemonSet" in objects


@each_values_file
def test_labels_select_the_pods(values: Path) -> None:
    """
    The selector matches the pods, and holds nothing that changes between versions.
    """
    spec = render("--values", values)["DaemonSet"]["spec"]
    selector = spec["selector"]["matchLabels"]

    assert selector.items() <= spec["template"]["metadata"]["labels"].items()
    assert set(selector) == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}


def test_the_version_is_the_projects() -> None:
    """
    The chart installs the release that it comes with.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert project["version"] == chart["appVersion"]
    assert f"sniroute:{project['version']}" == container()["image"]


def test_a_digest_pins_the_image() -> None:
    """
    With a digest, no tag can change what runs.
    """
    digest = yaml.safe_load(EVERYTHING.read_text())["image"]["digest"]

    image = container("--values", EVERYTHING)["image"]

    assert f"images.example.com/net/sniroute@{digest}" == image


def test_it_has_the_four_capabilities_and_no_more() -> None:
    """
    Nothing beyond what the router needs: no other capability, no escalation, no writable disk.
    """
    context = container()["securityContext"]
    spec = pod()["spec"]

    assert {
        "runAsUser": 0,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": FOUR},
    } == context
    assert {"seccompProfile": {"type": "RuntimeDefault"}} == spec["securityContext"]
    assert spec["automountServiceAccountToken"] is False
    assert ["configMap", "emptyDir", "hostPath"] == kinds_of_volumes()


def kinds_of_volumes(*args: object) -> list[str]:
    volumes = pod(*args)["spec"]["volumes"]
    return [kind for volume in volumes for kind in volume if kind != "name"]


def test_the_nodes_bpf_filesystem_is_where_the_program_is_told() -> None:
    """
    One folder of the node is mounted, not below /sys, where AppArmor would have it read only.
    """
    it = container("--values", EVERYTHING)
    (told,) = (v["value"] for v in it["env"] if v["name"] == "SNIROUTE_BPFFS")
    (volume,) = (v for v in pod("--values", EVERYTHING)["spec"]["volumes"] if "hostPath" in v)

    assert {"path": "/run/node/bpf", "type": "Directory"} == volume["hostPath"]
    assert {"name": volume["name"], "mountPath": told} in it["volumeMounts"]
    assert not told.startswith("/sys/")


def test_a_pod_can_do_without_the_nodes_folder() -> None:
    """
    Without a path nothing of the node is mounted, and the program is told of none.
    """
    it = container("--values", RELAY)

    assert ["configMap", "emptyDir"] == kinds_of_volumes("--values", RELAY)
    assert ["routes", "run"] == [mount["name"] for mount in it["volumeMounts"]]
    assert "SNIROUTE_BPFFS" not in {variable["name"] for variable in it["env"]}


def test_a_relay_can_do_without_capabilities() -> None:
    """
    An empty list of capabilities leaves none.
    """
    context = container("--values", RELAY)["securityContext"]

    assert {"drop": ["ALL"]} == context["capabilities"]


def environment(values: Path, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    for variable in container("--values", values)["env"]:
        assert variable["name"].removeprefix("SNIROUTE_").lower() in RunSettings.model_fields
        monkeypatch.setenv(variable["name"], variable["value"])
    return RunSettings()


def test_its_defaults_are_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A setting that the values do not change is as it is without a chart, but for one mount.
    """
    plain = RunSettings(bpffs=Path("/run/bpf"))

    assert plain == environment(DEFAULTS, monkeypatch)


def test_every_setting_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    What the values say is what the program reads, down to the last digit.
    """
    settings = environment(EVERYTHING, monkeypatch)

    assert {
        "listen": ["192.0.2.1:443", "[2001:db8::1]:443", ":8443"],
        "metrics": "[::]:9900",
        "handoff": "packet",
        "bpffs": "/run/bpf",
        "hello_timeout": 2.5,
        "connect_timeout": 0.5,
        "drain": 90.5,
        "max_connections": 2_000_000,
        "backlog_limit": 512 * 1024,
        "receive_buffer": 4 * 1024 * 1024,
        "access_log": False,
        "log_level": "debug",
    }.items() <= settings.model_dump(mode="json").items()


def test_no_service_can_change_a_setting() -> None:
    """
    A service called sniroute-... does not put SNIROUTE_* variables into the environment.
    """
    assert pod()["spec"]["enableServiceLinks"] is False


def test_the_pod_outlives_its_drain() -> None:
    """
    The kubelet waits for the connections as long as sniroute does, and then some.
    """
    grace = pod("--values", EVERYTHING)["spec"]["terminationGracePeriodSeconds"]

    assert 101 == grace


def test_every_port_of_the_node_is_claimed_once() -> None:
    """
    The scheduler learns of all ports, and one port on several addresses is named once.
    """
    ports = container("--values", EVERYTHING)["ports"]

    assert [("tls-443", 443), ("tls-8443", 8443), ("metrics", 9900)] == [
        (port["name"], port["hostPort"]) for port in ports
    ]
    assert all(port["hostPort"] == port["containerPort"] for port in ports)


@pytest.mark.parametrize(
    ("host", "probed"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("192.0.2.1", "192.0.2.1"),
        ("::1", "::1"),
        ("0.0.0.0", None),
        ("::", None),
    ],
)
def test_probes_ask_where_it_listens(host: str, probed: str | None) -> None:
    """
    Both probes go to the metrics address; for a wildcard, to the pod's.
    """
    it = container("--set-string", f"metrics.host={host}")

    for probe in (it["readinessProbe"], it["livenessProbe"]):
        assert probed == probe["httpGet"].get("host")
        assert "metrics" == probe["httpGet"]["port"]
    assert "/healthz" == it["readinessProbe"]["httpGet"]["path"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_metrics_are_not_offered(host: str) -> None:
    """
    No annotation sends Prometheus to an address that it can not reach.
    """
    assert "annotations" not in pod("--set-string", f"metrics.host={host}")["metadata"]


def test_reachable_metrics_are_offered() -> None:
    """
    The annotations say where the metrics are.
    """
    annotations = pod("--values", RELAY)["metadata"]["annotations"]

    assert {
        "prometheus.io/scrape": "true",
        "prometheus.io/path": "/metrics",
        "prometheus.io/port": "9443",
    } == annotations


def test_own_annotations_win() -> None:
    """
    Whoever scrapes in another way can say so.
    """
    annotations = pod("--values", EVERYTHING)["metadata"]["annotations"]

    assert "false" == annotations["prometheus.io/scrape"]
    assert "edge" == annotations["example.com/owner"]


def routes_file(*args: object) -> str:
    return render(*args)["ConfigMap"]["data"]["routes.toml"]


def test_the_routes_file_says_what_the_values_say() -> None:
    """
    Every route of the values is in the file that the pod mounts, and nothing else is.
    """
    routes = yaml.safe_load(ROUTES.read_text())["routes"]

    assert routes == tomllib.loads(routes_file("--values", ROUTES))["route"]
    assert {"route": []} == tomllib.loads(routes_file())


@pytest.mark.parametrize("values", [ROUTES, DEFAULTS], ids=lambda path: path.stem)
def test_sniroute_accepts_the_routes_file(values: Path, tmp_path: Path) -> None:
    """
    The file that Helm writes, with routes or with none, is one that sniroute can serve.
    """
    path = tmp_path / "routes.toml"
    path.write_text(routes_file("--values", values))

    done = subprocess.run(
        [SNIROUTE, "check", "--engine", "none", "--routes", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert 0 == done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("values", [ROUTES, EVERYTHING], ids=lambda path: path.stem)
def test_the_pod_mounts_the_routes_as_a_folder(values: Path) -> None:
    """
    New routes reach a running pod: a single file, mounted by subPath, would stay as it was.
    """
    objects = render("--values", values)
    spec = objects["DaemonSet"]["spec"]["template"]["spec"]
    (it,) = spec["containers"]
    name = objects["ConfigMap"]["metadata"]["name"] if values == ROUTES else "edge-routes"

    assert {"name": "routes", "configMap": {"name": name}} in spec["volumes"]
    assert {"name": "routes", "mountPath": "/etc/sniroute", "readOnly": True} in it["volumeMounts"]
    assert "/etc/sniroute/routes.toml" == it["args"][it["args"].index("--routes") + 1]


def test_other_routes_change_no_pod() -> None:
    """
    Routes are reloaded, so an upgrade of them alone restarts nothing.
    """
    one = pod("--set-json", 'routes=[{"host": ["a.example.com"], "backends": ["192.0.2.1:443"]}]')
    two = pod("--set-json", 'routes=[{"host": ["b.example.com"], "backends": ["192.0.2.2:443"]}]')

    assert one == two


def test_a_configmap_of_ones_own_replaces_the_charts() -> None:
    """
    With `routesConfigMap` the chart writes no routes.
    """
    assert "ConfigMap" not in render("--values", EVERYTHING)


@pytest.mark.parametrize(
    "bad",
    [
        'colour="blue"',
        'image={"name": "sniroute"}',
        "listen=[]",
        'listen=["443"]',
        'listen=["[::1]"]',
        'metrics={"host": "localhost"}',
        'metrics={"port": 70000}',
        'handoff="magic"',
        'timeouts={"hello": 0}',
        'timeouts={"connect": "5s"}',
        'limits={"backlog": 1048576}',
        'limits={"connections": -1}',
        'logLevel="loud"',
        'routes=[{"host": ["a.example.com"]}]',
        'routes=[{"host": [], "backends": ["192.0.2.1:443"]}]',
        'routes=[{"host": ["a.*.com"], "backends": ["192.0.2.1:443"]}]',
        'routes=[{"host": ["a.example.com"], "backends": ["web:443"]}]',
        'routes=[{"host": ["a.example.com"], "backends": ["192.0.2.1"]}]',
        'capabilities=["CAP_BPF"]',
        'podLabels={"team": 1}',
    ],
)
def test_the_schema_refuses(bad: str) -> None:
    """
    A wrong value fails at install, by name, and not in a pod.
    """
    done = helm("template", "example", CHART, "--set-json", bad)

    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert re.split(r"\W", bad)[0] in done.stderr


def test_the_readme_tells_every_value() -> None:
    """
    The table of values holds each value of the chart with its default, and no other.
    """
    readme = (CHART / "README.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", readme, re.MULTILINE)

    told = {name: json.loads(default) for name, default in rows}

    assert leaves(yaml.safe_load(DEFAULTS.read_text())) == told


def test_the_test_values_change_everything() -> None:
    """
    ci/everything.yaml leaves no value at its default, so that no template line goes untried.
    """
    defaults = leaves(yaml.safe_load(DEFAULTS.read_text()))
    changed = leaves(yaml.safe_load(EVERYTHING.read_text()))

    assert [] == [name for name, value in defaults.items() if changed.get(name, value) == value]


@pytest.mark.parametrize(
    ("args", "warning"),
    [
        ([], "there are no routes"),
        (["--values", RELAY], "192.0.2.1:9443 is open"),
        (["--set-json", 'capabilities=["NET_BIND_SERVICE"]'], "without the capability BPF"),
    ],
)
def test_notes_warn(args: list[object], warning: str, tmp_path: Path) -> None:
    """
    What one would regret is said at install.
    """
    text = notes(tmp_path, *args)

    assert "WARNING" in text
    assert warning in text


def test_notes_are_calm_otherwise(tmp_path: Path) -> None:
    """
    An install with nothing wrong shows its routes and no warning.
    """
    text = notes(tmp_path, "--values", ROUTES)

    assert "WARNING" not in text
    assert "a.example.com, *.b.example.com -> 198.51.100.2:443, [2001:db8::2]:8443" in text
