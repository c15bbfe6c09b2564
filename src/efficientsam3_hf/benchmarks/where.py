"""On what a number was measured: the hardware, and the code."""

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def best_device() -> str:
    """CUDA before Apple's GPU before the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def hardware(device: torch.device) -> str:
    """Name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, Python knows no more than the architecture
    if cpuinfo.exists() and (match := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        return match[1]
    return f"{platform.processor() or platform.machine()} ({device.type})"


def revision() -> str:
    """The commit of the code where it runs from a checkout of it, else the version."""
    package = Path(__file__).resolve().parents[1]
    if (package.parents[1] / ".git").exists():
        command = ["git", "-C", str(package), "rev-parse", "--short", "HEAD"]
        try:
            return subprocess.run(
                command, capture_output=True, check=True, text=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return version("efficientsam3-hf")
