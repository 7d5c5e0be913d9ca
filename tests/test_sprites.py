"Sprites: fixed bytes, balanced classes, labels that the images show, and nothing else that depends on the label."

import hashlib

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn.linear_model import LogisticRegression

from spikeprompt.config import ConfigError, DatasetConfig
from spikeprompt.datasets.readers import read_dataset
from spikeprompt.datasets.splits import split
from spikeprompt.datasets.splits import test_images as images_for_testing
from spikeprompt.datasets.sprites import SHAPES, SIDE, Scenes, draw_scenes, orientation_scenes, position_scenes, render

TASKS = {"sprites_orientation": (orientation_scenes, 0), "sprites_position": (position_scenes, 1)}
CHECKSUMS = {
    "sprites_orientation": "a6816c94c7aceebb8e91cbff366e53488074ec06e3eed983f498dca85f9ccd3e",
    "sprites_position": "074f045d4800693de3cdeb3910c28b3fe9cd6c7dc54b584a3a8cdb63e992f6df",
}
LABELS = np.arange(8000) % 16


@pytest.fixture(scope="module")
def datasets():
    return {name: read_dataset(name, DatasetConfig()) for name in TASKS}


@pytest.fixture(scope="module")
def scenes():
    "Those of which the datasets are made."
    return {name: make(LABELS, np.random.default_rng(seed)) for name, (make, seed) in TASKS.items()}


def silhouettes(scenes):
    "White sprites on black, 0 to 1."
    plain = {"colour": np.ones_like(scenes.colour), **{name: 0 * getattr(scenes, name) for name in ("ground", "gradient", "contrast")}}
    return render(Scenes(**vars(scenes) | plain))[:, 0] / 255


def centroids(masks):
    "Centres of mass [N, 2], x to the right and y upwards from the middle."
    line = np.arange(SIDE) - (SIDE - 1) / 2
    mass = masks.sum((1, 2))
    return np.stack([(masks * line).sum((1, 2)) / mass, -(masks * line[:, None]).sum((1, 2)) / mass], 1)


@pytest.mark.parametrize("name", TASKS)
def test_bytes_and_balance(datasets, name):
    found = datasets[name]
    content = b"".join(array.tobytes() for array in (found.x_train, found.y_train, found.x_test, found.y_test))
    assert hashlib.sha256(content).hexdigest() == CHECKSUMS[name]
    assert found.x_train.shape == (6000, 3, 32, 32) and found.x_test.shape == (2000, 3, 32, 32)
    assert np.bincount(found.y_train).tolist() == [375] * 16 and np.bincount(found.y_test).tolist() == [125] * 16
    assert len(set(found.class_names)) == 16


@pytest.mark.parametrize("name", TASKS)
def test_images_show_their_labels_scenes(datasets, scenes, name):
    found = datasets[name]
    assert np.array_equal(np.concatenate([found.y_train, found.y_test]), LABELS)
    assert np.array_equal(np.concatenate([found.x_train, found.x_test]), render(scenes[name]))


def test_no_two_images_are_alike(datasets):
    images = [image.tobytes() for found in datasets.values() for part in (found.x_train, found.x_test) for image in part]
    assert len(set(images)) == len(images) == 16_000


def test_the_sprites_centroid_lies_in_the_labels_cell(datasets, scenes):
    masks = silhouettes(scenes["sprites_position"])
    x, y = centroids(masks).T
    row, column = np.floor((12 - y) / 6), np.floor((x + 12) / 6)
    assert np.array_equal(4 * row + column, LABELS)
    assert max(np.abs((x + 12) % 6 - 3).max(), np.abs((y + 12) % 6 - 3).max()) < 2.2
    assert datasets["sprites_position"].class_names[6] == "row 2, column 3"


@pytest.mark.parametrize("name", TASKS)
def test_no_sprite_is_cut_and_each_has_its_size(scenes, name):
    masks = silhouettes(scenes[name])
    edge = np.concatenate([masks[:, [0, -1]].reshape(8000, -1), masks[:, :, [0, -1]].reshape(8000, -1)], 1)
    assert edge.max() < 1
    least, most = {"sprites_orientation": (7, 10), "sprites_position": (4, 4.8)}[name]
    radius = scenes[name].radius
    assert least <= radius.min() < radius.max() <= most
    for shape, area in enumerate((1.11, 1.19, 2.0, 1.42)):
        chosen = scenes[name].shape == shape
        assert np.abs(masks[chosen].sum((1, 2)) / radius[chosen] ** 2 - area).max() < 0.1


