"""`install-service` and `uninstall-service` below a prefix: what is written, what is refused, what stays."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anytimed.cli.app import app, out
from anytimed.config import load
from anytimed.contracts import AnytimedError, ConfigError
from anytimed.service import installation, reach
from anytimed.service.installation import Places, wanted
from anytimed.service.own_files import marked, unchanged, write
from anytimed.urls import told
from tests import tiny

UNITS = "etc/systemd/system"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """One that means the same wherever it lies and whoever runs it."""
    tables = {
        "run": {"directory": "state/run"},
        "exports": {"url": "state/published"},
        "sources.main": {"url": "/srv/data/*.txt"},
    }
    return tiny.config(tmp_path, **tables)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "_width", 250)


def command(*arguments: str | Path, expect: int = 0) -> str:
    """What `anytimed ARGUMENTS` says, in this process; it has to end with the exit code `expect`."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    error = result.exception
    code, said = (error.exit_code, told(str(error))) if isinstance(error, AnytimedError) else (result.exit_code, "")
    assert code == expect, (result.output, said, error)
    return result.output + said


def install(prefix: Path, *more: str | Path, name: str = "demo", expect: int = 0) -> str:
    return command("install-service", name, "--prefix", prefix, *more, expect=expect)


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(files)}


def test_it_writes_units_of_this_very_program_and_is_idempotent(tmp_path: Path, config: Path) -> None:
    prefix = tmp_path / "root"
    tiny.run("install-service", "demo", "--prefix", prefix, "--config", config)
    first = tree(prefix)
    assert sorted(first) == [
        "etc/anytimed/demo.env",
        "etc/anytimed/demo.toml",
        f"{UNITS}/anytimed-failure@.service",
        f"{UNITS}/anytimed@.service",
    ]
    program = " ".join(installation.program())
    assert Path(program.split()[0]).parent == Path(sys.executable).parent
    assert f"\nExecStart={program} run /etc/anytimed/%i.toml\n" in first[f"{UNITS}/anytimed@.service"]
    assert first["etc/anytimed/demo.toml"] == config.read_text()
    assert all(line.startswith("#") for line in first["etc/anytimed/demo.env"].splitlines())  # no secret in it
    modes = {name: stat.S_IMODE((prefix / name).stat().st_mode) for name in first}
    assert modes["etc/anytimed/demo.env"] == 0o600
    assert set(modes.values()) == {0o600, 0o644}
    times = {name: (prefix / name).stat().st_mtime_ns for name in first}
    assert install(prefix, "--config", config).count("as it was") == 4
    assert {name: (prefix / name).stat().st_mtime_ns for name in first} == times


def test_the_umask_of_the_shell_closes_nothing_that_a_service_has_to_read(tmp_path: Path, config: Path) -> None:
    before = os.umask(0o077)
    try:
        install(tmp_path / "root", "--config", config)
    finally:
        os.umask(before)
    for path in (tmp_path / "root").rglob("*"):
        open_to_all = stat.S_IMODE(path.stat().st_mode) & 0o055
        assert open_to_all == (0o055 if path.is_dir() else 0 if path.suffix == ".env" else 0o044), path


def test_a_dry_run_writes_nothing(tmp_path: Path, config: Path) -> None:
    told = install(tmp_path / "root", "--config", config, "--dry-run")
    assert told.count("would be written") == 4
    assert not (tmp_path / "root").exists()


def test_what_somebody_has_changed_is_shown_and_nothing_is_written_without_force(tmp_path: Path, config: Path) -> None:
    prefix = tmp_path / "root"
    install(prefix, "--config", config)
    unit, environment = prefix / UNITS / "anytimed@.service", prefix / "etc/anytimed/demo.env"
    edited = unit.read_text().replace("WatchdogSec=5min", "WatchdogSec=1h")
    unit.write_text(edited)
    environment.write_text("AWS_SECRET_ACCESS_KEY=abc\n")
    config.write_text(config.read_text() + "# changed\n")
    before = tree(prefix)
    told = install(prefix, "--config", config, expect=2)
    assert "-WatchdogSec=1h" in told
    assert "+WatchdogSec=5min" in told
    assert "+# changed" in told
    assert "--force" in told
    assert tree(prefix) == before
    install(prefix, "--config", config, "--force")
    assert "WatchdogSec=5min" in unit.read_text()
    assert unit.with_name("anytimed@.service.old").read_text() == edited
    # Variables are their administrator's, whatever is forced.
    assert environment.read_text() == "AWS_SECRET_ACCESS_KEY=abc\n"


