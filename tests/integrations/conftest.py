"""torchvision's own build of its operators needs the CUDA torch; Avalanche only imports it."""

from __future__ import annotations

from contextlib import suppress

import torch

_operators = torch.library.Library("torchvision", "DEF")  # lives as long as it is referred to
for _name in ("nms", "qnms"):
    with suppress(RuntimeError):  # defined: a build that fits
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
