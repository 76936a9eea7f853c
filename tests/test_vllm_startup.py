"""What needs no vLLM around it: its backend's settings, and a command line that cannot be served."""

import multiprocessing
import re
import subprocess
import sys
import types

import pytest

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.real_backend.vllm.startup import additional_config, check_command
from llmsched_gym.real_backend.vllm.versions import let_vllm_look_at_llvmlite

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


def test_engines_and_workers_leave_the_looking_to_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--scheduler-cls", CLASS])
    monkeypatch.setenv("LLMSCHED_POLICY", "./no/folder")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    check_command()


def test_vllm_may_look_into_modules_whose_dict_is_none_of_their_own(monkeypatch):
    dispatcher = types.ModuleType("vllm.triton_utils.dispatcher")
    utils = types.ModuleType("vllm.triton_utils")
    utils.dispatcher = dispatcher
    for module in (types.ModuleType("vllm"), utils, dispatcher):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    let_vllm_look_at_llvmlite()

    class Odd:
        def __getattr__(self, name):
            return lambda: name

        __dict__ = property(lambda self: self.get)

    class Plain:
        kernel = None

        def __init__(self):
            self.kernel = 3

    look = dispatcher.vars
    assert look(Odd()).get("kernel") is None and look(Plain()).get("kernel") == 3
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", types.ModuleType("vllm.triton_utils"))
    let_vllm_look_at_llvmlite()  # another vLLM: nothing to do
