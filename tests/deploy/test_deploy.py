"""The deployment files against the code they describe. Nothing is built or started here."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import prometheus_client.parser
import pytest
import yaml

from lenvm_kernels import torchvision_schema
from lenvm_runtime import cli, default_model, serve
from lenvm_runtime.value_model import source
from lenvm_service.app import Gateway
from lenvm_service.config import GatewayConfig, read_config
from lenvm_service.engine import Engine
from lenvm_service.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
PRESETS = sorted((DEPLOY / "models").glob("*.env"))
OVERLAYS = [DEPLOY / "kubernetes/base", DEPLOY / "kubernetes/gpu"]
POSITIONS = {
    "Qwen/Qwen2.5-3B-Instruct": 32768,
    "Qwen/Qwen2.5-7B-Instruct": 32768,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 262144,
    "namezz/lvm-a-qwen2.5-7b-instruct-b-qwen2.5-0.5b-instruct": 32768,
    "namezz/lvm-a-qwen2.5-7b-instruct-b-qwen2.5-1.5b-instruct": 32768,
    "runs/qwen2.5-3b--qwen2.5-0.5b": 32768,
    "runs/qwen3-30b-a3b--qwen3-1.7b-base": 32768,
}
"""``max_position_embeddings`` of the presets' models and of their separate LenVMs' backbones."""

PORT = GatewayConfig().port
USER_ID = 10001
_NO_METRICS = {"sum", "min", "or", "vector", "rate", "histogram_quantile"}


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def preset(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def instructions(dockerfile: str) -> list[list[str]]:
    """Dockerfile lines, continued ones joined, as [instruction, rest]."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    return [re.split(r"\s+", line.strip(), maxsplit=1) for line in text.splitlines() if line.strip()]


def arguments_of(name: str) -> list[str]:
    """The parts of a Dockerfile instruction in exec form; its last occurrence counts."""
    rest = [rest for instruction, rest in instructions((ROOT / "Dockerfile").read_text()) if instruction == name][-1]
    parts: list[str] = json.loads(rest[rest.index("[") :])
    return parts


def serve_arguments(command: list[str]) -> argparse.Namespace:
    """What ``lenvm serve`` makes of the arguments after its own name."""
    assert Path(command[0]).name == "lenvm"
    return cli._build_parser([]).parse_args(command[1:])


def as_given(parsed: argparse.Namespace) -> dict[str, Any]:
    return {"MODEL": parsed.model, "LENVM": parsed.lenvm, "SGLANG_ARGS": parsed.engine_arguments}


def split_arguments(values: dict[str, str]) -> dict[str, Any]:
    return {**values, "SGLANG_ARGS": shlex.split(values["SGLANG_ARGS"])}


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    """The gateway's metrics with one child of each."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        if names := getattr(metric, "_labelnames", ()):
            metric.labels(*names)
    return metrics


@pytest.fixture(scope="module")
def gateway_paths(metrics: Metrics) -> set[str]:
    config = GatewayConfig()
    return {route.path for route in Gateway(config, Engine(config, metrics, None), metrics).routes()}


@pytest.fixture(scope="module")
def series(metrics: Metrics) -> dict[str, set[str]]:
    """Label names by series name, from the gateway's own exposition."""
    labels: dict[str, set[str]] = {}
    for family in prometheus_client.parser.text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    return labels


def expressions() -> list[str]:
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("expression", expressions())
def test_dashboards_read_series_and_labels_of_the_gateway(expression: str, series: dict[str, set[str]]) -> None:
    used = set(re.findall(r"(\w+)\s*=~?\s*\"", expression))
    for group in re.findall(r"by \(([^)]*)\)", expression):
        used |= set(re.split(r",\s*", group))
    plain = re.sub(r"by \([^)]*\)|\{[^}]*\}|\[[^\]]*\]", " ", expression)
    names = set(re.findall(r"[a-zA-Z_]\w*", plain)) - _NO_METRICS
    assert names
    assert names <= series.keys()
    for name in names:
        assert used <= series[name]


def test_dashboard_panels_do_not_overlap() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells


def test_every_family_of_the_gateway_is_on_a_dashboard(metrics: Metrics) -> None:
    shown = " ".join(expressions())
    families = prometheus_client.parser.text_string_to_metric_families(metrics.render().decode())
    names = {family.name for family in families if not family.name.endswith("_created")}
    missing = {name for name in names if name not in shown and "_gateway_process_" not in name}
    assert not missing


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_accepts_expressions_and_configurations(tmp_path: Path) -> None:
    rules = [
        {"record": f"r{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions())
    ]
    rule_file = tmp_path / "rules.yml"
    rule_file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", rule_file], check=True, capture_output=True)
    for path in (DEPLOY / "prometheus").glob("*.yml"):
        subprocess.run(["promtool", "check", "config", path], check=True, capture_output=True)


def test_grafana_finds_its_datasource_and_dashboards() -> None:
    (datasource,) = load("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    (provider,) = load("deploy/grafana/provisioning/dashboards/lenvm.yml")["providers"]
    services = load("docker-compose.yml")["services"]
    assert datasource["url"] == "http://prometheus:9090"
    assert datasource["jsonData"]["timeInterval"] == load("deploy/prometheus/compose.yml")["global"]["scrape_interval"]
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in services["grafana"]["volumes"]}
    assert mounts[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            assert panel["datasource"] == {"type": datasource["type"], "uid": datasource["uid"]}


def test_compose_scrapes_as_the_shipped_configuration_does() -> None:
    plain, compose = load("deploy/prometheus/prometheus.yml"), load("deploy/prometheus/compose.yml")
    (target,) = compose["scrape_configs"][0]["static_configs"][0]["targets"]
    service, port = target.split(":")
    assert service in load("docker-compose.yml")["services"]
    assert int(port) == PORT
    compose["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{PORT}"]
    assert compose == plain


def test_compose_mounts_what_exists() -> None:
    compose = load("docker-compose.yml")
    for service in compose["services"].values():
        for mount in service["volumes"]:
            host = mount.split(":")[0]
            assert (ROOT / host).exists() if host.startswith("./") else host in compose["volumes"]


def test_gpu_override_builds_the_cuda_image() -> None:
    base, override = load("docker-compose.yml")["services"], load("docker-compose.gpu.yml")["services"]
    assert override.keys() <= base.keys()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert override["lenvm"]["build"]["args"]["PLATFORM"] in stages
    gpu_image = yaml.safe_load((DEPLOY / "kubernetes/gpu/kustomization.yaml").read_text())["images"][0]
    assert override["lenvm"]["image"] == f"{gpu_image['name']}:{gpu_image['newTag']}"


@pytest.mark.parametrize("path", [None, *PRESETS], ids=lambda path: path.stem if path else "no preset")
def test_compose_hands_its_variables_to_serve(path: Path | None) -> None:
    given = preset(path) if path else {"MODEL": "", "LENVM": "", "SGLANG_ARGS": ""}
    lenvm = load("docker-compose.yml")["services"]["lenvm"]
    command = re.sub(r"\$\{(\w+):-\}", lambda match: given[match[1]], lenvm["command"])
    parsed = serve_arguments([*arguments_of("ENTRYPOINT"), *shlex.split(command)])
    assert as_given(parsed) == split_arguments(given)
    assert (parsed.host, parsed.port) == ("0.0.0.0", PORT)
    assert all(port.endswith(f":{PORT}") for port in lenvm["ports"])


def test_compose_and_kubernetes_set_variables_of_the_gateway() -> None:
    (container,) = deployment(OVERLAYS[0])["spec"]["template"]["spec"]["containers"]
    compose = load("docker-compose.yml")["services"]["lenvm"]["environment"]
    for name in [*compose, *(variable["name"] for variable in container["env"])]:
        if name.startswith("LENVM_"):
            assert read_config([], {name: "key"}) == GatewayConfig(api_keys=("key",))


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``make -n serve``, with nothing from the ``make test`` that may run these tests."""
    command, environment = ["make", "-n", "serve", *arguments], {"PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def make_arguments(*arguments: str) -> dict[str, Any]:
    command = shlex.split(make(*arguments).stdout.splitlines()[-1])
    assert command[0] == "exec"
    return as_given(serve_arguments(command[1:]))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_make_serves_a_preset(path: Path) -> None:
    assert make_arguments(f"PRESET={path.stem}") == split_arguments(preset(path))


def test_the_command_line_wins_over_a_preset() -> None:
    arguments = make_arguments("PRESET=qwen2.5-7b--qwen2.5-1.5b", "LENVM=mine", "SGLANG_ARGS=--tp 2")
    assert arguments == {"MODEL": "Qwen/Qwen2.5-7B-Instruct", "LENVM": "mine", "SGLANG_ARGS": ["--tp", "2"]}


def test_an_unknown_preset_ends_make_with_one_line_that_names_the_known_ones() -> None:
    result = make("PRESET=nothing")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert result.stdout == ""
    assert line.split("not one of ")[1].removesuffix(".  Stop.").split() == sorted(path.stem for path in PRESETS)


@pytest.fixture(scope="module")
def engine_parser() -> argparse.ArgumentParser:
    torchvision_schema.declare_if_missing()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_give_arguments_that_sglang_takes(path: Path, engine_parser: argparse.ArgumentParser) -> None:
    from lenvm_runtime import compat

    values = split_arguments(preset(path))
    config = serve.ServeConfig("127.0.0.1", PORT, values["MODEL"] or None, serve.NO_HEAD, tuple(values["SGLANG_ARGS"]))
    parsed = engine_parser.parse_args(serve._engine_command(config, values["MODEL"] or "default", 30000))
    compat.check_value_model_supported(parsed)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_name_a_lenvm_that_is_shipped_published_or_trained_here(path: Path) -> None:
    values = preset(path)
    if not values["LENVM"]:
        assert values == {"MODEL": "", "LENVM": "", "SGLANG_ARGS": ""}
    elif (ROOT / values["LENVM"]).is_dir():
        assert json.loads((ROOT / values["LENVM"] / "lenvm_config.json").read_text())["base_model"] == values["MODEL"]
    elif values["LENVM"].startswith("runs/"):
        assert values["LENVM"] in trained_folders(values["MODEL"])
    else:
        assert source._HUB_NAME.fullmatch(values["LENVM"])
        assert values["MODEL"].split("/")[1].lower() in values["LENVM"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_serve_contexts_that_their_separate_lenvm_has_positions_for(
    path: Path, engine_parser: argparse.ArgumentParser
) -> None:
    values = split_arguments(preset(path))
    if not values["LENVM"] or (ROOT / values["LENVM"]).is_dir():  # a head, which reads the served model's states
        return
    parsed = engine_parser.parse_args(["--model-path", values["MODEL"], *values["SGLANG_ARGS"]])
    served = parsed.context_length or POSITIONS[values["MODEL"]]
    assert served <= min(POSITIONS[values["MODEL"]], POSITIONS[values["LENVM"]])


def trained_folders(model: str) -> set[str]:
    """The LenVMs that the configurations of training/configs leave for a served model."""
    configs = [yaml.safe_load(path.read_text()) for path in (ROOT / "training/configs").glob("*.yaml")]
    own = [config for config in configs if config["model"]["served_model"] == model]
    return {config["heads"]["out"] if "heads" in config else config["training"]["output_dir"] for config in own}


def test_the_image_installs_what_make_installs() -> None:
    makefile, dockerfile = ((ROOT / name).read_text() for name in ("Makefile", "Dockerfile"))
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM)", dockerfile, flags=re.MULTILINE | re.DOTALL))
    recipes = dict(re.findall(r"^\.venv/\.installed-(\w+):.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE))
    assert stages.keys() == recipes.keys() == {"cpu", "cuda"}
    for platform, stage in stages.items():
        *packages, project = installs(recipes[platform])
        assert installs(stage) == packages
        assert project in ("--no-deps -e .", "--no-deps --no-build-isolation -e .")
    assert installs(dockerfile.split("FROM ${PLATFORM}")[1]) == ["--no-deps -e ."]


def installs(text: str) -> list[str]:
    """The arguments of each ``pip install``, those that only make it quieter or smaller left out."""
    found = re.findall(r"pip install (.*?)(?: \\)?$", text, flags=re.MULTILINE)
    return [re.sub(r"--(quiet|disable-pip-version-check|no-cache-dir) ", "", arguments) for arguments in found]


def test_the_build_context_holds_what_the_image_needs() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = (ROOT / "pyproject.toml").read_text()
    folders = re.findall(r'^lenvm_\w+ = "([\w/]+)"$', project, flags=re.MULTILINE)
    assert {folder.split("/")[0] for folder in folders} <= kept
    assert {"pyproject.toml", "requirements", "README.md"} <= kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_image_runs_as_a_user_and_checks_readiness(gateway_paths: set[str]) -> None:
    found = dict(instructions((ROOT / "Dockerfile").read_text()))
    assert found["USER"] == f"{USER_ID}:{USER_ID}"
    assert found["EXPOSE"] == str(PORT)
    assert found["VOLUME"] == "/cache"
    assert "LENVM_CACHE_DIR=/cache/" in found["ENV"]
    check = arguments_of("HEALTHCHECK")[-1]
    compile(check, "HEALTHCHECK", "exec")
    address, path = re.search(r"'http://([\w.:]+)(/\w+)'", check).groups()
    assert address == f"127.0.0.1:{PORT}"
    assert path == "/ready"
    assert path in gateway_paths
    timeout_s = int(re.search(r"--timeout=(\d+)s", found["HEALTHCHECK"])[1])
    assert timeout_s > GatewayConfig().ready_timeout_s
    start_period_s = 60 * int(re.search(r"--start-period=(\d+)m", found["HEALTHCHECK"])[1])
    assert start_period_s > serve.START_TIMEOUT_S


def test_the_cache_volume_is_the_one_that_the_code_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_CACHE_DIR", "/cache/lenvm")
    assert default_model.cache_dir() == Path("/cache/lenvm")
    assert "cache:/cache" in load("docker-compose.yml")["services"]["lenvm"]["volumes"]


def deployment(folder: Path) -> Any:
    return yaml.safe_load((folder / "deployment.yaml").read_text())


def test_kustomizations_name_files_that_exist() -> None:
    for folder in OVERLAYS:
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = [*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))]
        assert all((folder / name).exists() for name in named)
        others = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert others == {name for name in named if not name.startswith("..")}


def test_the_pods_probes_and_times_fit_the_code(gateway_paths: set[str]) -> None:
    template = deployment(OVERLAYS[0])["spec"]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": PORT}]
    for kind, path in (("startup", "/health"), ("liveness", "/health"), ("readiness", "/ready")):
        assert container[f"{kind}Probe"]["httpGet"] == {"path": path, "port": "http"}
        assert path in gateway_paths
    assert container["readinessProbe"]["timeoutSeconds"] > GatewayConfig().ready_timeout_s
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > serve.START_TIMEOUT_S
    stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1]) + 2 * serve.STOP_TIMEOUT_S
    assert pod["terminationGracePeriodSeconds"] > stop_s
    assert load("docker-compose.yml")["services"]["lenvm"]["stop_grace_period"] == "1m"
    scrape = {name.removeprefix("prometheus.io/"): value for name, value in template["metadata"]["annotations"].items()}
    assert scrape == {"scrape": "true", "port": str(PORT), "path": "/metrics"}
    assert scrape["path"] in gateway_paths


def test_the_pod_runs_as_the_images_user_with_its_cache_and_threads() -> None:
    pod = deployment(OVERLAYS[0])["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    security = pod["securityContext"]
    assert security["runAsNonRoot"]
    assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER_ID}
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/cache"}
    claim = yaml.safe_load((OVERLAYS[0] / "cache.yaml").read_text())["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim
    threads = next(variable for variable in container["env"] if variable["name"] == "OMP_NUM_THREADS")
    assert int(threads["value"]) == int(container["resources"]["limits"]["cpu"]) - 1


def test_the_gpu_overlay_serves_a_preset() -> None:
    text = (OVERLAYS[1] / "kustomization.yaml").read_text()
    name = re.search(r"preset (\S+)", text)[1]
    (container,) = deployment(OVERLAYS[1])["spec"]["template"]["spec"]["containers"]
    parsed = serve_arguments([*arguments_of("ENTRYPOINT"), *container["args"]])
    assert as_given(parsed) == split_arguments(preset(DEPLOY / f"models/{name}.env"))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_kubectl_builds_the_overlays(folder: Path) -> None:
    built = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    objects = {item["kind"]: item for item in yaml.safe_load_all(built)}
    assert objects.keys() == {"Deployment", "PersistentVolumeClaim", "Service"}
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    (port,) = objects["Service"]["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (PORT, "http")
