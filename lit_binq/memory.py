"""Peak memory of this process and its device.

Touches nothing but the operating system and torch.
"""

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
        `device_bytes`: the most that tensors took on a CUDA device since `reset_peak_memory`, else None. torch holds
        somewhat more than that from the driver.
    """
    on_device = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
    return {"host_bytes": host_peak(), "device_bytes": on_device}


def host_peak(status: Path = Path("/proc/self/status")) -> int | None:
    """Bytes of the process's peak resident set, None where the system does not say.

    Args:
        status: the kernel's own account, on Linux. It comes first because `ru_maxrss` there begins with the size
            of the process that started this one.
    """
    try:
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # "kB" in the file are KiB
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
