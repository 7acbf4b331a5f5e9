"""``lifelong ui``: a page on this machine that shows what a model remembers, and changes it."""

from __future__ import annotations

from .server import make, new_token
from .workspace import Workspace, workspace

__all__ = ["Workspace", "make", "new_token", "workspace"]
