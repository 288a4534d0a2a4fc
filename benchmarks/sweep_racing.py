"""`python -m benchmarks.sweep_racing --family DIR --run WORKSPACE/summary.json`: what racing saves, and who wins.

Candidates drawn at random from the usual space (the run's own soft and binary forms first) are asked every dev prompt. Then
the race is run over these answers, in ten orders of candidates and prompts, by every rule:

  all            as they are
  worse          without those near the best there is (losses of 0.06 in all or less), where nobody leads from the start
  interpolation  those without a mask alone, where skill and safety exclude each other

The share of prompts spent, whether the winner is that of full scoring, and what is left of the front's volume. `--keep DIR`
keeps the answers; a second call goes on with them. Exit status 1 where the bar is missed: more than half of the prompts of all
candidates, or another winner.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.sweeps.trials import Scored

BAR = 0.5
_RULES = ("skill", "safest", "knee")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, required=True, help="the testbed that the run was of")
    parser.add_argument("--run", type=Path, required=True, help="its summary.json")
    parser.add_argument("--finetunes", nargs="+", default=["zh", "hi", "math"])
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--quick", action="store_true", help="one finetune, 12 candidates, 2 orders")
    options = parser.parse_args(arguments)
    if options.quick:
        options.finetunes, options.candidates, options.orders = options.finetunes[:1], 12, 2
    with tempfile.TemporaryDirectory() as made:
        found = {name: _raced(name, options, options.keep or Path(made)) for name in options.finetunes}
    shares = [one["all"][rule]["most"] for one in found.values() for rule in _RULES]
    same = all(kind[rule]["same"] == options.orders for one in found.values() for kind in one.values() for rule in kind)
    sys.stdout.write(json.dumps({
        "benchmark": "sweep_racing", "date": datetime.now(UTC).date().isoformat(), "quick": options.quick,
        "candidates": options.candidates, "orders": options.orders, "finetunes": found,
        "ratios": {"most prompts": max(shares)}, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }) + "\n")  # fmt: skip
    return 0 if options.quick or (same and max(shares) <= BAR) else 1


def _raced(name: str, options: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """By kind of candidates and rule: orders with the same winner, shares of prompts, what is left of the volume."""
    from components.sweeps.settings import DEFAULT_OBJECTIVES

    scored = _scored(name, options, kept / f"{name}.jsonl")
    kinds = {
        "all": scored,
        "worse": [one for one in scored if sum(one.losses(DEFAULT_OBJECTIVES)) > 0.06],
        "interpolation": [one for one in scored if one.candidate.get("method") == "interpolation"],
    }
    found: dict[str, Any] = {}
    for kind, some in kinds.items():
        found[kind] = {}
        for rule in _RULES if len(some) > 1 else ():
            ran = [race(some, rule, order, own=2 if kind == "all" else 0) for order in range(options.orders)]
            shares, volumes = [one["share"] for one in ran], [one["volume"] for one in ran]
            same = sum(one["same"] for one in ran)
            found[kind][rule] = {"same": same, "median": median(shares), "most": max(shares), "volume": min(volumes)}
            sys.stdout.write(
                f"{name:5} {kind:14} {len(some):3} candidates, {rule:6} the same winner in {same} of {len(ran)}, prompts "
                f"{median(shares):.1%} (at most {max(shares):.1%}), volume left {min(volumes):.3f}\n"
            )
            sys.stdout.flush()
    return found


def race(scored: Sequence[Scored], rule: Any, order: int, *, own: int) -> dict[str, Any]:
    """One race over what is known, candidates and prompts mixed by `order`. The first `own` are the run's own settings: they
    stay the first, are asked everything, and the others are held against them, as a sweep does. Without them the first one is
    asked everything all the same, for nobody is there who could stop it."""
    from components.sweeps.front import best, hypervolume, reference_of
    from components.sweeps.racing import Race
    from components.sweeps.result import usual_of
    from components.sweeps.settings import DEFAULT_OBJECTIVES as OBJECTIVES
    from components.sweeps.settings import SweepSettings
    from components.sweeps.trials import Scored

    prompts = {name: len(hits) for name, hits in scored[0].hits.items()}
    mixed = [_mixed(one, order) for one in scored]
    rest = mixed[own:]
    random.Random(order).shuffle(rest)
    full = [*mixed[:own], *rest]
    sweep = SweepSettings(pick=rule)
    usual = usual_of(full[:own], [one.candidate for one in full[:own]], sweep, prompts)
    racing = Race(OBJECTIVES, prompts, pick=rule)
    given = max(own, 1)
    done, spent = full[:given], given * sum(prompts.values())
    for one in full[given:]:
        asked: dict[str, int] = {}
        found = one
        while (sample := racing.next_sample(asked)) is not None:
            asked = sample
            found = Scored(one.candidate, {name: hits[: asked.get(name, 0)] for name, hits in one.hits.items()})
            if racing.verdict(found, done, usual) is not None:
                break
        spent += sum(asked.values())
        done.append(found)
    finished = [one for one in done if one.is_full(prompts)]
    winner, wanted = (some[best(some, OBJECTIVES, rule, usual)] for some in (finished, full))
    left, whole = (
        hypervolume([o.losses(OBJECTIVES) for o in some], reference_of(OBJECTIVES)) for some in (finished, full)
    )
    share = spent / sum(prompts.values()) / len(full)
    return {"share": share, "same": winner.candidate == wanted.candidate, "volume": left / whole if whole else 1.0}


def _mixed(one: Scored, order: int) -> Scored:
    """Its answers in another order of prompts, the same for all candidates."""
    from components.sweeps.trials import Scored

    hits = {}
    for name, found in one.hits.items():
        places = list(range(len(found)))
        random.Random(f"{order}/{name}").shuffle(places)
        hits[name] = "".join(found[place] for place in places)
    return Scored(one.candidate, hits)


def _scored(name: str, options: argparse.Namespace, path: Path) -> list[Scored]:
    """Candidates that were asked everything, those that are not kept yet among them."""
    import optuna

    from components.fusion.settings import FusionSettings
    from components.sweeps.checking import Given, complete_space
    from components.sweeps.space import Tuning, suggest, tuning_of
    from components.sweeps.trials import Candidate, Scored, append_trial, candidate_key, read_trials

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    defaults = Tuning(fusion=FusionSettings(method="masked", form="soft"))
    space = complete_space({}, Given(), defaults)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    candidates: list[Candidate] = [
        {"method": "masked", "form": "soft", "scale": 1.0, "temperature": 1.0},
        {"method": "masked", "form": "binary", "scale": 1.0, "threshold": 0.0},
    ]
    candidates += [suggest(space, study.ask(), defaults) for _ in range(options.candidates - 2)]
    known = {candidate_key(one.candidate): one for one in read_trials(path)}
    trier = None
    for candidate in candidates:
        if candidate_key(candidate) not in known:
            trier = trier or _trier(name, options)
            trier.take(tuning_of(candidate, defaults))
            known[candidate_key(candidate)] = Scored(candidate, trier.score(trier.prompts))
            append_trial(path, known[candidate_key(candidate)])
    return [known[candidate_key(candidate)] for candidate in candidates]


def _trier(name: str, options: argparse.Namespace) -> Any:
    """The finetune with its mask, as the run trained it."""
    import torch

    from components.checkpoints.loading import load_causal_lm, load_tokenizer
    from components.checkpoints.reference import open_checkpoint
    from components.evaluation.generate import InProcess
    from components.evaluation.judges import make_judge
    from components.evaluation.prompts import load_prompt_set
    from components.masks.artifact import MaskArtifact
    from components.records import RECORD_FILE
    from components.sweeps.settings import DEFAULT_OBJECTIVES
    from components.sweeps.trying import Trier
    from pipelines.config import load_config

    torch.set_num_threads(1)
    config = load_config(options.family / "realign.yaml")
    [finetune] = config.members(name)
    told = next(one for one in json.loads(options.run.read_text())["finetunes"] if one["name"] == name)
    workspace = options.run.resolve().parent
    fused = workspace / "fuse" / Path(told["fused"]["soft"]).parent.name / RECORD_FILE
    trained = json.loads(fused.read_text())["parents"]["train_mask"]
    aligned = open_checkpoint(config.aligned)
    tuned = open_checkpoint(finetune.path, base=config.aligned)
    model = load_causal_lm(aligned.model_dir, dtype=torch.float32)
    return Trier(
        InProcess(model, load_tokenizer(tuned.tokenizer_dir), batch_size=config.execution.batch_size),
        aligned=aligned.source,
        finetunes={name: tuned.source},
        sets=[load_prompt_set(one) for one in config.sets_of(name) if one.split == "dev"],
        objectives=DEFAULT_OBJECTIVES,
        settings=config.evaluation,
        judge=make_judge(config.evaluation.judge),
        mask=MaskArtifact.open(workspace / trained / "mask"),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
