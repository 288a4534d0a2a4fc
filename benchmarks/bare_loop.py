"""`python benchmarks/bare_loop.py BASE A B OUT`: task arithmetic as the barest loop there is, the floor of benchmarks.fusion.

One thread, blocks of 262,144 elements, fp32 maths in reused scratch, the header first. It takes three bf16 checkpoints whose
files are laid out alike and checks nothing: no names, no shapes, no disk space; nothing is durable or put away when it fails.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import torch

BLOCK = 262_144


def main(base: Path, first: Path, second: Path, out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    aligned, total, delta = (torch.empty(BLOCK) for _ in range(3))
    fused = torch.empty(BLOCK, dtype=torch.bfloat16)
    raw = fused.view(torch.uint8).numpy().data
    for file in sorted(base.glob("*.safetensors")):
        length = 8 + struct.unpack("<Q", file.open("rb").read(8))[0]
        header = file.open("rb").read(length)
        for entry in json.loads(header[8:]).values():
            assert entry.get("dtype", "BF16") == "BF16", "this loop is for bf16"
        inputs = [_values(directory / file.name, length) for directory in (base, first, second)]
        with (out / file.name).open("wb", buffering=0) as target:
            target.write(header)
            for start in range(0, inputs[0].numel(), BLOCK):
                a, f, g = (one[start : start + BLOCK] for one in inputs)
                n = a.numel()
                aligned[:n].copy_(a)
                torch.sub(total[:n].copy_(f), aligned[:n], out=total[:n])
                torch.sub(delta[:n].copy_(g), aligned[:n], out=delta[:n])
                fused[:n].copy_(total[:n].add_(delta[:n]).add_(aligned[:n]))
                target.write(raw[: 2 * n])
    for file in base.glob("*.json"):
        shutil.copy(file, out / file.name)


def _values(file: Path, offset: int) -> torch.Tensor:
    """All that follows a file's header, mapped."""
    # Mapped for writing but never written, and not kept: torch warns of maps that cannot be written.
    return torch.from_numpy(np.memmap(file, dtype=np.int16, mode="c", offset=offset)).view(torch.bfloat16)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
