from __future__ import annotations

import pytest

from pretrain.config.pattern import parse_pattern

KNOWN = ("attn", "gdn", "m2rnn")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("attn", ["attn"]),
        ("3*gdn attn", ["gdn"] * 3 + ["attn"]),
        ("2*(2*gdn attn) m2rnn", ["gdn", "gdn", "attn"] * 2 + ["m2rnn"]),
        ("2*(attn 2*(gdn))", ["attn", "gdn", "gdn"] * 2),
        (" ( gdn )attn ", ["gdn", "attn"]),
    ],
)
def test_patterns(pattern, expected):
    assert parse_pattern(pattern, KNOWN) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gdn atn", r"unknown mixer 'atn' \(did you mean 'attn'\?\); known: attn, gdn, m2rnn"),
        ("0*gdn", "a count of 0 at character 1"),
        ("2*(gdn", r"'\(' at character 3 is not closed"),
        ("gdn) attn", r"'\)' without '\(' at character 4"),
        ("2*", "expected a mixer name"),
        ("2*3*gdn", "expected a mixer name"),
        ("2*)", "expected a mixer name"),
        ("gdn, attn", "at character 4"),
        ("", "nothing at character 1"),
        ("()", "nothing at character 2"),
        ("99999999999999999999*gdn", "more than 10000 blocks"),
        (50 * "(", "brackets more than 20 deep"),
        ("100000*gdn", "more than 10000 blocks"),
    ],
)
def test_wrong_patterns_say_where(pattern, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern, KNOWN)
