"""How much memory is there, and how many pieces of work of a predicted size fit into it at a time.

Work is cut before it begins, and never after it has failed: on the CPU an allocation that is too large ends the process
without a word.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from verideq.errors import NotEnoughMemory

SHARE = 0.5
"""Of what is there, what a piece of work may be predicted to take: predictions are right within a factor of two."""
UNKNOWN = 2**31
"""What is assumed to be there where the system does not say."""


def available(device: torch.device) -> int:
    """Bytes that this process may still take on a device, as far as the system says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [*_system(), *_control_groups(), *_own_limit()]
    # Several processes of one run on a machine have it together.
    return max(0, min(found, default=UNKNOWN)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def fitting(each: int, device: torch.device, what: str, base: int = 0) -> int:
    """How many pieces of work fit at a time, one or more.

    Args:
        each: bytes that a piece takes.
        device: where.
        what: a piece is called in the message.
        base: bytes that are taken besides.

    Raises:
        NotEnoughMemory: not even one fits.
    """
    there = int(SHARE * available(device))
    if base + each > there:
        raise NotEnoughMemory(
            f"{what} needs about {_shown(base + each)} of memory, and {_shown(there)} may be used (half of what is "
            f"free on {device}); free some, use another device or a cheaper method"
        )
    return max(1, (there - base) // max(1, each))


def _shown(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _system() -> Iterator[int]:
    """What the kernel could hand out without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        yield next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What the limits of containers leave, of both versions; what is only cached does not count as taken."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        folder = base / path.lstrip("/")
        # Limits hold for everything below; inside a container the path may be that of the host.
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            try:
                most, taken = (int((place / name).read_text(encoding="ascii")) for name in (limit, used))
                stat = dict(pair.split() for pair in (place / "memory.stat").read_text(encoding="ascii").splitlines())
            except (OSError, ValueError):
                continue  # there is no limit here, or it says "max"
            yield most - taken + int(stat.get(cached, 0))


def _own_limit() -> Iterator[int]:
    """What ``ulimit -v`` leaves."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        try:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        except (OSError, ValueError):
            return
        yield most - pages * resource.getpagesize()
