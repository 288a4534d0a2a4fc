"""What a registered version says of its weights and its evaluation."""

from __future__ import annotations

import hashlib
import json

from components.published import model_files, weights_sha256
from components.records import OutputFile, Record
from pipelines.actions import _lineage


def record(stage: str, fingerprint: str, files: dict[str, str]) -> Record:
    return Record(
        stage=stage, stage_version=1, fingerprint=fingerprint, semantics={}, execution={},
        parents={"mask": "train_mask/m1"}, metrics={}, code={}, environment={}, started="", seconds=0.0,
        outputs={name: OutputFile(bytes=1, sha256=sha256) for name, sha256 in files.items()},
    )  # fmt: skip


def test_the_weights_hash_is_a_sha256_over_the_models_files() -> None:
    files = {"model/b.safetensors": "22", "model/a.json": "11"}
    expected = hashlib.sha256(b'{"model/a.json":"11","model/b.safetensors":"22"}').hexdigest()
    assert len(expected) == 64
    assert json.loads('{"model/a.json":"11","model/b.safetensors":"22"}') == files
    assert weights_sha256(model_files(record("fuse", "f1", {**files, "fusion.json": "33"}))) == expected
    assert weights_sha256(model_files(record("fuse", "f2", files))) == expected
    assert weights_sha256(model_files(record("fuse", "f1", {**files, "model/a.json": "12"}))) != expected


def test_a_version_names_its_evaluation_and_what_it_said() -> None:
    evaluated = record("evaluate", "e1", {"test/answers/a.jsonl": "11"})
    tags = _lineage(record("fuse", "f1", {}), evaluated, "soft")
    said = hashlib.sha256(b'{"outputs":{"test/answers/a.jsonl":"11"},"semantics":{}}').hexdigest()
    assert tags == {
        "realign.evaluation.sha256": said,
        "realign.form": "soft",
        "realign.record": "fuse/f1",
        "realign.evaluation": "evaluate/e1",
        "realign.parent.mask": "train_mask/m1",
    }
