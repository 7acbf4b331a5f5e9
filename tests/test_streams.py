"""Streams: what each example's fate must be, whatever the data."""

from __future__ import annotations

import builtins
import contextlib
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lifelong import toys
from lifelong.data import Examples
from lifelong.errors import NotRepeatableError
from lifelong.streams import (
    Chain,
    Permute,
    Rotate,
    Scenario,
    Task,
    TaskStream,
    as_examples,
    blurred,
    by_time,
    permuted,
    rotated,
    split_by_class,
)

# Its first import sets environment variables; here, that is no leak of a test.
with contextlib.suppress(ImportError):
    import sklearn.datasets  # noqa: F401

SCENARIOS: tuple[Scenario, ...] = ("task", "domain", "class")


def labelled(labels: Sequence[int]) -> Examples:
    """Examples whose input is their position, so that each can be recognised."""
    return Examples(torch.arange(len(labels)).float().unsqueeze(1), torch.tensor(labels))


def images(n: int = 12, side: int = 5, classes: int = 3) -> Examples:
    x = torch.rand(n, 2, side, side, generator=torch.Generator().manual_seed(n))
    return Examples(x, torch.arange(n) % classes)


def all_ids(stream: Sequence[Task]) -> list[int]:
    return torch.cat([task.train.ids for task in stream]).tolist()


LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=60)


