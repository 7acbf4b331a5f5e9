"""``lifelong plan``: what a run needs, before it is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from ..config import Optimizer, UsageError, suggestion
from .flags import parse

if TYPE_CHECKING:
    from ..planning import Device, Estimate, Growth, Network, Work

ABOUT = """\
Estimate what each preset needs on a long run: memory, disk, seconds of a step
and of an update, communication, total time and price; then what becomes the
bottleneck as tasks, examples, parameters, memory or devices grow tenfold."""

EXAMPLES = """
examples:
  lifelong plan                                     ImageNet in ten tasks on one H100
  lifelong plan --tasks 10 --examples 1.2e6 --memory 20000 --devices 8 --price 2.5
  lifelong plan --model cifarnet --outputs 60 --tasks 6 --examples 3e4 --measure
  lifelong plan --parameters 1.2e7 --flops 3.6e9 --presets recommended ewc --json
"""


_COUNTS = (
    "outputs", "tasks", "examples", "epochs", "batch_size", "devices", "head", "top_outputs",
)  # fmt: skip


@dataclass(frozen=True)
class PlanFlags:
    """All flags of ``lifelong plan``."""

    model: str = "resnet18"
    """The network: mlp, cifarnet, small_vgg, strided_vgg, resnet18 or resnet50."""
    parameters: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="(default: the model's)")
    ] = None
    """Of another network: how many trainable numbers."""
    flops: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="(default: the model's)")
    ] = None
    """Operations of a forward pass on one example; a multiplication and an addition are two."""
    input_bytes: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="(default: its pixels, uint8)")
    ] = None
    """Of a remembered input; of an encoded photo of ImageNet about 1.1e5."""
    outputs: int = 1000
    """Classes in all."""
    head: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: outputs / tasks)")
    ] = None
    """Outputs that compete in a task; all of them where the task is not told."""
    tasks: int = 10
    """How many, of equal size."""
    examples: float = 1.2e6
    """Of all tasks together."""
    memory: float = 20_000
    """Remembered examples of all tasks together, at the end."""
    epochs: float = 16
    """Passes over each task."""
    batch_size: int = 1024
    """New examples in each step, on all devices together."""
    memory_batch_size: int = 256
    """Remembered examples in each step."""
    optimizer: Optimizer = "sgd"
    """Decides the bytes of its state."""
    estimator: Annotated[
        Literal["exact", "mc", "empirical"] | None,
        arg(metavar="{exact,mc,empirical}", help_behavior_hint="(default: the preset's)"),
    ] = None
    """Of the curvature: exact costs as many backward passes as outputs compete, mc one."""
    top_outputs: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = (
        None
    )
    """How many outputs of a soft label are kept, in presets that have soft labels."""
    devices: int = 1
    """How many work together."""
    device: str = "h100"
    """v100, a100, h100 or h200."""
    efficiency: float = 0.15
    """The part of the device's peak that training reaches: a guess; a throughput is better."""
    throughput: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="(default: from the efficiency)")
    ] = None
    """Examples a second that one device was seen to train, without a prior."""
    measure: bool = False
    """Time a few steps of the model on this machine's processor instead."""
    sharded: bool = False
    """Each process holds its own part of the memory, instead of all of it."""
    price: float = 0.0
    """Of an hour of one device."""
    presets: Annotated[
        tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")
    ] = ()
    """Which ones."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    debug: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value < float("inf"):
                raise UsageError(f"{name} must be at least 1, got {value:g}")
        for name in ("parameters", "flops", "input_bytes", "throughput", "memory"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} must be a positive number, got {value:g}")
        if self.memory_batch_size < 1:
            raise UsageError(f"memory_batch_size must be at least 1, got {self.memory_batch_size}")
        if not 0 < self.efficiency <= 1:
            raise UsageError(f"efficiency must lie in (0, 1], got {self.efficiency:g}")
        if not 0 <= self.price < float("inf"):
            raise UsageError(f"price must not be negative, got {self.price:g}")
        if self.measure and self.throughput is not None:
            raise UsageError("give --measure or --throughput, not both")
        if (self.parameters is None) != (self.flops is None):
            raise UsageError("another network needs both --parameters and --flops")
        if self.measure and self.parameters is not None:
            raise UsageError("--measure needs a model by name: leave out --parameters")


def forecast(args: list[str]) -> int:
    """The exit code."""
    flags = parse(PlanFlags, "lifelong plan", ABOUT, EXAMPLES, args)
    from .. import planning
    from ..presets import PRESETS

    network, work, device = network_of(flags), work_of(flags), device_of(flags)
    names = flags.presets or tuple(PRESETS)
    for name in names:
        if name not in PRESETS:
            raise UsageError(f"there is no preset {name!r}; " + suggestion(name, PRESETS))
    if flags.measure or flags.throughput is not None:
        device = _timed(flags, network, device)
    wanted = {"estimator": flags.estimator, "top_outputs": flags.top_outputs}
    estimates = []
    for name in names:
        prior = planning.preset(name, work, **wanted)
        estimates.append(planning.estimate(prior, network, work, device))
    grown = {name: planning.growth(name, network, work, device, **wanted) for name in names}
    if flags.json:
        content = {
            "network": asdict(network),
            "work": asdict(work),
            "device": asdict(device),
            "presets": {
                name: {
                    **asdict(e),
                    "total": e.total,
                    "bottleneck": e.bottleneck,
                    "grown": [asdict(g) for g in grown[name]],
                }
                for name, e in zip(names, estimates, strict=True)
            },
        }
        sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")
        return 0
    show(network, work, device, dict(zip(names, estimates, strict=True)), grown)
    return 0


def network_of(flags: PlanFlags) -> Network:
    """The model by its name, counted without being computed; or what the flags say of another."""
    from ..networks import NETWORKS
    from ..planning import Network

    if flags.parameters is not None and flags.flops is not None:
        pixels = 3 * 224 * 224
        size = flags.input_bytes or pixels
        return Network("another", flags.parameters, flags.flops, size, flags.outputs)
    if flags.model not in NETWORKS:
        raise UsageError(f"there is no model {flags.model!r}; " + suggestion(flags.model, NETWORKS))
    from ..networks import counted

    make, shape = NETWORKS[flags.model]
    found = counted(flags.model, lambda: make(flags.outputs), shape)
    return found if flags.input_bytes is None else replace(found, input_bytes=flags.input_bytes)


def work_of(flags: PlanFlags) -> Work:
    """The work that the flags describe."""
    from ..planning import Work

    return Work(
        tasks=flags.tasks,
        examples=flags.examples,
        memory=min(flags.memory, flags.examples),
        head=flags.head or max(1, round(flags.outputs / flags.tasks)),
        devices=flags.devices,
        epochs=flags.epochs,
        batch=flags.batch_size,
        memory_batch=flags.memory_batch_size,
        optimizer=flags.optimizer,
        sharded=flags.sharded,
    )


def device_of(flags: PlanFlags) -> Device:
    """The device by its name, at the efficiency."""
    from ..planning import DEVICES

    if flags.device not in DEVICES:
        raise UsageError(
            f"there is no device {flags.device!r}; "
            + suggestion(flags.device, DEVICES)
            + "; or give --throughput"
        )
    found = DEVICES[flags.device]
    return replace(found, flops=found.flops * flags.efficiency, price=flags.price)


def _timed(flags: PlanFlags, network: Network, device: Device) -> Device:
    """A device as fast as was seen: a step on an example costs 3 F."""
    if flags.throughput is not None:
        return replace(device, flops=3 * network.flops * flags.throughput)
    from ..models import multiplies_bfloat16
    from ..networks import NETWORKS, measured

    make, shape = NETWORKS[flags.model]
    rate, bandwidth = measured(make(flags.outputs), shape)
    return replace(
        device,
        name="this machine's processor",
        flops=3 * network.flops * rate,
        bandwidth=bandwidth,
        memory=1e12,
        products=4.0 if multiplies_bfloat16() else 1.0,  # as the benchmark of planning has it
    )


# What is shown ------------------------------------------------------------------------------------


def show(
    network: Network,
    work: Work,
    device: Device,
    estimates: Mapping[str, Estimate],
    grown: Mapping[str, list[Growth]],
) -> None:
    """Two tables on standard output."""
    from rich.console import Console
    from rich.table import Table

    from ..report.table import bytes_text, seconds_text

    def grid(*headings: str) -> Table:
        table = Table(box=None, pad_edge=False)
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left")
        return table

    def step(seconds: float) -> str:
        return f"{1000 * seconds:.3g} ms"

    console = Console() if sys.stdout.isatty() else Console(width=200)
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    say(
        f"{network.name}: {network.parameters:,.0f} parameters, {network.flops:.3g} operations for "
        f"an example, {bytes_text(network.input_bytes)} remembered of it\n"
        f"{work.tasks} tasks of {work.task_size:,.0f} examples, {work.epochs:g} epochs in steps of "
        f"{work.batch}; {work.memory:,.0f} remembered; {work.head} of {network.outputs} outputs "
        f"compete\n{work.devices} x {device.name} at {device.flops:.3g} operations a second\n"
    )
    table = grid(
        "preset", "device", "of it prior", "RAM", "disk", "step", "update", "sent a step",
        "sent a task", "total", *(["price"] if device.price else []), "most of it",
    )  # fmt: skip
    for name, e in estimates.items():
        size = bytes_text(sum(e.on_device.values())) + ("" if e.fits else " !")
        row = [name, size, bytes_text(e.on_device["prior"]), bytes_text(sum(e.in_ram.values()))]
        row += [bytes_text(e.disk), step(sum(e.step.values())), seconds_text(_sum(e.update))]
        row += [bytes_text(e.step_traffic), bytes_text(e.task_traffic), seconds_text(e.total)]
        row += [f"{e.price:,.0f}"] if device.price else []
        part = 100 * e.seconds[e.bottleneck] / e.total
        table.add_row(*row, f"{e.bottleneck}, {part:.0f} %")
    console.print(table, highlight=False)
    if not all(e.fits for e in estimates.values()):
        say(f"!: more than the {bytes_text(device.memory)} that a device has")
    say("\nTen times as much of one quantity: the time then, and what takes most of it\n")
    quantities = [g.quantity for g in next(iter(grown.values()))]
    table = grid("preset", *quantities)
    for name, changes in grown.items():
        cells = [f"x {g.time:.3g}, {g.bottleneck}{'' if g.fits else ' !'}" for g in changes]
        table.add_row(name, *cells)
    console.print(table, highlight=False)
    say(
        "\nDevice, RAM and what is sent: of each process. A task stays as large where there are "
        "more tasks;\nthe batch stays as large where there are more devices. How it is reckoned: "
        "docs/scaling.md"
    )


def _sum(parts: Mapping[str, Any]) -> float:
    return float(sum(parts.values()))
