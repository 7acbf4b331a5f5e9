"""The public names: listed, sorted, documented, safe to compare and to import."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import lifelong
from lifelong import Categorical, Diagonal, Examples, Regulariser, WeightTerm
from lifelong.presets import PRESETS

PUBLIC = {name: getattr(lifelong, name) for name in lifelong.__all__}


def test_all_is_sorted_and_is_what_is_exported():
    upper = sorted(n for n in lifelong.__all__ if n.isupper())
    classes = sorted(n for n in lifelong.__all__ if n[0].isupper() and not n.isupper())
    functions = sorted(n for n in lifelong.__all__ if n[0].islower())
    assert lifelong.__all__ == [*upper, *classes, *functions]
    assert set(lifelong.__all__) <= set(dir(lifelong))
    ours = {
        name
        for name, value in vars(lifelong).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and str(getattr(value, "__module__", "")).startswith("lifelong.")
    }
    assert ours == set(lifelong.__all__)


def test_every_preset_is_public_under_its_own_name():
    assert all(getattr(lifelong, name) is preset for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_object_says_what_it_is(name):
    value = PUBLIC[name]
    doc = value.__doc__
    assert doc
    if dataclasses.is_dataclass(value):  # which writes its signature by itself
        assert doc != name + str(inspect.signature(value)).replace(" -> None", "")
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and inspect.isfunction(member):
                assert inspect.getdoc(getattr(value, attribute)) or _of_protocol(attribute), (
                    f"{name}.{attribute} has no docstring"
                )


def _of_protocol(attribute: str) -> bool:
    """Documented once, in the protocol or in the term's own formula."""
    shared = {
        "nll", "mean", "residual", "hessian", "hessian_factor", "hessian_trace", "kl", "sample",
        "validate", "mask", "state_dict", "from_state_dict", "to", "diagonal", "draw", "value",
        "load_state_dict", "mv", "quad", "inverse_mv", "inverse_diagonal", "dense", "shapes",
    }  # fmt: skip
    return attribute in shared


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_recipe_is_a_value(name):
    one, other = (PRESETS[name](Categorical()).recipe for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert type(one).from_dict(one.to_dict()) == one


def test_small_values_are_equal_by_value():
    assert Categorical() == Categorical()
    assert lifelong.Gaussian(2.0) != lifelong.Gaussian(1.0)
    assert len({lifelong.KL(), lifelong.KL(), lifelong.Logit()}) == 2


def test_what_holds_tensors_compares_by_identity_and_can_be_hashed():
    def make() -> list[object]:
        x, y = torch.randn(4, 2), torch.arange(4) % 2
        model = torch.nn.Linear(2, 2)
        data = Examples(x, y)
        anchor = {"weight": torch.zeros(2, 2)}
        prior = lifelong.fromp(Categorical(), memory=4).update(model, data)
        memory = lifelong.memorise(model, data, Categorical())
        return [
            data, memory, prior, prior.terms[-1], lifelong.MemoryTerm(memory), Diagonal(anchor),
            Regulariser(1.0, anchor), WeightTerm(anchor), lifelong.Task(0, "t", data),
            lifelong.Posterior(anchor, Diagonal(anchor), 1.0),
        ]  # fmt: skip

    for one, other in zip(make(), make(), strict=True):
        assert one == one
        assert one != other
        assert len({one, other}) == 2


@pytest.mark.parametrize("cls", [c for c in PUBLIC.values() if dataclasses.is_dataclass(c)])
def test_values_are_frozen(cls):
    assert cls.__dataclass_params__.frozen


def test_importing_touches_nothing_and_loads_only_the_core():
    code = (
        "import sys, torch; state = torch.get_rng_state(); import lifelong; "
        "assert torch.equal(state, torch.get_rng_state()); "
        "print([m for m in ('pyarrow', 'sklearn', 'matplotlib', 'pandas', 'transformers', "
        "'lightning', 'PIL', 'rich', 'tyro', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr == ""
    assert found.stdout == "[]\n"
