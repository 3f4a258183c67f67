"""The scripts in tools/ run from any folder of a clone that is not installed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import pathlib, runpy, sys
root = pathlib.Path(sys.argv[1])
# An installed megagpt, or a path to a clone, would hide a script that does not find its own.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
before = [path for path in sys.path if not (pathlib.Path(path) / "megagpt").exists()]
for tool in sorted((root / "tools").glob("*.py")):
    sys.path = list(before)
    for name in [name for name in sys.modules if name.partition(".")[0] == "megagpt"]:
        del sys.modules[name]
    main = runpy.run_path(str(tool), run_name="imported")["main"]
    print(tool.stem, pathlib.Path(sys.modules[main.__module__].__file__).relative_to(root))
"""


def test_every_tool_finds_the_package_of_its_own_clone(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_ALL, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    modules = dict(line.split() for line in result.stdout.splitlines())
    assert modules == {name: f"megagpt/commands/{name}.py" for name in modules}
    assert modules.keys() == {tool.stem for tool in (ROOT / "tools").glob("*.py")}
