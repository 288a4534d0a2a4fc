"""Models that were not made to fit, brought to one common set of tensors so that they can be fused: heads tied in one and
separate in another, vocabularies of different sizes, tensors that only some have. Headers and tokenizers are read, no weights.

`common.py` says what a model reads of a tensor that it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from components.checkpoints.common import ALIGNED, OneSidedPolicy, Plan, VocabularyPolicy
from components.checkpoints.compare import compare_configs, compare_scalings, tensor_differences
from components.checkpoints.patched import Part, Patched, PatchedSource
from components.checkpoints.reference import Checkpoint
from components.checkpoints.source import InFiles, TensorSource
from components.checkpoints.vocabularies import clashes, same_tokenizer_file, token_ids
from components.checkpoints.writer import has_tokenizer
from components.errors import CheckpointError, ConfigError, listed

_SHOWN = 40


@dataclass(frozen=True)
class Harmonized:
    """Models of one common set of tensors. Their configs have `config_changes` in them; a model that fitted is as it was."""

    aligned: Checkpoint
    finetunes: dict[str, Checkpoint]
    config_changes: dict[str, Any]
    """What the fused model's config.json must say, whichever model's it is made from."""
    tokenizer_of: str
    """Whose tokenizer belongs to the fused model: a finetune's name or `ALIGNED`."""
    notes: list[str]
    """What was done, for the record."""


def harmonize(
    aligned: Checkpoint,
    finetunes: Mapping[str, Checkpoint],
    *,
    vocabulary: VocabularyPolicy = "error",
    one_sided: OneSidedPolicy = "error",
) -> Harmonized:
    """Bring models to one set of tensors, or raise CheckpointError with everything that keeps them from it: tensors with the
    shapes and files of both sides, configs, tokens that mean different rows.

    A head that is tied to its embedding in some models only becomes a tensor of its own in all: a tied model's head reads its
    embedding.
    """
    if ALIGNED in finetunes:
        raise ConfigError(f"a finetune cannot be called {ALIGNED}; give it another name")
    models = {ALIGNED: aligned, **finetunes}
    tokens = _tokens(models)
    named = {label: 1 + max(table.values()) for label, table in tokens.items() if table}
    plan = Plan.of({label: model.source for label, model in models.items()}, vocabulary, one_sided, named)
    changes = _config_changes(models, plan)
    whole = {label: _wrapped(model, plan, label, changes) for label, model in models.items()}
    problems = [*plan.problems, *_differences(models, whole), *_clashes(models, tokens, plan.resized)]
    if problems:
        count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
        remedy = _remedy(problems, vocabulary, one_sided)
        raise CheckpointError(
            f"these finetunes of {aligned.path} cannot be fused ({count}): {listed(problems, _SHOWN)}; {remedy}"
        )
    tokenizer = ALIGNED if vocabulary == "truncate" else _largest_vocabulary(models, tokens, plan)
    finetuned = {label: model for label, model in whole.items() if label != ALIGNED}
    return Harmonized(whole[ALIGNED], finetuned, changes, tokenizer, plan.notes)


def _remedy(problems: Sequence[str], vocabulary: VocabularyPolicy, one_sided: OneSidedPolicy) -> str:
    """What might help: policies only where nothing else is wrong."""
    configs = [what for what in problems if ": config " in what and ": config vocab_size " not in what]
    resized = vocabulary == "error" and any(": config vocab_size " in what for what in problems)
    lacking = one_sided == "error" and any(" is missing (" in what or " is extra (" in what for what in problems)
    ways = ["give finetunes of that model"]
    if resized and not configs:
        ways.append("say what becomes of vocabularies of other sizes (--vocabulary pad or truncate)")
    if lacking and not configs:
        ways.append("say what becomes of tensors that only some models have (--one-sided keep or drop)")
    return ", or ".join(ways)


def _wrapped(model: Checkpoint, plan: Plan, label: str, changes: Mapping[str, Any]) -> Checkpoint:
    """The model with its common tensors (an adapter's base too), its source untouched where they are its own."""
    source, tensors = model.source, plan.tensors[label]
    as_it_was = set(tensors) == set(source.names()) and all(
        len(tensor.parts) == 1 and tensor.parts[0].holders == ((source, name),) and tensor.spec == source.spec(name)
        for name, tensor in tensors.items()
    )
    config = {**model.config, **changes}
    if as_it_was:
        return replace(model, config=config)
    base = model.base
    if base is not None:
        base = replace(base, source=PatchedSource(_without(model, base, tensors), plan.aliases), config=config)
    return replace(model, config=config, source=PatchedSource(tensors, plan.aliases), base=base)


