"""Can extras/ be deleted, and each method? Run by CI; takes some minutes.

    python tests/deletable.py

1. Without extras/ the main job with a few steps prints the same table as with it, and the tests of
   the course and of the methods pass.
2. Without methods/X.py, for each X but sft and sft-ia, which the others need, the tests of the
   other methods pass.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Without sampling: a sampled token may hang on the last digit of a sum, in which the two differ.
JOB = ["train.py", "--stage", "cat", "--sft-steps", "20", "--steps", "5", "--eval-per-task", "2",
       "--pool-per-task", "2", "--temperature", "0", "--samples", "1"]
KEPT = ("*.py", "methods", "demo", "docs", "tests", "pyproject.toml", "README.md")
WHOLE = ("tests/test_house.py", "tests/test_docs.py")  # about the repository with all its rooms


def copy_to(folder, leave_out):
    """The repository without some of its files."""
    for pattern in (*KEPT, "extras", "tools"):
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name,
                                ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder / path.name)
    for name in leave_out:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run(folder, words):
    """(status, output) of a Python command in a copy."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


def table(text):
    """The lines of the result table."""
    return [line for line in text.splitlines() if " | " in line and "step" not in line]


def without_extras(folder):
    """Problems of the copy without extras/."""
    copy_to(folder, ["extras", "tools", "tests/extras", "tests/tools"])
    with tempfile.TemporaryDirectory() as out:
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(run, place, [*JOB, "--out", f"{out}/{place.name}"])
                    for place in (ROOT, folder)]
        (status, there), (other, here) = (job.result() for job in jobs)
    if status or other or table(there) != table(here) or len(table(here)) < 5:
        return [f"the main job differs without extras/:\n{there[-2000:]}\n{here[-2000:]}"]
    status, text = run(folder, ["-m", "pytest", "tests", *(f"--ignore={name}" for name in WHOLE)])
    return [f"tests fail without extras/:\n{text[-3000:]}"] if status else []


def without_method(name, folder):
    """Problems of the other methods' tests without one."""
    copy_to(folder, ["extras", "tools", "tests/extras", "tests/tools", f"methods/{name}.py",
                     f"tests/methods/test_{name}.py"])
    status, text = run(folder, ["-m", "pytest", "tests/methods", "-x"])
    return [f"tests fail without methods/{name}.py:\n{text[-3000:]}"] if status else []


def main():
    """Run both; exit status 1 if anything fails."""
    methods = [path.stem for path in sorted((ROOT / "methods").glob("*.py"))
               if "\nTERMS = " in path.read_text() and path.stem not in ("sft", "sft_ia")]
    with tempfile.TemporaryDirectory() as top:
        places = {name: Path(top, name) for name in ["extras", *methods]}
        for place in places.values():
            place.mkdir()
        problems = without_extras(places["extras"])
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(lambda name: without_method(name, places[name]), methods):
                problems += found
    print("\n\n".join(problems) or f"extras/ and each of {len(methods)} methods can be deleted.")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
