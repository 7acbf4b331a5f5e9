"""The layers of pyproject.toml: imports point down, and every module has a place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lifelong"


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package under ``root``, in a process of its own: it imports nothing."""
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    path = f"import sys; sys.path.insert(0, {str(root / 'src')!r}); "
    return subprocess.run(
        [sys.executable, "-c", path + code], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(SOURCE, tmp_path / "src" / "lifelong", ignore=shutil.ignore_patterns("__py*"))
    return tmp_path


def test_imports_point_down() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("errors", "from . import likelihoods", "lifelong.errors is not allowed to import"),
        ("stray", "", "stray"),
    ],
    ids=["an import that points up", "a module without a place"],
)
def test_the_check_sees(copy: Path, module: str, line: str, complaint: str) -> None:
    with (copy / "src" / "lifelong" / f"{module}.py").open("a") as file:
        file.write(line + "\n")
    result = lint_imports(copy)
    assert result.returncode != 0
    assert complaint in " ".join(result.stdout.split())
