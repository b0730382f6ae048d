"""Packaging stays in step: conda and pip pins, installed versions, make targets, atomic files."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile

import pytest
import yaml

from detransformer.files import atomic_folder, atomic_write, data_folder, repository_root
from detransformer.record.provenance import pins, versions

ROOT = repository_root()


def test_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(pip) == sorted([*(name + pin for name, pin in pins(ROOT).items()), "-e ."])
    assert "python>=3.11" in environment["dependencies"]


def test_every_requirement_is_pinned_and_torch_exactly():
    found = pins(ROOT)
    assert found["torch"] == "==2.13.0"
    assert all(pin.startswith("==") for pin in found.values()), found


def test_installed_versions_satisfy_the_pins():
    for package, pin in pins(ROOT).items():
        wanted = pin.removeprefix("==").removesuffix("*")
        assert importlib.metadata.version(package).startswith(wanted), package
    assert "missing" not in versions(ROOT).values()


def test_make_knows_its_targets():
    for target in ("reproduce", "test", "lab", "figures", "lint", "docs", "coverage", "clean"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3"
    # A stand-in that runs the check with the version of an old interpreter.
    old.write_text(
        '#!/bin/sh\nexec python3 -c "import sys; sys.version_info = (3, 9, 2, \'final\', 0); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    command = ["make", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "install"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr and "3.9" in done.stderr


def test_atomic_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    target = tmp_path / "sub" / "table.csv"
    with atomic_write(target) as file:
        file.write("old\n")
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write("half")
        raise RuntimeError
    assert target.read_text() == "old\n" and [p.name for p in target.parent.iterdir()] == ["table.csv"]
    with atomic_write(target, "wb") as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"


def test_atomic_folder_replaces_only_when_complete(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["a"]
    with atomic_folder(target) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_clone_reads_its_own_published_values():
    assert data_folder("published") == ROOT / "data" / "published"


@pytest.mark.slow
def test_a_wheel_works_without_the_repository(tmp_path):
    """The commands that need no notebooks: published device figures and profiles are in the package."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "dist", ROOT]
    subprocess.run(build, check=True, timeout=240, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    package = tmp_path / "installed/detransformer"
    names = {path.name for path in (ROOT / "data/published").glob("*.csv")}
    assert names and {path.name for path in (package / "published").glob("*.csv")} == names
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); import detransformer; "
    code += "print(detransformer.__file__); from detransformer.cli import main; main()"
    for words in (["--version"], ["plan", "--model", "bert-base", "--bandwidth", "125", "--devices", "2"]):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        first, *lines = done.stdout.splitlines()
        assert first.startswith(str(tmp_path)) and lines
