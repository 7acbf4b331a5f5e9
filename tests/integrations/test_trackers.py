"""TensorBoard's reader, MLflow, Weights & Biases and trackio for real, on this machine.

trackio wants an older Pillow than constraints.txt pins, so ``make test-integrations`` leaves it
out; in an environment of its own: pip install 'lifelong[demo,trackio]' pytest, and this file.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import tensorboardX  # noqa: F401  # so does it
from PIL import Image

from lifelong import cli
from lifelong.config import UsageError
from lifelong.trackers import tracker

RUN = ("--benchmark", "split-digits", "--prior", "kprior", "--memory", "8", "--epochs", "1")


@pytest.mark.filterwarnings("ignore")  # of its database's packages among each other
def test_mlflow_keeps_a_run_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # files go to mlruns/ of the folder where it is called
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    out = str(tmp_path / "x")
    args = ["run", *RUN, "--out", out, "--quiet", "--track", f"mlflow:{uri}"]
    assert cli.main(args) == 0
    client: Any = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lifelong")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["benchmark"] == "split-digits"
    history = client.get_metric_history(run.info.run_id, "seed_0/loss")
    assert [m.step for m in history] == [1, 2, 3, 4, 5]
    matrix = client.download_artifacts(run.info.run_id, "seed_0/matrix.json", str(tmp_path))
    assert [len(row) for row in json.loads(Path(matrix).read_text())["rows"]] == [1, 2, 3, 4, 5]
    pictures = client.list_artifacts(run.info.run_id, "images")
    assert len([p for p in pictures if p.path.endswith(".png")]) == 5
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "result.json", "config.json"} <= files
    assert cli.main(["run", "--resume", out, "--quiet"]) == 0
    assert len(client.search_runs([experiment.experiment_id])) == 1
    with pytest.raises(UsageError, match="cannot be opened"):
        tracker("mlflow:nonsense://x")
    tracker(f"mlflow:{uri}", name="stopped").close(complete=False)
    ends = {r.info.run_name: r.info.status for r in client.search_runs([experiment.experiment_id])}
    assert ends == {"x": "FINISHED", "stopped": "KILLED"}


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_SERVICE", "")  # it sets it: put back at the end
    monkeypatch.delenv("WANDB_SERVICE")
    one = tracker("wandb:mine", name="x")
    one.config({"memory": 8})
    one.scalars({"seed_0/loss": 1.0}, 7)
    one.scalars({"seed_1/loss": 2.0}, 1)  # smaller than a step before, and kept all the same
    one.image("memory", Image.new("RGB", (6, 4)), 1)
    one.matrix("matrix", [[1.0], [0.5, 0.25]], 1)
    (tmp_path / "report.html").write_text("<p>")
    one.artefact(tmp_path / "report.html")
    one.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert {name in written.read_bytes() for name in (b"seed_0/loss", b"seed_1/loss")} == {True}
    assert one.place["project"] == "mine"


def test_trackio_keeps_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    """In processes of their own: it asks the environment where to write as it is imported."""
    pytest.importorskip("trackio", minversion="0.40", reason="needs the extra trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept")}
    start = ["--out", "x", "--seeds", "2", "--track", "trackio:mine"]
    for args in ([*RUN, *start], ["--resume", "x"]):
        done = subprocess.run(
            [sys.executable, "-m", "lifelong", "run", *args, "--json"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["prior"] == "kprior"
    with sqlite3.connect(tmp_path / "kept" / "mine.db") as database:
        ask = lambda query: [row[0] for row in database.execute(query)]  # noqa: E731
        assert len(ask("SELECT DISTINCT run_name FROM metrics")) == 1
        names = {name for text in ask("SELECT metrics FROM metrics") for name in json.loads(text)}
        assert {"seed_0/loss", "seed_1/accuracy/task_5", "seed_1/memory"} <= names
        assert json.loads(ask("SELECT config FROM configs")[0])["benchmark"] == "split-digits"
        assert {"report", "result", "config"} == set(ask("SELECT name FROM artifacts"))
    assert len(list((tmp_path / "kept").rglob("*.png"))) == 10  # 5 tasks, 2 seeds
    database.close()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """TensorBoard itself comes with the extra avalanche."""
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli.main(["run", *RUN, "--out", str(tmp_path), "--quiet", "--track", "tensorboard"]) == 0
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [s.step for s in board.Scalars("seed_0/loss")] == [1, 2, 3, 4, 5]
    result = json.loads((tmp_path / "result.json").read_text())
    after = [s.value for s in board.Scalars("seed_0/accuracy/task_1")]
    assert after == pytest.approx([row[0] for row in result["matrices"][0]])
    assert [i.step for i in board.Images("seed_0/memory")] == [1, 2, 3, 4, 5]
    assert "seed_0/matrix/text_summary" in board.Tags()["tensors"]
