"The checkout is in order: package from notebooks, one reading order, results of this code."

import hashlib
import json
import re
import subprocess

import pandas as pd
import pytest
import yaml

from spikeprompt.backbones.pocket import packaged_weights, pocket_names
from spikeprompt.config import project_root, read_params
from spikeprompt.evaluation.scores import accuracy_table, per_run, read_scores
from spikeprompt.evaluation.statistics import compare, pairs, questions, sentence
from spikeprompt.plots.results import readable
from spikeprompt.prompts.base import method_class
from spikeprompt.stages import RUN, all_runs, parse_experiment

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))  # all but the template of a method


def test_no_module_imports_a_later_one():
    numbers = {path: int(path.stem.split("_")[0]) for path in NOTEBOOKS}
    assert len(set(numbers.values())) == len(numbers)
    exported = {}
    for path in NOTEBOOKS:
        found = re.search(r'"#\| default_exp ([\w.]+)', path.read_text())
        if found:
            exported[found[1]] = numbers[path]
    assert len(exported) > 30
    for module, number in exported.items():
        text = (ROOT / "spikeprompt" / f"{module.replace('.', '/')}.py").read_text()
        above = ["", *module.split(".")[:-1]]
        for dots, name in re.findall(r"^from (\.+)([\w.]+) import", text, re.M):
            target = ".".join([*above[1 : len(above) + 1 - len(dots)], name]).strip(".")
            if target in exported:
                assert exported[target] < number, f"{module} imports {target}"


def references(config):
    return {method: method_class(method).reference for method in config.methods}


def test_the_committed_scores_have_every_run_of_params_yaml():
    config = parse_experiment(read_params())
    table = read_scores(list(config.methods), ROOT / "results/scores")
    found = set(table[RUN].itertuples(index=False, name=None))
    assert found == set(all_runs(config))


def test_committed_verdicts_are_those_of_the_committed_scores():
    config = parse_experiment(read_params())
    table, named = read_scores(list(config.methods), ROOT / "results/scores"), (config.methods, references(config))
    again = compare(table, pairs(*named), questions=questions(*named))
    kept = pd.read_csv(ROOT / "results/verdicts.csv")
    names = ["mapping", "dataset", "variant", "placement", "reference", "images", "question", "backbones", "verdict"]
    pd.testing.assert_frame_equal(again[names], kept[names], check_dtype=False)
    assert (again.difference - kept.difference).abs().max() < 0.01
    report = (ROOT / "results/report.ipynb").read_text()
    for _, rows in kept[kept.question].groupby(["mapping", "dataset", "variant", "reference"], sort=False):
        assert json.dumps(sentence(rows))[1:-1] in report


@pytest.fixture(scope="module")
def finding():
    return (ROOT / "README.md").read_text().partition("**What was found so far")[2].partition("![")[0]


def test_the_table_of_the_readme_is_that_of_the_committed_scores(finding):
    runs = per_run(read_scores(list(parse_experiment(read_params()).methods), ROOT / "results/scores"))
    asked = [
        (kind, name, "mean") for kind, name in [("none", "no prompt"), *[("pixels", f) for f in ("LoRSP", "LoR-VP", "VP, all pixels")]]
    ]
    asked += [("tokens", "Spike-NVPT", "no prompt"), ("tokens", "Spike-NVPT", "mean"), ("tokens", "VPT-deep", "mean")]
    rows = []
    for (mapping, dataset), part in runs.groupby(["mapping", "dataset"], sort=False):
        clean, noisy = (accuracy_table(part, images) for images in ("clean", "corrupted"))
        cells = [f"{clean[column][kind, name]} / {noisy[column][kind, name]}" for kind, name, column in asked]
        rows.append(f"| {readable(mapping)}, {readable(dataset)} | {' | '.join(cells)} |")
    assert re.findall(r"^\| l.*$", finding, re.M) == rows


def test_the_sentences_of_the_readme_are_those_of_the_committed_scores(finding):
    scores = read_scores([*parse_experiment(read_params()).methods, "raw_pixels"], ROOT / "results/scores")
    runs = per_run(scores[scores.method != "raw_pixels"])
    first = accuracy_table(runs[(runs.mapping == "label") & (runs.dataset == "fashion_mnist")])["mean"]
    named = [first["pixels", "LoRSP, untrained"], first["tokens", "random bits"], first["pixels", "magnitude mask"]]
    named += [first["tokens", "straight-through"]]
    raw = scores[(scores.method == "raw_pixels") & (scores.dataset == "fashion_mnist") & (scores.kind == "clean")].accuracy.mean()
    assert re.findall(r"(\d+\.\d) %", finding) == [*map(str, named), f"{100 * raw:.1f}"]

    verdicts = pd.read_csv(ROOT / "results/verdicts.csv")
    here = (verdicts.mapping == "label") & (verdicts.dataset == "fashion_mnist")
    both = (
        verdicts[here & (verdicts.images == "clean")]
        .set_index(["variant", "placement", "reference"])
        .loc[[("magnitude mask", "pixels", "LoRSP"), ("straight-through", "tokens", "Spike-NVPT")]]
    )
    assert set(both.verdict) == {"not significant"} and list(both.mdd.round()) == [12, 35]
    controls = verdicts[verdicts.variant.isin(["magnitude mask", "straight-through"]) & verdicts.reference.isin(["LoRSP", "Spike-NVPT"])]
    assert len(controls) == 4 * 2 * 3 and "significantly worse" not in set(controls.verdict)
    elsewhere = verdicts[~here & (verdicts.reference == "no prompt") & (verdicts.images == "clean") & (verdicts.placement != "weights")]
    assert "significantly better" not in set(elsewhere.verdict) and "equivalent" not in set(verdicts.verdict)
    count = lambda variant, reference: verdicts[(verdicts.variant == variant) & (verdicts.reference == reference)].verdict.value_counts()
    assert count("LoRSP", "LoR-VP").to_dict() == {"not significant": 7, "significantly worse": 1}
    assert count("LoRSP", "VP, all pixels").to_dict() == {"not significant": 3, "significantly worse": 5}
    assert set(count("Spike-NVPT", "VPT-deep").index) == {"not significant", "no headroom"}


