"""The engine of several ranks. The only file that imports deepspeed, and only for ZeRO-3: it keeps the model's parameters in
partitions and gathers one layer at a time, forward and backward.

No DeepSpeed optimizer is used. Its ZeRO optimizers keep an fp32 copy of what they train, and what is trained here is not the
model's parameters: they are written from (aligned, finetuned, mask) before each step. So this rank's partition of a
parameter is where its fused weights go, and the gradient that reaches the parameter is scattered to the partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from components.checkpoints.loading import empty_causal_lm
from components.checkpoints.source import TensorSource
from components.mapped import drop, return_freed_memory
from components.masks.loading import build_masked_model, checkpointed_layers, weights_dtype
from components.masks.objective import ONE, Forwards
from components.masks.ranks import ALONE, Ranks, TorchRanks
from components.masks.rooms import Room, room_for
from components.masks.settings import MaskSettings
from components.masks.sharded import ReplicatedParameter, ShardedEngine, ShardedParameter, SplitParameter
from components.masks.training import EngineMaker
from components.masks.zero import ZeroSettings


class PartitionedParameter(ShardedParameter):
    """A parameter of which DeepSpeed keeps this rank's partition and gathers the rest when a layer needs it (ZeRO-3)."""

    def __init__(self, parameter: Any, ranks: Ranks, room: Room) -> None:
        super().__init__(parameter, tuple(parameter.ds_shape), ranks, eager=True, room=room)
        assert parameter.ds_tensor.numel() == self.run, "DeepSpeed cuts parameters otherwise than it did"

    @property
    def place(self) -> torch.Tensor:
        """See ShardedParameter."""
        partition: torch.Tensor = self.parameter.ds_tensor.data  # type: ignore[attr-defined]
        return partition[: self.stop - self.start]

    def _scatter(self, parameter: torch.nn.Parameter) -> None:
        super()._scatter(parameter)
        drop(self.place)  # it was gathered from for this layer's backward


def sharded(zero: ZeroSettings, *, device: torch.device | str = "cpu") -> EngineMaker:
    """Makes the engine of this rank; torch.distributed's default group must be open, and every rank must call it."""

    def make(model_dir: Path, aligned: TensorSource, finetune: TensorSource, settings: MaskSettings) -> ShardedEngine:
        ranks = TorchRanks(device)
        return_freed_memory()
        weights_room = room_for(zero.offload_weights, device, zero.offload_dir, pinned=True)
        model, release = _model(model_dir, zero, weights_dtype(settings), device, weights_room)
        layers = checkpointed_layers(model) if zero.activation_checkpointing else []
        homes: list[Any] = []

        def home(parameter: torch.nn.Parameter) -> Any:
            homes.append(_home(parameter, zero, ranks, weights_room))
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
            room=room_for(zero.offload, device, zero.offload_dir),
            published=publish,
            all_sum=ALONE.all_sum if zero.stage == 0 else ranks.all_sum,
        )
        how = Forwards(ranks, ONE)
        return ShardedEngine(masked, homes, forwards=how, accumulate=zero.accumulate, release=release, layers=layers)

    return make


def _home(parameter: torch.nn.Parameter, zero: ZeroSettings, ranks: Ranks, room: Room) -> Any:
    if zero.stage == 0:
        return ReplicatedParameter(parameter)
    if zero.stage == 3:
        return PartitionedParameter(parameter, ranks, room)
    return SplitParameter(parameter, ranks, eager=zero.stage == 2)


def _model(
    model_dir: Path, zero: ZeroSettings, dtype: torch.dtype, device: torch.device | str, room: Room
) -> tuple[Any, Callable[[], None] | None]:
    """The unfilled model, and what lets go of weights that a backward left gathered."""
    if zero.stage < 3:
        return empty_causal_lm(model_dir, dtype=dtype).to(device), None
    import deepspeed

    without_shared_memory_op()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    config: dict[str, Any] = {
        "bf16": {"enabled": dtype is torch.bfloat16},
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # By default a layer stays gathered while fewer than 10⁹ parameters are: up to 1 B that is the whole model.
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    if zero.offload_weights != "none":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": zero.offload_weights == "cpu"}
    with _partitioned(config, room if zero.offload_weights == "nvme" else None):
        model = empty_causal_lm(model_dir, dtype=dtype)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    if zero.offload_weights == "nvme":
        for module in model.modules():
            module.register_forward_hook(_let_go)

    def release() -> None:
        engine.optimizer.partition_all_parameters()
        for parameter in model.parameters():
            drop(parameter.ds_tensor)

    return model, release


@contextmanager
def _partitioned(config: dict[str, Any], room: Room | None) -> Iterator[None]:
    """Cut every parameter that is made meanwhile into partitions, and have this rank's in `room`: at once, for all of them
    together may not fit in memory."""
    import deepspeed

    class Init(deepspeed.zero.Init):  # type: ignore[misc]
        def _zero_init_param(self, parameter: Any) -> None:
            super()._zero_init_param(parameter)
            if room is not None:
                parameter.ds_tensor.data = room.zeros(parameter.ds_tensor.numel(), parameter.ds_tensor.dtype)

    # The device alone, not the type: in bf16 a rotary embedding's frequencies would turn far tokens by other angles.
    with Init(config_dict_or_path=config, tensor_overrides=[deepspeed.zero.DeepSpeedTensorOverride.device]):
        yield


def _let_go(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
    """A layer's partitions were read to gather it; its backward will read them again."""
    for parameter in module.parameters(recurse=False):
        drop(parameter.ds_tensor)  # type: ignore[attr-defined]


def without_shared_memory_op() -> None:
    """DeepSpeed compiles collectives in shared memory when it first runs on a CPU: half a minute and a compiler for what
    nothing here calls."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
