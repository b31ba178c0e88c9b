"""The chart renders to objects that Kubernetes and KubeRay accept, and what runs in it is what the project has."""

import argparse
import copy
import gzip
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import chart as helm
from ray.serve.schema import ServeDeploySchema

from services.worker.private_ray import ENVIRONMENT, THREADS

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "chart"
#: The `spec` of KubeRay's CRD RayService v1, without its descriptions.
RAY_SERVICE = ROOT / "tests" / "data" / "rayservice-v1.schema.json.gz"

VALUES = {
    "default": {},
    "external redis": {"redis": {"enabled": False, "url": "rediss://user:secret@redis.example:6380/1"}},
    "gpu": {
        "node": {"device": "cuda", "resources": {"limits": {"nvidia.com/gpu": 1}}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        "worker": {
            "device": "cuda",
            "replicas": 3,
            "tenantsSecret": "callers",
            "nodeSelector": {"gpu": "yes"},
            "cacheVolume": {"persistentVolumeClaim": {"claimName": "models"}},
        },
    },
    "spill": {"node": {"spill": {"size": "100GiB"}}},
    "spill that outlives pods": {
        "node": {
            "spill": {
                "size": "100GiB",
                "claim": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "120Gi"}}},
            }
        }
    },
    "secured": {
        "node": {"spill": {"size": "100GiB"}},
        "security": {
            "tlsSecret": "node-tls",
            "tlsName": "store.example",
            "clientTlsSecret": "worker-tls",
            "credentialsSecret": "callers",
            "tokenSecret": "token",
        },
    },
    "bare": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
}


def render(values: dict, name: str = "demo") -> list[dict]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=values, name=name)
    return [doc for path, text in files.items() if path.endswith(".yaml") for doc in yaml.safe_load_all(text) if doc]


def closed(schema: dict) -> dict:
    """`schema` with every object that lists its properties refusing others, as the API server does under strict field validation.

    `metadata` lists none in a CRD and stays open.
    """
    result = copy.deepcopy(schema)
    stack = [result]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack += part
        elif isinstance(part, dict):
            if "properties" in part and "additionalProperties" not in part and not part.get("x-kubernetes-preserve-unknown-fields"):
                part["additionalProperties"] = False
            stack += part.values()
    return result


@pytest.fixture(scope="module")
def ray_service() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(closed(json.loads(gzip.decompress(RAY_SERVICE.read_bytes()))))


@pytest.fixture(params=VALUES.values(), ids=VALUES.keys())
def objects(request) -> list[dict]:
    return render(request.param)


def of_kind(objects: list[dict], kind: str) -> list[dict]:
    return [doc for doc in objects if doc["kind"] == kind]


