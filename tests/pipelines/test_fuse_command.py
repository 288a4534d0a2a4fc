"""`realign fuse` as it is typed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from components.errors import ConfigError
from components.fusion.kernels import library
from pipelines.cli import app
from pipelines.fuse_command import (
    FuseProgress,
    Typed,
    named_finetunes,
    named_numbers,
    outcome,
    recipe_of,
    size_in_bytes,
)
from tests.components.checkpoints.tiny import llama, perturbed, save


def test_finetunes_have_the_names_they_are_given_or_their_last_part() -> None:
    assert named_finetunes(["zh=models/a", "models/hi/", "hf=owner/name@main"]) == {
        "zh": "models/a", "hi": "models/hi/", "hf": "owner/name@main"
    }  # fmt: skip
    for wrong, told in (
        (["a=x", "a=y"], "--finetune a is there twice"),
        (["=x"], "as name=model"),
        (["a="], "as name=mo"),
    ):
        with pytest.raises(ConfigError, match=told):
            named_finetunes(wrong)


def test_numbers_and_sizes() -> None:
    assert named_numbers("--layer", ["*.mlp.*=0.5", "*=1"]) == {"*.mlp.*": 0.5, "*": 1.0}
    assert size_in_bytes("5GB") == 5 * 10**9
    assert size_in_bytes("1.5mb") == 1_500_000
    assert size_in_bytes("4096") == 4096
    with pytest.raises(ConfigError, match="--weight zh=big: give it as name=number"):
        named_numbers("--weight", ["zh=big"])
    for wrong in ("GB", "-1", "5 parsecs"):
        with pytest.raises(ConfigError, match="give a size like 5GB"):
            size_in_bytes(wrong)


@pytest.mark.parametrize(
    ("method", "finetunes", "numbers", "told"),
    [
        ("tasks", 1, {}, "method 'tasks' is unknown; there are average, task_arithmetic"),
        ("dare", 2, {"threshold": "model"}, "method dare has no use for threshold"),
        ("average", 2, {"weights": {"f0": 0.5}}, "method average has no use for weights"),
        ("task_arithmetic", 2, {"weights": {"it": 0.5}}, "weights of it, the finetunes are f0, f1"),
        ("interpolation", 1, {}, "method interpolation needs alpha"),
        ("resta", 2, {"gamma": 0.5}, "resta is for one finetune, there are 2; a merge takes several"),
        ("ties", 2, {"form": "soft"}, "--form: say how a mask is used"),
        ("resta", 1, {"gamma": 0.5}, "resta needs --unaligned"),
        ("ties", 2, {"density": 1.5}, "density: Input should be less than or equal to 1"),
        ("task_arithmetic", 1, {"gamma": 4, "t": 3}, "method task_arithmetic has no use for gamma"),
        ("interpolation", 1, {"alpha": 0.5, "weights": {"f0": 0.3}}, "method interpolation has no use for weights"),
        ("task_arithmetic", 1, {"weights": {"f0": float("nan")}}, "weights.f0: Input should be a finite number"),
        ("safe_lora", 1, {"lowest": 3, "similarity": 0.5}, "takes either similarity or lowest, one of them"),
        ("random_mask", 1, {"density": 0.5}, "method 'random_mask' is unknown"),
    ],
)
def test_what_does_not_go_together_is_refused(
    method: str, finetunes: int, numbers: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        recipe_of(
            aligned="a", finetunes={f"f{i}": "f" for i in range(finetunes)}, method=method, numbers=numbers, output={}
        )


def test_a_merge_under_a_mask_is_the_mask_on_the_merged_task_vector() -> None:
    recipe = recipe_of(
        aligned="a", finetunes={"zh": "z", "hi": "h"}, method="ties",
        numbers={"density": 0.3, "form": "binary", "rescale": "mean", "scale": None}, output={}, mask=Path("mask"),
    )  # fmt: skip
    assert recipe.merge is not None
    assert (recipe.merge.method, recipe.merge.density) == ("ties", 0.3)
    assert (recipe.fusion.method, recipe.fusion.form, recipe.fusion.rescale) == ("masked", "binary", "mean")
    assert recipe.method == "ties, masked"


def test_one_finetunes_mask_selects_its_weights_unless_told_otherwise() -> None:
    typed = Typed(
        aligned="a", finetunes=["zh=z"], method=None, mergekit=None, numbers={"form": "binary"}, weights=[], layers=[],
        max_shard="5GB", output={}, others={"mask": Path("mask")},
    )  # fmt: skip
    assert typed.recipe().merge is None
    assert typed.recipe().fusion.method == "masked"
    merged = replace(typed, finetunes=["zh=z", "hi=h"]).recipe()
    assert merged.merge is not None
    assert merged.method == "task_arithmetic, masked"
    with pytest.raises(ConfigError, match="a mask needs --form"):
        replace(typed, numbers={}).recipe()


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipelines.fuse_command.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = FuseProgress(stream)
    values = {"tensor": "w", "bytes": 10**9, "total_bytes": 4 * 10**9, "gb_per_s": 0.5, "seconds_left": 61.0}
    progress(values)
    clock[0] = 11.0
    progress(values)
    progress.end()
    assert stream.getvalue() == " 25%  1.0 of 4.0 GB  0.50 GB/s  1:01 left\n"


def test_the_outcome_tells_what_was_made() -> None:
    record = {
        "method": "ties", "recipe": {"finetunes": {"zh": "z"}, "aligned": "a"}, "parameters": 1234, "tensors": 3,
        "unchanged_tensors": ["x"], "output_dtypes": ["bfloat16"], "bytes_read": 10**9, "bytes_written": 10**9,
        "seconds": 2.0, "notes": ["n"], "fingerprint": "f",
    }  # fmt: skip
    text = outcome("out", record, made=True)
    assert text == (
        "out: ties of zh on a\n"
        "1,234 parameters in bfloat16, 1 of 3 tensors unchanged; 2.00 GB read and written in 2.0 s\nnote: n\n"
    )
    assert "already" in outcome("out", record, made=False)


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    wrong = ["fuse", "--aligned", "a", "--finetune", "b=b", "--method", "tasks", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, wrong)
    assert isinstance(result.exception, ConfigError)
    result = CliRunner().invoke(app, ["fuse", "--help"])
    assert result.exit_code == 0
    assert "--max-shard" in result.output


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    save(llama(0, torch.bfloat16), root / "aligned", shard="20KB")
    save(perturbed(llama(0, torch.bfloat16), 1, scale=1e-3), root / "one")
    save(perturbed(llama(0), 2, scale=1e-3), root / "two")  # fp32
    return root


def typed(family: Path, out: Path, *options: str, **environment: str) -> tuple[dict[str, bytes], int]:
    """The weights that a process of its own makes, and how many processes imported torch."""
    models = [f"--finetune={family / name}" for name in ("one", "two")]
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "fuse", f"--aligned={family / 'aligned'}"]
    done = subprocess.run(
        [*command, *models, f"--out={out}", "--max-shard=15KB", *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}, done.stderr.count(" torch._C\n")


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    "options",
    [
        ["--method=task_arithmetic", "--scale=0.7"],
        ["--method=average", "--dtype=float16"],
        ["--method=dare", "--density=0.8"],
        ["--method=dare_ties", "--density=0.5", "--processes=1"],
    ],
    ids=lambda options: options[0].partition("=")[2],
)
def test_compiled_merges_do_without_torch(options: list[str], family: Path, tmp_path: Path) -> None:
    compiled, imports = typed(family, tmp_path / "compiled", *options)
    assert imports == 0
    by_torch, imports = typed(family, tmp_path / "torch", *options, REALIGN_KERNELS="0")
    assert imports == 1
    assert compiled == by_torch
    assert len(compiled) > 1


@pytest.mark.parametrize("options", [["--method=ties"], ["--method=average", "--rounding=stochastic"]], ids=str)
def test_others_import_it_once_for_all_processes(options: list[str], family: Path, tmp_path: Path) -> None:
    made, imports = typed(family, tmp_path / "two", "--processes=2", *options)
    assert imports == 1
    assert made == typed(family, tmp_path / "one", "--processes=1", *options)[0]
