"""Models of every kind of layer and loop as transformers loads them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from pretrain.export.hugging_face import write_hugging_face
from pretrain.model.build import build_model
from tests.helpers.recursion_kinds import KINDS, UNIVERSAL_BLOCKS
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB, settings

SETTINGS: dict[str, dict[str, Any]] = {
    "loop": {
        "pattern": "attn gdn gdn",
        "mixers": {**settings().mixers},
        "recursion": {"prelude": 1, "times": 3, "lora_rank": 2, "step_signal": "learned"},
    },
    "options": {
        "block_norm": "sandwich",
        "block_norms": {"attn": "post"},
        "mixers": {**settings().mixers, "attn": SMALL["attn"][-2]},
        "logit_softcap": 5.0,
        "embedding_scale": 0.5,
        "residual_scale": 0.7,
        "logit_scale": 2.0,
        "scale_embeddings": True,
        "mup_base_hidden_size": 12,
        "tie_embeddings": False,
    },
    "experts": {
        "pattern": "attn gdn",
        "moe": {
            "num_experts": 4,
            "intermediate_size": 16,
            "shared_intermediate_size": 8,
            "shared_gate": True,
            "score": "sigmoid",
            "bias_update_rate": 0.1,
            "first_dense": 1,
        },
    },
    "depth": {
        "recursion": {
            "prelude": 1,
            "coda": 1,
            "times": 2,
            "adapter": True,
            "halting": True,
            "state_init": "random",
            "normalize_state": True,
        },
    },
    "universal": {
        "pattern": "attn gdn",
        "recursion": KINDS["published"],
        **UNIVERSAL_BLOCKS,
        "scale_embeddings": True,
    },
}


def settings_of(name):
    """The settings of a model of two blocks of one mixer, or of one of SETTINGS."""
    if name in SETTINGS:
        return settings(**SETTINGS[name])
    return settings(pattern=f"2*{name}", mixers={name: SMALL.get(name, [{}])[-1]})


def built(name, seed=2):
    return build_model(settings_of(name), VOCAB, seed=seed).eval()


def exported(model, folder, vocabulary=None):
    reason = write_hugging_face(model, folder, 64, 0, torch.float32, vocabulary)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=reason is not None
    )
    return loaded.eval(), reason


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def check_cached_generation(model, new=12):
    """Texts of a batch, padded on the left, are those that are computed anew for every token.

    Every call but the first has one token for each row.
    """
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :5] = 0
    mask[2, :1] = 0
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = None
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, inputs, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    cached = model.generate(ids, attention_mask=mask, **options)
    hook.remove()
    assert lengths == [9] + [1] * (new - 1)
    anew = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert cached.tolist() == anew.tolist()
    alone = model.generate(ids[:1, 5:], **options)
    assert cached[0, 5:].tolist() == alone[0].tolist()
