"""The interface for programs, asked at random by its own description: no answer is a 5xx, and each
is as described."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).parent.parent))

from app_client import Client, served
from lifelong.app import workspace
from lifelong.data import Batch
from lifelong.memory import remember
from lifelong.store import open_store


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("interface") / "store"
    batch = Batch(torch.rand(300, 16), torch.arange(300) % 3, torch.arange(300))
    with open_store(folder, "a") as store:
        store.append(remember(batch, torch.randn(300, 3), task=0))
    with served(workspace(folder)) as client:
        yield client


OFTEN = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def ask(headers: dict[str, str], seen: dict[str, set[int]], name: str, case: Any) -> None:
    answer = case.call(headers=headers)
    seen.setdefault(name, set()).add(answer.status_code)
    assert answer.status_code < 500, answer.text
    case.validate_response(answer)


def test_every_answer_is_as_described(client: Client) -> None:
    headers = {"Cookie": client.cookie, "Origin": client.origin}
    described = schemathesis.openapi.from_url(f"{client.origin}/api/openapi.json", headers=headers)
    seen: dict[str, set[int]] = {}
    for found in described.get_all_operations():
        operation = found.ok()
        name = f"{operation.method.upper()} {operation.path}"

        @OFTEN
        @given(case=operation.as_strategy())
        def asked(case: Any) -> None:
            ask(headers, seen, name, case)  # noqa: B023  # called at once

        asked()
    assert set(seen) == {
        "GET /api/memory",
        "GET /api/items/{number}",
        "GET /api/jobs/{number}",
        "POST /api/drop",
    }
    assert 200 in seen["GET /api/memory"]
