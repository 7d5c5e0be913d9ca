"Datasets: a damaged or unfit file is named with what to do about it; splits never mix; the shipped files can be made anew."

import gzip
import hashlib
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from spikeprompt.config import ConfigError, DatasetConfig, project_root
from spikeprompt.datasets.base import READERS, DataError, ImageDataset, register_dataset
from spikeprompt.datasets.fashion_mnist import CHECKSUMS, from_idx, read_checked, read_fashion_mnist, shorten
from spikeprompt.datasets.image_files import read_file_lists, to_size
from spikeprompt.datasets.readers import CARD, cached_dataset, load_dataset, read_dataset, read_npz, save_dataset
from spikeprompt.datasets.splits import Images, split, stratified_order
from spikeprompt.datasets.splits import test_images as images_for_testing
from spikeprompt.datasets.standard import STANDARD, read_standard
from spikeprompt.files import DamagedFile

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
    with pytest.raises(ConfigError, match="datasets.cifar: allowed are .*fashion_mnist.*, or a file .*cifar.npz"):
        read_dataset("cifar", config)


def test_a_reader_of_ones_own_gets_its_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(READERS, "own", None)  # which is undone after the test
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
        save_dataset(dataset, tmp_path / name)
    assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "two").iterdir())
    ]
    for read in load_dataset, cached_dataset:
        for name, value in vars(read(tmp_path / "one")).items():
            assert np.array_equal(value, getattr(dataset, name))


def test_a_dataset_that_was_not_written_to_its_end_is_refused(tmp_path):
    save_dataset(ImageDataset(**small()), tmp_path / "own")
    (tmp_path / "own" / CARD).unlink()
    with pytest.raises(DamagedFile, match="own/arrays.json: No such file"):
        load_dataset(tmp_path / "own")


def test_a_prepared_dataset_is_read_once(tmp_path):
    save_dataset(ImageDataset(**small()), tmp_path / "own")
    first = cached_dataset(tmp_path / "own")
    shutil.rmtree(tmp_path / "own")
    assert cached_dataset(tmp_path / "own") is first


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
    few, more = (images_for_testing(fashion, DatasetConfig(n_test=n)) for n in (50, 200))
    assert torch.equal(few[0], more[0][:50]) and torch.equal(few[1], more[1][:50])


def test_too_many_images_are_refused_by_name(fashion):
    with pytest.raises(ConfigError, match=r"datasets.fashion.n_train \+ n_val = 10010: allowed are at most 10000"):
        split(fashion, DatasetConfig(n_train=10_000, n_val=10), 0, "fashion")
    with pytest.raises(ConfigError, match="datasets.fashion.n_test = 10001: allowed are at most 10000"):
        images_for_testing(fashion, DatasetConfig(n_test=10_001), "fashion")


def test_images_are_resized_as_bytes_and_get_three_channels(fashion):
    images = torch.from_numpy(fashion.x_test[:4])
    same, larger = to_size(images, (32, 32)), to_size(images, (48, 40), "bicubic")
    assert torch.equal(same, images.expand(-1, 3, -1, -1))
    assert larger.shape == (4, 3, 48, 40) and larger.dtype == torch.uint8


def folder_of_images(folder, names, number=6):
    "Image files of two sizes, some a class; the red of image i of class c is 40 c + i."
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (12 + i % 2, 9), (40 * label + i, 0, 0)).save(folder / name / f"{i}.png")


def test_a_folder_of_images_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr("spikeprompt.datasets.readers.project_root", lambda: tmp_path)
    folder_of_images(tmp_path / "data/pets", ["cats", "dogs"])
    config = DatasetConfig(folder="data", image_size=8)
    first = read_dataset("pets", config)
    assert first.x_train.shape == (10, 3, 8, 8) and isinstance(first.x_train, np.memmap) and first.class_names == ["cats", "dogs"]
    opened = []
    monkeypatch.setattr("spikeprompt.datasets.image_files.read_image", lambda *given: opened.append(given))
    again = read_dataset("pets", config)
    assert not opened and np.array_equal(first.x_train, again.x_train) and np.array_equal(first.y_test, again.y_test)
    monkeypatch.undo()
    monkeypatch.setattr("spikeprompt.datasets.readers.project_root", lambda: tmp_path)
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "data/pets/dogs/new.png")
    assert max(read_dataset("pets", config).x_train.max(), read_dataset("pets", config).x_test.max()) == 255
    assert len([*(tmp_path / "runs/images").iterdir()]) == 1  # what was decoded before the change is gone


