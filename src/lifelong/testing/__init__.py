"""Tools for testing priors, curvatures and likelihoods, one's own included."""
