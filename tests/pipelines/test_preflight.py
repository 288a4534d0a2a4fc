"""A run that cannot have the memory that it needs is refused before it starts, and no other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from components.errors import CheckpointError, ConfigError
from components.records import Record
from components.storage import Workspace
from pipelines import cli
from pipelines.config import RunConfig, load_config
from pipelines.graph import expand
from pipelines.preflight import _pending, require_memory
from pipelines.roots import Roots
from pipelines.specs import build_spec
from ray_jobs.stage import VERSIONS
from tests.pipelines.headers import hollow_config
from tests.pipelines.small import records, small_config, write_config


def roots_of(config: RunConfig, **errors: Any) -> Roots:
    """As if every model had been hashed."""
    models = {"aligned": "0" * 64, **{f"finetune:{f.name}": f"{i}" * 64 for i, f in enumerate(config.finetunes, 1)}}
    paths = [
        config.mask.preferences.where,
        *(f.anchor for f in config.finetunes),
        *(s.path for s in config.evaluation.sets),
    ]
    return Roots({k: v for k, v in models.items() if k not in errors}, errors, {str(path): "f" * 64 for path in paths})


def big(tmp_path: Path, **execution: Any) -> tuple[RunConfig, Workspace]:
    """A 70B run: its mask's state alone is 850 GB, which no machine that runs tests has."""
    config = load_config(hollow_config(tmp_path / "run", "70b", execution=execution))
    return config, Workspace(tmp_path / "workspace")


def test_a_run_that_cannot_fit_is_refused_with_what_there_is(tmp_path: Path) -> None:
    config, workspace = big(tmp_path)
    with pytest.raises(ConfigError) as caught:
        require_memory(config, workspace, roots_of(config))
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert "mask training of f0 does not fit: it takes about 1" in told  # 12 + 8 bytes a weight and what passes through
    assert "GiB of host memory and" in told
    assert "execution.mask" in told


def test_ranks_on_gpus_that_are_elsewhere_are_nobodys_to_refuse(tmp_path: Path) -> None:
    config, workspace = big(tmp_path, mask={"ranks": 512, "device": "cuda"})
    require_memory(config, workspace, roots_of(config))


def test_a_broken_model_fails_alone(tmp_path: Path) -> None:
    config, workspace = big(tmp_path)
    require_memory(config, workspace, roots_of(config, **{"finetune:f0": CheckpointError("broken")}))
    require_memory(config, workspace, roots_of(config, aligned=CheckpointError("broken")))


def test_a_mask_that_is_there_needs_no_memory(tmp_path: Path) -> None:
    config, workspace = big(tmp_path)
    roots = roots_of(config)
    assert _pending(config, workspace, roots) == {"f0/train_mask"}
    references: dict[str, str] = {}
    for node in expand(config):
        if node.step.kind != "stage":
            continue
        parents = {role: references[parent] for role, parent in node.parents}
        spec = build_spec(node, config=config, roots=roots, parents=parents, workspace=workspace.root)
        references[node.id] = spec.reference
        if node.id == "f0/train_mask":
            break
    record = Record(
        stage="train_mask", stage_version=VERSIONS["train_mask"], fingerprint=spec.fingerprint, semantics=spec.semantics,
        execution={}, parents=spec.parents, outputs={}, metrics={}, notes=[], code={}, environment={}, started="", seconds=0.0,
    )  # fmt: skip
    directory = workspace.result_dir("train_mask", spec.fingerprint)
    directory.mkdir(parents=True)
    (directory / "record.json").write_text(record.model_dump_json())
    assert _pending(config, workspace, roots) == set()
    require_memory(config, workspace, roots)


def test_realign_run_says_so_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path)
    config["execution"] = {**config.get("execution", {}), "workers": 2, "mask": {"ranks": 3}}
    workspace = tmp_path / "workspace"
    arguments = ["run", str(write_config(tmp_path, config)), "--workspace", str(workspace)]
    monkeypatch.setattr(sys, "argv", ["realign", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "3 ranks of 1 threads need 3 CPUs, and there are 2" in line
    assert records(workspace) == {}
