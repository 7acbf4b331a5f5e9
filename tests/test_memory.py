"""Memory: what is kept, how it is drawn, and that every change makes a new one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lifelong import Bernoulli, Categorical, Examples, Memory, checkpoint, identify, memorise
from lifelong.data import Batch
from lifelong.memory import remember
from lifelong.select import k_centre, per_class, top_k


def mlp(outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


INPUTS = torch.randn(23, 3, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.arange(23) ** 2 % 4  # only 0 and 1: two outputs stay without examples
DATA = Examples(INPUTS, LABELS, ids=torch.arange(23) + 100)


def items(
    n: int, *, head: tuple[int, ...] | None = None, task: int = 0, outputs: int = 4
) -> Memory:
    x = torch.arange(n * 2).reshape(n, 2).double()
    return remember(
        Batch(x, torch.zeros(n, dtype=torch.int64), torch.arange(n)),
        torch.randn(n, outputs).double(),
        head=head,
        task=task,
    )


def rows_of(memory: Memory) -> dict[str, Tensor]:
    return {k: v for k, v in memory.state_dict().items() if isinstance(v, Tensor)}


def same(a: Memory, b: Memory) -> bool:
    ours, theirs = rows_of(a), rows_of(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ------------------------------------------------------------------ memorise


@given(
    st.integers(1, 25),
    st.integers(1, 23),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["lambda", "residual"]),
)
def test_streaming_keeps_what_scoring_everything_at_once_would(
    batch_size, size, balanced, descending, score
):
    model = mlp()
    memory = memorise(
        model,
        DATA,
        Categorical(),
        budget=size,
        score=score,
        per_class=balanced,
        descending=descending,
        batch_size=batch_size,
    )
    scores = identify(model, DATA, Categorical(), score=score)
    chosen = (
        per_class(scores, LABELS, size, descending=descending)
        if balanced
        else top_k(scores, size, descending=descending)
    )
    assert sorted(memory.origin.tolist()) == sorted((chosen + 100).tolist())
    position = memory.origin - 100
    assert torch.equal(memory.inputs, INPUTS[position])
    assert torch.equal(memory.labels, LABELS[position])
    assert torch.allclose(memory.reference, model(INPUTS)[position].detach())
    assert torch.equal(memory.soft_weight, torch.ones(size).double())
    assert torch.equal(memory.hard_weight, torch.zeros(size).double())
    if balanced:
        assert torch.equal(memory.labels, memory.labels.sort().values)


def test_everything_is_kept_where_no_size_is_given():
    memory = memorise(mlp(), DATA, Categorical(), batch_size=5, task=7)
    assert torch.equal(memory.origin, DATA.ids)
    assert memory.task.unique().tolist() == [7]


def test_the_ids_that_are_named_are_kept():
    memory = memorise(mlp(), DATA, Categorical(), ids=torch.tensor([122, 103]), batch_size=5)
    assert memory.origin.tolist() == [103, 122]
    with pytest.raises(ValueError, match=r"ids \[5\] are not in the data"):
        memorise(mlp(), DATA, Categorical(), ids=torch.tensor([103, 5]))


def test_k_centre_keeps_the_outputs_that_are_farthest_apart():
    model = mlp()
    memory = memorise(model, DATA, Categorical(), budget=5, score="k_centre", batch_size=7)
    chosen = k_centre(model(INPUTS).detach(), 5)
    assert sorted(memory.origin.tolist()) == sorted((chosen + 100).tolist())


def test_labels_that_are_no_classes_are_not_balanced():
    y = torch.rand(23, 2).double().round()
    memory = memorise(mlp(2), Examples(INPUTS, y), Bernoulli(), budget=6, per_class=True)
    scores = identify(mlp(2), Examples(INPUTS, y), Bernoulli())
    assert torch.equal(memory.origin, top_k(scores, 6))


def test_a_size_beyond_the_data_is_refused():
    message = "a memory of 24 examples was asked for, but the task has 23; pass memory=23 or less"
    with pytest.raises(ValueError, match=message):
        memorise(mlp(), DATA, Categorical(), budget=24)


def test_dict_inputs_are_kept_as_dicts():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.net(x) * scale

    data = Examples({"x": INPUTS, "scale": torch.full((23, 1), 2.0).double()}, LABELS)
    memory = memorise(Named(), data, Categorical(), budget=4, batch_size=6)
    assert isinstance(memory.inputs, dict)
    assert memory.inputs["x"].shape == (4, 3)
    assert torch.equal(memory.inputs["scale"], torch.full((4, 1), 2.0).double())
    assert len(memory.add(memory)) == 8


# ------------------------------------------------------------------ draw


@given(st.integers(1, 12), st.integers(1, 12))
def test_the_weight_that_a_draw_gives_each_item_is_its_own_on_average(m, n):
    # Which items are drawn changes with u at multiples of 1 / m alone, so m points between them
    # are the whole expectation.
    memory, total = items(m), torch.zeros(m).double()
    for u in (torch.arange(m) + 0.5) / m:
        drawn = draw_at(memory, n, float(u))
        total.index_add_(0, drawn.origin, drawn.soft_weight)
    assert torch.allclose(total / m, torch.ones(m).double(), atol=1e-12)


def draw_at(memory: Memory, n: int, u: float) -> Memory:
    """A draw whose uniform numbers are all ``u``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda k, **_: torch.full((k,), u, dtype=torch.float64))
        return memory.draw(n)


