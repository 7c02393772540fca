"""What lies where: each plugin file has its entry point and its prefix, and the wheel holds all that is needed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
POINTS: dict[str, str] = PROJECT["project"]["entry-points"]["saefw"]


def plugins() -> list[Path]:
    """Return every plugin file, and every folder that is a plugin."""
    found = [path for path in (TOP / "plugins").glob("*/*") if path.suffix == ".py" or (path / "__init__.py").exists()]
    return sorted(found)


def stages() -> list[Path]:
    return sorted(path for path in (TOP / "core/saefw/stages").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", plugins(), ids=lambda path: path.stem)
def test_every_plugin_has_the_prefix_and_an_entry_point(path: Path) -> None:
    assert path.stem.startswith("saefw_"), "its folder is an import root: without a prefix it may hide another module"
    assert path.stem in POINTS.values(), "add it to [project.entry-points.saefw], then pip install -e ."


@pytest.mark.parametrize("path", stages(), ids=lambda path: path.stem)
def test_every_stage_has_an_entry_point(path: Path) -> None:
    """A module beside the stages that brings nothing is a part of one of them."""
    brings = "@hookimpl" in path.read_text()
    assert (f"saefw.stages.{path.stem}" in POINTS.values()) == brings


def test_every_plugin_folder_is_an_import_root() -> None:
    roots = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
    assert {f"plugins/{path.parent.name}" for path in plugins()} == {
        root for root in roots if root.startswith("plugins/")
    }


@pytest.mark.parametrize("name", POINTS)
def test_every_entry_point_loads(name: str) -> None:
    (point,) = metadata.entry_points(group="saefw", name=name)
    assert point.value == POINTS[name], "pyproject.toml changed: pip install -e ."
    assert point.load().__doc__


def test_every_command_loads() -> None:
    for name, value in PROJECT["project"]["entry-points"]["saefw.commands"].items():
        (point,) = metadata.entry_points(group="saefw.commands", name=name)
        assert point.value == value
        assert callable(point.load())


@pytest.mark.slow
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    """A pattern `core` in .gitignore, for one, would leave the framework out without a word."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(TOP)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        points = next(archive.read(name).decode() for name in held if name.endswith("entry_points.txt"))
        registry = archive.read("saefw/registry.yaml")
    needed = {"saefw/__init__.py", "saefw/py.typed", "saefw/schema.sql", "saefw/registry.yaml"}
    needed |= {str(path.relative_to(TOP / "core")) for path in (TOP / "core/saefw").rglob("*.py")}
    needed |= {f"saefw/stages/gallery_page/{path.name}" for path in (TOP / "core/saefw/stages/gallery_page").iterdir()}
    needed |= {path.name for path in (TOP / "steering").glob("saefw_*.py")}
    for path in plugins():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if "__pycache__" not in file.parts]
        needed |= {str(file.relative_to(path.parent)) for file in files if file.is_file()}
    assert "saefw_digits_vit/weights.safetensors" in needed
    assert needed - held == set()
    assert registry == (TOP / "registry.yaml").read_bytes()
    assert all(f"{name} = {value}" in points for name, value in POINTS.items())
    tops = {name.split("/")[0] for name in held}
    assert all(top.startswith("saefw") for top in tops), "nothing else is installed"


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_folder(tmp_path: Path) -> None:
    """The wheel is built from the source distribution, and saefw is there by the wheel alone, its libraries by ours."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(TOP)]
    subprocess.run(build, check=True, capture_output=True)  # without --sdist or --wheel: the one from the other
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    # A copy of what is installed here, but for saefw itself and what would put this checkout on the path.
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "saefw" not in path.name.lower() and path.suffix != ".pth":
            (libraries / path.name).symlink_to(path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    where = call(str(python), "-c", "import saefw, saefw_topk; print(saefw.__file__, saefw_topk.__file__)")
    assert str(TOP) not in where and where.count(str(site)) == 2
    saefw = str(python.with_name("saefw"))
    assert call(saefw, "init") == "registry.yaml: written. Next: saefw run\n"
    assert "\nMade " in call(saefw, "run", "registry.yaml")
    assert call(saefw, "run").startswith("Nothing to make: ")
    assert len(list(folder.glob("runs/draw/*/*.png"))) >= 5
    moved = folder.rename(tmp_path / "moved")
    folder = moved
    assert call(saefw, "run").startswith("Nothing to make: ")
    shutil.rmtree(moved)
