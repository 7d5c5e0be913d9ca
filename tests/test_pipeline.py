"A whole tiny pipeline in a copy of the repository: it runs, repeats itself, and stops at a wrong parameter."
import json
import os
import shutil
import subprocess

import pandas as pd
import pytest
import yaml

from spikeprompt.scores import read_record, unpack
from spikeprompt.settings import root

TINY = {
    "backbones": ["pocket_vit"],
    "methods": ["linear_probe", "lorsp", "spike_nvpt"],
    "targets": {"digits": {"n_train": 64, "n_val": 32, "n_test": 48}},
    "variants": {"lorsp": {"lorsp_k1": {"rank": 1}, "lorsp_k2": {"rank": 2}}},
}


def call(folder, *command):
    "Run a command in the copy, with the copy's own code."
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def change(folder, **sections):
    "Change sections of the copy's params.yaml."
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, **sections}, sort_keys=False))


def state(folder):
    "Everything that the pipeline wrote for git."
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "results").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The files git knows or would know, in a repository of their own, after one `dvc repro`."
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    shutil.rmtree(folder / "results", ignore_errors=True)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    change(folder, **TINY, train={**params["train"], "seeds": [0, 1], "epochs": 1, "probe_c": [0.01]},
           robustness={**params["robustness"], "sigmas": [0.1], "corruptions": ["shot_noise"], "severities": [1]})
    done = call(folder, "dvc", "repro")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done


def test_scores(copy):
    folder, _ = copy
    noise = read_record(folder / "results/scores/noise-lorsp.json.gz")["pocket_vit"]["digits"]
    assert set(noise) == {"lorsp_k1", "lorsp_k2"} and set(noise["lorsp_k1"]) == {"0", "1"}
    assert set(noise["lorsp_k1"]["0"]) == {"clean", "gaussian", "shot_noise"}
    train = json.loads((folder / "results/scores/train-pocket_vit-lorsp.json").read_text())["digits"]
    assert train["lorsp_k2"]["0"]["prompt_parameters"] == 3 * 2 * 64
    probe = read_record(folder / "results/scores/noise-linear_probe.json.gz")["pocket_vit"]["digits"]["linear_probe"]
    accuracies = [run["clean"]["0"]["accuracy"] for run in probe.values()]
    assert min(accuracies) > 0.5  # ten classes, 64 pictures to learn from
    metrics = json.loads((folder / "results/metrics.json").read_text())["digits"]
    assert metrics["linear_probe"]["clean"] == pytest.approx(50 * sum(accuracies), abs=0.01)
    sizes = json.loads((folder / "results/scores/footprint-lorsp.json").read_text())["pocket_vit"]["digits"]
    assert 0 < sizes["lorsp_k1"]["prompt_pj"] < sizes["lorsp_k2"]["prompt_pj"] < 0.05 * sizes["lorsp_k2"]["system_pj"]


def test_verdicts_can_be_traced_to_the_scores(copy):
    folder, _ = copy
    table = pd.read_csv(folder / "results/verdicts.csv")
    row = table[(table.variant == "lorsp_k2") & (table.reference == "linear_probe") & (table.pictures == "clean")].iloc[0]
    accuracies = {}
    for method, variant in ("lorsp", "lorsp_k2"), ("linear_probe", "linear_probe"):
        runs = read_record(folder / f"results/scores/noise-{method}.json.gz")["pocket_vit"]["digits"][variant]
        bits = [unpack(run["clean"]["0"]["correct"]) for run in runs.values()]
        assert [b.mean() for b in bits] == pytest.approx([run["clean"]["0"]["accuracy"] for run in runs.values()])
        accuracies[variant] = sum(b.mean() for b in bits) / len(bits)
    assert row.difference == pytest.approx(100 * (accuracies["lorsp_k2"] - accuracies["linear_probe"]), abs=0.01)
    report = (folder / "results/report.ipynb").read_text()
    assert all(verdict in report for verdict in table.verdict.unique())