@pytest.mark.parametrize(("m", "n"), [(10, 5), (7, 3), (5, 4)])
def test_a_draw_spreads_over_the_memory(m, n):
    for seed in range(50):
        drawn = items(m).draw(n, torch.Generator().manual_seed(seed))
        assert len(drawn) == n
        stretch = torch.arange(n) * m / n
        assert bool((drawn.origin >= stretch.floor()).all())
        assert bool((drawn.origin <= (stretch + m / n).floor()).all())
        assert torch.allclose(drawn.soft_weight, torch.full((n,), m / n).double())


def test_a_draw_of_all_is_the_memory_itself_and_needs_no_randomness():
    memory, before = items(6), torch.get_rng_state()
    assert memory.draw(None) is memory
    assert memory.draw(6) is memory
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one item, got batch_size=0"):
        items(6).draw(0)


# ------------------------------------------------------------------ change


def test_adding_merges_the_heads():
    memory = items(2, head=(0, 1)).add(items(1), items(3, head=(0, 1)), items(2, head=(2,)))
    assert memory.heads == ((0, 1), None, (2,))
    assert memory.head.tolist() == [0, 0, 1, 0, 0, 0, 2, 2]
    assert len(memory) == 8


def test_the_mask_of_an_item_is_that_of_its_head():
    memory = items(1, head=(0, 2)).add(items(1), items(1, head=(3,)))
    expected = [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert memory.mask is not None
    assert memory.mask.int().tolist() == expected
    assert items(2).mask is None


def test_dropping_and_slicing_leave_the_old_memory_as_it_was():
    memory = items(5)
    before = {k: v.clone() for k, v in rows_of(memory).items()}
    fewer = memory.drop(torch.tensor([True, False, True, False, False]))
    assert fewer.origin.tolist() == [1, 3, 4]
    assert memory[torch.tensor([4, 0])].origin.tolist() == [4, 0]
    assert memory[1:3].origin.tolist() == [1, 2]
    assert len(memory.scaled(3.0)) == 5
    assert all(torch.equal(rows_of(memory)[k], before[k]) for k in before)


def test_refresh_asks_the_model_again_and_changes_nothing_else():
    memory, model = items(5), nn.Linear(2, 4).double()
    fresh = memory.refresh(model, batch_size=2)
    assert torch.allclose(fresh.reference, model(memory.inputs).detach())
    assert not fresh.reference.requires_grad
    unchanged = rows_of(memory).keys() - {"reference"}
    assert all(torch.equal(rows_of(fresh)[k], rows_of(memory)[k]) for k in unchanged)


def test_weights_can_be_given_as_one_number_or_one_each():
    memory = items(3).weighted(0.5, torch.tensor([1.0, 2.0, 3.0]))
    assert memory.soft_weight.tolist() == [0.5, 0.5, 0.5]
    assert memory.hard_weight.tolist() == [1.0, 2.0, 3.0]
    assert memory.scaled(2).hard_weight.tolist() == [2.0, 4.0, 6.0]


def test_bytes_are_those_of_every_tensor():
    memory = items(3)  # 2 inputs, label, 4 outputs, 2 weights, task, origin, head: 8 bytes each
    assert memory.num_bytes == 3 * 8 * (2 + 1 + 4 + 2 + 3)


def test_another_dtype_keeps_labels_and_ids():
    memory = items(3).to(dtype=torch.float32)
    floats = {k for k, v in rows_of(memory).items() if v.dtype == torch.float32}
    assert floats == {"inputs", "reference", "soft_weight", "hard_weight"}
    assert memory.labels.dtype == torch.int64


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_memory_survives_a_file(tmp_path, as_dict):
    memory = items(3, head=(1, 2)).add(items(2))
    if as_dict:
        x = memory.inputs
        memory = Memory(**{**vars(memory), "inputs": {"x": x, "y": x + 1}})
    path = checkpoint.save(tmp_path / "m", memory.state_dict(), kind="memory")
    again = Memory.from_state_dict(checkpoint.load(path, kind="memory"))
    assert again.heads == memory.heads
    assert same(again, memory)
    if as_dict:
        assert torch.equal(again.inputs["y"], memory.inputs["y"])
