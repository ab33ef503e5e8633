"""Loss by position: state by state the same as in one pass, and states that grow are seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evals.held_out import running_text
from evals.positions import _bin_ends, draw_positions, evaluate_positions
from pretrain.common.errors import UserError
from pretrain.config import DataConfig, DataSource
from pretrain.data.batches import open_data
from pretrain.data.manifest import Manifest
from tests.helpers.loaded_model import loaded

pytestmark = pytest.mark.usefixtures("processes")


def test_bins_double_and_end_with_the_text():
    assert _bin_ends(16, 64) == [4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert 16 in _bin_ends(16, 16)


def test_losses_are_those_of_one_pass(corpus):
    found = loaded(corpus)
    result = evaluate_positions(found, factor=4, sequences=2)
    assert result["sequences"] == 2
    text = running_text(found, None, 2 * 64 + 1)
    rows = []
    for start in (0, 64):
        ids = torch.from_numpy(text[start : start + 65][None])
        rows.append(found.model(ids[:, :-1], ids[:, 1:])[0].detach().numpy())
    whole = np.mean(rows, axis=0)
    for entry in result["bins"]:
        expected = whole[entry["from"] : entry["to"]].mean()
        assert entry["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    expected = whole[16:].mean() - whole[8:16].mean()
    assert result["beyond_training_length"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_every_number_of_a_result_is_one(corpus, factor):
    for seq_len in (2, 5, 16):
        result = evaluate_positions(loaded(corpus, seq_len=seq_len), factor=factor, sequences=1)
        json.dumps(result, allow_nan=False)
        assert (result["beyond_training_length"] is None) == (factor == 1)
        assert seq_len in result["positions_of_state_rms"]


def test_states_are_told_apart_from_caches(corpus, tmp_path):
    result = evaluate_positions(loaded(corpus, "gdn attn m2rnn"), factor=4, sequences=1)
    assert list(result["state_rms"]) == ["0 gdn", "2 m2rnn"]
    for sizes in result["state_rms"].values():
        assert len(sizes) == len(result["positions_of_state_rms"])
        assert min(sizes) > 0
    assert draw_positions(result, tmp_path / "p.png").stat().st_size > 5000
    plain = evaluate_positions(loaded(corpus, "2*attn"), factor=2, sequences=1)
    assert plain["state_rms"] == {}
    assert draw_positions(plain, tmp_path / "q.png").stat().st_size > 5000


def test_a_state_that_never_forgets_grows(corpus):
    """Linear attention without decay sums up all it has seen; a decay bounds it."""
    heads = {"num_heads": 2, "chunk_size": 8}
    sums, forgets = (
        evaluate_positions(loaded(corpus, mixer, mixers={mixer: heads}), factor=16, sequences=1)
        for mixer in ("linear_attn", "retnet")
    )
    growth = []
    for result in (sums, forgets):
        (sizes,) = result["state_rms"].values()
        growth.append(sizes[-1] / sizes[result["positions_of_state_rms"].index(16)])
    assert growth[0] > 4
    assert growth[0] > 1.5 * growth[1]


def test_every_pass_of_a_loop_has_a_state(corpus):
    looped = loaded(corpus, "attn gdn gdn", recursion={"prelude": 1, "coda": 1, "times": 2})
    result = evaluate_positions(looped, factor=2, sequences=1)
    assert list(result["state_rms"]) == ["1 gdn, pass 1", "1 gdn, pass 2", "2 gdn"]


def test_the_text_is_documents_of_all_sources_once_each(corpus, other_corpus):
    found = loaded(corpus)
    blend = [DataSource(str(p)) for p in (corpus, other_corpus)]
    found.run.data = DataConfig(blend=blend)
    text, eod = running_text(found, None, 10**9), found.tokenizer.eod_id
    documents = [tuple(part) for part in np.split(text, np.flatnonzero(text == eod) + 1)[1:-1]]
    expected = []
    for stream in open_data(found.run.data).valid:
        ids = stream.read(0, len(stream))
        expected.append([tuple(p) for p in np.split(ids, np.flatnonzero(ids == eod) + 1)[:-1]])
    assert sorted(documents) == sorted(expected[0] + expected[1])
    sources = [document in expected[0] for document in documents]
    assert sorted(sources) not in (sources, sources[::-1]), "mixed"


def test_bad_input(corpus, tmp_path):
    tokens = Manifest.load(str(corpus))
    assert tokens.shards
    with pytest.raises(UserError, match="fewer than one sequence of 100000 x 16"):
        evaluate_positions(loaded(corpus), factor=100_000)
