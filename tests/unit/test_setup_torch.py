"""Which build of torch set-up takes."""

import runpy
from pathlib import Path

import pytest

SETUP = runpy.run_path(str(Path(__file__).parents[2] / "deploy" / "setup" / "install_torch.py"))


@pytest.mark.parametrize(
    ("version", "system", "machine", "cpu"),
    [
        ("2.13.0+cpu", "Linux", "x86_64", True),
        ("2.13.0", "Linux", "x86_64", False),
        ("2.13.0", "Linux", "aarch64", False),
        ("2.13.0+cu130", "Linux", "x86_64", False),
        ("2.13.0", "Darwin", "arm64", True),
    ],
)
def test_pips_own_build_is_recognised(version, system, machine, cpu):
    report = {"install": [{"metadata": {"name": "torch", "version": version}}]}
    assert SETUP["is_cpu_build"](report, system, machine) is cpu


def test_version_comes_from_the_lock():
    lock = "torchvision==0.28.0\ntorch==2.13.0\npytorch==1\n"
    assert SETUP["pinned"](lock, "torch") == "torch==2.13.0"
    with pytest.raises(SystemExit, match="pins no uv"):
        SETUP["pinned"](lock, "uv")


def run_with(monkeypatch, tmp_path, build: str, failing: str = "") -> list[str]:
    """Run the script with pip and uv replaced; the commands that it gave, in short."""
    lock = tmp_path / "constraints.txt"
    lock.write_text("torch==2.13.0\nuv==0.13.9\n")
    commands = []

    def run(command, **_):
        text = " ".join(map(str, command[2:]))
        if "--dry-run" in text:
            return type("Done", (), {"returncode": 0, "stdout": f'{{"install": [{{"metadata": {{"version": "{build}"}}}}]}}'})
        commands.append("uv" if text.startswith("uv ") else text.split()[-1])
        return type("Done", (), {"returncode": int(bool(failing) and commands[-1] == failing)})

    namespace = SETUP["main"].__globals__
    monkeypatch.setitem(namespace, "has_nvidia_gpu", lambda: False)
    monkeypatch.setitem(namespace, "_installed", lambda: "")
    monkeypatch.setattr(namespace["platform"], "system", lambda: "Linux")
    monkeypatch.setattr(namespace["platform"], "machine", lambda: "x86_64")
    monkeypatch.setattr(namespace["subprocess"], "run", run)
    monkeypatch.setattr(namespace["sys"], "argv", ["install_torch.py", str(lock)])
    SETUP["main"]()
    return commands


def test_a_cpu_build_that_pip_finds_is_taken(monkeypatch, tmp_path):
    assert run_with(monkeypatch, tmp_path, "2.13.0+cpu") == ["torch==2.13.0"]


def test_the_cuda_build_is_left_for_the_cpu_build(monkeypatch, tmp_path):
    assert run_with(monkeypatch, tmp_path, "2.13.0") == ["uv", "uv"]


def test_out_of_reach_falls_back_to_pip(monkeypatch, tmp_path):
    commands = run_with(monkeypatch, tmp_path, "2.13.0", failing="uv")
    assert commands == ["uv", "torch==2.13.0"]
