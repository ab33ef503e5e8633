"""Dropout: what it leaves out, and that it is the same however a batch is gone through."""

from __future__ import annotations

import pytest
import torch

import pretrain
from pretrain.common.config_loader import ConfigError, build_config
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.model.build import build_stages
from pretrain.nn.dropout import EMBEDDING, Dropout
from pretrain.parallel.context import current_context
from pretrain.training.engine import Engine
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import batches

pytestmark = pytest.mark.usefixtures("processes")
SEQ_LEN = 32  # of the rows of batches


def settings(**changes):
    values = {
        "hidden_size": 16,
        "pattern": "gdn attn",
        "mlp": {"ratio": 2},
        "dropout": 0.3,
        "mixers": {"gdn": {"num_heads": 2, "head_dim": 4}, "attn": {"num_heads": 2}},
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def make(checkpointing="none", **changes):
    (model,) = build_stages(
        settings(**changes), VOCAB, seed=0, seq_len=SEQ_LEN, activation_checkpointing=checkpointing
    )
    return model


def test_as_many_are_left_out_as_were_asked_for_and_the_rest_grows():
    dropout = Dropout(0.3, 50, current_context(torch.float32))
    dropout.begin_step(0, 0, 0, 1)
    drop = dropout.next_micro_batch()
    x = torch.ones(400, 1, 500)
    found = drop(x, EMBEDDING)
    assert set(found.unique().tolist()) == {0.0, x.new_tensor(1 / 0.7).item()}
    assert abs(float((found == 0).float().mean()) - 0.3) < 5 * (0.21 / x.numel()) ** 0.5


def test_every_place_step_sequence_and_seed_has_a_mask_of_its_own():
    dropout = Dropout(0.5, 20, current_context(torch.float32))
    masks = []
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        dropout.begin_step(seed, step, 0, 1)
        for _ in range(2):
            drop = dropout.next_micro_batch()
            for place in (EMBEDDING, (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
                masks += (drop(torch.ones(40, 1, 8), place) > 0).view(2, -1).tolist()
    assert len(set(map(tuple, masks))) == len(masks) == 3 * 2 * 5 * 2


@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])
def test_the_size_of_micro_batches_changes_nothing(micro_batch_size):
    def train(size):
        engine, results = Engine(make(), OptimizerConfig(lr=1e-2)), []
        for step in range(3):
            engine.begin_step(0, step)
            results.append(engine.train_step(batches(step, rows=8, micro_batch_size=size), 1e-2))
        return torch.tensor([(r.loss, r.grad_norm) for r in results])

    torch.testing.assert_close(train(micro_batch_size), train(1), rtol=1e-5, atol=0)


def test_the_global_batch_is_shared_out_with_its_masks():
    def masks(rank, world_size):
        dropout = Dropout(0.5, 6, current_context(torch.float32))
        dropout.begin_step(0, 0, rank, world_size)
        return [dropout.next_micro_batch()(torch.ones(12, 1, 4), EMBEDDING) for _ in range(2)]

    four = masks(0, 1)
    assert torch.equal(masks(0, 2)[0], four[0])
    assert torch.equal(masks(1, 2)[0], four[1])


@pytest.mark.parametrize("recursion", [None, {"prelude": 1, "times": 3}])
def test_recomputed_blocks_leave_out_the_same(recursion):
    """Also when other micro-batches have gone ahead before the backward pass, as in a pipeline."""
    found = []
    for checkpointing in ("none", "selective", "block"):
        model = make(checkpointing, recursion=recursion)
        model.begin_step(0, 5)
        losses = [
            model(batch.tokens, batch.targets, sequences=batch.sequences).sum()
            for batch in batches(0, rows=3, micro_batch_size=1)
        ]
        for loss in losses:
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    for recomputed in found[1:]:
        torch.testing.assert_close(recomputed, found[0], rtol=0, atol=0)


def test_nothing_is_left_out_in_evaluation():
    model, plain = make().eval(), make(dropout=0.0).eval()
    (batch,) = batches(0, rows=1)
    assert torch.equal(model(batch.tokens, batch.targets), plain(batch.tokens, batch.targets))
    assert not torch.equal(model.train()(batch.tokens), plain(batch.tokens))


def test_all_of_it_is_refused():
    with pytest.raises(ConfigError, match=r"dropout is 1\.0, expected less than 1"):
        settings(dropout=1.0)


@pytest.mark.parametrize("seq_len", [None, 8, 12])
def test_rows_have_the_masks_of_their_tokens_in_one_row(seq_len):
    def draw(tokens, rows, length):
        dropout = Dropout(0.5, length, current_context(torch.float32))
        dropout.begin_step(0, 0, 0, 1)
        x = torch.ones(tokens, rows, 4)
        return [dropout.next_micro_batch()(x, EMBEDDING).transpose(0, 1) for _ in range(2)]

    folded, one = draw(12, 3, seq_len), draw(36, 1, seq_len or 12)
    for rows, row in zip(folded, one, strict=True):
        assert torch.equal(rows.flatten(0, 1), row[0])
        assert len(set(map(tuple, rows.flatten(1).tolist()))) == 3


def test_a_model_trains_on_several_rows():
    model = pretrain.build_model("gdn attn", hidden_size=16, vocab_size=VOCAB, dropout=0.5)
    tokens = torch.arange(20).view(2, 10) % VOCAB
    assert not torch.equal(model(tokens), model.eval()(tokens))
