"""`python -m ray_jobs.main SPEC.json`: run one stage, print its answer as the last line.

In a job of a Ray cluster (RAY_ADDRESS is set) a fused model is written by all its nodes.

Exit status: 0 done, 2 failed by what the user gave (the answer says what), 1 a fault that a retry may mend.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import ValidationError

from ray_jobs.cluster import cluster_address, join_cluster
from ray_jobs.stage import StageSpec, run_stage


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m ray_jobs.main SPEC.json\n")
        return 2
    try:
        spec = StageSpec.model_validate_json(Path(arguments[0]).read_text())
    except (OSError, ValidationError) as e:
        sys.stderr.write(f"realign: {arguments[0]} is not a stage spec: {e}\n")
        return 2
    if spec.stage == "fuse" and cluster_address():  # a job of a cluster: its nodes take part
        join_cluster()
    answer = run_stage(spec)
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0 if answer["status"] == "done" else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
