"""The rules of the house, read from the package's source without importing it.

Every rule is a function of ``{module: source}`` that returns complaints. It stands here together with sources that break it,
so that each rule is tested twice: it is silent about the package, and it speaks up about the examples.
"""

import ast
import graphlib
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "pyro_aevb"
ROOT = Path(__file__).resolve().parents[1]

Sources = dict[str, str]
"""Source text by module, named within the package: ``program.structure``, ``program.__init__``, ``__init__``."""

SAMPLERS = frozenset(
    {
        "mcmc.noise",
        "mcmc.hmc",
        "mcmc.adaptation",
        "mcmc.annealing",
        "mcmc.convergence",
        "mcmc.draws",
        "mcmc.length",
        "mcmc.modes",
    },
)
"""What needs no program: tensors in, tensors out."""

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"_types"}),
    frozenset({"weights", "status", "canvas", "randomness", "distributions", "arviz_arrays", "arviz_file"}),
    frozenset({"guides.encoders", *SAMPLERS}),
    frozenset({"program"}),
    frozenset({"guides", "objectives", "mcmc"}),
    frozenset({"training", "evidence"}),
    frozenset({"diagnostics", "imputation", "prediction", "plots", "evidence_plots"}),
    frozenset({"export"}),
    frozenset({"aevb"}),
    frozenset({"__init__"}),
    frozenset({"demo"}),
    frozenset({"__main__"}),
)
"""From the ground up. A module may import what lies below it, and its own room. Longest name first: a module, else its room."""

LEAVES = frozenset({"datasets", "testing"})
"""May import ``errors`` and ``_types`` only, and are imported by nothing below the package's front."""

STRANGERS = frozenset({("training", "objectives")})
"""Rooms that lie in the right order and still do not know each other."""

WITHOUT_PYRO = frozenset(
    {
        "errors",
        "_types",
        "guides.encoders",
        "guides.wiring",
        *SAMPLERS,
        "datasets",
        "arviz_arrays",
        "arviz_file",
    }
)
FRONTS = frozenset({"__init__", "__main__"})
"""May import the package's own modules inside a function, so that ``--help`` answers at once."""

SLOW = frozenset({"arviz", "lightning", "lightning_fabric", "matplotlib", "sklearn"})
LAZY = SLOW | {"h5netcdf", "pandas", "pooch", "xarray", "zuko"}
DRAWERS = frozenset({"common", "core", "helper", "helpers", "misc", "util", "utils"})
MACHINE_PATH = re.compile(r"(?<![\w.:/~!])/(home|root|tmp|mnt|opt|srv|usr|var|work|workspace|Users)/\w")


# Reading


@dataclass(frozen=True)
class Import:
    """One imported module, as seen from the importing one."""

    source: str
    target: str
    line: int
    in_function: bool
    for_types: bool

    @property
    def own(self) -> str | None:
        """The target's name within the package, None for another package."""
        if self.target == PACKAGE:
            return "__init__"
        return self.target.removeprefix(f"{PACKAGE}.") if self.target.startswith(f"{PACKAGE}.") else None

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


def read_package(folder: Path) -> Sources:
    """Return the source of every module below a folder."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def list_imports(sources: Sources) -> list[Import]:
    known = {f"{PACKAGE}.{name}" for name in sources}
    found = [
        Import(name, *rest) for name, text in sources.items() for rest in _visit(ast.parse(text), known, False, False)
    ]
    return [item for item in found if item.own != item.source]


def _visit(node: ast.AST, known: set[str], in_function: bool, for_types: bool) -> Iterator[tuple[str, int, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno, in_function, for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            targets = {f"{module}.{alias.name}" for alias in child.names}
            names = {target if target in known else module for target in targets}
            yield from ((name, child.lineno, in_function, for_types) for name in sorted(names))
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from _visit(child, known, inside, typing)


def layer_of(module: str) -> int | None:
    """Return the height of a module, None for one without a layer."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for height, layer in enumerate(LAYERS):
            if name in layer:
                return height
    return None


def room(module: str) -> str:
    return module.partition(".")[0]


def functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    spec = function.args
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]


def code_lines(text: str) -> set[int]:
    """Return the lines that hold code: no blank lines, comments or docstrings."""
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


# Rules

