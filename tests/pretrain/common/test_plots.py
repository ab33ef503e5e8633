"""Text in pictures is what it says."""

from __future__ import annotations

import warnings

from matplotlib.figure import Figure

from pretrain.common.plots import plot_text
from pretrain.run_directory import RunDirectory
from pretrain.training.loss_curve import plot_loss_curve
from tests.helpers.nasty_names import random_names


def test_names_are_drawn_as_they_are(tmp_path):
    names = [*random_names(40), "\x00\x07bell", "a\nb", "\udc80"]
    figure = Figure(figsize=(20, 20))
    axes = figure.subplots()
    for name in names:
        axes.plot([0, 1], [0, 1], label=plot_text(name))
    axes.set_title(plot_text(names[0]))
    axes.set_yticks(range(3), [plot_text(name) for name in names[:3]])
    legend = axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "a.png")
    assert len(legend.get_texts()) == len(names)
    for text, name in zip(legend.get_texts(), names, strict=True):
        content, formula = text._preprocess_math(text.get_text())  # type: ignore[attr-defined]
        assert not formula
        if name.isprintable():
            assert content.removeprefix("\u200b") == name


def test_the_curve_of_a_run_with_any_name_is_drawn(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_metrics([{"step": s, "tokens": s, "loss": 3.0 / s} for s in (1, 2, 3)])
    for name in random_names(8, seed=1):
        path = plot_loss_curve(run, name, 2.0)
        assert path is not None and path.stat().st_size > 5000


def test_a_long_text_keeps_both_ends():
    assert plot_text("abcdefghij", 5) == "ab…ij"
    assert plot_text("abcde", 5) == "abcde"
