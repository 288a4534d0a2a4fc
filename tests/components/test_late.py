"""A module that is imported late is the same module, and one that is not needed is not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import gc, sys
print("run", gc.isenabled())
value = 3
from late_package import inner
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "__init__.py").write_text(MODULE)
    (tmp_path / "late_package" / "inner.py").write_text("import late_package\nother = 4\nclass Error(Exception): ...\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')\n")
    return tmp_path


def run(package: Path, code: str) -> str:
    begin = "from components.late import import_late\nimport_late('late_package')\nimport sys\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": f"{package}:{Path(__file__).parents[2]}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_when_something_is_asked_for(package: Path) -> None:
    told = run(package, "import late_package\nimport late_package as again\nprint('before')\nprint(again.value)")
    assert told.split("\n")[:3] == ["before", "run False", "3"]
    assert run(package, "import late_package\nprint('never')") == "never\n"
    assert run(package, "import gc\nimport late_package\nlate_package.value\nprint(gc.isenabled())").endswith("True\n")


@pytest.mark.parametrize(
    "ask",
    [
        "import late_package.inner\nprint(late_package.inner.other)",
        "from late_package import inner\nprint(inner.other)",
        "from late_package.inner import other\nprint(other)",
    ],
)
def test_a_submodule_is_something_of_it(package: Path, ask: str) -> None:
    assert run(package, ask) == "run False\n4\n"


def test_what_was_imported_or_is_not_there_is_left_alone(package: Path) -> None:
    assert run(
        package, "import json\nimport_late('json')\nimport_late('not_there')\nprint('not_there' in sys.modules)"
    ) == ("False\n")
    told = run(
        package,
        "import_late('broken')\nimport broken\ntry:\n    broken.value\nexcept RuntimeError as e:\n    print(e)\n"
        "print('broken' in sys.modules)",
    )
    assert told == "broken\nFalse\n"
