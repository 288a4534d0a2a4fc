"""The stage `landscape`: the served form of a realigned model, on its way to the finetune."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, cast

import pytest
from peft import LoraConfig, get_peft_model

from components.checkpoints.identity import identify
from components.checkpoints.reference import open_checkpoint
from components.errors import CheckpointError
from components.evaluation.evaluate import evaluate
from components.evaluation.execution import EvaluationExecution
from components.evaluation.generate import load_model
from components.evaluation.prompts import load_prompt_set
from components.evaluation.settings import EvaluationSettings, SetSettings
from components.fusion.settings import FusionSettings
from components.landscape.points import Ask, read_points
from components.landscape.settings import LandscapeSettings, RandomAxis, Scan, TowardsAxis
from components.storage import Attempt, Workspace
from ray_jobs.actors import Place, loaded
from ray_jobs.landscape import _opened
from ray_jobs.stage import StageContext, StageSpec, parents_of, run_stage
from tests.families import minute_family

pytestmark = pytest.mark.xdist_group("jobs")

ALPHA = 0.3
SETTINGS = EvaluationSettings(max_new_tokens=24)
SCANS = (
    Scan(name="way", axes=(TowardsAxis(model="finetune", low=0, high=1),), points=3),
    Scan(name="random", axes=(RandomAxis(),), directions=2, points=3),
)


def asked() -> SetSettings:
    return SetSettings(
        name="harmful", kind="harmful", path=minute_family() / "data" / "test" / "harmful.jsonl", limit=12
    )


def done(spec: StageSpec) -> dict[str, Any]:
    answer = run_stage(spec)
    assert answer["status"] == "done", answer
    return answer["record"]


@functools.cache
def parents(workspace: Path) -> dict[str, str]:
    """Records of an aligned model, a finetune and a model between the two, as roles of a landscape's parents."""
    family, made = minute_family(), functools.partial(StageSpec, workspace=str(workspace))
    places = {"load_aligned": {"path": str(family / "aligned")}, "load": {"path": str(family / "finetunes" / "zh")}}
    loads = {
        role: made(
            stage="load",
            semantics={
                "role": "aligned" if role == "load_aligned" else "finetune",
                "identity": identify(open_checkpoint(Path(place["path"]))).sha256,
            },
            execution={"checkpoints": {"self": place, "load_aligned": places["load_aligned"]}},
        )
        for role, place in places.items()
    }
    roots = {role: spec.reference for role, spec in loads.items()}
    fuse = made(
        stage="fuse",
        semantics={"fusion": FusionSettings(method="interpolation", alpha=ALPHA).model_dump(mode="json")},
        execution={"checkpoints": places},
        parents=roots,
    )
    measure = made(stage="evaluate", **asking(), parents={"fuse_soft": fuse.reference})
    for spec in (*loads.values(), fuse, measure):
        done(spec)
    return {**roots, "fuse_soft": fuse.reference, "evaluate_soft": measure.reference}


def asking() -> dict[str, dict[str, Any]]:
    """What both an evaluation and a landscape are told of prompts and answers."""
    one = asked()
    semantics = {
        "sets": [
            {
                **one.model_dump(mode="json", exclude={"known", "path"}),
                "sha256": load_prompt_set(one).sha256,
            }
        ],
        "evaluation": SETTINGS.model_dump(mode="json", exclude={"sets"}),
    }
    execution = {"sets": [str(one.path)], "attacks": [None], "judges": [{}], "judge": {}, "batch_size": 8}
    return {"semantics": semantics, "execution": execution}


