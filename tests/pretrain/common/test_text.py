"""Text that people write into settings, and that they read."""

from __future__ import annotations

import pytest

from pretrain.common.text import control_character, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0:00"),
        (59.9, "0:59"),
        (307, "5:07"),
        (11_107, "3:05:07"),
        (172_799, "47:59:59"),
        (172_800, "2 days"),
        (1e10, "115,741 days"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_control_characters():
    for code in (0, 9, 10, 13, 27, 127, 0x85):
        assert control_character(f"a{chr(code)}b") == repr(chr(code))[1:-1]
    assert control_character("ordinary text, é漢 🙂 $#'\"\\") is None
