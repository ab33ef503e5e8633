import shutil

import numpy as np
import pytest

from data_prep.inspection import histogram, inspect, verify
from pretrain.common.errors import UserError


def test_verify_is_content_with_a_whole_data_set(small_data, capsys):
    verify(small_data)
    assert "files match the manifest" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train-text-00002.bin", "valid-text-00000.idx"])
def test_verify_names_a_shard_of_which_one_bit_changed(tmp_path, small_data, name):
    data = shutil.copytree(small_data, tmp_path / "data")
    content = bytearray((data / name).read_bytes())
    content[-3] ^= 1
    (data / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged") as error:
        verify(data)
    assert str(error.value).count("damaged") == 1


def test_verify_names_what_is_missing(tmp_path, small_data):
    data = shutil.copytree(small_data, tmp_path / "data")
    (data / "train-text-00002.bin").unlink()
    (data / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(UserError, match=r"tokenizer\.model is damaged.*00002\.bin is missing"):
        verify(data)


def test_inspect_shows_counts_lengths_and_text(small_data, capsys):
    inspect(small_data)
    shown = capsys.readouterr().out
    assert "length of documents, in tokens" in shown
    assert "█" in shown
    assert "train-text-00000, document" in shown
    assert "alpha" in shown
    assert "epsilon\tzeta" in shown.expandtabs(1).replace("epsilon zeta", "epsilon\tzeta")


def test_the_histogram_counts_by_powers_of_two():
    lines = [line.split() for line in histogram(np.array([4, 5, 7, 16, 17]))]
    assert [(line[0], line[2], line[3]) for line in lines] == [
        ("4", "7", "3"),
        ("8", "15", "0"),
        ("16", "31", "2"),
    ]
