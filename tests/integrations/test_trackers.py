"""MLflow and Weights & Biases for real, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
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
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "result.json", "config.json"} <= files
    assert cli.main(["run", "--resume", out, "--quiet"]) == 0
    assert len(client.search_runs([experiment.experiment_id])) == 1
    with pytest.raises(UsageError, match="cannot be opened"):
        tracker("mlflow:nonsense://x")


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_SERVICE", "")  # it sets it: put back at the end
    monkeypatch.delenv("WANDB_SERVICE")
    one = tracker("wandb:mine", name="x")
    one.config({"memory": 8})
    one.scalars({"loss": 1.0}, 1)
    one.image("memory", Image.new("RGB", (6, 4)), 1)
    one.matrix("matrix", [[1.0], [0.5, 0.25]], 1)
    (tmp_path / "report.html").write_text("<p>")
    one.artefact(tmp_path / "report.html")
    one.close()
    assert list(tmp_path.glob("wandb/offline-run-*"))
    assert one.place["project"] == "mine"
