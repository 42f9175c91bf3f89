"""Peak memory of a process and of a device."""

import sys
from pathlib import Path

import pytest
import torch

from lit_binq.utils.memory import host_peak, peak_memory, reset_peak_memory


def test_peak_memory_counts_what_was_held_at_once():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)["host_bytes"]
    assert before is not None
    grow = max(0, before - resident_now()) + 2**27
    block = torch.ones(grow // 4)
    after = peak_memory(cpu)
    assert 0.9 * 2**27 <= after["host_bytes"] - before <= 2**28
    assert after["device_bytes"] is None
    del block
    # A peak stays; the kernel's counters of several threads are a few pages apart.
    assert peak_memory(cpu)["host_bytes"] >= after["host_bytes"] - 2**22


def resident_now() -> int:
    """Bytes resident now, or a guess that is too low."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def test_peak_memory_where_the_kernel_gives_no_account(tmp_path):
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    for text in (None, "Name:\tpython\n"):
        status = tmp_path / "status"
        if text is not None:
            status.write_text(text)
        assert host_peak(status) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t   2012 kB\n")
    assert host_peak(status) == 2012 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_device():
    device = torch.device("cuda")
    reset_peak_memory(device)
    before = peak_memory(device)["device_bytes"]
    torch.ones(2**20, device=device)
    assert peak_memory(device)["device_bytes"] - before == 2**22
