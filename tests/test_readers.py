"""Readers: what was written is what is read, and broken files say which and where."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lifelong.readers import class_names, find, load

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

GREY = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def cells(images: Any) -> list[dict[str, Any]]:
    return [{"bytes": png(image), "path": None} for image in images]


def write(path: Path, columns: dict[str, Any], names: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pq.write_table(table, path)
    return path


def grey_file(path: Path) -> Path:
    return write(path, {"image": cells(GREY), "label": LABELS})


class TestParquetImages:
    def test_of_any_name(self, tmp_path: Path) -> None:
        expected = load(grey_file(tmp_path / "a.parquet"))
        for name, column in {"b": cells(GREY), "c": [png(image) for image in GREY]}.items():
            path = write(tmp_path / f"{name}.parquet", {"photo": column, "label": LABELS})
            data = load(path, columns=("photo", "label"))
            assert torch.equal(torch.as_tensor(data.inputs), torch.as_tensor(expected.inputs))
        table = FakeDataset({"photo": cells(GREY), "label": LABELS.tolist()})
        data = load(table, columns=("photo", "label"))
        assert torch.equal(torch.as_tensor(data.inputs), torch.as_tensor(expected.inputs))

    def test_numbers_are_no_image(self, tmp_path: Path) -> None:
        columns = {"image": GREY.reshape(len(GREY), -1).tolist(), "label": LABELS.tolist()}
        for source in (write(tmp_path / "a.parquet", columns), FakeDataset(columns)):
            with pytest.raises(ValueError, match="row 0: expected an encoded image, got a list"):
                load(source)

    def test_grey(self, tmp_path: Path) -> None:
        data = load(grey_file(tmp_path / "a-train.parquet"))
        expected = torch.from_numpy(GREY).unsqueeze(1).float() / 255
        assert torch.equal(torch.as_tensor(data.inputs), expected)
        assert torch.equal(data.labels, torch.from_numpy(LABELS))
        assert data.labels.dtype == torch.int64

    def test_colour(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"image": cells(COLOUR), "label": LABELS})
        expected = torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(torch.as_tensor(load(path).inputs), expected)
        assert load(path, mode="L").inputs.shape == (6, 1, 4, 5)  # type: ignore[union-attr]

    def test_grey_among_colour(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.parquet", {"image": cells([GREY[0], COLOUR[0]]), "label": [0, 1]}
        )
        x = torch.as_tensor(load(path).inputs)
        assert x.shape == (2, 3, 4, 5)
        assert torch.equal(x[0], torch.from_numpy(GREY[0]).expand(3, 4, 5).float() / 255)

    def test_grey_block_before_colour_blocks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lifelong.readers._CHUNK", 2)
        mixed = [GREY[0], GREY[1], COLOUR[0], GREY[2], COLOUR[1]]
        path = write(tmp_path / "a.parquet", {"image": cells(mixed), "label": LABELS[:5]})
        x = torch.as_tensor(load(path).inputs)
        for got, image in zip(x, mixed, strict=True):
            wanted = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
            assert torch.equal(got, torch.from_numpy(wanted).permute(2, 0, 1).float() / 255)
        assert torch.equal(load(path).labels, torch.from_numpy(LABELS[:5]))

    def test_sizes(self, tmp_path: Path) -> None:
        images = [GREY[0], GREY[1], np.full((8, 10), 51, dtype=np.uint8)]
        path = write(tmp_path / "a.parquet", {"image": cells(images), "label": LABELS[:3]})
        with pytest.raises(ValueError, match=r"row 2: an image of \(8, 10\) .* size=\(H, W\)"):
            load(path)
        x = torch.as_tensor(load(path, size=(4, 5)).inputs)
        assert x.shape == (3, 1, 4, 5)
        assert torch.equal(x[2], torch.full((1, 4, 5), 0.2))

    def test_as_they_are(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"image": cells(COLOUR), "label": LABELS})
        x = torch.as_tensor(load(path, dtype=torch.uint8).inputs)
        assert x.dtype == torch.uint8
        assert torch.equal(x, torch.from_numpy(COLOUR).permute(0, 3, 1, 2))
        with pytest.raises(ValueError, match=r"float32 or torch\.uint8, got torch\.int64"):
            load(path, dtype=torch.int64)

    def test_some_classes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lifelong.readers._CHUNK", 2)
        images = cells(COLOUR)
        images[0]["bytes"] = b"not looked at"
        path = write(tmp_path / "a.parquet", {"image": images, "label": LABELS})
        data = load(path, classes={1, 2})
        assert data.labels.tolist() == [1, 2, 1, 2]
        kept = COLOUR[[1, 2, 4, 5]]
        expected = torch.from_numpy(kept).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(torch.as_tensor(data.inputs), expected)
        with pytest.raises(ValueError, match=r"a\.parquet, row 0: "):
            load(path, classes={0})
        with pytest.raises(ValueError, match="no rows of these classes"):
            load(path, classes=[7])

    def test_class_names(self, tmp_path: Path) -> None:
        names = ["cat", "dog", "owl"]
        path = write(tmp_path / "a.parquet", {"image": cells(GREY), "label": LABELS}, names)
        assert class_names(path) == ("cat", "dog", "owl")
        assert class_names([path]) == ("cat", "dog", "owl")
        assert class_names(grey_file(tmp_path / "b.parquet")) is None

    @pytest.mark.parametrize(
        "spoil", [lambda b: b[: len(b) // 2], lambda b: b"no image", lambda b: b"", lambda b: None]
    )
    def test_a_broken_image_names_its_row(self, tmp_path: Path, spoil: Any) -> None:
        images = cells(GREY)
        images[4]["bytes"] = spoil(images[4]["bytes"])
        path = write(tmp_path / "bad.parquet", {"image": images, "label": LABELS})
        with pytest.raises(ValueError, match=r"bad\.parquet, row 4: "):
            load(path)

    def test_sixteen_bits_are_not_clipped(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.parquet", {"image": cells([GREY[0].astype(np.uint16)]), "label": [0]}
        )
        with pytest.raises(ValueError, match="8-bit"):
            load(path)


class TestParquetTables:
    def test_columns_side_by_side(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"x": [1.0, 2.0], "y": [3.0, 4.0], "label": [0, 1]})
        data = load(path)
        assert torch.equal(torch.as_tensor(data.inputs), torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
        assert data.labels.tolist() == [0, 1]
        only = load(path, columns=("x", "y"))  # a regression: real-valued labels
        assert torch.as_tensor(only.inputs).tolist() == [[1.0], [2.0]]
        assert only.labels.dtype == torch.float32

    @pytest.mark.parametrize("size", [3, None], ids=["fixed-size lists", "lists"])
    def test_lists(self, tmp_path: Path, size: int | None) -> None:
        rows = [[0, 1, 2], [3, 4, 5]]
        kind = pa.list_(pa.uint8(), size) if size else pa.list_(pa.uint8())
        path = write(tmp_path / "a.parquet", {"features": pa.array(rows, kind), "label": [0, 1]})
        assert torch.as_tensor(load(path).inputs).tolist() == rows  # not divided by 255

    def test_refused(self, tmp_path: Path) -> None:
        table = {"x": [1.0, None], "text": ["a", "b"], "label": [0, 1]}
        path = write(tmp_path / "a.parquet", table)
        with pytest.raises(ValueError, match=r"row 1: column 'x' is empty"):
            load(path, columns=("x", "label"))
        with pytest.raises(ValueError, match="'text' holds string"):
            load(path, columns=("text", "label"))
        with pytest.raises(ValueError, match=r"no columns \['z'\]; the columns are \['x', 'text'"):
            load(path, columns=("z", "label"))
        with pytest.raises(ValueError, match=r"no label column.*found \['x'\]"):
            load(write(tmp_path / "b.parquet", {"x": [1.0]}))
        with pytest.raises(ValueError, match="differ in length"):
            load(write(tmp_path / "c.parquet", {"f": [[1, 2], [3]], "label": [0, 1]}))
        with pytest.raises(ValueError, match="no rows"):
            load(
                write(
                    tmp_path / "d.parquet", {"x": pa.array([], pa.float64()), "label": LABELS[:0]}
                )
            )
        with pytest.raises(ValueError, match="row 1: inputs are NaN"):
            load(write(tmp_path / "e.parquet", {"x": [1.0, float("inf")], "label": [0, 1]}))

    def test_damaged_files(self, tmp_path: Path) -> None:
        path = grey_file(tmp_path / "a.parquet")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="not a whole Parquet file"):
            load(path)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="is empty"):
            load(path)

    def test_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = grey_file(tmp_path / "a.parquet")
        real = builtins.__import__

        def without(name: str, *args: Any, **keywords: Any) -> Any:
            if name.startswith("pyarrow"):
                raise ImportError(name)
            return real(name, *args, **keywords)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"pip install 'lifelong\[data\]'"):
            load(path)


class TestFolders:
    def test_parts_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        for part in (10, 2, 0):
            write(tmp_path / f"a-train-part{part}.parquet", {"x": [float(part)], "label": [part]})
        write(tmp_path / "a-test.parquet", {"x": [7.0], "label": [7]})
        write(tmp_path / "ab-train.parquet", {"x": [8.0], "label": [8]})
        assert load(find(tmp_path, "a", "train")).labels.tolist() == [0, 2, 10]
        assert load(find(tmp_path, "a", "test")).labels.tolist() == [7]

    def test_parts_must_agree(self, tmp_path: Path) -> None:
        write(tmp_path / "a-train-part0.parquet", {"x": [0.0], "label": [0]})
        write(tmp_path / "a-train-part1.parquet", {"z": [0.0], "label": [0]})
        with pytest.raises(ValueError, match=r"part1.parquet lacks the columns \['x'\]"):
            load(find(tmp_path, "a"))

    def test_hugging_face_folder(self, tmp_path: Path) -> None:
        root = tmp_path / "pets"
        for part in range(2):
            name = f"train-{part:05}-of-00002.parquet"
            write(root / "data" / name, {"x": [float(part)], "label": [part]})
        write(root / "data" / "test-00000-of-00001.parquet", {"x": [5.0], "label": [5]})
        assert load(root).labels.tolist() == [0, 1]
        assert load(root, split="test").labels.tolist() == [5]
        assert load(find(tmp_path, "pets", "test"), split="test").labels.tolist() == [5]
        with pytest.raises(FileNotFoundError, match=r"split 'dev'.*The folder holds data/"):
            load(root, split="dev")

    def test_a_validation_set_serves_as_test(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a-val.parquet", {"x": [0.0], "label": [0]})
        assert find(tmp_path, "a", "test") == (path,)

    def test_a_set_without_splits(self, tmp_path: Path) -> None:
        path = write(tmp_path / "moons.parquet", {"x": [0.0], "label": [0]})
        assert find(tmp_path, "moons") == (path,)
        with pytest.raises(FileNotFoundError, match="not divided"):
            find(tmp_path, "moons", "test")

    def test_nothing_there(self, tmp_path: Path) -> None:
        grey_file(tmp_path / "usps-train.parquet")
        with pytest.raises(
            FileNotFoundError, match=r"expected mnist-train\.parquet.*holds usps-train\.parquet"
        ):
            find(tmp_path, "mnist")
        with pytest.raises(FileNotFoundError, match="no-folder does not exist"):
            find(tmp_path / "no-folder", "mnist")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load(tmp_path / "a.parquet")
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(ValueError, match=r"cannot tell what notes\.txt is"):
            load(tmp_path / "notes.txt")


def idx(array: np.ndarray) -> bytes:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + shape + array.tobytes()


def write_raw(folder: Path, zipped: bool) -> Path:
    folder.mkdir(parents=True)
    for prefix, n in (("train", 6), ("t10k", 2)):
        for stem, array in (
            (f"{prefix}-images-idx3-ubyte", GREY[:n]),
            (f"{prefix}-labels-idx1-ubyte", LABELS[:n].astype(np.uint8)),
        ):
            content = idx(array)
            name, content = (stem + ".gz", gzip.compress(content)) if zipped else (stem, content)
            (folder / name).write_bytes(content)
    return folder


class TestRaw:
    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize("inner", ["MNIST/raw", "raw", "."])
    def test_round_trip(self, tmp_path: Path, inner: str, zipped: bool) -> None:
        root = tmp_path / "root"
        write_raw(root / inner, zipped)
        data = load(root)
        expected = torch.from_numpy(GREY).unsqueeze(1).float() / 255
        assert torch.equal(torch.as_tensor(data.inputs), expected)
        assert data.labels.tolist() == LABELS.tolist()
        assert len(load(root, split="test")) == 2
        assert len(load(find(root, "mnist", "test"), split="test")) == 2

    def test_found_by_name(self, tmp_path: Path) -> None:
        raw = write_raw(tmp_path / "FashionMNIST" / "raw", zipped=False)
        assert find(tmp_path, "fashionmnist") == (raw,)
        assert len(load(find(tmp_path, "fashionmnist"))) == 6

    def test_refused(self, tmp_path: Path) -> None:
        raw = write_raw(tmp_path / "raw", zipped=False)
        with pytest.raises(ValueError, match=r'"train" and "test", got \'val\''):
            load(raw, split="val")
        images = raw / "train-images-idx3-ubyte"
        content = images.read_bytes()
        for short in (content[:-1], content[:10]):
            images.write_bytes(short)
            with pytest.raises(ValueError, match="idx3-ubyte is truncated"):
                load(raw)
        images.write_bytes(b"<html>")
        with pytest.raises(ValueError, match="not an idx file"):
            load(raw)
        images.unlink()
        with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte"):
            load(raw)
        images.with_suffix(".gz").write_bytes(gzip.compress(content)[:-10])
        with pytest.raises(ValueError, match="is damaged"):
            load(raw)


class TestArrays:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(1, 5), st.integers(1, 6), st.sampled_from(["f4", "f8", ">f4", "i2", "u2"]))
    def test_tables_are_cast_only(self, n: int, width: int, dtype: str) -> None:
        x = np.arange(n * width).reshape(n, width).astype(dtype)
        data = load((x, np.arange(n)))
        assert torch.as_tensor(data.inputs).tolist() == x.tolist()
        assert torch.as_tensor(data.inputs).dtype == torch.float32

    def test_images(self) -> None:
        channels_first = torch.from_numpy(COLOUR).permute(0, 3, 1, 2)
        for x in (COLOUR, channels_first, channels_first.numpy()):
            data = load((x, LABELS))
            assert torch.equal(torch.as_tensor(data.inputs), channels_first.float() / 255)
        grey = load((GREY, LABELS[:, None].astype(np.uint8)))  # labels (N, 1), as Keras has them
        assert torch.as_tensor(grey.inputs).shape == (6, 1, 4, 5)
        assert grey.labels.tolist() == LABELS.tolist()
        floats = load((GREY / 255, LABELS))
        torch.testing.assert_close(floats.inputs, grey.inputs)

    def test_the_original_is_left_alone(self) -> None:
        x = np.ones((2, 3), dtype=np.float32)
        torch.as_tensor(load((x, [0, 1])).inputs).zero_()
        assert x.sum() == 6

    @pytest.mark.parametrize(
        ("x", "y"),
        [("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y"), ("X", "y")],
    )
    def test_npz(self, tmp_path: Path, x: str, y: str) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, **{x: GREY, y: LABELS})
        assert torch.equal(torch.as_tensor(load(path).inputs)[:, 0], torch.from_numpy(GREY) / 255)

    def test_npz_by_split_and_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, x_train=GREY, y_train=LABELS, x_test=GREY[:2], y_test=LABELS[:2], z=LABELS)
        assert len(load(path)) == 6
        assert len(load(path, split="test")) == 2
        assert len(load(path, columns=("x_train", "z"))) == 6
        with pytest.raises(ValueError, match=r"x_val.*found \['x_train'"):
            load(path, split="val")
        with pytest.raises(ValueError, match="found"):
            load(path, columns=("nothing", "z"))

    def test_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
        with pytest.raises(ValueError, match="never unpickled"):
            load(path)
        np.savez(path, x=GREY, y=LABELS)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="not a whole"):
            load(path)
        with pytest.raises(ValueError, match="3 inputs but 2 labels"):
            load((np.zeros((3, 2)), np.zeros(2)))
        with pytest.raises(ValueError, match="no examples"):
            load((np.zeros((0, 2)), np.zeros(0)))
        with pytest.raises(ValueError, match="expected numbers"):
            load((np.array([["a"]]), np.zeros(1)))
        with pytest.raises(ValueError, match="row 1: inputs are NaN"):
            load((np.array([[0.0], [np.nan]]), np.zeros(2)))
        with pytest.raises(TypeError, match="cannot read int"):
            load(5)
        with pytest.raises(ValueError, match="mode must be"):
            load((GREY, LABELS), mode="rgb")  # type: ignore[arg-type]


class Names:
    names = ("cat", "dog", "owl")


class FakeDataset:
    """What is used of Hugging Face's ``datasets.Dataset``."""

    def __init__(self, columns: dict[str, Any], features: dict[str, Any] | None = None) -> None:
        self.columns, self.features = columns, features or {}

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> dict[str, Any]:
        return {name: values[rows] for name, values in self.columns.items()}


