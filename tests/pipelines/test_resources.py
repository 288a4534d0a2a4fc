"""`realign plan` on headers of a 7B and a 70B Llama: what it counts, what it proposes, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from components.checkpoints.adapters import LoraSource
from components.errors import ConfigError
from components.evaluation.judges.settings import ClassifierSettings
from components.limits import available_memory
from components.masks.memory import PROCESS_HOST
from components.masks.zero import MaskExecution
from pipelines.config import RunConfig, load_config
from pipelines.graph import STEPS
from pipelines.inputs import open_models, trainings
from pipelines.machine import GIB, Cluster, Rates, described, measure
from pipelines.needs import NEEDS
from pipelines.placement import Proposal, cost, need, propose, require_fit, side_by_side
from pipelines.plan_text import plan_json, plan_lines
from pipelines.resources import Plan, plan
from pipelines.sections import ExecutionSection
from tests.pipelines.headers import PARAMETERS, SHAPES, hollow_config, hollow_factors, hollow_llama, llama_specs
from tests.pipelines.small import small_config, write_config

RATES = Rates(flops=1e10, bytes=1e10, hashed=1e9, mask_seconds=1e-8)
NODE = Cluster(cpus=16, memory=1000 * GIB, disk=4000 * GIB, gpus=8, gpu_memory=80 * GIB)
CUDA: dict[str, Any] = {"ranks": 8, "device": "cuda"}


def loaded(root: Path, size: str = "7b", *, mask: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    settings = {"settings": {"dtype": "bfloat16"}}
    return load_config(hollow_config(root, size, mask=settings, execution={"mask": mask or CUDA}, **options))


def planned(config: RunConfig, cluster: Cluster = NODE, rates: Rates = RATES) -> Plan:
    return plan(config, open_models(config), cluster, rates)


def proposal(config: RunConfig, cluster: Cluster) -> Proposal | None:
    found = list(trainings(config, open_models(config), tokenize=True).values())
    return propose(found, config.execution.mask, cluster, threads=1)


def stage(found: Plan, name: str) -> Any:
    return next(one for one in found.stages if one.id == name)


@pytest.mark.parametrize("size", ["7b", "70b"])
def test_headers_alone_tell_the_size_of_a_model(tmp_path: Path, size: str) -> None:
    config = loaded(tmp_path, size)
    assert sum(spec.numel for spec in llama_specs(SHAPES[size]).values()) == PARAMETERS[size]
    found = planned(config)
    parameters = PARAMETERS[size]
    assert stage(found, "f0/fuse_soft").disk == 2 * parameters  # bf16 and bf16 give bf16
    train = stage(found, "f0/train_mask")
    assert train.disk == 2 * parameters
    assert train.scratch == 24 * parameters  # logits and two moments in fp32, twice
    kept = {item.what: item.nbytes for item in found.memory["f0/train_mask"].items}
    assert kept["logits"] == 4 * parameters // 8
    assert kept["Adam's moments"] == 8 * parameters // 8
    assert kept["fused weights, this rank's"] == 2 * parameters // 8
    assert kept["stored models, as stored"] == 4 * parameters // 8
    assert found.disk == 3 * 2 * parameters  # the mask and two fused models
    assert stage(found, "evaluate_aligned").host > 4 * parameters


def test_time_is_operations_over_speed(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert stage(planned(config), "f0/train_mask").seconds is None  # nobody said how fast the GPUs are
    fast, slow = (
        stage(planned(config, rates=RATES.model_copy(update={"gpu_flops": speed})), "f0/train_mask").seconds
        for speed in (4e14, 1e14)
    )
    assert slow == pytest.approx(4 * fast)
    # 384 + 720 bytes are 128 + 240 tokens and a template; 16 pairs and 16 anchors a step, 240 steps, six operations.
    tokens = 2 * 16 * (16 + 128 + 16 + 240) + 16 * (16 + 128 + 48)
    assert fast > 6 * PARAMETERS["7b"] * 240 * tokens / (8 * 4e14)
    assert fast < 2 * 6 * PARAMETERS["7b"] * 240 * tokens / (8 * 4e14)


def test_what_is_configured_is_judged_and_the_shortfall_told(tmp_path: Path) -> None:
    small = NODE.model_copy(update={"gpu_memory": 16 * GIB})
    found = planned(loaded(tmp_path), small)
    [problem] = [p for p in found.problems if p.startswith("train_mask")]
    needed = found.memory["f0/train_mask"].peak("device")
    assert needed > 16 * GIB
    assert f"{needed / GIB:.1f} GiB of GPU memory, 16.0 GiB free, {needed / GIB - 16:.1f} GiB too little" in problem
    assert planned(load_config(tmp_path / "realign.yaml"), NODE).problems == []


def test_the_least_costly_proposal_grows_dearer_as_memory_shrinks(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    costs, ways = [], []
    for gpu_memory in (200, 80, 40, 24, 16, 10):
        cluster = NODE.model_copy(update={"gpu_memory": gpu_memory * GIB})
        found = proposal(config, cluster)
        assert found is not None, gpu_memory
        assert found.need.device <= gpu_memory * GIB
        assert found.need.host <= NODE.memory
        costs.append(cost(found.execution))
        ways.append(found.execution)
    assert costs == sorted(costs)
    assert len(set(costs)) > 3
    # With room for all of it, the fewest GPUs and nothing dear; at the end everything that saves memory.
    first, last = ways[0], ways[-1]
    assert (first.ranks, first.stage, first.offload, first.activation_checkpointing) == (1, 1, "none", False)
    assert last.stage == 3
    assert last.offload != "none"
    assert proposal(config, NODE.model_copy(update={"gpu_memory": GIB, "memory": 10 * GIB})) is None


def test_seventy_billion_need_more_than_one_node_or_its_host(tmp_path: Path) -> None:
    config = loaded(tmp_path, "70b")
    four = NODE.model_copy(update={"nodes": 4, "memory": 500 * GIB})
    one = proposal(config, NODE.model_copy(update={"memory": 2000 * GIB}))
    both = proposal(config, four)
    assert one is not None
    assert one.execution.offload == "cpu"
    assert both is not None
    assert (both.execution.ranks, both.execution.offload) == (32, "none")
    assert both.need.host <= 500 * GIB
    poor = NODE.model_copy(update={"memory": 100 * GIB, "disk": 50 * GIB})
    assert proposal(config, poor) is None
    found = planned(config, poor)
    assert any("no execution.mask fits" in note for note in found.notes)
    assert any(p.startswith("disk: ") for p in found.problems)
    assert any(p.startswith("evaluate_aligned: ") and "fp32" in p for p in found.problems)


def test_cost_prefers_what_slows_a_step_least() -> None:
    ways = [
        MaskExecution(ranks=2, stage=1),
        MaskExecution(ranks=2, stage=2),
        MaskExecution(ranks=2, stage=3),
        MaskExecution(ranks=2, stage=3, activation_checkpointing=True),
        MaskExecution(ranks=2, stage=3, offload="cpu", device="cuda"),
        MaskExecution(ranks=2, stage=3, offload="cpu", offload_weights="cpu", device="cuda"),
        MaskExecution(ranks=2, stage=3, offload="nvme"),
        MaskExecution(ranks=2, stage=3, offload="nvme", offload_weights="nvme"),
    ]
    costs = [cost(way) for way in ways]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)


def test_finetunes_run_side_by_side_as_the_driver_has_them(tmp_path: Path) -> None:
    config = loaded(tmp_path, finetunes=3, mask={"ranks": 1})
    wide = Cluster(cpus=2, memory=10_000 * GIB, disk=10_000 * GIB)
    found = planned(config, wide)
    train, evaluate = stage(found, "f0/train_mask"), stage(found, "f0/evaluate_soft")
    assert found.host == pytest.approx(max(2 * train.host, 2 * evaluate.host, train.host + evaluate.host))
    assert planned(config, wide.model_copy(update={"cpus": 3})).host == pytest.approx(3 * train.host)
    ranks = MaskExecution(ranks=4)
    assert [side_by_side(ranks, wide.model_copy(update={"cpus": n}), threads=2, trainings=3) for n in (7, 8, 16, 99)] \
        == [0, 1, 2, 3]  # fmt: skip
    gpus = MaskExecution(ranks=4, device="cuda")
    assert side_by_side(gpus, NODE, threads=1, trainings=3) == 2
    one = trainings(config, open_models(config), tokenize=True)["f0/train_mask"]
    assert need(one, ranks, wide, 2).host == 8 * one.memory(ranks).peak("host")
    assert need(one, ranks, wide.model_copy(update={"nodes": 4}), 2).host == 2 * one.memory(ranks).peak("host")


def test_fewer_side_by_side_are_proposed_where_memory_is_short(tmp_path: Path) -> None:
    config = loaded(tmp_path, finetunes=2, mask={"ranks": 1})
    tasks = list(trainings(config, open_models(config), tokenize=True).values())
    alone = tasks[0].memory(MaskExecution()).peak("host")
    cluster = Cluster(cpus=2, memory=int(1.2 * alone), disk=0)
    found = propose(tasks, config.execution.mask, cluster.model_copy(update={"disk": 10_000 * GIB}), threads=1)
    assert found is not None
    assert found.need.host <= cluster.memory
    two = need(tasks[0], config.execution.mask, cluster, 2).over()
    assert [what for what, _, _ in two] == ["host memory", "disk"]
    with pytest.raises(ConfigError) as caught:
        require_fit(tasks, config.execution, cluster)
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert "side by side" in told
    assert f"{2 * alone / GIB:.1f} GiB of host memory" in told
    assert require_fit(tasks, config.execution, cluster, refuse=False) is False


def test_offload_files_are_held_against_the_disk_that_they_go_to(tmp_path: Path) -> None:
    config = loaded(tmp_path, mask={"ranks": 2, "stage": 3, "offload": "nvme"})
    task = trainings(config, open_models(config), tokenize=True)["f0/train_mask"]
    cluster = Cluster(cpus=2, memory=10_000 * GIB, disk=200 * GIB)
    files, state = 12 * PARAMETERS["7b"], 24 * PARAMETERS["7b"]
    together = need(task, config.execution.mask, cluster, 1)
    assert together.over() == [("disk", files + state, 200 * GIB)]
    apart = need(task, config.execution.mask, cluster.model_copy(update={"offload_disk": 70 * GIB}), 1)
    assert apart.over() == [("disk at execution.mask.offload_dir", files, 70 * GIB)]
    assert apart.over_memory() == []


def test_a_merge_and_an_adapter_are_computed_when_they_are_read(tmp_path: Path) -> None:
    config = loaded(
        tmp_path / "merge", finetunes=2, mask={"ranks": 1},
        mode="merge", merges=[{"name": "both", "method": "average"}],
    )  # fmt: skip
    [(node, task)] = trainings(config, open_models(config), tokenize=True).items()
    assert node == "both/train_mask"
    kept = {item.what: item.nbytes for item in task.memory(config.execution.mask).items}
    assert kept["finetune, computed when read"] == 4 * PARAMETERS["7b"]
    small = load_config(write_config(tmp_path, small_config(tmp_path, finetunes=("zh", "hi"))))
    models = open_models(small)
    found = trainings(small, models, tokenize=True)
    assert all(w.finetuned.mapped for w in found["zh/train_mask"].weights)
    adapter = models.finetunes["hi"].checkpoint.source
    assert isinstance(adapter, LoraSource)
    computed = {w.name for w in found["hi/train_mask"].weights if not w.finetuned.mapped}
    assert computed == set(adapter.adapted()) != set()


def test_models_of_adapters_count_the_base_that_they_answer_with(tmp_path: Path) -> None:
    path, factors = hollow_factors(tmp_path, "7b", ("q_proj", "o_proj"))
    found = planned(load_config(path))
    parameters = PARAMETERS["7b"]
    for name in ("evaluate_aligned", "f0/evaluate_before", "f0/evaluate_soft"):
        assert stage(found, name).host > PROCESS_HOST + 4 * (parameters + factors)
        # Reading the weights once for each of at least one answer's tokens.
        assert stage(found, name).seconds > 4 * parameters / RATES.bytes
    for name in ("load_aligned", "f0/load"):
        stored = 2 * parameters + 4 * factors
        assert stage(found, name).seconds == pytest.approx(stored / RATES.hashed + 2 * stored / RATES.bytes)
    assert stage(found, "f0/fuse_soft").disk == 4 * factors  # adapters come out


def test_a_finetune_that_lacks_tensors_is_told_whatever_it_is_for(tmp_path: Path) -> None:
    short = {**SHAPES["small"], "num_hidden_layers": 1}
    finetunes = [{"name": f"f{i}", "path": f"finetune-{i}", "anchor": "prompts.jsonl"} for i in range(2)]
    for kind in ("lent", "merge"):
        root = tmp_path / kind
        merging = {"mode": "merge", "merges": [{"name": "both", "method": "average"}]} if kind == "merge" else {}
        path = hollow_config(root, "small", finetunes=2, **merging)
        shutil.rmtree(root / "finetune-1")
        hollow_llama(root / "finetune-1", short)
        if kind == "lent":
            changed = yaml.safe_load(path.read_text())
            changed["finetunes"] = [{**finetunes[0], "mask_of": "f1"}, finetunes[1]]
            path.write_text(yaml.safe_dump(changed))
        found = planned(load_config(path))
        [problem] = [p for p in found.problems if p.startswith("f1: ")]
        assert "(9 differences): tensor model.layers.1.input_layernorm.weight is missing" in problem
        assert found.memory == {}
        # What needs the mask is not planned either; what it is measured against is.
        assert {one.id for one in found.stages if one.id.startswith("f0/")} == {
            "f0/load", "f0/extract_delta", "f0/evaluate_before"
        }  # fmt: skip


def test_messages_say_which_of_a_finetunes_masks_they_mean(tmp_path: Path) -> None:
    config = loaded(tmp_path, fusion={"controls": ["paper"]})
    tasks = trainings(config, open_models(config), tokenize=True)
    assert {node: task.label for node, task in tasks.items()} == {
        "f0/train_mask": "f0", "f0/train_mask_paper": "the control paper of f0"
    }  # fmt: skip
    less = NODE.model_copy(update={"gpu_memory": 8 * GIB})
    for task in tasks.values():
        with pytest.raises(ConfigError, match=f"mask training of {task.label} does not fit"):
            require_fit([task], config.execution, less)
    [problem] = [p for p in planned(config, less).problems if p.startswith("train_mask of ")]
    assert problem.startswith(
        ("train_mask of f0 (and 1 more): ", "train_mask of the control paper of f0 (and 1 more): ")
    )


def test_gpus_that_are_described_are_proposed(tmp_path: Path) -> None:
    config = loaded(tmp_path, mask={"ranks": 1})
    on_cpu = planned(config)
    assert on_cpu.proposal is not None
    on_gpus = proposal(loaded(tmp_path / "cuda", mask=CUDA), NODE)
    assert on_gpus is not None
    assert on_gpus.execution.device == "cuda"
    assert on_cpu.proposal.execution == on_gpus.execution
    assert "device: cuda" in "\n".join(plan_lines(on_cpu, config))
    alone = proposal(loaded(tmp_path / "alone", mask={"ranks": 1}), NODE.model_copy(update={"gpus": 1}))
    assert alone is not None
    assert (alone.execution.device, alone.execution.ranks) == ("cuda", 1)
    # Where no GPU is large enough the CPUs are.
    cluster = NODE.model_copy(update={"gpu_memory": GIB})
    for mask in ({"ranks": 1}, {**CUDA, "stage": 3, "offload": "cpu"}):
        found = proposal(loaded(tmp_path / str(len(mask)), mask=mask), cluster)
        assert found is not None
        chosen = MaskExecution(**found.execution.model_dump())  # which a config may say
        assert (chosen.device, chosen.ranks, found.need.device) == ("cpu", 1, 0)
        assert found.need.host <= cluster.memory


def test_ranks_on_gpus_are_proposed_with_the_cpus_that_they_need(tmp_path: Path) -> None:
    config = loaded(tmp_path, mask={"ranks": 1})
    few = NODE.model_copy(update={"cpus": 2})
    as_it_is = proposal(config, few)
    assert as_it_is is not None
    assert (as_it_is.execution.device, as_it_is.execution.ranks, as_it_is.workers) == ("cuda", 2, None)
    more = proposal(config, few.model_copy(update={"cpus": 1}))
    assert more is not None
    assert more.execution.device == "cuda"
    assert (more.execution.ranks, more.workers) == (1, None)
    assert side_by_side(more.execution, few.model_copy(update={"cpus": 1}), threads=1, trainings=1) == 1
    assert side_by_side(as_it_is.execution, few.model_copy(update={"cpus": 1}), threads=1, trainings=1) == 0


def test_an_exported_adapter_is_planned(tmp_path: Path) -> None:
    """Rank 3 of the family's LoRA finetune, counted from its own file's shapes."""
    config = load_config(write_config(tmp_path, small_config(tmp_path, finetunes=("hi",))))
    exported = stage(planned(config), "hi/export_adapter")
    with safe_open(str(config.finetunes[0].path / "adapter_model.safetensors"), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    assert min(min(shape) for shape in shapes.values()) >= 3
    assert exported.disk == 4 * 3 * sum(max(shape) for shape in shapes.values())
    modules = {name.rsplit(".lora_", 1)[0] for name in shapes}
    largest = max(shapes[f"{m}.lora_A.weight"][1] * shapes[f"{m}.lora_B.weight"][0] for m in modules)
    assert exported.host == PROCESS_HOST + exported.disk + 6 * 4 * largest


def test_a_landscape_is_every_point_of_its_grids(tmp_path: Path) -> None:
    plane = {"name": "plane", "axes": [{"kind": "random"}, {"kind": "random"}], "points": 4, "refine": 2}
    landscape = {"limit": 1, "models": ["aligned"], "scans": [{"directions": 2, "points": 5}, plane]}
    execution = {"mask": CUDA, "landscape": {"actors": 2}}
    mask = {"settings": {"dtype": "bfloat16"}}
    config = load_config(hollow_config(tmp_path, "7b", mask=mask, execution=execution, landscape=landscape))
    found = planned(config)
    drawn, evaluated = stage(found, "landscape_aligned"), stage(found, "evaluate_aligned")
    parameters = PARAMETERS["7b"]
    answered = evaluated.seconds - 2 * 4 * parameters / RATES.bytes  # the same prompt; less the loading
    assert drawn.seconds == pytest.approx((2 * 5 + 4 * 4) * (answered + 32 * parameters / RATES.bytes) / 2)
    assert drawn.host == 2 * (evaluated.host + 4 * parameters)  # two actors, each with the model twice
    assert drawn.cpus == 2
    settings = ClassifierSettings(kind="classifier", model=str(tmp_path / "guard"), labels={"a": "complied"})
    hollow_llama(tmp_path / "guard", SHAPES["7b"])
    judged = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"judge": settings})})
    assert stage(planned(judged), "landscape_aligned").host == drawn.host + 2 * 4 * parameters  # each loads its own


def test_every_stage_of_the_graph_is_estimated() -> None:
    assert set(NEEDS) == {step.stage for step in STEPS if step.kind == "stage"}


def test_a_refusal_says_what_would_fit(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    tasks = list(trainings(config, open_models(config), tokenize=True).values())
    needed = tasks[0].memory(config.execution.mask).peak("device")
    barely = NODE.model_copy(update={"gpu_memory": int(needed / 1.4)})
    assert require_fit(tasks, config.execution, barely)  # within what an estimate may be wrong by
    with pytest.raises(ConfigError) as caught:
        require_fit(tasks, config.execution, NODE.model_copy(update={"gpu_memory": int(needed / 1.6)}))
    told = str(caught.value)
    assert f"{needed / GIB:.1f} GiB of GPU memory and {needed / 1.6 / GIB:.1f} GiB are free" in told
    assert "this would fit: execution: {mask: {" in told


def test_ranks_that_would_wait_for_ever_are_refused(tmp_path: Path) -> None:
    config = loaded(tmp_path, mask={"ranks": 4})
    tasks = list(trainings(config, open_models(config), tokenize=True).values())
    wide = Cluster(cpus=2, memory=10_000 * GIB, disk=10_000 * GIB)
    with pytest.raises(ConfigError, match=r"4 ranks of 1 threads need 4 CPUs, and there are 2: .* execution\.workers"):
        require_fit(tasks, config.execution, wide)


def test_a_broken_finetune_is_told_and_stops_no_other(tmp_path: Path) -> None:
    config = loaded(tmp_path, finetunes=2)
    (tmp_path / "finetune-1/config.json").unlink()
    found = planned(config)
    assert any(p.startswith("f1: ") and "config.json" in p for p in found.problems)
    assert "f0/train_mask" in found.memory
    assert not any(one.id.startswith("f1/") for one in found.stages)


def test_json_and_table_say_the_same(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    small = NODE.model_copy(update={"gpu_memory": 16 * GIB})
    found = planned(config, small)
    told = json.loads(plan_json(found, config))
    assert told["fits"] is False
    assert told["cluster"]["gpu_memory"] == 16 * GIB
    by_id = {one["id"]: one for one in told["stages"]}
    assert by_id["f0/train_mask"]["device"] == found.memory["f0/train_mask"].peak("device")
    assert sum(i["nbytes"] for i in told["ranks"]["f0/train_mask"] if i["what"] == "logits") == PARAMETERS["7b"] // 2
    merged = {**config.execution.mask.model_dump(), **told["proposal"]["execution"]["mask"]}
    assert MaskExecution(**merged).model_dump(mode="json") == told["proposal"]["mask"]
    lines = list(plan_lines(found, config))
    assert any(line.startswith("DOES NOT FIT  train_mask of f0") for line in lines)
    assert any(line.startswith("least costly that fits: execution: {mask: {") for line in lines)
    assert all(len(line) < 200 for line in lines)


def test_this_machine_is_what_is_not_told(tmp_path: Path) -> None:
    here = described(tmp_path / "not/there", ExecutionSection(), {})
    assert 0 < here.memory <= available_memory() * 1.5
    assert here.disk > 0
    told = described(
        tmp_path, ExecutionSection(workers=3), {"memory": 2.5, "disk": None, "gpus": 2, "gpu_memory": 16.0, "nodes": 4}
    )
    assert (told.memory, told.gpus, told.gpu_memory, told.nodes, told.cpus) == (int(2.5 * GIB), 2, 16 * GIB, 4, 3)
    with pytest.raises(ConfigError, match="--gpu-memory"):
        described(tmp_path, ExecutionSection(), {"gpus": 8, "gpu_memory": 0})


def test_speeds_are_measured_on_this_machine() -> None:
    rates = measure(gpu_flops=1e14)
    assert 1e8 < rates.flops < 1e13
    assert 1e8 < rates.bytes < 1e12
    assert 1e7 < rates.hashed < 1e11
    assert 1e-10 < rates.mask_seconds < 1e-5
    assert rates.gpu_flops == 1e14


@pytest.mark.multiproc
def test_the_command_answers_with_a_table_writes_nothing_and_exits_2_where_it_does_not_fit(tmp_path: Path) -> None:
    loaded(tmp_path / "run")
    before = sorted(p for p in tmp_path.rglob("*"))
    command = [sys.executable, "-m", "pipelines.cli", "plan", str(tmp_path / "run/realign.yaml")]
    command += ["--workspace", str(tmp_path / "workspace"), "--gpus", "8", "--memory", "1000", "--disk", "5000"]
    fits = subprocess.run(
        [*command, "--gpu-memory", "80", "--tflops", "300"], capture_output=True, text=True, check=False
    )
    assert fits.returncode == 0, fits.stderr + fits.stdout
    assert "f0/train_mask, one rank's GPU memory" in fits.stdout
    small = subprocess.run([*command, "--gpu-memory", "20", "--json"], capture_output=True, text=True, check=False)
    assert small.returncode == 2
    assert json.loads(small.stdout)["fits"] is False
    assert sorted(p for p in tmp_path.rglob("*")) == before
    weights = tmp_path / "run/aligned/model.safetensors"
    assert weights.stat().st_size > 2 * PARAMETERS["7b"] > 1000 * 512 * weights.stat().st_blocks
