r"""The cost model: what a run needs in bytes, seconds and communication, before it is started.

Plain arithmetic: nothing is allocated. In all formulas P is the number of trainable parameters, F
the floating point operations of one forward pass on one example, C the outputs and H those that
compete within a task, T tasks of N examples each, M remembered examples in all, D devices. Numbers
of the network are 4 bytes each. A backward pass costs two forward passes (one product for the
inputs' gradient, one for the weights'), so a training step on B examples costs 3 B F.

``benchmarks.planning`` compares the formulas with what is measured: bytes are exact, seconds are as
good as the throughput that they start from. docs/scaling.md reasons with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import suggestion
from .likelihoods import Categorical
from .presets import PRESETS
from .prior import Prior
from .recipe import Recipe
from .strength import STEPS as STEPS_OF_STRENGTH

FLOAT = 4  # bytes of a weight, of a curvature's entry, of a logit
PLACE = 4  # of the number of an output that is kept
# A remembered item: label, task, origin, head as int64; soft and hard weight as float32.
BOOKKEEPING = 4 * 8 + 2 * 4
OPTIMIZERS: Mapping[str, int] = {"sgd": 1, "adam": 2}  # vectors of state: momentum; two moments
SMALLEST_REHEARSAL = 32  # items a step of the search for a strength reads at least (strength.py)


@dataclass(frozen=True)
class Layer:
    """A linear or convolutional layer as a matrix: outputs, inputs (a convolution's patch, and one
    more for a bias), positions at which an example uses it, and how many such matrices there are.
    height: of a convolution's kernel that moves down one row at a time, else 1.
    """

    outputs: float
    inputs: float
    positions: float
    count: float = 1.0
    height: float = 1.0


@dataclass(frozen=True)
class Network:
    """parameters: P; flops: F, a multiplication and an addition being two; input_bytes: of an
    example as it is remembered; outputs: C; activations: numbers that a training step keeps for
    each example; buffers: bytes of running statistics; layers: those with Kronecker factors."""

    name: str
    parameters: float
    flops: float
    input_bytes: float
    outputs: int
    activations: float = 0.0
    buffers: float = 0.0
    layers: tuple[Layer, ...] = ()

    @property
    def products(self) -> tuple[Layer, ...]:
        """Its layers; of a network that is known by its size alone, square ones of 1024 x 1024,
        whose F are 2 P for each position."""
        if self.layers:
            return self.layers
        side = 1024.0
        each = self.parameters / side**2
        return (Layer(side, side, self.flops / (2 * self.parameters), each),)


@dataclass(frozen=True)
class Device:
    """flops: operations a second that training reaches (peak x efficiency); memory: bytes;
    bandwidth: bytes a second of its memory; link: bytes a second to the other devices; price: of an
    hour, in any currency; products: how many times as fast it multiplies matrices in
    bfloat16 where ``flops`` are of another precision."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    price: float = 0.0
    products: float = 1.0


# Peak of dense bfloat16 products, memory, its bandwidth, one direction of the link: data sheets.
DEVICES: Mapping[str, Device] = {
    d.name: d
    for d in (
        Device("v100", 125e12, 32e9, 0.9e12, 150e9),
        Device("a100", 312e12, 80e9, 2.0e12, 300e9),
        Device("h100", 989e12, 80e9, 3.35e12, 450e9),
        Device("h200", 989e12, 141e9, 4.8e12, 450e9),
    )
}


@dataclass(frozen=True)
class Work:
    """What is to be learned, and how.

    tasks: T; examples: T N, of all tasks; memory: M, remembered examples in all, after the last
    task; head: H, outputs that compete in a task; batch: new examples of a step, on all devices
    together; memory_batch: remembered ones; epochs: over each task; augment: whether inputs are
    changed at random, so that ``Recipe.ask`` costs its forward pass; sharded: each process holds
    its own part of the memory instead of all of it.
    """

    tasks: int
    examples: float
    memory: float
    head: int
    devices: int = 1
    epochs: float = 16
    batch: int = 1024
    memory_batch: int = 256
    optimizer: str = "sgd"
    augment: bool = True
    sharded: bool = False

    @property
    def task_size(self) -> float:
        """N."""
        return self.examples / self.tasks

    @property
    def task_memory(self) -> float:
        """Items of each task, where each task has its own: at most all of its examples."""
        return min(self.memory / self.tasks, self.task_size)


