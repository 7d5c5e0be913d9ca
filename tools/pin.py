"Refresh the pins: write the newest fitting version of every package, transitive ones too, into pyproject.toml."

import re
import subprocess
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
SECTION = re.compile(r"constraint-dependencies = \[\n.*?\n\]\n", re.S)


def resolve(text: str) -> list[str]:
    "The newest versions that fit a pyproject.toml without pins."
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(text)
        (Path(folder) / "README.md").touch()
        (Path(folder) / "spikeprompt").mkdir()
        (Path(folder) / "spikeprompt/__init__.py").write_text('__version__ = "0"\n')
        export = ["uv", "export", "-q", "--all-groups", "--all-extras", "--no-hashes", "--no-annotate", "--no-header", "--no-emit-project"]
        return subprocess.run(export, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()


if __name__ == "__main__":
    text = PROJECT.read_text()
    pins = "".join(f'    "{line}",\n' for line in resolve(SECTION.sub("", text)))
    PROJECT.write_text(SECTION.sub(lambda _: f"constraint-dependencies = [\n{pins}]\n", text))
