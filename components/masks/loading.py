"""From a model directory and two TensorSources to a MaskedModel: which parameter is which tensor, and what gets a mask."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import torch

from components.checkpoints.source import TensorSource
from components.errors import CheckpointError, ConfigError, listed
from components.masks.masked_model import MaskedModel
from components.masks.settings import MaskSettings
from components.masks.slices import MaskedSlice, UnmaskedSlice


def _source_names(model: torch.nn.Module, source: TensorSource, where: Path) -> dict[str, torch.nn.Parameter]:
    """source name -> the parameter it fills. A tied parameter has several names in the model, one in the source."""
    listed_names, aliases = set(source.names()), source.aliases()
    found: dict[str, torch.nn.Parameter] = {}
    missing: list[str] = []
    by_identity: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        by_identity.setdefault(id(parameter), []).append(name)
    for names in by_identity.values():
        known = [aliases.get(name, name) for name in names if aliases.get(name, name) in listed_names]
        if known:
            found[known[0]] = parameters[names[0]]
        else:
            missing.append(names[0])
    if missing:
        raise CheckpointError(
            f"{where}: the model has parameters that the weights do not name: {listed(missing)}; "
            "save the checkpoint with save_pretrained of the same architecture"
        )
    return found


def _chosen(names: Sequence[str], settings: MaskSettings) -> set[str]:
    """Names that get a mask. A pattern that matches nothing is the user's mistake."""
    idle = [p for p in (*settings.include, *settings.exclude) if not fnmatch.filter(names, p)]
    if idle:
        raise ConfigError(
            f"mask patterns that match no tensor: {listed(idle)}; tensors are named like {listed(list(names), 3)}"
        )
    taken = {n for p in settings.include for n in fnmatch.filter(names, p)}
    taken -= {n for p in settings.exclude for n in fnmatch.filter(names, p)}
    if not taken:
        raise ConfigError("mask.exclude takes away every tensor that mask.include names: nothing to train")
    return taken


def build_masked_model(
    *,
    model: torch.nn.Module,
    aligned: TensorSource,
    finetune: TensorSource,
    settings: MaskSettings,
    where: Path,
    logits_dtype: torch.dtype = torch.float32,
) -> MaskedModel:
    """Whole tensors (one process). `where` names the aligned model in errors. Raises CheckpointError for parameters
    that the sources do not name or whose shapes differ."""
    parameters = _source_names(model, aligned, where)
    finetune_names, finetune_aliases = set(finetune.names()), finetune.aliases()
    wrong: list[str] = []
    slices: list[MaskedSlice] = []
    unmasked: list[UnmaskedSlice] = []
    masked = _chosen(sorted(parameters), settings)
    for name in sorted(parameters):
        parameter, other = parameters[name], finetune_aliases.get(name, name)
        if other not in finetune_names:
            wrong.append(f"{name} is missing")
            continue
        shapes = (aligned.spec(name).shape, finetune.spec(other).shape)
        if shapes != (tuple(parameter.shape),) * 2:
            wrong.append(
                f"{name}: aligned {list(shapes[0])}, finetune {list(shapes[1])}, model {list(parameter.shape)}"
            )
            continue
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        stored = aligned.read(name).to(parameter.device), finetune.read(other).to(parameter.device)
        weights = parameter.detach().view(-1)
        parameter.requires_grad_(name in masked)
        if name not in masked:
            unmasked.append(UnmaskedSlice(name, *stored, weights))
            continue
        slices.append(
            MaskedSlice(
                name=name,
                start=0,
                stop=parameter.numel(),
                numel=parameter.numel(),
                aligned=stored[0],
                finetuned=stored[1],
                logits=torch.full_like(weights, settings.init_logit, dtype=logits_dtype),
                weights=weights,
                parameter=parameter,
            )
        )
    if wrong:
        raise CheckpointError(f"{where}: the finetune does not fit the aligned model: {listed(wrong)}")
    return MaskedModel(model, slices, settings, unmasked=unmasked)