Rule = Callable[[Sources], list[str]]
BROKEN: dict[Rule, tuple[Sources, ...]] = {}
"""Each rule with sources that break it."""


def rule(*broken: Sources) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        BROKEN[function] = broken
        return function

    return register


@rule({"nursery": ""}, {"nursery.crib": ""}, {"utilities.x": ""})
def every_module_has_a_layer(sources: Sources) -> list[str]:
    return [
        f"{name} has no layer: give it a place in LAYERS of tests/test_architecture.py, or put it into a room that has one"
        for name in sources
        if layer_of(name) is None and room(name) not in LEAVES
    ]


@rule(
    {"program.structure": "from pyro_aevb.objectives.sgvb import SGVB"},
    {"program.structure": "import pyro_aevb.aevb"},
    {"program.structure": "from pyro_aevb import aevb", "aevb": ""},
    {"objectives.sgvb": "from pyro_aevb.guides.normal import AutoAmortizedNormal"},
    {"objectives.sgvb": "from pyro_aevb import AEVB"},
    {"mcmc.hmc": "from pyro_aevb.program.density import LogDensity"},
    {"training.loop": "def f():\n    from pyro_aevb.evidence.result import LogMarginal"},
    {"weights": "if TYPE_CHECKING:\n    from pyro_aevb.program.structure import Site"},
    {"errors": "from pyro_aevb._types import Args"},
    {"demo": "from pyro_aevb.__main__ import main"},
)
def imports_point_down(sources: Sources) -> list[str]:
    complaints = []
    for item in list_imports(sources):
        above, below = layer_of(item.source), layer_of(item.own) if item.own else None
        if (
            above is None
            or below is None
            or below < above
            or (below == above and room(item.source) == room(item.own or ""))
        ):
            continue
        complaints.append(f"{item.source}:{item.line} imports {item.own}, which does not lie below it")
    return complaints


@rule(
    {"datasets": "from pyro_aevb.weights import LogWeights"},
    {"testing": "from pyro_aevb.program.structure import read_structure"},
    {"program.structure": "from pyro_aevb.testing import LinearGaussian"},
    {"aevb": "from pyro_aevb import datasets", "datasets": ""},
)
def leaves_stand_apart(sources: Sources) -> list[str]:
    front = layer_of("__init__") or 0
    complaints = []
    for item in list_imports(sources):
        if room(item.source) in LEAVES and item.own and room(item.own) not in {"errors", "_types", room(item.source)}:
            complaints.append(f"{item.source}:{item.line} is a leaf and imports {item.own}")
        if item.own and room(item.own) in LEAVES and (layer_of(item.source) or front) < front:
            complaints.append(f"{item.source}:{item.line} imports the leaf {item.own}")
    return complaints


@rule({"training.loop": "from pyro_aevb.objectives.base import Objective"})
def strangers_do_not_meet(sources: Sources) -> list[str]:
    return [
        f"{item.source}:{item.line} knows {item.own}"
        for item in list_imports(sources)
        if item.own and (room(item.source), room(item.own)) in STRANGERS
    ]


@rule(
    {"program.a": "import pyro_aevb.program.b", "program.b": "from pyro_aevb.program import a"},
    {
        "program.a": "if TYPE_CHECKING:\n    from pyro_aevb.program.b import B",
        "program.b": "import pyro_aevb.program.a",
    },
)
def no_cycles(sources: Sources) -> list[str]:
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for item in list_imports(sources):
        if item.own:
            graph[item.source].add(item.own)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


@rule(
    {"mcmc.hmc": "import pyro"},
    {"guides.encoders": "from pyro.nn import PyroModule"},
    {"mcmc.annealing": "def f():\n    import pyro.distributions as dist"},
    {"datasets": "import pyro"},
)
def mathematics_and_data_do_without_pyro(sources: Sources) -> list[str]:
    return [
        f"{item.source}:{item.line} imports {item.target}"
        for item in list_imports(sources)
        if item.source in WITHOUT_PYRO and item.package == "pyro"
    ]


@rule({"program.__init__": "from pyro_aevb.program.structure import Site"}, {"guides.__init__": '"""Guides."""'})
def inits_are_empty_but_the_top_one(sources: Sources) -> list[str]:
    return [
        f"{name} is not empty"
        for name, text in sources.items()
        if name.endswith(".__init__") and room(name) not in LEAVES and text.strip()
    ]


