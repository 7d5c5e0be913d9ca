"The notebooks of the studies of both methods run on a few digits, and write what the findings read."
import json
import shutil
import subprocess

import nbformat
import numpy as np
import pytest
import yaml

from spikeprompt.scores import pack, read_record, unpack, write_record
from spikeprompt.settings import read_params, root


def papermill(notebook, folder, *parameters, study="lorsp"):
    subprocess.run(["papermill", "--engine", "plain", "--no-progress-bar", "--log-level", "ERROR", "-k", "python3",
                    f"studies/{study}/{notebook}.ipynb", str(folder / "executed.ipynb"), *parameters],
                   cwd=root, check=True, capture_output=True, text=True)


def findings_text(folder, own, study):
    "What the findings of a study say of the scores in a folder."
    (folder / "params.yaml").write_text(yaml.safe_dump(own))
    papermill("findings", folder, "-p", "study", str(folder / "params.yaml"), "-p", "scores", str(folder), study=study)
    outputs = [output for cell in nbformat.read(folder / "executed.ipynb", 4).cells for output in cell.get("outputs", [])]
    return "\n".join(output["data"].get("text/markdown", "") for output in outputs if "data" in output)


def answered(difficulty, luck, points, levels):
    "What one variant answers: backbone and seed -> corruption -> level -> score, the same luck for everybody."
    found = {}
    for key, drawn in luck.items():
        right = drawn < difficulty + points / 100
        scored = {"accuracy": right.mean(), "ece": 0.0, "correct": pack(right)}
        found[key] = {corruption: {level: scored} for corruption, level in levels.items()}
    return found


def test_choices_are_recorded_for_every_change_and_rate(tmp_path):
    papermill("choose", tmp_path, "-p", "part", "options", "-p", "scores", str(tmp_path / "options.json"))
    tried = json.loads((tmp_path / "options.json").read_text())["tried"]
    assert set(tried) == {"base", "surrogate sigmoid"} and set(tried["base"]) == {"0.1"}
    found = tried["base"]["0.1"]["pocket_resnet"]
    assert 0 < found["density"] < 1 and 0 < found["flips"] < 0.5 and 0 < found["support_iou"] < 1
    assert 0.5 < found["val_accuracy"] <= 1 and 0.1 < found["noisy_accuracy"] <= 1


def test_what_is_chosen_is_compared(tmp_path):
    chosen = tmp_path / "chosen.json"
    papermill("choose", tmp_path, "-p", "scores", str(chosen))
    found = json.loads(chosen.read_text())
    judged = {float(lr): by["pocket_resnet"]["val_accuracy"] + by["pocket_resnet"]["noisy_accuracy"]
              for lr, by in found["tried"]["lorsp"].items()}
    assert set(judged) > {0.1} and set(found["best"]) == {"lorsp", "random_mask"}
    assert judged[found["best"]["lorsp"]] == max(judged.values())

    papermill("compare", tmp_path, "-p", "chosen", str(chosen), "-p", "scores", str(tmp_path))
    trained = read_record(tmp_path / "trained.json.gz")
    lorsp, mask = (trained[name]["pocket_resnet"]["0"] for name in ("lorsp", "random_mask"))
    assert mask["firing_rate"] == pytest.approx(lorsp["firing_rate"], abs=0.5 / 32)  # whole rows of 32
    assert mask["density"] == pytest.approx(lorsp["density"], abs=0.02)
    untrained = trained["untrained"]["pocket_resnet"]["0"]
    assert untrained["prompt_parameters"] == 0 and len(set(untrained["over_training"]["density"])) == 1 and untrained["density"] > 0.1
    assert lorsp["rank"] <= 2 and lorsp["largest_where_nothing_fired"] == 0
    assert len(lorsp["over_training"]["density"]) == 2 and set(lorsp["flips"]) == {"0.05", "0.1"}
    tested = read_record(tmp_path / "compared-lorsp.json.gz")["pocket_resnet"]["digits"]["lorsp"]["0"]
    assert set(tested) == {"clean", "gaussian"} and len(unpack(tested["clean"]["0.0"]["correct"])) == 20
    assert read_record(tmp_path / "compared-linear_probe.json.gz")["pocket_resnet"]["digits"]["linear_probe"]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    "Writes scores of the lorsp study with a known truth, and gives the text of the findings."
    def findings(gains):  # variant -> points above the linear probe; None for all the others
        folder, own = tmp_path_factory.mktemp("study"), read_params("studies/lorsp/params.yaml")
        own["test"]["seeds"] = {"credit": [0, 1, 2], "ladder": [0, 1, 2]}
        for part in "credit", "ladder":
            own[part]["pictures"]["n_test"] = 500
            write_part(folder, part, own, gains)
        shutil.copy(root / "studies/lorsp/scores/chosen-options.json", folder)
        return findings_text(folder, own, "lorsp")
    return findings


