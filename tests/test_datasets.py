"Datasets: a damaged or unfit file is named with what to do about it; splits never mix; the shipped files can be made anew."

import gzip
import shutil

import numpy as np
import pytest
import torch

from spikeprompt import datasets
from spikeprompt.config import ConfigError, DatasetConfig, project_root
from spikeprompt.datasets import (
    CHECKSUMS,
    DataError,
    ImageDataset,
    cached_dataset,
    from_idx,
    load_dataset,
    read_checked,
    read_dataset,
    read_fashion_mnist,
    read_npz,
    register_dataset,
    save_dataset,
    shorten,
    split,
    stratified_order,
    to_size,
)

SHIPPED = project_root() / "data/fashion_mnist"


@pytest.fixture(scope="module")
def fashion():
    return read_fashion_mnist(SHIPPED)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "fashion_mnist")


def small(**changes):
    "Arrays of a dataset of six classes, one image each."
    x, y = np.zeros((6, 3, 8, 8), np.uint8), np.arange(6)
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "class_names": list("abcdef"), **changes}


def images_of(part):
    "The images of a part of a split, as a set."
    return {image.numpy().tobytes() for image in part[0]}


def test_the_first_images_of_each_part_are_a_dataset():
    dataset = read_dataset("sprites_orientation", DatasetConfig())
    few = dataset.first(200)
    assert np.array_equal(few.x_train, dataset.x_train[:200]) and np.array_equal(few.y_test, dataset.y_test[:200])
    with pytest.raises(DataError, match="y_train lacks"):
        dataset.first(2)


def test_shipped_files(fashion):
    assert fashion.x_train.shape == fashion.x_test.shape == (10_000, 1, 32, 32)
    assert np.bincount(fashion.y_test).tolist() == [1000] * 10
    assert fashion.x_train[0, 0, :2].max() == 0 and fashion.x_train[0].max() == 255


@pytest.mark.parametrize("name", CHECKSUMS)
def test_a_flipped_bit_is_found(copy, name):
    content = bytearray(gzip.decompress((copy / name).read_bytes()))
    content[-1] ^= 1
    (copy / name).write_bytes(gzip.compress(bytes(content), 1))
    with pytest.raises(DataError, match=rf"{name} is not Fashion-MNIST.*git checkout"):
        read_checked(copy, name)


def test_a_truncated_or_missing_file_is_found(copy):
    path = copy / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz cannot be unzipped"):
        read_fashion_mnist(copy)
    path.unlink()
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz is missing; `git checkout -- data`"):
        read_fashion_mnist(copy)


@pytest.mark.slow
def test_shortening_the_shipped_files_gives_the_shipped_files(tmp_path):
    shorten(SHIPPED, tmp_path / "made")
    for name in CHECKSUMS:
        made = gzip.decompress((tmp_path / "made" / name).read_bytes())
        assert made == gzip.decompress((SHIPPED / name).read_bytes())
    assert from_idx(made).shape == (10_000,)


def test_shortening_a_bad_source_leaves_nothing_behind(copy, tmp_path):
    (copy / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz is missing"):
        shorten(copy, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"x_train": np.zeros((6, 3, 8, 8))}, "x_train is float64"),
        ({"x_train": np.zeros((6, 2, 8, 8), np.uint8)}, "needed: uint8 [N, 1 or 3, H, W]"),
        ({"x_test": np.zeros((6, 3, 8, 9), np.uint8)}, "needed: uint8 [N, 3, 8, 8]"),
        ({"y_test": np.arange(5)}, "one label for each of the 6 images"),
        ({"y_train": np.arange(6) + 1}, "y_train must be integers from 0 to 5"),
        ({"y_test": np.arange(6) / 2}, "y_test must be integers from 0 to 5"),
        ({"y_train": np.zeros(6, int)}, "y_train lacks 5 of the 6 classes"),
    ],
)
def test_an_unfit_dataset_is_refused(changes, said):
    with pytest.raises(DataError) as error:
        ImageDataset(**small(**changes))
    assert said in str(error.value)


