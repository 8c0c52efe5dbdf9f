"""design.md's import rules, read from the source."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ditr_cache", "ditr_train")
FROM_THE_CACHE = {"ditr_cache"} | {f"ditr_cache.{name}" for name in ("cached", "codecs", "errors", "schema", "store")}

SOLE_IMPORTERS = {
    "zarr": {"ditr_cache/arrays.py"},
    "numcodecs": {"ditr_cache/bounded_codecs.py"},
    "fsspec": {"ditr_cache/remote.py"},
    "dask": {"ditr_cache/executors.py"},
    "distributed": {"ditr_cache/executors.py"},
    "spconv": {"ditr_train/models/sparse_backend.py"},
    "spconv_triton": {"ditr_train/models/sparse_backend.py"},
    "torch_scatter": {"ditr_train/models/segment_pool.py"},
    "timm": {"ditr_cache/vfm.py", "ditr_cache/weights.py"},
}


def sources(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, *, at_start_only: bool = False) -> set[str]:
    """Every module that a file imports, with `from package import module` resolved where that is a file of ours.

    What stands under `if TYPE_CHECKING` is not imported and not counted.
    """
    found: set[str] = set()
    modules = {module_of(p) for p in sources(*PACKAGES)}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if at_start_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in modules else node.module for a in node.names
            )
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(path))
    return found


def test_the_reader_of_imports_sees_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import zarr.codecs\nfrom ditr_cache import store\nfrom ditr_cache import open_cache\n"
        "import importlib\nimportlib.import_module('dask')\n"
        "def f():\n    import spconv.pytorch as s\n    from torch_scatter import segment_csr\n"
    )
    expected = {"zarr.codecs", "ditr_cache.store", "ditr_cache", "importlib", "dask"}
    assert imports(path, at_start_only=True) == expected
    assert imports(path) == expected | {"spconv.pytorch", "torch_scatter"}


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_one_file_imports_a_library(library):
    found = {
        p.relative_to(ROOT).as_posix()
        for p in sources(*PACKAGES)
        if any(name.split(".")[0] == library for name in imports(p))
    }
    assert found <= SOLE_IMPORTERS[library]


def test_the_trainer_sees_only_the_reader_and_the_schema():
    for path in sources("ditr_train"):
        ours = {name for name in imports(path) if name.split(".")[0] == "ditr_cache"}
        ours -= {name for name in ours if name.startswith("ditr_cache.pointcloud.")}  # files of points, both read them
        assert ours <= FROM_THE_CACHE, f"{path}: {ours - FROM_THE_CACHE}"


def test_the_cache_knows_no_trainer():
    for path in sources("ditr_cache"):
        assert not {n for n in imports(path) if n.split(".")[0] in ("ditr_train", "pipelines", "tests")}, path


def test_no_import_cycles():
    """Also through imports inside of functions, which the interpreter would let pass."""
    modules = {module_of(p): p for p in sources(*PACKAGES)}
    graph = {name: sorted((imports(path) & modules.keys()) - {name}) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_are_short():
    long = {str(p): n for p in sources(*PACKAGES) if (n := len(p.read_text().splitlines())) > 750}
    assert not long


# --- what is never done ---------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "marshal.loads", "marshal.load", "shelve.open", "joblib.load", "dill.load", "dill.loads",
}  # fmt: skip


def faults(tree: ast.Module) -> list[str]:
    """Calls that would run what a file says: pickle in any form, eval, unsafe YAML."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("pickle", "cPickle", "dill", "cloudpickle"):
            if not node.attr.endswith("Error"):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "joblib"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in FORBIDDEN_CALLS or (name == "torch.load" and options.get("weights_only") != "True"):
                found.append(f"line {node.lineno}: {name}")
            if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
                found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
        "yaml.load(f)", "np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)", "pickle.Unpickler(f)",
    ],
)  # fmt: skip
def test_faults_are_seen(line):
    assert faults(ast.parse(line))


def test_what_is_allowed_passes():
    assert not faults(
        ast.parse("pickle.UnpicklingError\ntorch.load(f, weights_only=True)\nyaml.safe_load(f)\nmodel.eval()")
    )


def test_nothing_read_from_a_file_is_ever_run():
    found = {str(p.relative_to(ROOT)): faults(tree_of(p)) for p in sources(*PACKAGES, "pipelines")}
    assert not {path: lines for path, lines in found.items() if lines}


# --- what an import costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("ditr_cache", ("torch", "timm", "dask", "distributed", "PIL")),
        ("ditr_cache.store", ("torch", "timm", "dask", "distributed")),
        ("ditr_cache.verify", ("torch", "timm", "dask")),
        ("ditr_cache.info", ("torch", "timm", "dask")),
        ("ditr_cache.cli", ("torch", "timm", "dask", "distributed")),
        ("ditr_cache.datasets.scannet.dataset", ("torch", "timm", "dask")),
    ],
)
def test_light_modules_do_not_import_heavy_ones(module, absent):
    code = f"import sys, {module}; print(sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_reader_works_where_torch_is_not_installed(tmp_path):
    """A cache that is read on a machine without torch, timm and dask."""
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'dask', 'distributed', 'torchvision'): sys.modules[name] = None\n"
        "import ditr_cache, ditr_cache.verify, ditr_cache.info, ditr_cache.show\n"
        f"try: ditr_cache.open_cache({str(tmp_path)!r})\n"
        "except ditr_cache.CacheError as error: print('CacheError', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.startswith("CacheError") and done.returncode == 0, done.stderr
