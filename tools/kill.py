"""Kill a small pipeline at random moments and compare its end with an undisturbed one: `uv run python tools/kill.py [kills]`.

Each kill is a SIGKILL of one process chosen at random: dvc, papermill, the kernel or one of its workers.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from math import inf
from pathlib import Path

import psutil
import yaml

from spikeprompt.engine import lives

ROOT = Path(__file__).parent.parent
PARAMS = {
    "backbones": {"names": ["pocket_resnet"]},
    "datasets": {"sprites_position": {"n_train": 200, "n_val": 100, "n_test": 100}},
    "train": {"mappings": ["label"], "seeds": [0, 1], "epochs": 60, "batch_size": 32, "head_c": [0.01]},
    "robustness": {"sigmas": [0.1], "corruptions": []},
    "methods": {"no_prompt": {"no prompt": {}}, "lorsp": {"LoRSP": {"rank": 2}}},
}
LONGEST = 60  # seconds until a kill
LIMIT = 900  # seconds in which an undisturbed pipeline ends
KINDS = ("ipykernel", "papermill", "loky", "resource_tracker", "spikeprompt")  # of processes, by their command lines


def copy_project(folder: Path):
    "A repository of its own with the small params.yaml, without results."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if not name.startswith(("results/", "experiments/")) and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=kill", "-c", "user.email=kill@localhost", "commit", "-qm", "start"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


def start(folder: Path) -> psutil.Popen:
    "`dvc repro` without its cache of earlier runs, in a session of its own."
    command = [sys.executable, "-m", "dvc", "repro", "-q", "--no-run-cache"]
    log = open(folder / "log.txt", "ab")
    environment = {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(Path.home())}
    return psutil.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=environment)


def contents(folder: Path) -> dict[str, bytes]:
    "All that the pipeline wrote, and what DVC recorded of it."
    paths = [folder / "dvc.lock", *sorted((folder / "results").rglob("*")), *sorted((folder / "runs").rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def clear(folder: Path):
    "Remove all that the pipeline wrote."
    for name in "results", "runs", ".dvc/cache":
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)


def disturb(
    folder: Path,
    draw: random.Random,
    seconds: float,  # until the kill
) -> tuple[str | None, bool]:  # what was killed, None if the pipeline ended before; whether it ended well
    "Start the pipeline and kill one of its processes; raises `RuntimeError` if one outlives dvc, or if dvc fails by itself."
    main, kind = start(folder), None
    everyone = [main]
    try:
        main.wait(None if seconds == inf else seconds)
    except psutil.TimeoutExpired:
        everyone += main.children(recursive=True)
        victim = draw.choice(everyone)
        name = "gone" if not lives(victim) else "dvc" if victim == main else " ".join(victim.cmdline())[:300]
        kind = next((kind for kind in (*KINDS, "dvc") if kind in name), name)
        if lives(victim):
            victim.kill()
        main.wait(LIMIT)  # a process whose loss does not matter may have been hit, such as the resource tracker
    if main.returncode and kind is None:
        raise RuntimeError(f"dvc repro failed by itself, see {folder}/log.txt")
    limit = time.monotonic() + 90
    while left := [process for process in everyone if lives(process)]:
        if time.monotonic() > limit:
            raise RuntimeError(f"after the kill of {kind} these go on: {[process.cmdline()[:6] for process in left]}")
        time.sleep(0.1)
    return kind, main.returncode == 0


def main(kills: int):
    draw = random.Random(0)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    copy_project(folder)
    begin = time.monotonic()
    disturb(folder, draw, inf)
    undisturbed, wall = contents(folder), time.monotonic() - begin
    print(f"undisturbed: {wall:.0f} s, {len(undisturbed)} files", flush=True)
    clear(folder)
    done, ends, victims = 0, 0, {}
    while done < kills or (folder / "results").exists():  # the last pipeline may end
        victim, ended = disturb(folder, draw, draw.uniform(1, LONGEST) if done < kills else inf)
        if victim is not None:
            done, victims[victim] = done + 1, victims.get(victim, 0) + 1
        if not ended:
            continue
        found = contents(folder)
        different = sorted(name for name in found.keys() | undisturbed.keys() if found.get(name) != undisturbed.get(name))
        if different:
            sys.exit(f"{folder}: after {done} kills {len(different)} files differ: {', '.join(different[:5])}")
        ends += 1
        clear(folder)
        print(f"{done} kills, {ends} pipelines that ended equal to the bit", flush=True)
    print(f"{done} kills ({', '.join(f'{number} of {name}' for name, number in victims.items())}), {ends} ends, all equal to the bit")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
