"""Pictures: arrays in, a matplotlib ``Figure`` out.

    from lifelong import plots

    plots.memorable_examples(images, scores, labels=labels).savefig("memorable.png", dpi=150)

memorable_examples                      what a score calls most and least memorable (FROMP, MPE)
sensitivity_histogram, _evolution,      which examples matter, since when, and whether retraining
ranked_sensitivity, _scatter            without them agrees (Memory Perturbation Equation)
kernel_matrix                           who resembles whom, sorted by class (DNN2GP)
predictive_bands                        what a 1-D regression does not know, and what is noise
evidence_against_test                   does the training data's evidence find the best test loss?
reliability_diagram                     does a confidence of 0.8 mean right in 80 % of the cases?
memory_curves                           how much of the past must be kept to adapt to a change?
seen_once                               a stream of classes: what is still known, what is kept
accuracy_against_memory                 a table's methods over the examples they keep of each task
learning_curves, matrix                 a stream: accuracy after each task, and on each
decision_regions                        what a classifier says all over the plane, and its memory

Arrays are tensors, numpy arrays or nested lists. Figures are 4 inches wide, so that at 400 pixels
the text is still legible, on white; ``savefig(..., transparent=True)`` leaves the ground out.
Colour never speaks alone: lines differ by dash and marker too, and lightness falls along each
scale. With ``ax`` (or ``axes``) they draw there, and the figure of those axes comes back. No
pyplot, no settings changed: a figure that is not kept is gone.

Each function raises ValueError where shapes do not fit, NonFiniteError where a number is NaN or
infinite, before anything is drawn; ImportError where matplotlib is missing (the extra ``plots``).
"""

from __future__ import annotations

from .arrays import Array
from .curves import accuracy_against_memory, memory_curves
from .examples import memorable_examples
from .learning import learning_curves, matrix
from .predictions import evidence_against_test, kernel_matrix, predictive_bands, reliability_diagram
from .regions import decision_regions
from .scores import (
    pearson,
    ranked_sensitivity,
    sensitivity_evolution,
    sensitivity_histogram,
    sensitivity_scatter,
)
from .seen_once import seen_once
from .style import COLOURS, INK, PLAIN, RAMP, RULE, SOFT

__all__ = [
    "COLOURS",
    "INK",
    "PLAIN",
    "RAMP",
    "RULE",
    "SOFT",
    "Array",
    "accuracy_against_memory",
    "decision_regions",
    "evidence_against_test",
    "kernel_matrix",
    "learning_curves",
    "matrix",
    "memorable_examples",
    "memory_curves",
    "pearson",
    "predictive_bands",
    "ranked_sensitivity",
    "reliability_diagram",
    "seen_once",
    "sensitivity_evolution",
    "sensitivity_histogram",
    "sensitivity_scatter",
]