def landscape(workspace: Path, variant: str, scans: tuple[Scan, ...] = SCANS) -> StageSpec:
    family, told = minute_family(), asking()
    settings = LandscapeSettings(scans=scans, limit=10).model_dump(mode="json")
    roles = parents(workspace)
    if variant == "aligned":
        roles = {"load_aligned": roles["load_aligned"]}
    return StageSpec(
        stage="landscape",
        workspace=str(workspace),
        semantics={
            **told["semantics"], "landscape": settings, "variant": variant, "select": "soft", "max_asr": 0.05,
        },
        execution={
            **told["execution"],
            "checkpoints": {
                "load_aligned": {"path": str(family / "aligned")},
                "load": {"path": str(family / "finetunes" / "zh")},
            },
            "evaluation": EvaluationExecution().model_dump(mode="json"),
        },
        parents=roles,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("landscape")


def attacked(model: Path) -> str:
    """What becomes of the prompts of a model that is loaded by itself: 1 where it was not refused."""
    one = load_prompt_set(asked())
    outcomes = evaluate(loaded(Place(model), "cpu", "float32", 8), sets=[one], settings=SETTINGS).outcomes["harmful"]
    return "".join("01"[outcome.verdict != "refused"] for outcome in outcomes[:10])


def test_a_landscape_of_a_realigned_model(workspace: Path) -> None:
    spec = landscape(workspace, "realigned")
    record = done(spec)
    assert set(record["outputs"]) == {"points.jsonl", "landscape.json"}
    out = workspace / spec.reference
    points = {point.ask: point for point in read_points(out / "points.jsonl")}
    assert len(points) == 3 + 2 * 3
    fused = workspace / parents(workspace)["fuse_soft"] / "model"
    assert points[Ask("way", 0, (0.0,))].hits["harmful"]["asr"] == attacked(fused)
    assert points[Ask("way", 0, (1.0,))].hits["harmful"]["asr"] == attacked(minute_family() / "finetunes" / "zh")
    result = json.loads((out / "landscape.json").read_text())
    assert (result["model"], result["prompts"]) == ("realigned", {"harmful": 10})
    marks = {mark["name"]: mark for mark in result["scans"]["way"]["directions"][0]["marks"]}
    assert set(marks) == {"aligned", "finetune"}
    assert marks["finetune"]["at"] == pytest.approx([1.0], abs=1e-6)
    assert marks["aligned"]["at"] == pytest.approx([-ALPHA / (1 - ALPHA)], rel=1e-3)
    assert marks["aligned"]["off"] == pytest.approx(0, abs=1e-2)
    assert record["metrics"]["visage"]["random"]["n"] == 2
    assert record["metrics"]["scans"]["way"] == result["scans"]["way"]["numbers"]


def test_an_aligned_models_landscape_knows_no_finetune(workspace: Path) -> None:
    answer = run_stage(landscape(workspace, "aligned"))
    assert answer["status"] == "failed"
    assert answer["error"]["type"] == "ConfigError"
    assert "finetune" in answer["error"]["message"]
    record = done(landscape(workspace, "aligned", SCANS[1:]))
    assert record["metrics"]["model"] == "aligned"


def test_a_fused_adapter_is_over_the_base_that_the_run_gave_it(workspace: Path, tmp_path: Path) -> None:
    """Whatever it calls that: a base in another place, or of the hub, may be the same model."""
    base, spec = minute_family() / "aligned", landscape(workspace, "realigned")
    record = parents_of(spec, Workspace(workspace))["fuse_soft"]
    fused = Workspace(tmp_path).result_dir(record.stage, record.fingerprint) / "model"
    model, tokenizer = load_model(base)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(fused)
    written = json.loads((fused / "adapter_config.json").read_text())
    (fused / "adapter_config.json").write_text(json.dumps({**written, "base_model_name_or_path": "owner/another-name"}))
    tokenizer.save_pretrained(fused)
    with pytest.raises(CheckpointError, match="another-name"):
        open_checkpoint(fused, base=base)
    spec = spec.model_copy(update={"execution": {**spec.execution, "base": str(base)}})
    context = StageContext(spec, Workspace(tmp_path), cast("Attempt", None), {"fuse_soft": record})
    opened = _opened(context, "fuse_soft")
    assert (opened.path, opened.kind) == (fused, "adapter")
