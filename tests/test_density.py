"""How densely the code is written, counted over all files but tests, benchmarks and notebooks.

The limits are a little above the values of nanoGPT, segment-anything and timm.
"""

import ast
from dataclasses import dataclass

import pytest
from conftest import ROOT

LEFT_OUT = ("tests", "benchmarks", "notebooks")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONG = 12  # lines of a body after the docstring


@dataclass
class Density:
    statements: int = 0  # docstrings do not count
    tuple_assignments: int = 0  # `a, b = f(x), g(y)`; unpacking one value does not count
    comprehensions: int = 0  # generator expressions too
    walruses: int = 0
    long_functions: int = 0
    long_functions_with_steps: int = 0  # those with a blank line in the body


def is_docstring(node: ast.stmt) -> bool:
    value = getattr(node, "value", None)
    is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(node, ast.Expr) and is_text


def assigns_a_display(node: ast.AST) -> bool:
    """Return True for `a, b = x, y`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple | ast.List):
        return False
    return any(isinstance(target, ast.Tuple | ast.List) for target in node.targets)


def body_lines(function: ast.FunctionDef, lines: list[str]) -> list[str]:
    """Return the lines of a function behind its docstring."""
    first = 1 if is_docstring(function.body[0]) else 0
    if first == len(function.body):
        return []
    start = function.body[first].lineno
    return lines[start - 1 : function.end_lineno]


def measure(text: str) -> Density:
    density = Density()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not is_docstring(node):
            density.statements += 1
        if assigns_a_display(node):
            density.tuple_assignments += 1
        if isinstance(node, COMPREHENSIONS):
            density.comprehensions += 1
        if isinstance(node, ast.NamedExpr):
            density.walruses += 1
        if isinstance(node, ast.FunctionDef):
            body = body_lines(node, lines)
            if len(body) >= LONG:
                density.long_functions += 1
                density.long_functions_with_steps += any(not line.strip() for line in body)
    return density


def total() -> Density:
    whole = Density()
    for path in ROOT.rglob("*.py"):
        folder = path.relative_to(ROOT).parts[0]
        if folder in LEFT_OUT or folder.startswith("."):
            continue
        for name, count in vars(measure(path.read_text())).items():
            setattr(whole, name, getattr(whole, name) + count)
    return whole


def test_code_is_not_dense():
    density = total()
    assert density.tuple_assignments <= 0.007 * density.statements, density
    assert density.comprehensions <= 0.04 * density.statements, density
    assert density.walruses == 0, density
    assert density.long_functions_with_steps >= 0.8 * density.long_functions, density


STEPS = "def f():\n" + "    x = 1\n" * 6 + "{}" + "    x = 1\n" * 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a, b = f(x), g(y)", Density(statements=1, tuple_assignments=1)),
        ("(a, b), c = x", Density(statements=1)),
        ("a = [x for x in y]", Density(statements=1, comprehensions=1)),
        ("f(x for x in y)", Density(statements=1, comprehensions=1)),
        ("if (a := f()):\n    pass", Density(statements=2, walruses=1)),
        ('def f():\n    """Text."""\n    return 1', Density(statements=2)),
        (STEPS.format(""), Density(statements=13, long_functions=1)),
        (
            STEPS.format("\n"),
            Density(statements=13, long_functions=1, long_functions_with_steps=1),
        ),
    ],
)
def test_what_is_counted(text, expected):
    assert measure(text) == expected
