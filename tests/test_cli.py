"""The command line as a person meets it: help, mistakes, files, results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lifelong
from lifelong import cli, runs
from lifelong.learner import CHECKPOINT

TINY = ["--benchmark", "two-moons", "--epochs", "2", "--batch-size", "100"]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """(exit code, standard output, standard error) of ``lifelong ...`` in this process."""
    monkeypatch.delenv("LIFELONG_DATA", raising=False)

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def plain(text: str) -> str:
    """Without the frames of tyro's boxes and line breaks."""
    return " ".join(text.replace("│", " ").split())


# Help ---------------------------------------------------------------------------------------------


def test_help_lists_the_commands(command: Command) -> None:
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert "demo" in out
    assert "lifelong run --benchmark split-mnist --data DIR --prior fromp" in out
    assert max(map(len, out.splitlines())) <= 100
    assert command("-h") == command("help") == (0, out, "")
    assert command() == (2, out, "")
    for words in (["run"], ["adapt", "remove"], ["memory", "ls"], ["certificate"]):
        assert command("help", *words) == command(*words, "--help") != (0, out, "")
    assert command("help", "rn")[0] == 2


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"lifelong {lifelong.__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("run", ["experiment options", "training options", "output options", "--set NAME=VALUE",
                 "number of tasks", "split-digits", "--resume runs/x"]),
        ("plan", ["--memory FLOAT", "h100 or h200", "becomes the bottleneck", "--price 2.5"]),
        ("demo", ["--out DIR", "--seeds INT", "five tasks of two digits"]),
    ],
)  # fmt: skip
def test_each_commands_help(command: Command, name: str, parts: list[str]) -> None:
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    for part in parts:
        assert part in plain(out), part
    assert out.index("examples:") > out.index("--debug")


