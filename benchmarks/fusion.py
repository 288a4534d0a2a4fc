"""`python -m benchmarks.fusion`: `realign fuse` beside mergekit and beside a bare loop, whole processes with their start-up.

A synthetic Llama of 1.19 B bf16 parameters and two finetunes of it, page cache warm, every leg in turn, three times timed and
once before that watched for its memory (to look is not free):
  ours       task arithmetic, DARE (density 0.8), TIES (density 0.2)
  mergekit   task arithmetic in bf16 and in fp32 (written as bf16), dare_linear, ties, at the same densities
  bare loop  `benchmarks/bare_loop.py`: task arithmetic over the same bytes in one thread, nothing checked
Prints wall times (median and quartiles) and the peak anonymous memory of all processes of a leg together (a page that a fork
shares counts once), then one JSON line; ratios above 1 are better for us. Outputs are deleted between runs; ours must equal the
loop's, bit for bit.

mergekit runs in an environment of its own: `--mergekit VENV` takes one that is there, `--mergekit none` leaves it out, else one
is made (and deleted). `--quick` takes a model of a few MB, which shows that it runs and nothing else. `--size 7b` measures our
memory on 1.19 B and then on 6.74 B parameters (13.5 GB each; 54 GB of disk, looked up first), one run of each method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles

from benchmarks import mergekit_peer
from benchmarks.synthetic import SHAPES, make_family, nbytes

ROOT = Path(__file__).resolve().parent.parent
DENSITY = {"dare": 0.8, "ties": 0.2}
METHODS = ("task_arithmetic", "dare", "ties")
PEERS = {
    "mergekit bf16": ("task_arithmetic", {"dtype": "bfloat16"}),
    "mergekit fp32": ("task_arithmetic", {"dtype": "float32", "out_dtype": "bfloat16"}),
    "mergekit dare": ("dare_linear", {"dtype": "bfloat16"}),
    "mergekit ties": ("ties", {"dtype": "bfloat16"}),
}
RATIOS = {
    "task_arithmetic_vs_mergekit_bf16": ("mergekit bf16", "ours task_arithmetic"),
    "task_arithmetic_vs_mergekit_fp32": ("mergekit fp32", "ours task_arithmetic"),
    "dare_vs_mergekit": ("mergekit dare", "ours dare"),
    "ties_vs_mergekit": ("mergekit ties", "ours ties"),
    "task_arithmetic_vs_bare_loop": ("bare loop", "ours task_arithmetic"),
}
_SAMPLE_S = 0.05
_MARGIN = 2 * 10**9
"""Disk that is left free beside the models."""

Leg = Callable[[Path], Sequence[str]]
"""Where the output goes -> the command."""


@dataclass
class Run:
    """One whole process."""

    seconds: float
    peak: int
    """Most anonymous memory of it and its descendants together, in bytes; 0 where nobody watched."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="an environment that has it, or `none`")
    parser.add_argument("--legs", nargs="+", choices=["ours", "mergekit", "loop"], default=["ours", "mergekit", "loop"])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="some of them only, to save time"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, help="given to realign fuse; its own choice otherwise")
    parser.add_argument("--scratch", type=Path, help="where models and outputs go (default: the temporary directory)")
    parser.add_argument("--size", choices=["1b", "7b"], default="1b")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    options.shape = "quick" if options.quick else options.size
    if options.quick:
        options.rounds = 0
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        report = _memory(Path(scratch), options) if options.size == "7b" else _speed(Path(scratch), options)
    sys.stdout.write(json.dumps({
        "benchmark": "fusion", "date": datetime.now(UTC).date().isoformat(), "size": options.shape, **report,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 0


def _speed(scratch: Path, options: argparse.Namespace) -> dict[str, object]:
    legs = _legs(scratch, options)
    models = _family(scratch, options.shape)
    runs: dict[str, list[Run]] = {name: [] for name in legs}
    for round_ in range(options.rounds + 1):
        for name, leg in legs.items():
            out = scratch / "out" / name.replace(" ", "-")
            runs[name].append(run(leg(out), warm=models.values(), watch=round_ == 0, settle=not options.quick))
            if round_ or name not in ("bare loop", "ours task_arithmetic"):
                shutil.rmtree(out)
        if not round_ and {"bare loop", "ours task_arithmetic"} <= legs.keys():
            both = [scratch / "out" / "bare-loop", scratch / "out" / "ours-task_arithmetic"]
            sys.stdout.write(f"ours and the bare loop: {_compared(*both)}\n")
        shutil.rmtree(scratch / "out", ignore_errors=True)
    peaks = {name: of[0].peak / 2**20 for name, of in runs.items()}
    timed = {name: [one.seconds for one in of[1:] or of] for name, of in runs.items()}
    seconds = {name: median(of) for name, of in timed.items()}
    for name, of in timed.items():
        low, _, high = quantiles(of, n=4) if len(of) > 1 else (seconds[name],) * 3
        sys.stdout.write(
            f"  {name:21} {seconds[name]:7.2f} s ({low:.2f}–{high:.2f})   {peaks[name]:7.0f} MiB anonymous\n"
        )
    return {
        "ratios": {key: round(seconds[t] / seconds[o], 3) for key, (t, o) in RATIOS.items() if {t, o} <= legs.keys()},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "memory_mib": {name: round(peak, 1) for name, peak in peaks.items()},
    }


def _memory(scratch: Path, options: argparse.Namespace) -> dict[str, object]:
    """Our peaks on the smaller and on the larger model."""
    options.legs = ["ours"]
    sizes = ("quick", "quick") if options.quick else ("1b", "7b")
    _check_disk(scratch, sizes[-1])
    legs = _legs(scratch, options)
    peaks: list[dict[str, float]] = []
    for size in sizes:
        models = _family(scratch, size)
        peaks.append({})
        for name, leg in legs.items():
            peaks[-1][name] = run(leg(scratch / "out"), warm=models.values(), watch=True).peak / 2**20
            shutil.rmtree(scratch / "out")
            sys.stdout.write(f"  {size:5} {name:21} {peaks[-1][name]:7.0f} MiB anonymous\n")
        shutil.rmtree(scratch / "models")
    small, large = peaks
    return {
        "ratios": {f"{name.split()[1]}_memory_small_vs_large": round(small[name] / large[name], 3) for name in legs},
        "memory_mib": {name: round(peak, 1) for name, peak in large.items()},
    }


def _family(scratch: Path, size: str) -> dict[str, Path]:
    shape = SHAPES[size]
    _check_disk(scratch, size)
    began = time.perf_counter()
    models = make_family(scratch / "models", shape, shard=10**6 if size == "quick" else 2 * 10**9)
    took = time.perf_counter() - began
    sys.stdout.write(f"{nbytes(shape) / 2e9:.3f} B parameters in bf16, base and two finetunes, made in {took:.0f} s\n")
    return models


def _check_disk(scratch: Path, size: str) -> None:
    """Three models and at most two outputs (ours and the loop's, to compare) at once."""
    needed = (4 if size == "7b" else 5) * nbytes(SHAPES[size]) + _MARGIN
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(f"{scratch}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free; give --scratch")


def _legs(scratch: Path, options: argparse.Namespace) -> dict[str, Leg]:
    """name -> command, in the order of their turns."""
    models = {name: scratch / "models" / name for name in ("base", "a", "b")}
    legs: dict[str, Leg] = {}
    if "ours" in options.legs:
        legs |= {f"ours {method}": _ours(models, method, options.processes) for method in options.methods}
    if "mergekit" in options.legs:
        environment, said = mergekit_peer.environment(options.mergekit, scratch)
        sys.stdout.write(f"{said}\n")
        if environment is not None:
            chosen = [name for name, (method, _) in PEERS.items() if method.removesuffix("_linear") in options.methods]
            legs |= {name: _theirs(environment, models, name, scratch) for name in chosen}
    if "loop" in options.legs:
        loop = [sys.executable, str(ROOT / "benchmarks" / "bare_loop.py"), *(str(path) for path in models.values())]
        legs["bare loop"] = lambda out: [*loop, str(out)]
    return legs


def _ours(models: Mapping[str, Path], method: str, processes: int | None) -> Leg:
    command = [sys.executable, "-m", "pipelines.cli", "fuse", "--aligned", str(models["base"]), "--method", method]
    for name in ("a", "b"):
        command += ["--finetune", f"{name}={models[name]}"]
    if method in DENSITY:
        command += ["--density", str(DENSITY[method])]
    if processes is not None:
        command += ["--processes", str(processes)]
    return lambda out: [*command, "--out", str(out)]


def _theirs(environment: Path, models: Mapping[str, Path], name: str, scratch: Path) -> Leg:
    method, dtypes = PEERS[name]
    parameters = {"weight": 1.0}
    for ours, density in DENSITY.items():
        if method.startswith(ours):
            parameters["density"] = density
    text = mergekit_peer.config(method, {models[one]: parameters for one in ("a", "b")}, base=models["base"], **dtypes)
    return lambda out: mergekit_peer.command(environment, text, scratch / "mergekit.yml", out)


def run(command: Sequence[str], *, warm: Iterable[Path] = (), settle: bool = False, watch: bool = False) -> Run:
    """Run a command to its end, and `watch` its memory. Files of the directories in `warm` are read before; `settle` waits for
    what is still on its way to the disk. Raises SystemExit with the end of what it said when it fails."""
    for directory in warm:
        _read_all(directory)
    Path(command[-1]).parent.mkdir(parents=True, exist_ok=True)
    if settle:
        os.sync()
    peak, over = [0], threading.Event()
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(list(command), stdout=said, stderr=subprocess.STDOUT, cwd=ROOT)
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over))
        if watch:
            watcher.start()
        try:
            code = process.wait()
            seconds = time.perf_counter() - began
        finally:
            over.set()
            if watch:
                watcher.join()
            if process.poll() is None:
                process.kill()
        if code:
            said.seek(0)
            tail = said.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"exit status {code} of {' '.join(command)}\n{tail}")
    return Run(seconds, peak[0])


