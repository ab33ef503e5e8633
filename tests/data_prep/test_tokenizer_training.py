import pytest

from data_prep.config import DataPrepConfig, TokenizerConfig
from data_prep.tokenizer_training import is_validation, sample, train_sentencepiece
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.data.tokenizer import Tokenizer


def sample_config(sample_bytes, validation_fraction=0.0, **folders):
    sources = [
        {"name": name, "kind": "files", "paths": [str(folder)], "weight": weight}
        for name, (folder, weight) in folders.items()
    ]
    values = {
        "output": "unused",
        "sources": sources,
        "validation_fraction": validation_fraction,
        "tokenizer": {"sample_bytes": sample_bytes},
    }
    return build_config(DataPrepConfig, values, "test")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_equal_samples_give_equal_models_that_lose_nothing(tmp_path, stdlib_documents, kind):
    config = TokenizerConfig(kind=kind, vocab_size=500)
    model = train_sentencepiece(stdlib_documents[:5], config)
    assert model == train_sentencepiece(iter(stdlib_documents[:5]), config)
    path = tmp_path / "a.model"
    path.write_bytes(model)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 500
    assert tokenizer.eod_id == 1
    assert tokenizer.encode("\n\t") == [2, 3]
    sizes = tokenizer.bytes_per_token()
    for document in stdlib_documents[5:60]:
        ids = tokenizer.encode(document)
        assert tokenizer.decode(ids) == document
        assert sizes[ids].sum() == len(document.encode())


def test_long_lines_are_learned_from(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece(["abcabcabd " * 5_000], TokenizerConfig(vocab_size=268)))
    assert len(Tokenizer.load(path).encode("abcabcabd ")) < 9


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_that_the_sample_cannot_fill_names_one_that_it_can(kind):
    texts = [f"line {i} of a small text\n" for i in range(500)]
    with pytest.raises(UserError, match=r"vocab_size is 90000, but .* at most \d+") as error:
        train_sentencepiece(texts, TokenizerConfig(kind=kind, vocab_size=90_000))
    size = int(str(error.value).split()[-1])
    assert train_sentencepiece(texts, TokenizerConfig(kind=kind, vocab_size=size))
    with pytest.raises(UserError, match=r"vocab_size is 261, but .* at least \d+"):
        train_sentencepiece(texts, TokenizerConfig(kind=kind, vocab_size=261))


def test_the_sample_is_bounded_and_shared_by_weight(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(20):
            (tmp_path / name / f"{index}.txt").write_text(name * 10_000)
    config = sample_config(40_000, a=(tmp_path / "a", 3.0), b=(tmp_path / "b", 1.0))
    text = "".join(sample(config))
    assert (text.count("a"), text.count("b")) == (30_000, 10_000)


def test_no_file_crowds_out_the_others_of_the_sample(tmp_path):
    (tmp_path / "0.txt").write_text("L" * 1_000_000)
    for index in range(1, 10):
        (tmp_path / f"{index}.txt").write_text(str(index) * 500)
    text = "".join(sample(sample_config(20_000, a=(tmp_path, 1.0))))
    assert set("123456789L") == set(text)
    assert len(text) <= 20_000


def test_validation_documents_stay_out_of_the_sample(text_folder):
    text = "".join(sample(sample_config(10**9, 0.3, a=(text_folder, 1.0))))
    documents = [path.read_bytes() for path in text_folder.iterdir()]
    assert any(is_validation(document, 0.3) for document in documents)
    for document in documents:
        assert (document.decode() in text) != is_validation(document, 0.3)


def test_the_validation_fraction_is_about_that(stdlib_documents):
    assert not any(is_validation(str(i).encode(), 0.0) for i in range(1000))
    share = sum(is_validation(str(i).encode(), 0.2) for i in range(10_000)) / 10_000
    assert share == pytest.approx(0.2, abs=0.02)


def test_an_error_of_reading_keeps_its_words(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"other": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: no text field 'text', found: other"):
        train_sentencepiece(sample(sample_config(1000, a=(tmp_path, 1.0))), TokenizerConfig())