def test_the_run_shows_its_epochs(copy):
    _, done = copy
    assert "lorsp_k1   epoch  1/1  loss" in done.stdout


def test_the_report_reads(copy):
    folder, _ = copy
    cells = json.loads((folder / "results/report.ipynb").read_text())["cells"]
    text = json.dumps(cells)
    assert "`lorsp_k2` against `linear_probe`" in text and "Logistic regression on raw pixels" in text
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr"
                   for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"])
    for name in "pareto", "digits-robustness", "digits-differences", "digits-prompts":
        assert (folder / f"results/figures/{name}.svg").stat().st_size > 1000
        assert (folder / f"results/figures/{name}.pdf").read_bytes().startswith(b"%PDF")


def test_a_second_repro_does_nothing(copy):
    folder, _ = copy
    again = call(folder, "dvc", "repro")
    assert again.returncode == 0 and "Running stage" not in again.stdout and "up to date" in again.stdout


def test_a_forced_stage_writes_the_same_bytes(copy):
    folder, _ = copy
    before = state(folder)
    lock = (folder / "dvc.lock").read_bytes()
    forced = call(folder, "dvc", "repro", "-f", "-s", "train@pocket_vit-spike_nvpt", "robustness@spike_nvpt", "figures", "report")
    assert forced.returncode == 0, forced.stdout[-2000:] + forced.stderr[-2000:]
    assert state(folder) == before and (folder / "dvc.lock").read_bytes() == lock


def test_one_methods_settings_run_that_method_alone(copy):
    folder, _ = copy
    change(folder, variants={**TINY["variants"], "spike_nvpt": {"spike_nvpt": {"tokens": 3}}})
    planned = call(folder, "dvc", "repro", "check")
    assert planned.returncode == 0, planned.stderr
    stale = call(folder, "dvc", "status", "--json").stdout
    names = {name for name in json.loads(stale) if name.startswith("train")}
    change(folder, variants=TINY["variants"])
    assert names == {"train@pocket_vit-spike_nvpt"}


def test_dvc_exp_run_changes_a_parameter(copy):
    folder, _ = copy
    for command in (["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    tried = call(folder, "dvc", "exp", "run", "-S", "robustness.severities=[2]", "-S", "robustness.sigmas=[0.2]")
    assert tried.returncode == 0, tried.stdout[-2000:] + tried.stderr[-2000:]
    assert "Running stage 'robustness@lorsp'" in tried.stdout and "Running stage 'train" not in tried.stdout
    noise = read_record(folder / "results/scores/noise-lorsp.json.gz")["pocket_vit"]["digits"]["lorsp_k1"]["0"]
    assert list(noise["gaussian"]) == ["0.2"] and list(noise["shot_noise"]) == ["2"]


@pytest.mark.parametrize("sections, said", [
    ({"backbones": ["pocket_resnt"]}, "backbone 'pocket_resnt': allowed are pocket_resnet"),
    ({"methods": ["linear_probe", "lorps"]}, "method 'lorps': allowed are"),
    ({"variants": {"lorsp": {"lorsp": {"rank": -1}}}}, "variants.lorsp.lorsp.rank = -1: input should be greater than or equal to 1"),
    ({"robustness": {"sigmas": [3.0]}}, "robustness.sigmas = 3.0: allowed are"),
    ({"train": {"epochs": "six"}}, "train.epochs = 'six': input should be a valid integer"),
])
def test_a_wrong_parameter_stops_before_any_training(copy, sections, said):
    folder, _ = copy
    kept = (folder / "params.yaml").read_text()
    before = state(folder)
    params = yaml.safe_load(kept)
    change(folder, **{name: {**params[name], **new} if isinstance(new, dict) else new for name, new in sections.items()})
    refused = call(folder, "dvc", "repro")
    (folder / "params.yaml").write_text(kept)
    assert refused.returncode != 0 and "Running stage 'train" not in refused.stdout
    lines = [line for line in refused.stderr.splitlines() if line.startswith("params.yaml: ")]
    assert len(lines) == 1 and said in lines[0]
    assert state(folder) == before
