"""``concertina bench all``: what is run is kept, what fails is said, and plots are drawn from kept results alone."""

from __future__ import annotations

import json
import sys
import types

import pytest

from kvstore.errors import ConfigError
from services.bench import BENCHES, suite
from services.bench.base import Result

TRIAL = '''
from services.bench.base import Result

def configure(parser):
    pass

def run(args):
    {body}

def render(result):
    return ""

def plot(result):
    return "<svg>" + result.benchmark + "</svg>"
'''


@pytest.fixture
def benches(monkeypatch, tmp_path):
    """Two benchmarks of one line each in the table, one of which fails; found by child processes too."""
    bodies = {"good": 'return Result("good", {"quick": args.quick}, samples={"x_s": [1.0]})', "bad": "return 1 / 0"}
    for name, body in bodies.items():
        (tmp_path / f"trial_{name}.py").write_text(TRIAL.format(body=body))
    (tmp_path / "sitecustomize.py").write_text(
        "import services.bench\nservices.bench.BENCHES.clear()\n"
        + "".join(f"services.bench.BENCHES[{name!r}] = ('trial_{name}', 'a trial')\n" for name in bodies)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(suite, "BENCHES", {name: (f"trial_{name}", "a trial") for name in bodies})
    monkeypatch.syspath_prepend(str(tmp_path))


def test_what_runs_is_kept_and_what_fails_is_said(benches, tmp_path):
    said: list[str] = []
    written = suite.run_all(tmp_path / "out", quick=True, say=said.append)
    assert written["bad"] is None and "failed with exit status 1" in "\n".join(said)
    kept = json.loads((tmp_path / "out" / written["good"]).read_text())
    assert kept["benchmark"] == "good" and kept["configuration"] == {"quick": True}
    assert suite.draw(tmp_path / "out", tmp_path / "plots") == [str(tmp_path / "plots" / "good.svg")]
    assert (tmp_path / "plots" / "good.svg").read_text() == "<svg>good</svg>"


def keep(directory, name: str, **changes) -> None:
    (directory / name).write_text(json.dumps(Result("drawn", {}).to_json() | changes))


def test_the_newest_result_is_drawn(monkeypatch, tmp_path):
    module = types.ModuleType("trial_drawn")
    module.plot = lambda result: f"seed {result.seed}"
    monkeypatch.setitem(sys.modules, "trial_drawn", module)
    monkeypatch.setitem(BENCHES, "drawn", ("trial_drawn", ""))
    keep(tmp_path, "a.json", started_utc="2026-02-01T00:00:00Z", seed=2)
    keep(tmp_path, "b.json", started_utc="2026-01-01T00:00:00Z", seed=1)
    (file,) = suite.draw(tmp_path, tmp_path)
    assert (tmp_path / "drawn.svg").read_text() == "seed 2" and file.endswith("drawn.svg")


def test_results_of_another_schema_or_none_at_all_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no results"):
        suite.draw(tmp_path, tmp_path)
    keep(tmp_path, "old.json", schema_version=0)
    with pytest.raises(ConfigError, match="schema 0"):
        suite.draw(tmp_path, tmp_path)
