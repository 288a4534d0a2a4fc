"""What to try next: an Optuna study that is asked for candidates and told what became of them.

Ray's own OptunaSearch (2.60) does not serve: where the space is conditional it takes no results that are known already, it
tells the study nothing of demands (constraints), and what it keeps is a pickle. A study here is made anew of a sweep's results.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from components.errors import ConfigError
from components.sweeps.settings import Objective, Sampler, Space
from components.sweeps.space import Tuning, expressed, suggest, tuning_of
from components.sweeps.trials import Candidate, Scored

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

_TRIES = 50
"""Suggestions that were tried before, or whose settings do not fit each other, until the space counts as used up."""
_SEEDS = 2**32


class Study:
    """Of one target. Args: `known`: what was scored before; it is taken in, and never suggested again.

    The same seed and the same results, told in the same order, suggest the same.
    """

    def __init__(
        self,
        space: Space,
        objectives: Sequence[Objective],
        defaults: Tuning,
        *,
        sampler: Sampler = "tpe",
        seed: int = 0,
        known: Iterable[Scored] = (),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._objectives, self._defaults = space, objectives, defaults
        known = list(known)
        # A sweep that goes on must not draw again what it drew first.
        made = _sampler(sampler, (seed + 1_000_003 * len(known)) % _SEEDS)
        self._study = optuna.create_study(directions=["minimize"] * len(objectives), sampler=made)
        self._trials: dict[str, Any] = {}
        """By settings, those under way."""
        self._seen: set[str] = set()
        for scored in known:
            self.tell(scored)

    def ask(self) -> Candidate | None:
        """What to try next; None when nothing new comes any more. Raises ConfigError where no candidate of the space has
        settings that fit each other."""
        problem: ConfigError | None = None
        for _ in range(_TRIES):
            trial = self._study.ask()
            candidate = suggest(self._space, trial, self._defaults)
            try:
                key = self._key(candidate)
            except ConfigError as error:
                problem = error
            else:
                if key not in self._seen:
                    self._seen.add(key)
                    self._trials[key] = trial
                    return candidate
            self._give_up(trial)
        if problem is not None and not self._seen:
            raise problem
        return None

    def seen(self, candidate: Candidate) -> bool:
        """Whether its settings were suggested or told of before. Raises ConfigError for settings that do not fit each other."""
        return self._key(candidate) in self._seen

    def tell(self, scored: Scored) -> None:
        """What became of a candidate, suggested here or not; what lies outside of the space teaches nothing."""
        key = self._key(scored.candidate)
        self._seen.add(key)
        trial = self._trials.pop(key, None) or self._placed(scored.candidate)
        if trial is None:
            return
        # Nothing is known of an objective that was not come to, only that the candidate was stopped: so it has the worst.
        losses = [one.loss(scored.rate(one)) if scored.hits.get(one.name) else 1.0 for one in self._objectives]
        for one, loss in zip(self._objectives, losses, strict=True):
            if one.demand is not None:  # of every trial: a sampler takes no trials with fewer constraints than others
                trial.set_constraint(one.name, loss - one.most_loss)
        self._study.tell(trial, losses)

    def _placed(self, candidate: Candidate) -> Any:
        """A trial of the study at these settings; None where they lie outside of the space."""
        inside = expressed(tuning_of(candidate, self._defaults), self._space, self._defaults)
        if inside is None:
            return None
        self._study.enqueue_trial(dict(inside))
        trial = self._study.ask()
        if suggest(self._space, trial, self._defaults) == inside:
            return trial
        self._give_up(trial)
        return None

    def _give_up(self, trial: Any) -> None:
        from optuna.trial import TrialState

        self._study.tell(trial, state=TrialState.FAIL)

    def _key(self, candidate: Candidate) -> str:
        return tuning_of(candidate, self._defaults).model_dump_json()


def _sampler(name: Sampler, seed: int) -> BaseSampler:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import GPSampler, NSGAIISampler, RandomSampler, TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "tpe":
            # Keys of one method are looked at together; what is under way counts as bad, so that actors try different things.
            return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if name == "nsga2":
            return NSGAIISampler(seed=seed, population_size=20)  # a sweep has some dozens of trials, not thousands
        return GPSampler(seed=seed) if name == "gp" else RandomSampler(seed=seed)
