"""The table of metrics obeys Prometheus' naming, and every board and rule asks for metrics and labels that exist."""

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

from kvstore.metrics import METRICS, PREFIX, Metrics, exported_names

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
#: Base units that end a name; a plain count of things ends in the things' name.
BASE_UNITS = ("bytes", "seconds")
OTHER_UNITS = ("ms", "millis", "microseconds", "kb", "mib", "kilobytes", "megabytes", "percent", "minutes")
#: Labels that Prometheus and our scrape configuration add.
SCRAPE_LABELS = {"le", "job", "instance", "role", "system"}
BOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules.yml"


def board_queries() -> list[tuple[str, str]]:
    return [
        (f"{path.stem}: {panel['title']} {target['refId']}", target["expr"])
        for path in BOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


QUERIES = board_queries() + [(rule["alert"], rule["expr"]) for rule in rules()]


def labels_of(exported: str) -> set[str]:
    base = exported.removeprefix(PREFIX)
    for suffix in ("", "_total", "_bucket", "_sum", "_count"):
        name = base.removesuffix(suffix) if suffix else base
        if name in METRICS:
            return set(METRICS[name].labels)
    raise AssertionError(exported)


@pytest.mark.parametrize("name", METRICS)
def test_name_grammar(name):
    row = METRICS[name]
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))  # suffixes that the client library gives
    words = name.split("_")
    assert not set(words) & set(OTHER_UNITS)
    assert not any(unit in words[:-1] for unit in BASE_UNITS)
    assert row.help and row.help[0].isupper() and not row.help.endswith(".")
    assert row.kind in ("counter", "gauge", "histogram")
    assert bool(row.buckets) == (row.kind == "histogram")
    assert list(row.buckets) == sorted(set(row.buckets))


def test_labels_are_a_small_closed_set():
    allowed = "node state fidelity codec policy reason from to part result where code rpc tenant tier path"
    assert {label for row in METRICS.values() for label in row.labels} <= set(allowed.split())


def test_exported_names_are_those_on_the_page():
    from prometheus_client import generate_latest

    metrics = Metrics()
    for name, row in METRICS.items():
        series = getattr(metrics, name)
        if row.labels:
            series = series.labels(**dict.fromkeys(row.labels, "x"))
        series.observe(1) if row.kind == "histogram" else series.inc()
    page = generate_latest(metrics.registry).decode()
    names = {re.split(r"[{ ]", line)[0] for line in page.splitlines() if not line.startswith("#")}
    families = {PREFIX + name for name, row in METRICS.items() if row.kind == "histogram"}  # a histogram's own name has no series
    assert {name for name in names if not name.endswith("_created")} == exported_names() - families


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_query_names_what_exists(where, query):
    names = re.findall(rf"\b{PREFIX}\w+", query)
    assert set(names) <= exported_names()
    if not names:
        assert query.startswith("up{")
        return
    known = set.union(*(labels_of(name) for name in names)) | SCRAPE_LABELS
    grouped = {label.strip() for group in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", query) for label in group.split(",")}
    assert grouped <= known
    for name, matchers in re.findall(rf"({PREFIX}\w+)\{{([^}}]*)\}}", query):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels_of(name) | SCRAPE_LABELS


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_counters_are_read_by_their_rate(where, query):
    for name in re.findall(rf"{PREFIX}\w+_(?:total|bucket)\b", query):
        assert re.search(rf"\b(?:rate|increase)\({name}\b", query)


def test_boards_have_unique_panels_that_do_not_overlap():
    for path in BOARDS:
        panels = json.loads(path.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells = [
            (x, y)
            for grid in (panel["gridPos"] for panel in panels)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24


def test_every_alert_names_a_line_of_the_runbook():
    for rule in rules():
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_scrape_targets_come_from_status():
    targets = runpy.run_path(str(DEPLOY / "prometheus" / "targets.py"))["targets"]
    status = {
        "name": "main",
        "nodes": [{"metrics": "http://127.0.0.1:9100/metrics"}, {"metrics": "127.0.0.1:9101"}],
        "workers": [{"metrics": None}, {"metrics": "http://127.0.0.1:9200"}],
    }
    assert targets(status) == [
        {"targets": ["127.0.0.1:9100", "127.0.0.1:9101"], "labels": {"role": "node", "system": "main"}},
        {"targets": ["127.0.0.1:9200"], "labels": {"role": "worker", "system": "main"}},
    ]


def test_prometheus_configuration_points_at_our_rules():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert config["rule_files"] == [RULES.name]
    assert {job["job_name"] for job in config["scrape_configs"]} == set(re.findall(r'job="(\w+)"', RULES.read_text()))
