"""configs/prometheus and GET /metrics, by Prometheus' own tool: names and help, rules that fire and do not, and no rule
or panel on a figure that a daemon does not tell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from anytimed.contracts import Json
from anytimed.service import exposition
from anytimed.service.exposition import exposed
from tests import tiny
from tests.service.test_api import asked
from tests.service.test_daemon import running, status, until

CONFIGS = Path(__file__).parent.parent / "configs" / "prometheus"


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        assert not os.environ.get("CI"), "promtool is missing; .ci/run unpacks it"
        pytest.skip("promtool is missing: apt-get install --no-install-recommends prometheus")
    return found


def passes(promtool: str, *arguments: str, given: bytes | None = None) -> str:
    done = subprocess.run([promtool, *arguments], input=given, capture_output=True, cwd=CONFIGS, check=False)
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Json]:
    """What a daemon with everything that has figures answers: GET /metrics, and its status."""
    folder = tmp_path_factory.mktemp("told")
    tiny.write_text(folder / "data", 24)
    config = tiny.config(
        folder,
        **{
            "commits": {"mirror_url": str(folder / "mirror"), "every_steps": 7},
            "sinks.board": {"type": "tensorboard"},
        },
    )
    with running(config) as process:
        until(process, lambda: status(folder)["state"] == "waiting for data")
        until(process, lambda: (status(folder)["mirror"] or {}).get("commit") and status(folder)["export"])
        until(process, lambda: status(folder)["store"]["enforced"] is not None)
        tiny.run("reload", folder / "run")
        return asked(folder, "GET", "/metrics")[1], status(folder)


def with_everything(status: Json) -> Json:
    """A status with what this machine has not, and 50 sources whose names need escaping."""
    source = status["sources"]["main"]
    return {
        **status,
        "sources": {f"source-{number}": {**source, "rejected": number} for number in range(49)} | {'a"b\\c\nd': source},
        "upload": {"checkpoint": "c", "done_bytes": 1, "total_bytes": 2, "bytes_per_s": 1.0, "left_s": None},
        "accelerator": {"name": "G", "memory_used_bytes": 1 << 30, "memory_total_bytes": 4 << 30, "utilisation": 0.25},
        "interventions": {"rollback": 2, "of tomorrow": 1},
        "verification": {"time": 5.0, "commits": 1, "rotten": [], "found": ""},
        "state": "paused",
    }


def names(text: bytes) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text.decode()) for sample in family.samples}


def test_promtool_finds_nothing_to_say_about_the_metrics(promtool: str, told: tuple[bytes, Json]) -> None:
    text, status = told
    assert passes(promtool, "check", "metrics", given=text) == ""
    many = exposed(with_everything(status))
    assert passes(promtool, "check", "metrics", given=many) == ""
    assert many.count(b"anytimed_source_records_total{") == 50
    # The tool is not silent about everything.
    bad = many.replace(b"# HELP anytimed_steps_total Optimizer steps.\n", b"")
    assert subprocess.run([promtool, "check", "metrics"], input=bad, capture_output=True, check=False).returncode


def test_what_the_status_says_is_what_is_exposed(told: tuple[bytes, Json]) -> None:
    status = with_everything(told[1])
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(exposed(status).decode())
        for sample in family.samples
    }
    assert found["anytimed_disk_available_bytes",] == status["disk"]["free_bytes"] > 0
    assert found["anytimed_disk_size_bytes",] == status["disk"]["total_bytes"]
    assert found["anytimed_interventions_total", "rollback"] == 2
    assert found["anytimed_interventions_total", "of tomorrow"] == 1
    assert found["anytimed_interventions_total", "spike"] == 0
    assert found["anytimed_accelerator_memory_size_bytes", "G"] == 4 << 30
    assert found["anytimed_accelerator_utilisation_ratio", "G"] == 0.25
    assert found["anytimed_upload_done_bytes",] == 1
    assert found["anytimed_lease_held",] == 1
    assert found["anytimed_store_enforces_conditions",] == status["store"]["enforced"]
    assert found["anytimed_export_waiting",] == 0
    assert found["anytimed_sink_records_written_total", "board"] == status["sinks"]["board"]["written"] > 0
    assert found["anytimed_sink_records_dropped_total", "board"] == found["anytimed_sink_failing", "board"] == 0
    assert found["anytimed_state_since_timestamp_seconds",] == status["since"]
    assert found["anytimed_status_timestamp_seconds",] == status["time"]
    assert found["anytimed_source_rejected_total", "source-48"] == 48
    assert found["anytimed_state", "paused"] == 1
    assert found["anytimed_last_mirrored_commit_timestamp_seconds",] == status["mirror"]["commit"]["time"]


def test_an_answer_is_the_librarys_own_whatever_was_asked_before(told: tuple[bytes, Json]) -> None:
    """Only numbers are put into the last answer's text: series that come, go and change their names begin a new one."""
    full, plain = with_everything(told[1]), told[1]
    renamed = {**plain, "sources": {"another": plain["sources"]["main"]}}
    moved = {**plain, "step": 10**15, "loss": 1e-9, "tokens_per_s": None, "since": 1.5e9, "skipped": 12345678}
    for given in (plain, moved, full, renamed, {**moved, "loss": 3.0}, full, {**plain, "term": 9}, plain):
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Given(given))
        library = generate_latest(registry)
        ours = exposed(given)
        assert ours.startswith(library) and ours.endswith(b"\n")
        assert {name.split("_")[0] for name in names(ours[len(library) :])} == {"process"}