@rule(
    {"program.structure": "def f():\n    import math"},
    {"program.structure": "class A:\n    def f(self):\n        from torch import Tensor"},
    {"aevb": "def f():\n    from pyro_aevb.weights import LogWeights"},
)
def imports_stand_at_the_top(sources: Sources) -> list[str]:
    return [
        f"{item.source}:{item.line} imports {item.target} inside a function; only {sorted(LAZY)} are"
        for item in list_imports(sources)
        if item.in_function and item.package not in LAZY and not (item.own and item.source in FRONTS)
    ]


@rule({"export": "import arviz as az"}, {"training.loop": "from lightning_fabric import Fabric"})
def slow_packages_wait(sources: Sources) -> list[str]:
    return [
        f"{item.source}:{item.line} imports {item.package} at the top; it is slow, import it in the function that needs it"
        for item in list_imports(sources)
        if item.package in SLOW and not item.in_function and not item.for_types
    ]


@rule({"program.structure": "from . import staging"}, {"program.structure": "from ..weights import Terms"})
def imports_are_absolute(sources: Sources) -> list[str]:
    return [f"{item.source}:{item.line}" for item in list_imports(sources) if item.target.startswith(".")]


@rule({"program.utils": ""}, {"core.a": ""}, {"helpers": ""})
def rooms_not_drawers(sources: Sources) -> list[str]:
    return [f"{name} is a drawer, not a room" for name in sources if DRAWERS & set(name.split("."))]


@rule({"weights": "x = 1\n" * 401})
def files_are_short(sources: Sources) -> list[str]:
    sizes = {name: text.count("\n") for name, text in sources.items()}
    return [
        f"{name}: {size} lines; which two reasons to change does it hold?" for name, size in sizes.items() if size > 400
    ]


@rule({"weights": "def f():\n" + "    x = 1\n" * 50})
def functions_are_short(sources: Sources) -> list[str]:
    complaints = []
    for name, text in sources.items():
        lines = code_lines(text)
        for function in functions(text):
            size = len(lines.intersection(range(function.lineno, (function.end_lineno or 0) + 1)))
            if size > 50:
                complaints.append(f"{name}:{function.lineno} {function.name}: {size} code lines")
    return complaints


@rule(
    {"weights": "def _f(a, b, c, d, e, f, g, h): ..."},
    {"weights": "class A:\n    def _f(a, b, c, *, d, e, f, g, h): ..."},
)
def private_functions_take_few_parameters(sources: Sources) -> list[str]:
    return [
        f"{name}:{function.lineno} {function.name}: {len(parameters(function))} parameters"
        for name, text in sources.items()
        for function in functions(text)
        if function.name.startswith("_") and not function.name.endswith("__") and len(parameters(function)) > 7
    ]


@rule(
    {"weights": "def f(a, b, c, d, e, f, g, h): ..."},
    {"weights": "class A:\n    def __init__(a, b, c, d, e, f, g, h): ..."},
)
def public_doors_take_keywords(sources: Sources) -> list[str]:
    return [
        f"{name}:{function.lineno} {function.name}: more than 7 positional parameters; make them keyword-only"
        for name, text in sources.items()
        for function in functions(text)
        if len(function.args.posonlyargs) + len(function.args.args) > 7
    ]


@rule({"weights": "def f(x):\n    assert x > 0"})
def errors_are_raised(sources: Sources) -> list[str]:
    return [
        f"{name}:{node.lineno} asserts; raise an error that a user can read"
        for name, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert)
    ]


@rule({"weights": "x = 1  # TODO: later"}, {"weights": '"""FIXME."""'})
def nothing_is_left_for_later(sources: Sources) -> list[str]:
    return [
        f"{name}:{number} {line.strip()}"
        for name, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX)\b", line)
    ]


@rule(
    {"weights": "x = 1"},
    {"weights": '"""W."""\nclass _A:\n    x: int'},
    {"weights": '"""W."""\ndef f(): ...'},
    {"weights": '"""W."""\nclass A:\n    """A."""\n    def f(self): ...'},
)
def everything_public_is_documented(sources: Sources) -> list[str]:
    complaints = []
    for name, text in sources.items():
        tree = ast.parse(text)
        complaints += [f"{name}: no module docstring"] if tree.body and not ast.get_docstring(tree) else []
        complaints += [f"{name}:{node.lineno} {node.name}: no docstring" for node in _undocumented(tree)]
    return complaints


