"""What processes ask a cluster for, and what its groups hold."""

from __future__ import annotations

from typing import Any

from components.evaluation.execution import EvaluationExecution
from k8s.check.documents import RayCluster
from k8s.check.room import asked, nodes_of
from pipelines.config import RunConfig
from pipelines.landscape_section import LandscapeSection
from pipelines.sections import EvaluationSection, ExecutionSection
from ray_jobs.actors import resources_of


def _asked(command: str = "run", **execution: Any) -> dict[str, Any]:
    """Section of `execution` -> what each of its processes asks for."""
    evaluation = EvaluationSection.model_construct(sets=())
    config = RunConfig.model_construct(
        landscape=LandscapeSection.model_construct(), evaluation=evaluation, execution=ExecutionSection(**execution)
    )
    return {ask.section.removeprefix("execution."): (ask.count, dict(ask.each)) for ask in asked(config, command, 2)}


def test_processes_ask_for_what_actors_ask_ray_for(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "of a cluster")
    for how in (
        EvaluationExecution(actors=3),
        EvaluationExecution(device="cuda", devices=4, resource="own"),
        EvaluationExecution(actors=2, devices=4, resource="own"),
    ):
        said = {key: much for key, much in resources_of(how, 2).request.items() if much}
        section = how.model_dump()
        found = _asked("sweep", evaluation=section, landscape=section, sweep=section)
        assert found == dict.fromkeys(("evaluation", "landscape", "sweep"), (how.actors, said))
        assert "sweep" not in _asked("run", sweep=section)


def test_what_a_stage_does_by_itself_asks_for_no_more_than_it_has() -> None:
    assert _asked(mask={"resource": "own"}, evaluation={"resource": "own"}) == {}
    assert _asked(mask={"device": "cuda"}) == {"mask": (1, {"CPU": 2, "GPU": 1})}
    assert _asked(mask={"ranks": 3, "resource": "own"}) == {"mask": (3, {"CPU": 2, "own": 1})}


def test_a_cluster_holds_what_its_nodes_hold_one_by_one() -> None:
    def group(name: str, most: int, cpu: str, hosts: int = 1) -> dict[str, Any]:
        container = {"resources": {"limits": {"cpu": cpu}}}
        template = {"spec": {"containers": [container]}}
        return {"groupName": name, "maxReplicas": most, "numOfHosts": hosts, "template": template}

    spec = {"headGroupSpec": {"rayStartParams": {"num-cpus": "5"}}}
    spec["workerGroupSpecs"] = [group("small", 4, "2500m", 2), group("none", 0, "64"), group("large", 1, "8")]
    there = list(nodes_of(RayCluster({"kind": "RayCluster", "metadata": {"name": "c"}}, "spec", spec)))
    assert [(one.most, one.holds({"CPU": 2})) for one in there] == [(1, 2), (8, 1), (0, 32), (1, 4)]
    assert [one.holds({"CPU": 1, "GPU": 1}) for one in there] == [0] * 4
