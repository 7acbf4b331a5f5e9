"""Augmentation of whole batches: against a loop over images, and what must not change."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Examples, Learner
from lifelong.augment import AUGMENTATIONS, crop_flip, elastic, shift
from lifelong.divergences import KL
from lifelong.streams import Task

SIZES = st.tuples(*(st.integers(1, n) for n in (5, 3, 18, 18)))


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)


def moved(image: Tensor, down: int, right: int, mirror: bool) -> Tensor:
    """(C, H, W), pixel by pixel: out[y, x] = in[y + down, x' + right], x' mirrored; 0 outside."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            row, column = y + down, (width - 1 - x if mirror else x) + right
            if 0 <= row < height and 0 <= column < width:
                out[:, y, x] = image[:, row, column]
    return out


@given(SIZES, st.integers(0, 99), st.sampled_from(["crop-flip", "shift"]))
def test_each_image_is_one_of_the_moves_of_itself(shape, seed, name):
    x = images(shape, seed)
    part, mirrors = {"crop-flip": (8, (False, True)), "shift": (14, (False,))}[name]
    down, right = (max(side // part, int(side > 1)) for side in shape[2:])
    got = AUGMENTATIONS[name](x, torch.Generator().manual_seed(seed))
    assert isinstance(got, Tensor)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    for image, changed in zip(x, got, strict=True):
        assert any(
            torch.equal(changed, moved(image, i, j, mirror))
            for i in range(-down, down + 1)
            for j in range(-right, right + 1)
            for mirror in mirrors
        )


def test_every_move_occurs_and_the_images_are_drawn_apart():
    x = images((1, 1, 8, 8)).expand(600, 1, 8, 8)
    got = torch.as_tensor(crop_flip(x, torch.Generator().manual_seed(0)))
    _, counts = got.unique(dim=0, return_counts=True)
    assert len(counts) == 3 * 3 * 2  # one pixel of eight, either way, mirrored or not
    assert counts.min() > 10  # 33 are expected


def test_the_generator_decides_and_only_it():
    x = images((20, 3, 16, 16))
    first, again, other = (
        torch.as_tensor(crop_flip(x, torch.Generator().manual_seed(s))) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    crop_flip(x, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    shift(x)  # no generator: torch's own
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 4), {"x": torch.zeros(2, 1, 4, 4)}])
@pytest.mark.parametrize("augment", AUGMENTATIONS.values())
def test_only_images_are_augmented(inputs: Any, augment: Any):
    with pytest.raises(ValueError, match=r"images of shape \(B, C, H, W\) to augment"):
        augment(inputs, None)


def bent(x: Tensor, seed: int) -> Tensor:
    """(B, C, H, W), pixel by pixel: out[p] = in[A p + b + v(p)] in pixels from the middle."""
    g = torch.Generator().manual_seed(seed)
    batch, _, height, width = x.shape
    angle, stretch, right, down = (2 * torch.rand(batch, generator=g) - 1 for _ in range(4))
    field = torch.randn(batch, 2, 5, 5, generator=g)
    out = torch.zeros_like(x)

    def between(values: Tensor, row: float, column: float) -> Tensor:
        """Bilinear in the last two dimensions, 0 outside."""
        total = torch.zeros(values.shape[:-2], dtype=values.dtype)
        top, left = math.floor(row), math.floor(column)
        for r in (top, top + 1):
            for c in (left, left + 1):
                if 0 <= r < values.shape[-2] and 0 <= c < values.shape[-1]:
                    total += (1 - abs(row - r)) * (1 - abs(column - c)) * values[..., r, c]
        return total

    for n in range(batch):
        a, s = math.radians(10) * float(angle[n]), 1 / (1 + 0.1 * float(stretch[n]))
        for i in range(height):
            for j in range(width):
                # Each side is 2 long, from the outer edge of its first pixel to that of its last.
                v, u = (2 * i + 1) / height - 1, (2 * j + 1) / width - 1
                nodes = 4 * i / max(1, height - 1), 4 * j / max(1, width - 1)
                bend = between(field[n].double(), *nodes) * 3 / 28
                x_at = (
                    s * (math.cos(a) * u - math.sin(a) * v) + float(right[n]) / 7 + float(bend[0])
                )
                y_at = s * (math.sin(a) * u + math.cos(a) * v) + float(down[n]) / 7 + float(bend[1])
                row, column = ((y_at + 1) * height - 1) / 2, ((x_at + 1) * width - 1) / 2
                out[n, :, i, j] = between(x[n], row, column)
    return out


@settings(max_examples=15)
@given(st.tuples(*(st.integers(*n) for n in ((1, 2), (1, 2), (2, 9), (2, 9)))), st.integers(0, 99))
def test_elastic_is_what_it_says_pixel_by_pixel(shape, seed):
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = torch.as_tensor(elastic(x, torch.Generator().manual_seed(seed)))
    assert torch.allclose(got, bent(x, seed), atol=1e-4)  # the grid is in float32


@given(SIZES, st.integers(0, 99))
def test_elastic_rounds_bytes_and_leaves_black_alone(shape, seed):
    x = images(shape, seed)
    whole, fine = (
        torch.as_tensor(elastic(v, torch.Generator().manual_seed(seed))) for v in (x, x.double())
    )
    assert (whole.shape, whole.dtype, fine.dtype) == (x.shape, x.dtype, torch.float64)
    assert (whole.double() - fine).abs().max() < 0.51
    assert fine.min() >= 0
    assert fine.max() <= 255 + 1e-6
    assert not torch.as_tensor(elastic(torch.zeros_like(x), torch.Generator())).any()


# In training --------------------------------------------------------------------------------------


def task(n: int = 24) -> Task:
    x = images((n, 1, 14, 14))
    return Task(0, "images", Examples(x.float() / 255, torch.arange(n) % 4))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 8), nn.Tanh(), nn.Linear(8, 4))