class TestSplit:
    @given(LABELS, st.integers(1, 4), st.sampled_from(SCENARIOS))
    def test_partitions_the_data(self, labels: list[int], size: int, scenario: Scenario) -> None:
        data = labelled(labels)
        stream = split_by_class(data, data, classes_per_task=size, scenario=scenario)
        assert sorted(all_ids(stream)) == list(range(len(labels)))
        for task in stream:
            assert task.test is not None
            assert torch.equal(task.test.ids, task.train.ids)
            for position, x in zip(task.train.ids, torch.as_tensor(task.train.inputs), strict=True):
                assert int(x) == int(position)  # inputs travel with their ids

    @given(LABELS, st.integers(1, 4))
    def test_heads_are_all_classes_each_once(self, labels: list[int], size: int) -> None:
        stream = split_by_class(labelled(labels), classes_per_task=size)
        heads = [task.head or () for task in stream]
        assert sorted(itertools.chain(*heads)) == sorted(set(labels))
        assert [len(head) for head in heads[:-1]] == [size] * (len(heads) - 1)
        for task in stream:
            assert set(task.train.labels.tolist()) == set(task.head or ())
        assert stream.num_outputs == max(labels) + 1

    @given(LABELS, st.integers(1, 4))
    def test_scenarios_differ_in_head_and_labels_only(self, labels: list[int], size: int) -> None:
        data = labelled(labels)
        task, domain, class_ = (
            split_by_class(data, classes_per_task=size, scenario=scenario) for scenario in SCENARIOS
        )
        for a, b, c in zip(task, domain, class_, strict=True):
            assert torch.equal(a.train.labels, c.train.labels)
            assert b.head is c.head is None
            classes = torch.tensor(a.head)
            assert torch.equal(classes[b.train.labels], a.train.labels)
            assert int(b.train.labels.max()) < domain.num_outputs <= size

    def test_even_or_odd(self) -> None:
        stream = split_by_class(labelled(list(range(10))), scenario="domain")
        assert stream.num_outputs == 2
        assert all(task.train.labels.tolist() == [0, 1] for task in stream)

    def test_class_sets_and_order(self) -> None:
        data = labelled([0, 1, 2, 3, 4, 5])
        sets = split_by_class(data, classes_per_task=[(5, 0), {3, 1, 2}])
        assert [task.head for task in sets] == [(5, 0), (1, 2, 3)]
        assert [task.name for task in sets] == ["5/0", "1/2/3"]
        assert sorted(all_ids(sets)) == [0, 1, 2, 3, 5]  # class 4 is named by nobody
        ordered = split_by_class(data, classes_per_task=2, class_order=[4, 0, 5, 1, 2])
        assert [task.head for task in ordered] == [(4, 0), (5, 1), (2,)]
        domain = split_by_class(data, classes_per_task=[(5, 0)], scenario="domain")
        assert domain[0].train.labels.tolist() == [1, 0]  # the positions of classes 0 and 5

    def test_existing_ids_and_transform_stay(self) -> None:
        data = Examples(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), torch.tensor([7, 8, 9, 10]))
        stream = split_by_class(permuted(data, num_tasks=2)[1].train, classes_per_task=1)
        assert [task.train.ids.tolist() for task in stream] == [[7, 9], [8, 10]]
        assert all(isinstance(task.train.transform, Permute) for task in stream)

    @pytest.mark.parametrize(
        "make",
        [
            lambda x, y: (x, y),
            TensorDataset,
            lambda x, y: DataLoader(TensorDataset(x, y), batch_size=3),
            lambda x, y: list(zip(x.split(2), y.split(2), strict=True)),
        ],
        ids=["pair", "dataset", "loader", "batches"],
    )
    def test_any_data(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        x, y = torch.rand(8, 2), torch.arange(8, dtype=torch.int32) % 4
        stream = split_by_class(make(x, y))
        assert [task.train.ids.tolist() for task in stream] == [[0, 1, 4, 5], [2, 3, 6, 7]]
        assert torch.equal(torch.as_tensor(stream[1].train.inputs), x[[2, 3, 6, 7]])
        assert stream[0].train.labels.dtype == torch.int64

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"classes_per_task": 0}, "at least 1"),
            ({"classes_per_task": [(0, 1), (1, 2)]}, r"\[1\] are named more than once"),
            ({"class_order": [0, 0, 1]}, r"\[0\] are named more than once"),
            ({"classes_per_task": [(0, 9)]}, r"\[9\] have no training examples"),
            ({"classes_per_task": [(0,), ()]}, "no classes"),
            ({"classes_per_task": []}, "no classes"),
            ({"classes_per_task": [(0,)], "class_order": [0]}, "not both"),
            ({"scenario": "tasks"}, "scenario must be one of"),
            ({"num_outputs": 2}, "at least 3"),
        ],
    )
    def test_refused(self, keywords: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            split_by_class(labelled([0, 1, 2]), **{"classes_per_task": 3, **keywords})

    def test_refused_data(self) -> None:
        data = labelled([0, 1, 2, 3])
        with pytest.raises(ValueError, match=r"test holds classes \[4\]"):
            split_by_class(data, labelled([0, 4]))
        with pytest.raises(ValueError, match="'2/3' has no test examples"):
            split_by_class(data, labelled([0, 1]))
        with pytest.raises(ValueError, match="no examples"):
            split_by_class(Examples(torch.zeros(0, 1), torch.zeros(0).long()))
        with pytest.raises(ValueError, match="0 or larger"):
            split_by_class(labelled([0, -1]))
        with pytest.raises(TypeError, match="integer class labels"):
            split_by_class((torch.zeros(2, 1), torch.zeros(2)))

    def test_shuffling_loader_is_refused(self) -> None:
        data = TensorDataset(torch.rand(8, 2), torch.arange(8))
        with pytest.raises(NotRepeatableError):
            as_examples(DataLoader(data, shuffle=True))


class TestTask:
    @given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
    def test_each_epoch_shows_each_example_once(self, n: int, size: int, epochs: int) -> None:
        task = Task(0, "a", labelled(list(range(n))))
        loader = task.loader(size, epochs=epochs)
        seen = list(loader)
        assert len(seen) == len(loader)
        labels = torch.cat([y for _, y in seen]) if seen else torch.zeros(0).long()
        for epoch in labels.reshape(epochs, n):
            assert sorted(epoch.tolist()) == list(range(n))
        for x, y in seen:
            assert torch.equal(torch.as_tensor(x).squeeze(1), y.float())

    def test_drop_last(self) -> None:
        task = Task(0, "a", labelled(list(range(10))))
        loader = task.loader(4, epochs=2, drop_last=True)
        assert [len(y) for _, y in loader] == [4] * 4
        assert len(loader) == 4
        with pytest.raises(ValueError, match="drop_last"):
            task.loader(11, drop_last=True)

    def test_order_comes_from_the_generator(self) -> None:
        task = Task(0, "a", labelled(list(range(50))))

        def order(generator: torch.Generator | None) -> list[int]:
            return torch.cat([y for _, y in task.loader(8, 2, generator)]).tolist()

        assert order(torch.Generator().manual_seed(3)) == order(torch.Generator().manual_seed(3))
        assert order(torch.Generator().manual_seed(3)) != order(torch.Generator().manual_seed(4))
        torch.manual_seed(5)
        first = order(None)
        torch.manual_seed(5)
        assert order(None) == first
        assert first[:50] != first[50:]  # a new order in each epoch

    def test_transform_and_dicts(self) -> None:
        data = Examples(
            {"ids": torch.arange(6), "mask": torch.ones(6)},
            torch.arange(6),
            transform=lambda x: {**x, "ids": x["ids"] + 100},  # type: ignore[index]
        )
        for x, y in Task(0, "a", data).loader(4):
            assert torch.equal(x["ids"], y + 100)  # type: ignore[index, call-overload]

    def test_refused(self) -> None:
        data = labelled([0, 1])
        with pytest.raises(ValueError, match="no train examples"):
            Task(0, "empty", data[:0])
        with pytest.raises(ValueError, match="no test examples"):
            Task(0, "empty", data, data[:0])
        with pytest.raises(TypeError, match="must be Examples"):
            Task(0, "pair", (torch.zeros(1), torch.zeros(1)))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="batch_size"):
            Task(0, "a", data).loader(0)

    def test_stream_is_a_sequence(self) -> None:
        stream = split_by_class(labelled([0, 1, 2, 3]), classes_per_task=1)
        assert len(stream) == 4
        assert [task.index for task in stream] == [0, 1, 2, 3]
        assert stream[-1] is stream.tasks[3]
        assert isinstance(stream[:2], TaskStream)
        assert len(stream[:2]) == 2
        assert len(TaskStream("again", (t for t in stream), 4)) == 4  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no tasks"):
            stream[4:]
        with pytest.raises(ValueError, match="scenario"):
            TaskStream("a", stream.tasks, 4, "none")  # type: ignore[arg-type]


