"""A run config of a cluster, as text, and its compiled pipeline."""

from __future__ import annotations

from pathlib import Path

CONFIG = """\
name: trial
aligned: /models/aligned
unaligned: /models/unaligned
finetunes:
  - {name: zh, path: /models/zh, anchor: /workspace/data/anchor.jsonl, sets: [zh]}
  - {name: hi, path: /models/hi, anchor: /workspace/data/anchor.jsonl}
mask:
  preferences: /workspace/data/pairs.jsonl
fusion: {controls: [interpolation, resta, paper], adapter: {}}
evaluation:
  sets:
    - {name: harmful, kind: harmful, path: /workspace/data/harmful.jsonl}
    - {name: harmful, kind: harmful, split: dev, path: /workspace/data/harmful.jsonl}
    - {name: zh, kind: task, path: /workspace/data/zh.jsonl}
gate:
  - {metric: asr, at_most: 0.05}
"""
MERGE = CONFIG.replace(
    "fusion: {controls: [interpolation, resta, paper], adapter: {}}", "fusion: {controls: []}"
).replace(
    "name: trial",
    "name: trial\nmode: merge\nmerges: [{name: both, method: average}, {name: all, method: ties, of: [zh, hi]}]",
)
IMAGE = "ghcr.io/example/realign@sha256:" + "0123456789abcdef" * 4


def written(directory: Path, text: str = CONFIG) -> Path:
    path = directory / "realign.yaml"
    path.write_text(text)
    return path


def compiled(directory: Path, text: str = CONFIG, **settings: int) -> Path:
    from pipelines.kubeflow import compile_pipeline

    out = directory / "pipeline.yaml"
    compile_pipeline(written(directory, text), out, image=IMAGE, **settings)
    return out
