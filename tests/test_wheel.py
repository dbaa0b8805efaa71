"""The wheel: what is shipped, and that it works away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def call(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from what git tracks and what is not ignored, in a copy: the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    )
    (built,) = out.glob("*.whl")
    return built


def packages():
    """Every package of the checkout, by name."""
    inits = [path for path in ROOT.rglob("__init__.py") if not {"tests", "build", ".venv"} & set(path.parts)]
    return sorted(".".join(("modicum", *path.parent.relative_to(ROOT).parts)) for path in inits)


def test_contents(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert "modicum/py.typed" in shipped
    tops = {name.split("/")[0] for name in shipped}
    assert tops == {"modicum", next(top for top in tops if top.endswith(".dist-info"))}
    assert not {
        name for name in shipped if name.startswith(("modicum/tests", "modicum/docs", "modicum/build"))
    }
    templates = {f"modicum/{path.relative_to(ROOT)}" for path in (ROOT / "research").rglob("*.jinja")}
    assert templates <= shipped
    ours = ("models", "parallel", "research", "experiments")
    modules = {f"modicum/{path.relative_to(ROOT)}" for room in ours for path in (ROOT / room).rglob("*.py")}
    assert modules | {"modicum/__init__.py", "modicum/__main__.py"} == {
        n for n in shipped if n.endswith(".py")
    }
    assert {"LICENSE", "entry_points.txt"} <= {name.split("/")[-1] for name in shipped}


def test_every_package_imports_from_anywhere(wheel, tmp_path):
    """Installed alone into an empty folder, beside the dependencies' site-packages."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    call(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    )
    code = f"""
import importlib, sys
sys.path[:0] = [{str(target)!r}]
sys.path.append({sysconfig.get_path("purelib")!r})
for name in {packages()!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(target)!r}), module.__file__
import modicum
print(modicum.__version__)
"""
    # -S: no site, hence no editable finder that would lead back to the checkout.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    version = call(
        sys.executable, "-S", "-c", code, cwd=elsewhere, env={**environment, "JAX_PLATFORMS": "cpu"}
    )
    assert version == wheel.name.split("-")[1]
