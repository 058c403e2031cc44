# SPDX-License-Identifier: Apache-2.0
"""
Writes a pipeline as one file, in the form that `examples/community` of diffusers takes.

  Stable Diffusion 1.x and 2.x   python -m hub.bundle fineface.py
  Stable Diffusion XL            python -m hub.bundle fineface_xl.py --xl

The file is made from the pipeline's file and the modules that it imports, so nobody has to maintain it. Their imports
are merged, and their code follows in the order in which they need each other.
"""

import argparse
import ast
import re
import symtable
import sys
import textwrap
from pathlib import Path

from program import Parser, check_writable, run_program, write_atomically


SOURCE_DIR = Path(__file__).resolve().parents[1]
PIPELINE = "pipeline_fineface"
XL_PIPELINE = "pipeline_fineface_xl"
LINE_LENGTH = 119
IMPORTS = (ast.Import, ast.ImportFrom)

HEADER = """\
# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
\"\"\"
FineFace: text and facial Action Units (AUs) to faces, from "Towards Localized Fine-Grained Control for Facial
Expression Generation" (https://huggingface.co/papers/2407.20175).

This file is put together by `python -m hub.bundle` from the modules that the headings below name.
\"\"\"
"""


def leaf_modules(source_dir: Path = SOURCE_DIR, pipeline: str = PIPELINE) -> dict[str, list[str]]:
    """The modules that a pipeline's file imports, none of which needs a later one, with what it takes from each."""
    tree = ast.parse((source_dir / f"{pipeline}.py").read_text(encoding="utf-8"))
    nodes = [child for node in tree.body if _is_import_block(node) for child in node.body]
    return {node.module: [alias.name for alias in node.names] for node in nodes}


def bundle(source_dir: Path = SOURCE_DIR, pipeline: str = PIPELINE) -> str:
    """
    Make the text of the one file for the module `pipeline`.

    Raises:
        ValueError: if two modules give different things the same name.
    """
    imports, bodies, owners = [], [], {}
    for module in (*leaf_modules(source_dir, pipeline), pipeline):
        source = (source_dir / f"{module}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        imports += [node for node in tree.body if isinstance(node, IMPORTS)]
        body = _body(source, tree)
        for symbol in symtable.symtable(body, module, "exec").get_symbols():
            name = symbol.get_name()
            other = owners.setdefault(name, module) if symbol.is_assigned() else module
            if other != module:
                raise ValueError(f"{other}.py and {module}.py both define {name}. One file can hold only one of them.")
        bodies.append(_heading(module, ast.get_docstring(tree)) + "\n\n\n" + body)
    clashes = owners.keys() & {alias.asname or alias.name for node in imports for alias in node.names}
    if clashes:
        raise ValueError(f"{', '.join(sorted(clashes))}: one module imports what another one defines.")
    text = HEADER + "\n" + merge_imports(imports) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
    # In the example, diffusers finds the one file by its name.
    text = re.sub(r">>> from pipeline_fineface\w* import \w+", ">>> from diffusers import DiffusionPipeline", text)
    name = pipeline.removeprefix("pipeline_")
    opened = r">>> pipe = \w+\.from_pretrained\(base,"
    return re.sub(opened, f'>>> pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="{name}",', text)


def merge_imports(nodes: list[ast.Import | ast.ImportFrom]) -> str:
    """Write every import once, in isort's order: standard library first, `import x` before `from x import y`."""
    members: dict[tuple[str, str], set[str]] = {}
    for node in nodes:
        for alias in node.names:
            start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
            module = getattr(node, "module", alias.name)
            members.setdefault((start, module), set()).add(ast.unparse(alias))
    sections = [], []
    for start, module in sorted(members, key=lambda key: (key[0] != "import ", key[1].lower())):
        names = sorted(members[start, module], key=_member_order)
        line = start + ", ".join(names)
        if len(line) > LINE_LENGTH:
            line = f"{start}(\n" + "".join(f"    {name},\n" for name in names) + ")"
        sections[module.partition(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(section) for section in sections)


def _member_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    return kind, name.lower()


def _heading(module: str, docstring: str | None) -> str:
    """The module's name and docstring as a comment."""
    rule = "# " + "-" * (LINE_LENGTH - 3)
    lines = [rule, f"# {module}.py", rule]
    for line in (docstring or "").splitlines():
        wrapped = textwrap.wrap(line, LINE_LENGTH - 2, subsequent_indent=" " * (len(line) - len(line.lstrip())))
        lines += [f"# {part}" for part in wrapped] or ["#"]
    return "\n".join(lines)


def _body(source: str, tree: ast.Module) -> str:
    """The code of a module below its docstring and its imports. What it took from `sibling.name` is just `name`."""
    last = max(node.end_lineno for node in tree.body if _is_import_block(node) or isinstance(node, IMPORTS))
    body = "\n".join(source.splitlines()[last:]).strip("\n")
    siblings = [child for node in tree.body if _is_import_block(node) for child in node.body if child.module is None]
    names = "|".join(alias.name for node in siblings for alias in node.names)
    return re.sub(rf"\b(?:{names})\.(?=\w)", "", body) if names else body


def _is_import_block(node: ast.stmt) -> bool:
    """Whether `node` is `if "." in __name__:`, the block in which our files import each other."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "'.' in __name__"


def run(args: argparse.Namespace) -> str:
    pipeline = XL_PIPELINE if args.xl else PIPELINE
    output = args.output or Path(f"{pipeline.removeprefix('pipeline_')}.py")
    if output.suffix != ".py" or output.is_dir():
        raise ValueError(f"OUT is {str(output)!r}, but has to be a file with the ending .py.")
    if output.resolve().parent == SOURCE_DIR and output.stem in (*leaf_modules(), PIPELINE, XL_PIPELINE):
        raise ValueError(f"OUT is {str(output)!r}, which is one of the sources.")
    check_writable(output)
    write_atomically(output, bundle(pipeline=pipeline))
    return str(output)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("hub.bundle", __doc__)
    help_output = "(default: fineface.py, or fineface_xl.py)"
    parser.add_argument("output", metavar="OUT", nargs="?", type=Path, help=help_output)
    parser.add_argument("--xl", action="store_true", help="write the pipeline for Stable Diffusion XL")
    return run_program(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
