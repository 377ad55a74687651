"""The service under a real systemd, which is booted once in namespaces of its own: see `boot`, `scenarios.py`. Each
test judges what one scenario found there."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.tools import needs, needs_root

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
SECONDS = 290
STATUS = (
    r"^(training|waiting for data) \| step (\d+) \| tokens (\d+) \| \S+ tokens/s \| loss y \S+ \| hold-out x \S+ \| "
    r"commit .+ \| export .+ \| lag .+"
)

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the scenarios found, by their name. Of several workers one boots, the others wait for it."""
    needs("systemctl", "apt-get install systemd")
    needs("unshare", "apt-get install util-linux")
    needs_root("booting a systemd in namespaces")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    work = (tmp_path_factory.getbasetemp().parent if worker else tmp_path_factory.getbasetemp()) / "real-systemd"
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (work / "code").exists():
            (work / "code").write_text(str(boot(work)))
    code = int((work / "code").read_text())
    if code == 75:
        # The one reason to skip in CI as well: the kernel says no, which no package puts right.
        pytest.skip(f"NO NAMESPACES HERE, so the service was not tried under a systemd: {(work / 'boot').read_text()}")
    log = "\n".join((work / name).read_text() for name in ("boot", "err") if (work / name).exists())
    assert code == 0, f"exit {code}\n{log}"
    found = {told.pop("scenario"): told for told in map(json.loads, (work / "out").read_text().splitlines())}
    if not found:
        pytest.fail(f"nothing was told\n{log}")
    return found


