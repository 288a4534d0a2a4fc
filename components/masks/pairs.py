"""From preference data to tokenised pairs: read from files, or made by letting both models answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.errors import DataError
from components.masks.anchor import answer
from components.masks.data import PreferenceData, load_preferences, load_prompts
from components.masks.masked_model import MaskedModel
from components.masks.objective import Forwards
from components.masks.preferences import Pair, encode_pairs, encode_prompt
from components.masks.settings import MaskSettings


@dataclass(frozen=True)
class PairData:
    """Usable pairs, or the prompts whose answers will be pairs, and how many rows were left out for which reason."""

    pairs: list[Pair] = field(default_factory=list)
    prompts: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """Row number and tokens of each prompt that both models are still to answer."""
    left_out: dict[str, int] = field(default_factory=lambda: {"too_long": 0})
    where: str = ""

    def counts(self, prefix: str) -> dict[str, int]:
        """Rows left out, by reason, as an artifact's `data` has them."""
        return {f"{prefix}_{reason}": n for reason, n in self.left_out.items()}


def open_pairs(data: PreferenceData | Path | None, tokenizer: Any, settings: MaskSettings) -> PairData:
    """Read and tokenise what `data` names. Raises DataError for broken data and where the length limit leaves nothing."""
    if data is None:
        return PairData()
    if isinstance(data, Path):
        data = PreferenceData(file=data)
    if data.prompts is not None:
        return _open_prompts(data.prompts, tokenizer, settings)
    found = load_preferences(data)
    pairs, too_long = encode_pairs(tokenizer, found.rows, settings.max_length, data.where)
    return PairData(pairs, left_out={"too_long": too_long, **found.left_out}, where=data.where)


def _open_prompts(path: Path, tokenizer: Any, settings: MaskSettings) -> PairData:
    """Prompts that leave their answers room enough, so that no pair has to be thrown away after it was made."""
    everyone = [(p.line, encode_prompt(tokenizer, p.prompt)) for p in load_prompts(path)]
    room = settings.max_length - settings.pair_new_tokens
    kept = [(line, tokens) for line, tokens in everyone if len(tokens) <= room]
    if not kept:
        raise DataError(
            f"{path}: every prompt is longer than {room} tokens (mask.max_length − mask.pair_new_tokens); raise max_length"
        )
    return PairData(prompts=kept, left_out={"too_long": len(everyone) - len(kept)}, where=str(path))


def answered(
    sets: Sequence[PairData], masked: MaskedModel, tokenizer: Any, new_tokens: int, how: Forwards
) -> list[PairData]:
    """The same sets with a pair for each prompt that the two models answer differently: chosen is the aligned model's greedy
    answer, rejected the finetune's. On ranks every rank calls this and has the same pairs.

    An answer that was cut at `new_tokens` keeps no end token. It is scored as the beginning that it is: log π of a prefix is
    well defined, while an end token that neither model wrote would teach the mask to stop in mid-sentence. Answers are held
    in memory alone: what a finetune without its safety says is written nowhere.

    Raises DataError when the models answer every prompt of a set alike.
    """
    made = {i: [p for _, p in data.prompts] for i, data in enumerate(sets) if data.prompts}
    rows = {}
    for weights in ("aligned", "finetuned") if made else ():
        masked.write(weights)
        for i, prompts in made.items():
            rows[weights, i] = answer(masked.model, tokenizer, prompts, new_tokens, how)
    found = list(sets)
    for i in made:
        data = sets[i]
        lines = [line for line, _ in data.prompts]
        both = zip(lines, rows["aligned", i], rows["finetuned", i], strict=True)
        pairs = [Pair(line, chosen, rejected) for line, chosen, rejected in both if chosen != rejected]
        if not pairs:
            raise DataError(
                f"{data.where}: the aligned model and the finetune answer all {len(lines)} prompts alike, so there is no pair "
                "to learn from; give other prompts, or pairs of your own"
            )
        left_out = {**data.left_out, "no_difference": len(lines) - len(pairs)}
        found[i] = PairData(pairs, left_out=left_out, where=data.where)
    return found
