"""Wrong programs made from right ones, and the verdict of plain Python on a program and its tests.

Only for reference solutions and what is made of them here: `plain_verdict` protects nothing.
"""

import ast
import copy
import os
import subprocess
import sys

_ORDER = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}
_EQUAL = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}
_OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv}


def _compare(node):
    swaps = _ORDER | _EQUAL
    if isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
        node.ops[0] = swaps[type(node.ops[0])]()
        return True
    return False


def _operator(node):
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        node.op = _OPERATORS[type(node.op)]()
        return True
    return False


def _constant(node):
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return True
    return False


def _return(node):
    if isinstance(node, ast.Return) and node.value is not None:
        node.value = ast.Constant(None)
        return True
    return False


def _condition(node):
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return True
    return False


KINDS = {
    "comparison": _compare,
    "operator": _operator,
    "constant": _constant,
    "return None": _return,
    "condition": _condition,
}


def mutants(source, name=None):
    """Yields (kind, source): one a kind at most, changed at its first place in a function."""
    tree = ast.parse(source)
    for kind, change in KINDS.items():
        copied = copy.deepcopy(tree)
        roots = [
            node
            for node in copied.body
            if isinstance(node, ast.FunctionDef) and name in (None, node.name)
        ]
        if any(change(node) for root in roots for node in ast.walk(root)):
            yield kind, ast.unparse(copied)


def plain_verdict(program, seconds):
    """Whether a program with its tests runs to its end in plain Python: the official verdict."""
    limits = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
    call = "exec(compile(__import__('sys').stdin.buffer.read(), 'program', 'exec'), {})"
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-c", limits + call],
            input=program.encode(),
            capture_output=True,
            timeout=seconds,
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
