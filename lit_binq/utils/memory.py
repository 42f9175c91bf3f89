"""Peak memory of this process and its device."""

import sys
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new device measurement. The host's peak cannot be reset: it is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.init()  # before its first use a device has no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory held at once, of this rank.

    Args:
        device: where tensors were; anything but CUDA has no figure of its own.

    Returns:
        `host_bytes`: the process's peak resident set since it started, None where the system does not say;
        `device_bytes`: the most that tensors took on a CUDA device since `reset_peak_memory`, else None;
        `device_reserved_bytes`: the most that torch held from the driver for them, pools of CUDA graphs among it.
    """
    cuda = device.type == "cuda"
    return {
        "host_bytes": host_peak(),
        "device_bytes": int(torch.cuda.max_memory_allocated(device)) if cuda else None,
        "device_reserved_bytes": int(torch.cuda.max_memory_reserved(device)) if cuda else None,
    }


def resident(status: Path = Path("/proc/self/status")) -> int:
    """Bytes of this process that are resident now; the peak, or 0, where the system does not say."""
    return _account(status, "VmRSS:") or host_peak() or 0


def host_available(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still take: what the system has left, and what its control group allows.

    Args:
        root: where the kernel's files are.

    Returns:
        None where the system does not say.
    """
    system = _account(root / "proc/meminfo", "MemAvailable:")
    group = root / "sys/fs/cgroup"
    try:
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        left = int(most) - int(used) + _reclaimable(group / "memory.stat")
    except (OSError, ValueError):  # no such file, or `max`: no limit
        return system
    return left if system is None else min(left, system)


def _reclaimable(stat: Path) -> int:
    """Bytes of files the kernel keeps in memory only while nobody asks for it."""
    lines = stat.read_text(encoding="ascii", errors="replace").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def _account(file: Path, key: str) -> int | None:
    """A line of the kernel's accounts in bytes."""
    try:
        for line in file.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024  # "kB" in the file are KiB
    except OSError:
        pass
    return None


def host_peak(status: Path = Path("/proc/self/status")) -> int | None:
    """Bytes of the process's peak resident set, None where the system does not say.

    Args:
        status: the kernel's own account, on Linux. It comes first because `ru_maxrss` there begins with the size
            of the process that started this one.
    """
    if (high := _account(status, "VmHWM:")) is not None:
        return high
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