@dataclass(frozen=True)
class Estimate:
    """What one preset costs on one work. All bytes and seconds are at the last task, where most is
    remembered, but ``seconds``, which is of all tasks by component; forward passes that are shared
    by the devices take their share of time.

    on_device, in_ram: bytes of each process by component; disk: bytes of the newest checkpoint and
    of the one that it replaces; prior: ``Prior.num_bytes``; step: seconds by component;
    step_traffic, task_traffic: bytes that each process sends for a step, and for an update.
    """

    preset: str
    on_device: Mapping[str, float]
    in_ram: Mapping[str, float]
    disk: float
    prior: float
    step: Mapping[str, float]
    steps: float
    step_traffic: float
    update: Mapping[str, float]
    task_traffic: float
    seconds: Mapping[str, float]
    price: float
    fits: bool

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """The component that takes the most time."""
        return max(self.seconds, key=lambda name: self.seconds[name])


# Bytes --------------------------------------------------------------------------------------------


def vectors(prior: Prior) -> int:
    """Vectors of P numbers that a prior holds after a task: anchor, g, G.

    The anchor is there for everything that is expanded round it (and to be asked); G where there is
    a structure with one number for each weight; g where the recipe computes one that is not 0: of
    the data ("stored", "carried"), minus the regulariser's, minus that of replayed labels, or of
    what soft labels leave out (``Recipe.top_outputs``).
    """
    recipe = _known(prior.recipe)
    has_curvature = recipe.structure is not None
    diagonal = recipe.structure in ("diagonal", "path")
    anchored = recipe.gradient != "none" or (has_curvature and not recipe.kernel)
    anchor = anchored or bool(recipe.distil) or recipe.ask
    precision = prior.regulariser is not None and prior.regulariser.precision > 0
    says = recipe.keeps_memory and bool(_share_with_slope(recipe))
    own = precision or (recipe.gradient == "stationary" and says)
    g = recipe.gradient in ("stored", "carried") or (recipe.gradient != "none" and own)
    return int(anchor) + int(diagonal) + int(g)


def _share_with_slope(recipe: Recipe) -> float:
    """The part of the memory whose own gradient at the anchor is not 0: what is replayed by its
    labels, and all whose soft labels are cut short."""
    if recipe.top_outputs is not None:
        return 1.0
    return recipe.replay_fraction or float(bool(recipe.hard))


def item_bytes(network: Network, recipe: Recipe) -> float:
    """A remembered example: its input, C logits or k of them with their places and one number for
    the others (``Recipe.top_outputs``), label, weights and where it came from."""
    k = recipe.top_outputs
    soft = FLOAT * network.outputs if k is None else (FLOAT + PLACE) * k + FLOAT
    return network.input_bytes + soft + BOOKKEEPING


def items(recipe: Recipe, work: Work, tasks: float | None = None) -> float:
    """Remembered examples after task ``tasks``, t (by default the last): t parts of M, or min(M,
    t N) where one memory is for all; all where the recipe keeps all."""
    if not recipe.keeps_memory:
        return 0.0
    seen = work.examples if tasks is None else work.task_size * tasks
    if recipe.memory is None or recipe.total:
        return seen if recipe.memory is None else min(work.memory, seen)
    return min(work.memory, work.examples) * seen / work.examples


def factor_bytes(recipe: Recipe, network: Network) -> float:
    """G as one Kronecker product for each layer of O outputs and I inputs: O² + I² numbers, however
    many tasks; one number for each parameter of other layers (normalisation)."""
    if recipe.structure != "kronecker":
        return 0.0
    numbers = sum(x.count * (x.outputs**2 + x.inputs**2) for x in network.products)
    covered = sum(x.count * x.outputs * x.inputs for x in network.products)
    return FLOAT * (numbers + max(0.0, network.parameters - covered))


def kernel_bytes(recipe: Recipe, work: Work) -> float:
    """FROMP: for each task H inverse kernels of m x m numbers (none where the kernel is the
    identity) and m x H means: 4 T H m (m + 1) bytes with m = M / T items of a task."""
    if recipe.kernel is None:
        return 0.0
    m = work.task_memory
    matrix = m if recipe.kernel == "gp" else 0.0
    return FLOAT * work.tasks * work.head * m * (matrix + 1)


def prior_bytes(prior: Prior, network: Network, work: Work) -> float:
    """``Prior.num_bytes`` after the last task: 4 P for each vector, the items, the factors of G,
    the kernels."""
    remembered = items(prior.recipe, work) * item_bytes(network, prior.recipe)
    weights = FLOAT * network.parameters * vectors(prior)
    beside = factor_bytes(prior.recipe, network) + kernel_bytes(prior.recipe, work)
    return weights + remembered + beside