def test_new_and_remembered_inputs_change_and_soft_labels_do_not():
    model, data = network(), task().train
    prior = lifelong.kprior(Categorical(), memory=6, precision=1e-2).update(model, data)
    trained = network(1)
    memory = prior.memory
    assert memory is not None

    def augment(x: Any) -> Any:
        return torch.as_tensor(x).flip(3)

    got = prior.loss(trained, data.inputs, data.labels, num_data=24, augment=augment)
    nll = nn.functional.cross_entropy(trained(augment(data.inputs)), data.labels)
    f = trained(augment(memory.inputs))
    past = KL()(Categorical(), model(memory.inputs).detach(), f).sum()
    assert torch.allclose(got, nll + (prior.weight_space(trained) + past) / 24, rtol=1e-5)


def test_kernels_are_of_the_inputs_as_they_are():
    model, data = network(), task().train
    prior = lifelong.fromp(Categorical(), memory=6).update(model, data)
    trained = network(1)
    loss = {"num_data": 24, "augment": lambda x: torch.as_tensor(x) * 0}
    got = prior.loss(trained, data.inputs, data.labels, **loss)
    blank = nn.functional.cross_entropy(trained(torch.zeros(24, 196)), data.labels)
    assert torch.allclose(got, blank + prior(trained) / 24, rtol=1e-5)


@pytest.mark.parametrize("prior", [lifelong.kprior(Categorical(), memory=6)], ids=["kprior"])
def test_what_is_known_of_the_past_is_of_the_inputs_as_they_are(prior):
    """Only ``fit`` augments: the same weights give the same prior."""
    priors = []
    for augment in (None, shift):
        learner = Learner(network(), prior, augment=augment, batch_size=8)
        learner.recall(task(), learner.memorise(task()))
        priors.append(learner.prior)
    plain, augmented = (p.memory for p in priors)
    assert torch.equal(plain.inputs, augmented.inputs)
    assert torch.equal(plain.reference, augmented.reference)


