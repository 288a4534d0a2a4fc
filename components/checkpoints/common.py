"""The tensors that several models are to have in common, and where each model reads them. From headers alone.

What a model lacks is read from the others, so that nothing is added to anybody's task vector τ = finetune − aligned:

* What the aligned model has, a finetune that lacks it reads from the aligned model: τ is zero there.
* What the aligned model lacks (rows of new tokens, a new tensor), every model reads as the mean of the finetunes that have it,
  those too: all τ are zero there, and whatever the method, the weights or the mask, that mean comes out. Of one finetune that
  is its own values, bit for bit. A row that is one model's padding and another's token is the token's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from components.checkpoints.dtypes import promoted
from components.checkpoints.patched import Part, Patched
from components.checkpoints.source import TensorSource, TensorSpec
from components.checkpoints.vocabularies import is_by_token

ALIGNED = "aligned"
"""What the aligned model is called beside the finetunes' names."""
VocabularyPolicy = Literal["error", "pad", "truncate"]
"""For vocabularies of different sizes: refuse; as many rows as the largest has; as many as the aligned model has."""
OneSidedPolicy = Literal["error", "keep", "drop"]
"""For tensors that not all models have: refuse; keep every one; leave out what the aligned model lacks."""


@dataclass(frozen=True)
class Plan:
    """What the common tensors are. Labels are `ALIGNED` and the finetunes' names."""

    tensors: Mapping[str, Mapping[str, Patched]]
    """label -> tensor -> what the model reads there"""
    aliases: Mapping[str, str]
    """Ties that all models have."""
    separated: Sequence[str]
    """Heads that some models tie and others do not."""
    rows: Mapping[str, int]
    """label -> rows of its vocabulary, where it has one."""
    resized: int | None
    """Rows of the common vocabulary, where they had to be made equal."""
    problems: list[str]
    notes: list[str]

    @staticmethod
    def of(
        sources: Mapping[str, TensorSource],
        vocabulary: VocabularyPolicy,
        one_sided: OneSidedPolicy,
        named: Mapping[str, int],
    ) -> Plan:
        """From headers alone. `named`: label -> rows up to which the model's tokenizer has tokens, where that is known."""
        problems: list[str] = []
        notes: list[str] = []
        aliases, separated = _common_ties(sources, notes)
        owned = {label: {*source.names(), *source.aliases()} - set(aliases) for label, source in sources.items()}
        rows = _vocabulary_rows(sources, owned)
        resized = None
        if vocabulary != "error" and len(set(rows.values())) > 1 and ALIGNED in rows:
            resized = max(rows.values()) if vocabulary == "pad" else rows[ALIGNED]
            problems += _uneven(sources, owned)
            notes.append(_resizing(rows, resized))
        tensors: dict[str, dict[str, Patched]] = {label: {} for label in sources}
        for name in sorted(set().union(*owned.values())):
            having = {label: source for label, source in sources.items() if name in owned[label]}
            if len(having) < len(sources) and one_sided == "error":
                own = {label: _own(source, name) for label, source in having.items()}
            elif ALIGNED not in having and one_sided == "drop":
                own = {}
            else:
                own, lost = _common(name, having, list(sources), resized if is_by_token(name) else None, named)
                problems += lost
            if len(having) < len(sources):
                notes.append(f"{name} is only in {', '.join(having)}{'' if own else ': left out'}")
            for label, patched in own.items():
                tensors[label][name] = patched
        return Plan(tensors, aliases, separated, rows, resized, problems, notes)


def _common_ties(sources: Mapping[str, TensorSource], notes: list[str]) -> tuple[dict[str, str], list[str]]:
    """(ties of all models, names that are tied in some only)"""
    ties = [dict(source.aliases()) for source in sources.values()]
    common = {alias: target for alias, target in ties[0].items() if all(t.get(alias) == target for t in ties)}
    separated = sorted(set().union(*ties) - set(common))
    for alias in separated:
        tied = [label for label, source in sources.items() if alias in source.aliases()]
        notes.append(f"{alias} is tied in {', '.join(tied)} and not in others: a tensor of its own in the fused model")
    return common, separated


