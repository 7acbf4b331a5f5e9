"""Lifelong deep learning: keep learning as data come, keep what was known, give up what you must.

prior = lifelong.kprior(lifelong.Categorical(), memory=200)
loss = nll.mean() + prior(model) / len(task)      # in your loop
prior = prior.update(model, task.train)           # after each task
"""

from .curvature import Dense, Diagonal, dense_curvature, diagonal_curvature
from .data import Examples
from .divergences import KL, Logit
from .errors import CheckpointError, NonFiniteError, NotRepeatableError, StaleAnchorError
from .identify import identify
from .learner import Learner
from .likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from .memory import Memory, memorise
from .metrics import AccuracyMatrix, evaluate
from .models import evaluating, widen
from .path import PathIntegral
from .posterior import Posterior
from .presets import (
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
    separate,
    si,
    weight_decay,
)
from .prior import Prior
from .recipe import Recipe
from .streams import Task, TaskStream, blurred, by_time, permuted, rotated, split_by_class
from .terms import KernelTerm, MemoryTerm, Regulariser, WeightTerm

__version__ = "0.1.0"

__all__ = [
    "KL",
    "AccuracyMatrix",
    "Bernoulli",
    "Categorical",
    "CheckpointError",
    "Dense",
    "Diagonal",
    "Examples",
    "Gaussian",
    "KernelTerm",
    "Learner",
    "Logit",
    "Memory",
    "MemoryTerm",
    "NonFiniteError",
    "NotRepeatableError",
    "PathIntegral",
    "Poisson",
    "Posterior",
    "Prior",
    "Recipe",
    "Regulariser",
    "StaleAnchorError",
    "Task",
    "TaskStream",
    "WeightTerm",
    "blurred",
    "by_time",
    "dense_curvature",
    "der",
    "derpp",
    "diagonal_curvature",
    "evaluate",
    "evaluating",
    "ewc",
    "experience_replay",
    "finetune",
    "fromp",
    "gradient_reconstruction",
    "identify",
    "joint",
    "kprior",
    "lwf",
    "memorise",
    "online_ewc",
    "online_laplace",
    "permuted",
    "rotated",
    "separate",
    "si",
    "split_by_class",
    "weight_decay",
    "widen",
]
