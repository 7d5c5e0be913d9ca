"A damaged file is named, with what to do about it; the shipped files can be made anew, byte for byte."
import gzip
import shutil

import numpy as np
import pytest

from spikeprompt.data import CHECKSUMS, DataError, from_idx, read_checked, read_fashion_mnist, read_npz, shorten
from spikeprompt.settings import root

SHIPPED = root / "data/fashion_mnist"


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "fashion_mnist")


def test_shipped_files():
    pictures = read_fashion_mnist(SHIPPED)
    assert pictures.x_train.shape == (10_000, 1, 32, 32) and pictures.x_test.shape == (10_000, 1, 32, 32)
    assert np.bincount(pictures.y_test).tolist() == [1000] * 10
    assert pictures.x_train[0, 0, :2].max() == 0 and pictures.x_train[0].max() == 255


@pytest.mark.parametrize("name", CHECKSUMS)
def test_a_flipped_bit_is_found(copy, name):
    content = bytearray(gzip.decompress((copy / name).read_bytes()))
    content[-1] ^= 1
    (copy / name).write_bytes(gzip.compress(bytes(content), 1))
    with pytest.raises(DataError, match=rf"{name} is not Fashion-MNIST.*git checkout"):
        read_checked(copy, name)


def test_a_truncated_file_is_found(copy):
    path = copy / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz cannot be unzipped"):
        read_fashion_mnist(copy)


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


def test_own_data_from_an_npz(tmp_path):
    x, y = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y, class_names=list("abcdef"))
    assert read_npz(tmp_path / "own.npz").x_train.shape == (6, 3, 8, 8)
    np.savez(tmp_path / "float.npz", x_train=x / 2, y_train=y, x_test=x, y_test=y, class_names=list("abcdef"))
    with pytest.raises(DataError, match="float.npz: x_train is float64"):
        read_npz(tmp_path / "float.npz")
