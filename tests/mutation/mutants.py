"""What is changed: all small changes of a module."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).parent.parent.parent

SWAPPED: dict[type[ast.AST], tuple[type[Any], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.RShift: (ast.LShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
"""What each operator is changed to."""

Step: TypeAlias = tuple[ast.AST, str, int | None]
"""Where a node is: in which field of which node, at which place if that is a list."""


class Mutant(NamedTuple):
    """One small change: where and what it is, and the module with it."""

    path: Path
    line: int
    lines: frozenset[int]
    """The lines of the statement that is changed; of one with a block, those of its head."""

    change: str
    tree: ast.Module
    inside: bool
    """Whether the change is in the body of a function, and so need not be there when the module is imported."""

    key: str
    """What it is known by, wherever its line moves: the text of the line, and the change."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.change}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a module. Text, annotations and what only type checkers see are left alone."""
    text = path.read_text()
    source = text.splitlines()
    tree = ast.parse(text)
    for number, node in enumerate(ast.walk(tree)):
        for place in range(len(_changes(node))):
            mutated = copy.deepcopy(tree)
            twin = next(each for count, each in enumerate(ast.walk(mutated)) if count == number)
            steps = _way_to(mutated, twin)
            lines = _lines(twin, steps)
            before = _shown(twin)
            changed = _changes(twin)[place]
            parent, field, index = steps[-1]
            if index is None:
                setattr(parent, field, changed)
            else:
                getattr(parent, field)[index] = changed
            ast.fix_missing_locations(ast.copy_location(changed, twin))
            line = getattr(node, "lineno", min(lines, default=0))
            change = f"{before} -> {_shown(changed)}"
            key = f"{source[line - 1].strip()} | {change}"
            yield Mutant(path, line, lines, change, mutated, _inside(steps), key)


def _shown(node: ast.AST) -> str:
    """A node on one line: of a block, its head."""
    return ast.unparse(node).partition("\n")[0]


def _way_to(tree: ast.AST, node: ast.AST) -> list[Step]:
    """The steps from the whole tree to one of its nodes."""
    parents: dict[int, Step] = {}
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                parents[id(child)] = (parent, field, index)
    steps: list[Step] = []
    while node is not tree:
        steps.insert(0, parents[id(node)])
        node = steps[0][0]
    return steps


def _inside(steps: list[Step]) -> bool:
    return any(
        isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and field == "body"
        for parent, field, _ in steps
    )


def _lines(node: ast.AST, steps: list[Step]) -> frozenset[int]:
    nodes = [node, *(parent for parent, _, _ in reversed(steps))]
    statement = next(each for each in nodes if isinstance(each, (ast.stmt, ast.Module)))
    if isinstance(statement, ast.Module):
        return frozenset()
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return frozenset(range(statement.lineno, max(last, statement.lineno) + 1))


def _changes(node: ast.AST) -> list[ast.AST]:
    """What a node may be changed to."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return [_with(node, ops=[swapped()]) for swapped in SWAPPED.get(type(node.ops[0]), ())]
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        return [_with(node, op=swapped()) for swapped in SWAPPED.get(type(node.op), ())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return [node.operand]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [ast.Constant(node.value + 1)]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        return [ast.Constant(not node.value)]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
        return [_with(node, test=ast.Constant(True)), _with(node, test=ast.Constant(False))]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("max", "min") and len(node.args) == 2:
        return list(node.args)
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__slots__", "__all__"):
        return []
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        return [ast.Pass()]
    return []


def _with(node: ast.AST, **changes: object) -> ast.AST:
    changed = copy.copy(node)
    for field, value in changes.items():
        setattr(changed, field, value)
    return changed
