"""Tables of methods at equal memory: ``lifelong bench``."""
