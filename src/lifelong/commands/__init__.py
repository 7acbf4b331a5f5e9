"""Commands of ``lifelong``, each with its flags, help and output in a module. None imports torch
before there is something to compute."""