def write_part(folder, part, own, gains):
    rng, trained, best = np.random.default_rng(0), {}, {}
    backbones, seeds = read_params()["backbones"], own["test"]["seeds"][part]
    difficulty = rng.beta(0.5, 0.15, own[part]["pictures"]["n_test"])
    luck = {(backbone, seed): rng.random(len(difficulty)) for backbone in backbones for seed in seeds}
    (folder / part).mkdir()
    for method, variants in {"linear_probe": {"linear_probe": {}}, **own[part]["variants"]}.items():
        record = {}
        for name, settings in variants.items():
            best[name], size = 0.1, 192 * (settings or {}).get("rank", 0)
            points = gains.get(name, gains[None]) * (name != "linear_probe")
            for (backbone, seed), tested in answered(difficulty, luck, points, {"clean": "0.0", "gaussian": "0.1"}).items():
                record.setdefault(backbone, {}).setdefault("fashion_mnist", {}).setdefault(name, {})[str(seed)] = tested
                trained.setdefault(name, {}).setdefault(backbone, {})[str(seed)] = {
                    "prompt_parameters": size, "density": 0.3, "firing_rate": 0.3, "rms": 0.06, "rank": 1,
                    "largest_where_nothing_fired": 0.0, "support_iou": 0.3, "distance": 1.0, "flips": {"0.05": 0.01, "0.1": 0.02},
                    "over_training": {"density": [0.3, 0.1], "rms": [0.05, 0.06], "firing_rate": [0.3, 0.2]}}
        write_record(record, folder / part / f"compared-{method}.json.gz")
    write_record(trained, folder / part / "trained.json.gz")
    tried = {name: {lr: {backbone: {"val_accuracy": 0.8, "noisy_accuracy": noisy} for backbone in backbones}
                    for lr, noisy in (("0.1", 0.75), ("0.03", 0.7))} for name in best}
    (folder / f"chosen-{part}.json").write_text(json.dumps({"best": best, "tried": tried}))


def test_findings_say_what_the_scores_say_when_lorsp_wins(made_up):
    text = made_up({None: 0.0, "lorsp": 8.0, "no_carry": 8.0, **{f"lorsp_k{K}": 8.0 for K in (1, 2, 4, 8)}})
    assert text.count("**Goal met.**") == 6 and "Goal missed" not in text
    assert "no difference shown clean and no difference shown under noise: `no_carry`" in text
    assert "Credit to integration: none shown." in text and text.count("none shown") == 1


def test_findings_say_what_the_scores_say_when_lorsp_loses(made_up):
    text = made_up({None: 0.0, "magnitude_mask": 8.0, **{f"lor_vp_r{rank}": 8.0 for rank in (1, 2, 4, 8)}})
    assert text.count("**Goal missed.**") == 6 and "Goal met" not in text
    assert "behind clean and behind under noise: `magnitude_mask`" in text and "`lorsp_k4` 67 %" in text
    sort = next(line for line in text.splitlines() if ", a sort: " in line)
    assert sort.count("shown better") == 2 and sort.endswith("Credit to the neuron: none shown.")
    assert "Largest gap" in text and "missed by" in text  # 0.3 is not the density of one factor pair at a rate of 0.3


