"""Runs: settings, folders, and going on after an interruption with the same numbers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torch import nn

from lifelong import runs
from lifelong.augment import AUGMENTATIONS
from lifelong.benchmarks import (
    BENCHMARKS,
    benchmark,
    learner_options,
    make_optimizer,
    make_scheduler,
)
from lifelong.budget import Bytes, parse
from lifelong.config import (
    BenchmarkName,
    Experiment,
    Output,
    Overrides,
    PresetName,
    RunConfig,
    Training,
    UsageError,
    flags_of,
)
from lifelong.errors import CheckpointError
from lifelong.learner import CHECKPOINT, Progress
from lifelong.presets import PRESETS


def tiny(**changes: Any) -> RunConfig:
    """Two moons, two epochs: a second or less."""
    known = {f.name for f in fields(Experiment)}
    experiment = Experiment(benchmark="two-moons", prior="finetune")
    experiment = replace(experiment, **{k: v for k, v in changes.items() if k in known})
    training = Overrides(epochs=2, batch_size=100)
    training = replace(training, **{k: v for k, v in changes.items() if k not in known})
    return RunConfig(experiment, training)


def run(folder: Path, config: RunConfig) -> dict[str, Any]:
    plan = runs.prepare(config)
    runs.create(plan, folder)
    return runs.execute(plan, folder)


# Settings -----------------------------------------------------------------------------------------


def test_flags_offer_exactly_what_there_is() -> None:
    assert get_args(PresetName) == tuple(PRESETS)
    assert get_args(BenchmarkName) == tuple(BENCHMARKS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan(name: Any) -> None:
    plan = runs.prepare(tiny(prior=name))
    assert plan.make_prior().recipe.name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": ("strngth=10",), "prior": "ewc"}, "did you mean 'strength'"),
        ({"set": ("strength=ten",), "prior": "ewc"}, "expected a number or auto, got 'ten'"),
        ({"set": ("strength=true",), "prior": "ewc"}, "expected a number or auto, got True"),
        ({"set": ("online=1",), "prior": "ewc"}, "expected true or false"),
        ({"set": ("estimator=fast",), "prior": "ewc"}, "expected exact or mc or empirical"),
        ({"set": ("score=lamda",), "prior": "fromp"}, "expected one of lambda"),
        ({"set": ("strength=-1",), "prior": "ewc"}, "not negative"),
        ({"set": ("discount=0.5",), "prior": "ewc"}, "online"),
        ({"set": ("memory=3",), "memory": 4, "prior": "fromp"}, "not both"),
        ({"set": ("strength",)}, "NAME=VALUE"),
        ({"set": ("strength=[",), "prior": "ewc"}, "is not a value"),
        ({"set": ("strength=1",)}, "there is nothing to set"),
        ({"memory": 4}, "keeps no chosen examples"),
        ({"memory": 100_000, "prior": "fromp"}, "more than task"),
        ({"memory": 0}, "at least 1 example"),
        ({"scenario": "class"}, "offers domain"),
        ({"benchmark": "split-mnist"}, "--data DIR"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"min_steps": -1}, "min_steps must be at least 0"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"momentum": 1.0}, "momentum must lie in"),
    ],
)
def test_wrong_settings_say_what_is_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        runs.prepare(tiny(**changes))


def test_defaults_then_benchmark_then_flags_then_set() -> None:
    def arguments(**changes: Any) -> Any:
        config = tiny(benchmark="fromp-toy", prior="fromp", **changes)
        return runs.prepare(config).arguments

    assert arguments() == {
        "strength": 4000,
        "prior_precision": 1e-4,
        "jitter": 1e-3,
        "memory": 20,
    }
    assert arguments(memory=6)["memory"] == 6
    assert arguments(set=("strength=2", "strength=3"))["strength"] == 3


def test_separate_networks_count_as_memory() -> None:
    plan = runs.prepare(tiny(prior="separate"))
    summary = runs.execute(plan)
    network = plan.benchmark.make_model(plan.stream.num_outputs)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    assert summary["memory_bytes"] == len(plan.stream) * size


def test_memory_takes_bytes_and_a_fidelity(tmp_path: Path) -> None:
    def arguments(**changes: Any) -> Any:
        return runs.prepare(tiny(**changes)).arguments["memory"]

    assert arguments(prior="kprior", memory="20MB") == "20MB"
    assert arguments(prior="kprior", memory="fidelity:0.9") == "fidelity:0.9"
    assert parse(arguments(prior="der", memory="1kB")) == Bytes(2000)  # of two tasks
    with pytest.raises(UsageError, match="a fidelity is of one task's"):
        arguments(prior="der", memory="fidelity:0.9")
    with pytest.raises(UsageError, match="'much' is no budget"):
        tiny(memory="much")
    config = tiny(prior="kprior", memory="fidelity:0.5")
    summary = run(tmp_path / "x", config)
    assert runs.load_config(tmp_path / "x") == config
    assert 0 < summary["memory_examples"] < 400


def test_one_memory_for_all_tasks_gets_the_same_budget() -> None:
    assert runs.prepare(tiny(prior="der", memory=7)).arguments["memory"] == 14
    each = runs.prepare(tiny(prior="der", memory=7, set=("total=false",)))
    assert each.arguments["memory"] == 7
    assert runs.prepare(tiny(prior="kprior", memory=7)).arguments["memory"] == 7


def test_published_fromp_settings_are_converted() -> None:
    """strength = tau N and clip = tau clip_published: the same loss, times tau."""
    split, shuffled = (
        BENCHMARKS[name].settings("fromp") for name in ("split-mnist", "permuted-mnist")
    )
    assert (split.prior["strength"], split.training.clip) == (10 * 12_000, 10 * 0.1)
    assert shuffled.prior["strength"] == 0.5 * 60_000
    assert shuffled.training.clip == pytest.approx(0.5 * 0.01)


def test_training_flags_override_and_inf_unclips() -> None:
    base = Training(epochs=5, clip=0.1, momentum=0.5)
    assert tiny().applied(base) == replace(base, epochs=2, batch_size=100)
    assert tiny(clip=float("inf")).applied(base).clip is None
    assert tiny(autocast=True).applied(base).autocast
    changed = tiny(augment="shift", min_steps=7).applied(base)
    assert (changed.augment, changed.min_steps) == ("shift", 7)
    options = learner_options(changed)
    assert (options["augment"], options["min_steps"]) == (AUGMENTATIONS["shift"], 7)
    assert learner_options(base)["augment"] is None


@pytest.mark.parametrize("prior", ["finetune", "joint"])
def test_small_tasks_get_more_epochs(tmp_path: Path, prior: Any) -> None:
    """The plan knows how many; joint has the past beside each task."""
    plan = runs.prepare(tiny(prior=prior, epochs=1, batch_size=100, min_steps=25))
    first, second = (len(task) for task in plan.stream)
    assert (first, second) == (489, 511)  # in batches of 100: 5 and 6 steps, 10 together
    assert plan.epochs == ((5, 5) if prior == "finetune" else (5, 3))
    seen: list[Progress] = []
    runs.execute(plan, watch=lambda event: seen.append(event.progress))
    assert {p.task: p.epochs for p in seen} == dict(enumerate(plan.epochs))
    assert len({(p.task, p.epoch) for p in seen}) == plan.steps


@pytest.mark.parametrize("schedule", ["constant", "one-cycle", "cosine"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_optimizers_and_schedules(optimizer: Any, schedule: Any) -> None:
    training = Training(lr=0.5, optimizer=optimizer, schedule=schedule)
    made = make_optimizer(training)(nn.Linear(1, 1).parameters())
    scheduler = make_scheduler(training)
    assert isinstance(made, {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer])
    if schedule == "constant":
        assert scheduler is None
        return
    assert scheduler is not None
    rates, steps = [], scheduler(made, 10)
    for _ in range(10):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        steps.step() if len(rates) < 10 else None
    assert max(rates) == pytest.approx(0.5, rel=0.05)
    assert rates[-1] < 0.05


def test_an_unknown_benchmark_has_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'split-mnist'"):
        benchmark("split-minst")


def test_split_cifar_t_is_cifar_and_the_first_fifty_tiny_classes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name: str, labels: range, side: int) -> None:
        cells = []
        for label in labels:
            buffer = io.BytesIO()
            Image.new("RGB", (side, side), (label, 0, 0)).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        parquet.write_table(
            pa.table({"image": cells, "label": list(labels)}), tmp_path / f"{name}.parquet"
        )

    for split, part in (("train", "train-part0"), ("test", "val")):
        write(f"cifar10_jpegq75-{split}", range(10), 32)
        write(f"tiny_imagenet-{part}", range(53), 64)
    stream = benchmark("split-cifar-t").make_stream(tmp_path, "task")
    assert stream.num_outputs == 60
    for index, task in enumerate(stream):
        assert task.head == tuple(range(10 * index, 10 * index + 10))
        for data in (task.train, task.test):
            assert data is not None
            x = torch.as_tensor(data.inputs)
            assert (x.shape, x.dtype) == ((10, 3, 32, 32), torch.uint8)
            red = data.labels - (10 if index else 0)  # a colour for each class of its file
            assert torch.equal(x[:, 0, 7, 9].long(), red)


def test_split_tiny_imagenet_deals_classes_in_the_order_of_its_list(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from noise import images

    def write(part: str) -> None:
        path = tmp_path / f"tiny_imagenet-{part}.parquet"
        images(path, (64, 64, 3), classes=40, count=40, names=[f"n{i} a, b" for i in range(40)])

    write("train-part0")
    write("val")
    make = benchmark("split-tiny-imagenet").make_stream
    with pytest.raises(FileNotFoundError, match=r"no tiny_imagenet-wnids.txt in"):
        make(tmp_path, "task")
    listed = tmp_path / "tiny_imagenet-wnids.txt"
    order = [(7 * i + 3) % 40 for i in range(40)]
    listed.write_text("\n".join(f"n{i}" for i in order))
    stream = make(tmp_path, "task")
    assert [task.head for task in stream] == [tuple(order[:20]), tuple(order[20:])]
    for task in stream:
        assert task.test is not None
        assert task.head is not None
        x = torch.as_tensor(task.train.inputs)
        assert (x.shape, x.dtype) == ((20, 3, 64, 64), torch.uint8)
        assert set(task.train.labels.tolist()) == set(task.test.labels.tolist()) == set(task.head)
    listed.write_text("n1\nn2\n")
    with pytest.raises(ValueError, match="lists 2 classes and the images have the names of 40"):
        make(tmp_path, "task")


# Files --------------------------------------------------------------------------------------------


def test_config_round_trips_as_dict_and_as_toml(tmp_path: Path) -> None:
    config = tiny(
        prior="ewc",
        data=Path('a "quoted" folder'),
        set=("strength=2.5", "online=true", "estimator=mc"),
        lr=1e-4,
        clip=float("inf"),
    )
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again.to_dict() == config.to_dict()
    assert again.training == config.training
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    import tyro

    from lifelong.config import RunFlags

    flags = tyro.cli(RunFlags, args=flags_of(path))
    assert RunConfig(flags.experiment, flags.training).to_dict() == config.to_dict()
    assert flags.output == Output()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "did you mean 'epochs'"),
        ("epochs = ", "is not a TOML file"),
        ("json = 1", "must be true or false"),
        ("set = 3", "as a table"),
        ("seed = [1]", "cannot be"),
        ("resume = 'x'", "no setting 'resume'"),
    ],
)
def test_wrong_config_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        flags_of(path)
    with pytest.raises(UsageError, match="cannot read"):
        flags_of(tmp_path / "none.toml")


def test_the_folder_holds_everything(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "x"
    summary = run(folder, tiny(prior="fromp", memory=4, seeds=2, seed=5))
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        ".lock",
        "config.json",
        "config.toml",
        "log.txt",
        "result.json",
        *(f"seed-{s}/{name}" for s in (5, 6) for name in ("accuracy.json", CHECKPOINT)),
        "versions.json",
    ]
    assert json.loads((folder / "result.json").read_text()) == summary
    assert {"lifelong", "torch", "python", "numpy", "platform"} <= set(
        json.loads((folder / "versions.json").read_text())
    )
    log = (folder / "log.txt").read_text()
    assert log.count("task 2, accuracy so far") == 2
    assert runs.load_config(folder) == tiny(prior="fromp", memory=4, seeds=2, seed=5)
    accuracy = summary["accuracy"]
    assert accuracy["mean"] == pytest.approx(sum(accuracy["per_seed"]) / 2)
    assert accuracy["standard_error"] is not None
    assert summary["memory_examples"] == 8
    assert summary["memory_bytes"] > 0
    assert summary["seeds"] == [5, 6]
    for matrix, value in zip(summary["matrices"], accuracy["per_seed"], strict=True):
        assert matrix[0][1] is None
        assert sum(matrix[-1]) / 2 == pytest.approx(value)


def test_a_seed_does_not_depend_on_those_before_it(tmp_path: Path) -> None:
    both = run(tmp_path / "both", tiny(seeds=2))
    second = run(tmp_path / "second", tiny(seed=1))
    assert both["matrices"][1] == second["matrices"][0]
    assert both["matrices"][0] != both["matrices"][1]


@pytest.mark.parametrize("change", ["inputs", "labels", "size"])
def test_other_data_are_no_way_to_go_on(tmp_path: Path, change: str) -> None:
    config = tiny(seeds=2)
    run(tmp_path, config)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    plan = runs.prepare(config)
    task = plan.stream[1]
    data = task.train
    train = {
        "inputs": lambda: replace(data, inputs=data.inputs + 1),  # type: ignore[operator]
        "labels": lambda: replace(data, labels=data.labels.flip(0)),
        "size": lambda: data[:-1],
    }[change]()
    tasks = [*plan.stream]
    tasks[1] = replace(task, train=train)
    other = replace(plan, stream=replace(plan.stream, tasks=tuple(tasks)))
    with pytest.raises(UsageError, match="not those that the run in .* began with"):
        runs.execute(other, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert runs.execute(runs.prepare(config), tmp_path)["seeds"] == [0, 1]


def test_what_cannot_be_written_leaves_no_folder(tmp_path: Path) -> None:
    plan = replace(runs.prepare(tiny()), arguments={"strength": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        runs.create(plan, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_another_run_is_never_overwritten(tmp_path: Path) -> None:
    run(tmp_path / "x", tiny())
    before = {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"finetune on two-moons, 1 of 1 seeds done.*--resume"):
        run(tmp_path / "x", tiny(prior="ewc"))
    assert {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(tmp_path / "file", tiny())


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run in"):
        runs.load_config(tmp_path)
    run(tmp_path / "x", tiny())
    config = tmp_path / "x" / "config.json"
    whole = config.read_text()
    config.write_text(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        runs.load_config(tmp_path / "x")
    config.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(UsageError, match="newer"):
        runs.load_config(tmp_path / "x")
    config.write_text(whole)
    (tmp_path / "x" / "seed-0" / "accuracy.json").unlink()
    (tmp_path / "x" / "seed-0" / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        runs.execute(runs.prepare(tiny()), tmp_path / "x")


def test_versions_that_changed_are_named(tmp_path: Path) -> None:
    run(tmp_path / "x", tiny())
    assert runs.changed_versions(tmp_path / "x") == []
    path = tmp_path / "x" / "versions.json"
    path.write_text(path.read_text().replace(torch.__version__, "0.9"))
    assert runs.changed_versions(tmp_path / "x") == [f"torch 0.9 -> {torch.__version__}"]


# Interruptions ------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    pass


METHODS = ["finetune", "ewc", "si", "fromp", "gradient_reconstruction", "lwf", "derpp", "joint"]


@pytest.mark.parametrize("prior", [*METHODS, "separate"])
def test_resume_equals_an_uninterrupted_run(tmp_path: Path, prior: Any) -> None:
    """Stopped after each epoch in turn, over two tasks and two seeds."""
    memory = {"memory": 4} if "memory" in runs.options_of(PRESETS[prior]) else {}
    config = tiny(prior=prior, seeds=2, schedule="cosine", memory_batch_size=3, **memory)
    whole = run(tmp_path / "whole", config)
    plan = runs.prepare(config)
    runs.create(plan, tmp_path / "parts")

    def stop(event: runs.Event) -> None:
        if event.accuracies is None:
            raise Stop

    summary, stops = None, 0
    while summary is None:
        assert stops <= plan.steps, "a resumed run made no progress"
        try:
            summary = runs.execute(plan, tmp_path / "parts", stop)
        except Stop:
            stops += 1
    assert stops == plan.steps == 8
    assert {**summary, "seconds": 0} == {**whole, "seconds": 0}


def test_one_process_at_a_time_writes_to_a_run(tmp_path: Path) -> None:
    """Made or gone on with by another one meanwhile: that says so, and nothing changes."""
    plan, folder = runs.prepare(tiny()), tmp_path / "x"
    other = (
        "import sys, pathlib\n"
        "from lifelong import runs\n"
        "from lifelong.config import Experiment, Overrides, RunConfig\n"
        "plan = runs.prepare(RunConfig(Experiment(benchmark='two-moons', prior='finetune'),"
        " Overrides(epochs=2, batch_size=100)))\n"
        "getattr(runs, sys.argv[1])(plan, pathlib.Path(sys.argv[2]))\n"
    )

    def beside(what: str) -> str:
        args = [sys.executable, "-c", other, what, str(folder)]
        done = subprocess.run(args, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        return done.stderr

    with runs.claimed(folder):
        assert f"another lifelong run is writing to {folder}" in beside("create")
        assert [p.name for p in folder.iterdir()] == [runs.LOCK]
    runs.create(plan, folder)
    told: list[str] = []

    def watch(event: runs.Event) -> None:
        if not told:
            told.extend((beside("execute"), beside("create")))

    summary = runs.execute(plan, folder, watch)
    assert "another lifelong run is writing to" in told[0]
    assert "holds a run already" in told[1]
    assert json.loads((folder / runs.RESULT).read_text()) == json.loads(json.dumps(summary))
    with pytest.raises(UsageError, match="holds a run already"):
        runs.create(plan, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another folder"), runs.claimed(tmp_path / "file"):
        pass


def test_finished_seeds_are_not_run_again(tmp_path: Path) -> None:
    config = tiny(seeds=2)
    whole = run(tmp_path / "x", config)
    for name in ("result.json", "seed-1/accuracy.json", f"seed-1/{CHECKPOINT}"):
        (tmp_path / "x" / name).unlink()
    seen: set[int] = set()
    again = runs.execute(runs.prepare(config), tmp_path / "x", lambda event: seen.add(event.seed))
    assert seen == {1}
    assert again["matrices"] == whole["matrices"]
    assert again["seconds"]["per_seed"][0] == whole["seconds"]["per_seed"][0]


def lifelong(*args: str) -> list[str]:
    return [sys.executable, "-m", "lifelong", "run", *args]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_kill_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """SIGKILL once the checkpoint of a middle epoch is there, then --resume: the same numbers."""
    flags = ["--benchmark", "fromp-toy", "--prior", "fromp", "--epochs", "3", "--memory", "4"]
    flags += ["--batch-size", "200", "--quiet"]
    whole = subprocess.run(
        lifelong(*flags, "--out", str(tmp_path / "whole"), "--json"),
        env=environment(), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    folder = tmp_path / "killed"
    process = subprocess.Popen(lifelong(*flags, "--out", str(folder)), env=environment())
    log, checkpoint = folder / "log.txt", folder / "seed-0" / CHECKPOINT
    deadline = time.monotonic() + 120
    saved = 0
    try:
        # The next save after the second task was logged: the middle of the third.
        while saved < 1 and time.monotonic() < deadline and process.poll() is None:
            if log.is_file() and "task 2," in log.read_text() and checkpoint.is_file():
                stamp = checkpoint.stat().st_mtime_ns
                while checkpoint.stat().st_mtime_ns == stamp and process.poll() is None:
                    time.sleep(0.001)
                saved += 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    resumed = subprocess.run(
        lifelong("--resume", str(folder), "--json"),
        env=environment(), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    expected, found = json.loads(whole.stdout), json.loads(resumed.stdout)
    assert "resumed after" in log.read_text()
    for key in expected.keys() - {"seconds", "out"}:
        assert found[key] == expected[key], key
