"""Keys are masked in what a run keeps of its command and changes; other text stays as it is."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.common.masking import MASK, masked, masked_command
from pretrain.training import environment

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def of(alphabet: str, length: int) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=length, max_size=length)


KEYS = {
    "Hugging Face": of(LETTERS, 34).map("hf_{}".format),
    "OpenAI": of(LETTERS, 48).map("sk-proj-{}".format),
    "Anthropic": of(LETTERS, 40).map("sk-ant-api03-{}".format),
    "GitHub": of(LETTERS, 36).map("ghp_{}".format),
    "GitHub, fine": of(LETTERS, 60).map("github_pat_{}".format),
    "GitLab": of(LETTERS, 20).map("glpat-{}".format),
    "AWS": of("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16).map("AKIA{}".format),
    "Google": of(LETTERS, 35).map("AIza{}".format),
    "Slack": of(LETTERS, 30).map("xoxb-{}".format),
    "W&B": of("0123456789abcdef", 40),
    "W&B, new": of(LETTERS, 40).map("wandb_v1_{}".format),
    "JSON web token": of(LETTERS, 30).map(lambda t: f"eyJ{t}.eyJ{t}.{t}"),
}
PLACES = [
    "{}",
    "+KEY = '{}'\n",
    "x={} y",
    "https://user:{}@host/x.git",
    "--key {}",
    '{{"a": "{}"}}',
]
NAMES = ["api_key", "API-KEY", "HF_TOKEN", "wandb_api_key", "my.password", "AWS_SECRET_ACCESS_KEY"]
NAMES += ["passwd", "client_secret", "auth-token", "logging.token", "db_pwd", "credential"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("service", KEYS)
@given(data=st.data())
def test_keys_are_masked_wherever_they_stand(service, place, data):
    key = data.draw(KEYS[service])
    found = masked(place.format(key))
    assert key not in found and key[-8:] not in found
    assert MASK in found
    assert key not in masked_command(["python", "-m", "pretrain", place.format(key)])


@pytest.mark.parametrize("name", NAMES)
@given(
    value=st.text(LETTERS + "+/=_!$%^~-", min_size=8, max_size=40).filter(
        lambda v: v[0] not in "=!"
    )
)
def test_what_is_assigned_to_a_secret_name_is_masked(name, value):
    value += "7x"
    for text in (
        f"{name}={value}",
        f"+{name}: {value}\n",
        f'{name} = "{value}"',
        f"'{name}': '{value}'",
    ):
        assert value not in masked(text), text
    for arguments in (
        [f"{name}={value}"],
        [f"--{name}={value}"],
        [f"--{name}", value],
        [f"--{name}", f"{value} and more"],
        [f"{name}={value} and more"],
    ):
        shown = masked_command(["run", *arguments, "seed=1"])
        assert value not in shown and "and more" not in shown
        assert shown.endswith("seed=1")


@pytest.mark.parametrize(
    "text",
    [
        "train.tokens=1000 sample.tokens=0 --max-tokens 4000",
        "tokenizer.path=data/stdlib/tokenizer.model model.num_key_value_heads=8",
        "+    token = batch.next_token\n-    token: Tensor,\n+    token = tokens[0]\n",
        "+    bos_token=tokenizer.bos\n+    for token in tokens:\n",
        "index 3cfe03c..b60ab58 100644\n--- a/secrets.py\n+++ b/secrets.py\n",
        f"sha256 {'ab' * 32}",
        "https://github.com/me/project.git git@github.com:me/project.git",
        "task-name risk-free sk-learn secretary passwordless",
        "",
    ],
)
def test_what_is_no_key_stays(text):
    assert masked(text) == text


@given(st.lists(st.text("abc ='\"*-", max_size=20), max_size=5))
def test_a_command_without_keys_is_what_the_shell_takes(arguments):
    assert shlex.split(masked_command(arguments)) == arguments


def test_the_environment_of_a_run_has_neither_keys_nor_what_it_was_asked_to_leave_out(
    tmp_path, monkeypatch
):
    key = "hf_" + "Ab1" * 11
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "settings.py").write_text("A = 1\n")
    who = ["-c", "user.name=x", "-c", "user.email=x@y"]
    git = ["git", "-C", str(tmp_path), *who]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    (tmp_path / "settings.py").write_text(f"A = 2\nWANDB_API_KEY = '{'0f' * 20}'\n")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "pretrain/training/module.py"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pretrain", "a.yaml", f"name={key}"])
    found = environment.describe_environment()
    assert "+A = 2" in found["git_diff"] and "a.yaml" in found["command"]
    assert key not in json.dumps(found) and "0f0f" not in json.dumps(found)
    found = environment.describe_environment(command_and_diff=False)
    assert found["command"] is found["git_diff"] is None
    assert found["git_commit"] is not None


@pytest.mark.parametrize("sign", ["", "+", "-", " "])
@pytest.mark.parametrize("kind", ["", "RSA ", "OPENSSH ", "ENCRYPTED "])
def test_a_private_key_is_masked_in_every_line_of_a_diff(sign, kind):
    lines = [f"-----BEGIN {kind}PRIVATE KEY-----", "MIIEabc+/9", "x9Zk==", "-----END", "after = 1"]
    found = masked("\n".join(sign + line for line in lines))
    assert "MIIE" not in found and "x9Zk" not in found
    assert "PRIVATE KEY" in found and "after = 1" in found
    assert "MIIE" not in masked("\n".join(sign + line for line in lines[:2])), "cut off"


@pytest.mark.parametrize("text", ["WANDB_KEY=abc12def", "db_pass: abc12def", "sk_live_abc12def3"])
def test_keys_by_other_names_are_masked(text):
    assert "abc12def" not in masked(text)
