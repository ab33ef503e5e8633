"""What commands print: names as they are, tables that break between words, numbers alike."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest

from pretrain.common.screen import plain_console, readable, show_table, titled_table
from tests.helpers.nasty_names import random_names

ROOT = Path(__file__).parents[3]


def shown(table, width):
    screen = io.StringIO()
    show_table(table, plain_console(file=screen, width=width))
    return screen.getvalue()


def test_names_are_shown_as_they_are():
    names = random_names(60)
    table = titled_table(names[0], names[1], "value", names[2], left=(names[2],))
    for name in names:
        table.add_row(name, "1", name)
    text = shown(table, 400)
    for name in names:
        assert text.count(name) >= (2 if name in names[3:] else 1), name
    screen = io.StringIO()
    console = plain_console(file=screen, width=400)
    for name in names:
        console.print(name, style="yellow")
    assert screen.getvalue().splitlines() == names


@pytest.mark.parametrize("width", [20, 39, 50, 80, 120])
def test_headers_and_numbers_break_between_words(width):
    generator = random.Random(width)
    for _ in range(20):
        headers = [
            " ".join(
                "w" * generator.randint(1, 9) + str(column) for _ in range(generator.randint(1, 4))
            )
            for column in range(generator.randint(1, 7))
        ]
        table = titled_table(None, *headers)
        rows = [[f"{generator.random() * 10**9:,.4f}" for _ in headers] for _ in range(3)]
        for row in rows:
            table.add_row("a long name / " * 3, *row[1:])
        words = set(re.findall(r"[\w.,]+", shown(table, width)))
        assert {word for header in headers for word in header.split()} <= words
        assert {number for row in rows for number in row[1:]} <= words


def test_a_table_is_no_wider_than_it_needs():
    table = titled_table("t", "name", "95 % interval")
    table.add_row("x" * 300, "0.1 to 0.2")
    assert max(map(len, shown(table, 60).splitlines())) == 60


def test_numbers_of_a_column_look_alike():
    assert [readable(x) for x in (5847.2, 11550, 11.57, 0.01157, 0)] == [
        *("5,847", "11,550", "11.6", "0.0116", "0")
    ]
    assert readable(3.24e21) == "3.24e+21"
    generator = random.Random(0)
    for _ in range(500):
        value = generator.choice((-1, 1)) * 10 ** generator.uniform(-7, 12)
        digits = generator.randint(2, 6)
        text = readable(value, digits)
        assert "e" not in text
        assert float(text.replace(",", "")) == pytest.approx(value, rel=0.5 * 10 ** (1 - digits))


def test_no_command_makes_a_console_that_reads_markup():
    packages = ("pretrain", "data_prep", "evals", "launch")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    assert [file.name for file in files if re.search(r"(?<!\w)Console\(", file.read_text())] == [
        "screen.py"
    ]
