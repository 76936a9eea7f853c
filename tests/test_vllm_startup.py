"""What needs no vLLM around it: its backend's settings, and a command line that cannot be served."""

import re
import subprocess
import sys

import pytest

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.real_backend.vllm.startup import additional_config, check_command

CLASS = "llmsched_gym.real_backend.vllm_plugin.Scheduler"


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["--additional-config", '{"llmsched": {"policy": "./no/folder"}}'], "policy './no/folder': no such policy"),
        (
            ['--additional-config={"llmsched": {"policy": "slay"}}'],
            r"policy 'slay' is unknown \(did you mean 'slai'\?\)",
        ),
        (["--additional_config", '{"llmsched": {"polcy": "slai"}}'], "expected some of policy, .* got 'polcy'"),
        (["--additional-config", '{"llmsched": {"profile": "b300"}}'], "profile: expected one of"),
    ],
)
def test_a_command_line_that_cannot_be_served_ends_in_one_line(arguments, what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--scheduler-cls", CLASS, *arguments])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(SystemExit) as ended:
        check_command()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()

    assert line.startswith("error: ") and re.search(what, line)


def test_command_lines_without_the_plugin_are_nobody_s_business(monkeypatch):
    monkeypatch.setenv("LLMSCHED_POLICY", "./no/folder")
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m"])
    check_command()
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", f"--scheduler-cls={CLASS}"])
    with pytest.raises(SystemExit):
        check_command()
    monkeypatch.setenv("LLMSCHED_POLICY", "slai[offset=4]")
    check_command()


def test_additional_config_is_found_however_it_is_written():
    assert additional_config(["--additional-config", '{"a": 1}']) == {"a": 1}
    assert additional_config(['--additional_config={"a": 1}']) == {"a": 1}
    assert additional_config(["--additional-config"]) == additional_config(["--additional-config", "{"]) == {}
    assert additional_config(["serve", "m"]) == {}


def test_importing_the_real_backend_imports_no_vllm():
    code = "import sys, llmsched_gym.real_backend, llmsched_gym.real_backend.vllm.lane; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr[-500:]


def test_the_vllm_backend_measures_and_takes_blocks_of_any_power_of_two():
    world = scenario("paper", backend="vllm", model="random:tiny", block_size=32)
    assert world.jitter == 0.0
    with pytest.raises(ConfigError, match="model: expected a folder, a hub id or random:tiny with backend='vllm'"):
        scenario("paper", backend="vllm")
    with pytest.raises(ConfigError, match="jitter: expected 0 with backend='vllm'"):
        scenario("paper", backend="vllm", model="random:tiny", jitter=0.1)
    with pytest.raises(ConfigError, match="block_size: expected 16 with backend='transformers'"):
        scenario("paper", backend="transformers", model="random:tiny", block_size=32)
