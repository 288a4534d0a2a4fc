"""`python -m benchmarks.mask_large`: a model of Llama-7B's shape, as many of its layers as the disk takes, on two CPU ranks.

Random bf16 weights, written tensor by tensor; then load, one ZeRO-3 step in bf16 with everything over files, and save (the
state that training goes on from, and the mask). Needs 36 bytes of disk a parameter: two models 4, logits 4, moments 8,
gradients 4, fused weights 2, state 12, mask 2. Prints each rank's peak memory above its imports, seconds and bytes, then
one JSON line. `--quick` takes a small shape on the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.mask_memory import measure

LLAMA_7B = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32,
    "num_hidden_layers": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
QUICK = {**LLAMA_7B, "vocab_size": 500, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
BYTES = 36
"""Of disk, a parameter."""
SPARE = 10 << 30
"""Bytes of disk that are left alone."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="by default as many as the disk takes, 32 at most")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where everything is written, and removed at the end")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    shape = QUICK if options.quick else LLAMA_7B
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        layers = options.layers or (2 if options.quick else _fitting(Path(scratch)))
        found = run(Path(scratch), {**shape, "num_hidden_layers": layers}, options.ranks)
    parameters = found["parameters"]
    sys.stdout.write(f"{layers} layers, {parameters / 1e9:.2f} G parameters, {options.ranks} ranks; ")
    sys.stdout.write(f"models written in {found['write']:.0f} s\n")
    for rank, one in enumerate(found["ranks"]):
        told = ", ".join(f"{name} {value:.0f} s" for name, value in one.items() if name != "peak")
        sys.stdout.write(f"  rank {rank}: peak {one['peak'] / 2**30:.2f} GiB; {told}\n")
    sys.stdout.write("  on disk: " + ", ".join(f"{k} {v / 1e9:.1f} GB" for k, v in found["bytes"].items()) + "\n")
    peak = max(one["peak"] for one in found["ranks"])
    sys.stdout.write(json.dumps({
        "benchmark": "mask_large", "date": datetime.now(UTC).date().isoformat(), "parameters": parameters,
        "ratios": {"state_bytes_over_peak": round(22 * parameters / options.ranks / peak, 3)},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 0


def run(root: Path, shape: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The whole way in an empty directory: parameters, seconds of writing the models, what each rank tells, bytes on disk."""
    start = time.perf_counter()
    parameters = write_models(root, shape)
    write = time.perf_counter() - start
    saved, files = root / "saved", root / "files"
    saved.mkdir()
    zero = {"stage": 3, "offload": "nvme", "offload_weights": "nvme", "offload_dir": files}
    job = {"zero": zero, "settings": {"dtype": "bfloat16"}, "steps": 1, "pairs": 2, "tokens": 32, "save": saved}
    told = measure(root, ranks, job)
    sizes = {name: sum(f.stat().st_size for f in (root / name).rglob("*")) for name in ("aligned", "finetune", "saved")}
    return {"parameters": parameters, "write": write, "ranks": told, "bytes": {**sizes, "files": 18 * parameters}}


def write_models(root: Path, shape: dict[str, Any]) -> int:
    """`root/aligned` and `root/finetune`, one tensor in memory at a time; how many parameters each has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from components.checkpoints.dtypes import BF16
    from components.checkpoints.source import TensorSpec
    from components.checkpoints.writer import CheckpointWriter

    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    specs = {name: TensorSpec(BF16, tuple(p.shape)) for name, p in model.named_parameters()}
    for place in ("aligned", "finetune"):
        config.save_pretrained(root / place)
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(root / "aligned", specs) as aligned, CheckpointWriter(root / "finetune", specs) as finetune:
        for name, spec in specs.items():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            weights = torch.empty(spec.shape).normal_(center, 0.02, generator=generator)
            aligned.write_whole(name, weights.bfloat16())
            weights += torch.empty(spec.shape).normal_(0, 0.002, generator=generator)
            finetune.write_whole(name, weights.bfloat16())
        aligned.finish()
        finetune.finish()
    return sum(spec.numel for spec in specs.values())


def _fitting(directory: Path) -> int:
    h, i, v = (LLAMA_7B[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    most = (shutil.disk_usage(directory).free - SPARE) // BYTES
    return int(min((most - 2 * v * h) // (4 * h * h + 3 * h * i + 2 * h), LLAMA_7B["num_hidden_layers"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