class TestPermuted:
    @given(st.integers(0, 1000), st.integers(1, 4))
    def test_bijection_whose_inverse_restores(self, seed: int, side: int) -> None:
        data = images(side=side)
        change = permuted(data, num_tasks=2, seed=seed)[1].train.transform
        assert isinstance(change, Permute)
        assert change.permutation.sort().values.tolist() == list(range(2 * side * side))
        x = torch.as_tensor(data.inputs)
        assert torch.equal(torch.as_tensor(change.inverse()(change(x))), x)
        assert torch.as_tensor(change(x)).shape == x.shape

    def test_definition(self) -> None:
        change = Permute(torch.tensor([2, 0, 1]))
        assert torch.equal(
            torch.as_tensor(change(torch.tensor([[5, 6, 7]]))), torch.tensor([[7, 5, 6]])
        )

    def test_same_seed_same_stream_of_any_length(self) -> None:
        data = images()
        short, long, other = (
            [task.train.batch(slice(0, None)).inputs for task in permuted(data, **keywords)]
            for keywords in ({"num_tasks": 2}, {"num_tasks": 4}, {"num_tasks": 2, "seed": 1})
        )
        assert torch.equal(short[1], long[1])  # type: ignore[arg-type]
        assert not torch.equal(short[1], other[1])  # type: ignore[arg-type]
        assert not torch.equal(long[1], long[2])  # type: ignore[arg-type]

    def test_data_are_shared_and_the_first_is_plain(self) -> None:
        data = images()
        stream = permuted(data, data, num_tasks=3)
        assert all(task.train.inputs is data.inputs for task in stream)
        assert stream[0].train.transform is None
        assert stream[1].test is not None
        assert stream[1].test.transform is stream[1].train.transform
        assert (stream.scenario, stream.num_outputs) == ("domain", 3)
        changed = permuted(data, num_tasks=2, identity_first=False)
        assert all(isinstance(task.train.transform, Permute) for task in changed)

    def test_pickle(self) -> None:
        x = torch.rand(2, 1, 4, 4)
        for change in (
            Permute(torch.randperm(16)),
            Rotate(30.0),
            Chain(Permute(torch.randperm(16)), Rotate(90.0)),
        ):
            again = pickle.loads(pickle.dumps(change))
            assert torch.equal(torch.as_tensor(again(x)), torch.as_tensor(change(x)))

    def test_after_another_transform(self) -> None:
        data = images()
        twice = permuted(permuted(data, num_tasks=2)[1].train, num_tasks=2)[1].train.transform
        assert isinstance(twice, Chain)
        x = torch.as_tensor(data.inputs)
        assert torch.equal(torch.as_tensor(twice(x)), torch.as_tensor(twice.second(twice.first(x))))

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="num_tasks"):
            permuted(images(), num_tasks=0)
        with pytest.raises(TypeError, match="dict"):
            permuted(Examples({"a": torch.zeros(2, 3)}, torch.tensor([0, 1])))
        with pytest.raises(ValueError, match="4 values"):
            Permute(torch.randperm(4))(torch.zeros(2, 5))


