"""Trackers: what they are told of a run, and that none of them ever loses one."""

from __future__ import annotations

import json
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import tensorboardX  # noqa: F401  # so does it
import torch
from PIL import Image

import lifelong
from lifelong import Learner, cli, runs, trackers
from lifelong.config import UsageError
from lifelong.memory import remember
from lifelong.toys import digits
from lifelong.trackers import TrackerWarning, flat, follow, markdown, sheet, tracker

RUN = ("--benchmark", "two-moons", "--prior", "kprior", "--memory", "8", "--epochs", "2")


class Told:
    """A tracker that keeps what it is told."""

    made: ClassVar[list[Told]] = []

    def __init__(self, place: Mapping[str, str] | None = None, fails: str = "") -> None:
        self.fails, self.again = fails, place is not None
        self.settings: dict[str, Any] = {}
        self.numbers: list[tuple[str, float, int]] = []
        self.images: list[tuple[str, tuple[int, int], int]] = []
        self.matrices: list[tuple[str, Any, int]] = []
        self.files: list[str] = []
        self.closed, self.complete = 0, None
        Told.made.append(self)

    @property
    def place(self) -> Mapping[str, str]:
        return {"run": "17"}

    def _fail(self, name: str) -> None:
        if self.fails == name:
            raise RuntimeError("no network")

    def config(self, values: Mapping[str, Any]) -> None:
        self._fail("config")
        self.settings |= values

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._fail("scalars")
        self.numbers += [(name, value, step) for name, value in values.items()]

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self.images.append((name, picture.size, step))

    def matrix(self, name: str, rows: Any, step: int) -> None:
        self.matrices.append((name, [list(row) for row in rows], step))

    def artefact(self, path: Path) -> None:
        assert path.is_file()
        self.files.append(path.name)

    def close(self, *, complete: bool = True) -> None:
        self.closed += 1
        self.complete = complete


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """What runs with ``--track told[:FAILS]`` tell."""
    Told.made = []
    kinds = {**trackers.KINDS, "told": lambda where, name, folder, place: Told(place, where or "")}
    monkeypatch.setattr(trackers, "KINDS", kinds)
    return Told.made


# ------------------------------------------------------------------------------- runs


