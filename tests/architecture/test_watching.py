"""Every metric, label, reason and file that the alert rules, the dashboard and the pages name exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from shardloss import errors
from shardloss_server import metrics
from shardloss_server.cli.metrics import page
from shardloss_server.rpc.call import CANCELLED, OK

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/shardloss.json").read_text())
GROUPS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
OF_THE_LIBRARY = {
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
}
OF_PROMETHEUS = {"instance", "job", "le"}
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}
EXPORTED = {each.name + suffix: each for each in metrics.ALL for suffix in SUFFIXES[each.kind]}
SELECTOR = re.compile(r"\b((?:shardloss|process)_\w+)(\{[^}]*\})?")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"((?:[^"\\]|\\.)*)"')
GROUPING = re.compile(r"\b(?:by|on|group_left|without)\s*\(([^)]*)\)")
REASONS = {leaf.reason for leaf in errors.leaves()} | {OK, CANCELLED}


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def expressions() -> Iterator[tuple[str, str]]:
    """Return (place, expression) of every Prometheus query in the rules and the dashboard."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        yield variable["name"], variable["definition"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


@pytest.mark.parametrize("expression", [each[1] for each in expressions()], ids=[each[0] for each in expressions()])
def test_what_prometheus_is_asked_is_exported_with_its_labels(expression: str) -> None:
    """Every metric, label and reason in a query is one that the server exports."""
    has_labels = set(OF_PROMETHEUS)
    for name, matchers in SELECTOR.findall(expression):
        if name in OF_THE_LIBRARY:
            continue
        metric = EXPORTED[name]
        has_labels |= set(metric.labels)
        for label, _, value in MATCHER.findall(matchers):
            assert label in {*metric.labels, *OF_PROMETHEUS}, f"{name} has no label {label}"
            if label == "reason":
                assert set(value.split("|")) <= REASONS
    for labels in GROUPING.findall(expression):
        assert {label.strip() for label in labels.split(",") if label.strip()} <= has_labels
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    """Every alert has a duration, a severity, a summary and a chapter of more than one line in the runbook."""
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"]
    file, anchor = rule["annotations"]["runbook"].split("#")
    chapters = re.split(r"^### ", (ROOT / file).read_text(), flags=re.M)[1:]
    by_anchor = {chapter.splitlines()[0].lower(): chapter for chapter in chapters}
    assert anchor == rule["alert"].lower()
    assert len(by_anchor[anchor]) > 80


def test_the_runbook_has_no_chapter_of_an_alert_that_there_is_not() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"^### (\w+)$", text, re.M)) == {rule["alert"] for rule in RULES}
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_every_panel_has_an_id_of_its_own_a_place_and_a_meaning() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    folder = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    asked = {each["datasource"]["uid"] for panel in panels() for each in panel.get("targets", ())}
    assert asked == {source["uid"]}
    (provider,) = yaml.safe_load((folder / "dashboards/shardloss.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


def test_prometheus_reads_the_rules_and_scrapes_the_server() -> None:
    folder = ROOT / "deploy/prometheus"
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert all((folder / name).exists() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "shardloss"  # the job that rules and dashboard select
    assert job["static_configs"] == [{"targets": ["server:9464"]}]


def test_the_page_documents_every_metric() -> None:
    """docs/metrics.md is identical to the output of `make docs`."""
    text = (ROOT / "docs/metrics.md").read_text()
    assert text == "\n".join(page()) + "\n"
    assert set(re.findall(r"^\| `(shardloss_\w+)` \|", text, re.M)) == {each.name for each in metrics.ALL}


def test_names_end_in_their_unit() -> None:
    """Names follow the Prometheus conventions: base units, and the suffix _total for counters only."""
    for each in metrics.ALL:
        assert re.fullmatch(r"shardloss_[a-z0-9_]+", each.name)
        assert each.name.endswith("_total") == (each.kind == "counter")
        for unit in ("seconds", "bytes"):
            if each.unit == unit:
                assert unit in each.name
        assert each.meaning.endswith(".")


UNIT_OF = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit"}  # of a metric's suffix, in the dashboard's words


@pytest.mark.parametrize(
    ("title", "unit", "expression"),
    [
        (panel["title"], panel["fieldConfig"]["defaults"].get("unit", "none"), target["expr"])
        for panel in panels()
        for target in panel.get("targets", ())
    ],
)
def test_a_panel_has_the_unit_of_its_metrics(title: str, unit: str, expression: str) -> None:
    """A quotient of equal units has none, a rate of bytes is bytes per second, and a rate of calls is per second."""
    names = [name for name, _ in SELECTOR.findall(expression)]
    name = re.sub(r"_(total|bucket|sum|count|limit)$", "", names[0])
    suffix = UNIT_OF.get(name.rsplit("_", 1)[-1], "none")
    is_quantile_or_mean = "histogram_quantile" in expression or "_sum" in expression
    if "/" in expression and not is_quantile_or_mean:
        expected = "percentunit"
    elif "rate(" in expression and not is_quantile_or_mean:
        per_second = {"bytes": "Bps", "s": "none"}  # CPU seconds per second are cores
        expected = per_second.get(suffix, "reqps" if re.search("calls|refusals|replays", name) else "none")
    else:
        expected = suffix
    assert unit == expected, (title, expression)


def test_the_rules_pass_their_unit_tests() -> None:
    """Each alert is quiet, and fires when it should, with its text; promtool runs the tests, if it is installed."""
    tests = yaml.safe_load((ROOT / "deploy/prometheus/alerts_test.yml").read_text())["tests"]
    assert {test["name"] for test in tests} == {rule["alert"] for rule in RULES}
    if shutil.which("promtool") is None:
        pytest.skip("no promtool is here")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command],
            cwd=ROOT / "deploy/prometheus",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
