"""Hide what looks like a key or a password in text that is kept with a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

MASK = "****"
_SECRETS = re.compile(
    "|".join(
        (
            r"\bhf_[A-Za-z0-9]{8,}",  # Hugging Face
            r"\bsk-[A-Za-z0-9_-]{8,}",  # OpenAI, Anthropic
            r"\bgh[a-z]_[A-Za-z0-9]{8,}|\bgithub_pat_\w{8,}|\bglpat-[\w-]{8,}",  # GitHub, GitLab
            r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}",  # AWS
            r"\bAIza[\w-]{20,}|\bya29\.[\w-]{20,}",  # Google
            r"\bxox[a-z]-[A-Za-z0-9-]{8,}",  # Slack
            r"\bpypi-[\w-]{16,}|\bnpm_[A-Za-z0-9]{16,}|\br8_[A-Za-z0-9]{16,}",
            r"\b(?:local-)?[0-9a-f]{40}\b|\bwandb_v\d_\w{8,}",  # Weights & Biases
            r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # JSON web tokens
            r"\bsk_live_\w{8,}|\bnvapi-[\w-]{8,}",  # Stripe, NVIDIA
            r"(?s:(?<=PRIVATE KEY-----).+?(?=-----END|\Z))",  # in a diff each line has its sign
        )
    )
)
# Names that end so; not tokenizer.path or train.tokens.
_NAME = (
    r"[\w.-]*(?:api[_-]?key|access[_-]?key|account[_-]?key|private[_-]?key|secret(?:[_-]?key)?"
    r"|passw(?:or)?d|passphrase|passwd|pass|pwd|token|credentials?|bearer|[A-Z]_KEY)"
)
_QUOTED = r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'"
_ASSIGNED = re.compile(
    rf"(?i)(?<![\w.-])(?P<name>{_NAME}[\"']?\s*(?::=|=|:)\s*|bearer\s+)"
    rf"(?P<value>{_QUOTED}|[^\s\"',;(){{}}\[\]]+)"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@:\"']*:[^\s/@\"']+(?=@)|(?<=://)[^\s/@:\"']{20,}(?=@)")
# A variable or type that code gives a token: token = batch.next_token, token: Tensor.
_EXPRESSION = re.compile(r"[A-Za-z_][A-Za-z_.]*|\d{1,6}")


def masked(text: str) -> str:
    """Return text, such as a diff, with ``****`` for what looks like a key, token or password.

    Seen are the forms in which well-known services write theirs, and what is assigned to a name
    such as ``api_key`` or ``HF_TOKEN``. What looks like neither stays.
    """

    def mask_value(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if "token" in name.lower() and _EXPRESSION.fullmatch(value):
            return found[0]
        return f"{name}{value[0]}{MASK}{value[0]}" if value[0] in "\"'" else name + MASK

    return _ASSIGNED.sub(mask_value, _IN_ADDRESS.sub(MASK, _SECRETS.sub(MASK, text)))


def masked_command(arguments: Sequence[str]) -> str:
    """Return a command as the shell takes it, with the values of secret options masked.

    Beside what :func:`masked` sees, all that follows ``--NAME`` or ``NAME=`` of a secret name.
    """
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = re.fullmatch(f"(?i){_NAME}", name) is not None
        if hide:
            shown.append(MASK)
        elif secret and equals:
            shown.append(f"{name}={MASK}")
        else:
            shown.append(masked(argument))
        hide = secret and not equals and not hide and argument.startswith("-")
    return shlex.join(shown).replace(shlex.quote(MASK), MASK)
