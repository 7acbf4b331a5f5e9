"""What notebooks show: well-formed, escaped, and the numbers of the value."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import lifelong
from lifelong import AccuracyMatrix, Categorical, Posterior
from lifelong.notebook import table
from lifelong.reconstruction import fidelity


class Cells(HTMLParser):
    """Texts of the cells, and that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in ("table", "caption", "thead", "tbody", "tr", "th", "td", "p"), tag
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_text_is_escaped() -> None:
    bad = "<script>alert('x')</script>&"
    cells = Cells(table(bad, [(bad, bad)], columns=[bad], note=bad))
    assert cells.texts == [bad] * 5


def test_a_matrix_has_its_numbers() -> None:
    matrix = AccuracyMatrix.from_list([[0.5, None], [0.25, 1.0]])
    texts = Cells(matrix._repr_html_()).texts
    assert texts[:7] == ["Accuracy (%)", "on 1", "on 2", "after 1", "50.0", "after 2", "25.0"]
    assert "average 62.5; forgetting 25.0" in texts


@pytest.fixture(scope="module")
def learned() -> Any:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = torch.randn(30, 4), torch.arange(30) % 3
    return model, data, lifelong.recommended(Categorical(), memory=6).update(model, data)


def test_priors_and_memories(learned: Any) -> None:
    _, _, prior = learned
    texts = Cells(prior._repr_html_()).texts
    assert texts[0] == "Prior: recommended"
    assert "30 examples in 1 tasks" in texts
    shown = Cells(prior.memory._repr_html_()).texts
    assert shown[:3] == ["Memory", "examples", "6"]
    assert "1: 6" in shown


def test_posteriors_and_fidelity(learned: Any) -> None:
    model, data, prior = learned
    posterior = Posterior.laplace(model, data, Categorical(), prior_precision=2.0)
    texts = Cells(posterior._repr_html_()).texts
    assert texts[:5] == ["Posterior", "parameters", "15", "curvature", "Diagonal"]
    report = fidelity(prior, model, data, posterior=posterior, samples=2)
    assert Cells(report._repr_html_()).texts[0].startswith("Fidelity of 30 examples")