def _undocumented(scope: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield classes and public functions without a docstring; an overrider marked so inherits its contract."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from () if ast.get_docstring(node) else (node,)
            yield from () if node.name.startswith("_") else _undocumented(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
            if not ast.get_docstring(node) and not re.search(r"\boverride\b|\boverload\b|\.setter\b", marks):
                yield node


@rule(
    {"weights": "def f(x: int): ..."},
    {"weights": "def f(x) -> int: ..."},
    {"weights": "def f(*args, **kwargs: int) -> int: ..."},
    {"weights": "class A:\n    def __init__(self, *, x) -> None: ..."},
    {"weights": "def f() -> int:\n    def inner(x): ..."},
)
def everything_is_annotated(sources: Sources) -> list[str]:
    return [
        f"{name}:{function.lineno} {function.name}: an argument or the return has no annotation"
        for name, text in sources.items()
        for function in functions(text)
        if function.returns is None
        or any(item.annotation is None and item.arg not in {"self", "cls"} for item in parameters(function))
    ]


@rule(
    {"datasets": 'FOLDER = "/ho' + 'me/me/data"'},
    {"weights": "# see /us" + "r/lib/x"},
)
def no_paths_of_one_machine(sources: Sources) -> list[str]:
    return [
        f"{name}:{number} {line.strip()}"
        for name, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]


# Tests


@pytest.fixture(scope="module")
def package() -> Sources:
    return read_package(ROOT / PACKAGE)


def test_the_package_is_read(package: Sources) -> None:
    assert {"__init__", "errors", "weights", "program.structure"} <= set(package)


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule, package: Sources) -> None:
    complaints = rule(package)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "sources"),
    [pytest.param(rule, sources, id=rule.__name__) for rule, examples in BROKEN.items() for sources in examples],
)
def test_a_violation_is_seen_by(rule: Rule, sources: Sources) -> None:
    assert rule(sources)


GOOD: Sources = {
    "__init__": '"""The package."""\nfrom pyro_aevb.aevb import AEVB\n',
    "errors": '"""Errors."""\n',
    "program.__init__": "",
    "program.structure": '"""Structure."""\nimport pyro\n\nfrom pyro_aevb.errors import AEVBError\n',
    "objectives.base": '"""Base."""\nfrom pyro_aevb.program import structure\n',
    "objectives.sgvb": (
        '"""SGVB."""\nfrom pyro_aevb.objectives.base import Objective\n\n\nclass SGVB(Objective):\n    """SGVB."""\n\n'
        "    @override\n    def f(self, x: int, *, y: int = 1) -> int:\n        import arviz\n\n        return x\n"
    ),
    "mcmc.annealing": '"""Annealing."""\nfrom pyro_aevb.mcmc.hmc import step\n',
    "mcmc.hmc": '"""HMC, see https://example.org/home/x."""\nimport torch\n',
    "aevb": '"""AEVB."""\nfrom pyro_aevb.objectives.sgvb import SGVB\n',
    "datasets": '"""Data."""\nfrom pyro_aevb.errors import DataError\n',
    "__main__": '"""Command line."""\n\n\ndef _main() -> None:\n    from pyro_aevb.demo import run\n',
}


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_good_house_is_left_alone_by(rule: Rule) -> None:
    assert rule(GOOD) == []


def test_no_paths_of_one_machine_in_the_project() -> None:
    folders = [ROOT / name for name in ("benchmarks", "docs", "tests", "tutorials", ".ci")]
    paths = [
        path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.suffix in {".py", ".md", ""}
    ]
    paths += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile"]
    sources = {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}
    assert no_paths_of_one_machine(sources) == []


def test_links_among_the_diagnostics_lead_to_the_api_page() -> None:
    page = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    links: set[str] = set()
    for name in page:
        path = ROOT / f"{name.replace('.', '/')}.py"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        links |= set(re.findall(r"`~?(pyro_aevb\.diagnostics\.\w+)[.`]", text))
    assert len(links) > 5
    assert links <= page
