"""``python -m benchmarks.adapters`` with random networks and tokens: it runs, records, goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("peft", reason="needs the extra hf")

from benchmarks import adapters

# Said by the newest transformers about what the newest PEFT does; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_cells_and_summary(tmp_path: Path) -> None:
    how = ["--tiny", "--out", str(tmp_path)]
    for method in ("prior", "joint"):
        adapters.main(["intents", "--method", method, *how])
    for strength in ("0", "100"):
        adapters.main(["texts", "--strength", strength, *how])
    found = adapters.summary(tmp_path)
    assert set(found) == {"intents_prior-1", "intents_joint", "texts_0", "texts_100"}
    assert 0 <= found["intents_prior-1"]["accuracy"]["mean"] <= 1
    assert "forgetting" not in found["intents_joint"]
    kept = [found[f"texts_{s}"]["after"][0]["mean"] for s in ("0", "100")]
    assert kept[1] != kept[0]  # both began with the same adapters
    assert found["texts_0"]["between"] == found["texts_100"]["between"]
    before = (tmp_path / "log.txt").read_text()
    adapters.main(["intents", "--method", "prior", *how])  # there already
    assert (tmp_path / "log.txt").read_text() == before
    assert set(json.loads((tmp_path / "config.json").read_text())) == {"intents", "texts"}


def test_the_parts_share_no_sentence() -> None:
    train, held, test = (set(adapters.prose(part)) for part in range(3))
    assert len(train) > 300
    assert len(held) > 60
    assert not train & held
    assert not train & test


def test_data_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data"):
        adapters.main(["intents", "--out", str(tmp_path)])
