"""The Tab key, and the flags that every command takes."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
from pathlib import Path

import pytest

from lifelong import cli
from lifelong.commands.completion import commands

EXECUTABLE = {shell: shutil.which(shell) for shell in ("bash", "zsh", "fish")}


def script(capsys: pytest.CaptureFixture[str], shell: str) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def offered(text: str, line: str) -> set[str]:
    """What bash offers at the end of ``line``."""
    words = line.split(" ")
    listed = " ".join(f'"{w}"' for w in words)
    asked = f"{text}\nCOMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _lifelong\n"
    asked += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        [EXECUTABLE["bash"] or "bash", "-c", asked], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(EXECUTABLE["bash"] is None, reason="there is no bash here")
def test_bash_offers_what_there_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = script(capsys, "bash")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.toml").touch()
    assert {"run", "memory", "completion", "--version"} <= offered(text, "lifelong ")
    assert offered(text, "lifelong ru") == {"run"}
    assert offered(text, "lifelong adapt re") == {"remove", "relabel", "regularise"}
    assert {"--prior", "--memory", "--track"} <= offered(text, "lifelong run --")
    assert offered(text, "lifelong run --pri") == {"--prior"}
    assert offered(text, "lifelong run --prior gradient") == {"gradient_reconstruction"}
    assert offered(text, "lifelong run --scenario ") == {"task", "domain", "class"}
    assert offered(text, "lifelong run --config ") == {"file.toml"}
    assert offered(text, "lifelong adapt relabel x --t") >= {"--task", "--to"}
    assert {"--help", "--json"} <= offered(text, "lifelong memory ls --")
    assert offered(text, "lifelong report x ") == {"file.toml"}
    assert offered(text, "lifelong completion --h") == {"--help"}


@pytest.mark.skipif(EXECUTABLE["bash"] is None, reason="there is no bash here")
def test_the_tab_key_of_bash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As at a terminal: words are typed, then the key, and bash's line editor goes on with them."""
    pty = pytest.importorskip("pty", reason="no terminals here")
    (tmp_path / "script").write_text(script(capsys, "bash"))
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        [EXECUTABLE["bash"] or "bash", "--norc", "--noprofile", "-i"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, start_new_session=True,
        env={**os.environ, "TERM": "dumb", "PS1": "> ", "INPUTRC": os.devnull},
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def typed(text: str, until: str) -> None:
        nonlocal seen
        seen = ""
        os.write(ours, text.encode())
        while until not in seen:
            assert select.select([ours], [], [], 20)[0], (text, seen)
            seen += os.read(ours, 65536).decode()

    try:
        typed("source ./script; echo re''ady\n", "ready")
        typed("lifelong ru\t--pri\tgradient\t", "lifelong run --prior gradient_reconstruction ")
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


@pytest.mark.skipif(EXECUTABLE["fish"] is None, reason="there is no fish here")
def test_fish_offers_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script(capsys, "fish"))
    for line, expected in (
        ("lifelong ru", {"run"}),
        ("lifelong adapt re", {"remove", "relabel", "regularise"}),
        ("lifelong run --prior gradient", {"gradient_reconstruction"}),
    ):
        asked = f"source script; complete -C '{line}'"
        done = subprocess.run(
            [EXECUTABLE["fish"] or "fish", "--no-config", "-c", asked],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_theirs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, shell)
    assert "gradient_reconstruction" in text
    assert "relabel" in text
    path = EXECUTABLE[shell]
    if path is None:
        pytest.skip(f"there is no {shell} here")
    done = subprocess.run([path, "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bsh"]) == 2
    assert "there is no shell 'bsh' here; did you mean 'bash'?" in capsys.readouterr().err
    assert cli.main(["completion"]) == 2


def test_every_flag_that_is_offered_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's help has it, or it is one that all commands take."""
    for name, flags in commands().items():
        assert cli.main([*name.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        for flag in flags:
            common = ("--help", "--no-color", "--quiet", "--debug")
            assert flag.name in shown or flag.name in common, (name, flag.name)


# ------------------------------------------------------------------------------- of every command


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_takes_what_every_command_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*name.split(), "--quiet", "--no-color", "--debug", "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    if name != "completion":
        assert "--json" in out


def test_plain_text_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(cli, "_main", lambda args: seen.append(os.environ.get("NO_COLOR")) or 0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["run", "--no-color"]) == 0
    assert seen == ["1"]
    assert "NO_COLOR" not in os.environ
