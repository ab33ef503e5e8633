"""What marks documents and what restores text: no text makes a mark, and lossless is true."""

import functools
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.workers import tokenize
from pretrain.common.errors import UserError
from pretrain.data.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
ENDS = ("<eod>", "<|endoftext|>", "<|end_of_text|>", DEEPSEEK, "<eos>", "</s>", "<|im_end|>")


def byte_level(*added, special=(), normalizer=None, drop=()):
    """A GPT-2-like tokenizer with added tokens, and without the pieces of the bytes ``drop``."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(drop))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["some text, and more text."] * 9, trainer)
    model.add_tokens([AddedToken(t, special=False) if isinstance(t, str) else t for t in added])
    if normalizer is not None:
        model.normalizer = normalizer
    return model


def pieces(kind, end="</s>"):
    """A tokenizer whose end is one of its ordinary pieces, as its model alone could make it."""
    letters = "abcdefghijklmnopqrstuvwxyz<>/|_ .\n"
    if kind == "unigram":
        scores = [("<unk>", 0.0), (end, 0.0), *((c, -3.0) for c in letters)]
        return tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    if kind == "words":
        words = {"<unk>": 0, end: 1, "the": 2, "tag": 3}
        model = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return model
    parts = [end[:i] for i in range(1, len(end) + 1)]
    vocabulary = {c: i for i, c in enumerate(dict.fromkeys([*letters, *end, *parts]))}
    merges = [(end[:i], end[i]) for i in range(1, len(end))]
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    model.decoder = decoders.Fuse()
    return model


def loaded(folder, model):
    model.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "special": lambda: byte_level(special=["</s>", "<pad>"]),
    "not special": lambda: byte_level("</s>", special=["<pad>"]),
    "stripping": lambda: byte_level(AddedToken("</s>", lstrip=True, rstrip=True)),
    "single word": lambda: byte_level(AddedToken("</s>", single_word=True)),
    "deepseek": lambda: byte_level(DEEPSEEK),
    "normalized": lambda: byte_level("</s>", normalizer=normalizers.NFKC()),
    "lower case": lambda: byte_level("<eos>", normalizer=normalizers.Lowercase()),
    **{kind: functools.partial(pieces, kind) for kind in ("unigram", "words", "merges")},
}
SNIPPETS = [
    *ENDS,
    "<EOS>",
    "\uff1c/s\uff1e",
    "<pad>",
    "<unk>",
    "<",
    "/s>",
    " ",
    "  ",
    "\n",
    "the",
    "a",
]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=3), max_size=12).map("".join)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("tokenizer"), TOKENIZERS[request.param]())


@settings(max_examples=50, deadline=None)
@given(text=texts)
def test_no_text_makes_a_mark(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id not in ids
    assert tokenizer._vocabulary.get("<pad>") not in ids
    if tokenizer.lossless:
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


def test_which_of_these_are_lossless(tmp_path):
    found = {name for name, make in TOKENIZERS.items() if loaded(tmp_path, make()).lossless}
    assert found == {"special", "not special", "single word", "deepseek", "stripping"}


def test_a_text_with_the_end_in_it_stays_one_document(tmp_path):
    tokenizer = loaded(tmp_path, byte_level("</s>"))
    document = "the tag </s> strikes, </s></s>"
    part = tokenize([document.encode()], str(tokenizer.path), 0.0).splits["train"]
    assert part.tokens[-1] == tokenizer.eod_id and tokenizer.eod_id not in part.tokens[:-1]
    assert tokenizer.decode(part.tokens) == document


def test_a_long_text_is_cut_where_its_end_stands(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.data.tokenizer._LONGEST_LINE", 1000)
    tokenizer = loaded(tmp_path, byte_level("</s>"))
    text = "</s>\n" + "some more text to read </s\n" * 400 + "</s> </s>"
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id not in ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize("end", [*ENDS, "[EOS]", "[SEP]"])
def test_the_ends_that_models_have_are_found(tmp_path, end):
    tokenizer = loaded(tmp_path, byte_level("<other>", special=[end]))
    assert tokenizer.name_of(tokenizer.eod_id) == end


def test_a_mark_of_one_character_is_refused(tmp_path):
    spec = json.loads(byte_level("</s>").to_str())
    token = {**spec["added_tokens"][0], "id": spec["model"]["vocab"]["!"], "content": "!"}
    for special in (False, True):
        spec["added_tokens"] = [*spec["added_tokens"][:1], {**token, "special": special}]
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        if not special:
            assert Tokenizer.load(tmp_path).lossless
            continue
        with pytest.raises(UserError, match="the text '!' is read as the special token '!', exp"):
            Tokenizer.load(tmp_path)


MASK = AddedToken("<mask>", lstrip=True)
LOSSY: dict[str, Callable[[], Any]] = {
    "an added token that takes the space before it": lambda: byte_level(MASK, "</s>"),
    "one that takes the space after it": lambda: byte_level(AddedToken("<m>", rstrip=True), "</s>"),
    "one that the decoder reads as a byte": lambda: byte_level("\u00e9", "</s>"),
    "lower case": lambda: byte_level("</s>", normalizer=normalizers.Lowercase()),
    "a replaced word": lambda: byte_level(
        "</s>", normalizer=normalizers.Replace("colour", "color")
    ),
    "a byte without a piece": lambda: byte_level("</s>", drop=["\u0106"]),
}


@pytest.mark.parametrize("why", LOSSY)
def test_what_changes_text_is_not_lossless(tmp_path, why):
    assert not loaded(tmp_path, LOSSY[why]()).lossless


def test_what_drops_separators_is_not_lossless(tmp_path):
    model = byte_level("</s>")
    parts = [pre_tokenizers.Split(";", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    model.pre_tokenizer = pre_tokenizers.Sequence(parts)
    assert not loaded(tmp_path, model).lossless


def test_bytes_without_a_piece_count_nowhere(tmp_path):
    tokenizer = loaded(tmp_path, byte_level("</s>", drop=["\u0106"]))  # the byte 6
    ids = tokenizer.encode("a\x06 text \u00e9")
    assert tokenizer.decode(ids) == "a text \u00e9"
    assert tokenizer.bytes_per_token()[ids].sum() == len("a text \u00e9".encode())


def sentencepiece_model(path, **options):
    model = io.BytesIO()
    lines = ["the tag </s> strikes <sep> § here", "some more text to read, A and B"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        **options,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer.load(path)


@pytest.mark.parametrize("end", ["</s>", "<eod>", "§", "tag"])
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "word"])
def test_no_text_makes_a_control_piece(tmp_path, kind, end):
    options = {"byte_fallback": True, "vocab_size": 300} if kind != "word" else {"vocab_size": 20}
    tokenizer = sentencepiece_model(
        tmp_path / "a.model", model_type=kind, eos_piece=end, control_symbols=["<sep>"], **options
    )
    marks = {tokenizer.eod_id, tokenizer._model.piece_to_id("<sep>")}
    for text in (end, "<sep>", f"a {end} b", f"{end}{end}<sep>\n{end}", "tag tag"):
        ids = tokenizer.encode(text)
        assert marks.isdisjoint(ids)
        assert not tokenizer.lossless or tokenizer.decode(ids) == text


@pytest.mark.parametrize("rule", ["identity", "nfkc", "nfkc_cf", "nmt_nfkc_cf"])
def test_a_model_that_normalizes_is_not_lossless(tmp_path, rule):
    tokenizer = sentencepiece_model(
        tmp_path / "a.model",
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name=rule,
    )
    assert tokenizer.lossless == (rule == "identity")


def test_a_model_without_bytes_is_not_lossless(tmp_path):
    tokenizer = sentencepiece_model(tmp_path / "a.model", model_type="bpe", vocab_size=60)
    assert not tokenizer.lossless
