"""The stage `merge` on real models: what it writes down of several finetunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.checkpoints.identity import identify
from components.checkpoints.reference import open_checkpoint
from ray_jobs.stage import StageSpec, run_stage
from tests.families import minute_family

DENSITY = 0.1
NAMES = ("zh", "code")


def done(stage: str, workspace: Path, models: dict[str, Path], **more: Any) -> str:
    """The reference of a stage's record. `models`: role -> where it is."""
    places = {role: {"path": str(path)} for role, path in models.items()}
    spec = StageSpec(stage=stage, workspace=str(workspace), execution={"checkpoints": places}, **more)
    answer = run_stage(spec)
    assert answer["status"] == "done", answer
    return spec.reference


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in model.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def identity(path: Path) -> str:
    return identify(open_checkpoint(path)).sha256


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """merge.json of a TIES merge."""
    workspace, family = tmp_path_factory.mktemp("merge"), minute_family()
    aligned, finetunes = family / "aligned", {name: family / "finetunes" / name for name in NAMES}
    first = done("load", workspace, {"self": aligned}, semantics={"role": "aligned", "identity": identity(aligned)})
    parents = {"load_aligned": first}
    for name, path in finetunes.items():
        semantics = {"role": "finetune", "identity": identity(path)}
        roles = {"self": path, "load_aligned": aligned}
        parents[f"load:{name}"] = done("load", workspace, roles, semantics=semantics, parents={"load_aligned": first})
    settings = {"merge": {"method": "ties", "density": DENSITY}, "finetunes": list(NAMES)}
    roles = {"load_aligned": aligned, **{f"load:{name}": path for name, path in finetunes.items()}}
    reference = done("merge", workspace, roles, semantics=settings, parents=parents)
    found: dict[str, Any] = json.loads((workspace / reference / "merge.json").read_text())
    return found


def test_it_keeps_the_settings_and_the_order_of_the_finetunes(merged: dict[str, Any]) -> None:
    assert merged["finetunes"] == list(NAMES)
    assert (merged["settings"]["method"], merged["settings"]["density"]) == ("ties", DENSITY)


@pytest.mark.parametrize("name", NAMES)
def test_of_ties_it_keeps_from_which_magnitude_on_weights_stay(merged: dict[str, Any], name: str) -> None:
    aligned, tuned = (tensors(minute_family() / place) for place in ("aligned", f"finetunes/{name}"))
    limits = merged["thresholds"][name]
    assert limits.keys() == aligned.keys()
    for tensor, limit in limits.items():
        sizes = (tuned[tensor].float() - aligned[tensor].float()).abs()
        assert abs(int((sizes >= limit).sum()) - DENSITY * sizes.numel()) <= 1, tensor
    assert max(limits.values()) > 0
