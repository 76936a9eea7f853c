"""The help of every command: it fits 80 columns, and its examples are command lines that parse."""

import argparse
import itertools
import shlex

import pytest

from llmsched_gym.cli.entry import main, typer_group
from llmsched_gym.cost.roofline import DEVICES, MODELS
from llmsched_gym.help_text import GroupedCommand, examples

NEEDS = {"search": "optuna"} | {name: "sb3_contrib" for name in ("train", "ppo", "tune", "imitate", "compare")}
GROUPS = {
    "evaluate": "What runs, The world, What clients expect, The engine, Where it runs, Output, Options",
    "capacity": "What runs, The world, What clients expect, The engine, Where it runs, Output, Options",
    "serve-bench": "The server, The world, What clients expect, What runs, Output, Options",
}


def commands():
    for name, command in typer_group().commands.items():
        yield from [f"{name} {inner}" for inner in getattr(command, "commands", ())] or [name]


def help_of(name, capsys, monkeypatch):
    pytest.importorskip(NEEDS.get(name, "typer"))
    monkeypatch.setenv("COLUMNS", "80")
    try:
        assert main([*name.split(), "--help"]) == 0
    except SystemExit as done:  # argparse's
        assert done.code in (0, None)
    return capsys.readouterr().out


class Parsed(Exception):
    """A command line was read."""


def read_only(monkeypatch):
    """Let commands end when they have read their command line."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, *given):
        read(self, *given)
        raise Parsed

    def invoke(self, context):
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(GroupedCommand, "invoke", invoke)


@pytest.mark.parametrize("name", list(commands()))
def test_help_fits_a_terminal_and_its_examples_parse(name, capsys, monkeypatch):
    text = help_of(name, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80
    _, heading, lines = text.replace(" \\\n", " ").partition("Example")
    assert heading, f"llmsched {name} --help has no example"
    found = [line.strip() for line in lines.splitlines()[1:] if line.strip()]
    assert found and all(f"{line} ".startswith(f"llmsched {name} ") for line in found), found
    read_only(monkeypatch)
    for line in found:
        words = shlex.split(line.partition(" > ")[0])[1:]
        with pytest.raises(Parsed):
            assert main(words) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("name", ["roofline", "fit"])
def test_examples_name_models_and_devices_that_there_are(name, capsys, monkeypatch):
    words = help_of(name, capsys, monkeypatch).partition("Example")[2].replace(" \\\n", " ").split()
    named = [word for flag, word in itertools.pairwise(words) if flag in ("--model", "--device")]
    if name == "roofline":
        named = words[words.index("roofline") + 1 :][:2]
    assert len(named) == 2 and named[0] in MODELS and named[1] in DEVICES, named


def test_a_wrong_example_would_be_found(capsys, monkeypatch):
    read_only(monkeypatch)
    for words in (["evaluate", "--polcy", "slai"], ["reproduce", "--sedes", "3"]):
        try:
            assert main(words) == 2
        except SystemExit as wrong:
            assert wrong.code == 2


@pytest.mark.parametrize("name", GROUPS)
def test_options_stand_in_groups(name, capsys, monkeypatch):
    text = help_of(name, capsys, monkeypatch)
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "] == GROUPS[name].split(
        ", "
    )


def test_an_example_is_broken_before_an_option():
    long = "llmsched evaluate " + " ".join(f"--option-{i} value" for i in range(6))
    *first, last = examples(long).splitlines()[1:]
    assert first and all(line.endswith(" \\") for line in first) and not last.endswith("\\")
    assert max(map(len, [*first, last])) <= 80
    assert "\n".join([*first, last]).replace(" \\\n", " ").split() == long.split()