def pod_templates(objects: list[dict]) -> list[dict]:
    cluster = of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]
    ours = [doc["spec"] for doc in objects if doc["kind"] in ("StatefulSet", "Deployment")]
    return [owner["template"] for owner in (*ours, cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_ray_runs_as_under_up(objects):
    """Serve's settings, the workers' priority and how threads wait are the same in the cluster and in one's own Ray."""
    wanted = {k: v for k, v in (ENVIRONMENT | THREADS).items() if k.startswith(("RAY_SERVE_", "RAY_worker_niceness", "OMP_"))}
    assert wanted
    cluster = of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            env = {entry["name"]: entry.get("value") for entry in container["env"]}
            assert wanted.items() <= env.items()


def test_objects_are_valid(objects, ray_service):
    for doc in objects:
        if doc["kind"] == "RayService":
            errors = [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in ray_service.iter_errors(doc)]
            assert not errors
        else:
            kubernetes_validate.validate(doc, "1.30", strict=True)


def test_validation_sees_a_wrong_field(ray_service):
    service = of_kind(render({}), "RayService")[0]
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replica"] = 2
    assert [e.message for e in ray_service.iter_errors(service)] == ["Additional properties are not allowed ('replica' was unexpected)"]


def test_names_are_unique_and_selectors_meet_pods(objects):
    names = [(doc["kind"], doc["metadata"]["name"]) for doc in objects]
    assert len(set(names)) == len(names)
    pods = [template["metadata"]["labels"] for template in pod_templates(objects)]
    for doc in objects:
        selector = doc["spec"].get("selector") if "spec" in doc else None
        if selector:
            wanted = dict(selector.get("matchLabels", selector))
            wanted.pop("ray.io/serve", None)  # put on by KubeRay
            assert sum(wanted.items() <= labels.items() for labels in pods) == 1, doc["metadata"]["name"]


def test_pods_run_as_nobody_without_a_token_within_limits(objects):
    for template in pod_templates(objects):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"]


def test_secrets_reach_nodes_and_workers_where_their_options_look():
    objects = render(VALUES["secured"])
    node, worker = (of_kind(objects, kind)[0]["spec"] for kind in ("StatefulSet", "RayService"))
    nodes, workers = node["template"]["spec"], worker["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    for spec, paths in (
        (nodes, [a.split("=")[1] for a in nodes["containers"][0]["args"] if "/etc/" in a]),
        (workers, [e["value"] for e in workers["containers"][0]["env"] if "/etc/" in e.get("value", "")]),
    ):
        assert len(paths) == 4
        mounted = {m["mountPath"]: m["name"] for m in spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert all(mounted[str(Path(path).parent)] in volumes for path in paths)
    ca = next(volume["secret"] for volume in workers["volumes"] if volume["name"] == "ca")
    assert [item["key"] for item in ca["items"]] == ["ca.crt"], "a worker has no use for the nodes' key"
    assert "tcpSocket" in nodes["containers"][0]["livenessProbe"], "Kubernetes' gRPC probe speaks no TLS"


@pytest.mark.parametrize("security", [{"tlsSecret": "a"}, {"clientTlsSecret": "a"}], ids=["no name", "no authority"])
def test_half_a_tls_is_refused(security):
    with pytest.raises(Exception, match="security"):
        render({"security": security})


def test_nodes_have_probes_and_room_for_the_arena(objects):
    from kvstore.settings import parse_size

    (node,) = of_kind(objects, "StatefulSet")
    spec = node["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"][1:])
    memory = {kind: parse_size(container["resources"][kind]["memory"] + "B") for kind in ("requests", "limits")}
    assert parse_size(arguments["arena"]) < memory["requests"] <= memory["limits"]


def test_nodes_are_started_as_the_command_line_allows(objects):
    from services.cli import node as command

    (container,) = of_kind(objects, "StatefulSet")[0]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["concertina"]
    name, *arguments = container["args"]
    assert name == "node"
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.configure(parser)
    parsed = parser.parse_args([argument.replace("$(POD_IP)", "10.0.0.1") for argument in arguments])
    assert parsed.listen == "10.0.0.1:7000"
    assert parsed.redis.startswith("redis")


def test_workers_run_our_application(objects):
    from services.worker.app import SERVICER_FUNCTIONS
    from services.worker.options import WorkerArgs

    service = of_kind(objects, "RayService")[0]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "services.worker.app:build"
    tenants = application.args.pop("tenants", None)  # the file is the Secret's, and not here
    args = WorkerArgs.model_validate(application.args)
    assert args.replicas == service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"]
    mounts = [mount for template in pod_templates([service]) for mount in template["spec"]["containers"][0].get("volumeMounts", [])]
    assert sum(mount["mountPath"] == "/etc/concertina" for mount in mounts) == (2 if tenants else 0)
    assert tuple(config.grpc_options.grpc_servicer_functions) == tuple(SERVICER_FUNCTIONS)


def test_the_number_of_workers_follows_the_requests_where_asked():
    objects = render({"worker": {"replicas": 2, "maxReplicas": 5}})
    (service,) = of_kind(objects, "RayService")
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert (args["replicas"], args["min_replicas"], args["max_replicas"]) == (2, 2, 5)
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 5) and service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > args["drain_s"]


def test_gpu_values_reach_both_kinds_of_process():
    objects = render(VALUES["gpu"])
    assert "--device=cuda" in of_kind(objects, "StatefulSet")[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    group = of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["template"]["spec"]["nodeSelector"] == {"gpu": "yes"}
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == "models"


def test_external_redis_replaces_ours_everywhere():
    objects = render(VALUES["external redis"])
    assert not of_kind(objects, "Deployment")
    text = json.dumps(objects)
    assert text.count("rediss://user:secret@redis.example:6380/1") == 2
    assert "demo-concertina-redis" not in text


@pytest.mark.parametrize(
    "values",
    [
        {"node": {"arena": "much"}},
        {"node": {"replica": 3}},
        {"worker": {"device": "tpu"}},
        {"worker": {"grpcPort": 70_000}},
        {"redis": {"url": "localhost"}},
        {"extra": 1},
    ],
    ids=json.dumps,
)
def test_schema_refuses(values):
    schema = json.loads((CHART / "values.schema.json").read_text())
    merged = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(merged, schema)
    for part, settings in values.items():
        merged[part] = merged.get(part, {}) | settings if isinstance(settings, dict) else settings
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged, schema)


def test_values_stay_few():
    assert len((CHART / "values.yaml").read_text().splitlines()) < 150


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project
    ray = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert yaml.safe_load((CHART / "values.yaml").read_text())["worker"]["rayVersion"] == ray


def test_image_is_built_from_what_exists_and_runs_as_nobody():
    lines = (ROOT / "deploy" / "docker" / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000:1000"]
    copied = [word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]]
    assert copied
    ignored = (ROOT / "deploy" / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored
