"Corruptions do what theory and the published code say, and give each image its own draw."

import hashlib
from math import pi, sqrt

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from spikeprompt.config import ConfigError, DatasetConfig, RobustnessConfig
from spikeprompt.datasets.base import DataError
from spikeprompt.datasets.readers import read_dataset
from spikeprompt.robustness import corruptions
from spikeprompt.robustness.corruptions import CORRUPTIONS, FAMILIES, TABLES, conditions, corrupt, image_generator, read_corrupted

PHOTOS = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
EVERY = pytest.mark.parametrize("name", CORRUPTIONS)
BOTH = pytest.mark.parametrize("table", TABLES)


def generators(n):
    return [image_generator("test", number) for number in range(n)]


@pytest.fixture(scope="module")
def tiles():
    "Squares of two photographs, uint8 [24, 3, 64, 64]."
    photos = [torch.from_numpy(np.asarray(photo.resize((256, 192))).copy()).movedim(-1, 0) for photo in PHOTOS]
    return torch.cat([pixels.unfold(1, 64, 64).unfold(2, 64, 64).flatten(1, 2).movedim(1, 0) for pixels in photos])


@pytest.fixture(scope="module")
def fashion():
    return torch.from_numpy(read_dataset("fashion_mnist", DatasetConfig(folder="data/fashion_mnist")).x_test[:66])


PATTERN = torch.arange(6 * 3 * 32 * 32).mul(37).remainder(256).to(torch.uint8).view(6, 3, 32, 32)
RECORDED = {  # first half of the sha256 of PATTERN at severities 1, 3 and 5, the severity being the seed too
    ("imagenet_c", "gaussian_noise"): "d82de7b8961b7197",
    ("imagenet_c", "shot_noise"): "d18d3e7b78febe3c",
    ("imagenet_c", "impulse_noise"): "a1261119757b8e7c",
    ("imagenet_c", "speckle_noise"): "c88d90f139fb099d",
    ("cifar_c", "gaussian_noise"): "6f2071ca45d4c602",
    ("cifar_c", "shot_noise"): "f28a23ca7d34c509",
    ("cifar_c", "impulse_noise"): "28acd376e56ac51c",
    ("cifar_c", "speckle_noise"): "b4adea3c9ead0e0f",
}


@pytest.mark.parametrize("table, name", RECORDED)
def test_noise_keeps_its_bytes(table, name):
    made = [corrupt(PATTERN, name, severity, TABLES[table][name][severity - 1], seed=severity) for severity in (1, 3, 5)]
    assert hashlib.sha256(torch.cat(made).numpy().tobytes()).hexdigest()[:16] == RECORDED[table, name]


def test_free_noise_keeps_its_bytes():
    made = torch.cat([corrupt(PATTERN, "gaussian", sigma, sigma, seed=1) for sigma in (0.05, 0.3)])
    assert hashlib.sha256(made.numpy().tobytes()).hexdigest()[:16] == "8bf4e384fe4f531f"
    assert torch.equal(corrupt(PATTERN, "clean", 0, 0.0), PATTERN)


def test_families_and_tables_name_the_same_corruptions():
    assert [name for names in FAMILIES.values() for name in names] == list(CORRUPTIONS)
    for table in TABLES.values():
        assert list(table) == list(CORRUPTIONS) and {len(constants) for constants in table.values()} == {5}


def test_conditions_are_clean_then_sigmas_then_corruptions():
    found = conditions(RobustnessConfig(sigmas=[0.1], corruptions=["fog", "contrast"], severities=[2, 5]))
    assert found == [
        ("clean", 0, 0.0),
        ("gaussian", 0.1, 0.1),
        ("fog", 2, (0.5, 3)),
        ("fog", 5, (1.5, 1.75)),
        ("contrast", 2, 0.5),
        ("contrast", 5, 0.15),
    ]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sigmas": [1.5]}, r"robustness.sigmas = 1.5: allowed are standard deviations in \(0, 1\]"),
        ({"corruptions": ["frost"]}, "robustness.corruptions = 'frost': allowed are gaussian_noise, .*, jpeg_compression"),
        ({"severities": [6]}, "robustness.severities = 6: allowed are 1 to 5"),
        ({"sigmas": [], "corruptions": []}, "both empty"),
    ],
)
def test_a_wrong_condition_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        conditions(RobustnessConfig(**values))


@BOTH
@EVERY
def test_an_image_does_not_depend_on_its_batch(name, table, fashion):
    constant = TABLES[table][name][2]
    batch = corrupt(fashion, name, 3, constant)
    assert torch.equal(batch[:3], corrupt(fashion[:3], name, 3, constant))
    swapped = fashion.clone()
    swapped[:-1] = fashion[-1]
    assert torch.equal(batch[-1], corrupt(swapped, name, 3, constant)[-1])


@pytest.mark.parametrize("name", [*FAMILIES["noise"], "motion_blur", "fog", "snow", "elastic_transform"])
def test_draws_differ_by_image_severity_and_seed(name, fashion):
    constant, copies = TABLES["cifar_c"][name][2], fashion[:1].expand(2, -1, -1, -1)
    first, second = corrupt(copies, name, 3, constant)
    others = second, corrupt(copies, name, 4, constant)[0], corrupt(copies, name, 3, constant, seed=1)[0]
    assert not any(torch.equal(first, other) for other in others)


@BOTH
@EVERY
def test_sizes_and_channels(name, table):
    for shape in (1, 1, 8, 8), (2, 1, 28, 28), (1, 3, 40, 33), (1, 3, 33, 70):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        made = corrupt(images, name, 5, TABLES[table][name][4])
        assert made.shape == images.shape and made.dtype == torch.uint8 and not torch.equal(made, images)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in (*FAMILIES["noise"], "jpeg_compression")])
def test_three_equal_channels_are_a_grey_image(name, fashion):
    constant, x = TABLES["cifar_c"][name][4], fashion[:8]
    colour = corrupt(x.expand(-1, 3, -1, -1), name, 5, constant).int()
    assert (colour - corrupt(x, name, 5, constant)).abs().max() <= 1


@BOTH
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "elastic_transform"])
def test_severity_grows(name, table, fashion, tiles):
    images = {"cifar_c": fashion, "imagenet_c": tiles}[table]
    moved = [
        (corrupt(images, name, severity, constant).float() - images).abs().mean()
        for severity, constant in enumerate(TABLES[table][name], 1)
    ]
    assert all(after >= 0.94 * before for before, after in zip(moved, moved[1:])) and moved[4] > 1.2 * moved[0]


@BOTH
def test_severity_of_the_elastic_transform_is_its_strain(table):
    strain = [alpha / sigma**2 if alpha else 0 for alpha, sigma, _ in TABLES[table]["elastic_transform"]]
    assert strain == sorted(strain)


# Theory


@pytest.mark.parametrize(
    "name, constant, expected",
    [
        ("gaussian_noise", 0.1, 0.1),
        ("speckle_noise", 0.2, 0.2 * 0.5),
        ("shot_noise", 50, sqrt(0.5 / 50)),
        ("impulse_noise", 0.1, sqrt(0.1 * 0.25)),
    ],
)
def test_noise_has_its_deviation(name, constant, expected):
    noisy = CORRUPTIONS[name](torch.full((50, 3, 32, 32), 0.5), constant, generators(50))
    assert noisy.std() == pytest.approx(expected, rel=0.02) and noisy.mean() == pytest.approx(0.5, abs=2e-3)


def spread_of_a_point(blur):
    "Mass, mean (row, column) and variance (row, column) of what a blur makes of one point at (32, 32)."
    point = torch.zeros(1, 1, 65, 65)
    point[..., 32, 32] = 1
    made, at = blur(point)[0, 0], torch.arange(65.0)
    sides = made.sum(1), made.sum(0)
    means = [float((side * at).sum()) for side in sides]
    return float(made.sum()), means, [float((side * (at - mean) ** 2).sum()) for side, mean in zip(sides, means)]


@pytest.mark.parametrize("blur, constant, variance", [("gaussian_blur", 3, 9), ("defocus_blur", (10, 0.1), 100 / 4)])
def test_blur_spreads_a_point(blur, constant, variance):
    mass, mean, spread = spread_of_a_point(lambda x: CORRUPTIONS[blur](x, constant))
    assert mass == pytest.approx(1) and mean == pytest.approx([32, 32]) and spread == pytest.approx([variance] * 2, rel=0.02)


@pytest.mark.parametrize("angle, row, column", [(0, 0, -1), (90, -1, 0), (-90, 1, 0)])
def test_motion_is_half_a_gaussian(angle, row, column):
    far = 6**2 / (6 * sqrt(pi / 2) + 0.5)  # mean of whole numbers i >= 0 with weights exp(-i² / 2σ²), σ = 6
    mass, mean, _ = spread_of_a_point(lambda x: corruptions.streak(x, 30, 6, torch.tensor([float(angle)])))
    assert mass == pytest.approx(1) and mean == pytest.approx([32 + row * far, 32 + column * far], rel=1e-3)


def test_zoom_blur_flattens_a_slope():
    slope = torch.linspace(-1, 1, 225).expand(1, 1, 225, 225)
    made = corruptions.zoom_blur(slope, (1.31, 0.03))[0, 0, 112]
    factors = np.arange(1, 1.31, 0.03)
    assert (made[150] - made[74]) / (slope[..., 150] - slope[..., 74]).mean() == pytest.approx(
        (1 + (1 / factors).sum()) / (1 + len(factors)), rel=0.01
    )


def test_brightness_keeps_hue_and_saturation():
    colour = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1)
    assert corruptions.brightness(colour, 0.3).flatten().tolist() == pytest.approx([0.3, 0.6, 0.9])
    assert corruptions.brightness(colour, 0.5).flatten().tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert corruptions.brightness(0 * colour, 0.3).flatten().tolist() == pytest.approx([0.3] * 3)


def test_fog_spans_its_range_and_roughens():
    foggy = corruptions.fog(torch.full((6, 1, 32, 32), 0.5), (1.5, 2), generators(6))
    assert foggy.amin((1, 2, 3)).tolist() == pytest.approx([0.5 * 0.5 / 2] * 6)
    assert foggy.amax((1, 2, 3)).tolist() == pytest.approx([0.5] * 6)
    uniform = 2 * corruptions.draw(torch.rand, (64, 64), generators(6)) - 1
    steps = [corruptions.plasma(uniform, decay).diff(dim=1).abs().mean() for decay in (3, 2, 1.5)]
    assert steps[0] < steps[1] < steps[2]


def test_snow_has_the_flakes_of_its_threshold():
    black = torch.zeros(60, 1, 32, 32)
    density = np.exp(-2) / sqrt(2 * pi)  # of N(0, 1) at 2, where its tail is 0.02275
    fallen = corruptions.snow(black, (0.1, 0.2, 1, 0.5, 0, 1, 1.0), generators(60))
    assert fallen.mean() == pytest.approx(2 * (0.1 * 0.02275 + 0.2 * density), rel=0.06)
    streaked = corruptions.snow(black, TABLES["cifar_c"]["snow"][2], generators(60))
    assert torch.allclose(streaked, streaked.rot90(2, (2, 3))) and streaked.min() == pytest.approx(0.1 * 0.5)


def test_contrast_shrinks_around_the_mean(tiles):
    x = tiles / 255
    made = corruptions.contrast(x, 0.3)
    assert torch.allclose(made.mean((2, 3)), x.double().mean((2, 3)))
    assert torch.allclose(made.std((2, 3)), 0.3 * x.double().std((2, 3)), atol=1e-5)


def elastic_shift(constant):
    "How far, in pixels, an elastic transform moves 200 images in the direction of the rows."
    slope = (torch.arange(64) / 63).expand(200, 1, 64, 64)
    return 63 * (corruptions.elastic_transform(slope, constant, generators(200)) - slope)[:, 0]


def test_elastic_transform_moves_pixels_as_far_as_it_says():
    assert elastic_shift((0, 0, 0)).abs().max() < 1e-4
    warp = elastic_shift((0.1, 0.04, 0))[:, 8:-8, 8:-8]  # uniform noise of deviation 1/√3, averaged over 4πσ² pixels
    assert warp.std() == pytest.approx(6.4 / sqrt(3) / (2 * sqrt(pi) * 2.56), rel=0.03)
    jitter = elastic_shift((0, 0, 0.02))[:, 53, 53]  # where one of the three points lies
    assert jitter.std() == pytest.approx(0.02 * 64 / sqrt(3), rel=0.1)


def test_pixels_are_means_of_blocks(fashion):
    made = corrupt(fashion, "pixelate", 1, 0.5).float()
    blocks = torch.nn.functional.avg_pool2d(fashion.float(), 2)
    assert torch.equal(made, made[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert (made[..., ::2, ::2] - blocks).abs().max() <= 1  # Pillow rounds after each axis


# The package imagecorruptions-imaug, where it is installed


def theirs(name, image, severity):
    "The package's floats before it cuts them off to bytes, [3, H, W]."
    package = pytest.importorskip("imagecorruptions.corruptions")
    own = {"seed": np.random.randint(2**31)} if name == "impulse_noise" else {}  # it draws from a generator of its own
    made = getattr(package, name)(Image.fromarray(image.movedim(0, -1).numpy()), severity, **own)
    return torch.from_numpy(np.array(made)).movedim(-1, 0).double()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, tolerance",
    [
        ("gaussian_blur", 1e-4),
        ("defocus_blur", 1e-4),
        ("zoom_blur", 1e-4),
        ("contrast", 1e-4),
        ("pixelate", 0),
        ("jpeg_compression", 0),
        ("brightness", 0.1),
    ],
)  # c = 0.1 is 25.5 grey levels, so that half of the roundings are ties
def test_as_the_package(name, tolerance):
    "Mean absolute difference in grey levels, both rounded."
    for photo in PHOTOS:
        image = torch.from_numpy(np.asarray(photo.resize((224, 224))).copy()).movedim(-1, 0)
        for severity, constant in enumerate(TABLES["imagenet_c"][name], 1):
            apart = (corrupt(image[None], name, severity, constant)[0] - theirs(name, image, severity).round()).abs()
            assert apart.mean() <= tolerance and apart.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mean, deviation",
    [  # tolerances in grey levels and as a share
        ("gaussian_noise", 1, 0.02),
        ("shot_noise", 1, 0.02),
        ("impulse_noise", 1, 0.02),
        ("speckle_noise", 1, 0.02),
        ("motion_blur", 1.5, 0.06),
        ("fog", 8, 0.12),
        ("snow", 5, 0.12),
    ],
)
def test_moments_as_the_package(name, mean, deviation, tiles):
    np.random.seed(0)
    for severity in (1, 3, 5):
        ours = corrupt(tiles, name, severity, TABLES["imagenet_c"][name][severity - 1]) - tiles.double()
        changes = torch.stack([theirs(name, image, severity) for image in tiles]) - tiles
        assert (ours.mean() - changes.mean()).abs() <= mean
        assert (ours.std() / changes.std() - 1).abs() <= deviation


CLEAN = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)


@pytest.fixture
def corrupted(tmp_path):
    "CIFAR-10-C's layout in small: ten test images, whose pixels tell severity and number."
    images = np.zeros((50, 8, 8, 3), np.uint8)
    images[..., 0], images[..., 1] = np.repeat(np.arange(1, 6), 10)[:, None, None], np.tile(np.arange(10), 5)[:, None, None]
    labels = np.tile(np.arange(10) % 3, 5)
    np.save(tmp_path / "fog.npy", images), np.save(tmp_path / "labels.npy", labels)
    return tmp_path, labels


def test_corrupted_images_of_others_are_read(corrupted):
    folder, labels = corrupted
    indices = np.array([7, 0, 3])
    found = read_corrupted(folder, "fog", 4, indices, CLEAN, torch.from_numpy(labels[indices]))
    assert found.shape == (3, 3, 8, 8) and found[:, :2, 0, 0].tolist() == [[4, 7], [4, 0], [4, 3]]


def test_unfit_corrupted_images_are_named(corrupted):
    folder, labels = corrupted
    indices = np.arange(3)
    own = torch.from_numpy(labels[indices])
    for name, these, said in (
        ("snow", own, "snow.npy or its labels.npy cannot be read"),
        ("fog", own.flip(0), "labels.npy: its labels are not those of the test images"),
    ):
        with pytest.raises(DataError, match=said):
            read_corrupted(folder, name, 1, indices, CLEAN, these)
    with pytest.raises(DataError, match="its labels are not those"):
        read_corrupted(folder, "fog", 1, np.array([11]), CLEAN, own[:1])
    with pytest.raises(DataError, match=r"fog.npy has images of \(8, 8\) pixels, the test images have \(16, 16\)"):
        read_corrupted(folder, "fog", 1, indices, torch.zeros(3, 3, 16, 16, dtype=torch.uint8), own)
    np.save(folder / "fog.npy", np.zeros((51, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"fog.npy is uint8 \(51, 8, 8, 3\) with 50 labels, needed"):
        read_corrupted(folder, "fog", 1, indices, CLEAN, own)
