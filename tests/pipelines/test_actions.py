"""What a registered version says of its weights and its evaluation."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from components.errors import GateError
from components.published import model_files, weights_sha256
from components.records import OutputFile, Record
from components.reporting.schema import RunSummary
from pipelines import actions
from pipelines.actions import _lineage
from pipelines.run import _told


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


def test_a_disk_that_is_full_takes_nothing_else_from_a_run(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".tracking.lease"))

    summary, failed = cast("RunSummary", {}), list[str]()
    assert not _told(tmp_path, summary, failed, full)
    assert failed == summary["notes"]
    assert "No space left on device; free some space" in failed[0]


def test_a_promotion_that_is_tried_again_is_noted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where the server went away after the first of two models was refused."""
    entry: Any = {
        "name": "zh", "gate": {"passed": True}, "registry": {"name": "m-zh", "version": "1"}, "notes": ["gate: one"]
    }  # fmt: skip
    summary: Any = {"finetunes": [entry], "merged": []}
    run: Any = SimpleNamespace(workspace=SimpleNamespace(root=tmp_path))
    for said in ("shut", "still shut"):

        def refused(*_: Any, said: str = said, **__: Any) -> None:
            raise GateError(said)

        monkeypatch.setattr(actions, "promote", refused)
        assert actions._promote_all(run, summary, None) == ["zh"]  # type: ignore[arg-type]
    assert entry["notes"] == ["gate: one", "promote: still shut"]
