r"""How far are adapted models from models trained on all of the changed data? Relative errors.

For linear, logistic, multinomial (with and without a head for each task) and Poisson regression
with L2, in float64: each of the four adaptations and a change of labels, by ``refit``, with all
past examples in memory; every order of three of the four kinds in a row; and linear regression
without a memory, by the dense matrix G alone. The error is ‖theta - theta_batch‖ / ‖theta_batch‖
against an exact minimiser that starts elsewhere (``lifelong.testing.laws.adapted``); the worst over
seeds (each with other data, labels and first weights).

    python -m benchmarks.exactness --out DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

from lifelong.runs import log, versions
from lifelong.testing import laws
from lifelong.testing.cases import Case, glms, linear_gaussian

KINDS = ("add", "remove", "regularise", "transfer")


@dataclass(frozen=True)
class Config:
    """size: examples of a task; precision: of R; orders: of three kinds in a row."""

    seeds: int = 5
    size: int = 40
    features: int = 6
    precision: float = 0.5
    orders: int = 24


def chains(case: Case, config: Config) -> Iterator[tuple[str, ...]]:
    yield from ((kind,) for kind in KINDS)
    if case.data[0].head is None:  # another label lies in another head
        yield ("relabel",)
    yield from list(permutations(KINDS, 3))[: config.orders]


def worst(case: Case, config: Config, seed: int, *, memory: int | None = None) -> dict[str, float]:
    """For each chain the relative error."""
    prior = laws.law_prior(case.likelihood, precision=config.precision)
    prior = replace(prior, recipe=replace(prior.recipe, memory=memory))
    found = {}
    for kinds in chains(case, config):
        name = kinds[0] if len(kinds) == 1 else "three in a row"
        error = laws.adapted(prior, case, kinds, seed=seed)  # type: ignore[arg-type]
        found[name] = max(error, found.get(name, 0.0))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="one seed, few orders")
    options = parser.parse_args(argv)
    config = Config(seeds=1, size=16, features=4, orders=1) if options.smoke else Config()
    options.out.mkdir(parents=True, exist_ok=True)
    log(options.out, f"started: {config}")
    result: dict[str, dict[str, float]] = {}
    for seed in range(config.seeds):
        sizes = {"size": config.size, "features": config.features, "seed": 10 * seed}
        gaussian = linear_gaussian(**sizes)
        cases = [(case.name, case, None) for case in (gaussian, *glms(**sizes))]
        for name, case, memory in (*cases, ("linear-gaussian, G alone", gaussian, 0)):
            found = worst(case, config, seed, memory=memory)
            before = result.get(name, {})
            result[name] = {kind: max(e, before.get(kind, 0.0)) for kind, e in found.items()}
        log(options.out, f"seed {seed}: worst {max(max(r.values()) for r in result.values()):.1e}")
    content = {"config": asdict(config), "versions": versions(), "result": result}
    for name, value in content.items():
        (options.out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    for name, errors in result.items():
        print(f"{name:26}" + "  ".join(f"{kind} {error:.0e}" for kind, error in errors.items()))
    return result


if __name__ == "__main__":
    main()
