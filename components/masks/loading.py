"""From a model directory and two TensorSources to a MaskedModel: which parameter is which tensor, and what gets a mask."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.factors import FactorSource, add_factors, factor_parameters
from components.checkpoints.source import TensorSource
from components.errors import CheckpointError, ConfigError, listed
from components.mapped import drop
from components.masks.masked_model import MaskedModel
from components.masks.rooms import MemoryRoom, Room
from components.masks.settings import MaskSettings
from components.masks.slices import Home, MaskedSlice, UnmaskedSlice, WholeParameter, finetuned_elements


def base_model(load: Callable[[Path], Any], model_dir: Path, aligned: TensorSource) -> Any:
    """What `load` makes of the directory, with LoRA layers where the mask is on an adapter's factors."""
    model = load(model_dir)
    return add_factors(model, aligned) if isinstance(aligned, FactorSource) else model


def source_parameters(model: torch.nn.Module, source: TensorSource, where: Path) -> dict[str, torch.nn.Parameter]:
    """source name -> the parameter it fills. Raises CheckpointError for parameters that it does not name; under factors lies a
    base that it need not."""
    if not isinstance(source, FactorSource):
        return _whole_model(model, source, where)
    found = factor_parameters(model)
    differing = sorted(found.keys() ^ set(source.names()))
    if differing:
        raise CheckpointError(
            f"{source.adapter_dir}: its config makes other LoRA layers than its file holds: {listed(differing)}; "
            "save it again with PEFT"
        )
    return found


def _whole_model(model: torch.nn.Module, source: TensorSource, where: Path) -> dict[str, torch.nn.Parameter]:
    """A tied parameter has several names in the model, one in the source."""
    listed_names, aliases = set(source.names()), source.aliases()
    found: dict[str, torch.nn.Parameter] = {}
    missing: list[str] = []
    by_identity: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        by_identity.setdefault(id(parameter), []).append(name)
    for names in by_identity.values():
        known = [aliases.get(name, name) for name in names if aliases.get(name, name) in listed_names]
        if known and known[0] in found:
            missing.append(f"{names[0]} (tied in the weights, but not in the model)")
        elif known:
            found[known[0]] = parameters[names[0]]
        else:
            missing.append(names[0])
    if missing:
        raise CheckpointError(
            f"{where}: the model has parameters that the weights do not name: {listed(missing)}; "
            "save the checkpoint with save_pretrained of the same architecture"
        )
    return found


def chosen_names(names: Sequence[str], settings: MaskSettings) -> set[str]:
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
    home: Callable[[torch.nn.Parameter], Home] = WholeParameter,
    room: Room | None = None,
    **options: Any,
) -> MaskedModel:
    """The model with every byte read that its homes own, and no other. `where` names the aligned model in errors, `room` is for
    logits and stored weights (by default they are where the model is), `options` are MaskedModel's. Raises CheckpointError
    for parameters that the sources do not name or whose shapes differ."""
    parameters = source_parameters(model, aligned, where)
    room = room or MemoryRoom(next(iter(parameters.values())).device)
    finetune_names, finetune_aliases = set(finetune.names()), finetune.aliases()
    masked = chosen_names(sorted(parameters), settings)
    wrong: list[str] = []
    slices: list[MaskedSlice] = []
    unmasked: list[UnmaskedSlice] = []
    for name in sorted(parameters):
        other = finetune_aliases.get(name, name)
        if other not in finetune_names:
            wrong.append(f"{name} is missing")
            continue
        here = home(parameters[name])
        shapes = (aligned.spec(name).shape, finetune.spec(other).shape)
        if shapes != (here.shape,) * 2:
            wrong.append(f"{name}: aligned {list(shapes[0])}, finetune {list(shapes[1])}, model {list(here.shape)}")
            continue
        safe = room.keep(aligned.read(name, here.start, here.stop))
        tuned = finetuned_elements(finetune, other, here, room)
        parameters[name].requires_grad_(name in masked)
        if name in masked:
            unit = None if settings.granularity == "element" else settings.unit(here.shape)
            size = here.stop - here.start if unit is None else torch.Size(here.shape).numel() // unit
            logits = room.zeros(size, logits_dtype).fill_(settings.init_logit)
            drop(logits)
            slices.append(MaskedSlice(name, here, safe, tuned, logits, unit))
        else:
            unmasked.append(UnmaskedSlice(name, here, safe, tuned))
    if wrong:
        raise CheckpointError(f"{where}: the finetune does not fit the aligned model: {listed(wrong)}")
    return MaskedModel(model, slices, settings, unmasked=unmasked, room=room, **options)


def weights_dtype(settings: MaskSettings) -> torch.dtype:
    """The type in which the model goes forward and backward."""
    return torch.float32 if settings.dtype == "float32" else torch.bfloat16


def checkpointed_layers(model: Any) -> list[torch.nn.Module]:
    """The layers that keep only their input, once their `training` is set, and compute the rest again in backward. What is
    inside them (dropout) is not told and stays as in evaluation; and they cannot answer meanwhile, for they keep no
    key-value cache."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