def test_what_the_readme_says_of_the_experiment_is_what_it_found(finding):
    folder = ROOT / "experiments/spike_nvpt"
    verdicts = pd.read_csv(folder / "results/verdicts.csv").query("images in ['clean', 'corrupted']")
    settings = verdicts[verdicts.reference == "Spike-NVPT"]
    assert {"Spike-NVPT, noise each step", "Spike-NVPT, series"} < set(settings.variant)
    assert "significantly better" not in set(settings.verdict)
    dense = verdicts[(verdicts.variant == "Spike-NVPT") & (verdicts.reference == "VPT-deep")].set_index("images")
    assert set(dense.verdict) == {"not significant"}
    assert f"{-dense.difference.clean:.1f} points behind VPT on clean and {-dense.difference.corrupted:.1f} on noisy images" in finding


def test_what_the_readme_says_of_lorsp_taken_apart_is_what_was_found(finding):
    verdicts = pd.read_csv(ROOT / "experiments/lorsp/results/verdicts.csv").query("'LoRSP' in [variant, reference]")
    verdicts = verdicts.set_index(["variant", "reference", "images"]).sort_index()
    said = re.search(r"\* In LoRSP it is the image.*", finding)[0]
    numbers = []
    for control in "LoRSP, static", "shuffled images", "no carry", "magnitude mask":
        rows = verdicts.loc[control, "LoRSP"].loc[["clean", "corrupted"]]
        without_image = control in ("LoRSP, static", "shuffled images")
        assert set(rows.verdict) == {"significantly worse" if without_image else "not significant"}
        numbers += [f"{-value:.1f}" if without_image else f"{value:+.1f}" for value in rows.difference]
    dense, pixels = (verdicts.loc["LoRSP", reference].loc[["clean", "corrupted"]] for reference in ("LoR-VP", "VP, all pixels"))
    assert set(dense.verdict) == {"not significant"} and set(pixels.verdict) == {"significantly worse"}
    numbers += [f"{-dense.difference.clean:.1f}", f"{dense.difference.corrupted:.1f}"]
    assert re.findall(r"[+-]?\d+\.\d", said) == numbers


def test_tracked_files_are_small_and_name_no_lock():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in listed if name and (ROOT / name).is_file()}
    assert sum(sizes.values()) < 30e6, sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert "uv.lock" not in sizes


@pytest.mark.parametrize("name", ["lorsp", "spike_nvpt", "robustness", "imagenet", "imagenet_large"])
def test_an_experiment_has_the_stages_of_the_root(name):
    stages = [yaml.safe_load((folder / "dvc.yaml").read_text())["stages"] for folder in (ROOT, ROOT / "experiments" / name)]
    assert stages[0] == stages[1]
    params = read_params(ROOT / f"experiments/{name}/params.yaml")
    variants = {variant for listed in params["methods"].values() for variant in listed or []}
    tuned = params.get("tuned", {}).get("like", {})
    assert {*tuned, *tuned.values()} <= variants


def test_learning_rates_are_tuned_on_the_backbones_and_variants_that_take_them():
    for name in ("robustness", "tuning"), ("imagenet", "imagenet_tuning"):
        taking, tuning = (read_params(ROOT / f"experiments/{part}/params.yaml") for part in name)
        assert taking["tuned"]["folder"] == f"experiments/{name[1]}/results" and taking["backbones"] == tuning["backbones"]
        for method, variants in tuning["methods"].items():
            for variant, settings in (variants or {}).items():
                assert taking["methods"][method][variant] == settings, (name, variant)


def test_no_stage_lists_a_module_and_the_run_cache_is_on():
    for path in [ROOT / "dvc.yaml", *ROOT.glob("experiments/*/dvc.yaml")]:
        text = path.read_text()
        assert "spikeprompt/" not in re.sub(r"^#.*$", "", text, flags=re.M).replace("spikeprompt/weights", ""), path
        outs = re.findall(r"^ +outs:\n((?: +(?:- |cache).*\n)+)", text, re.M)
        if path.parent.name != "pretraining":  # whose weights are no output, and whose cards must not come back without them
            assert outs and not any("cache: false" in block for block in outs), path


@pytest.mark.parametrize("name", pocket_names)
def test_pocket_weights_are_small_and_those_of_their_card(name):
    content = (packaged_weights / f"{name}.safetensors").read_bytes()
    card = json.loads((packaged_weights / f"{name}.json").read_text())
    assert len(content) < 3e6 and hashlib.sha256(content).hexdigest() == card["sha256"]


def test_pretraining_taught_classes_and_features():
    cards = [json.loads((packaged_weights / f"{name}.json").read_text()) for name in pocket_names]
    gains = [card["fashion_mnist"]["pretrained"]["test"] - card["fashion_mnist"]["pixels"]["test"] for card in cards]
    top1 = sorted(card["top1"] for card in cards)  # percent of 200 classes
    assert top1[0] >= 30 and top1[2] >= 35, top1
    assert min(gains) > 0 and sorted(gains)[2] >= 2, gains  # points above logistic regression on raw pixels
