"""Photos in folders: read by number, cropped by draw, and learned by the ImageNet recipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import imagenet
from PIL import Image

from lifelong import runs
from lifelong.benchmarks import benchmark, make_scheduler, photos, photos_reader, triangle
from lifelong.config import Experiment, Overrides, RunConfig, Training
from lifelong.learner import Progress
from lifelong.networks import ResNet
from lifelong.photos import Photos, crop, redraw, references, scan

CONFIG = imagenet.Config(classes=20, train=3, test=1, size=32, kill=(2,), flags=imagenet.FEW_STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photos")
    imagenet.draw_photos(place, CONFIG)
    return place


# Reading ------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order(folder: Path) -> None:
    train = scan(folder, "train")
    assert train.classes == tuple(f"n{i:08d}" for i in range(20))
    assert train.labels == tuple(i // 3 for i in range(60))
    data = references(train, first=7)
    assert data.inputs.tolist() == [[7 + i, 0] for i in range(60)]  # type: ignore[union-attr]


def test_the_middle_is_read(folder: Path) -> None:
    paths = scan(folder, "train").paths
    read = Photos(paths, 28)(torch.tensor([[4, 0], [9, 0]]))
    assert read.shape == (2, 3, 28, 28)
    assert read.dtype == torch.uint8
    with Image.open(paths[4]) as photo:  # 32 pixels, of which 32 * 224 / 256 are in the middle
        expected = np.asarray(photo)[2:30, 2:30]
    assert np.array_equal(read[0].permute(1, 2, 0).numpy(), expected)


def test_threads_read_the_same(folder: Path) -> None:
    layer = Photos(scan(folder, "train").paths, 16)
    x = torch.tensor([[i, i % 3] for i in range(20)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = layer(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many, layer(x))
    assert not layer.state_dict()
    assert "60 photos" in repr(layer)


def test_a_draw_decides_the_part() -> None:
    """Each pixel of this photo says where it is."""
    across, down = np.meshgrid(np.arange(200), np.arange(100))
    photo = Image.fromarray(np.stack([across, down, 0 * down], 2).astype(np.uint8))
    mirrored, areas = 0, []
    for draw in range(1, 200):
        part = np.asarray(crop(photo, 40, draw)).astype(float)
        assert np.array_equal(part, np.asarray(crop(photo, 40, draw)))
        wide, high = (np.ptp(part[..., i]) * 40 / 39 for i in (0, 1))
        mirrored += part[0, 0, 0] > part[0, -1, 0]
        areas.append(wide * high / (200 * 100))
        assert 0.7 < wide / high < 1.4
    assert 70 < mirrored < 130
    assert 0.06 < min(areas) < 0.2
    assert max(areas) <= 1.02
    middle = np.asarray(crop(photo, 40, 0)).astype(float).mean((0, 1))
    assert np.allclose(middle[:2], (99.5, 49.5), atol=1)


def test_a_large_photo_is_decoded_smaller(tmp_path: Path) -> None:
    pixels = np.linspace(0, 255, 1600 * 1200).reshape(1200, 1600).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "x.JPEG", quality=95)
    for draw in (0, 1, 2, 3):
        with Image.open(tmp_path / "x.JPEG") as photo:
            fast = np.asarray(crop(photo, 64, draw)).astype(float)
        with Image.open(tmp_path / "x.JPEG") as photo:
            whole = photo.copy()  # without a file behind it nothing is decoded smaller
            slow = np.asarray(crop(whole, 64, draw)).astype(float)
        assert np.abs(fast - slow).mean() < 2


def test_augmentation_draws_anew() -> None:
    x = torch.tensor([[5, 0], [6, 3]])
    g = torch.Generator().manual_seed(0)
    first, second = redraw(x, g), redraw(x, g)
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert first[:, 0].tolist() == [5, 6]
    assert (first[:, 1] > 0).all()
    assert (first != second)[:, 1].all()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder train .*expected train/CLASS"):
        scan(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no class's folder"):
        scan(tmp_path, "train")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no photo in .*cat"):
        scan(tmp_path, "train")
    bad = tmp_path / "train" / "cat" / "0.JPEG"
    bad.write_bytes(b"no photo")
    layer = Photos(scan(tmp_path, "train").paths, 8)
    with pytest.raises(OSError, match=r"cannot read the photo .*0\.JPEG"):
        layer(torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match=r"of shape \(B, 2\), got \(3, 4\)"):
        layer(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="a dict"):
        redraw({"x": torch.zeros(1, 2)})


# The recipe ---------------------------------------------------------------------------------------


def test_the_order_is_that_of_seed_1993(folder: Path) -> None:
    stream = photos(folder, "task")
    order = np.random.RandomState(1993).permutation(20).tolist()
    assert [c for task in stream for c in task.head or ()] == order
    assert [len(task) for task in stream] == [6] * 10
    assert photos(folder, "class").num_outputs == 20
    reader = photos_reader(folder)
    task = stream[3]
    assert task.test is not None
    for part in (task.train, task.test):  # numbers go on from train to val
        for number, label in zip(part.inputs[:, 0].tolist(), part.labels, strict=True):  # type: ignore[index]
            assert reader.paths[number].parent.name == f"n{int(label):08d}"


def test_folders_that_make_no_tasks(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20 classes make no 3 tasks"):
        photos(folder, "task", tasks=3)
    imagenet.draw_photos(tmp_path / "imagenet", replace(CONFIG, classes=10, train=1))
    assert len(photos(tmp_path, "task")) == 10  # found in the folder "imagenet" too
    (tmp_path / "imagenet" / "val" / "n00000003" / "0.JPEG").unlink()
    (tmp_path / "imagenet" / "val" / "n00000003").rmdir()
    with pytest.raises(ValueError, match=r"differ in their classes: \['n00000003'\]"):
        photos(tmp_path, "task")


def test_the_rate_is_a_triangle() -> None:
    rates = [triangle(step, steps=160) for step in range(160)]
    assert max(rates) == rates[19] == 1
    assert rates[0] == 1 / 20
    assert rates[90] == pytest.approx(0.5)
    assert 0 < rates[159] < 0.01
    assert triangle(1, steps=1) == 0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    make = make_scheduler(Training(schedule="triangular", lr=0.5))
    assert make is not None
    scheduler = make(optimizer, 160)
    assert scheduler.get_last_lr() == [0.5 / 20]


def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe with a small network on small photos."""
    small = replace(
        benchmark("imagenet-1000"),
        make_model=lambda outputs: ResNet(outputs, (1, 1), width=8),
        reader=partial(photos_reader, size=32),
    )
    monkeypatch.setattr(runs, "benchmark", lambda name: small)


