"""What a run starts from, as far as headers and data files tell: models, and the masks that will be trained. No weights are
read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TypeVar

from components.checkpoints.compare import require_same_tensors
from components.checkpoints.dimensions import Dimensions
from components.checkpoints.factors import FactorSource
from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.checkpoints.source import TensorSource
from components.checkpoints.writer import has_tokenizer
from components.errors import ConfigError, RealignError
from components.masks.data import PreferenceData, load_preferences, load_prompts
from components.masks.memory import Lengths, Stored, Weight, weights_of
from components.masks.preferences import encode_pairs, encode_prompt
from components.masks.settings import MaskSettings
from components.masks.shapes import Preference
from pipelines.config import RunConfig
from pipelines.placement import Training
from pipelines.roots import readable

BYTES_A_TOKEN, TEMPLATE_TOKENS = 3, 16
"""Of text, where no tokenizer is there to ask; and what a chat template adds to it."""
SAMPLE = 1000
"""Rows of a data file that are looked at, about: reading all of a large one takes longer than the answer is worth."""
Text = str | list[dict[str, str]]


@dataclass(frozen=True)
class Model:
    """A root model as far as headers tell."""

    checkpoint: Checkpoint
    numel: int
    """Elements of its tensors: of an adapter's factors alone, where they are what is masked."""
    stored: int
    """Bytes that reading all of them gives."""
    parameters: int
    """Elements of the model that answers: with the base, where it is under factors."""
    under: int
    """Bytes of that base."""

    @property
    def wide(self) -> int:
        """Bytes in fp32, as it is loaded for answering."""
        return 4 * self.parameters


T = TypeVar("T")


