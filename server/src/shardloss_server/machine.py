"""The memory and the cores that this process may use: those of its machine, as its control groups limit them."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
OF_ALL = 1 << 60  # version 1 writes a number above any memory for "no limit"
V1, V2 = "cgroup", "cgroup2"


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory that all processes with an equal key share: its limit, and the bytes that can still be taken from it."""

    key: str
    name: str
    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """One control group: the version of its files and its folder."""

    version: str
    folder: Path

    def read(self, name: str) -> str:
        """Return the content of one of its files; empty if it cannot be read."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """Return the number in a file; None if there is none, as for "max"."""
        text = self.read(name)
        return int(text) if text.isdigit() else None


def pools(root: Path = ROOT) -> list[Pool]:
    """Return all memory that this process takes its own from: the machine's, and that of each group with a limit."""
    machine = read(root / "proc/sys/kernel/random/boot_id") or platform.node()
    facts = {name: 1024 * kib for name, kib in numbers(read(root / "proc/meminfo")).items()}
    total = facts.get("MemTotal:", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    found = [Pool(machine, "the machine", total, facts.get("MemAvailable:", total))]
    for group in groups("memory", root):
        limit = limit_of(group)
        if limit is not None:
            at = group.folder.stat()
            key = f"{machine} {at.st_dev} {at.st_ino}"  # two containers may give two groups one name
            found.append(Pool(key, f"the control group {group.folder}", limit, max(0, limit - used_of(group))))
    return found


def memory_limit_bytes(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process may use together with those that share its control groups."""
    return min(pool.limit_bytes for pool in pools(root))


def num_cores(root: Path = ROOT) -> int:
    """Return the number of cores that this process may use, at least 1: by affinity and by its groups' quotas."""
    quotas = [quota for group in groups("cpu", root) if (quota := quota_of(group)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)]))


def limit_of(group: Group) -> int | None:
    """Return the bytes above which a group's processes are slowed down or killed; None if there is no limit."""
    names = ("memory.max", "memory.high") if group.version == V2 else ("memory.limit_in_bytes",)
    found = [limit for name in names if (limit := group.number(name)) is not None and limit < OF_ALL]
    return min(found, default=None)


def used_of(group: Group) -> int:
    """Return the bytes of a group that the kernel cannot reclaim: all but its cache of files."""
    facts = numbers(group.read("memory.stat"))
    if group.version == V2:
        used, cache = group.number("memory.current") or 0, facts.get("file", 0) - facts.get("shmem", 0)
        cache += facts.get("slab_reclaimable", 0)
    else:
        used, cache = group.number("memory.usage_in_bytes") or 0, facts.get("total_cache", 0)
        cache -= facts.get("total_shmem", 0)
    return max(0, used - cache)


def quota_of(group: Group) -> float | None:
    """Return the cores that a group's processes may keep busy on average; None if there is no limit."""
    quota, period = group.read("cpu.cfs_quota_us"), group.read("cpu.cfs_period_us")
    if group.version == V2:
        quota, _, period = group.read("cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def groups(controller: str, root: Path = ROOT) -> Iterator[Group]:
    """Yield the control groups that limit this process, from the outermost to its own, as far as they are visible."""
    own = dict(memberships(read(root / "proc/self/cgroup")))
    for line in read(root / "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        fields, (version, *_, options) = place.split(), kind.split()
        name = "" if version == V2 else controller
        if version not in (V1, V2) or name not in own or (version == V1 and name not in options.split(",")):
            continue
        mount = root / unescaped(fields[4]).lstrip("/")
        inside = relative(own[name], unescaped(fields[3]))
        folder = mount / inside
        if not folder.is_dir():  # the names are those of another namespace: the mount shows the container's own group
            folder = mount
        yield from (Group(version, one) for one in reversed([folder, *folder.parents]) if one.is_relative_to(mount))


def memberships(text: str) -> Iterator[tuple[str, str]]:
    """Yield (controller, path) of each line of /proc/self/cgroup; the controller of version 2 is ""."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            yield name, path


def relative(path: str, top: str) -> str:
    """Return the path of a group below the group that is mounted."""
    inside = path.removeprefix(top) if top != "/" and (path == top or path.startswith(top + "/")) else path
    return inside.lstrip("/")


def unescaped(path: str) -> str:
    """Return a path of /proc/self/mountinfo, in which spaces are written as octal numbers."""
    return path.replace("\\040", " ")


def numbers(text: str) -> Mapping[str, int]:
    """Return the number after the name on each line."""
    split: Sequence[list[str]] = [line.split() for line in text.splitlines()]
    return {words[0]: int(words[1]) for words in split if len(words) > 1 and words[1].isdigit()}


def read(path: Path) -> str:
    """Return the content of a file; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
