"""The benchmark of frozen features, at a size that means nothing: it runs and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks import frozen

from lifelong import Gaussian


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Six animals in two tasks of three, as ``benchmarks.features`` writes them."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(6, 8))
    for split, count in (("train", 22), ("test", 8)):
        labels = np.repeat(np.arange(6), count)
        inputs = (centres[labels] + 0.5 * generator.normal(size=(len(labels), 8))).astype("float32")
        path = tmp_path / f"animals30-{split}.npz"
        np.savez(path, inputs=inputs, labels=labels, ids=np.arange(len(labels)))
    return tmp_path


def config(**changes) -> frozen.Config:
    return frozen.Config(
        **{
            "sets": ("animals",),
            "memories": (2,),
            "precisions": (0.1, 1.0),
            "seeds": (0,),
            **changes,
        }
    )


def test_runs_and_resumes(features, tmp_path):
    out = tmp_path / "out"
    first = frozen.run(config(), features, out)
    methods = {row["method"] for row in first["animals"]["rows"]}
    assert methods == {*frozen.ALONE, *frozen.KEEPING}
    assert "| kprior | 2 |" in frozen.table(first)
    seen = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    again = frozen.run(config(), features, out)
    assert again == first
    assert seen == {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    more = frozen.run(config(seeds=(0, 1)), features, out)
    assert all(len(row["per_seed"]) == 2 for row in more["animals"]["rows"])


def test_regression_in_a_row_is_joint_regression(features):
    split = frozen.load("animals", features)
    together = frozen.joint(split, 1.0, likelihood=Gaussian())
    for seed in (0, 1):
        prior = frozen.ALONE["regression"](1.0)
        found = frozen.learn(split, prior, seed)
        right = (together(split.test.inputs).argmax(1) == split.test.labels).double().mean()
        assert found["accuracy"] == pytest.approx(float(right), abs=1e-9)


def test_the_precision_is_chosen_without_what_it_is_tested_on(features):
    split = frozen.load("animals", features)
    assert len(split.validation) == 6 * frozen.HELD_OUT
    tried = frozen.choose_precision(split, (0.1, 1.0))
    assert all(0 <= accuracy <= 1 for accuracy in tried.values())


def test_missing_features_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.features"):
        frozen.load("animals", tmp_path)