def test_tokens_and_borders_are_chosen_and_compared(tmp_path):
    chosen, settings = tmp_path / "chosen.json", tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"parts": {"digits": {
        "pictures": {"n_train": 60, "n_val": 30, "n_test": 20}, "epochs": 1, "seeds": [100, 101], "prompt": {"tokens": 2},
        "variants": {"vpt": {"vpt": {}}, "spike_nvpt": {"noisy": {}, "silent": {"current": "constant"}},
                     "spike_nvpt_random_bits": {"lot": {}}},
        "best_of": {"vpt": ["vpt"], "spike_nvpt": ["noisy", "silent"], "random_bits": ["lot"]}, "chosen_by": "noisy 0.1"}}}))
    papermill("choose", tmp_path, "-f", str(settings), "-p", "scores", str(chosen), study="spike_nvpt")
    found = json.loads(chosen.read_text())
    assert set(found["best"]) == {"lr", "frame_lr"} and found["best"]["lr"]["lot"] == 0 < found["best"]["frame_lr"]["lot"]
    places = {"lr": "pocket_vit", "frame_lr": "pocket_resnet"}
    for kind, backbone in places.items():
        judged = {float(lr): by[backbone]["val_accuracy"] + (by[backbone]["noisy 0.1"] + by[backbone]["noisy 0.3"]) / 2
                  for lr, by in found["tried"]["noisy"][kind].items()}
        assert judged[found["best"][kind]["noisy"]] >= max(judged.values()) - 1e-3 and len(judged) >= 2

    papermill("compare", tmp_path, "-f", str(settings), "-p", "chosen", str(chosen), "-p", "scores", str(tmp_path), study="spike_nvpt")
    trained = read_record(tmp_path / "trained.json.gz")
    for kind, backbone in places.items():
        noisy = {(name, float(lr)): by[backbone]["noisy 0.1"] for name in ("noisy", "silent")
                 for lr, by in found["tried"][name][kind].items()}
        ran = trained["spike_nvpt"][backbone]["0"]
        assert noisy[ran["setting"], ran["lr"]] == max(noisy.values())
    bits = trained["random_bits"]["pocket_vit"]["0"]
    assert bits["prompt_parameters"] == bits["moved"] == max(bits["over_training"]["flipped"]) == 0
    assert set(bits["flipped_bits"]) == {"0.05"}
    assert "flipped_bits" not in trained["vpt"]["pocket_vit"]["0"]
    tested = read_record(tmp_path / "compared-spike_nvpt.json.gz")
    for backbone in "pocket_vit", "pocket_resnet":
        levels = tested[backbone]["digits"]["spike_nvpt"]["0"]
        assert {name: set(of) for name, of in levels.items()} == {"clean": {"0"}, "gaussian": {"0.1"}, "shot_noise": {"3"}}


