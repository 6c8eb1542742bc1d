"""Which code of the library stands behind a module or a text, read from the sources.

A cached run is kept only as long as its code is the same, and the book executes a chapter again
only when a module that it uses has changed; both ask here.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parent
_PACKAGE = __package__


def modules_of_source(source: str) -> set[str]:
    """The modules of this library that a text of Python code imports, lazy imports included.

    Notebook magics are skipped. Public names lead to the module that defines them:

    >>> sorted(modules_of_source("from feedforward import MoE, files"))
    ['feedforward.files', 'feedforward.layers', 'feedforward.layers.experts']

    A module's name that is only known at run time cannot be seen; import what you use.
    """
    code = re.sub(r"^(\s*)[%!?].*$", r"\1pass", source, flags=re.MULTILINE)
    return _modules_of(ast.parse(code), package=None)


def source_closure(*modules: str) -> set[str]:
    """The given modules of this library and all that they import from it, directly or not.

    Read from the sources without running them; imports inside functions count.

    Raises:
        ValueError: if a name is not a module of this library.
    """
    closure, waiting = set(), set()
    for module in modules:
        source_file(module)
        waiting |= _with_parents(module)
    while waiting:
        closure.add(module := waiting.pop())
        is_package = source_file(module).name == "__init__.py"
        package = module if is_package else module.rpartition(".")[0]
        waiting |= _modules_of(_parsed(_text(module)), package) - closure
    return closure


def source_file(module: str) -> Path:
    """The file of a module of this library.

    Raises:
        ValueError: if there is no such module.
    """
    name, *rest = module.split(".")
    base = _LIBRARY.joinpath(*rest)
    if name == _PACKAGE:
        for file in (base.with_name(f"{base.name}.py") if rest else base, base / "__init__.py"):
            if file.is_file():
                return file
    raise ValueError(f"{module!r} is not a module of {_PACKAGE}")


def fingerprint(*modules: str) -> str:
    """12 hexadecimal digits that change when code that these modules stand on changes.

    Docstrings, comments and layout do not count. The files are read as they are now: start a
    process anew after changing the library beneath it.
    """
    digest = hashlib.sha256()
    for module in sorted(source_closure(*modules)):
        digest.update(f"{module}\n{_code(_text(module))}\n".encode())
    return digest.hexdigest()[:12]


def without_docstrings(tree: ast.AST) -> ast.AST:
    """The same tree, changed in place: docstrings taken out of every body."""
    for node in _documented(tree):
        node.body = node.body[1:]
    return tree


def _is_module(name: str) -> bool:
    try:
        return bool(source_file(name))
    except ValueError:
        return False


def _text(module: str) -> str:
    return source_file(module).read_text(encoding="utf-8")


# kept by the text itself, so that a changed file is seen: a notebook asks for many runs
@lru_cache(maxsize=256)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


@lru_cache(maxsize=256)
def _code(text: str) -> str:
    return ast.dump(without_docstrings(ast.parse(text)))


def _with_parents(module: str) -> set[str]:
    """A module and the packages that importing it runs; the root only holds the table of names."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(2, len(parts) + 1)}


def _modules_of(tree: ast.AST, package: str | None) -> set[str]:
    """The library's modules that the code imports; relative imports start from `package`."""
    found, aliases = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] == _PACKAGE:
                    found |= _with_parents(name.name) if _is_module(name.name) else set()
                    if name.asname is None or name.name == _PACKAGE:
                        aliases.add(name.asname or _PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                if package is None:
                    continue
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *([node.module] if node.module else [])])
            if base.partition(".")[0] == _PACKAGE and _is_module(base):
                found |= _with_parents(base)
                for name in node.names:
                    found |= _home_of(base, name.name)
    for node in ast.walk(tree):  # names taken by attribute: feedforward.MoE
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
        ):
            found |= _home_of(_PACKAGE, node.attr)
    return found


def _home_of(package: str, name: str) -> set[str]:
    """The modules behind a name taken from a package: a submodule, or one of its lazy table."""
    if _is_module(f"{package}.{name}"):
        return _with_parents(f"{package}.{name}")
    table = _lazy_table(package)
    names = table if name == "*" else [name] if name in table else []
    return set().union(*(_with_parents(f"{package}.{table[n]}") for n in names))


def _lazy_table(package: str) -> dict[str, str]:
    for node in _parsed(_text(package)).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "_HOME" for target in node.targets
        ):
            return ast.literal_eval(node.value)
    return {}


def _documented(tree: ast.AST) -> Iterator[ast.AST]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (n for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n) is not None)
