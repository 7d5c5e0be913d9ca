"Damaged files are refused in one line that names the file, or read as they were written; nothing half-written is left."

import errno
import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from spikeprompt.backbones.loader import create_backbone, download
from spikeprompt.backbones.pocket import packaged_weights
from spikeprompt.config import ConfigError
from spikeprompt.datasets.base import DataError, ImageDataset
from spikeprompt.datasets.readers import load_dataset, read_npz, save_dataset
from spikeprompt.evaluation.scores import read_scores, write_scores
from spikeprompt.files import read_json, read_tensors, replacing, sha256_of, write_json, write_tensors
from spikeprompt.model import PromptedModel, read_adapter
from spikeprompt.stages import read_run, write_run
from spikeprompt.training.checkpoint import read_checkpoint, write_checkpoint


def weights(folder, prompted):
    "A copy of packaged weights with their card."
    for suffix in "safetensors", "json":
        (folder / f"pocket_resnet.{suffix}").write_bytes((packaged_weights / f"pocket_resnet.{suffix}").read_bytes())
    return folder / "pocket_resnet.safetensors", lambda path: create_backbone("pocket_resnet", path.parent).model.fc.weight


def adapter(name):
    def make(folder, prompted):
        prompted("pocket_resnet", "lor_vp").save_pretrained(folder)
        return folder / name, lambda path: read_adapter(path.parent)[1]["head.linear.weight"]

    return make


def run(folder, prompted):
    "What a training measured."
    write_run(folder, {"variant": "LoRSP", "val_accuracy": 0.5}, pd.DataFrame({"epoch": [0, 1], "loss": [None, 0.25]}))
    return folder / "training.json", lambda path: str(read_run(path.parent))


def checkpoint(folder, prompted):
    path = folder / "checkpoint.safetensors"
    write_checkpoint(path, {"latent": torch.arange(100.0), "rows": [{"epoch": 1, "loss": 0.25}]})
    return path, lambda path: read_checkpoint(path)["latent"]


def prepared(name):
    def make(folder, prompted):
        "A dataset of a stage."
        images = np.random.default_rng(0).integers(256, size=(40, 1, 8, 8), dtype=np.uint8)
        save_dataset(ImageDataset(images, np.arange(40) % 2, images[:20], np.arange(20) % 2, ["a", "b"]), folder)
        return folder / name, lambda path: torch.from_numpy(np.array(load_dataset(path.parent).x_test))

    return make


def packed(folder, prompted):
    "A dataset of one's own, compressed."
    images = np.random.default_rng(0).integers(256, size=(40, 8, 8, 1), dtype=np.uint8)
    parts = {"x_train": images, "y_train": np.arange(40) % 2, "x_test": images[:20], "y_test": np.arange(20) % 2}
    np.savez_compressed(folder / "some.npz", **parts, class_names=["a", "b"])
    return folder / "some.npz", lambda path: torch.from_numpy(read_npz(path).x_train)


def scores(folder, prompted):
    row = {"mapping": "label", "dataset": "d", "backbone": "b", "method": "no_prompt", "variant": "no prompt", "seed": 0, "kind": "clean"}
    row |= {"corruption": "clean", "severity": 0.0, "accuracy": 0.5, "ece": 0.1, "correct": np.array([True, False]), "placement": "pixels"}
    measured = ["val_accuracy", "prompt_parameters"]
    write_scores(pd.DataFrame([row | dict.fromkeys(measured, 1.0)]), folder / "no_prompt.csv.gz")
    return folder / "no_prompt.csv.gz", lambda path: str(read_scores(["no_prompt"], path.parent).to_dict())


MAKERS = {
    "weights": weights,
    "adapter's tensors": adapter("adapter_model.safetensors"),
    "adapter's record": adapter("adapter_config.json"),
    "run": run,
    "checkpoint": checkpoint,
    "prepared images": prepared("x_test.npy"),
    "card of prepared images": prepared("arrays.json"),
    "packed images": packed,
    "scores": scores,
}
SAME_ALLOWED = {"packed images", "scores"}  # zip and gzip headers have bits without a meaning


def flipped(content, draw):
    place, bit = draw.integers(len(content)), draw.integers(8)
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def cut_off(content, draw):
    return content[: draw.integers(len(content))]


def zeroed_tail(content, draw):
    kept = draw.integers(len(content.rstrip(b"\0")))
    return content[:kept] + bytes(len(content) - kept)


@pytest.mark.parametrize("damage", [flipped, cut_off, zeroed_tail])
@pytest.mark.parametrize("kind", MAKERS)
def test_damage_is_refused_150_of_150_times(kind, damage, prompted, tmp_path):
    path, read = MAKERS[kind](tmp_path, prompted)
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    sound, refused = read(path), 0
    for _ in range(150):
        path.write_bytes(damage(whole, draw))
        try:
            found = read(path)
        except (ValueError, ConfigError, DataError) as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600, error
            refused += 1
        else:
            assert kind in SAME_ALLOWED
            assert torch.equal(found, sound) if isinstance(sound, torch.Tensor) else found == sound
    assert refused == 150 or kind in SAME_ALLOWED and refused > 100


def test_every_packaged_weights_file_has_its_checksum_in_its_card():
    for path in packaged_weights.glob("*.safetensors"):
        assert json.loads(path.with_suffix(".json").read_text())["sha256"] == sha256_of(path)


def test_a_downloaded_file_has_a_card(monkeypatch, tmp_path):
    import timm

    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, pretrained=False, **kwargs: create(name, pretrained=False, **kwargs))
    download("resnet10t", tmp_path)
    path = tmp_path / "resnet10t.safetensors"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["resnet10t.json", "resnet10t.safetensors"]
    assert create_backbone("resnet10t", tmp_path).num_features == 512
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="resnet10t.safetensors is damaged"):
        create_backbone("resnet10t", tmp_path)


def test_an_adapter_of_two_trainings_is_refused(prompted, tmp_path):
    prompted("pocket_resnet", "lor_vp").save_pretrained(tmp_path / "one")
    other = prompted("pocket_resnet", "lor_vp")
    with torch.no_grad():
        next(other.prompt.parameters()).add_(1)
    other.save_pretrained(tmp_path / "two")
    (tmp_path / "one/adapter_model.safetensors").write_bytes((tmp_path / "two/adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        PromptedModel.from_pretrained(tmp_path / "one")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "a.json", "") == {"x": 1} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_as_readable_as_any_other(prompted, tmp_path):
    (tmp_path / "other").touch()
    prompted("pocket_resnet", "lor_vp").save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_tensors(tmp_path / "file/x.safetensors", {"x": torch.zeros(1)})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        write_tensors(disk / "x.safetensors", {"x": torch.zeros(10)}, "small")
        with pytest.raises(OSError) as error:
            write_tensors(disk / "x.safetensors", {"x": torch.zeros(100_000)})
        assert error.value.errno == errno.ENOSPC
        assert read_tensors(disk / "x.safetensors", "")[1] == "small" and [path.name for path in disk.iterdir()] == ["x.safetensors"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_loading_executes_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "pickled.npz"
    np.savez(path, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test", "class_names"), np.array([Hostile()], dtype=object)))
    with pytest.raises(DataError, match="pickle"):
        read_npz(path)
    assert not (tmp_path / "executed").exists()
