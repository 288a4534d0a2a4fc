"""What a run starts from, as far as headers and data files tell: models, and the masks that will be trained. No weights are
read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from components.checkpoints.dimensions import Dimensions
from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.writer import has_tokenizer
from components.errors import CheckpointError, RealignError
from components.masks.memory import Lengths, Stored, Weight, weights_of
from components.masks.preferences import Preference, encode_pairs, encode_prompt, load_preferences, load_prompts
from components.masks.presets import resolve
from pipelines.config import RunConfig
from pipelines.placement import Training

BYTES_A_TOKEN, TEMPLATE_TOKENS = 3, 16
"""Of text, where no tokenizer is there to ask; and what a chat template adds to it."""
SAMPLE = 1000
"""Rows of a data file that are looked at, about: reading all of a large one takes longer than the answer is worth."""
Text = str | list[dict[str, str]]


@dataclass(frozen=True)
class Model:
    """A root model as far as headers tell. `stored`: bytes that reading all its tensors gives."""

    checkpoint: Checkpoint
    numel: int
    stored: int

    @property
    def wide(self) -> int:
        """Bytes in fp32, as it is loaded for answering."""
        return 4 * self.numel


@dataclass
class Models:
    """Everything that a run starts from. A finetune that cannot be opened fails alone: it is in `errors` only."""

    aligned: Model
    dimensions: Dimensions
    finetunes: dict[str, Model]
    errors: dict[str, RealignError] = field(default_factory=dict)


def open_models(config: RunConfig) -> Models:
    """Headers of every model. Raises CheckpointError for the aligned one."""
    aligned = _model(open_checkpoint(config.aligned))
    models = Models(aligned, Dimensions.of(aligned.checkpoint.config, config.aligned), {})
    for finetune in config.finetunes:
        try:
            # Whether it is the right base is for the run to find out: it may have to hash both.
            opened = open_checkpoint(finetune.path, base=config.aligned, base_declared_equal=True)
            models.finetunes[finetune.name] = _model(opened)
        except RealignError as error:
            models.errors[finetune.name] = error
    return models


def _model(checkpoint: Checkpoint) -> Model:
    specs = [checkpoint.source.spec(name) for name in checkpoint.source.names()]
    return Model(checkpoint, sum(s.numel for s in specs), sum(s.nbytes for s in specs))


def trainings(config: RunConfig, models: Models, *, tokenize: bool) -> dict[str, Training]:
    """Node id -> every mask that the run trains, of models that could be opened. Without `tokenize` rows are taken to be as
    long as their texts can make them."""
    found: dict[str, Training] = {}
    for name in config.targets:
        members = config.members(name)
        if config.mask_owner(name) != name or any(m.name in models.errors for m in members):
            continue
        wanted = {"train_mask": config.mask.resolved}
        if "paper" in config.fusion.controls:
            wanted["train_mask_paper"] = resolve("paper", {})
        for step, settings in wanted.items():
            try:
                weights = _weights(config, models, name, settings)
            except CheckpointError as error:  # a tensor is missing: its own stages will say so
                models.errors[name] = error
                break
            anchors = [m.anchor for m in members if m.anchor is not None] if settings.anchor_weight > 0 else []
            tokenizer = models.finetunes[members[0].name].checkpoint.tokenizer_dir if tokenize else None
            lengths = _lengths(config.mask.preferences, anchors, settings.max_length, tokenizer)
            found[f"{name}/{step}"] = Training(name, weights, models.dimensions, lengths, settings)
    return found


def _weights(config: RunConfig, models: Models, name: str, settings: Any) -> list[Weight]:
    aligned = models.aligned.checkpoint.source
    if config.merge_named(name) is None:
        return weights_of(aligned, models.finetunes[name].checkpoint.source, settings)
    merged = Stored(4, mapped=False)
    return [Weight(w.name, w.numel, w.masked, w.aligned, merged) for w in weights_of(aligned, aligned, settings)]


def _lengths(preferences: Path, anchors: Sequence[Path], longest: int, tokenizer_dir: Path | None) -> Lengths:
    """Of the data files: of their tokens where there is a tokenizer that loads, else from the texts' bytes."""
    rows, asked = load_preferences(preferences), [p.prompt for path in anchors for p in load_prompts(path)]
    anchors_count = len(asked)
    rows, asked = rows[:: 1 + len(rows) // SAMPLE], asked[:: 1 + len(asked) // SAMPLE]
    found = None
    if tokenizer_dir is not None and has_tokenizer(tokenizer_dir):
        # What is wrong with a tokenizer is for its finetune's load stage to say; that fails alone.
        with contextlib.suppress(RealignError):
            found = _tokenized(tokenizer_dir, rows, asked, longest, preferences)
    sizes, prompts = found or _guessed(rows, asked, longest, 1 if tokenizer_dir is None else BYTES_A_TOKEN)
    return Lengths(
        longest=max(size for size, _ in sizes),
        mean=fmean(size for size, _ in sizes),
        longest_response=max(response for _, response in sizes),
        mean_response=fmean(response for _, response in sizes),
        prompt=max(prompts, default=0),
        anchors=anchors_count,
    )


Sizes = tuple[list[tuple[int, int]], list[int]]
"""(tokens, response tokens) of preference rows; tokens of anchor prompts."""


def _tokenized(
    tokenizer_dir: Path, rows: Sequence[Preference], asked: Sequence[Text], longest: int, path: Path
) -> Sizes:
    from components.checkpoints.loading import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    pairs, _ = encode_pairs(tokenizer, rows, longest, path)
    both = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    return [(len(row.tokens), row.response) for row in both], [len(encode_prompt(tokenizer, one)) for one in asked]


def _guessed(rows: Sequence[Preference], asked: Sequence[Text], longest: int, bytes_a_token: int) -> Sizes:
    """With one byte a token and what a template adds, no row is longer."""

    def guess(text: Text) -> int:
        return TEMPLATE_TOKENS + len(str(text).encode()) // bytes_a_token

    answers = [(guess(row.prompt), guess(text)) for row in rows for text in (row.chosen, row.rejected)]
    return [(min(longest, p + a), min(longest, a)) for p, a in answers], [guess(one) for one in asked]
