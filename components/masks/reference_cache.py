"""Reference log-probabilities on disk, found again by (model, data): dozens of finetunes of one aligned model that train on the
same pairs need them once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from components.masks.objective import SCORE_BATCH, Forwards
from components.masks.preferences import Row
from components.records import canonical_json
from components.storage import write_atomic


@dataclass(frozen=True)
class ReferenceCache:
    """A directory of `<key>.json`. A file holds log-probabilities and hashes of tokens, never text.

    Promise: what is found is, bit for bit, what this run would have computed. So a key holds all that decides the bits: whose
    weights they are, the tokens of all rows in their order (they decide which rows share a forward), how forwards are padded,
    dtype, device, threads, the libraries. What differs in any of it is computed and kept beside. How many ranks there are
    does not matter: a row is scored by one rank, in the same company. Numbers are kept as float64 and come back exact.
    Nobody waits for another: runs that begin at the same time each compute, and write the same.
    """

    directory: Path
    models: Mapping[str, Any]
    """Name of a reference (`aligned`, `finetuned`) -> identity, as JSON, of what its weights and architecture come from. A
    reference that is not named here is not kept."""
    version: int = 1
    """Of the code that computes log-probabilities."""

    def get(
        self, reference: str, rows: Sequence[Row], model: Any, how: Forwards, compute: Callable[[], list[float]]
    ) -> list[float]:
        """log π of each row under the weights of `reference`: found, or computed and kept. On ranks a collective: the first one
        reads and writes, all return what it has."""
        if reference not in self.models:
            return compute()
        key = self._key(reference, rows, model, how)
        path = self.directory / f"{_sha256(canonical_json(key))[:32]}.json"
        first = how.ranks.rank == 0
        found: list[float] | None = how.ranks.gather(_read(path, key, len(rows)) if first else None)[0]
        if found is not None:
            return found
        values = compute()
        # Values that are not finite end the training at its first step: not worth keeping, and no JSON.
        if first and all(map(math.isfinite, values)):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"key": key, "log_probs": values, "sha256": _sha256(json.dumps(values))}))
        return values

    def _key(self, reference: str, rows: Sequence[Row], model: Any, how: Forwards) -> dict[str, Any]:
        parameter = next(model.parameters())
        gpu = parameter.device.type == "cuda"
        return {
            "format": 1,
            "version": self.version,
            "model": self.models[reference],
            "rows": _sha256(json.dumps([[row.prompt, row.tokens] for row in rows])),
            "batches": [SCORE_BATCH, how.overhead],
            "dtype": str(parameter.dtype),
            "device": torch.cuda.get_device_name(parameter.device) if gpu else torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, key: Mapping[str, Any], rows: int) -> list[float] | None:
    """The values of a whole file of this key; None where there is none: it will be written anew."""
    try:
        kept = json.loads(path.read_bytes())
        values = kept["log_probs"]
        whole = kept["key"] == key and kept["sha256"] == _sha256(json.dumps(values)) and len(values) == rows
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return [float(value) for value in values] if whole else None