def test_a_unit_of_an_earlier_version_that_nobody_changed_is_replaced(tmp_path: Path) -> None:
    prefix = tmp_path / "root"
    places = Places("demo", "run", prefix=prefix)
    files = wanted(places, config="x")
    write(files)
    old = marked("[Service]\nExecStart=/an/older/one\n")
    files[0].path.write_text(old)
    assert [found for _, found in write(files)] == ["outdated", "same", "same", "same"]
    assert files[0].path.read_text() == files[0].text
    assert unchanged(files[0].text)
    assert not unchanged(files[0].text.replace("Restart=", "Restart= "))


def test_a_consumer_is_told_its_url_and_command_and_changes_of_them_are_not_shown(tmp_path: Path) -> None:
    prefix = tmp_path / "root"
    install(prefix, "--pull", "s3://bucket/x", "--exec", "systemctl restart 'a b'")
    environment = prefix / "etc/anytimed/pull/demo.env"
    assert stat.S_IMODE(environment.stat().st_mode) == 0o600
    given = [line for line in environment.read_text().splitlines() if not line.startswith("#")]
    assert given == ["ANYTIMED_URL=s3://bucket/x", "ANYTIMED_PULL_OPTIONS=--exec \"systemctl restart 'a b'\""]
    assert (prefix / "etc/sysusers.d/anytimed.conf").read_text().splitlines()[-1].startswith("u anytimed-pull ")
    install(prefix, "--pull", "s3://bucket/y")  # nobody has changed the file: it may be written anew
    assert "s3://bucket/y" in environment.read_text()
    environment.write_text(environment.read_text() + "AWS_SECRET_ACCESS_KEY=verysecret\n")
    told = install(prefix, "--pull", "s3://bucket/z", expect=2)
    assert "has been changed" in told
    assert "verysecret" not in told
    assert "verysecret" in environment.read_text()


def test_an_uninstall_leaves_what_others_use_and_what_was_trained(tmp_path: Path, config: Path) -> None:
    prefix = tmp_path / "root"
    install(prefix, "--config", config)
    install(prefix, "--config", config, name="other")
    install(prefix, "--pull", "s3://bucket/x", name="up")
    state = prefix / "var/lib/private/anytimed/demo"
    state.mkdir(parents=True)
    (state / "commit").write_text("weights")
    link = prefix / "var/lib/anytimed/demo"
    link.parent.mkdir()
    link.symlink_to("../private/anytimed/demo")
    (prefix / "etc/anytimed/demo.env").write_text("KEY=kept\n")
    unit, failure = (prefix / UNITS / name for name in ("anytimed@.service", "anytimed-failure@.service"))

    assert "nothing of it is installed" in command("uninstall-service", "demo", "--pull", "--prefix", prefix, expect=2)
    before = tree(prefix)
    assert "would be" in command("uninstall-service", "demo", "--prefix", prefix, "--dry-run")
    assert tree(prefix) == before
    told = command("uninstall-service", "demo", "--prefix", prefix)
    assert "anytimed@other.service" in told
    assert (prefix / "etc/anytimed/demo.toml.removed").read_text() == config.read_text()
    assert (prefix / "etc/anytimed/demo.env.removed").read_text() == "KEY=kept\n"
    assert (state / "commit").read_text() == "weights"
    assert unit.exists()

    command("uninstall-service", "other", "--prefix", prefix)
    assert not unit.exists()
    assert failure.exists()  # the consumer's too
    command("uninstall-service", "up", "--prefix", prefix, "--pull")
    assert not failure.exists()
    command("uninstall-service", "demo", "--prefix", prefix, "--purge", "--yes")
    assert not state.exists()
    assert not link.is_symlink()
    assert not any(name.startswith("etc/anytimed/demo") for name in tree(prefix))
    command("uninstall-service", "demo", "--prefix", prefix, expect=2)