def _without(model: Checkpoint, base: Checkpoint, tensors: Mapping[str, Patched]) -> dict[str, Patched]:
    """What the model reads without its adapter: the base's own where it has the tensor in that shape."""
    known = {*base.source.names(), *base.source.aliases()}
    found = {}
    for name, tensor in tensors.items():
        own = tensor.parts[0].holders == ((model.source, name),) and len(tensor.parts) == 1 and name in known
        spec = base.source.spec(name) if own else tensor.spec
        plain = own and spec.shape == tensor.spec.shape
        found[name] = Patched(spec, (Part(spec.numel, ((base.source, name),)),)) if plain else tensor
    return found


def _config_changes(models: Mapping[str, Checkpoint], plan: Plan) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if plan.separated:
        wanted["tie_word_embeddings"] = False
    sizes = set(plan.rows.values())
    if plan.resized is not None:
        wanted["vocab_size"] = plan.resized
    elif len(sizes) == 1 and any({model.config.get("vocab_size", *sizes)} != sizes for model in models.values()):
        wanted["vocab_size"] = sizes.pop()  # an adapter's own embedding, while its config is its base's
    config = models[ALIGNED].config
    nested = config.get("text_config")
    inside = {key: value for key, value in wanted.items() if isinstance(nested, dict) and key in nested}
    changes = {key: value for key, value in wanted.items() if key not in inside or key in config}
    return {**changes, "text_config": {**nested, **inside}} if isinstance(nested, dict) and inside else changes


def _differences(models: Mapping[str, Checkpoint], whole: Mapping[str, Checkpoint]) -> list[str]:
    """What still keeps finetunes from the aligned model, with the files that say so."""
    problems = []
    aligned = whole[ALIGNED]
    for label, model in whole.items():
        if label == ALIGNED:
            continue
        problems += [f"{label}: {what} ({model.path})" for what in compare_configs(aligned.config, model.config)]
        problems += [f"{label}: {what} ({model.path})" for what in compare_scalings(aligned.source, model.source)]
        for name, what in tensor_differences(aligned.source, model.source):
            files = [_file(models[one], whole[one], name) for one in (label, ALIGNED)]
            problems.append(f"{label}: {what} ({' against '.join(str(file) for file in files if file is not None)})")
    return problems


def _file(model: Checkpoint, whole: Checkpoint, name: str) -> Path | None:
    """Where a tensor lies, of a model that has it or was lent it."""
    if name not in whole.source.names() and name not in whole.source.aliases():
        return None
    source: TensorSource = model.source
    if isinstance(whole.source, PatchedSource):
        source = whole.source.parts(name)[0].holders[0][0]
    return source.file_of(name) if isinstance(source, InFiles) else model.path


def _tokens(models: Mapping[str, Checkpoint]) -> dict[str, Mapping[str, int]]:
    """label -> token -> id, one table for equal files; nothing where all are equal, for reading them takes a while."""
    dirs = {label: model.tokenizer_dir for label, model in models.items()}
    if all(same_tokenizer_file(dirs[ALIGNED], other) for other in dirs.values()):
        return {}
    found: dict[str, Mapping[str, int]] = {}
    for label, directory in dirs.items():
        twin = next((other for other in found if same_tokenizer_file(dirs[other], directory)), None)
        found[label] = found[twin] if twin is not None else token_ids(directory)
    return found


def _clashes(models: Mapping[str, Checkpoint], tokens: Mapping[str, Mapping[str, int]], rows: int | None) -> list[str]:
    """Tokens of the common rows that any two models give to different rows."""
    problems = []
    for first, second in combinations(tokens, 2):
        found = [] if tokens[first] is tokens[second] else clashes(tokens[first], tokens[second], rows=rows)
        dirs = f"{models[second].tokenizer_dir} against {models[first].tokenizer_dir}"
        problems += [f"{second} beside {first}: {what} ({dirs})" for what in found]
    return problems


def _largest_vocabulary(models: Mapping[str, Checkpoint], tokens: Mapping[str, Mapping[str, int]], plan: Plan) -> str:
    """Of the models with a tokenizer: by the tokens of tokenizer.json where all have one, else by rows. The aligned model's
    where that is as large."""
    sizes = {label: len(table) for label, table in tokens.items() if has_tokenizer(models[label].tokenizer_dir)}
    if not all(sizes.values()):  # another format than tokenizer.json
        sizes = {label: plan.rows.get(label, 0) for label in sizes}
    return max(sizes, key=lambda label: sizes[label], default=ALIGNED)