class TestRotated:
    @pytest.mark.parametrize("quarter", [1, 2, 3])
    def test_quarter_turns(self, quarter: int) -> None:
        x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
        turned = torch.as_tensor(Rotate(90.0 * quarter)(x))
        torch.testing.assert_close(turned, torch.rot90(x, quarter, (2, 3)))

    def test_oblong_images_keep_their_shape(self) -> None:
        x = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
        x[0, 0, 2, 6] = 1.0  # two right of the centre
        turned = torch.as_tensor(Rotate(90.0)(x))
        expected = torch.zeros_like(x)
        expected[0, 0, 0, 4] = 1.0  # two above it
        torch.testing.assert_close(turned, expected)

    def test_stream(self) -> None:
        data = images()
        stream = rotated(data, data, angles=[0, 45, 360])
        assert [task.train.transform for task in stream] == [None, Rotate(45.0), None]
        assert all(task.train.inputs is data.inputs for task in stream)
        assert stream[1].name == "45 degrees"

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
            rotated(labelled([0, 1]), angles=[0, 10])
        with pytest.raises(ValueError, match="no tasks"):
            rotated(images(), angles=[])


class TestBlurred:
    @given(
        st.lists(st.integers(1, 25), min_size=1, max_size=4),
        st.floats(0, 0.5),
        st.integers(1, 6),
        st.integers(0, 99),
    )
    def test_conserves_the_examples(
        self, sizes: list[int], overlap: float, num_chunks: int, seed: int
    ) -> None:
        labels = [t for t, size in enumerate(sizes) for _ in range(size)]
        stream = split_by_class(labelled(labels), classes_per_task=1, scenario="class")
        num_chunks = min(num_chunks, len(labels))
        chunks = blurred(stream, overlap=overlap, num_chunks=num_chunks, seed=seed)
        assert len(chunks) == num_chunks
        assert sorted(all_ids(chunks)) == list(range(len(labels)))
        lengths = [len(chunk) for chunk in chunks]
        assert max(lengths) - min(lengths) <= 1
        for chunk in chunks:
            positions = torch.as_tensor(chunk.train.inputs).squeeze(1).long()
            assert torch.equal(torch.tensor(labels)[positions], chunk.train.labels)
        again = blurred(stream, overlap=overlap, num_chunks=num_chunks, seed=seed)
        assert all_ids(again) == all_ids(chunks)

    def test_mix_changes_gradually(self) -> None:
        data = labelled([0] * 4000 + [1] * 4000)
        stream = split_by_class(data, data, classes_per_task=1, scenario="class")
        chunks = blurred(stream, overlap=0.25, num_chunks=8)
        share = [float(chunk.train.labels.double().mean()) for chunk in chunks]
        # The ramp runs from t = 0.75 to 1.25: chunk 3 averages 1/4 of the new task, chunk 4 3/4.
        expected = [0, 0, 0, 0.25, 0.75, 1, 1, 1]
        assert share == pytest.approx(expected, abs=0.04)
        assert share[:3] == [0, 0, 0]
        assert share[5:] == [1, 1, 1]
        for chunk, main in zip(chunks, [0] * 4 + [1] * 4, strict=True):
            assert chunk.test is stream[main].test
        sharp = blurred(stream, overlap=0.0, num_chunks=2)
        assert [set(chunk.train.labels.tolist()) for chunk in sharp] == [{0}, {1}]
        assert all_ids(sharp) != list(range(8000))  # within a task the order is random
        assert len(blurred(stream)) == 8
        assert blurred(stream).num_outputs == stream.num_outputs

    def test_each_example_keeps_its_own_transform(self) -> None:
        data = images(n=20)
        stream = permuted(data, num_tasks=2)
        chunks = blurred(stream, num_chunks=2)
        assert sorted(all_ids(chunks)) == list(range(40))
        truth = torch.cat([torch.as_tensor(t.train.batch(slice(0, None)).inputs) for t in stream])
        for chunk in chunks:
            batch = chunk.train.batch(slice(0, None))
            assert torch.equal(torch.as_tensor(batch.inputs), truth[batch.ids])

    def test_list_of_tasks_will_do(self) -> None:
        tasks = [Task(0, "a", labelled([0, 0, 1])), Task(1, "b", labelled([1, 2]))]
        chunks = blurred(tasks, num_chunks=2)
        assert (chunks.num_outputs, chunks.scenario) == (3, "domain")
        assert Counter(torch.cat([c.train.labels for c in chunks]).tolist()) == {0: 2, 1: 2, 2: 1}

    def test_refused(self) -> None:
        data = labelled([0, 1, 2, 3])
        with pytest.raises(ValueError, match="heads tell"):
            blurred(split_by_class(data))
        stream = split_by_class(data, scenario="class")
        with pytest.raises(ValueError, match="overlap"):
            blurred(stream, overlap=0.6)
        with pytest.raises(ValueError, match="between 1 and 4 chunks"):
            blurred(stream, num_chunks=5)
        with pytest.raises(ValueError, match="no tasks"):
            blurred([])


