"""What the tree promises: import directions, the README's map, no shadowed packages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "lenvm_service": ROOT / "service" / "lenvm_service",
    "lenvm_runtime": ROOT / "lenvm_runtime",
    "lenvm_kernels": ROOT / "kernels" / "lenvm_kernels",
    "lenvm_training": ROOT / "training" / "lenvm_training",
}
ALLOWED = {
    "lenvm_service": {"lenvm_runtime.length_control"},
    "lenvm_runtime": {"lenvm_kernels"},
    "lenvm_kernels": set(),
    "lenvm_training": {"lenvm_kernels"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def test_import_directions() -> None:
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            for name in imports(path):
                root = name.split(".")[0]
                if root in PACKAGES and root != package:
                    allowed = ALLOWED[package]
                    assert root in allowed or name in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_gateway_imports_neither_torch_nor_sglang() -> None:
    files = [*PACKAGES["lenvm_service"].rglob("*.py"), PACKAGES["lenvm_runtime"] / "length_control.py"]
    for path in files:
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "sglang", "transformers"}, path


def test_private_names_of_sglang_stay_in_compat() -> None:
    """Hook targets, names with an underscore and the registry; classes to subclass are imported where that is done."""
    private = re.compile(r"""sglang[\w.]*\._|from sglang[\w. ]* import .*\b_|HookRegistry|["']sglang\.""")
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            if path.name != "compat.py":
                assert not private.search(path.read_text(encoding="utf-8")), path


def test_generic_folders_hold_no_package_themselves() -> None:
    for folder in ("service", "kernels", "training"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_readme_map_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("```tree\n")[1].split("```")[0]
    listed = [line.split()[0] for line in block.strip().splitlines()]
    for entry in listed:
        assert (ROOT / entry).exists(), entry
    for folder in (*PACKAGES.values(), ROOT / "benchmarks"):
        for path in folder.rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".h") and path.name != "__init__.py":
                name = str(path.relative_to(ROOT))
                assert name in listed, f"{name} is not in the README's map"
