"""Each command in turn: --json is one object, --quiet is no remarks, --no-color is no codes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported

from lifelong import cli, demo
from lifelong.commands.completion import commands
from lifelong.config import Training

# Of each command: what makes it do its work, in a folder that has a run x, a store m made of it,
# certificate.json of what was taken out of it, and the key k.pem that signed that. {n} is a number.
CALLS = {
    "demo": "demo --seeds 1 --out d{n}",
    "run": "run --benchmark two-moons --prior kprior --memory 4 --epochs 1 --out r{n}",
    "bench": "bench split-digits --smoke --methods finetune --seeds 1 --jobs 0 --out b{n}",
    "adapt add": "adapt add x --from new.npz --out a{n}",
    "adapt remove": "adapt remove x --label 1 --out v{n}",
    "adapt relabel": "adapt relabel x --ids {n} --to 0 --out l{n}",
    "adapt regularise": "adapt regularise x --precision 0.1 --out g{n}",
    "adapt transfer": "adapt transfer x --hidden 8 --out t{n}",
    "plan": "plan --presets ewc",
    "memory ls": "memory ls m --limit 1",
    "memory show": "memory show m 1",
    "memory history": "memory history m",
    "memory diff": "memory diff m 1 1",
    "memory verify": "memory verify m",
    "memory import": "memory import x m{n}",
    "memory drop": "memory drop m --ids {n}",
    "memory restore": "memory restore m 1",
    "memory forget": "memory forget m --ids {n}5 --yes",
    "memory compact": "memory compact m",
    "memory export": "memory export m e{n}.safetensors",
    "report": "report x --out {n}.html",
    "ui": "ui x",
    "certificate verify": "certificate verify certificate.json --key k.pem.pub",
    "certificate key": "certificate key {n}.pem",
}
SCRIPTS = {"completion"}  # whose output is a program


def test_no_command_is_left_out() -> None:
    assert set(CALLS) == set(commands()) - SCRIPTS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its store, a certificate and its key."""
    import numpy as np

    folder, before = tmp_path_factory.mktemp("made"), Path.cwd()
    os.chdir(folder)
    try:
        np.savez("new.npz", inputs=np.zeros((3, 2), np.float32), labels=np.array([0, 1, 0]))
        for line in (
            "run --benchmark two-moons --prior kprior --memory 30 --epochs 2 --out x --quiet",
            "memory import x m --quiet",
            "certificate key k.pem",
            "adapt remove x --label 1 --certificate --key k.pem --out w --quiet",
        ):
            assert cli.main(line.split()) == 0
        shutil.copy(next(Path("w").rglob("certificate.json")), ".")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of it, with what would take long or never end cut short."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    few = Training(epochs=1, batch_size=200)
    learn = partial(demo.learn, training=few, methods=demo.METHODS[:1])
    monkeypatch.setattr(demo, "learn", learn)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: sockets[0].close())
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "LIFELONG_DATA"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def terminal() -> Iterator[list[str]]:
    """Inside, standard output and standard error are a terminal; what it was sent, afterwards."""
    pty = pytest.importorskip("pty", reason="no terminals here")
    ours, theirs = pty.openpty()
    sent: list[str] = []

    def read() -> None:
        with suppress(OSError):  # the other side is closed
            while part := os.read(ours, 65536):
                sent.append(part.decode(errors="replace"))

    thread = threading.Thread(target=read)
    thread.start()
    stream = open(theirs, "w", encoding="utf-8")  # noqa: SIM115  # the with below closes it
    with stream, redirect_stdout(stream), redirect_stderr(stream):
        yield sent
    thread.join()
    os.close(ours)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", CALLS)
def test_json_is_one_object_and_quiet_says_no_more(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*CALLS[name].format(n=1).split(), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), dict)
    assert out.count("\n") == 1
    assert err == ""
    assert cli.main([*CALLS[name].format(n=2).split(), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "{" not in out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", CALLS)
def test_no_color_leaves_no_codes_on_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal() as sent:
        assert cli.main([*CALLS[name].format(n=1).split(), "--no-color"]) == 0
        assert cli.main([*name.split(), "--help", "--no-color"]) == 0
        assert cli.main([*name.split(), "--jsn", "--no-color"]) == 2
    assert "--json" in "".join(sent)
    assert "\x1b" not in "".join(sent)
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as sent:
        assert cli.main([*name.split(), "--help"]) == 0
    assert "\x1b" not in "".join(sent)
    monkeypatch.delenv("NO_COLOR")
    with terminal() as sent:  # or this test could not fail
        assert cli.main([*name.split(), "--help"]) == 0
    assert "\x1b[1m" in "".join(sent)