@pytest.mark.parametrize("preset", [lifelong.finetune, lifelong.joint])
def test_a_learner_augments_what_it_trains_on(preset):
    weights = []
    for augment in (None, shift, shift):
        learner = Learner(network(), preset(Categorical()), augment=augment, batch_size=8)
        learner.fit(task())
        weights.append(learner.model[1].weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def turned(x: Any) -> Any:
    return torch.as_tensor(x).flip(3)


def test_the_anchor_is_asked_about_the_changed_input():
    """D(f*(T x), f(T x)) with f* of the anchor, whose stored answers at x take no part."""
    model, data = network(), task().train
    prior = lifelong.gradient_reconstruction(
        Categorical(), memory=6, ask=True, structure="kronecker", strength=2.0
    )
    prior = prior.update(model, data)
    memory, trained = prior.memory, network(1)
    assert memory is not None
    got = prior.loss(trained, data.inputs, data.labels, num_data=24, augment=turned)
    nll = nn.functional.cross_entropy(trained(turned(data.inputs)), data.labels)
    changed = turned(memory.inputs)
    distance = KL()(Categorical(), model(changed).detach(), trained(changed))
    past = prior.weight_space(trained) + torch.dot(memory.soft_weight, distance)
    assert torch.allclose(got, nll + past / 24, rtol=1e-5)


def test_a_prior_that_asks_is_zero_and_flat_at_the_anchor_under_augmentation():
    model, data = network().double(), task().train
    inputs = torch.as_tensor(data.inputs).double()
    slopes = {}
    for ask in (True, False):
        prior = lifelong.gradient_reconstruction(Categorical(), memory=6, ask=ask, strength=1.0)
        prior = prior.update(model, (inputs, data.labels))
        loss = prior.loss(model, inputs, data.labels, num_data=24, augment=turned)
        plain = nn.functional.cross_entropy(model(turned(inputs)), data.labels)
        slope = torch.autograd.grad(loss - plain, list(model.parameters()))
        slopes[ask] = abs((loss - plain).item()), max(float(g.abs().max()) for g in slope)
    assert max(slopes[True]) < 1e-14
    assert min(slopes[False]) > 1e-4


def test_who_has_no_one_anchor_or_no_soft_label_is_not_asked():
    model, data = network(), task().train
    asking = lifelong.gradient_reconstruction(Categorical(), memory=6, ask=True, strength=1.0)
    prior, plain = (
        replace(asking, recipe=replace(asking.recipe, ask=ask)).update(
            model, data, generator=torch.Generator().manual_seed(0)
        )
        for ask in (True, False)
    )
    loss = {"num_data": 24, "augment": turned}
    trained = network(1)
    for a, b in [(prior + prior, plain + plain), (strip(prior), strip(plain))]:
        values = [p.loss(trained, data.inputs, data.labels, **loss) for p in (a, b)]
        assert torch.equal(*values)


def strip(prior: Any) -> Any:
    """Every item by its true label."""
    terms = (
        replace(t, memory=t.memory.weighted(0.0, 1.0)) if hasattr(t, "memory") else t
        for t in prior.terms
    )
    return replace(prior, terms=tuple(terms))


def test_a_class_that_did_not_exist_stays_impossible_when_the_anchor_is_asked():
    model, data = network(), task().train
    prior = lifelong.gradient_reconstruction(Categorical(), memory=6, ask=True, strength=1.0)
    prior = prior.update(model, data)
    wide = nn.Sequential(*list(network())[:3], nn.Linear(8, 5))
    prior = prior.grow(wide)
    memory = prior.memory
    assert memory is not None
    assert memory.reference.shape[1] == 5
    zero = torch.zeros(24, dtype=torch.int64)
    got = prior.loss(wide, data.inputs, zero, num_data=24, augment=turned)
    old = nn.Sequential(*list(network())[:3], nn.Linear(8, 5))
    assert prior.weight is not None
    old.load_state_dict(prior.weight.anchor)
    changed = turned(memory.inputs)
    reference = torch.where(memory.reference <= -1e4, memory.reference, old(changed).detach())
    distance = KL()(Categorical(), reference, wide(changed))
    nll = nn.functional.cross_entropy(wide(turned(data.inputs)), zero)
    past = prior.weight_space(wide) + torch.dot(memory.soft_weight, distance)
    assert torch.allclose(got, nll + past / 24, rtol=1e-5)
    assert bool((reference[:, 4] == -1e4).all())


@pytest.mark.parametrize("head", [None, (0, 1, 2)])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_who_asks_cuts_the_answer_as_the_stored_ones_are_cut(batch_size: Any, head: Any):
    """What is cut off is in g: inputs that stay as they are give the prior without augmentation."""
    model, data = network(), task().train
    data = Examples(data.inputs, data.labels % 3, head=head)
    prior = lifelong.recommended(Categorical(), memory=6, top_outputs=2).update(model, data)
    values = [
        prior.loss(
            network(1), data.inputs, data.labels, num_data=24, head=head, augment=augment,
            batch_size=batch_size, generator=torch.Generator().manual_seed(0),
        )
        for augment in (None, lambda x: x)
    ]  # fmt: skip
    assert torch.allclose(*values, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"refresh": False}, {"kernel": "gp"}, {"compact": "em"}])
def test_beliefs_of_one_input_each_cannot_be_asked_for_others(wrong: Any):
    with pytest.raises(ValueError, match="ask asks the newest weights"):
        lifelong.Recipe(ask=True, memory=4, **wrong)
