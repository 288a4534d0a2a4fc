"""The benchmark of fusion measures what it says, without mergekit too; the comparison of values counts what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import fusion, mergekit_peer
from benchmarks.mergekit_values import steps
from benchmarks.synthetic import SHAPES, make_family, nbytes, specs_of
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import read_whole
from components.fusion.merge_settings import MergeSettings
from components.fusion.mergekit import read_recipe
from components.fusion.merging import MergedSource

TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family(tmp_path_factory.mktemp("family"), TINY, shard=20_000)


def test_the_models_are_what_they_are_said_to_be(family: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    assert [round(nbytes(SHAPES[size]) / 2e9, 2) for size in ("1b", "7b")] == [1.19, 6.74]
    assert len(list(family["base"].glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(family["a"])
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == nbytes(TINY)
    base, finetune = SafetensorsSource(family["base"]), SafetensorsSource(family["a"])
    assert set(base.names()) == specs_of(TINY).keys()
    name = "model.layers.1.mlp.up_proj.weight"
    delta = finetune.read(name).float() - base.read(name).float()
    assert float(delta.std()) == pytest.approx(0.002, rel=0.1)


def test_the_bare_loop_does_task_arithmetic(
    family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loop"
    command = [sys.executable, str(fusion.ROOT / "benchmarks" / "bare_loop.py")]
    found = fusion.run([*command, *(str(path) for path in family.values()), str(out)], warm=family.values())
    assert found.peak == 0  # nobody watched
    base, *finetunes = (SafetensorsSource(path) for path in family.values())
    merged = MergedSource(base, dict(zip("ab", finetunes, strict=True)), MergeSettings(method="task_arithmetic"))
    written = SafetensorsSource(out)
    assert written.names() == base.names()
    assert all(torch.equal(written.read(name), merged.read(name).bfloat16()) for name in base.names())
    assert fusion._compared(out, out).startswith("the same bits in all")
    with pytest.raises(SystemExit, match="differ in"):
        fusion._compared(out, family["a"])


MIB = 2**20


@pytest.mark.parametrize(
    ("program", "low", "high"),
    [
        # A process and its child.
        ("h = b'x' * (50 << 20); subprocess.run([sys.executable, '-c', "
         "'import time; h = b\"x\" * (100 << 20); time.sleep(1)'])", 150, 200),
        # What forks share is there once.
        ("h = b'x' * (100 << 20); (os.fork() or time.sleep(1)); (os.fork() or time.sleep(1)); time.sleep(1)", 100, 150),
        # Of a mapped file nothing is anonymous.
        ("f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=1); n = sum(m[i] for i in range(0, 100 << 20, 4096)); "
         "time.sleep(0.5)", 1, 50),
    ],
)  # fmt: skip
def test_memory_is_that_of_all_processes_together(tmp_path: Path, program: str, low: int, high: int) -> None:
    (tmp_path / "file").write_bytes(bytes(100 * MIB))
    code = "import mmap, os, subprocess, sys, time; " + program
    found = fusion.run([sys.executable, "-c", code, str(tmp_path / "file")], watch=True)
    assert low * MIB <= found.peak < high * MIB
    assert 0.5 < found.seconds < 60


def test_a_leg_that_fails_is_quoted() -> None:
    with pytest.raises(SystemExit, match=r"(?s)exit status 3 .*no such thing"):
        fusion.run([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"])


@pytest.mark.slow
def test_it_runs_without_mergekit_says_so_and_compares_outputs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fusion", "--quick", "--mergekit", "none",
         "--scratch", str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=fusion.ROOT,
    )  # fmt: skip
    assert "mergekit left out" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    ours = {f"ours {method}" for method in fusion.METHODS}
    assert report["seconds"].keys() == report["memory_mib"].keys() == ours | {"bare loop"}
    assert report["ratios"].keys() == {"task_arithmetic_vs_bare_loop"}
    assert "ours and the bare loop: the same bits in all 869504 weights" in done.stdout
    assert list(tmp_path.iterdir()) == []
    found, said = mergekit_peer.environment(str(tmp_path), tmp_path)
    assert found is None
    assert "mergekit-yaml is not there" in said


def test_too_small_a_disk_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        free = 50 * 10**9

    monkeypatch.setattr(fusion.shutil, "disk_usage", lambda _: Small)
    with pytest.raises(SystemExit, match="56 GB are needed, 50 GB are free"):
        fusion.main(["--size", "7b", "--scratch", str(tmp_path)])


@pytest.mark.parametrize("name", list(fusion.PEERS))
def test_what_mergekit_is_asked_is_what_we_are_asked(family: dict[str, Path], name: str, tmp_path: Path) -> None:
    """The config of each leg, read back by our own reader, is the merge of our leg."""
    leg = fusion._theirs(tmp_path / "environment", family, name, tmp_path)
    command = leg(tmp_path / "out")
    recipe = read_recipe(Path(command[1]))
    settings = MergeSettings(**recipe.settings(SafetensorsSource(family["base"]).names()))
    assert recipe.output_dtype == "bfloat16"
    assert (settings.scale, settings.weights) == (1.0, {"a": 1.0, "b": 1.0})
    ours = fusion._ours(family, settings.method, None)(tmp_path)
    assert [ours[i + 1] for i, word in enumerate(ours) if word == "--density"] == (
        [] if settings.density is None else [str(settings.density)]
    )


def test_torch_comes_first_into_an_environment() -> None:
    first, second = mergekit_peer.install_commands(Path("/somewhere"))
    assert first[-1].startswith("torch==")
    assert "+" not in first[-1]
    assert first[-1] in second
    assert f"mergekit=={mergekit_peer.VERSION}" in second


def test_steps_between_neighbours_across_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        zero = torch.zeros(1, dtype=dtype)
        up, down = (torch.nextafter(zero, torch.full_like(zero, to)) for to in (1.0, -1.0))
        assert steps(up, down).tolist() == [2]
        assert steps(zero, -zero).tolist() == [0]
        one = torch.ones(3, dtype=dtype)
        assert steps(one, torch.nextafter(one, 2 * one)).tolist() == [1, 1, 1]
        assert steps(-one, torch.nextafter(-one, one)).tolist() == [1, 1, 1]


def test_a_written_model_keeps_its_shapes(family: dict[str, Path]) -> None:
    source = SafetensorsSource(family["b"])
    for name, spec in specs_of(TINY).items():
        assert read_whole(source, name).shape == spec.shape