def test_an_image_turned_by_a_class_step_is_of_the_next_class():
    "Among the same sprite at all 16 directions, the one turned by scipy is nearest to the next direction."
    rng, n = np.random.default_rng(5), 16
    for shape in range(len(SHAPES)):
        of_label = []
        for label in range(n):
            scenes = orientation_scenes(np.full(n, label), np.random.default_rng(3))
            of_label.append(silhouettes(Scenes(**vars(scenes) | {"shape": np.full(n, shape), "centre": np.zeros((n, 2))})))
        candidates = np.stack(of_label, 1)
        labels = rng.permutation(n)
        turned = ndimage.rotate(candidates[np.arange(n), labels], 22.5, axes=(2, 1), reshape=False, order=1)
        nearest = ((turned[:, None] - candidates) ** 2).sum((2, 3)).argmin(1)
        assert np.array_equal(nearest, (labels + 1) % n)


def test_directions_are_anticlockwise_from_the_right():
    "Turned back, the arrow has its head, the wider part, on the right."
    scenes = draw_scenes(np.radians([0, 90, 180, 270]), np.zeros((4, 2)), np.full(4, 10.0), np.random.default_rng(0))
    masks = silhouettes(Scenes(**vars(scenes) | {"shape": np.zeros(4, int)}))
    for turns, mask in enumerate(masks):
        width = np.rot90(mask, -turns).sum(0)
        assert width[17:20].mean() > 2 * width[8:15].mean() > 0


def test_nothing_but_the_label_depends_on_the_label(scenes):
    for name, found in scenes.items():
        values = {}
        for field, value in vars(found).items():
            for i, column in enumerate(np.atleast_2d(value.T)):
                values[f"{field}{i}"] = column.astype(float)
        values |= {"level": found.colour.mean(1) - found.ground.mean(1)}
        shown = {"sprites_orientation": ["angle0"], "sprites_position": ["centre0", "centre1"]}[name]
        for field, column in values.items():
            same = stats.f_oneway(*(column[LABELS == label] for label in range(16))).pvalue
            assert same < 1e-100 if field in shown else same > 0.001, (name, field, same)
        table = stats.contingency.crosstab(found.shape, LABELS).count
        assert stats.chi2_contingency(table).pvalue > 0.001 and table.min() > 80


@pytest.mark.parametrize("name", TASKS)
def test_the_sprite_is_seen_and_as_often_brighter_as_darker(scenes, name):
    found = scenes[name]
    level = found.colour.mean(1) - found.ground.mean(1)
    assert np.abs(level).min() >= 0.25 - 1e-9 and abs((level > 0).mean() - 0.5) < 0.02
    for colours in found.colour, found.ground:
        assert colours.min() >= 0 and colours.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name, limit", [("sprites_orientation", 0.10), ("sprites_position", 0.30)])
def test_raw_pixels_tell_little(datasets, name, limit):
    found = datasets[name]
    train, test = (x.reshape(len(x), -1) / np.float32(255) for x in (found.x_train[:1500], found.x_test))
    classifier = LogisticRegression(C=0.01, max_iter=300).fit(train, found.y_train[:1500])
    assert classifier.score(train, found.y_train[:1500]) > 0.2
    assert 1 / 32 < classifier.score(test, found.y_test) < limit


def test_too_many_images_are_refused_by_name(datasets):
    found = datasets["sprites_position"]
    with pytest.raises(ConfigError, match=r"datasets.sprites_position.n_train \+ n_val = 6500: allowed are at most 6000"):
        split(found, DatasetConfig(n_train=6000, n_val=500), 0, "sprites_position")
    with pytest.raises(ConfigError, match="datasets.sprites_position.n_test = 2001: allowed are at most 2000"):
        images_for_testing(found, DatasetConfig(n_test=2001), "sprites_position")
