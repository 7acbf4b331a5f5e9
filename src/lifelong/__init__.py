"""Lifelong deep learning: keep learning as data come, keep what was known, give up what you must.

prior = lifelong.kprior(lifelong.Categorical(), memory=200)
loss = nll.mean() + prior(model) / len(task)      # in your loop
prior = prior.update(model, task.train)           # after each task
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import Bytes, Fidelity
    from .curvature import (
        BlockDiagonal,
        Dense,
        Diagonal,
        EigenKronecker,
        Isotropic,
        Kronecker,
        LowRank,
        block_curvature,
        dense_curvature,
        diagonal_curvature,
        isotropic_curvature,
        kronecker_curvature,
        low_rank_curvature,
    )
    from .data import Examples, shard
    from .divergences import KL, Logit
    from .dnn2gp import GaussianProcess, pseudo_data
    from .errors import (
        CheckpointError,
        NonFiniteError,
        NotConvergedError,
        NotRepeatableError,
        StaleAnchorError,
        StoreError,
    )
    from .function_space import function_covariance, function_kernel
    from .kernel_methods import Hinge, KernelMachine, KernelPrior
    from .learner import Learner
    from .likelihoods import Bernoulli, Categorical, Gaussian, NextTokens, Poisson
    from .memory import Memory, memorise
    from .metrics import AccuracyMatrix, evaluate, prequential
    from .models import evaluating, widen
    from .online import LaplaceFilter
    from .path import PathIntegral
    from .posterior import Posterior
    from .presets import (
        compact_memory,
        der,
        derpp,
        ewc,
        experience_replay,
        finetune,
        fromp,
        gradient_reconstruction,
        joint,
        kprior,
        lwf,
        online_ewc,
        online_laplace,
        recommended,
        separate,
        si,
        weight_decay,
    )
    from .prior import Prior
    from .recipe import Recipe
    from .reconstruction import FidelityReport, Trail, fidelity, fidelity_curve, rehearse
    from .refit import Refit
    from .scores import identify
    from .sensitivity import (
        SensitivityTrace,
        group_change,
        loo_nll,
        sensitivities,
        variance_from_optimizer,
    )
    from .store import MemoryStore, open_store
    from .streaming import Stream
    from .streams import Task, TaskStream, blurred, by_time, permuted, rotated, split_by_class
    from .terms import KernelTerm, MemoryTerm, Regulariser, WeightTerm
    from .variational import IVON, VOGN, VON, Vadam, gaussian_posterior

__version__ = "0.1.0"

__all__ = [
    "IVON",
    "KL",
    "VOGN",
    "VON",
    "AccuracyMatrix",
    "Bernoulli",
    "BlockDiagonal",
    "Bytes",
    "Categorical",
    "CheckpointError",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Examples",
    "Fidelity",
    "FidelityReport",
    "Gaussian",
    "GaussianProcess",
    "Hinge",
    "Isotropic",
    "KernelMachine",
    "KernelPrior",
    "KernelTerm",
    "Kronecker",
    "LaplaceFilter",
    "Learner",
    "Logit",
    "LowRank",
    "Memory",
    "MemoryStore",
    "MemoryTerm",
    "NextTokens",
    "NonFiniteError",
    "NotConvergedError",
    "NotRepeatableError",
    "PathIntegral",
    "Poisson",
    "Posterior",
    "Prior",
    "Recipe",
    "Refit",
    "Regulariser",
    "SensitivityTrace",
    "StaleAnchorError",
    "StoreError",
    "Stream",
    "Task",
    "TaskStream",
    "Trail",
    "Vadam",
    "WeightTerm",
    "block_curvature",
    "blurred",
    "by_time",
    "compact_memory",
    "dense_curvature",
    "der",
    "derpp",
    "diagonal_curvature",
    "evaluate",
    "evaluating",
    "ewc",
    "experience_replay",
    "fidelity",
    "fidelity_curve",
    "finetune",
    "fromp",
    "function_covariance",
    "function_kernel",
    "gaussian_posterior",
    "gradient_reconstruction",
    "group_change",
    "identify",
    "isotropic_curvature",
    "joint",
    "kprior",
    "kronecker_curvature",
    "loo_nll",
    "low_rank_curvature",
    "lwf",
    "memorise",
    "online_ewc",
    "online_laplace",
    "open_store",
    "permuted",
    "prequential",
    "pseudo_data",
    "recommended",
    "rehearse",
    "rotated",
    "sensitivities",
    "separate",
    "shard",
    "si",
    "split_by_class",
    "variance_from_optimizer",
    "weight_decay",
    "widen",
]

# The names are imported when they are first used (PEP 562), so that the command line can show its
# help without torch, which takes seconds.
_MODULES = {
    "budget": (
        "Bytes",
        "Fidelity",
    ),
    "curvature": (
        "BlockDiagonal",
        "Dense",
        "Diagonal",
        "EigenKronecker",
        "Isotropic",
        "Kronecker",
        "LowRank",
        "block_curvature",
        "dense_curvature",
        "diagonal_curvature",
        "isotropic_curvature",
        "kronecker_curvature",
        "low_rank_curvature",
    ),
    "data": ("Examples", "shard"),
    "divergences": (
        "KL",
        "Logit",
    ),
    "dnn2gp": (
        "GaussianProcess",
        "pseudo_data",
    ),
    "errors": (
        "CheckpointError",
        "NonFiniteError",
        "NotConvergedError",
        "NotRepeatableError",
        "StaleAnchorError",
        "StoreError",
    ),
    "function_space": (
        "function_covariance",
        "function_kernel",
    ),
    "kernel_methods": (
        "Hinge",
        "KernelMachine",
        "KernelPrior",
    ),
    "learner": ("Learner",),
    "likelihoods": (
        "Bernoulli",
        "Categorical",
        "Gaussian",
        "NextTokens",
        "Poisson",
    ),
    "memory": (
        "Memory",
        "memorise",
    ),
    "metrics": (
        "AccuracyMatrix",
        "evaluate",
        "prequential",
    ),
    "models": (
        "evaluating",
        "widen",
    ),
    "online": ("LaplaceFilter",),
    "path": ("PathIntegral",),
    "posterior": ("Posterior",),
    "presets": (
        "compact_memory",
        "der",
        "derpp",
        "ewc",
        "experience_replay",
        "finetune",
        "fromp",
        "gradient_reconstruction",
        "joint",
        "kprior",
        "lwf",
        "online_ewc",
        "online_laplace",
        "recommended",
        "separate",
        "si",
        "weight_decay",
    ),
    "prior": ("Prior",),
    "recipe": ("Recipe",),
    "reconstruction": (
        "FidelityReport",
        "Trail",
        "fidelity",
        "fidelity_curve",
        "rehearse",
    ),
    "refit": ("Refit",),
    "scores": ("identify",),
    "sensitivity": (
        "SensitivityTrace",
        "group_change",
        "loo_nll",
        "sensitivities",
        "variance_from_optimizer",
    ),
    "store": (
        "MemoryStore",
        "open_store",
    ),
    "streaming": ("Stream",),
    "streams": (
        "Task",
        "TaskStream",
        "blurred",
        "by_time",
        "permuted",
        "rotated",
        "split_by_class",
    ),
    "terms": (
        "KernelTerm",
        "MemoryTerm",
        "Regulariser",
        "WeightTerm",
    ),
    "variational": (
        "IVON",
        "VOGN",
        "VON",
        "Vadam",
        "gaussian_posterior",
    ),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
