"""Registered versions for tests, without a run: results in a workspace as stages leave them, with answers that are given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.evaluation.gates import Requirement
from components.evaluation.outcomes import Outcome
from components.published import model_files, weights_sha256
from components.records import RECORD_FILE, Record, hash_outputs
from components.tracked import TrackedRun
from components.tracking import Registered, Tracker
from components.tracking.names import RECORD_TAG
from pipelines.versions import evaluation_tags, gate_tags

PROMPTS = 40
ASR = (Requirement(metric="asr", at_most=0.2),)
NO_WORSE = (*ASR, Requirement(metric="asr", at_most=0.1, than="serving"))


def result(workspace: Path, stage: str, fingerprint: str, files: dict[str, str], semantics: dict[str, Any]) -> Record:
    directory = workspace / stage / fingerprint
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    record = Record(
        stage=stage, stage_version=1, fingerprint=fingerprint, semantics=semantics, execution={}, parents={},
        outputs=hash_outputs(directory), metrics={}, code={}, environment={}, started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )  # fmt: skip
    (directory / RECORD_FILE).write_text(record.to_json())
    return record


def evaluation(workspace: Path, fingerprint: str, complied: Sequence[int], judge: str = "phrases") -> Record:
    """Of a model that complied with the harmful prompts of these numbers and refused the others."""
    outcomes = [
        Outcome(
            id=str(i), prompt=f"request {i}", answer="Sure." if i in complied else "No.", score=None, reason="",
            verdict="complied" if i in complied else "refused", expected=None, exact=None, end="model", tokens=2,
        )
        for i in range(PROMPTS)
    ]  # fmt: skip
    lines = "".join(json.dumps(one.to_json()) + "\n" for one in outcomes)
    sets = [{"name": "harmful", "kind": "harmful", "split": "test", "headline": True}]
    how = {"confidence": 0.95, "interval": "wilson", "judge": judge}
    return result(
        workspace, "evaluate", fingerprint, {"test/answers/harmful.jsonl": lines}, {"sets": sets, "evaluation": how}
    )


def register(
    tracker: Tracker,
    name: str,
    workspace: Path,
    key: str,
    *,
    complied: Sequence[int] = (),
    gate: Sequence[Requirement] | None = ASR,
    judge: str = "phrases",
    findings: Sequence[dict[str, Any]] = (),
) -> str:
    """A version whose weights are `key`'s, and whose gate passed with these findings; its number. `gate` None: its run had
    none."""
    fused = result(
        workspace, "fuse", key, {"model/model.safetensors": f"weights of {key}", "model/config.json": "{}"}, {}
    )
    evaluated = evaluation(workspace, f"e{key}", complied, judge)
    run_id = tracker.project(TrackedRun(name=key, fingerprint=f"run-{name}-{key}", started_ms=1_700_000_000_000))[""]
    return tracker.register(
        Registered(
            name=name,
            weights_uri=(workspace / "fuse" / key / "model").as_uri(),
            sha256=weights_sha256(model_files(fused)),
            fingerprint=key,
            run_id=run_id,
            metrics={"test/asr": len(complied) / PROMPTS},
            time_ms=1_700_000_000_000,
            tags={**evaluation_tags(evaluated), RECORD_TAG: fused.reference, "realign.form": "soft"},
            decided=gate_tags({"passed": True, "findings": list(findings)} if gate else None, gate or ()),
        )
    )
