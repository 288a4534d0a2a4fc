"""mergekit in an environment of its own: how to make one, and the command for a merge.

torch is installed first, in the build that this project has, so that nothing else pulls another one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

VERSION = "0.1.5"


def install_commands(environment: Path) -> list[list[str]]:
    """What makes the environment, to run in this order after `python -m venv`."""
    pip = [str(environment / "bin" / "pip"), "install", "--quiet"]
    torch = f"torch=={version('torch').split('+')[0]}"
    same = [f"{name}=={version(name)}" for name in ("transformers", "safetensors")]
    return [[*pip, torch], [*pip, f"mergekit=={VERSION}", torch, *same]]


def environment(given: str | None, scratch: Path) -> tuple[Path | None, str]:
    """The environment to use and a sentence about it: the given one, none (`none`), or a new one in `scratch`. Where it cannot
    be made (no network), None and why."""
    if given == "none":
        return None, "mergekit left out (--mergekit none)"
    found = Path(given).absolute() if given else scratch / "mergekit"
    if not given:
        sys.stderr.write(f"installing mergekit {VERSION} in {found}\n")
        venv.create(found, with_pip=True)
        for command in install_commands(found):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                return None, f"mergekit left out: it cannot be installed here ({reason})"
    if not program(found).is_file():
        return None, f"mergekit left out: {program(found)} is not there"
    code = "import importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in ('mergekit', 'torch', 'transformers')))"
    return found, subprocess.run(
        [str(found / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def program(environment: Path) -> Path:
    """Its `mergekit-yaml`."""
    return environment / "bin" / "mergekit-yaml"


def config(
    method: str,
    models: Mapping[Path, Mapping[str, Any]],
    *,
    base: Path | None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
) -> str:
    """A mergekit config as text; JSON is YAML."""
    merge: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": dict(own)} for path, own in models.items()],
        "parameters": dict(parameters or {}),
    }
    merge |= {"base_model": str(base)} if base else {}
    merge |= {key: value for key, value in (("dtype", dtype), ("out_dtype", out_dtype)) if value}
    return json.dumps(merge, indent=2)


def command(environment: Path, text: str, file: Path, out: Path, *options: str) -> Sequence[str]:
    """Write the config to `file` and give the command that merges into `out`."""
    file.write_text(text)
    return [str(program(environment)), str(file), str(out), "--quiet", "--no-copy-tokenizer", *options]