class TestByTime:
    @given(st.integers(2, 60), st.integers(1, 6))
    def test_consecutive(self, n: int, num_chunks: int) -> None:
        num_chunks = min(num_chunks, n)
        stream = by_time(torch.rand(n, 2), torch.arange(n) % 3, num_chunks)
        assert all_ids(stream) == list(range(n))
        lengths = [len(task) for task in stream]
        assert max(lengths) - min(lengths) <= 1

    def test_held_out(self) -> None:
        stream = by_time(torch.rand(20, 2), torch.arange(20) % 3, 2, test_fraction=0.2)
        assert stream[0].test is not None
        assert stream[1].test is not None
        assert stream[0].train.ids.tolist() == list(range(8))
        assert stream[0].test.ids.tolist() == [8, 9]
        assert stream[1].test.ids.tolist() == [18, 19]

    @pytest.mark.parametrize(
        ("labels", "outputs"),
        [(torch.tensor([0, 4]), 5), (torch.rand(2), 1), (torch.rand(2, 3), 3)],
    )
    def test_num_outputs(self, labels: Tensor, outputs: int) -> None:
        assert by_time(torch.rand(2, 2), labels, 1).num_outputs == outputs

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="between 1 and 2"):
            by_time(torch.rand(2, 2), torch.tensor([0, 1]), 3)
        with pytest.raises(ValueError, match="test_fraction"):
            by_time(torch.rand(2, 2), torch.tensor([0, 1]), 1, test_fraction=1.0)
        with pytest.raises(ValueError, match="no train examples"):
            by_time(torch.rand(2, 2), torch.tensor([0, 1]), 2, test_fraction=0.5)


