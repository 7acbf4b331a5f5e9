"""Files: whatever is saved comes back, and whatever goes wrong leaves the last good file."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lifelong import CheckpointError, checkpoint

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda dtype, shape, seed: (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    ).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.sampled_from(["__tensor__", "__pairs__"])
nested = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        same_keys = list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b]
        return same_keys and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nested)
def test_any_nesting_of_tensors_and_plain_values_comes_back(tmp_path, state):
    path = checkpoint.save(tmp_path / "c", state, kind="test")
    assert equal(checkpoint.load(path, kind="test"), state)


@pytest.mark.parametrize("value", [{}, [], None, {"a": {}}, math.nan, math.inf, -math.inf, -0.0])
def test_empty_and_extreme_values_come_back(tmp_path, value):
    assert equal(checkpoint.load(checkpoint.save(tmp_path / "c", value, kind="t"), kind="t"), value)


def test_tensors_that_share_or_stretch_their_storage_come_back(tmp_path):
    x = torch.arange(6.0)
    state = {"whole": x, "again": x, "part": x[2:4], "turned": x.reshape(2, 3).T,
             "stretched": x[:1].expand(4), "learned": torch.nn.Parameter(x)}  # fmt: skip
    again = checkpoint.load(checkpoint.save(tmp_path / "c", state, kind="t"), kind="t")
    assert all(torch.equal(again[k], state[k]) for k in state)


def test_tuples_come_back_as_lists_and_as_keys_as_tuples(tmp_path):
    path = checkpoint.save(tmp_path / "c", {(1, "a"): (1, 2)}, kind="t")
    assert checkpoint.load(path, kind="t") == {(1, "a"): [1, 2]}


def test_an_optimiser_goes_on_as_if_never_saved(tmp_path):
    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    loaded = checkpoint.load(checkpoint.save(tmp_path / "c", state, kind="t"), kind="t")
    twin = torch.nn.Linear(2, 1)
    twin.load_state_dict(loaded["model"])
    other = torch.optim.Adam(twin.parameters(), lr=0.5)
    other.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("value", [object(), b"raw", {"a": {1, 2}}, torch.float32])
def test_what_cannot_be_held_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="cannot save a .*; expected tensors and plain values"):
        checkpoint.save(tmp_path / "c", value, kind="t")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ bad files


def good(folder: Path) -> Path:
    return checkpoint.save(folder / "c", {"x": torch.arange(5.0)}, kind="prior")


def foreign(path: Path, header: Any) -> Path:
    save_file({"x": torch.zeros(1)}, path, None if header is None else {"lifelong": header})
    return path


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*c"):
        checkpoint.load(tmp_path / "c", kind="prior")


@pytest.mark.parametrize("left", [0, 4, 20, -1])
def test_a_truncated_file(tmp_path, left):
    path = good(tmp_path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint .*last good one"):
        checkpoint.load(path, kind="prior")


def test_another_file(tmp_path):
    (tmp_path / "c").write_text("hello, this is a text about something else entirely")
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        checkpoint.load(tmp_path / "c", kind="prior")


def test_a_safetensors_file_of_another_library(tmp_path):
    with pytest.raises(CheckpointError, match="not one that lifelong wrote; expected a prior"):
        checkpoint.load(foreign(tmp_path / "c", None), kind="prior")


def test_another_kind(tmp_path):
    with pytest.raises(CheckpointError, match="holds a prior, expected a learner"):
        checkpoint.load(good(tmp_path), kind="learner")


def test_a_newer_version(tmp_path):
    header = json.dumps({"version": 99, "kind": "prior", "state": {}})
    with pytest.raises(CheckpointError, match="version 99, and this .* up to 1; upgrade lifelong"):
        checkpoint.load(foreign(tmp_path / "c", header), kind="prior")


@pytest.mark.parametrize(
    "header",
    [
        "{", "[]", "{}", '{"version": 1, "kind": "prior"}', '{"version": "1", "kind": "prior"}',
        '{"version": 1, "kind": "prior", "state": {"__tensor__": "7"}}',
        '{"version": 1, "kind": "prior", "state": {"__pairs__": [1]}}',
        '{"version": 1, "kind": "prior", "state": {"__pairs__": [[1, 2, 3]]}}',
        '{"version": 1, "kind": "prior", "state": ' + "[" * 200_000 + "]" * 200_000 + "}",
    ],
)  # fmt: skip
def test_a_damaged_header(tmp_path, header):
    path = foreign(tmp_path / "c", header)
    with pytest.raises(CheckpointError, match="has a header that cannot be read"):
        checkpoint.load(path, kind="prior")
    assert checkpoint.kind_of(path) in ("prior", None)


def test_a_kind_that_is_no_text(tmp_path):
    assert checkpoint.kind_of(foreign(tmp_path / "c", '{"kind": ["prior"]}')) is None


# ------------------------------------------------------------------ bad disks


def survives(path: Path, before: bytes) -> None:
    """The old file is whole, loads, and nothing lies beside it."""
    assert path.read_bytes() == before
    assert torch.equal(checkpoint.load(path, kind="prior")["x"], torch.arange(5.0))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = good(tmp_path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(OSError, match="could not write .*No space.*free some space") as caught:
            checkpoint.save(path, {"x": torch.zeros(9)}, kind="prior")
    assert caught.value.errno == errno.ENOSPC
    survives(path, before)


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, where, error):
    path = good(tmp_path)
    before = path.read_bytes()

    def stop(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, where, stop)
        with pytest.raises(error):
            checkpoint.save(path, {"x": torch.zeros(9)}, kind="prior")
    survives(path, before)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="cannot write to .*runs/x .*; choose another folder"):
        checkpoint.save(tmp_path / "runs" / "x" / "c", {}, kind="prior")
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="choose another folder"):
            checkpoint.save(tmp_path / "c", {}, kind="prior")
    finally:
        tmp_path.chmod(0o700)


def test_folders_are_made_and_text_is_written_whole(tmp_path):
    checkpoint.write(tmp_path / "a" / "b" / "log.txt", "café\n")
    assert (tmp_path / "a" / "b" / "log.txt").read_text(encoding="utf-8") == "café\n"