def test_a_run_tells_all_that_its_folder_has(told: list[Told], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    args = ["run", *RUN, "--seeds", "2", "--out", str(folder), "--quiet", "--track", "told"]
    assert cli.main(args) == 0
    (one,) = told
    assert one.closed == 1
    assert one.settings["benchmark"] == "two-moons"
    assert one.settings["prior/memory"] == 8
    result = json.loads((folder / "result.json").read_text())
    for seed in (0, 1):
        losses = [s for n, _, s in one.numbers if n == f"seed_{seed}/loss"]
        assert losses == [1, 2, 3, 4]  # epochs over both tasks
        last = [v for n, v, _ in one.numbers if n == f"seed_{seed}/accuracy"][-1]
        assert last == pytest.approx(result["accuracy"]["per_seed"][seed])
        found = [rows for name, rows, _ in one.matrices if name == f"seed_{seed}/matrix"]
        whole = [row[: t + 1] for t, row in enumerate(result["matrices"][seed])]
        assert found[-1] == whole
    assert one.files == ["report.html", "result.json", "config.json"]
    assert one.images == []  # points in the plane are no pictures


ROWS = (1, 2, 3, 3, 3)  # at most 24 images


def test_pictures_of_the_memory(told: list[Told], tmp_path: Path) -> None:
    args = ["run", "--benchmark", "split-digits", "--prior", "kprior", "--memory", "8"]
    args += ["--epochs", "1", "--out", str(tmp_path / "x"), "--quiet", "--track", "told"]
    assert cli.main(args) == 0
    # After each task of one epoch: 8 images in a row for each.
    expected = [("seed_0/memory", (8 * 64, rows * 64), t + 1) for t, rows in enumerate(ROWS)]
    assert told[0].images == expected


def test_a_resumed_run_goes_on_in_the_same_place(
    told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"

    class Killed(BaseException):
        pass

    def kill(*args: Any, **options: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, "execute", kill)
        with pytest.raises(Killed):
            cli.main(["run", *RUN, "--out", str(folder), "--quiet", "--track", "told"])
    assert cli.main(["run", "--resume", str(folder), "--quiet"]) == 0
    first, second = told
    assert (first.again, second.again) == (False, True)
    assert first.settings
    assert not second.settings  # told once
    assert second.files[0] == "report.html"
    assert cli.main(["run", "--resume", str(folder), "--quiet", "--track", "told:more"]) == 0
    assert [one.again for one in told[2:]] == [True, False]


def test_an_interrupted_run_tells_all_again(
    told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tasks before the interruption, too: matrix and steps are those of the whole run."""
    folder = tmp_path / "x"
    log = runs.log

    def killed(place: Path, line: str) -> None:
        log(place, line)
        if "task 1," in line:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "log", killed)
        assert cli.main(["run", *RUN, "--out", str(folder), "--quiet", "--track", "told"]) == 130
    assert cli.main(["run", "--resume", str(folder), "--quiet"]) == 0
    first, second = told
    assert (first.complete, second.complete) == (False, True)
    assert [len(rows) for _, rows, _ in second.matrices] == [2]
    assert {step for _, _, step in second.numbers} == {3, 4}
    assert ("seed_0/memory/examples", 16.0, 4) in second.numbers


def test_no_more_of_it(told: list[Told], tmp_path: Path) -> None:
    folder = str(tmp_path / "x")
    assert cli.main(["run", *RUN, "--out", folder, "--quiet", "--track", "told"]) == 0
    assert cli.main(["run", "--resume", folder, "--quiet", "--track", "none"]) == 0
    assert len(told) == 1


@pytest.mark.parametrize("fails", ["config", "scalars"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    told: list[Told], tmp_path: Path, fails: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", *RUN, "--out", str(tmp_path / "x"), "--quiet"]
    assert cli.main([*args, "--track", f"told:{fails}", "--track", "told"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lifelong run: the tracker told:{fails} has failed and is left out")
    assert "no network" in line
    broken, whole = told
    assert (broken.closed, broken.complete) == (1, False)
    assert (whole.closed, whole.complete) == (1, True)
    assert whole.files == ["report.html", "result.json", "config.json"]
    assert (tmp_path / "x" / "result.json").is_file()


def test_a_tracker_that_hangs_holds_nothing_up(
    told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Neither the training nor, for longer than PATIENCE, the end."""
    forever = threading.Event()
    monkeypatch.setattr(Told, "matrix", lambda *args: forever.wait())
    monkeypatch.setattr(trackers, "PATIENCE", 0.05)
    try:
        args = ["run", *RUN, "--out", str(tmp_path / "x"), "--quiet", "--track", "told"]
        assert cli.main(args) == 0
        assert "the tracker told has not taken all within 0 s" in capsys.readouterr().err
        assert (tmp_path / "x" / "result.json").is_file()
        kinds = {"slow": lambda *args: forever.wait()}
        monkeypatch.setattr(trackers, "KINDS", kinds)
        with pytest.raises(UsageError, match="slow cannot be opened .no answer within"):
            tracker("slow")
    finally:
        forever.set()


def test_what_trackers_say_is_no_result(
    told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Some print on standard output, as MLflow and trackio do."""
    monkeypatch.setattr(Told, "config", lambda *args: print("hello"))  # noqa: T201
    for quiet in ([], ["--quiet"]):
        out = str(tmp_path / f"x{len(quiet)}")
        assert cli.main(["run", *RUN, "--out", out, "--json", "--track", "told", *quiet]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["prior"] == "kprior"
        assert said.err == "" if quiet else "hello" in said.err


def test_a_tracker_changes_no_number(told: list[Told], tmp_path: Path) -> None:
    weights = []
    for name, track in (("with", ["--track", "told"]), ("without", [])):
        out = tmp_path / name
        assert cli.main(["run", *RUN, "--out", str(out), "--quiet", *track]) == 0
        state = lifelong.checkpoint.load(out / "seed-0" / "learner.safetensors", kind="learner")
        weights.append(torch.cat([w.flatten() for w in state["model"].values()]))
    assert torch.equal(*weights)


def test_a_report_that_fails_does_not_fail_the_run(
    told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers, "write_report", full)
    monkeypatch.setattr(trackers, "sheet", full)
    out = str(tmp_path / "x")
    assert cli.main(["run", *RUN, "--out", out, "--quiet", "--track", "told"]) == 0
    err = capsys.readouterr().err
    assert "trackers are not told of the report" in err
    assert "trackers are not told of what was learned" in err
    assert told[0].files == ["result.json", "config.json"]


def test_mistakes_are_told_before_there_is_a_run(
    told: list[Told], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "x"
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for given, message in (
        ("tensorbord", "there is no tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ("mlflow", "the tracker mlflow needs mlflow: pip install 'lifelong[mlflow]'"),
    ):
        args = ["run", *RUN, "--out", str(folder), "--quiet", "--track", "told", "--track", given]
        assert cli.main(args) in (1, 2)
        assert message in capsys.readouterr().err
        assert told[-1].closed == 1
        assert not (folder / "config.json").exists()
    file = tmp_path / "file"
    file.write_text("")
    args = ["run", *RUN, "--out", str(folder), "--quiet", "--track", f"tensorboard:{file}/x"]
    assert cli.main(args) == 2
    assert "cannot be opened" in capsys.readouterr().err
    assert cli.main(["run", *RUN, "--out", str(folder), "--quiet"]) == 0  # the folder is free


def test_a_file_of_flags_has_them_too(told: list[Told], tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text('benchmark = "two-moons"\nprior = "kprior"\nmemory = 8\nepochs = 1\n'
                      'track = ["told", "told:b"]\n')  # fmt: skip
    out = str(tmp_path / "x")
    assert cli.main(["run", "--config", str(config), "--out", out, "--quiet"]) == 0
    assert len(told) == 2
    again = ["run", "--config", str(config), "--out", str(tmp_path / "y"), "--quiet"]
    assert cli.main([*again, "--track", "told:c"]) == 0  # flags win over the file
    assert len(told) == 3


# ------------------------------------------------------------------------------- loops of one's own


def test_a_learner_is_followed() -> None:
    stream = lifelong.split_by_class(*digits(), classes_per_task=5)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    learner = Learner(model, lifelong.kprior(lifelong.Categorical(), memory=10), epochs=2)
    one = Told()
    on_epoch, on_task = follow(one, learner)
    learner.run(stream, on_epoch=on_epoch, on_task=on_task)
    assert [step for name, _, step in one.numbers if name == "loss"] == [1, 2, 3, 4]
    assert one.matrices[-1][1] == learner.accuracy
    assert [name for name, *_ in one.images] == ["memory", "memory"]
    broken = Told(fails="scalars")
    on_epoch, _ = follow(broken, learner)
    progress = lifelong.learner.Progress(0, 1, 2, 0.5, 1.0)
    with pytest.warns(TrackerWarning, match="Told has failed"):
        on_epoch(progress)
    on_epoch(progress)  # once is enough


def test_what_is_no_picture_gives_no_sheet() -> None:
    batch = lifelong.data.Batch(torch.rand(4, 3), torch.arange(4), torch.arange(4))
    memory = remember(batch, torch.randn(4, 4))
    assert sheet(memory) is None
    assert sheet(memory[slice(0, 0)]) is None
    images = lifelong.data.Batch(torch.rand(9, 3, 5, 5), torch.arange(9), torch.arange(9))
    found = sheet(remember(images, torch.randn(9, 9)))
    assert found is not None
    assert found.size == (8 * 64, 2 * 64)


def test_matrices_and_settings_in_plain_form() -> None:
    assert markdown([[1.0], [0.5, 0.25]]) == (
        "| after task | 1 | 2 |\n|---|---|---|\n| 1 | 100.0 |  |\n| 2 | 50.0 | 25.0 |"
    )
    assert flat({"a": {"b": 1, "c": None}, "d": (1, 2), "e": True}) == {
        "a/b": 1,
        "d": "(1, 2)",
        "e": True,
    }


# ------------------------------------------------------------------------------- TensorBoard


def events(folder: Path) -> list[Any]:
    """Of its files: each is a length, a checksum, an event, a checksum."""
    from tensorboardX.proto.event_pb2 import Event as Written

    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Written.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_tensorboard_has_numbers_pictures_and_tables(tmp_path: Path) -> None:
    board = tracker(f"tensorboard:{tmp_path / 'board'}")
    board.config({"memory": 20})
    board.scalars({"accuracy": 0.5}, 3)
    board.image("memory", Image.new("RGB", (6, 4)), 3)
    board.matrix("matrix", [[1.0], [0.5, 0.25]], 3)
    board.artefact(tmp_path / "report.html")
    board.close()
    again = tracker("tensorboard", place=board.place)
    again.scalars({"accuracy": 0.75}, 4)
    again.close()
    values = [(v.tag, v, e.step) for e in events(tmp_path / "board") for v in e.summary.value]
    accuracies = sorted((s, v.simple_value) for tag, v, s in values if tag == "accuracy")
    assert accuracies == [(3, 0.5), (4, 0.75)]  # of two files
    (picture,) = [v.image for tag, v, _ in values if tag == "memory"]
    assert (picture.width, picture.height) == (6, 4)
    texts = [v.tensor.string_val[0].decode() for tag, v, _ in values if v.HasField("tensor")]
    assert any("| memory | 20 |" in text for text in texts)
    assert any("| 2 | 50.0 | 25.0 |" in text for text in texts)
    with pytest.raises(UsageError, match="say where: tensorboard:DIR"):
        tracker("tensorboard")


def test_a_run_writes_a_board_beside_its_results(tmp_path: Path) -> None:
    args = ["run", *RUN, "--out", str(tmp_path / "x"), "--quiet", "--track", "tensorboard"]
    assert cli.main(args) == 0
    tags = {v.tag for e in events(tmp_path / "x" / "tensorboard") for v in e.summary.value}
    assert {"seed_0/loss", "seed_0/accuracy", "seed_0/accuracy/task_2"} <= tags


# ------------------------------------------------------------------------------- trackio


def test_trackio_is_asked_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: it brings a web framework, which the tests do without."""
    said: list[Any] = []

    class Run:
        config: Any = None

        def log(self, values: Any, step: int) -> None:
            said.append((step, values))

        def log_artifact(self, path: str, **options: Any) -> None:
            said.append((path, options))

        def finish(self) -> None:
            said.append("finished")

    fake = ModuleType("trackio")
    fake.init = lambda **options: said.append(options) or Run()  # type: ignore[attr-defined]
    fake.Image = lambda array: array.shape  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    one: Any = tracker("trackio:mine", name="x")
    one.config({"memory": 8})
    one.scalars({"loss": 1.0}, 2)
    one.image("memory", Image.new("RGB", (6, 4)), 2)
    one.matrix("matrix", [[1.0], [0.5, 0.25]], 2)
    one.artefact(Path("a/report.html"))
    one.close()
    assert one.run.config == {"memory": 8}
    assert said[0]["project"] == "mine"
    assert said[0]["name"].startswith("x-")
    assert ("a/report.html", {"name": "report", "type": "run"}) in said
    assert (2, {"memory": (4, 6, 3)}) in said
    assert said[-3][1]["matrix/after_2_task_1"] == 0.5
    assert said[-1] == "finished"
    again: Any = tracker("trackio", place=one.place)
    assert (again.project, again.name) == ("mine", one.name)
