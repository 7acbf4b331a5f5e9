"""``torchrun -m lifelong run``: two processes end with the numbers of one; one that is killed ends
the job, which goes on from there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong import checkpoint, cli
from lifelong.learner import CHECKPOINT

FLAGS = ["--benchmark", "two-moons", "--prior", "recommended", "--memory", "10", "--epochs", "3"]
FLAGS += ["--batch-size", "100"]
DIES = """
import os, signal, sys
from lifelong import learner
from lifelong.cli import main

epoch, done = learner.Learner._epoch, []

def dies(self, *args):
    done.append(1)
    if len(done) == 5 and os.environ["RANK"] == "1":  # in the middle of the second task
        os.kill(os.getpid(), signal.SIGKILL)
    return epoch(self, *args)

learner.Learner._epoch = dies
sys.exit(main(sys.argv[1:]))
"""


def two(*arguments: str) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of two processes, as torchrun starts them but
    without its agent, which ends the others as soon as one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_RUN_ID": "of a test",
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in started]
        return [(p.returncode, *told) for p, told in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()


def learned(folder: Path) -> dict[str, Any]:
    """What a run ended with, but for how long it took."""
    state = checkpoint.load(folder / "seed-0" / CHECKPOINT, kind="learner")
    return {name: state[name] for name in ("model", "prior", "accuracy", "generator")}


def difference(a: Any, b: Any) -> float:
    """The largest of a tensor's entries, relative to its largest; of other values 0 if equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((difference(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        if torch.equal(a, b):
            return 0.0
        return float((a.double() - b.double()).abs().max() / a.double().abs().max())
    return 0.0 if a == b else abs(a - b) if isinstance(a, float) else float("inf")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "lifelong", "run", *FLAGS, "--json", "--out", str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return folder, done


def test_two_processes_end_with_the_numbers_of_one(
    together: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, done = together
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one process speaks
    assert done.stderr.count("task 1/2") == 1
    assert cli.main(["run", *FLAGS, "--json", "--quiet", "--out", str(tmp_path / "alone")]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["mean"] == pytest.approx(alone["accuracy"]["mean"], abs=1e-3)
    assert difference(learned(folder)["model"], learned(tmp_path / "alone")["model"]) < 1e-3


def test_a_process_that_is_killed_ends_the_job_which_then_goes_on(
    together: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two processes bit for bit as if nothing had happened, on one to rounding."""
    straight, _ = together
    folder, script = tmp_path / "run", tmp_path / "dies.py"
    script.write_text(DIES)
    (code, _, told), (killed, _, _) = two(str(script), "run", *FLAGS, "--out", str(folder))
    assert killed == -9
    assert code == 1
    assert "lifelong run (rank 0): rank 0 of 2 got no answer" in told
    assert f"go on with lifelong run --resume {folder}" in told
    assert not (folder / "result.json").exists()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    for code, _, told in two("-m", "lifelong", "run", "--resume", str(folder), "--quiet"):
        assert code == 0, told
    assert difference(learned(folder), learned(straight)) == 0
    assert "resumed after 1 tasks" in (folder / "log.txt").read_text()
    assert cli.main(["run", "--resume", str(copy), "--quiet"]) == 0
    capsys.readouterr()
    assert difference(learned(copy)["model"], learned(straight)["model"]) < 1e-3
