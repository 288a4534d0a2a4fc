"""Bad input, each kind: one or two lines that name file, tensor or key, exit 2, nothing under a final name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.reporting.schema import read_summary
from pipelines import cli
from tests.families import minute_family
from tests.pipelines.small import records, run, small_config, write_config


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first_tensor(path: Path) -> str:
    return min(load_file(path))


def missing_shard(d: Path) -> list[str]:
    shards(d)[0].unlink()
    return [shards(d)[0].name.replace("00002", "00001")]


def truncated_shard(d: Path) -> list[str]:
    path = shards(d)[0]
    path.write_bytes(path.read_bytes()[:-100])
    return [path.name]


def index_names_absent(d: Path) -> list[str]:
    path = d / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.99.mlp.up_proj.weight"] = shards(d)[0].name
    path.write_text(json.dumps(index))
    return ["model.layers.99.mlp.up_proj.weight"]


def wrong_shape(d: Path) -> list[str]:
    path = shards(d)[0]
    name = first_tensor(path)
    rows, *rest = load_file(path)[name].shape

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    edit(path, change)
    return [f"{name} is {[rows + 1, *rest]}, not {[rows, *rest]}"]


def other_architecture(d: Path) -> list[str]:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(
        json.dumps({**config, "architectures": ["MistralForCausalLM"], "model_type": "mistral"})
    )
    return ["mistral"]


def not_finite(value: float) -> Callable[[Path], list[str]]:
    def change(d: Path) -> list[str]:
        path = shards(d)[0]
        name = first_tensor(path)
        edit(path, lambda tensors: tensors[name].view(-1).__setitem__(5, value))
        return [name, f"is {value}"]

    return change


def pickle_only(d: Path) -> list[str]:
    for path in [*shards(d), d / "model.safetensors.index.json"]:
        path.unlink()
    (d / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    return ["pytorch_model.bin", "safetensors"]


def adapter_shapes(d: Path) -> list[str]:
    path = d / "adapter_model.safetensors"
    name = next(n for n in sorted(load_file(path)) if "lora_A" in n)
    edit(path, lambda tensors: tensors.__setitem__(name, tensors[name][:, :-1].contiguous()))
    return [name.removeprefix("base_model.model.").split(".lora_A")[0]]


def adapter_other_base(d: Path) -> list[str]:
    path = d / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "somebody/another-7b"}))
    return ["somebody/another-7b", "base_equal"]


FULL: dict[str, Callable[[Path], list[str]]] = {
    "missing-shard": missing_shard,
    "truncated-shard": truncated_shard,
    "index-absent": index_names_absent,
    "wrong-shape": wrong_shape,
    "other-architecture": other_architecture,
    "nan": not_finite(float("nan")),
    "inf": not_finite(float("inf")),
    "pickle-only": pickle_only,
}
ADAPTER: dict[str, Callable[[Path], list[str]]] = {
    "adapter-shapes": adapter_shapes,
    "adapter-other-base": adapter_other_base,
}


@pytest.mark.multiproc
@pytest.mark.xdist_group("run")
def test_every_broken_checkpoint_is_named_and_stops_nobody_else(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    zh, hi = config["finetunes"]
    expected: dict[str, list[str]] = {}
    config["finetunes"] = []
    for original, breakages in ((zh, FULL), (hi, ADAPTER)):
        for name, break_it in breakages.items():
            copy = tmp_path / name
            shutil.copytree(original["path"], copy)
            base = copy / "adapter_config.json"
            if base.is_file():
                described = {**json.loads(base.read_text()), "base_model_name_or_path": config["aligned"]}
                base.write_text(json.dumps(described))
            expected[name] = break_it(copy)
            config["finetunes"].append({**original, "name": name, "path": str(copy)})
    workspace = tmp_path / "workspace"
    done = run(write_config(tmp_path, config), workspace)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    summary = read_summary(workspace / "summary.json")
    errors = {f["name"]: f["error"] for f in summary["finetunes"]}
    assert set(errors) == set(expected)
    for name, words in expected.items():
        error = errors[name]
        assert error is not None
        assert len(error.splitlines()) <= 2, error
        assert str(tmp_path / name) in error, error
        assert all(word in error for word in words), (name, error)
        assert f"realign: {name} failed at load" in done.stderr
    # The aligned model was loaded and measured; of the broken ones nothing stands under a final name.
    assert sorted(r.split("/")[0] for r in records(workspace)) == ["evaluate", "load"]


def fails(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of the one error that the command ends with."""
    monkeypatch.setattr(sys, "argv", ["realign", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return small_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["the file is empty", "preference pair"]),
        ('{"prompt": "a", "chosen": "b"}\n', ["line 1: no 'rejected'"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', ["line 2: not JSON"]),
    ],
)
def test_broken_preferences_stop_the_run_before_it_starts(
    tmp_path: Path,
    config: dict[str, Any],
    content: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "pairs.jsonl"
    bad.write_text(content)
    config["mask"]["preferences"] = str(bad)
    workspace = tmp_path / "workspace"
    lines = fails(["run", str(write_config(tmp_path, config)), "--workspace", str(workspace)], monkeypatch, capsys)
    assert len(lines) <= 2
    assert str(bad) in lines[0]
    assert all(word in lines[0] for word in words), lines
    assert records(workspace) == {}


def test_an_empty_prompt_set_stops_the_run(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "harmful.jsonl"
    empty.write_text("")
    config["evaluation"]["sets"][0]["path"] = str(empty)
    path = write_config(tmp_path, config)
    lines = fails(["run", str(path), "--workspace", str(tmp_path / "w")], monkeypatch, capsys)
    assert str(empty) in lines[0]
    assert "empty" in lines[0]


def test_an_unwritable_workspace_and_an_unknown_key(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocker = tmp_path / "a-file"
    blocker.write_text("")
    path = write_config(tmp_path, config)
    lines = fails(["run", str(path), "--workspace", str(blocker / "w")], monkeypatch, capsys)
    assert lines == [f"realign: cannot write {blocker / 'w'}: Not a directory; choose a directory you can write"]
    path = write_config(tmp_path, {**config, "finetune": []})
    lines = fails(["run", str(path), "--workspace", str(tmp_path / "w")], monkeypatch, capsys)
    assert "finetune: unknown key (did you mean 'finetunes'?)" in lines[0]
    assert str(path) in lines[0]
    assert not (tmp_path / "w").exists()


def test_status_of_nothing_and_a_missing_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no run here" in fails(["status", str(tmp_path)], monkeypatch, capsys)[0]
    assert "cannot be read" in fails(["run", str(tmp_path / "no.yaml")], monkeypatch, capsys)[0]


def test_a_directory_that_is_no_family_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert minute_family().is_dir()
    (tmp_path / "mine").write_text("precious")
    lines = fails(["testbed", "build", str(tmp_path), "--size", "minute"], monkeypatch, capsys)
    assert "not a testbed family" in lines[0]
    assert (tmp_path / "mine").read_text() == "precious"