class TestToys:
    def test_digits(self) -> None:
        pytest.importorskip("sklearn")
        train, test = toys.digits(test_fraction=0.25)
        assert sorted(train.ids.tolist() + test.ids.tolist()) == list(range(1797))
        assert train.inputs.shape[1:] == (1, 8, 8)  # type: ignore[union-attr]
        x = torch.as_tensor(train.inputs)
        assert (x.dtype, float(x.min()), float(x.max())) == (torch.float32, 0.0, 1.0)
        for c in range(10):
            members = [int((part.labels == c).sum()) for part in (train, test)]
            assert abs(members[1] - 0.25 * sum(members)) <= 0.5
        assert torch.equal(toys.digits()[1].ids, test.ids)
        assert not torch.equal(toys.digits(seed=1)[1].ids, test.ids)
        with pytest.raises(ValueError, match="test_fraction"):
            toys.digits(test_fraction=0.0)

    def test_digits_without_sklearn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without(name: str, *args: Any, **keywords: Any) -> Any:
            if name.startswith("sklearn"):
                raise ImportError(name)
            return real(name, *args, **keywords)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"lifelong\[demo\]"):
            toys.digits()

    @pytest.mark.parametrize(("option", "num_tasks"), [(0, 5), (1, 6), (4, 2)])
    def test_fromp_toy(self, option: int, num_tasks: int) -> None:
        stream = toys.fromp_toy(option, num_per_class=2000)
        assert (len(stream), stream.num_outputs, stream.scenario) == (num_tasks, 2, "domain")
        x, y = torch.as_tensor(stream[0].train.inputs), stream[0].train.labels
        expected = [([0.0, 0.2], [0.08, 0.22]), ([0.45, 0.0], [0.08, 0.16])]
        for c, (centre, sd) in enumerate(expected):
            # Six standard errors of a mean, and of a standard deviation, of 2000 points.
            assert x[y == c].mean(0).tolist() == pytest.approx(centre, abs=6 * 0.22 / 2000**0.5)
            assert x[y == c].std(0).tolist() == pytest.approx(sd, rel=6 / 4000**0.5)
        same = toys.fromp_toy(option, num_per_class=2000)
        assert torch.equal(torch.as_tensor(same[-1].train.inputs), stream[-1].train.inputs)

    def test_fromp_toy_refused(self) -> None:
        with pytest.raises(ValueError, match="option"):
            toys.fromp_toy(2)
        with pytest.raises(ValueError, match="num_per_class"):
            toys.fromp_toy(num_per_class=0)

    def test_two_moons(self) -> None:
        stream = toys.two_moons(num_per_class=300, noise=0.0)
        assert sorted(all_ids(stream)) == list(range(600))
        assert sum(len(task.test or ()) for task in stream) == 600
        left, right = (torch.as_tensor(task.train.inputs)[:, 0] for task in stream)
        assert float(left.max()) < 0.5 <= float(right.min())
        for task in stream:
            assert set(task.train.labels.tolist()) == {0, 1}
            x, y = torch.as_tensor(task.train.inputs), task.train.labels
            centre = torch.stack([y.float(), 0.5 * y], dim=1)
            torch.testing.assert_close((x - centre).norm(dim=1), torch.ones(len(x)))
        with pytest.raises(ValueError, match="noise"):
            toys.two_moons(noise=-1.0)
