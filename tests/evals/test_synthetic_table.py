"""The table of all mixers has a cell for each, is kept as it grows, and names what is missing."""

from __future__ import annotations

from evals.synthetic import __main__ as synthetic
from evals.synthetic import table
from evals.synthetic.table import SETTINGS, TableConfig, cell, markdown
from pretrain.common.config_loader import load_config
from pretrain.nn.mixers import registry


def test_every_mixer_has_a_cell_of_every_task():
    config = load_config(TableConfig, SETTINGS)
    assert len(config.tasks) == 5
    for mixer in registry():
        configs = [cell(config, task, mixer, "table") for task in config.tasks]
        assert all(c.mixers.keys() == {mixer} for c in configs)
        assert {c.minutes for c in configs} == {config.minutes}
    assert 0 < config.minutes <= 2


def test_the_table_grows_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "stop_processes", lambda: None)
    settings = tmp_path / "table.yaml"
    settings.write_text(
        "minutes: 0.000001\n"
        "settings: {hidden_size: 8, length: 8, batch_size: 2, test_rows: 2}\n"
        "tasks: {parity: {steps: 50}, s3: {steps: 50}}\n"
        "mixers: {gru: {mixer: {num_heads: 1}}}\n"
    )
    out = tmp_path / "table.md"
    options = ["table", "--settings", str(settings), "--out", str(out), "--mixers", "gru"]
    options += ["--output", str(tmp_path / "cells")]
    assert synthetic.main([*options, "--tasks", "parity"]) == 0
    (first,) = (tmp_path / "cells").iterdir()
    written = first.stat().st_mtime_ns
    assert synthetic.main(options) == 0
    assert first.stat().st_mtime_ns == written
    text = out.read_text()
    assert "| `gru` |" in text and "gru on parity (step 1 of 50)" in text

    def refuse(config, *_):
        raise ValueError("rows are too short")

    monkeypatch.setattr(table, "result_of", refuse)
    assert synthetic.main([*options, "--tasks", "parity"]) == 1
    assert "parity, gru: refused: rows are too short" in capsys.readouterr().err

    config = load_config(TableConfig, settings)
    missing = markdown({("parity", "gru"): None, ("s3", "gru"): None}, config)
    assert "| `gru` | not run | not run | 0.0 |" in missing
    assert "2 of 2 cells have not been run." in missing
