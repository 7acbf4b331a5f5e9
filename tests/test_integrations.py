"""What holds without the frameworks: they are imported where they are used, and missing ones told.

The tests with them are in tests/integrations, run by ``make test-integrations``.
"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

EXTRAS = {
    "transformers": ("transformers", "hf"),
    "avalanche": ("avalanche", "avalanche"),
    "lightning": ("lightning", "lightning"),
    "sklearn": ("sklearn", "sklearn"),
}


@pytest.mark.parametrize("module", EXTRAS)
def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    package, extra = EXTRAS[module]
    name = f"lifelong.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for loaded in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, loaded, None)
    with pytest.raises(ImportError, match=rf"pip install 'lifelong\[{extra}\]'"):
        importlib.import_module(name)


def test_nothing_is_imported_early() -> None:
    code = "import sys, lifelong, lifelong.integrations; print(sys.modules.keys() & {packages})"
    packages = {package for package, _ in EXTRAS.values()}
    done = subprocess.run(
        [sys.executable, "-c", code.format(packages=packages)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"