def device_bytes(prior: Prior, network: Network, work: Work) -> dict[str, float]:
    """On each device: weights, their gradient and the optimiser's state are P numbers each (and
    replicated, as DDP does), and factors of G have a copy in bfloat16 (``Prior.rounded``);
    activations are of the examples that a device reads in a step."""
    p = FLOAT * network.parameters
    read = (work.batch + drawn(prior.recipe, work)) / work.devices
    return {
        "weights": p + network.buffers,
        "gradient": p,
        "optimiser": OPTIMIZERS[work.optimizer] * p,
        "prior": p * (vectors(prior) + (4 if prior.recipe.structure == "path" else 0))
        + 1.5 * factor_bytes(prior.recipe, network)
        + kernel_bytes(prior.recipe, work),
        "activations": FLOAT * network.activations * read,
    }


def ram_bytes(prior: Prior, network: Network, work: Work) -> dict[str, float]:
    """Beside each device: the memory's items, all of them or a D-th; of LwF the task's inputs."""
    held = items(prior.recipe, work) + (work.task_size if prior.recipe.distil else 0.0)
    share = work.devices if work.sharded else 1
    return {"memory": held * item_bytes(network, prior.recipe) / share}


def checkpoint_bytes(prior: Prior, network: Network, work: Work) -> float:
    """A learner's file: weights, those that it started from, the optimiser, the prior, and for
    "separate" one more network for each task."""
    p = FLOAT * network.parameters
    networks = 2 + (work.tasks if prior.recipe.reference == "separate" else 0)
    state = OPTIMIZERS[work.optimizer] * p
    return networks * (p + network.buffers) + state + prior_bytes(prior, network, work)


# One step -----------------------------------------------------------------------------------------


def drawn(recipe: Recipe, work: Work) -> float:
    """Remembered examples that a step reads: ``memory_batch``, or all where there are fewer. Of
    kernels whole tasks are drawn, at least one. Joint training reads no second batch."""
    if recipe.reference is not None:
        return 0.0
    if recipe.distil:
        return min(work.memory_batch, work.task_size)
    held = items(recipe, work)
    if recipe.kernel is not None:
        m = work.task_memory
        blocks = work.memory_batch * work.tasks // max(1, held)
        return m * max(1, min(work.tasks, blocks))
    return min(work.memory_batch, held)


def step_seconds(prior: Prior, network: Network, work: Work, device: Device) -> dict[str, float]:
    """One step, by component; each device reads a D-th of the examples.

    new, remembered: 3 F for each example, and F more where the anchor is asked about it.
    weights: passes over P numbers at the memory's bandwidth. The optimiser reads weights, gradient
    and its state and writes weights and state; the prior reads the weights and its vectors and adds
    to the gradient; a path integral copies the weights and takes the prior's gradient again.
    factors: L D R of each layer, 2 O I (O + I) operations, on each device.
    kernels: H m² numbers of each block drawn are read once. communication: see ``all_reduce``.
    """
    recipe = prior.recipe
    rate = device.flops * work.devices
    asks = 1 if recipe.ask and work.augment else 0
    m = drawn(recipe, work)
    v, state = vectors(prior), OPTIMIZERS[work.optimizer]
    passes = 3 + 2 * state + (v + 2 if v else 0) + (4 if recipe.structure == "path" else 0)
    blocks = m / work.task_memory if recipe.kernel and m else 0.0
    kernels = FLOAT * blocks * work.head * work.task_memory**2 if recipe.kernel == "gp" else 0.0
    sent = all_reduce(FLOAT * network.parameters, work.devices)
    products = 0.0
    if recipe.structure == "kronecker":
        sides = ((x, x.outputs + x.inputs) for x in network.products)
        products = sum(2 * x.count * x.outputs * x.inputs * side for x, side in sides)
    return {
        "new examples": 3 * network.flops * work.batch / rate,
        "remembered examples": (3 + asks) * network.flops * m / rate,
        "weights": FLOAT * network.parameters * passes / device.bandwidth,
        "factors": products / (device.flops * device.products),
        "kernels": kernels / device.bandwidth,
        "communication": sent / device.link,
    }


def all_reduce(size: float, devices: int) -> float:
    """Bytes that each of D processes sends to sum ``size`` bytes over all, in a ring: first each
    sends D - 1 pieces of a D-th to be summed, then as many to be spread: 2 (D - 1) / D of it."""
    return 2 * size * (devices - 1) / devices


def num_steps(recipe: Recipe, work: Work) -> float:
    """Steps of the run: epochs x N / B a task; joint training passes over all tasks so far, so
    that its tasks are 1, 2, ..., T times as long: (T + 1) / 2 times as many steps."""
    growth = (work.tasks + 1) / 2 if recipe.reference == "joint" else 1.0
    return work.tasks * growth * work.epochs * max(1.0, work.task_size / work.batch)