def boot(work: Path) -> int:
    """Boot and run the scenarios on what these tests themselves run with."""
    binds = [f"{CHECKOUT}=/opt/checkout"]
    sites = [path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages") and path.is_dir()]
    binds += [f"{path}=/opt/sites/{i}" for i, path in enumerate(sites)]
    ours = ["/opt/checkout", "/opt/checkout/daemon", "/opt/checkout/adapters"]
    paths = ":".join([*ours, *(f"/opt/sites/{i}" for i in range(len(sites)))])
    command = ["env", f"PYTHONPATH={paths}", "PYTHONDONTWRITEBYTECODE=1"]
    base, python = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    if base.parts[:2] != ("/", "usr"):  # in somebody's home perhaps, which no service sees
        binds.append(f"{base}=/opt/python")
        base = Path("/opt/python")
        command.append(f"LD_LIBRARY_PATH={base}/lib")
    command += [f"{base}/bin/{python}", "-m", "tests.systemd.scenarios"]
    return subprocess.run([HERE / "boot", work, str(SECONDS), *binds, "--", *command], check=False).returncode


def scenario(booted: Found, name: str) -> dict[str, Any]:
    assert name in booted, f"{name} did not run; those that did: {', '.join(booted)}"
    found = booted[name]
    assert "error" not in found, found["error"]
    return found


def test_install_service_writes_enables_and_returns_once_it_is_ready(booted: Found) -> None:
    found = scenario(booted, "installed")
    assert found["right_after"]["ActiveState"] == "active"
    assert found["right_after"]["UnitFileState"] == "enabled"
    assert found["told"].count("written") == 4
    assert found["again"].count("as it was") == 4
    assert "anytimed@demo.service runs" in found["told"]
    assert list(found["modes"].values()) == ["0o644", "0o600", "0o700", "0o700"]


def test_it_trains_inside_the_whole_sandbox(booted: Found) -> None:
    found = scenario(booted, "installed")
    sandbox = found["sandbox"]
    assert found["loss"] > 0
    assert 61184 <= sandbox["uid"] <= 65519  # a DynamicUser's
    assert sandbox["status"] == {
        "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"
    }  # fmt: skip
    assert all(error in ("OSError", "PermissionError") for error in sandbox["writes"].values()), sandbox["writes"]
    assert sandbox["reads"]["/root"] == sandbox["reads"]["/home"] == "PermissionError"
    assert sandbox["namespace"] == "EPERM"
    assert sandbox["processes"] == []
    assert not {"kmsg", "mem", "vda", "sda"} & set(sandbox["devices"])
    assert sandbox["umask"] == "0077"


def test_credentials_of_the_credstore_reach_the_daemon_and_their_source_stays_closed(booted: Found) -> None:
    sandbox = scenario(booted, "installed")["sandbox"]
    assert sandbox["token"] == "a-token-of-the-test\n"
    assert sandbox["hf_token"] == "another token\n"  # which lies on the disk encrypted
    assert sandbox["token_of_others"] == "PermissionError"


def test_a_start_is_ready_only_where_the_commit_left_off(booted: Found) -> None:
    found = scenario(booted, "stopped_and_resumed")
    assert found["after"]["Result"] == "success"
    assert found["after"]["ExecMainStatus"] == "0"
    assert found["resumed"] == [found["committed"]]
    assert found["seen"]
    assert set(found["seen"]) == {"activating"}
    resumed, ready = found["order"]
    assert f"resumed step {found['committed']} " in resumed
    assert ready.startswith("Started anytimed@demo.service")


def test_the_status_says_step_tokens_loss_and_ages_and_goes_on(booted: Found) -> None:
    found = scenario(booted, "stopped_and_resumed")
    first, later = (re.match(STATUS, found[name]) for name in ("status_text", "later_text"))
    assert first is not None, found["status_text"]
    assert later is not None, found["later_text"]
    assert int(first[2]) == found["committed"] < int(later[2])
    assert int(later[3]) == 128 * int(later[2])
    assert re.search(r'Status: "training \| step \d+', found["systemctl_status"])


def test_a_reload_is_applied_or_named_and_then_nothing_of_it_is(booted: Found) -> None:
    found = scenario(booted, "reloads")
    assert found["applied"]["changed"] == ["[logging] every_steps"]
    assert found["applied"]["error"] is None
    assert "[commits] unknown key kep; did you mean keep?" in found["refused"]["error"]
    assert found["refused"]["changed"] == []
    assert found["named"]
    assert found["same_process"]
    assert found["commits_since"]
    assert all(step % 10 == 0 for step in found["commits_since"])  # commits every 10, not every 9 steps


@pytest.mark.parametrize(
    ("name", "result"), [("killed", "signal"), ("stuck", "watchdog"), ("stopped_by_sigstop", "watchdog")]
)
def test_what_was_killed_or_hangs_is_restarted_and_goes_on_from_its_commit(
    booted: Found, name: str, result: str
) -> None:
    found = scenario(booted, name)
    assert found["restarts"] == 1
    assert f"anytimed@demo.service: Failed with result '{result}'." in found["told"]
    assert found["resumed"][0] >= found["committed"]
    assert found["now"] >= found["resumed"][0] + 3
    if result == "watchdog":
        assert any("Watchdog timeout" in line for line in found["told"])


def test_a_stuck_main_thread_hangs_it_though_its_socket_still_answers(booted: Found) -> None:
    assert scenario(booted, "stuck")["answered_while_stuck"] == ["training"]


def test_a_bad_configuration_ends_with_2_and_is_not_started_again(booted: Found) -> None:
    found = scenario(booted, "bad_configuration")
    assert (found["unit"]["ExecMainStatus"], found["unit"]["NRestarts"]) == ("2", "0")
    assert found["unit"]["ActiveState"] == "failed"
    assert any("unknown key bach_size; did you mean batch_size?" in line for line in found["told"])


def test_onfailure_tells_why_in_the_journal_and_hands_it_to_a_command(booted: Found) -> None:
    found = scenario(booted, "bad_configuration")
    said = [line["text"] for line in found["failure"] if line["priority"] == 3]
    assert said[0].startswith("anytimed@bad has failed and stays stopped: its configuration is wrong")
    assert said[0].endswith("(exit-code, exited 2).")
    assert any("did you mean batch_size?" in line for line in said)
    assert said[0] in found["command"]
    assert any("did you mean batch_size?" in line for line in found["command"])


def test_a_second_instance_on_the_run_ends_with_3_and_the_first_goes_on(booted: Found) -> None:
    found = scenario(booted, "refused")
    assert (found["twin"]["ExecMainStatus"], found["twin"]["NRestarts"]) == ("3", "0")
    assert any("another writer holds this run" in line for line in found["told"])
    assert found["demo_untouched"]


def test_five_failures_in_a_row_are_the_limit(booted: Found) -> None:
    found = scenario(booted, "start_limit")
    assert found["starts"] == 5
    assert found["unit"]["ActiveState"] == "failed"
    assert any("stays stopped: it failed too often" in line for line in found["told"])


def test_a_stop_during_a_commit_leaves_a_good_one_of_the_last_step(booted: Found) -> None:
    found = scenario(booted, "stopped_during_a_commit")
    for stop in found["stops"]:
        assert stop["writing"]
        assert stop["unit"]["Result"] == "success"
        assert stop["unit"]["ExecMainStatus"] == "0"
        assert f"Committed step {stop['newest']} in " in stop["said"]
        assert stop["newest"] >= stop["at"]
        assert stop["left"] == []
    assert found["verified"]
    assert found["checked"].count("commit") == 3


def test_a_consumer_is_ready_with_a_checkpoint_and_its_command_runs_after_each_change(booted: Found) -> None:
    found = scenario(booted, "consumer")
    assert found["unit"]["ActiveState"] == "active"
    assert "anytimed-pull@up.service runs" in found["told"]
    ids = [line.split()[0] for line in found["changes"]]
    assert ids[0] == found["first"] < found["exported"]["checkpoint"] <= ids[1]
    assert all(line.endswith(" anytimed-pull") for line in found["changes"])


def test_who_serves_may_read_what_was_pulled_and_is_restarted_by_a_path_unit(booted: Found) -> None:
    found = scenario(booted, "consumer")
    # On a busy machine one restart may stand for several changes, and one that comes between a switch and the command
    # after it is followed by one that serves the same. It never goes back to an older one.
    changes = [f"versions/{line.split()[0]}" for line in found["changes"]]
    assert changes == sorted(set(changes))
    assert found["served"][0] == f"versions/{found['first']}"
    assert set(found["served"][1:]) <= {*changes, f"versions/{found['newest']}"}
    assert found["served"] == sorted(found["served"])
    assert found["served"][-1] > found["served"][0]
    assert len(changes) >= 2
    assert set(found["read"]) == {"8"}
    assert found["owner"] == "anytimed-pull"
    assert found["left"] == ["/etc/systemd/system/anytimed-pull@.service.d"]  # the drop-in of this test


def test_a_user_has_a_service_without_root(booted: Found) -> None:
    found = scenario(booted, "of_a_user")
    assert found["unit"]["ActiveState"] == "active"
    assert re.match(STATUS, found["text"])
    assert (found["owner"], found["mode"]) == ("ada", "0o700")
    assert "enable-linger" in found["told"]
    assert found["after"]["ActiveState"] == "inactive"
    assert found["commits"]
    assert sorted(found["left"]) == [
        ".cache/anytimed/mine", ".config/anytimed/mine.toml.removed", ".local/state/anytimed/mine", "mine.toml"
    ]  # fmt: skip


def test_an_uninstall_keeps_what_was_trained_and_units_that_others_need(booted: Found) -> None:
    found = scenario(booted, "removed")
    assert found["unit"]["ActiveState"] == "inactive"
    assert found["unit"]["UnitFileState"] in ("disabled", "")
    assert found["template"]
    assert found["newest"] > 0
    assert "demo.toml.removed" in found["stays"]
    # With --purge, and nobody else left: all but the drop-ins of these tests.
    assert all(path.endswith(".service.d") for path in found["left"]), found["left"]
