"""Speed and memory, as ratios to plain PyTorch measured in the same run."""