# One update ---------------------------------------------------------------------------------------


def update_passes(
    prior: Prior, network: Network, work: Work, tasks: float | None = None
) -> dict[str, float]:
    """What an update after task ``tasks`` (by default the last) computes, in forward passes of one
    example (operations / F).

    scoring: F for each new example, unless items are drawn at random: then only for those kept.
    labels: the new outputs of all remembered examples; LwF's of the new inputs.
    curvature: over n examples, one forward pass and a backward pass (2 F) for each of H directions,
    1 where they are sampled. n is N less what is kept, or ``curvature_examples``.
    factors: of a Kronecker G over S positions and K directions, for each of the n examples: half
    of K matrices of 2 S O² operations, since they are symmetric, and of one of 2 S I²; kernels of
    h rows share their products (``curvature.kfac``), 2 S I² / h.
    strength: 100 steps on the items, a gradient (3 F) and two values (F each) of the n examples.
    gradient: 3 F for each example whose own gradient is taken.
    kernels: H backward passes for each item of each task, then products of H m x P matrices with
    themselves, 2 H m² P operations a task: all tasks again, since the anchor has moved.
    """
    recipe = prior.recipe
    tasks = work.tasks if tasks is None else tasks
    n, m = work.task_size, work.task_memory if recipe.keeps_memory else 0.0
    held = items(recipe, work, tasks)
    if recipe.memory is None and recipe.keeps_memory:
        m = n
    scored = n if recipe.score != "random" or recipe.memory is None else m
    rest = max(0.0, n - m) if recipe.exclude_memory and not recipe.kernel else n
    if recipe.curvature_examples is not None:
        rest = min(rest, recipe.curvature_examples)
    fitted = recipe.structure is not None and recipe.structure != "path"
    directions = work.head if recipe.estimator == "exact" else 1
    rehearsed = max(SMALLEST_REHEARSAL, n / STEPS_OF_STRENGTH)
    slopes = (
        _share_with_slope(recipe) * held
        if recipe.gradient in ("stored", "carried", "stationary")
        else 0.0
    )
    past = held if recipe.gradient in ("stored", "carried") else 0.0
    refreshed = recipe.refresh and recipe.soft and recipe.keeps_memory
    passes = {
        "scoring": scored if recipe.keeps_memory else 0.0,
        "labels": (held if refreshed else 0.0) + (n if recipe.distil else 0.0),
        "curvature": rest * (1 + 2 * directions) if fitted else 0.0,
        "factors": 0.0,
        "strength": 0.0,
        "gradient": 3 * (slopes + past + (n if recipe.gradient == "stored" else 0.0)),
        "kernels": 0.0,
    }
    if recipe.structure == "kronecker":
        sums = (
            x.count
            * x.positions
            * (x.inputs**2 * (2 / x.height if x.height > 1 else 1) + directions * x.outputs**2)
            for x in network.products
        )
        passes["factors"] = rest * sum(sums) / network.flops
    if recipe.strength == "auto" and fitted:
        passes["strength"] = 3 * STEPS_OF_STRENGTH * min(m, rehearsed) + 5 * rest
    if recipe.kernel == "gp":
        products = 2 * work.head * m**2 * network.parameters / network.flops
        passes["kernels"] = tasks * (m * (1 + 2 * work.head) + products)
    return passes


def update_seconds(
    prior: Prior, network: Network, work: Work, device: Device, tasks: float | None = None
) -> dict[str, float]:
    """``update_passes`` in seconds, each device a D-th of the examples."""
    rate = device.flops * work.devices / network.flops
    return {k: v / rate for k, v in update_passes(prior, network, work, tasks).items()}


def task_traffic(prior: Prior, network: Network, work: Work) -> float:
    """Bytes that each process sends for an update: G and a gradient of the data are sums, one
    all-reduce each; the chosen items go to every other process unless the memory is sharded."""
    recipe = prior.recipe
    fitted = recipe.structure is not None and recipe.structure != "path"
    sums = int(fitted and recipe.structure != "kronecker") + int(recipe.gradient == "stored")
    size = FLOAT * network.parameters * sums + factor_bytes(recipe, network)
    sent = all_reduce(size, work.devices)
    if recipe.keeps_memory and not work.sharded:
        chosen = work.task_size if recipe.memory is None else work.task_memory
        sent += chosen * item_bytes(network, recipe) * (work.devices - 1) / work.devices
    return sent