def _watch(pid: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(_SAMPLE_S):
        peak[0] = max(peak[0], sum(anonymous(one) for one in descendants(pid)))


def descendants(pid: int) -> list[int]:
    """A process and all that it started, as far as they are still there."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # it ended meanwhile
                continue
    return found


def anonymous(pid: int) -> int:
    """A process's share of the memory that no file stands behind, in bytes; 0 when it has ended. What several processes share
    is divided among them, so that the sum over all of them counts it once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def _read_all(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def _compared(one: Path, other: Path) -> str:
    """Whether two checkpoints have the same bits everywhere. Raises SystemExit where they do not."""
    import torch

    from components.checkpoints.safetensors import SafetensorsSource
    from components.checkpoints.source import blocks

    first, second = SafetensorsSource(one), SafetensorsSource(other)
    if first.names() != second.names():
        raise SystemExit(f"{one} and {other} hold different tensors")
    differing = numel = 0
    for name in first.names():
        for start, stop in blocks(first.spec(name).numel, 1 << 20):
            a, b = (source.read(name, start, stop) for source in (first, second))
            if a.dtype != b.dtype:
                raise SystemExit(f"{name} is {a.dtype} in {one} and {b.dtype} in {other}")
            differing += int((a.view(torch.int16) != b.view(torch.int16)).sum())
        numel += first.spec(name).numel
    if differing:
        raise SystemExit(f"{one} and {other} differ in {differing} of {numel} weights")
    return f"the same bits in all {numel} weights"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
