"""What it takes to move a model of 100 M parameters, in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="anonymous memory is read from /proc"),
]
SHAPE = {
    "vocab_size": 16_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 11,
}


def anonymous() -> int:
    """Resident bytes that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    def __init__(self) -> None:
        self.start = self.most = anonymous()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)


def move(root: Path, told: Any) -> None:
    """Tell the peak above what was there after imports, and the bytes of the weights once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    from components.checkpoints.safetensors import SafetensorsSource
    from components.landscape.moving import Pristine
    from components.landscape.plane import Plane
    from components.landscape.vectors import RandomDirection, TowardsDirection

    torch.set_num_threads(1)
    with no_init_weights():
        LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, intermediate_size=8))
    peak = Peak()
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    pristine = Pristine(model)
    axes = [RandomDirection(0, 0, "filter"), TowardsDirection(SafetensorsSource(root), "other")]
    plane = Plane(pristine, axes)
    for at in ((0.25, 0.0), (0.25, -0.5), (0.0, 0.0)):
        assert pristine.move(plane, at)
    told.put((peak.most - peak.start, sum(p.nbytes for p in model.parameters())))


def write_zeros(root: Path) -> None:
    """A checkpoint of that architecture whose file has a header and no blocks on the disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        header[name] = {
            "dtype": "F32",
            "shape": list(parameter.shape),
            "data_offsets": [end, end := end + parameter.nbytes],
        }
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    with (root / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)
    model.config.save_pretrained(root)


def test_directions_are_never_whole(tmp_path: Path) -> None:
    write_zeros(tmp_path)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=move, args=(tmp_path, told))
    process.start()
    peak, once = told.get(timeout=300)
    process.join()
    assert once > 4e8
    assert 1.95 * once < peak < 1.1 * 2 * once  # the issue allows 1.3; measured 1.03
