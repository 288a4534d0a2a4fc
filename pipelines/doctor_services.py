"""`realign doctor`: Ray, the tracking server, and the tokens that a config's models and data ask for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.errors import TrackingError
from pipelines.doctor import Finding, wrong

if TYPE_CHECKING:
    from components.evaluation.api import ApiSettings
    from pipelines.config import RunConfig

_SLOW_S = 5.0


@dataclass(frozen=True)
class Services:
    """What a run would talk to."""

    config: RunConfig | None
    workspace: Path
    uri: str | None
    """Of the tracking server, where it is told."""

    def ray(self) -> list[Finding]:
        """Start a Ray of this machine, as a run does, and have it do something."""
        from ray_jobs.submit import started_ray

        began = time.perf_counter()
        with started_ray(1):
            import ray

            assert ray.get(ray.remote(lambda: 1).remote(), timeout=120) == 1
            taken = time.perf_counter() - began
        found = [Finding("ok", "ray", f"Ray {ray.__version__} starts here and works, in {taken:.0f} s")]
        address = os.environ.get("RAY_ADDRESS")
        if address and not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, there and here"
            found.append(Finding("note", "ray token", f"RAY_ADDRESS is {address}, and no token is set", remedy))
        return found

    def tracking(self) -> list[Finding]:
        """Whether the tracking server answers, is of a version that is understood, and takes what a run writes there."""
        from components.tracking.address import checked, database_of, is_local, shown
        from components.tracking.trial import try_reading, try_writing

        named = self._uri
        if named is None:
            return [Finding("ok", "tracking", "no server is named: a run keeps an sqlite file in its workspace")]
        began = time.perf_counter()
        try:
            uri = checked(named)
            if is_local(uri) and not database_of(uri).exists():
                return [Finding("ok", "tracking", f"there is no {database_of(uri)} yet: a run makes it")]
            if self.config is None or is_local(uri):
                try_reading(uri)
                what = "lets this user read"
                what += "" if is_local(uri) else "; give a config to try whether it may write"
            else:
                experiment = self.config.tracking.experiment or self.config.name
                stays = try_writing(uri, experiment, self._models())
                what = f"lets this user write to the experiment {experiment}, its artifacts and the registry"
                what += f" ({stays})" if stays else ""
        except TrackingError as error:
            return [wrong("tracking", error)]
        taken = time.perf_counter() - began
        text = f"{shown(uri)} answers and {what}, in {taken:.1f} s"
        if taken > _SLOW_S:
            remedy = "look at the server's database and the way to it: a run writes some hundred times"
            return [Finding("note", "tracking", text, remedy)]
        return [Finding("ok", "tracking", text)]

    def _models(self) -> list[str]:
        """Registered models that a run of the config writes to."""
        from pipelines.gate import registered_as

        assert self.config is not None
        if not self.config.tracking.register_models:
            return []
        names = [registered_as(self.config, name) for name in self.config.targets]
        return names + ([f"{name}.promotions" for name in names] if self.config.tracking.promote else [])

    def tokens(self) -> list[Finding]:
        """Whether the variables are set that what the config names asks for. Values are never shown."""
        wanted = list(self._wanted())
        if not wanted:
            what = "the config asks for none" if self.config is not None else "give a config to know which are needed"
            return [Finding("ok", "tokens", what)]
        return [
            Finding("ok", "tokens", f"{' or '.join(names)} is set, {why}")
            if any(os.environ.get(name) for name in names)
            else Finding("note", "tokens", f"{' or '.join(names)} is not set, {why}", remedy)
            for names, why, remedy in dict.fromkeys(wanted)
        ]

    def _wanted(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """(variables of which one is enough, what for, what to do)."""
        from components.evaluation.known_sets import KNOWN
        from components.tracking.address import shown

        if self.config is None:
            return
        gated = {one.hub for one in KNOWN.values() if one.gated}
        for chosen in self.config.evaluation.sets:
            if chosen.hub is not None and chosen.hub in gated:
                remedy = "accept its terms there and set HF_TOKEN to a token that may read it"
                yield ("HF_TOKEN",), f"for the gated set {chosen.hub}", remedy
        for api in self._apis():
            if api.key_from is not None:
                yield (api.key_from,), f"for the judge at {api.url}", f"set {api.key_from} to the key"
        uri = self._uri
        if uri is not None and uri.startswith("https://"):
            variables = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
            yield (
                variables,
                f"for {shown(uri)}",
                "set one of them (and MLFLOW_TRACKING_USERNAME) if the server asks who you are",
            )

    def judges(self) -> list[Finding]:
        """One small request to every judge that is asked over HTTP."""
        from components.evaluation.judges.apis import require_apis

        served = [api.url for api in self._apis()]
        if self.config is None or not served:
            return []
        require_apis(self.config.evaluation.judge)
        return [Finding("ok", "judges", f"{', '.join(dict.fromkeys(served))} answer as judges")]

    def _apis(self) -> Iterator[ApiSettings]:
        from components.evaluation.judges.settings import GuardSettings, RubricSettings, judges_in

        for one in judges_in(self.config.evaluation.judge) if self.config is not None else ():
            api = one.api if isinstance(one, GuardSettings) else one if isinstance(one, RubricSettings) else None
            if api is not None:
                yield api

    @property
    def _uri(self) -> str | None:
        from components.tracking import told_by_environment

        return self.uri or (self.config.tracking.uri if self.config is not None else None) or told_by_environment()
