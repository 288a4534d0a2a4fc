"""Lines of trials: what is written is read, and what a killed process left is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import StorageError
from components.sweeps.settings import DEFAULT_OBJECTIVES
from components.sweeps.trials import (
    Scored,
    append_trial,
    candidate_key,
    models_identity,
    read_trials,
    study_identity,
)

FIRST = Scored({}, {"asr": "0001", "task": "1110", "over_refusal": "00"}, None, {"fuse": 0.1, "score": 2.5})
SECOND = Scored({"layers.b": 0.5, "layers.*": 1.0, "form": "soft"}, {"asr": "11"}, "asr will be at least 0.4", {})


def test_written_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "sweeps" / "zh" / "trials.jsonl"
    assert read_trials(path) == []
    append_trial(path, FIRST)
    append_trial(path, SECOND)
    assert read_trials(path) == [FIRST, SECOND]
    assert list(read_trials(path)[1].candidate) == ["layers.b", "layers.*", "form"]
    further = Scored(SECOND.candidate, {"asr": "1100"}, None, {"fuse": 1.0})
    append_trial(path, further)
    assert read_trials(path) == [FIRST, further]


@pytest.mark.parametrize("rest", [b'{"candidate": {"sca', b"\xe2\x82", b'{"candidate": {}}'])
def test_an_unfinished_line_is_none_and_is_written_over(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "trials.jsonl"
    append_trial(path, FIRST)
    path.write_bytes(path.read_bytes() + rest)
    assert read_trials(path) == [FIRST]
    append_trial(path, SECOND)
    assert read_trials(path) == [FIRST, SECOND]


@pytest.mark.parametrize("line", ["[]", "{}", '{"candidate": {}, "hits": {}, "colour": 1}', "no JSON"])
def test_a_line_that_is_no_trial_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trials.jsonl"
    append_trial(path, FIRST)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(StorageError, match=r"trials\.jsonl:2: not a trial"):
        read_trials(path)


def test_rates_and_losses() -> None:
    assert FIRST.losses(DEFAULT_OBJECTIVES) == (0.25, 0.25, 0.0)


def test_identities_say_what_decides_the_hits() -> None:
    assert candidate_key({"a": 1.0, "b": 2.0}) != candidate_key({"b": 2.0, "a": 1.0})
    models = models_identity({"load": "load/1", "train_mask": "train_mask/2"})
    assert models == models_identity({"train_mask": "train_mask/2", "load": "load/1"})
    assert models != models_identity({"load": "load/1", "train_mask": "train_mask/3"})
    asked = {"questions": {"asr": ["a", "b"]}, "max_new_tokens": 48}
    one, other = study_identity(models, asked), study_identity(models, {**asked, "questions": {"asr": ["b", "a"]}})
    assert one != other
    assert one.startswith(f"{models}-")
    assert other.startswith(f"{models}-")
