"""Tell what the parts of a Hugging Face ``tokenizer.json`` do to a text."""

from __future__ import annotations

from typing import Any

# Parts of a tokenizer.json that divide a text and drop nothing of it.
_DIVIDING = {"ByteLevel", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"}


def byte_level(spec: dict[str, Any]) -> bool:
    """Return whether every token of a tokenizer.json is a string over the alphabet of 256 bytes."""
    kinds = {part["type"] for part in _parts(spec, "pre_tokenizer", "pretokenizers")}
    return _only_divides(spec) and "ByteLevel" in kinds and _decoders(spec) == ["ByteLevel"]


def byte_fallback(spec: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json spells what has no piece in bytes, and changes nothing."""
    decoders = _decoders(spec)
    fallback = bool(spec["model"].get("byte_fallback"))
    return _only_divides(spec) and fallback and decoders == ["ByteFallback", "Fuse"]


def _only_divides(spec: dict[str, Any]) -> bool:
    return not _parts(spec, "normalizer", "normalizers") and all(
        part["type"] in _DIVIDING
        and not part.get("add_prefix_space")
        and part.get("behavior") != "Removed"
        for part in _parts(spec, "pre_tokenizer", "pretokenizers")
    )


def _decoders(spec: dict[str, Any]) -> list[str]:
    return [part["type"] for part in _parts(spec, "decoder", "decoders")]


def _parts(spec: dict[str, Any], section: str, key: str) -> list[dict[str, Any]]:
    part = spec.get(section)
    return [] if part is None else part.get(key, [part])


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each of the 256 characters of byte-level BPE (GPT-2) stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
