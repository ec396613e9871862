"""Small faults in a module's code, by Cosmic Ray's operators, and where they are."""

from __future__ import annotations

import ast
import difflib
import random
from dataclasses import dataclass

ARITHMETIC, COMPARISON = ("Add", "Sub", "Mul", "Div", "Pow"), ("Eq", "NotEq", "Lt", "LtE", "Gt", "GtE")
PAIRS = [(a, b) for a in ARITHMETIC for b in ARITHMETIC if a != b]
PAIRS += [("FloorDiv", "Div"), ("FloorDiv", "Mul"), ("Mod", "Mul"), ("BitAnd", "BitOr"), ("BitOr", "BitAnd")]
ORDERS = [(a, b) for a in COMPARISON for b in COMPARISON if a != b] + [("Is", "IsNot"), ("IsNot", "Is")]
# without those that only exchange an operator for one that no tensor has, which any test would find
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{a}_{b}" for a, b in PAIRS),
    *(f"core/ReplaceComparisonOperator_{a}_{b}" for a, b in ORDERS),
    *(f"core/ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub", "Invert")),
    "core/AddNot",
    "core/ExceptionReplacer",
    "core/NumberReplacer",
    "core/RemoveDecorator",
    "core/ReplaceAndWithOr",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceOrWithAnd",
    "core/ReplaceTrueWithFalse",
    "core/ZeroIterationForLoop",
)


@dataclass(frozen=True)
class Mutant:
    """A fault: the line where it is, what it changes (`function: old line -> new line`), and the module's code with
    it."""

    line: int
    change: str
    code: str


def places(code: str) -> list[tuple[str, int, int]]:
    """Every fault of a module, as an operator, which of its occurrences, and a line; none in annotations."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    silent = [  # nothing evaluates them
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for parent in ast.walk(ast.parse(code))
        for node in (getattr(parent, "annotation", None), getattr(parent, "returns", None))
        if node is not None
    ]
    nodes, found = list(ast_nodes(get_ast(code))), []
    for name in OPERATORS:
        operator, occurrence = get_operator(name)(), 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not any(first <= start < last for first, last in silent):
                    found.append((name, occurrence, start[0]))
                occurrence += 1
    return found


def mutants(code: str, count: int, seed: int) -> tuple[list[Mutant], int]:
    """A random sample of a module's faults, no two of one text, and the number of all."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    found = places(code)
    order = random.Random(seed).sample(found, len(found))
    chosen: dict[str, Mutant] = {}
    for name, occurrence, line in order:
        if len(chosen) == count:
            break
        changed = mutate_code(code, get_operator(name)(), occurrence)
        chosen.setdefault(changed, Mutant(line, change(code, changed, line), changed))
    return list(chosen.values()), len(found)


def change(before: str, after: str, line: int) -> str:
    """What differs, after the name of the class and function that it is in."""
    lines = [*difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")][2:]
    gone, new = (" ".join(text[1:].strip() for text in lines if text[0] == mark) for mark in "-+")
    names = [node.name for node in scopes(before, line)]
    return f"{'.'.join(names) or 'module'}: {gone} -> {new}"


def scopes(code: str, line: int) -> list:
    """The classes and functions around a line, the outermost first."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    around = [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
    first = lambda node: min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return sorted((node for node in around if first(node) <= line <= node.end_lineno), key=first)


def in_function(code: str, line: int) -> bool:
    """Whether a line belongs to the body of a function, which nothing runs at import."""
    return any(isinstance(one, ast.FunctionDef) and one.body[0].lineno <= line for one in scopes(code, line))
