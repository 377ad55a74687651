"""A configuration that somebody else can write decides what runs as us: it is not read."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from anytimed.config import load
from anytimed.contracts import ConfigError
from tests import tiny
from tests.faults.tools import needs_root
from tests.service.test_daemon import running, status, until


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny.write_text(tmp_path / "data", 3)
    return tiny.config(tmp_path)


def refused(config: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(config)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o400, 0o755])
def test_what_only_its_owner_can_write_is_read(config: Path, mode: int) -> None:
    config.chmod(mode)
    assert load(config).run.seed == 7


def test_writable_by_everybody_is_refused_from_the_command_line_with_2(config: Path) -> None:
    config.chmod(0o666)
    for command in ("check", "run", "status"):
        told = tiny.run(command, config, expect=2)
        assert (
            "mode 0666" in told
            and f"chmod go-w {config}" in told
            and "owner root" in told.replace(f"owner {os.environ.get('USER', 'root')}", "owner root")
        )
    assert not (config.parent / "run").exists(), "nothing was begun"


AS_ADA = """
import grp, os, pwd, sys
from pathlib import Path
from anytimed.config import load
from anytimed.contracts import ConfigError
users = {1000: ("ada", 1000), 1001: ("bob", 100), 0: ("root", 0)}
groups = {1000: ("ada", sys.argv[2].split()), 100: ("users", ["ada"]), 0: ("root", [])}
def user(uid): return pwd.struct_passwd((users[uid][0], "x", uid, users[uid][1], "", "/", "/bin/sh"))
pwd.getpwuid = user
pwd.getpwall = lambda: [user(uid) for uid in users]
grp.getgrgid = lambda gid: grp.struct_group((groups[gid][0], "x", gid, groups[gid][1]))
os.setgroups([]); os.setgid(1000); os.setuid(1000)
try:
    load(Path(sys.argv[1])); print("read")
except ConfigError as error:
    print(error)
"""
"""A process of the user ada (uid 1000), on a machine whose users and groups are these; the file is a real one."""


def test_writable_by_a_group_is_refused_unless_the_group_is_the_owners_own(config: Path) -> None:
    needs_root("giving a file away")

    def found(uid: int, gid: int, mode: int, members: str = "") -> str:
        shutil.copy(config, goal)
        os.chown(goal, uid, gid)
        goal.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", AS_ADA, goal, members], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders are closed to other users
        Path(shared).chmod(0o711)
        goal = Path(shared) / "c.toml"
        assert found(1000, 1000, 0o664) == "read", "umask 002 with a private group, as Ubuntu and Fedora have it"
        assert found(1000, 1000, 0o664, "ada") == "read"
        assert found(0, 1000, 0o644) == "read", "root's file is trusted"
        assert "its group can write it (mode 0664, owner ada, group ada)" in found(1000, 1000, 0o664, "bob")
        assert "its group can write it (mode 0664, owner ada, group users)" in found(1000, 100, 0o664)
        assert "its group can write it" in found(0, 1000, 0o664)
        assert "everybody can write it" in found(1000, 1000, 0o646)
        told = found(1001, 1000, 0o644)
        assert "belongs to somebody else (mode 0644, owner bob" in told and f"chown ada {goal}" in told


def test_an_access_list_is_no_private_group(config: Path) -> None:
    """`setfacl -m u:somebody:rw` shows as the group's bits; the kernel takes the list as an attribute."""
    entries = [(0x01, 6, -1), (0x02, 6, 12345), (0x04, 4, -1), (0x10, 6, -1), (0x20, 4, -1)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + ctypes.c_uint32(who).value.to_bytes(4, "little")
        for tag, mode, who in entries
    )
    try:
        os.setxattr(config, "system.posix_acl_access", acl)
    except OSError as error:
        pytest.skip(f"this file system has no access lists: {error}")
    assert "its group can write it (mode 0664" in refused(config)


def test_a_folder_that_everybody_can_write_is_refused_unless_it_is_sticky(config: Path) -> None:
    folder = config.parent / "open" / "inner"
    folder.mkdir(parents=True)
    goal = Path(shutil.copy(config, folder / "c.toml"))
    folder.parent.chmod(0o777)
    told = refused(goal)
    assert f"the mode of {folder.parent}" in told and f"chmod o-w {folder.parent}" in told
    folder.parent.chmod(0o1777)
    assert load(goal)


def test_a_symlink_is_judged_at_its_goal(config: Path) -> None:
    link = config.parent / "link.toml"
    link.symlink_to(config)
    assert load(link)
    config.chmod(0o666)
    assert f"chmod go-w {config}" in refused(link)


def test_a_reload_asks_again_and_keeps_what_runs(config: Path) -> None:
    with running(config) as process:
        until(process, lambda: bool(status(config.parent)["state"]))
        config.write_text(config.read_text().replace('"every_steps" = 7', '"every_steps" = 6'))
        config.chmod(0o666)
        process.send_signal(1)
        until(process, lambda: any("chmod go-w" in told for told in status(config.parent).get("degraded", ())))
        config.chmod(0o600)
        process.send_signal(1)
        until(process, lambda: not status(config.parent).get("degraded", ["?"]))