class TestHuggingFace:
    @pytest.mark.parametrize("encode", [cells, lambda x: [Image.fromarray(i) for i in x]])
    def test_images(self, encode: Any) -> None:
        source = FakeDataset({"img": encode(COLOUR), "label": LABELS.tolist()}, {"label": Names()})
        data = load(source)
        expected = torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(torch.as_tensor(data.inputs), expected)
        assert data.labels.tolist() == LABELS.tolist()
        assert class_names(source) == Names.names

    def test_tables_and_splits(self) -> None:
        part = FakeDataset({"a": [1.0, 2.0], "b": [[3, 4], [5, 6]], "label": [0, 1]})
        data = load({"train": part}, split="train")
        assert torch.as_tensor(data.inputs).tolist() == [[1, 3, 4], [2, 5, 6]]
        with pytest.raises(ValueError, match=r"no split 'test'; the splits are \['train'\]"):
            load({"train": part}, split="test")

    def test_refused(self) -> None:
        images = cells(GREY)
        images[2]["bytes"] = b"x"
        with pytest.raises(ValueError, match="row 2: the image cannot be decoded"):
            load(FakeDataset({"image": images, "label": LABELS}))
        with pytest.raises(ValueError, match="'text' holds"):
            load(FakeDataset({"text": ["a"], "label": [0]}))
        with pytest.raises(ValueError, match="differ in length"):
            load(FakeDataset({"a": [[1], [1, 2]], "label": [0, 1]}))
        with pytest.raises(ValueError, match="no rows"):
            load(FakeDataset({"a": [], "label": []}))
