"Runs and stages that are stopped, killed or diverge: nothing is lost, nothing is half-written, and the end is the same to the bit."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from spikeprompt.config import ConfigError
from spikeprompt.datasets.readers import read_dataset, save_dataset
from spikeprompt.engine import lives
from spikeprompt.experiment import stage_record
from spikeprompt.files import write_json
from spikeprompt.stages import all_runs, parse_experiment
from spikeprompt.training import loop
from spikeprompt.training.loop import TrainingError
from spikeprompt.training.parallel import SCHEDULER, run_parallel
from spikeprompt.training.runs import train_run

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "backbones": {"names": ["pocket_resnet"]},
    "datasets": {"sprites_position": {"n_train": 200, "n_val": 100}},
    "train": {"seeds": [0, 1], "epochs": 3, "head_c": [0.01]},
    "methods": {"lorsp": {"LoRSP": {"rank": 2}}, "spike_nvpt": {"Spike-NVPT": {}}},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A prepared dataset."
    folder = tmp_path_factory.mktemp("prepared")
    config = parse_experiment(SETTINGS)
    save_dataset(read_dataset("sprites_position", config.datasets["sprites_position"]), folder / "sprites_position")
    return folder


def contents(folder):
    "Every file of a folder of runs."
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    "All runs, one after the other in this process."
    folder, config = tmp_path_factory.mktemp("undisturbed"), parse_experiment(SETTINGS)
    for run in all_runs(config):
        train_run(config, run, prepared, folder / "runs")
    return contents(folder / "runs")


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_that_is_stopped_after_any_epoch_ends_the_same_to_the_bit(epoch, prepared, undisturbed, tmp_path, monkeypatch):
    config, write = parse_experiment(SETTINGS), loop.write_checkpoint

    def stop(path, state):
        write(path, state)
        if len(state["rows"]) == epoch:
            raise KeyboardInterrupt

    for run in all_runs(config):
        monkeypatch.setattr(loop, "write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, run, prepared, tmp_path / "runs")
        monkeypatch.setattr(loop, "write_checkpoint", write)
        train_run(config, run, prepared, tmp_path / "runs")
    assert contents(tmp_path / "runs") == undisturbed
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.relative_to(tmp_path).parts[0] != "runs"]


def test_a_damaged_checkpoint_is_refused(prepared, tmp_path):
    config = parse_experiment(SETTINGS)
    run = all_runs(config)[0]
    path = tmp_path / "runs-checkpoints/label/pocket_resnet/sprites_position/LoRSP/0/checkpoint.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged.*remove it"):
        train_run(config, run, prepared, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mapping, lr, head_lr", [("label", 1e30, 0.001), ("linear", 0.1, 1e38)])
def test_a_diverging_run_stops_with_epoch_step_and_rate_and_leaves_no_record(mapping, lr, head_lr, prepared, tmp_path):
    config = parse_experiment(SETTINGS | {"methods": {"lor_vp": {"LoR-VP": {}}}})
    settings = config.methods["lor_vp"]["LoR-VP"].model_copy(update={"lr": lr})  # past the check of params.yaml
    train = config.train.model_copy(update={"head_lr": head_lr})
    config = config.model_copy(update={"methods": {"lor_vp": {"LoR-VP": settings}}, "train": train})
    with pytest.raises(TrainingError) as error:
        train_run(config, (mapping, "sprites_position", "pocket_resnet", "lor_vp", "LoR-VP", 0), prepared, tmp_path / "runs")
    line = str(error.value)
    assert line.startswith("pocket_resnet, sprites_position") and "step" in line and "learning rate of" in line and "\n" not in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "section, name, value", [("train", "head_lr", 1e6), ("train", "head_lr", float("inf")), ("train", "epochs", 10**30)]
)
def test_a_senseless_number_is_refused(section, name, value):
    with pytest.raises(ConfigError, match=f"{section}.{name} = "):
        parse_experiment(SETTINGS | {section: {name: value}})


