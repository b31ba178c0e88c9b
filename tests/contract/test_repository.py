"""The tree keeps its own rules: layout, sizes, one version, documented targets, generated code up to date."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import grimp
import pytest

from kvstore.codecs import CODECS
from kvstore.eviction import POLICIES

ROOT = Path(__file__).parents[2]
FOLDERS = {"services", "protos", "kvstore", "deploy", "tests"}
DOCUMENTS = {"README.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", "LICENSE"}
FILES = DOCUMENTS | {"Makefile", "pyproject.toml", "constraints.txt"}
TEST_KINDS = {"unit", "contract", "stateful", "sim", "fault", "golden", "integration", "gpu", "bench", "data"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
PROTOS = sorted(path.relative_to(ROOT) for path in (ROOT / "protos").rglob("*.proto"))


def tracked() -> list[Path]:
    """Files that git tracks and that are there."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


def python_files() -> list[Path]:
    """Hand-written Python."""
    return [path for path in tracked() if path.suffix == ".py" and "_pb2" not in path.name]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_top_level_is_the_fixed_one():
    top = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert top - FOLDERS <= FILES
    assert {path.parts[1] for path in tracked() if path.parts[0] == "tests" and len(path.parts) > 2} <= TEST_KINDS


def test_test_files_have_unique_names():
    names = [path.name for path in python_files() if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_files_and_functions_are_small(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name}"


def test_no_merge_marks_and_no_private_paths():
    mark = re.compile(r"^(<{7}|>{7}) |/work/(main|shared)|/tmp/bash_jobs", re.MULTILINE)
    for path in tracked():
        if path.suffix not in (".gz", ".png", ".safetensors") and path != Path(__file__).relative_to(ROOT):
            assert not mark.search((ROOT / path).read_text()), path


def test_distribution_is_private_and_owns_its_import_names():
    assert PROJECT["project"]["name"] == "concertina-kv"
    assert PROJECT["project"]["classifiers"] == ["Private :: Do Not Upload"]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    owners = metadata.packages_distributions()
    for name in packages:
        assert set(owners.get(name, ["concertina-kv"])) == {"concertina-kv"}, f"another distribution brings {name}"
        assert Path(__import__(name).__path__[0]) == ROOT / name


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    assert metadata.version("concertina-kv") == version
    released = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", name) for name in released[1:])
    if released[1:]:
        assert released[1] == version


def test_lock_pins_every_dependency_without_a_build_or_an_address():
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = PROJECT["project"]["dependencies"] + [line for extra in extras for line in extra]
    pinned = {canonical(name) for name in LOCK}
    assert {canonical(re.split(r"[\[<>=; ]", line)[0]) for line in wanted} <= pinned
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no +cpu, no URL
    assert len(pinned) == len(lines)


def test_installed_packages_are_the_locked_ones():
    installed = {canonical(d.name): d.version.split("+")[0] for d in metadata.distributions()}
    locked = {canonical(name): version for name, version in LOCK.items()}
    wrong = {name: (installed[name], version) for name, version in locked.items() if installed.get(name, version) != version}
    assert not wrong, "run make setup"


def test_no_index_is_named():
    hosts = re.compile(r"https?://[\w.-]*(pypi|pythonhosted|pytorch\.org|npmjs|crates\.io|docker\.io)|--(extra-)?index-url\s+\S*://")
    for path in tracked():
        if path.suffix in ("", ".txt", ".toml", ".yml", ".yaml", ".py", ".md") and path != Path(__file__).relative_to(ROOT):
            assert not hosts.search((ROOT / path).read_text()), path


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)[1].split())
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^  make ([a-z-]+)  ", shown, re.MULTILINE))
    assert listed == phony - {"model"}
    assert {"help", "setup", "demo", "test", "lint", "protos", "up", "down"} <= listed
    for target in listed:
        assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=False).returncode == 0, target


def test_ci_calls_what_people_call():
    text = (ROOT / ".ci" / "run").read_text()
    assert "make test" in text
    assert "make lint" in text


@pytest.fixture(scope="module")
def import_graph() -> grimp.ImportGraph:
    return grimp.build_graph("kvstore")


@pytest.mark.parametrize("rows", [[target for _, target in CODECS.values()], POLICIES.values()], ids=["codecs", "policies"])
def test_rows_of_a_table_know_no_other_row(rows, import_graph):
    modules = {row.partition(":")[0] for row in rows} & import_graph.modules
    assert len(modules) > 1
    for one in modules:
        for other in modules - {one}:
            assert not import_graph.chain_exists(importer=one, imported=other, as_packages=True), f"{one} imports {other}"


@pytest.mark.parametrize("proto", PROTOS, ids=str)
def test_generated_protos_are_up_to_date(proto, tmp_path):
    out = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *out, str(proto)], cwd=ROOT, check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 3
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path} is stale: run make protos"