def test_a_changed_unit_stays(tmp_path: Path, config: Path) -> None:
    install(tmp_path / "root", "--config", config)
    unit = tmp_path / "root" / UNITS / "anytimed@.service"
    unit.write_text(unit.read_text() + "# mine\n")
    assert "somebody has changed it" in command("uninstall-service", "demo", "--prefix", tmp_path / "root")
    assert unit.exists()


@pytest.mark.parametrize("name", ["", "-x", "a/b", "../x", "a b", "a@b", "a.b", "x" * 49, "ä"])
def test_names_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="NAME: found"):
        Places(name, "run")


def test_a_configuration_is_refused_that_would_give_secrets_away_or_mean_something_else(
    tmp_path: Path, config: Path
) -> None:
    prefix = tmp_path / "root"
    good = config.read_text()
    config.write_text(good.replace("[exports]", '[exports]\nstorage_options = { secret = "hunter2hunter2" }'))
    told = install(prefix, "--config", config, expect=2)
    assert "holds credentials" in told
    assert "hunter2" not in told
    config.write_text(good.replace("[run]", "[rum]"))
    assert "unknown key rum" in install(prefix, "--config", config, expect=2)
    config.write_text(good)
    above = tmp_path / "above.toml"
    above.write_text(f'based_on = "{config.name}"\n')
    assert "based_on names a file" in install(prefix, "--config", above, expect=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    config.write_text(good.replace('type = "bytes"', 'type = "huggingface"\npath = "tokenizer.json"'))
    assert "expected an absolute path" in install(prefix, "--config", config, expect=2)
    config.write_text(good)
    config.chmod(0o666)
    assert "everybody can write it" in install(prefix, "--config", config, expect=2)
    assert not prefix.exists()


def test_what_the_sandbox_hides_is_said(tmp_path: Path) -> None:
    tables = {
        "run": {"directory": "/data/run"},
        "exports": {"url": "s3://bucket/x"},
        "sources.main": {"url": "/home/ada/texts/*.txt"},
        "sources.near": {"type": "text", "url": "near/*.txt"},
    }
    said = list(reach.configuration(load(tiny.config(tmp_path, **tables)), Path("/var/lib/anytimed/demo")))
    assert len(said) == 3
    assert said[0].startswith("[run] directory = /data/run: the service can write below /var/lib/anytimed/demo only")
    assert said[1].startswith("[sources.main] url = /home/ada/texts/*.txt: the service does not see /home")
    assert "/var/lib/anytimed/demo/near/*.txt" in said[2]


def test_a_closed_folder_above_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_HIDDEN", ())
    # Not below pytest's own folder, which is closed to other users.
    with tempfile.TemporaryDirectory(prefix="anytimed-") as folder:
        closed = Path(folder)
        (closed / "deeper").mkdir()
        closed.chmod(0o755)
        assert reach.closed(closed / "deeper") == ""
        closed.chmod(0o700)
        assert reach.closed(closed / "deeper") == f"{closed} (mode 0700) is closed to other users"


def test_only_one_kind_and_only_where_systemd_runs(tmp_path: Path, config: Path) -> None:
    assert "one of them" in command("install-service", "demo", expect=2)
    assert "goes with --pull" in command("install-service", "demo", "--config", config, "--exec", "x", expect=2)
    if not Path("/run/systemd/system").exists():
        assert "systemd does not run here" in command("install-service", "demo", "--config", config, expect=1)


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("/opt/a", "/opt/a"),
        ("/a b/c", '"/a b/c"'),
        ("/50%/$x", "/50%%/$$x"),
        ('/a"b', '"/a\\"b"'),
        ("/a\\b", '"/a\\\\b"'),
    ],
)
def test_paths_are_words_of_a_unit(word: str, quoted: str) -> None:
    assert installation._quoted(word) == quoted
