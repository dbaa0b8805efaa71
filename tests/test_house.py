"""The habits of the house, checked: who imports whom, what is shipped, sizes, annotations, light imports."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("parallel", "models", "research", "experiments")  # each may import those before it, and itself


def package_files() -> list[Path]:
    """All modules that are shipped."""
    inside = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted([ROOT / "__init__.py", ROOT / "__main__.py", *inside])


FILES = package_files()
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported(path: Path) -> set[str]:
    """Dotted names, from the root of the package, of what a module imports from within the package."""
    found = set()
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            prefix = ".".join(base + ([node.module] if node.module else []))
            found |= {prefix} if prefix else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module.split(".")[0] == "modicum" else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "modicum"}
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_one_way(path):
    """experiments -> research -> models -> parallel, and relative within the package."""
    names = imported(path)
    assert not {name for name in names if name.startswith("modicum")}, "import relatively within the package"
    room = path.relative_to(ROOT).parts[0]
    if room in ROOMS:
        above = ROOMS[ROOMS.index(room) + 1 :]
        assert not {name for name in names if name.split(".")[0] in above}


def test_the_import_reader_sees_relative_imports(tmp_path):
    """The test above cannot pass by reading nothing."""
    assert "parallel" in {name.split(".")[0] for name in imported(ROOT / "parallel" / "layout.py")}
    assert "InputError" in imported(ROOT / "parallel" / "layout.py")
    assert any(
        name.startswith("models") for name in imported(ROOT / "research" / "training" / "objectives.py")
    )


def test_every_package_is_listed_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    folders = {path.parent.relative_to(ROOT) for path in FILES if path.name == "__init__.py"}
    there = [".".join(("modicum", *folder.parts)) for folder in folders]
    assert sorted(listed) == sorted(there)
    bare = {path.parent for path in FILES} - {path.parent for path in FILES if path.name == "__init__.py"}
    assert not bare, "a folder of modules without __init__.py is not shipped"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_are_small(path):
    """A file is one idea of at most 400 lines, a function at most 60; no rooms for odds and ends."""
    assert path.stem not in {"utils", "util", "common", "helpers", "helper", "misc"}
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions) and node.end_lineno - node.lineno + 1 > 60
    }
    assert not long


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_public_functions_say_what_they_do(path):
    """Every public function and method has a docstring and complete annotations, every module a docstring."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "module without a docstring"
    problems = [problem for node, method in public_functions(tree) for problem in missing(node, method)]
    assert not problems


def public_functions(tree, method=False):
    """(function, whether it is a method) for those without a leading underscore, not inside functions."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node, method
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, method=True)


def missing(node, method):
    """What a public function lacks."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if not ast.get_docstring(node) and "overload" not in decorators and node.name != "setup":
        yield f"{node.name}: no docstring"
    if node.returns is None:
        yield f"{node.name}: no annotation of the result"
    arguments = [*node.args.posonlyargs, *node.args.args]
    if method and "staticmethod" not in decorators:
        arguments = arguments[1:]  # self or cls
    stars = [star for star in (node.args.vararg, node.args.kwarg) if star is not None]
    for argument in [*arguments, *node.args.kwonlyargs, *stars]:
        if argument.annotation is None:
            yield f"{node.name}: no annotation of {argument.arg}"


def run(code: str) -> str:
    """What a fresh interpreter, elsewhere, prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_importing_the_package_is_instant():
    code = """
import sys, time
start = time.perf_counter()
import modicum
elapsed = time.perf_counter() - start
heavy = {"jax", "flax", "numpy", "optax", "datasets"} & set(sys.modules)
print(elapsed, *heavy)
"""
    best, *heavy = min((run(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert not heavy
    assert float(best) < 0.3


def test_configuration_of_the_command_line_needs_no_jax():
    """`modicum --help` answers before any of the heavy imports."""
    assert run("import sys, modicum.experiments.commands; print('jax' in sys.modules)") == "False"


CORE = ("modicum.models", "modicum.parallel", "modicum.research.delta", "modicum.research.training.step")


# Flax itself imports rich, for `tabulate`: that much is granted, and rich forgotten before ours is imported.
WITHOUT_EXTRAS = """
import sys, flax.linen
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "grain", "tyro", "rich"):
            raise ImportError(name + " is absent")
for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
    del sys.modules[name]
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("module", CORE)
def test_the_core_needs_only_jax_flax_and_optax(module):
    """It imports where datasets, grain, tyro and rich are absent, and loads neither flax.nnx nor Pallas."""
    late = "flax.nnx", "jax.experimental.pallas"
    code = f"import {module}\nprint(*[name for name in sys.modules if name.startswith({late})])"
    assert run(WITHOUT_EXTRAS + code) == ""


@pytest.mark.parametrize("name", ["datasets", "rich.console"])
def test_what_is_absent_there_is_absent(name):
    """The test above cannot pass because nothing was hidden."""
    code = f"try:\n    import {name}\nexcept ImportError as error:\n    print(error)"
    assert run(WITHOUT_EXTRAS + code).endswith("is absent")


@pytest.mark.parametrize("module", CORE)
def test_importing_touches_no_device(module):
    code = f"import {module}; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert run(code) == "False"
