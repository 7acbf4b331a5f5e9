"""What holds for every test: one thread, seeded, and no global state left changed behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.nn.modules import module as torch_module

# Two workers on two cores: more threads only wait for each other.
torch.set_num_threads(1)

# CI repeats the same cases, so that a red run can be run again; elsewhere each run looks further.
settings.register_profile(
    "lifelong", deadline=None, max_examples=40, derandomize="CI" in os.environ
)
settings.load_profile("lifelong")


# Set by pytest, by torch when the first optimiser is made, and by matplotlib where the home folder
# can't be written.
_OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"}


def _global_state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "global module hooks": {
            name: len(hooks)
            for name, hooks in vars(torch_module).items()
            if name.startswith("_global_") and hasattr(hooks, "__len__")
        },
        "working directory": Path.cwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in _OTHERS},
    }


def _restore(state: dict[str, Any]) -> None:
    """Undo what would make the following tests fail too; the rest is only reported."""
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["grad mode"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.set_num_threads(state["threads"])
    os.chdir(state["working directory"])


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Seed the global generator, and fail a test that leaves global state changed."""
    torch.manual_seed(0)
    before = _global_state()
    yield
    after = _global_state()
    # Names alone: a value of the environment may be a secret.
    variables = before.pop("environment").items() ^ after.pop("environment").items()
    leaked = [f"environment variable {name}" for name in sorted({name for name, _ in variables})]
    leaked += [
        f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]
    ]
    if leaked:
        _restore(before)
        pytest.fail("global state left changed by the test: " + "; ".join(leaked))
