r"""Variational optimisers: training that ends with a Gaussian over the weights, N(m, S⁻¹).

All of them descend E_q[ess · loss] + KL(q ‖ prior) by natural gradients (the Bayesian learning
rule, Khan & Rue 2023), with q Gaussian. They differ in how they read the curvature of the loss:

    VON    full S, from the GGN or the Hessian        small models; exact on linear regression
    VOGN   diagonal, mean of g_i² over examples       any likelihood, layers as in ``jacobians``
    IVON   diagonal, E[noise · gradient] / variance   any loss, at the cost of Adam
    Vadam  diagonal, (mean gradient)²                 Adam with noise; too wide for large batches

    for x, y in loader:
        with optimizer.sampled_params(train=True):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    posterior = gaussian_posterior(optimizer, model)      # no further pass over the data
    prior = posterior.as_prior(Categorical())             # for any other optimiser
    optimizer = IVON(model.named_parameters(), ..., prior=posterior)  # or the variational way
"""

from .base import Variational
from .extract import gaussian_posterior
from .full import VON
from .meanfield import IVON, VOGN, MeanField, Vadam

__all__ = ["IVON", "VOGN", "VON", "MeanField", "Vadam", "Variational", "gaussian_posterior"]