def test_a_dataset_from_an_npz(tmp_path):
    arrays = {name: np.moveaxis(value, 1, -1) if name.startswith("x_") else value for name, value in small().items()}
    np.savez(tmp_path / "own.npz", **arrays)
    config = DatasetConfig(folder=str(tmp_path))
    assert read_dataset("own", config).x_train.shape == (6, 3, 8, 8)
    np.savez(tmp_path / "float.npz", **arrays | {"x_train": arrays["x_train"] / 2})
    with pytest.raises(DataError, match=r"float.npz: x_train is float64 \(6, 8, 8, 3\)"):
        read_npz(tmp_path / "float.npz")
    np.savez(tmp_path / "labels.npz", **arrays | {"y_test": arrays["y_test"] + 1})
    with pytest.raises(DataError, match="labels.npz: y_test must be integers from 0 to 5"):
        read_npz(tmp_path / "labels.npz")
    with pytest.raises(ConfigError, match="datasets.cifar: allowed are sprites_.*, fashion_mnist, or a file .*cifar.npz"):
        read_dataset("cifar", config)


def test_a_reader_of_ones_own_gets_its_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(datasets.READERS, "own", None)  # which is undone after the test
    folders = []

    @register_dataset("own")
    def reader(folder):
        folders.append(folder)
        return ImageDataset(**small())

    read_dataset("own", DatasetConfig(folder=str(tmp_path)))
    assert folders == [tmp_path]


def test_a_saved_dataset_comes_back(tmp_path):
    dataset = ImageDataset(**small())
    for name in "one", "two":
        save_dataset(dataset, tmp_path / f"{name}.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    for read in load_dataset, cached_dataset:
        for name, value in vars(read(tmp_path / "one.npz")).items():
            assert np.array_equal(value, getattr(dataset, name))


def test_a_prepared_dataset_is_read_once(tmp_path):
    save_dataset(ImageDataset(**small()), tmp_path / "own.npz")
    first = cached_dataset(tmp_path / "own.npz")
    (tmp_path / "own.npz").unlink()
    assert cached_dataset(tmp_path / "own.npz") is first


def test_a_split_is_the_seeds_and_holds_validation_out(fashion):
    config = DatasetConfig(n_train=700, n_val=300, n_test=10)
    first, again, other = (split(fashion, config, seed) for seed in (0, 0, 1))
    assert torch.equal(first.train[0], again.train[0]) and torch.equal(first.val[1], again.val[1])
    assert not torch.equal(first.train[0], other.train[0])
    assert len(first.train[1]) == 700 and len(first.val[1]) == 300
    assert not images_of(first.train) & images_of(first.val)
    share = torch.from_numpy(np.bincount(fashion.y_train) / len(fashion.y_train))
    assert (first.train[1].bincount() - 700 * share).abs().max() <= 1


def test_every_prefix_of_the_order_is_stratified():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, seed=3)
    assert np.array_equal(np.sort(order), np.arange(100))
    for n in range(1, 101):
        assert np.abs(np.bincount(labels[order[:n]], minlength=3) - n * np.array([0.6, 0.3, 0.1])).max() <= 1.5


def test_fewer_test_images_are_the_first_of_more(fashion):
    few, more = (datasets.test_images(fashion, DatasetConfig(n_test=n)) for n in (50, 200))
    assert torch.equal(few[0], more[0][:50]) and torch.equal(few[1], more[1][:50])


def test_too_many_images_are_refused_by_name(fashion):
    with pytest.raises(ConfigError, match=r"datasets.fashion.n_train \+ n_val = 10010: allowed are at most 10000"):
        split(fashion, DatasetConfig(n_train=10_000, n_val=10), 0, "fashion")
    with pytest.raises(ConfigError, match="datasets.fashion.n_test = 10001: allowed are at most 10000"):
        datasets.test_images(fashion, DatasetConfig(n_test=10_001), "fashion")


def test_images_are_resized_as_bytes_and_get_three_channels(fashion):
    images = torch.from_numpy(fashion.x_test[:4])
    same, larger = to_size(images, (32, 32)), to_size(images, (48, 40), "bicubic")
    assert torch.equal(same, images.expand(-1, 3, -1, -1))
    assert larger.shape == (4, 3, 48, 40) and larger.dtype == torch.uint8
