"""docs/architecture.md is true: its arrows are those of the imports, and what it names is there."""

import ast
import re
import subprocess
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MODULES = {
    path.removesuffix(".py").replace("/", "."): path
    for path in subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not path.startswith("tests/") and not path.endswith("__init__.py")
}


def read_drawing() -> tuple[dict[str, str], dict[str, set[str]]]:
    """The room of each file or folder of the drawing, and the rooms to which the arrows of a room lead."""
    drawing = re.search(r"```mermaid\n(.*?)```", PAGE, flags=re.DOTALL)[1]
    rooms, arrows = {}, {}
    for room, label in re.findall(r"(\w+)\[(.*?)\]", drawing):
        first, *others = label.split(", ")
        folder = first[: first.rfind("/") + 1]
        rooms |= {first: room} | {folder + name: room for name in others}
    for line in re.sub(r"\[.*?\]", "", drawing).splitlines()[1:]:
        chain = [part.split(" & ") for part in line.strip().split(" --> ")]
        for sources, targets in zip(chain, chain[1:], strict=False):
            for source in sources:
                arrows.setdefault(source, set()).update(targets)
    return rooms, arrows


def imports_of(path: str) -> set[str]:
    """Modules of this repository that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def test_rooms_import_only_what_the_arrows_lead_to():
    rooms, arrows = read_drawing()

    def room_of(module: str) -> str:
        path = MODULES[module]
        return rooms.get(path) or rooms[path[: path.index("/") + 1]]

    def reached(room: str) -> set[str]:
        # Arrows in a circle raise a RecursionError.
        return arrows.get(room, set()).union(*map(reached, arrows.get(room, set())))

    for module, path in MODULES.items():
        for imported in imports_of(path) - {"program"}:
            assert module != "program" and room_of(imported) in {room_of(module)} | reached(room_of(module)), (
                f"{path} imports {imported}, to which no arrow leads"
            )


def test_the_page_names_what_is_there():
    code = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in MODULES.values())
    for name in re.findall(r"`([\w./-]+)`", PAGE):
        is_path = "/" in name or name.endswith(".py")
        assert (ROOT / name).exists() if is_path else re.search(rf"\b{name.split('.')[-1].lstrip('-')}\b", code), name
