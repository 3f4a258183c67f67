"""The serve command: refusals before the model is loaded, and one server as a user starts it."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from support.commands import ENVIRONMENT, ROOT
from support.trained import write_random

from megagpt.commands.serve import main, model_name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("serve") / "small" / "checkpoints", "byte", 257, 128).parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines could use the model without a key; set MEGAGPT_API_KEY"),
        (["--host", "::"], "--host ::: other machines could use the model without a key"),
        (["--host", "gpu7"], "--host gpu7: other machines"),
        (["--host", "127.0.0.1", "--port", "99999"], "--port 99999: expected 1 to 65535"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere: No such file or directory"),
        (["--batch", "0"], "--batch 0: expected 1 to 4096"),
        (["--max-queue", "-1"], "--max-queue -1: expected 0 to"),
        (["--cache-tokens", "1000000000000"], "keys and values of 1,000,000,000,000 tokens: needs "),
        (["--checkpoint", "nowhere"], "nowhere: no checkpoint here"),
        (["--chat-template", "nowhere"], "nowhere: No such file or directory"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGAGPT_API_KEY", raising=False)
    assert main(["--checkpoint", str(checkpoint), "--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_key_that_is_too_short_and_a_busy_port_are_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAGPT_API_KEY", "short")
    assert main(["--checkpoint", str(checkpoint)]) == 2
    assert "MEGAGPT_API_KEY: expected a key of 6 or more characters" in capsys.readouterr().err
    monkeypatch.delenv("MEGAGPT_API_KEY")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert main(["--checkpoint", str(checkpoint), "--port", str(port)]) == 2
    assert f"--host 127.0.0.1 --port {port}: address already in use; choose another port" in capsys.readouterr().err


def test_the_model_is_named_after_its_run() -> None:
    assert model_name("runs/quickstart/checkpoints") == model_name("runs/quickstart/checkpoints/step_00000300") == "quickstart"
    assert model_name("models/llama") == "llama"


@pytest.mark.launch
def test_a_server_starts_answers_and_ends_with_its_signal(checkpoint: Path) -> None:
    command = [sys.executable, "tools/serve.py", "--checkpoint", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = next(line for line in server.stderr if "http://" in line).split()[-1]
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            assert json.load(answer)["data"][0]["id"] == "small"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.stderr.read()