def test_a_changed_reader_decodes_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("spikeprompt.datasets.readers.project_root", lambda: tmp_path)
    folder_of_images(tmp_path / "pets", ["cats", "dogs"])
    config = DatasetConfig(folder=".", image_size=8)
    read_dataset("pets", config)
    first = [path.name for path in (tmp_path / "runs/images").iterdir()]
    monkeypatch.setattr("inspect.getsource", lambda part: "other code")
    read_dataset("pets", config)
    second = [path.name for path in (tmp_path / "runs/images").iterdir()]
    assert len(first) == len(second) == 1 and first != second


def test_images_behind_links_are_read_and_their_changes_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("spikeprompt.datasets.readers.project_root", lambda: tmp_path)
    folder_of_images(tmp_path / "disk", ["cats", "dogs"])
    (tmp_path / "pets").mkdir()
    for name in "cats", "dogs":
        (tmp_path / "pets" / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk/cats/loop").symlink_to(tmp_path / "disk")  # a circle
    config = DatasetConfig(folder=".", image_size=8)
    before = read_dataset("pets", config)
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "disk/dogs/0.png")
    after = read_dataset("pets", config)
    assert before.x_train.max() < 255 and max(after.x_train.max(), after.x_test.max()) == 255


def test_a_reader_of_files_needs_a_folder():
    with pytest.raises(ConfigError, match="datasets.cifar10.folder is missing"):
        read_dataset("cifar10", DatasetConfig())


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("spikeprompt.datasets.readers.project_root", lambda: tmp_path)
    folder_of_images(tmp_path / "pets", ["cats", "dogs"])
    (tmp_path / "pets/cats/3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="pets/cats/3.png: no image that can be read") as error:
        read_dataset("pets", DatasetConfig(folder=".", image_size=8))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@pytest.fixture
def task(tmp_path):
    "A task of VTAB-1k in small: six training, three validation and three test images."
    folder_of_images(tmp_path / "own", ["a", "b", "c"], 4)
    for name, numbers in ("train800", [0, 1]), ("val200", [2]), ("test", [3]):
        lines = [f"{letter}/{i}.png {label}\n" for i in numbers for label, letter in enumerate("abc")]
        (tmp_path / "own" / f"{name}.txt").write_text("".join(lines))
    return tmp_path


def test_file_lists_fix_the_split(task, monkeypatch):
    monkeypatch.setattr("spikeprompt.datasets.readers.project_root", lambda: task)
    dataset = read_dataset("own", DatasetConfig(folder=".", image_size=8))
    reds = lambda images: sorted(np.asarray(images)[:, 0, 4, 4].tolist())
    assert dataset.fixed_train == 6 and reds(dataset.x_train) == [0, 1, 2, 40, 41, 42, 80, 81, 82] and reds(dataset.x_test) == [3, 43, 83]
    config = DatasetConfig(n_train=10, n_val=10).model_copy(update={"n_train": 6, "n_val": 3})
    for seed in 0, 1:
        parts = split(dataset, config, seed)
        assert reds(parts.train[0]) == [0, 1, 40, 41, 80, 81] and reds(parts.val[0]) == [2, 42, 82]
    with pytest.raises(ConfigError, match="datasets.own.n_train = 7, n_val = 2: allowed are at most 6 and 3, its own split"):
        split(dataset, config.model_copy(update={"n_train": 7, "n_val": 2}), 0, "own")


@pytest.mark.parametrize(
    "line, said",
    [
        ("a/3.png", "test.txt, line 4: 'a/3.png' is no file and label"),
        ("a/3.png -1", "is no file and label"),
        ("../../etc/passwd 0", "lies outside the folder of the list"),
        ("/etc/passwd 0", "lies outside the folder of the list"),
        ("a/9.png 0", "a/9.png: no image that can be read"),
    ],
)
def test_an_unfit_line_of_a_list_is_named(task, line, said):
    with open(task / "own/test.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as error:
        read_file_lists(task / "own", (8, 8))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_large_part_is_read_when_it_is_taken(monkeypatch, fashion):
    config, double = DatasetConfig(n_train=300, n_val=100), lambda images: to_size(images, (64, 64))
    kept = split(fashion, config, 0, resize=double)
    monkeypatch.setattr("spikeprompt.datasets.splits.KEPT_BYTES", 1_500_000)  # 100 images of 64 px have 1,228,800 bytes
    streamed = split(fashion, config, 0, resize=double)
    assert isinstance(streamed.train[0], Images) and isinstance(streamed.val[0], torch.Tensor)
    assert torch.equal(streamed.train[0][:], kept.train[0]) and len(streamed.train[0]) == 300
    some = torch.tensor([5, 299, 0])
    assert torch.equal(streamed.train[0][some], kept.train[0][some]) and torch.equal(streamed.train[0][[7]], kept.train[0][[7]])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_dataset_of_torchvisions_is_read(name, tmp_path, monkeypatch):
    "Batches as the archive holds them, two images each, whose checksums torchvision is told."
    kind = getattr(torchvision.datasets, STANDARD[name].kind)
    key = "labels" if name == "cifar10" else "fine_labels"
    top, names = tmp_path / kind.base_folder, [f"class {i}" for i in range(2)]
    top.mkdir()
    sums = {}

    def dump(file, record):
        (top / file).write_bytes(pickle.dumps(record))  # torchvision's format
        return file, hashlib.md5((top / file).read_bytes()).hexdigest()

    for number, (file, _) in enumerate([*kind.train_list, *kind.test_list]):
        sums[file] = dump(file, {"data": np.full((2, 3072), number, np.uint8), key: [0, 1]})
    meta = dump(kind.meta["filename"], {kind.meta["key"]: names})
    for attribute in "train_list", "test_list":
        monkeypatch.setattr(kind, attribute, [[*sums[file]] for file, _ in getattr(kind, attribute)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta[1]})
    batches = len(kind.train_list)
    with pytest.raises(DataError, match=f"holds {2 * batches} training images of {kind.__name__}, 50000 are expected"):
        read_standard(name, tmp_path, None)
    monkeypatch.setitem(STANDARD, name, replace(STANDARD[name], images=(2 * batches, 2)))
    dataset = read_standard(name, tmp_path, None)
    assert dataset.x_train.shape == (2 * batches, 3, 32, 32) and dataset.class_names == names
    assert dataset.x_train[:, 0, 0, 0].tolist() == [n for n in range(batches) for _ in range(2)] and dataset.x_test.max() == batches
    assert read_standard(name, tmp_path, 16).x_train.shape == (2 * batches, 3, 16, 16)
    first = top / kind.train_list[0][0]
    first.write_bytes(first.read_bytes() + b"1")
    with pytest.raises(DataError, match=f"holds no {kind.__name__} as torchvision keeps it .*spikeprompt download {name}"):
        read_standard(name, tmp_path, None)


def test_a_dataset_without_parts_keeps_a_fifth_for_testing(tmp_path, monkeypatch):
    names = ["AnnualCrop", "Forest"]
    folder_of_images(tmp_path / "eurosat/2750", names, 10)
    with pytest.raises(DataError, match="holds 20 training images of EuroSAT, 27000 are expected"):  # as after an interrupted download
        read_standard("eurosat", tmp_path, 8)
    monkeypatch.setitem(STANDARD, "eurosat", replace(STANDARD["eurosat"], images=(20, 0)))
    dataset = read_standard("eurosat", tmp_path, 8)
    assert dataset.class_names == names and dataset.x_train.shape == (16, 3, 8, 8) and np.bincount(dataset.y_test).tolist() == [2, 2]
    reds = [*dataset.x_train[:, 0, 4, 4].tolist(), *dataset.x_test[:, 0, 4, 4].tolist()]
    assert sorted(reds) == [*range(10), *range(40, 50)]
    with pytest.raises(ConfigError, match="datasets.eurosat.image_size is missing: its images have several sizes"):
        read_standard("eurosat", tmp_path, None)
    (tmp_path / "eurosat/2750/Forest/3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="image 13 of EuroSAT cannot be read"):
        read_standard("eurosat", tmp_path, 8)


@pytest.mark.parametrize("name", [*STANDARD])
def test_a_dataset_that_is_not_there_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(DataError, match=f"as torchvision keeps it .*spikeprompt download {name} --folder") as error:
        read_dataset(name, DatasetConfig(folder=str(tmp_path)))
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]
