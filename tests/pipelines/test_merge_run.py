"""Several finetunes merged and realigned as one model, on real small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.source import read_whole
from components.masks.artifact import MaskArtifact
from components.reporting.schema import read_summary
from tests.pipelines.small import run, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("run")]


@pytest.mark.slow
def test_a_merge_is_realigned_as_one_model(tmp_path: Path) -> None:
    config: dict[str, Any] = small_config(tmp_path)
    missing = {**config["finetunes"][0], "name": "empty", "path": str(tmp_path / "nothing")}
    (tmp_path / "nothing").mkdir()
    config["finetunes"].append(missing)
    config["mode"] = "merge"
    config["merges"] = [
        {"name": "both", "method": "average", "scale": 1.5, "of": ["zh", "hi"]},
        {"name": "all", "method": "ties"},
    ]
    config["fusion"] = {"controls": []}
    workspace = tmp_path / "workspace"
    done = run(write_config(tmp_path, config), workspace)
    assert done.returncode == 2, done.stderr
    assert "realign: empty, all failed at load" in done.stderr
    summary = read_summary(workspace / "summary.json")
    assert {f["name"]: f["status"] for f in summary["finetunes"]} == {"zh": "done", "hi": "done", "empty": "failed"}
    both, broken = summary["merged"]
    assert (both["status"], broken["status"]) == ("done", "failed")
    before, after = both["before"], both["after_binary"]
    assert before
    assert after
    assert set(before["sets"]) == set(after["sets"]) >= {"zh", "hi", "harmful"}
    assert both["registry"] == {"name": "small-both", "version": "1"}

    aligned = open_checkpoint(Path(config["aligned"])).source
    members = [open_checkpoint(Path(f["path"]), base=Path(config["aligned"])).source for f in config["finetunes"][:2]]
    directory = Path(both["fused"]["binary"])
    record = json.loads((directory.parent / "record.json").read_text())
    assert record["parents"]["load"].startswith("merge/")
    mask = MaskArtifact.open(workspace / record["parents"]["train_mask"] / "mask")
    fused = open_checkpoint(directory).source
    kept = 0
    for name in fused.names():
        a = read_whole(aligned, name).double()
        merged = a + 1.5 * sum((read_whole(m, name).double() - a) / 2 for m in members)
        bits = mask.binary(name, 0, a.numel()).reshape(a.shape)
        torch.testing.assert_close(read_whole(fused, name).double(), torch.where(bits, merged, a), rtol=1e-6, atol=1e-6)
        kept += int(bits.sum())
    assert 0 < kept < mask.metadata["elements"]