def _vocabulary_rows(sources: Mapping[str, TensorSource], owned: Mapping[str, set[str]]) -> dict[str, int]:
    """The most rows of any tensor by token."""
    found: dict[str, int] = {}
    for label, source in sources.items():
        rows = [source.spec(name).shape[0] for name in owned[label] if is_by_token(name)]
        if rows:
            found[label] = max(rows)
    return found


def _uneven(sources: Mapping[str, TensorSource], owned: Mapping[str, set[str]]) -> list[str]:
    """Models whose own embedding and head have different numbers of rows: which one would be the vocabulary?"""
    problems = []
    for label, source in sources.items():
        by_token = {name: source.spec(name).shape for name in sorted(owned[label]) if is_by_token(name)}
        if len({shape[0] for shape in by_token.values()}) > 1:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in by_token.items())
            problems.append(f"{label}: its embedding and head have different numbers of rows ({shapes})")
    return problems


def _resizing(rows: Mapping[str, int], resized: int) -> str:
    """The note on a vocabulary that was made equal."""
    parts = [f"the vocabulary has {resized} rows"]
    shorter = [f"{label} ({n})" for label, n in rows.items() if n < resized]
    longer = [f"{label} ({n})" for label, n in rows.items() if n > resized]
    if shorter:
        parts.append(f"lent to {', '.join(shorter)} where they end earlier")
    if longer:
        parts.append(f"later ones left out of {', '.join(longer)}")
    return "; ".join(parts)


def _common(
    name: str, having: Mapping[str, TensorSource], labels: Sequence[str], rows: int | None, named: Mapping[str, int]
) -> tuple[dict[str, Patched], list[str]]:
    """label -> what it reads of one tensor, and what is wrong. `rows`: of a tensor by token that is resized. A model whose own
    does not fit keeps it, for the comparison that follows to tell."""
    specs = {label: source.spec(name) for label, source in having.items()}
    leading = specs.get(ALIGNED) or next(iter(specs.values()))
    shape = leading.shape if rows is None else (rows, *leading.shape[1:])
    whole = TensorSpec(leading.kind, shape).numel
    ends = {
        label: min(spec.numel, whole)
        for label, spec in specs.items()
        if (spec.shape == shape if rows is None else spec.shape[1:] == shape[1:])
        and spec.kind.is_float == leading.kind.is_float
    }
    problems = []
    if max(ends.values()) < whole:
        problems.append(f"{name}: no model has rows {max(s.shape[0] for s in specs.values())} to {shape[0] - 1}")
    meant = ends if rows is None else {k: min(end, named.get(k, rows) * (whole // rows)) for k, end in ends.items()}
    kind = reduce(promoted, [specs[label].kind for label in ends])
    found = {}
    for label in labels:
        if label in specs and label not in ends:
            found[label] = _own(having[label], name)
            continue
        parts = _parts(name, label, having, ends, meant)
        alone = len(parts) == 1 and len(parts[0].holders) == 1
        spec = parts[0].holders[0][0].spec(name) if alone else None
        found[label] = Patched(TensorSpec(spec.kind if spec else kind, shape), parts)
    return found, problems


def _own(source: TensorSource, name: str) -> Patched:
    spec = source.spec(name)
    return Patched(spec, (Part(spec.numel, ((source, name),)),))


def _parts(
    name: str, label: str, having: Mapping[str, TensorSource], ends: Mapping[str, int], meant: Mapping[str, int]
) -> tuple[Part, ...]:
    """What one model reads of a tensor of which each model has the elements before its end, and means something by those
    before another: the rule at the top."""
    parts: list[Part] = []
    for stop in sorted({*ends.values(), *meant.values()}):
        if ends.get(ALIGNED, 0) >= stop:
            holders = [label if ends.get(label, 0) >= stop else ALIGNED]
        else:
            holders = [one for one, end in meant.items() if end >= stop] or [
                one for one, end in ends.items() if end >= stop
            ]
        part = Part(stop, tuple((having[one], name) for one in holders))
        if parts and parts[-1].holders == part.holders:
            parts.pop()
        parts.append(part)
    return tuple(parts)