@pytest.fixture(scope="module")
def made_up_bits(tmp_path_factory):
    "Writes scores of the spike_nvpt study with a known truth, and gives the text of the findings."
    def findings(gains):  # variant -> points above the linear probe; None for all the others
        folder, own = tmp_path_factory.mktemp("bits"), read_params("studies/spike_nvpt/params.yaml")
        rng, backbones = np.random.default_rng(0), read_params()["backbones"]
        gain = lambda name: gains.get(name, gains[None]) * (name != "linear_probe")
        for part, settings in own["parts"].items():
            names = [name for listed in settings["variants"].values() for name in listed]
            tried = {name: {kind: {"0.1": {backbone: {"loss": 0.1, "val_accuracy": 0.8 + gain(name) / 100, "density": 0.2, "judged": 0.7,
                                                      "moved": 0.1, "noisy 0.1": 0.7, "noisy 0.3": 0.5} for backbone in backbones
                                           if (backbone in ("pocket_vit", "pocket_swin")) == (kind == "lr")}}
                            for kind in ("lr", "frame_lr")} for name in names}
            (folder / f"chosen-{part}.json").write_text(json.dumps({"tried": tried}))
        for part in "credit", "clean", "largest", "time":
            (folder / part).mkdir()
            settings, test, trained = own["parts"][part], own["test"][part], {}
            test["noise"], test["seeds"] = {"sigmas": [0.1], "corruptions": ["shot_noise"], "severities": [3]}, [0, 1, 2]
            settings["pictures"]["n_test"] = 400
            difficulty = rng.beta(0.5, 0.15, 400)
            luck = {(backbone, seed): rng.random(400) for backbone in settings.get("backbones", backbones) for seed in test["seeds"]}
            families = settings.get("best_of") or {name: [name] for listed in settings["variants"].values() for name in listed}
            for method, variants in {"linear_probe": ["linear_probe"], **settings["variants"]}.items():
                record = {}
                for name, setting in [(family, first) for family, (first, *_) in {"linear_probe": ["linear_probe"], **families}.items()
                                      if first in variants]:
                    levels = {"clean": "0", "gaussian": "0.1", "shot_noise": "3"}
                    for (backbone, seed), tested in answered(difficulty, luck, gain(name), levels).items():
                        record.setdefault(backbone, {}).setdefault("fashion_mnist", {}).setdefault(name, {})[str(seed)] = tested
                        kept = trained.setdefault(name, {}).setdefault(backbone, {})[str(seed)] = {"setting": setting, "lr": 0.1}
                        if "spike_nvpt" in method:
                            kept |= {"density": 0.2, "moved": 0.1, "over_training": {"density": [0.2, 0.2], "flipped": [0.0, 0.1]},
                                     "flipped_bits": {"0.01": 0.8, "0.05": 0.7}}
                            kept |= {"twins": 0.0} if backbone in ("pocket_vit", "pocket_swin") else {}
                if record:
                    write_record(record, folder / part / f"compared-{method}.json.gz")
            write_record(trained, folder / part / "trained.json.gz")
        return findings_text(folder, own, "spike_nvpt")
    return findings


def test_findings_say_what_the_scores_say_when_spikes_win(made_up_bits):
    text = made_up_bits({None: 0.0, "spike_nvpt": 40.0, "t16_noise": 40.0})
    assert text.count("**met**") == 8 and "**missed**" not in text
    assert text.count("Of all 10 places 10 are shown ahead and 0 behind") == 2
    assert "`spike_nvpt` against `straight_through`: clean +" in text and text.count("earns something that no other bits give.") == 2
    assert "Of the others it is ahead of `linear_probe`, `vpt`, `vpt_decay`, `vpt_noise`." in text
    assert "more steps, no noise: no difference shown in 8 comparisons" in text and "noise on each: `t16_noise` clean" in text
    assert "4 noisy steps against one with a current as noisy as their mean: clean no difference shown" in text


def test_findings_say_what_the_scores_say_when_spikes_do_not(made_up_bits):
    text = made_up_bits({None: 0.0, "vpt": 8.0, "vpt_decay": 8.0, "t4_noise": 40.0})
    assert text.count("**missed**") == 8 and "**met**" not in text
    assert text.count("no credit under noise: no difference is shown to `straight_through`, `random_bits`.") == 2
    assert "not shown different from `linear_probe`, `vpt_noise`, behind `vpt`, `vpt_decay`." in text
    assert "4 noisy steps against 4 without noise: clean ahead" in text


def test_findings_say_which_bits_are_beaten(made_up_bits):
    text = made_up_bits({None: 0.0, "spike_nvpt": 20.0, "straight_through": 40.0})
    assert text.count("shown behind `straight_through`, ahead of `random_bits`.") == 2 and "earns something" not in text
    text = made_up_bits({None: 0.0, "spike_nvpt": 40.0, "straight_through": 40.0})
    assert text.count("no difference is shown to `straight_through`; ahead of `random_bits`.") == 2