def _some(rows: Sequence[T]) -> Sequence[T]:
    return rows[:: 1 + len(rows) // SAMPLE]


@dataclass(frozen=True)
class _Texts:
    """What of the data files is looked at."""

    pairs: Sequence[Preference]
    unanswered: Sequence[Text]
    """Prompts that the models will make pairs of."""
    anchors: Sequence[Text]
    asked: int
    """Anchor prompts, with those that are not looked at."""


class DataFiles:
    """Data files and datasets, each read once: all finetunes share the pairs."""

    def __init__(self) -> None:
        self._pairs = cache(lambda data: _some(load_preferences(data).rows))
        self._prompts = cache(lambda path: [p.prompt for p in load_prompts(path)])

    def texts(self, data: PreferenceData, anchors: Sequence[Path]) -> _Texts:
        """Of one mask's training. Raises DataError."""
        asked = [prompt for path in anchors for prompt in self._prompts(path)]
        pairs = [] if data.prompts else self._pairs(data)
        unanswered = self._prompts(data.prompts) if data.prompts else []
        return _Texts(pairs, _some(unanswered), _some(asked), len(asked))


@dataclass
class Models:
    """Everything that a run starts from. A finetune that cannot be opened fails alone: it is in `errors` only."""

    aligned: Model
    dimensions: Dimensions
    finetunes: dict[str, Model]
    errors: dict[str, RealignError] = field(default_factory=dict)
    untrained: dict[str, RealignError] = field(default_factory=dict)
    """`Training.label` -> why a training cannot be estimated, though its models could be opened."""
    data: DataFiles = field(default_factory=DataFiles)


def open_models(config: RunConfig, broken: Mapping[str, RealignError] = MappingProxyType({})) -> Models:
    """Headers of every model, but for finetunes that are known to be `broken`. Raises CheckpointError for the aligned one."""
    factors = config.mask.track == "factors"
    with readable(config.aligned):
        opened = open_checkpoint(config.aligned, base=config.aligned_base, base_declared_equal=True, factors=factors)
        aligned, dimensions = _model(opened), Dimensions.of(opened.config, config.aligned)
    models = Models(aligned, dimensions, {}, dict(broken))
    for finetune in config.finetunes:
        if finetune.name in broken:
            continue
        try:
            with readable(finetune.path):
                # Whether it is the right base is for the run to find out: it may have to hash both.
                opened = open_checkpoint(finetune.path, base=config.base, base_declared_equal=True, factors=factors)
                require_same_tensors(aligned.checkpoint, opened)
                models.finetunes[finetune.name] = _model(opened)
        except RealignError as error:
            models.errors[finetune.name] = error
    return models


def _model(checkpoint: Checkpoint) -> Model:
    source = checkpoint.source
    numel, stored = _size(source)
    base, under = _size(source.base) if isinstance(source, FactorSource) else (0, 0)
    return Model(checkpoint, numel, stored, numel + base, under)


def _size(source: TensorSource) -> tuple[int, int]:
    """(elements, bytes)"""
    specs = [source.spec(name) for name in source.names()]
    return sum(s.numel for s in specs), sum(s.nbytes for s in specs)


def trainings(config: RunConfig, models: Models, *, tokenize: bool) -> dict[str, Training]:
    """Node id -> every mask that the run trains, of models that could be opened; why one cannot be estimated goes to
    `models.untrained`. Without `tokenize` rows are taken to be as long as their texts can make them.

    Raises DataError for data files and ConfigError for mask settings that fit no model: no run starts with those."""
    found: dict[str, Training] = {}
    for name in config.targets:
        members = config.members(name)
        if config.mask_owner(name) != name or any(m.name in models.errors for m in members):
            continue
        wanted = {"train_mask": (name, config.mask.resolved)}
        if "paper" in config.fusion.controls:
            wanted["train_mask_paper"] = (f"the control paper of {name}", config.mask.published)
        for step, (label, settings) in wanted.items():
            anchors = [m.anchor for m in members if m.anchor is not None] if settings.anchor_weight > 0 else []
            texts = models.data.texts(config.mask.preferences, anchors)
            # A merge has the aligned model's.
            model = models.aligned if config.merge_named(name) else models.finetunes[name]
            tokenizer = model.checkpoint.tokenizer_dir if tokenize else None
            try:
                with readable(model.checkpoint.path):
                    weights = _weights(config, models, name, settings)
                    lengths = _lengths(texts, settings, tokenizer, config.mask.preferences.where)
            except RealignError as error:
                if isinstance(error, ConfigError) and step == "train_mask":
                    raise  # of the run's own settings: all masks alike
                models.untrained[label] = error
            else:
                found[f"{name}/{step}"] = Training(label, weights, models.dimensions, lengths, settings)
    return found


def _weights(config: RunConfig, models: Models, name: str, settings: MaskSettings) -> list[Weight]:
    aligned = models.aligned.checkpoint.source
    if config.merge_named(name) is None:
        weights = weights_of(aligned, models.finetunes[name].checkpoint.source, settings)
    else:
        merged = Stored(4, mapped=False)
        weights = [replace(w, finetuned=merged) for w in weights_of(aligned, aligned, settings)]
    if isinstance(aligned, FactorSource):
        # The base under the factors is in the model and nowhere else.
        nothing = Stored(0, mapped=True)
        base = aligned.base
        weights += [Weight(n, base.spec(n).numel, False, nothing, nothing) for n in sorted(base.names())]
    return weights


def _lengths(texts: _Texts, settings: MaskSettings, tokenizer_dir: Path | None, where: str) -> Lengths:
    """Of the data files: of their tokens where there is a tokenizer that loads, else from the texts' bytes."""
    found = None
    if tokenizer_dir is not None and has_tokenizer(tokenizer_dir):
        # What is wrong with a tokenizer or its template is for its finetune's stages to say; they fail alone.
        with contextlib.suppress(RealignError):
            found = _tokenized(tokenizer_dir, texts, settings, where)
    sizes, prompts = found or _guessed(texts, settings, 1 if tokenizer_dir is None else BYTES_A_TOKEN)
    return Lengths(
        longest=max(size for size, _ in sizes),
        mean=fmean(size for size, _ in sizes),
        longest_response=max(response for _, response in sizes),
        mean_response=fmean(response for _, response in sizes),
        prompt=max(prompts, default=0),
        anchors=texts.asked,
    )


Sizes = tuple[list[tuple[int, int]], list[int]]
"""(tokens, response tokens) of preference rows; tokens of anchor prompts."""


def _tokenized(tokenizer_dir: Path, texts: _Texts, settings: MaskSettings, where: str) -> Sizes:
    from components.checkpoints.loading import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    pairs = encode_pairs(tokenizer, texts.pairs, settings.max_length, where)[0] if texts.pairs else []
    sizes = [(len(row.tokens), row.response) for pair in pairs for row in (pair.chosen, pair.rejected)]
    made = _made((len(encode_prompt(tokenizer, one)) for one in texts.unanswered), settings)
    return sizes + made, [len(encode_prompt(tokenizer, one)) for one in texts.anchors]


def _guessed(texts: _Texts, settings: MaskSettings, bytes_a_token: int) -> Sizes:
    """With one byte a token and what a template adds, no row is longer."""
    longest = settings.max_length

    def guess(text: Text) -> int:
        return TEMPLATE_TOKENS + len(str(text).encode()) // bytes_a_token

    answers = [(guess(row.prompt), guess(text)) for row in texts.pairs for text in (row.chosen, row.rejected)]
    sizes = [(min(longest, p + a), min(longest, a)) for p, a in answers]
    return sizes + _made(map(guess, texts.unanswered), settings), [guess(one) for one in texts.anchors]


def _made(prompts: Iterable[int], settings: MaskSettings) -> list[tuple[int, int]]:
    """Rows of pairs that the models will make: prompts that leave no room are left out, answers may be as long as they can."""
    room = settings.max_length - settings.pair_new_tokens
    return [(min(size, room) + settings.pair_new_tokens, settings.pair_new_tokens) for size in prompts]
