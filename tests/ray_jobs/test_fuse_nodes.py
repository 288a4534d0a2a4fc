"""Where a cluster has several nodes all of them write parts of a fused model; the bytes are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.records import Record, hash_outputs
from components.storage import Workspace
from ray_jobs.stage import StageSpec, run_stage
from tests.components.checkpoints.tiny import llama, perturbed, rewrite, save, save_tokenizer

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("jobs")]

DRIVER = """
import json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import ray
from ray.cluster_utils import Cluster
from components.checkpoints import stream
from ray_jobs import fuse
from ray_jobs.main import main

def nobody_here(*_, **__):
    raise AssertionError("parts are made in tasks")

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
stream.spread, stream.PART, fuse._BATCH = nobody_here, 1000, 5
codes = [main([spec]) for spec in sys.argv[1:]]
print(json.dumps({"nodes": fuse._nodes(), "codes": codes}))
ray.shutdown()
cluster.shutdown()
"""


def spec(workspace: Path, models: dict[str, Path], fusion: dict[str, object]) -> StageSpec:
    """A fuse stage whose parents are there."""
    parents = {}
    for role in models:
        with Workspace(workspace).attempt("load", role) as attempt:
            if attempt is not None:
                (attempt.out / "checkpoint.json").write_text("{}")
                record = Record(
                    stage="load", stage_version=1, fingerprint=role, semantics={}, execution={}, parents={},
                    outputs=hash_outputs(attempt.out), metrics={}, code={}, environment={}, started="", seconds=0.0,
                )  # fmt: skip
                Workspace(workspace).publish(attempt, record)
        parents[role] = f"load/{role}"
    places = {role: {"path": str(path)} for role, path in models.items()}
    return StageSpec(
        stage="fuse",
        workspace=str(workspace),
        semantics={"fusion": fusion},
        execution={"checkpoints": places},
        parents=parents,
    )


@pytest.mark.slow
def test_two_nodes_write_the_model_of_one_process(tmp_path: Path) -> None:
    aligned = llama(0)
    models = {
        "load_aligned": save(aligned, tmp_path / "aligned"),
        "load": save(perturbed(aligned, 1), tmp_path / "tuned"),
        "load_unaligned": save(perturbed(aligned, 2), tmp_path / "unaligned"),
    }
    for path in models.values():
        save_tokenizer(path)
    # A linear method, and one that settles what it does by looking at whole tensors.
    fusions = [{"method": "interpolation", "alpha": 0.5}, {"method": "safe_lora", "lowest": 2}]
    alone = [spec(tmp_path / "alone", models, fusion) for fusion in fusions]
    assert [run_stage(one)["status"] for one in alone] == ["done"] * 2

    broken = save(perturbed(aligned, 1), tmp_path / "broken")
    save_tokenizer(broken)
    name = "model.layers.0.mlp.up_proj.weight"
    bad = perturbed(aligned, 1).state_dict()[name].clone()
    bad[1, 2] = torch.nan
    rewrite(broken / "model.safetensors", **{name: bad})
    together = [spec(tmp_path / "together", models, fusion) for fusion in fusions]
    together.append(spec(tmp_path / "together", {**models, "load": broken}, {"method": "interpolation", "alpha": 0.25}))
    files = []
    for i, one in enumerate(together):
        files.append(tmp_path / f"spec-{i}.json")
        files[-1].write_text(one.model_dump_json())
    done = subprocess.run([sys.executable, "-c", DRIVER, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *answers, seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert seen == {"nodes": 2, "codes": [0, 0, 2]}, answers
    assert answers[2]["error"]["type"] == "CheckpointError"
    assert f"{name}[1, 2] is nan" in answers[2]["error"]["message"]
    for one, other in zip(alone, together, strict=False):
        first, second = (Workspace(Path(s.workspace)).result_dir("fuse", s.fingerprint) for s in (one, other))
        for file in ("model/model.safetensors", "model/config.json", "fusion.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes(), file
