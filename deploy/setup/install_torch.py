"""Install the locked torch into the environment that runs this file: the CPU build where there is no NVIDIA GPU.

The public index's Linux wheel of torch is the CUDA build, several GB with its libraries; the CPU build lies on an index of PyTorch's own.
So: ask pip which build it would take. If that is a CPU build already (macOS, or a machine whose pip is set up for it), pip installs it;
otherwise `uv`, which knows PyTorch's indexes, fetches the CPU build; and if that index is out of reach, pip's build must do: it runs on a
CPU too. Standard library only, since nothing else is there yet.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "install", "--no-compile"]


def pinned(constraints: str, name: str) -> str:
    """The line ``name==version`` of a lock's text. Raises SystemExit when it has none."""
    found = re.search(rf"^{re.escape(name)}==\S+$", constraints, re.MULTILINE)
    if not found:
        raise SystemExit(f"constraints.txt pins no {name}")
    return found[0]


def has_nvidia_gpu() -> bool:
    """Whether ``nvidia-smi`` is there and lists at least one GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def is_cpu_build(report: dict, system: str, machine: str) -> bool:
    """Whether the torch that pip's ``--report`` names has no CUDA in it.

    A local version ``+cpu`` says so; one without is the index's own, which has CUDA on Linux for x86-64 and ARM, and none elsewhere.
    """
    version = report["install"][0]["metadata"]["version"]
    if "+" in version:
        return version.endswith("+cpu")
    return not (system == "Linux" and machine in ("x86_64", "aarch64"))


def main() -> None:
    """Install torch, or do nothing when the pinned one is there."""
    constraints = Path(sys.argv[1])
    torch = pinned(constraints.read_text(), "torch")
    if torch == f"torch=={_installed()}":
        return
    if not has_nvidia_gpu():
        dry_run = [*PIP, "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", torch]
        report = json.loads(subprocess.run(dry_run, stdout=subprocess.PIPE, check=True).stdout)
        if not is_cpu_build(report, platform.system(), platform.machine()) and _install_by_uv(torch, constraints):
            return
    subprocess.run([*PIP, "-c", str(constraints), torch], check=True)


def _installed() -> str:
    """The version of the torch that is there, without its build; empty for none."""
    try:
        return metadata.version("torch").split("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def _install_by_uv(torch: str, constraints: Path) -> bool:
    """Whether uv could install the CPU build."""
    print("setup: no NVIDIA GPU; fetching torch's CPU build", flush=True)
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu"]
    for command in ([*PIP, "--quiet", "-c", str(constraints), "uv"], [*uv, "-c", str(constraints), torch]):
        if subprocess.run(command, check=False).returncode:
            break
    else:
        return True
    print("setup: the CPU build is out of reach; taking pip's build, which is larger and runs on a CPU too", flush=True)
    return False


if __name__ == "__main__":
    main()
