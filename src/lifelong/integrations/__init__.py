"""Frameworks that people already use: one module each, imported by itself; each has an extra."""
