"""The engine of several ranks. The only file that imports deepspeed, and only for ZeRO-3: it keeps the model's parameters in
partitions and gathers one layer at a time, forward and backward.

No DeepSpeed optimizer is used. Its ZeRO optimizers keep an fp32 copy of what they train, and what is trained here is not the
model's parameters: they are written from (aligned, finetuned, mask) before each step. So this rank's partition of a
parameter is where its fused weights go, and the gradient that reaches the parameter is scattered to the partitions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.factors import FactorSource, add_factors
from components.checkpoints.loading import empty_causal_lm, load_causal_lm
from components.checkpoints.source import TensorSource
from components.masks.loading import base_model, build_masked_model, checkpointed_layers, source_parameters
from components.masks.objective import ONE, Forwards
from components.masks.ranks import ALONE, Ranks, TorchRanks
from components.masks.settings import MaskSettings
from components.masks.sharded import ReplicatedParameter, ShardedEngine, ShardedParameter, SplitParameter
from components.masks.training import EngineMaker
from components.masks.zero import ZeroSettings


class PartitionedParameter(ShardedParameter):
    """A parameter of which DeepSpeed keeps this rank's partition and gathers the rest when a layer needs it (ZeRO-3)."""

    def __init__(self, parameter: Any, ranks: Ranks) -> None:
        super().__init__(parameter, tuple(parameter.ds_shape), ranks, eager=parameter.requires_grad)
        assert parameter.ds_tensor.numel() == self.run, "DeepSpeed cuts parameters otherwise than it did"

    @property
    def place(self) -> torch.Tensor:
        """See ShardedParameter."""
        partition: torch.Tensor = self.parameter.ds_tensor.data  # type: ignore[attr-defined]
        return partition[: self.stop - self.start]


def sharded(zero: ZeroSettings, *, device: torch.device | str = "cpu") -> EngineMaker:
    """Makes the engine of this rank; torch.distributed's default group must be open, and every rank must call it."""

    def make(model_dir: Path, aligned: TensorSource, finetune: TensorSource, settings: MaskSettings) -> ShardedEngine:
        ranks = TorchRanks(device)
        model, release = _model(model_dir, zero, ranks, aligned, device)
        layers = checkpointed_layers(model) if zero.activation_checkpointing else []
        homes: list[Any] = []

        def home(parameter: torch.nn.Parameter) -> Any:
            homes.append(_home(parameter, zero, ranks))
            return homes[-1]

        def publish() -> None:
            for one in homes:
                one.publish()

        masked = build_masked_model(
            model=model,
            aligned=aligned,
            finetune=finetune,
            settings=settings,
            where=model_dir,
            home=home,
            published=publish,
            all_sum=ALONE.all_sum if zero.stage == 0 else ranks.all_sum,
        )
        how = Forwards(ranks, ONE)
        return ShardedEngine(masked, homes, forwards=how, accumulate=zero.accumulate, release=release, layers=layers)

    return make


def _home(parameter: torch.nn.Parameter, zero: ZeroSettings, ranks: Ranks) -> Any:
    if zero.stage == 0:
        return ReplicatedParameter(parameter)
    if zero.stage == 3:
        return PartitionedParameter(parameter, ranks)
    return SplitParameter(parameter, ranks, eager=zero.stage == 2)


def _model(
    model_dir: Path, zero: ZeroSettings, ranks: Ranks, aligned: TensorSource, device: torch.device | str
) -> tuple[Any, Callable[[], None] | None]:
    """The model, unfilled but for a base under LoRA layers, and what lets go of weights that a backward left gathered."""
    on_factors = isinstance(aligned, FactorSource)
    if zero.stage < 3:
        load = load_causal_lm if on_factors else empty_causal_lm
        return base_model(load, model_dir, aligned).to(device), None
    import deepspeed

    without_shared_memory_op()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # By default a layer stays gathered while fewer than 10⁹ parameters are: up to 1 B that is the whole model.
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = empty_causal_lm(model_dir)
    if isinstance(aligned, FactorSource):
        _fill(model, aligned.base, ranks, model_dir)
        model = add_factors(model, aligned)  # whole on every rank until DeepSpeed takes them over
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return model, engine.optimizer.partition_all_parameters


def _fill(model: torch.nn.Module, base: TensorSource, ranks: Ranks, where: Path) -> None:
    """Put this rank's part of the base into its partitions, where it stays."""
    for name, parameter in source_parameters(model.requires_grad_(False), base, where).items():
        home = PartitionedParameter(parameter, ranks)
        home.place.copy_(base.read(name, home.start, home.stop))


def without_shared_memory_op() -> None:
    """DeepSpeed compiles collectives in shared memory when it first runs on a CPU: half a minute and a compiler for what
    nothing here calls."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
