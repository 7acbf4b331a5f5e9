"""Commands of ``lifelong`` with flags of their own, a module each; nothing here imports torch."""