# All together -------------------------------------------------------------------------------------


def preset(name: str, work: Work, **wanted: Any) -> Prior:
    """The preset with the work's memory: its share of each task, or all where it has one memory.

    wanted: arguments for those presets that take them (estimator, top_outputs, total); None is
    the preset's own choice. Raises ValueError with a suggestion for a name that is none.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; " + suggestion(name, PRESETS))
    from inspect import signature

    make: Callable[..., Prior] = PRESETS[name]
    offered = signature(make).parameters
    options = {k: v for k, v in wanted.items() if v is not None and k in offered}
    if "memory" in offered:
        total = "total" in offered and options.get("total", offered["total"].default)
        kept = max(1, round(work.memory if total else work.task_memory))
        options = {"memory": kept, **options}
    return make(Categorical(), **options)


def estimate(prior: Prior, network: Network, work: Work, device: Device) -> Estimate:
    """Everything of one preset. Raises ValueError for a structure without a formula here."""
    _known(prior.recipe)
    on_device = device_bytes(prior, network, work)
    step = step_seconds(prior, network, work, device)
    steps = num_steps(prior.recipe, work)
    sent = task_traffic(prior, network, work)
    update = update_seconds(prior, network, work, device)
    update["communication"] = sent / device.link
    # A memory of each task grows by one task's items after each: over all, the mean of 1 ... T.
    mean = update_seconds(prior, network, work, device, (work.tasks + 1) / 2)
    mean["communication"] = update["communication"]
    seconds = {name: steps * value for name, value in step.items()}
    for name, value in mean.items():
        key = f"update: {name}"
        seconds[key] = work.tasks * value
    hours = sum(seconds.values()) / 3600
    return Estimate(
        preset=prior.recipe.name,
        on_device=on_device,
        in_ram=ram_bytes(prior, network, work),
        disk=2 * checkpoint_bytes(prior, network, work),
        prior=prior_bytes(prior, network, work),
        step=step,
        steps=steps,
        step_traffic=all_reduce(FLOAT * network.parameters, work.devices),
        update=update,
        task_traffic=sent,
        seconds=seconds,
        price=hours * work.devices * device.price,
        fits=sum(on_device.values()) <= device.memory,
    )


@dataclass(frozen=True)
class Growth:
    """One quantity ten times as large: what then takes the most time, and how much more time and
    bytes of the prior there are in all."""

    quantity: str
    bottleneck: str
    share: float
    time: float
    prior: float
    fits: bool


# What "ten times" means: a task keeps its size where there are more tasks, and the network's
# operations grow as its parameters do (each layer is wider by the root of it).
GROWN: Mapping[str, Callable[[Network, Work, float], tuple[Network, Work]]] = {
    "tasks": lambda n, w, k: (
        n,
        replace(w, tasks=round(w.tasks * k), examples=w.examples * k, memory=w.memory * k),
    ),
    "examples": lambda n, w, k: (n, replace(w, examples=w.examples * k)),
    "parameters": lambda n, w, k: (
        replace(
            n,
            parameters=n.parameters * k,
            flops=n.flops * k,
            activations=n.activations * k**0.5,
            layers=tuple(
                replace(x, outputs=x.outputs * k**0.5, inputs=x.inputs * k**0.5) for x in n.layers
            ),
        ),
        w,
    ),
    "memory": lambda n, w, k: (n, replace(w, memory=min(w.memory * k, w.examples))),
    "devices": lambda n, w, k: (n, replace(w, devices=round(w.devices * k))),
}


def growth(
    name: str,
    network: Network,
    work: Work,
    device: Device,
    *,
    factor: float = 10,
    **wanted: Any,
) -> list[Growth]:
    """Each quantity of ``GROWN`` in turn, ``factor`` times as large. wanted: as in ``preset``."""
    before = estimate(preset(name, work, **wanted), network, work, device)
    found = []
    for quantity, grow in GROWN.items():
        larger, more = grow(network, work, factor)
        after = estimate(preset(name, more, **wanted), larger, more, device)
        worst = after.bottleneck
        found.append(
            Growth(
                quantity,
                worst,
                after.seconds[worst] / after.total,
                after.total / before.total,
                after.prior / before.prior if before.prior else 1.0,
                after.fits,
            )
        )
    return found


def _known(recipe: Recipe) -> Recipe:
    if recipe.structure not in (None, "diagonal", "path", "kronecker") or recipe.compact:
        raise ValueError(
            f"no formula for structure={recipe.structure!r}, compact={recipe.compact!r}; expected "
            "a diagonal, Kronecker factors, the path integral, or no curvature"
        )
    return recipe
