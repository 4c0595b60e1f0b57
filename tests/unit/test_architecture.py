"""The rules of the code base that a reader of one file cannot see."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainingArguments

import hf_gradiend
from hf_gradiend.training.arguments import GradiendTrainingArguments

PACKAGE = Path(hf_gradiend.__file__).parent

# The import direction (DESIGN.md, section 2). A module imports from earlier lines and from its own
# sub-package, not from its neighbours on the same line. The package itself ("") gathers the public
# names; only the command line may use them.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("files",),
    ("configuration_gradiend", "parameters"),
    ("metrics", "base_models"),
    ("data",),
    ("gradients",),
    ("modeling_gradiend",),
    ("edits", "gradiend_format"),
    ("training", "adapter"),
    ("evaluation", "baselines"),
    ("cards", "evaluate_modules"),
    ("hub",),
    ("plotting",),
    ("",),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

FILES = sorted(PACKAGE.rglob("*.py"))
EACH_FILE = pytest.mark.parametrize(
    "file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES]
)


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(module: str, tree: ast.AST, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name inside hf_gradiend of every import, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_gradiend":
                    yield node.lineno, alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = ("hf_gradiend", *filter(None, module.split(".")))
            base = above[: len(above) - node.level + is_package]
            yield node.lineno, ".".join([*base, *filter(None, [node.module])]).partition(".")[2]
        elif (
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_gradiend"
        ):
            inside = (node.module or "").partition(".")[2]
            for alias in node.names:  # `from hf_gradiend import errors` names a module, too
                is_module = not inside and alias.name in RANK
                yield node.lineno, alias.name if is_module else inside


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    own = module.split(".")[0]
    if own not in RANK:
        return [f"{module} has no place in the import direction"]
    found: list[str] = []
    for line, imported in imports(module, ast.parse(source), is_package=is_package):
        part = imported.split(".")[0]
        if part not in RANK:
            found.append(f"{module}:{line} imports {part}, which has no place")
        elif module and part != own and RANK[part] >= RANK[own]:
            found.append(f"{module}:{line} imports {part or 'the package itself'}")
    return found


@EACH_FILE
def test_a_module_imports_only_from_what_stands_before_it(file):
    found = violations(
        module_of(file), file.read_text(encoding="utf-8"), is_package=file.name == "__init__.py"
    )

    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "import hf_gradiend.parameters"),
        ("errors", "from hf_gradiend import __version__"),
        ("parameters", "from hf_gradiend.configuration_gradiend import GradiendConfig"),
        ("parameters", "from hf_gradiend import metrics"),
        ("data.loading", "def f():\n    from hf_gradiend.gradients.forward import encode_texts"),
        ("gradients.forward", "if TYPE_CHECKING:\n    from hf_gradiend.modeling_gradiend import G"),
        ("modeling_gradiend", "from .edits import edited"),
        ("training.trainer", "from ..evaluation import encoder"),
        ("training.trainer", "from hf_gradiend.adapter.layer import Layer"),
        ("evaluation.encoder", "from hf_gradiend.cli import main"),
        ("helpers", "import torch"),
        ("training.trainer", "from hf_gradiend.helpers import f"),
    ],
)
def test_a_planted_import_against_the_direction_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("parameters", "from hf_gradiend.errors import SelectionError\nimport torch"),
        ("modeling_gradiend", "from .configuration_gradiend import GradiendConfig"),
        ("training.trainer", "from hf_gradiend.training.update import FusedAdamW"),
        ("training.trainer", "from .update import FusedAdamW"),
        ("cli.encode", "from hf_gradiend import __version__"),
        ("", "from hf_gradiend.training.trainer import GradiendTrainer"),
    ],
)
def test_an_import_along_the_direction_is_allowed(module, source):
    assert violations(module, source) == []


@EACH_FILE
def test_only_the_model_file_imports_by_a_computed_name(file):
    # `_package` is the one import against the arrow: the model's thin methods reach the package.
    text = file.read_text(encoding="utf-8")

    uses = len(re.findall(r"\bimport_module\(|__import__\(", text))

    assert uses == (1 if file.name == "modeling_gradiend.py" else 0)


# ---- docstrings --------------------------------------------------------------


def undocumented(tree: ast.Module) -> list[str]:
    """Names of the module's public functions, classes and methods without a docstring."""
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        missing += _undocumented_definition(node, "")
    return missing


def _undocumented_definition(node: ast.stmt, prefix: str) -> list[str]:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if not isinstance(node, definitions) or node.name.startswith("_"):
        return []
    missing = [] if ast.get_docstring(node) else [f"{prefix}{node.name}"]
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            missing += _undocumented_definition(child, f"{node.name}.")
    return missing


@EACH_FILE
def test_everything_public_has_a_docstring(file):
    assert undocumented(ast.parse(file.read_text(encoding="utf-8"))) == []


def test_a_planted_missing_docstring_is_found():
    source = '"""Module."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...'

    assert undocumented(ast.parse(source)) == ["A.f"]
    assert undocumented(ast.parse("def f(): ...")) == ["the module", "f"]


def undocumented_fields(cls: type, base: type) -> tuple[set[str], set[str]]:
    """Fields that a dataclass adds undocumented, and documented ones that it does not have."""
    added = {item.name for item in dataclasses.fields(cls)}
    added -= {item.name for item in dataclasses.fields(base)}
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2]
    documented = set(re.findall(r"^    (\w+): ", section, flags=re.MULTILINE))
    return added - documented, documented - added


def test_every_training_argument_that_is_added_is_documented_and_no_other():
    assert undocumented_fields(GradiendTrainingArguments, TrainingArguments) == (set(), set())


def test_a_planted_undocumented_argument_is_found():
    @dataclasses.dataclass
    class Planted(TrainingArguments):
        """Arguments.

        Args:
            known: Documented.
            gone: Documented, but no field.
        """

        known: int = 1
        forgotten: int = 2

    assert undocumented_fields(Planted, TrainingArguments) == ({"forgotten"}, {"gone"})


# ---- public names ------------------------------------------------------------


def public_imports(source: str) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_gradiend")
        for alias in node.names
        if not (alias.asname or "").startswith("_")
    }


def test_all_is_sorted_and_complete():
    source = Path(hf_gradiend.__file__).read_text(encoding="utf-8")

    assert hf_gradiend.__all__ == sorted(set(hf_gradiend.__all__))
    assert set(hf_gradiend.__all__) == public_imports(source)
    assert all(hasattr(hf_gradiend, name) for name in hf_gradiend.__all__)
    assert len(hf_gradiend.__all__) >= 10  # the control: imports were found


# ---- speaking ----------------------------------------------------------------


def speaking(tree: ast.AST) -> list[int]:
    """Lines that print, write to a standard stream, or set up logging."""
    lines: list[int] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "logging.basicConfig") or called.endswith(
                ("stdout.write", "stderr.write", ".setLevel", ".addHandler")
            ):
                lines.append(node.lineno)
    return sorted(lines)


@EACH_FILE
def test_only_the_command_line_prints(file):
    if module_of(file).split(".")[0] == "cli":
        return

    assert speaking(ast.parse(file.read_text(encoding="utf-8"))) == []


def test_planted_prints_are_found():
    source = "def f():\n    print(1)\n    sys.stderr.write('x')\nlogging.getLogger().setLevel(10)"

    assert speaking(ast.parse(source)) == [2, 3, 4]