class Given(Collector):
    def __init__(self, status: Json) -> None:
        self.status = status

    def collect(self) -> Iterator[Metric]:
        return exposition.figures_of(self.status)


def test_rules_and_scrape_configuration_are_good_and_every_alert_fires_where_it_should(promtool: str) -> None:
    rules = alerts()
    assert f"{len(rules)} rules found" in passes(promtool, "check", "rules", "alerts.yml")
    assert "is valid prometheus config file" in passes(promtool, "check", "config", "scrape.yml")
    assert "SUCCESS" in passes(promtool, "test", "rules", "alerts.test.yml")
    tested = yaml.safe_load((CONFIGS / "alerts.test.yml").read_text())["tests"]
    assert {test["name"] for test in tested} == {rule["alert"] for rule in rules}
    for test in tested:
        expected = [bool(case["exp_alerts"]) for case in test["alert_rule_test"]]
        assert expected == [False, True], test["name"]


def alerts() -> list[Json]:
    (group,) = yaml.safe_load((CONFIGS / "alerts.yml").read_text())["groups"]
    rules: list[Json] = group["rules"]
    return rules


def test_every_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f'README.md, "What each alert means": {rule["alert"]}'


_QUOTED = re.compile(r'"[^"]*"')
_METRIC = re.compile(r"\b(?:anytimed|process)_\w+")


def used(expression: str) -> set[str]:
    return set(_METRIC.findall(_QUOTED.sub('""', expression)))


def test_rules_and_dashboard_ask_for_what_a_daemon_tells(told: tuple[bytes, Json]) -> None:
    text, status = told
    there = names(text) | names(exposed(with_everything(status)))
    in_rules = {name for rule in alerts() for name in used(rule["expr"])}
    on_board = {name for expression in expressions(board()) for name in used(expression)}
    assert len(in_rules) > 15 and len(on_board) > 30
    assert in_rules - there == on_board - there == set()
    # And everything that is told is looked at by a person: there is a panel, or it says when and what, for tables.
    plain = {name for name in there if name.startswith("anytimed_")} - on_board
    assert plain <= {
        "anytimed_holdout_step",
        "anytimed_config_last_reload_success_timestamp_seconds",
        "anytimed_last_mirrored_commit_step",
        "anytimed_last_verification_timestamp_seconds",
        "anytimed_sink_records_written_total",
        "anytimed_source_records_total",
        "anytimed_source_held_out_total",
        "anytimed_source_entries_total",
    }, plain


def board() -> Json:
    found: Json = json.loads((CONFIGS / "grafana.json").read_text())
    return found


def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "query", "definition") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def test_the_dashboard_is_one_that_grafana_takes(promtool: str, tmp_path: Path) -> None:
    told = board()
    assert told["uid"] and told["title"] and told["schemaVersion"] >= 36
    variables = {variable["name"] for variable in told["templating"]["list"]}
    panels = told["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(set(references)) == len(references)
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    asked_for = [e for e in expressions(told) if used(e) and not e.startswith("label_values")]
    assert {name for e in asked_for for name in re.findall(r"\$(\w+)", e)} <= variables
    # Every expression is one that Prometheus can read.
    rules = [{"record": f"r:{i}", "expr": e} for i, e in enumerate(dict.fromkeys(asked_for))]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    passes(promtool, "check", "rules", str(tmp_path / "rules.yml"))