def plan(folder: Path, prior: Any, memory: int | None = 3) -> runs.Plan:
    experiment = Experiment("imagenet-1000", prior, data=folder, memory=memory)
    return runs.prepare(RunConfig(experiment, Overrides(epochs=2, batch_size=4)))


def test_an_interrupted_run_ends_with_the_same_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = "recommended"
    tiny(monkeypatch)
    whole = runs.execute(plan(folder, prior), tmp_path / "a")
    assert whole["memory_examples"] == 30
    learner = plan(folder, prior).make_learner(0)
    learner.load(tmp_path / "a" / "seed-0" / "learner.safetensors")
    memory = learner.prior.memory
    assert memory is not None
    assert memory.inputs.shape == (30, 2)  # 16 bytes for each photo
    assert (memory.inputs[:, 1] == 0).all()  # type: ignore[index]

    class Killed(BaseException):
        pass

    def watch(event: runs.Event) -> None:
        progress: Progress = event.progress
        if (progress.task, progress.epoch) == (4, 1):
            raise Killed

    with pytest.raises(Killed):
        runs.execute(plan(folder, prior), tmp_path / "b", watch)
    resumed = runs.execute(plan(folder, prior), tmp_path / "b")
    assert resumed["matrices"] == whole["matrices"]
    assert resumed["memory_bytes"] == whole["memory_bytes"]


def test_numbers_of_files_mean_nothing_once_a_photo_is_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    first = plan(photos, "finetune", None).fingerprint()
    assert first == plan(folder, "finetune", None).fingerprint()
    one = sorted((photos / "train").rglob("*.JPEG"))[0]
    one.rename(one.with_name("z.JPEG"))
    assert plan(photos, "finetune", None).fingerprint() != first


@pytest.mark.parametrize("prior", ["ewc", "online_ewc", "joint", "kprior", "fromp", "finetune"])
def test_every_kind_of_prior_has_settings(
    prior: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    made = plan(folder, prior, None if prior in ("finetune", "ewc", "online_ewc", "joint") else 2)
    recipe = made.make_prior().recipe
    if prior in ("ewc", "fromp"):
        assert recipe.estimator == "mc"
    assert made.training.schedule == "triangular"


CODE = """
import sys, lifelong.runs as runs
from dataclasses import replace
from functools import partial
from lifelong.benchmarks import benchmark, photos_reader
from lifelong.cli import main
from lifelong.networks import ResNet
small = replace(benchmark("imagenet-1000"), make_model=lambda n: ResNet(n, (1, 1), width=8),
                reader=partial(photos_reader, size=32))
runs.benchmark = lambda name: small
sys.exit(main(sys.argv[1:]))
"""


def test_all_processes_of_a_run_are_found() -> None:
    """Also in sessions of their own, as torchrun starts them."""
    inner = "import subprocess, sys; subprocess.run(['sleep', '60'], start_new_session=True)"
    child = subprocess.Popen([sys.executable, "-c", inner])
    try:
        while not (found := imagenet.descendants(child.pid)):
            time.sleep(0.01)
        assert len(found) == 1
        os.kill(found[0], signal.SIGKILL)
        assert child.wait(30) == 0
    finally:
        child.kill()
    assert imagenet.descendants(child.pid) == []


def test_killed_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = imagenet.command

    def command(*args: Any) -> list[str]:
        words = real(*args)
        return [sys.executable, "-c", CODE, *words[words.index("lifelong") + 1 :]]

    monkeypatch.setattr(imagenet, "command", command)
    config = replace(CONFIG, flags=tuple("2" if f == "20" else f for f in CONFIG.flags))
    assert not imagenet.go_on(config, folder, tmp_path, limit=0)
    assert imagenet.go_on(config, folder, tmp_path, limit=60)
    imagenet.record(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] >= 2
    assert result["starts"] >= 3
    assert len(result["tasks"]) == 10
    assert "data" not in json.loads((tmp_path / "config.json").read_text())["run"]
