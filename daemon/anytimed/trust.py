"""Who else could have written a file: asked of whatever decides what this process does.

`others_who_can_write` names the first way in which somebody other than root and ourselves could change a file, with
the command that closes it; `owned_by_us` says whether a folder is ours. A name that is a symlink is judged at its
goal, for that is what is read.

A file that its group may write is fine where the group is its owner's own: on Ubuntu and Fedora a user `ada` has a
group `ada` without other members and the umask 002, so everything she clones is 0664. Any other group may have
members, and an access control list (its mask shows as the group's bits) may name anybody.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def others_who_can_write(path: Path, file: int) -> str | None:
    """Why an open file cannot be trusted (who, mode, what to do), or None. `path` is how it was opened."""
    found = os.fstat(file)
    goal = path.resolve()
    shown = f"mode {found.st_mode & 0o7777:04o}, owner {_user(found.st_uid)}, group {_group(found.st_gid)}"
    if not owned_by_us(found):
        return (
            f"belongs to somebody else ({shown}); expected root or {_user(os.geteuid())}, for its owner decides what "
            f"runs here: `chown {_user(os.geteuid())} {goal}` once you have read it"
        )
    if found.st_mode & stat.S_IWOTH:
        return f"everybody can write it ({shown}); `chmod go-w {goal}` once you have read it"
    if found.st_mode & stat.S_IWGRP and not _private(found, file):
        return f"its group can write it ({shown}); `chmod go-w {goal}` once you have read it"
    for folder in goal.parents:
        if _open_to_all(folder):
            return f"everybody can replace it, by the mode of {folder}; `chmod o-w {folder}`, or move the file"
    return None


def owned_by_us(found: os.stat_result) -> bool:
    """Whether root or this user owns it: nobody else may change its content or its mode."""
    return found.st_uid in (0, os.geteuid())


def _private(found: os.stat_result, file: int) -> bool:
    """Whether the owner is the only one in the file's group, as far as this machine can tell."""
    if "system.posix_acl_access" in _attributes(file):
        return False
    try:
        owner, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    if (owner.pw_gid, owner.pw_name) != (group.gr_gid, group.gr_name):
        return False
    members = {*group.gr_mem, *(user.pw_name for user in pwd.getpwall() if user.pw_gid == group.gr_gid)}
    return members <= {owner.pw_name}


def _attributes(file: int) -> list[str]:
    try:
        return os.listxattr(file)
    except OSError:  # a file system without any
        return []


def _open_to_all(folder: Path) -> bool:
    """Whether everybody may rename what lies in a folder. Not where a sticky bit protects it, nor on a read-only mount
    (Kubernetes mounts its configuration so, mode 0777)."""
    try:
        mode = folder.stat().st_mode
        return bool(mode & stat.S_IWOTH and not mode & stat.S_ISVTX) and not os.statvfs(folder).f_flag & os.ST_RDONLY
    except FileNotFoundError:  # a pipe has no folder
        return False


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
