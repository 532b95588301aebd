"""Small mistakes, made on purpose: every one-step change of a function, for tests that must see it."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """A changed function: its name, the changed statement (for people), and its source tree."""

    function: str
    change: str
    tree: ast.FunctionDef


_OTHER_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
    ast.Eq: (ast.NotEq,),
    ast.Lt: (ast.LtE, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
}
_OTHER_SIGN = {"int8": "uint8", "uint8": "int8", "uint16": "int16", "int32": "uint32", "uint32": "int32"}


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """The top-level functions of a module."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def reachable(name: str, among: dict[str, ast.FunctionDef]) -> set[str]:
    """The function itself and all that it calls, directly or not."""
    seen, queue = set(), [name]
    while queue:
        if (current := queue.pop()) not in seen:
            seen.add(current)
            names = {node.id for node in ast.walk(among[current]) if isinstance(node, ast.Name)}
            queue += names & among.keys()
    return seen


def mutants(function: ast.FunctionDef) -> Iterator[Mutant]:
    """Every function that differs from this one in a single step.

    A constant one more, one less, doubled or halved; another operator, comparison or sign; two neighbours
    of a tuple, of a list or of a call's arguments exchanged; a signed type for an unsigned one; a local
    variable in place of another, save in `len(x)`: all our arrays have the same first axis. Assertions
    are left alone: they are among the checks.
    """
    variables = _variables(function)
    for at, statement in enumerate(function.body):
        if isinstance(statement, ast.Assert) or _is_docstring(statement):
            continue
        original = ast.unparse(statement)
        for index, node in enumerate(_nodes(statement)):
            for step in range(len(_steps(node, variables))):
                tree = copy.deepcopy(function)
                _steps(_nodes(tree.body[at])[index], variables)[step]()
                if (change := ast.unparse(tree.body[at])) != original:
                    yield Mutant(function.name, change, ast.fix_missing_locations(tree))


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _nodes(statement: ast.stmt) -> list[ast.AST]:
    """All nodes of a statement but the arguments of `len`."""
    found: list[ast.AST] = []
    queue: list[ast.AST] = [statement]
    while queue:
        found.append(queue.pop())
        if not (isinstance(found[-1], ast.Call) and ast.unparse(found[-1].func) == "len"):
            queue += ast.iter_child_nodes(found[-1])
    return found


def _variables(function: ast.FunctionDef) -> list[str]:
    """The parameters and what is assigned, in order."""
    arguments = [a.arg for a in function.args.args]
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return list(dict.fromkeys(arguments + stored))


def _steps(node: ast.AST, variables: list[str]) -> list:
    """The changes that can be made to this node, each a function that makes it in place."""

    def put(field: str, value):
        return lambda: setattr(node, field, value)

    def exchange(items: list, i: int):
        return lambda: items.__setitem__(slice(i, i + 2), [items[i + 1], items[i]])

    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            others = {value + 1, value - 1, value * 2, value // 2 if isinstance(value, int) else value / 2}
            return [put("value", other) for other in sorted(others - {value})]
        case ast.BinOp(op=op):
            return [put("op", other()) for other in _OTHER_OPERATORS.get(type(op), ())]
        case ast.UnaryOp(op=ast.USub()):
            return [put("op", ast.UAdd())]
        case ast.Compare(ops=[op]):
            return [put("ops", [other()]) for other in _OTHER_OPERATORS.get(type(op), ())]
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Call(args=items):
            return [exchange(items, i) for i in range(len(items) - 1)]
        case ast.Attribute(attr=attr) if attr in _OTHER_SIGN:
            return [put("attr", _OTHER_SIGN[attr])]
        case ast.Name(id=name, ctx=ast.Load()) if name in variables:
            return [put("id", other) for other in variables if other != name]
    return []