def test_help_needs_no_torch() -> None:
    """Torch takes seconds to import."""
    code = (
        "import sys, lifelong.cli as cli\n"
        "for args in (['--help'], ['--version'], ['run', '--help'], ['demo', '--help'], ['rn'],\n"
        "             ['adapt', '--help'], ['adapt', 'remove', '--help'], ['adapt', 'remov'],\n"
        "             ['bench', '--help'], ['bench', '--sed'],\n"
        "             ['plan', '--help'], ['plan', '--mod']):\n"
        "    cli.main(args)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


def test_the_package_offers_its_names_lazily() -> None:
    """Every public name is there whatever was imported before, a module of that name included."""
    code = (
        "import lifelong.learner, lifelong, inspect\n"
        "missing = [n for n in lifelong.__all__ if not hasattr(lifelong, n)]\n"
        "modules = [n for n in lifelong.__all__ if inspect.ismodule(getattr(lifelong, n))]\n"
        "assert not missing and not modules, (missing, modules)\n"
        "from lifelong import *\n"
        "assert identify is lifelong.identify and callable(identify)\n"
        "assert dir(lifelong) == sorted(lifelong.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'identfy'"):
        lifelong.identfy  # type: ignore[attr-defined]  # noqa: B018


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rn"], "no command 'rn'; did you mean 'lifelong run'?"),
        (["train"], "no command 'train'; see lifelong --help"),
        (["--seeds"], "no option '--seeds'"),
        (["run", "--memry", "4"], "Perhaps you meant: --memory INT"),
        (["run", "--prior", "frmp"], "Expected one of ('finetune',"),
        (["run", "--scenario", "tsk"], "expected task or class or domain, got 'tsk'"),
        (["run", "--memory", "few"], "'few' is no budget"),
        (["run", "--memory", "0B"], "at least 1, got 0"),
        (["run", "--memory", "fidelity:2"], "lies in (0, 1], got 2"),
        (["run", "--seed", str(2**63 - 1), "--seeds", "2"], "seeds must lie below 2**63"),
        (["run", "--lr"], "Missing value for argument '--lr'"),
        (["run", "--prior", "ewc", "--set", "strngth=1"], "did you mean 'strength'?"),
        (["run", "--benchmark", "split-mnist"], "set LIFELONG_DATA"),
        (["run", "--resume", "nowhere"], "there is no run in nowhere"),
        (["run", "--resume", "x", "--epochs", "3", "--out", "y"], "leave out --epochs, --out"),
        (["run", "--config", "none.toml"], "cannot read none.toml"),
        (["demo", "--seeds", "0"], "seeds must be at least 1"),
        (["demo", "--sed", "0"], "Perhaps you meant: --seeds"),
    ],
)
def test_mistakes_name_the_right_way(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    assert message in plain(err)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_missing_data(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFELONG_DATA", str(tmp_path / "data"))
    code, out, err = command("run", "--benchmark", "split-mnist", "--out", tmp_path / "x")
    assert (code, out) == (1, "")
    assert str(tmp_path / "data") in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_unwritable_folders(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for args in (["run", *TINY], ["demo"]):
        code, out, err = command(*args, "--out", tmp_path / "file" / "x")
        assert (code, out) == (1, "")
        assert "cannot write" in err
        assert len(err.splitlines()) == 1


def test_a_full_disk_leaves_a_run_to_go_on_with(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command("run", *TINY, "--quiet", "--out", tmp_path / "x")
    assert code == 1
    assert "No space left on device" in err
    assert "free some space" in err
    code, _, _ = command("run", "--resume", tmp_path / "x", "--quiet")
    assert code == 0


def test_debug_shows_the_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(runs, "prepare", broken)
    code, _, err = command("run", *TINY)
    assert code == 1
    assert err == "lifelong run: RuntimeError: a bug (--debug shows where)\n"
    with pytest.raises(RuntimeError):
        command("run", *TINY, "--debug")


# Results ------------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(command: Command, tmp_path: Path) -> None:
    args = ["run", *TINY, "--prior", "kprior", "--memory", "5", "--seeds", "2"]
    code, out, err = command(*args, "--json", "--out", tmp_path / "x")
    assert code == 0
    found = json.loads(out)
    assert out.count("\n") == 1
    assert set(found["accuracy"]) == {"mean", "standard_error", "per_seed"}
    assert len(found["matrices"]) == len(found["accuracy"]["per_seed"]) == 2
    assert {"forgetting", "seconds", "memory_bytes", "config"} <= set(found)
    assert found["memory_examples"] == 10
    assert found["config"]["prior"] == "kprior"
    assert err.count("learned in") == 4  # progress, where no terminal is: one line for each task
    assert json.loads((tmp_path / "x" / "result.json").read_text()) == {
        key: value for key, value in found.items() if key != "out"
    }


def test_quiet_says_nothing_but_the_result(command: Command, tmp_path: Path) -> None:
    code, out, err = command("run", *TINY, "--quiet", "--out", tmp_path / "x")
    assert (code, err) == (0, "")
    assert "fromp on two-moons, domain-incremental" in out
    assert "Final accuracy" in out
    assert "one seed" in out


def test_file_and_flags_agree_and_flags_win(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'benchmark = "two-moons"\nprior = "ewc"\nepochs = 2\nbatch-size = 100\njson = true\n'
        "quiet = true\n[set]\nstrength = 3.0\nonline = true\n"
    )
    flags = ["--prior", "ewc", "--set", "strength=3.0", "--set", "online=true", "--quiet"]
    by_flags = json.loads(command("run", *TINY, *flags, "--json", "--out", tmp_path / "a")[1])
    by_file = json.loads(command("run", "--config", file, "--out", tmp_path / "b")[1])
    for found in (by_flags, by_file):
        found.pop("out"), found.pop("seconds")
    assert by_file == by_flags
    won = command("run", "--config", file, "--set", "strength=7.0", "--seed", "3", "--out",
                  tmp_path / "c")  # fmt: skip
    config = json.loads(won[1])["config"]
    assert config["prior_settings"] == {"strength": 7.0, "online": True}
    assert (config["seed"], config["epochs"]) == (3, 2)
    # The file that a run leaves behind runs it again.
    again = command("run", "--config", tmp_path / "a" / "config.toml", "--out", tmp_path / "d",
                    "--json", "--quiet")  # fmt: skip
    assert json.loads(again[1])["matrices"] == by_flags["matrices"]


def test_a_clip_of_inf_is_kept_in_every_file(command: Command, tmp_path: Path) -> None:
    args = [*TINY, "--prior", "finetune", "--quiet", "--json"]
    code, out, err = command("run", *args, "--clip", "inf", "--out", tmp_path / "x")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["config"]["clip"], found["config"]["training"]["clip"]) == ("inf", None)
    assert runs.load_config(tmp_path / "x").training.clip == float("inf")
    code, out, _ = command("run", "--resume", tmp_path / "x", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["matrices"] == found["matrices"]
    toml = tmp_path / "x" / "config.toml"
    code, _, err = command("run", "--config", toml, "--quiet", "--out", tmp_path / "y")
    assert (code, err) == (0, "")
    assert runs.load_config(tmp_path / "y") == runs.load_config(tmp_path / "x")


def test_wrong_values_in_a_file_name_the_file(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('memory = "few"\n')
    code, _, err = command("run", "--config", file)
    assert code == 2
    assert "'few' is no budget" in plain(err)
    assert f"the wrong setting is in {file}" in err


def test_the_folder_of_another_run_is_refused(command: Command, tmp_path: Path) -> None:
    assert command("run", *TINY, "--quiet", "--out", tmp_path / "x")[0] == 0
    code, _, err = command("run", *TINY, "--out", tmp_path / "x")
    assert code == 2
    assert "choose another folder with --out" in err
    assert f"lifelong run --resume {tmp_path / 'x'}" in err
    # A run that is finished shows its result again.
    code, out, _ = command("run", "--resume", tmp_path / "x")
    assert code == 0
    assert "Final accuracy" in out


def test_other_versions_are_pointed_out(command: Command, tmp_path: Path) -> None:
    assert command("run", *TINY, "--quiet", "--out", tmp_path / "x")[0] == 0
    path = tmp_path / "x" / "versions.json"
    path.write_text(path.read_text().replace('"numpy": "', '"numpy": "0.'))
    code, _, err = command("run", "--resume", tmp_path / "x")
    assert code == 0
    assert "since this run was started, numpy 0." in err


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    process = subprocess.Popen(
        [sys.executable, "-m", "lifelong", "run", "--benchmark", "two-moons", "--epochs", "2000",
         "--out", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not (folder / "seed-0" / CHECKPOINT).exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    # Under ``python -m`` Python may end itself by the signal, which a shell reports as 130 too.
    assert process.returncode in (130, -signal.SIGINT)
    assert out == ""
    assert err.endswith(f"Interrupted. Go on with: lifelong run --resume {folder}\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["adapt", "--help"]])
def test_nobody_reads_the_output_any_more(args):
    """As in ``lifelong ... | head``: no word about it, and the exit code that shells know."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lifelong", *args],
            stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_table_that_nobody_reads(monkeypatch):
    """rich turns the error into an exit of its own."""

    def table(args: list[str]) -> int:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904

    monkeypatch.setattr(cli, "_demo", table)
    assert cli.main(["demo"]) == 141
