"""What the command line refuses, at once, with status 2 and the mend, and what it leaves behind: nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from kvstore.errors import ConfigError, NotFoundError, TransportError
from services.cli import COMMANDS, main, worker
from services.system import checks, record


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "concertina"


REFUSED = {
    "nodes 0": (["--nodes", "0"], "--nodes"),
    "workers negative": (["--workers", "-1"], "--workers"),
    "arena 0": (["--arena", "0"], "--arena"),
    "arena in nonsense": (["--arena", "lots"], "256MiB"),
    "arena beyond the memory": (["--arena", "100000GiB"], "memory"),
    "unknown codec": (["--codec", "zip"], "int8"),
    "no such profile": (["--profile", "/nowhere/p.kvp"], "concertina calibrate"),
    "unknown policy": (["--policy", "random"], "lru"),
    "unknown device": (["--device", "tpu"], "cpu"),
    "unknown engine": (["--engine", "steam"], "transformers"),
    "ratio below 1": (["--ratio", "0.5"], "--ratio"),
    "redis without scheme": (["--redis", "localhost"], "redis://"),
    "no model": (["--model", "/no/such/dir"], "/no/such/dir"),
    "name with a slash": (["--name", "../x"], "--name"),
    "tenants file missing": (["--tenants", "/no/such/file"], "tenants"),
    "spill without a bound": (["--spill", "/tmp"], "--spill-bytes"),
    "a key without its certificate": (["--tls-key", "/dev/null"], "--tls-cert"),
    "credentials file missing": (["--credentials", "/no/such/file"], "no such file"),
    "credentials that workers lack": (["--credentials", __file__], "CONCERTINA_CLIENT__CREDENTIAL"),
    "certificates that workers do not trust": (["--tls-cert", __file__, "--tls-key", __file__], "CONCERTINA_CLIENT__TLS_CA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_up_refuses_what_can_never_work(name, capsys, own_state):
    arguments, mend = REFUSED[name]
    assert main(["up", *arguments]) == 2
    assert mend in capsys.readouterr().err
    assert not list(own_state.glob("*/*")) if own_state.exists() else True


def test_a_gpu_is_there_for_each_worker(monkeypatch):
    for count, workers, mend in ((0, 1, "--device cpu"), (1, 2, "--workers 1")):
        monkeypatch.setattr(checks, "gpu_count", lambda count=count: count)
        with pytest.raises(ConfigError, match=mend):
            checks.check_device("cuda", workers)
    checks.check_device("cuda")
    checks.check_device("cpu", 9)


def test_up_refuses_a_directory_that_is_no_model(tmp_path, capsys):
    assert main(["up", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_worker_refuses_a_port_that_is_taken(capsys):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        assert main(["worker", "--listen", f"127.0.0.1:{holder.getsockname()[1]}"]) == 2
    assert "port 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "down", "generate x", "blocks ls"])
def test_commands_say_when_nothing_runs(command, capsys):
    assert main([*command.split(), "--name", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err


def test_errors_are_json_when_asked(capsys):
    assert main(["status", "--name", "nobody", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "NOT_FOUND"


TWO_PROMPTS, NO_FILE, NEGATIVE = ["hello", "--tokens-file", "x.json"], ["--tokens-file", "/no/such/file"], ["x", "--kv-tokens", "-1"]


@pytest.mark.parametrize("arguments", [[], TWO_PROMPTS, NO_FILE, NEGATIVE])
def test_generate_refuses_what_cannot_be_sent(arguments):
    assert main(["generate", *arguments]) == 2


@pytest.mark.parametrize("arguments", [["ls", "ab"], ["evict"], ["evict", "abc"], ["clear", "--namespace", "zz"]])
def test_blocks_refuses_wrong_keys(arguments):
    assert main(["blocks", *arguments]) == 2


def test_a_record_survives_a_round_trip_and_names_its_ports():
    system = record.new_record("one")
    system.inference, system.redis = "127.0.0.1:9003", "redis://:pw@127.0.0.1:6380/0"
    system.processes.append(record.ProcessRecord("node-0", 12, 34.5))
    system.save()
    assert record.load("one") == system
    assert system.ports == {9003, 6380}
    assert record.names() == ["one"]
    system.remove()
    assert record.load("one") is None
    with pytest.raises(NotFoundError):
        record.require("one")


def test_a_damaged_record_is_named(own_state):
    (own_state / "two").mkdir(parents=True)
    (own_state / "two" / "system.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        record.load("two")


def test_only_one_command_works_on_a_name_at_a_time():
    with record.lock("three"), pytest.raises(ConfigError, match="at work"), record.lock("three"):
        pass


def test_help_lists_every_command_and_loads_nothing_heavy():
    script = (
        "import sys, contextlib, io\nfrom services.cli import main\nout = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "print([m for m in ('torch', 'ray', 'grpc', 'transformers', 'redis') if m in sys.modules]); print(out.getvalue())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded, _, text = done.stdout.partition("\n")
    assert loaded == "[]"
    assert set(COMMANDS) <= {line.split()[0] for line in text.splitlines() if line.strip()}


def test_up_refuses_a_directory_that_is_no_model_before_it_loads_anything_heavy(tmp_path):
    script = (
        f"import sys\nfrom services.cli import main\nstatus = main(['up', '--name', 'refused', '--model', {str(tmp_path)!r}])\n"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert "config.json" in done.stderr


@pytest.mark.parametrize("command", ["up", "down", "status", "generate", "blocks", "worker"])
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_a_replicas_own_error_is_found_in_serves_text():
    text = "Deploying concertina failed: Traceback …\n  File x\nkvstore.errors.ConfigError: codec needs a profile; make one\nmore"
    cause = worker._cause(text)
    assert isinstance(cause, ConfigError) and str(cause) == "codec needs a profile; make one"
    assert isinstance(worker._cause("kvstore.errors.Path: x"), TransportError)
    assert isinstance(worker._cause("no trace of ours"), TransportError)
