"""Whether an image is what it should be; the last step of its build, and any time in a container:
`python /opt/realign/share/verify.py --variant cpu --version 0.1.0`. Exit status 1 lists what is wrong."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

_PROJECT = "safety-realign"
_CUDA_ONLY = re.compile(r"nvidia-|cuda-|triton")
"""What a CUDA build of torch brings along; it names exact versions itself, and constraints.txt was made without it."""


def unpinned(constraints: Path) -> Iterator[str]:
    """Installed packages that constraints.txt does not have in this version (a local part such as +cpu aside)."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text().splitlines())
    pins = {_canonical(name): version for name, version in (line.split("==") for line in lines if line)}
    pins[_PROJECT] = metadata.version(_PROJECT)
    for one in metadata.distributions():
        name = _canonical(one.name)
        if _CUDA_ONLY.match(name) or name == "setuptools":
            continue
        if name not in pins:
            yield f"{name} {one.version} is installed, and constraints.txt does not have it"
        elif one.version.split("+")[0] != pins[name].split("+")[0]:
            yield f"{name} {one.version} is installed, constraints.txt has {pins[name]}"


def other_torch(variant: str) -> Iterator[str]:
    """torch must be built for the variant's CUDA, or none."""
    import torch

    cuda = torch.version.cuda
    found = "cpu" if cuda is None else "cu" + "".join(cuda.split(".")[:2])
    if found != variant:
        yield f"torch {torch.__version__} is built for {found}, not {variant}: look at TORCH_INDEX"


def uncompiled() -> Iterator[str]:
    """The project's kernels, a compiler for DeepSpeed, and its shared-memory operation, which must load without one."""
    from components.fusion.kernels import library

    if library() is None:
        yield "components/fusion/_kernels is missing or of another version"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        yield f"{' and '.join(missing)} missing: DeepSpeed could not compile its other operations"
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.utils.cpp_extension as extensions
    from deepspeed.accelerator import get_accelerator

    def refuse(name: str, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"{name} would be compiled")

    original, extensions.load = extensions.load, refuse  # what DeepSpeed calls to compile, by this name
    try:
        get_accelerator().create_op_builder("ShareMemCommBuilder").load().vector_kernel_level()
    except (ImportError, OSError, RuntimeError) as error:
        yield f"DeepSpeed's shared-memory operation does not load: {error}"
    finally:
        extensions.load = original


def main() -> int:
    """Look at everything, say all that is wrong."""
    parser = argparse.ArgumentParser(description="Whether this image is what it should be.")
    parser.add_argument("--variant", required=True, help="cpu, or PyTorch's name of a CUDA version (cu130)")
    parser.add_argument("--version", required=True, help="of the project")
    parser.add_argument("--constraints", type=Path, default=Path(__file__).with_name("constraints.txt"))
    given = parser.parse_args()
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: unpinned(given.constraints),
        lambda: other_torch(given.variant),
        uncompiled,
    ]
    wrong = [line for check in checks for line in check()]
    version = metadata.version(_PROJECT)
    if version != given.version:
        wrong.append(f"{_PROJECT} is {version}, and VERSION={given.version} would be on the label")
    for line in wrong:
        print(f"verify: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    sys.exit(main())
