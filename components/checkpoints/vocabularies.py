"""Vocabularies of models that are to be mixed: which tensors have a row for each token, and whether tokens mean equal rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from components.checkpoints.safetensors import EMBEDDINGS, HEADS
from components.errors import CheckpointError, listed

_BY_TOKEN = (*EMBEDDINGS, *HEADS, *(head.replace(".weight", ".bias") for head in HEADS))


def is_by_token(name: str) -> bool:
    """Whether a tensor has one row for each token: the input embedding, the head, the head's bias."""
    return any(name == end or name.endswith(f".{end}") for end in _BY_TOKEN)


def token_ids(directory: Path) -> dict[str, int]:
    """token -> id from a directory's tokenizer.json, empty where there is none. Raises CheckpointError for a broken one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it again") from error
    vocabulary = parsed.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram models: [[token, score], …]
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    found = {str(t): int(i) for t, i in vocabulary.items()}
    found.update({str(t["content"]): int(t["id"]) for t in parsed.get("added_tokens", [])})
    return found


def same_tokenizer_file(a: Path, b: Path) -> bool:
    """Whether two directories have the same bytes as tokenizer.json; it need not be parsed then, which takes a while."""
    files = [directory / "tokenizer.json" for directory in (a, b)]
    if a == b or not all(file.is_file() for file in files):
        return a == b
    return files[0].stat().st_size == files[1].stat().st_size and files[0].read_bytes() == files[1].read_bytes()


def token_clashes(a: Path, b: Path) -> list[str]:
    """`clashes` of two directories' tokenizers."""
    return [] if same_tokenizer_file(a, b) else clashes(token_ids(a), token_ids(b))


def clashes(a: Mapping[str, int], b: Mapping[str, int], *, rows: int | None = None) -> list[str]:
    """Tokens that mean different rows on the two sides, as one line or none. Tokens that only one side knows do not clash, nor
    do those beyond the first `rows`."""
    first, second = ({token: i for token, i in ids.items() if rows is None or i < rows} for ids in (a, b))
    found = sorted(t for t in first.keys() & second.keys() if first[t] != second[t])
    by_id = {i: t for t, i in first.items()}
    found += sorted(t for t, i in second.items() if t not in first and i in by_id and by_id[i] not in second)
    if not found:
        return []
    shown = listed([f"{t!r} {first.get(t)} and {second.get(t)}" for t in found], 3)
    return [f"vocabulary: {len(found)} tokens have other ids ({shown})"]
