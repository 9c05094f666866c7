"""Run-time type checks of the suite: beartype of every signature, jaxtyping where shapes are named.

jaxtyping's own import hook wraps every function so, at a third of the suite's time; only those with
shapes in their signatures need it.
"""

import ast
import functools
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import config, jaxtyped

# Of the decorator, in each module.
_NAME = "_checked_by_the_suite"
# An int where a float is asked for will do.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))


def checked(function: Any) -> Any:
    """A function whose arguments and result are checked; a class whose fields are."""
    if isinstance(function, type) or any(map(_names_shapes, function.__annotations__.values())):
        return jaxtyped(function, typechecker=check)
    strict = check(function)

    # Tests of what a user is told turn both off in one way.
    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if config.jaxtyping_disable else strict)(*args, **kwargs)

    return either


def _names_shapes(hint: Any) -> bool:
    # What is written as a string may be anything.
    if isinstance(hint, str) or getattr(hint, "__module__", "").startswith("jaxtyping"):
        return True
    parts = hint if isinstance(hint, list | tuple) else getattr(hint, "__args__", ())
    return any(map(_names_shapes, parts))


class _Decorate(ast.NodeTransformer):
    """Put a check under the other decorators of a function, and on top of those of a class."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.append(_decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, _decorator(node))
        return node


def _decorator(node: ast.stmt) -> ast.expr:
    name = ast.Name(_NAME, ast.Load())
    return ast.fix_missing_locations(ast.copy_location(name, node))


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compile what is decorated; never written to disk, nor read from there."""
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _NAME, checked)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """Check every signature of a package that is imported from now on."""
    sys.meta_path.insert(0, _Finder(package))