@pytest.mark.slow
def test_a_cluster_gives_the_same_bytes_though_a_worker_is_killed(prepared, undisturbed, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = lambda *words: subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]], env=environment, cwd=tmp_path
    )
    file = tmp_path / "scheduler.json"
    running = [start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file)]
    try:
        while not file.exists():
            time.sleep(0.2)
        running += [start("dask_worker", "--scheduler-file", file, "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(2)]
        monkeypatch.setenv(SCHEDULER, json.loads(file.read_text())["address"])
        config = parse_experiment(SETTINGS)
        runs = all_runs(config)
        done = []
        for number, (record, _) in enumerate(run_parallel(train_run, [(config, run, prepared, tmp_path / "runs") for run in runs])):
            if number == 0:
                running[1].kill()
            done.append((record["variant"], record["seed"]))
    finally:
        for process in running:
            process.kill()
    assert done == [(run[4], run[5]) for run in runs]
    assert contents(tmp_path / "runs") == undisturbed


def test_no_scheduler_is_one_line(monkeypatch):
    monkeypatch.setenv(SCHEDULER, "nonsense://x")
    with pytest.raises(ConfigError, match="SPIKEPROMPT_SCHEDULER = 'nonsense://x'"):
        list(run_parallel(print, [()]))


PARAMETERS = "-p stage stage.json -p prepared prepared -p out runs/train/method".split()


def stage(folder, settings):
    "The command of a training stage and what it needs, in a folder."
    config = parse_experiment(settings)
    (folder / "data.dvc").touch()
    write_json(folder / "stage.json", stage_record(config, "train", next(iter(config.methods))))
    source = ROOT / "nbs/pipeline/102_train.ipynb"
    return [
        sys.executable,
        "-m",
        "papermill",
        "--engine",
        "plain",
        "--no-progress-bar",
        "--log-level",
        "ERROR",
        "-k",
        "python3",
        source,
        "executed.ipynb",
        *PARAMETERS,
    ]


@pytest.fixture
def folder(prepared, tmp_path):
    "A folder in which a stage can run, with the notebook of an earlier execution."
    (tmp_path / "prepared").symlink_to(prepared)
    (tmp_path / "executed.ipynb").write_text("earlier")
    return tmp_path


LONG = SETTINGS | {"train": {"seeds": [0], "epochs": 2000, "head_c": [0.01]}, "methods": {"lorsp": {"LoRSP": {"rank": 2}}}}


def wait_for(condition, seconds=120):
    "Wait until something holds."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)
    return found


def checkpoints(folder):
    return [*folder.rglob("checkpoint.safetensors")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_is_stopped_says_so_in_one_line_and_keeps_what_it_has(number, folder):
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background ignores it
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(stage(folder, LONG), cwd=folder, preexec_fn=heard, **streams)
    wait_for(lambda: checkpoints(folder))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    line = [line for line in said.splitlines() if "executed.ipynb" in line]
    assert process.returncode and len(line) == 1 and "stopped" in line[0] and "Traceback" not in said, said
    assert (folder / "executed.ipynb").read_text() == "earlier" and checkpoints(folder)
    wait_for(lambda: not any(map(lives, children)), 20)


@pytest.mark.slow
def test_nothing_goes_on_when_dvc_is_killed(folder):
    command = " ".join(map(str, stage(folder, LONG)))
    runner = folder / "dvc"  # a process of dvc's name, which starts the stage through a shell, as dvc does
    runner.write_text(f"import subprocess\nsubprocess.run({command!r}, shell=True)\n")
    process = subprocess.Popen([sys.executable, runner], cwd=folder)
    wait_for(lambda: checkpoints(folder))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # papermill, kernel, workers
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(lives, children)), 20)
    assert (folder / "executed.ipynb").read_text() == "earlier"


@pytest.mark.slow
def test_a_diverging_stage_is_one_line(folder):
    command = stage(folder, SETTINGS)
    source = nbformat.read(ROOT / "nbs/pipeline/102_train.ipynb", 4)
    source.cells.insert(2, nbformat.v4.new_code_cell("import spikeprompt.training.loop as loop\nloop.LARGEST_LOSS = 0.1"))
    nbformat.write(source, folder / "102_train.ipynb")
    command[command.index(ROOT / "nbs/pipeline/102_train.ipynb")] = folder / "102_train.ipynb"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"LOKY_MAX_CPU_COUNT": "1"})
    said = [line for line in done.stderr.splitlines() if "TrainingError" in line]
    assert done.returncode and len(said) == 1 and "epoch 1, step 1" in said[0], done.stderr
    assert (folder / "executed.ipynb").read_text() == "earlier" and (folder / "runs/failed/executed.ipynb").is_file()


@pytest.mark.slow
def test_a_hanging_cell_ends_at_the_time_limit(folder):
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time\ntime.sleep(60)")])
    nbformat.write(source, folder / "hangs.ipynb")
    words = [*stage(folder, SETTINGS)[: -len(PARAMETERS)], "--execution-timeout", "3"]
    words[words.index(ROOT / "nbs/pipeline/102_train.ipynb")] = folder / "hangs.ipynb"
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode and "longer than the 3 s" in done.stderr.splitlines()[-1], done.stderr  # after what the kernel says as it ends
