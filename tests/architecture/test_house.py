"""Imports run one way, the program is local in one place, and files stay short."""

import ast
import re
import subprocess

import pytest

from tests.conftest import ROOT

PACKAGES = ("dsv3_jax", "pallas_kernels", "experiments", "tools")
FLOORS = [
    {"pallas_kernels"},
    {"dsv3_jax.config", "dsv3_jax.mesh", "dsv3_jax.module"},
    {"dsv3_jax.ops"},
    {"dsv3_jax.model", "dsv3_jax.interop", "dsv3_jax.data"},
    {"dsv3_jax.pipeline"},
    {"dsv3_jax.training", "dsv3_jax.inference"},
    {"experiments", "tools"},
]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module):
    for level, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return level
    return None


def room_of(module):
    return ".".join(module.split(".")[: 2 if module.startswith("dsv3_jax") else 1])


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module in ("dsv3_jax", *PACKAGES):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_down(path):
    module = name_of(path)
    for used in imports(path):
        if floor_of(used) is None or floor_of(module) is None or room_of(used) == room_of(module):
            continue
        # mesh keeps the names that moved between versions of JAX beside those of the kernels.
        assert floor_of(used) < floor_of(module) or {room_of(used), room_of(module)} <= {
            "dsv3_jax.config", "dsv3_jax.mesh", "dsv3_jax.module", "experiments", "tools"
        }, f"{module} imports {used}"  # fmt: skip
        if used.startswith("pallas_kernels"):
            assert room_of(module) in ("dsv3_jax.ops", "dsv3_jax.mesh", "tools"), module


def test_sizes_can_be_looked_at_without_jax():
    assert set(imports(ROOT / "dsv3_jax/config.py")) <= {"math", "dataclasses"}


def test_the_program_becomes_local_in_one_place():
    library = [p for p in FILES if p.is_relative_to(ROOT / "dsv3_jax")]
    calls = [p.name for p in library for _ in re.findall(r"shard_map\(", p.read_text())]
    assert calls == ["execute.py"]
    assert not [p for p in library if "check_vma" in p.read_text()]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short_and_take_no_flags(path):
    text = path.read_text()
    kernel = path.name in ("gpu.py", "tpu.py")
    assert len(text.splitlines()) <= (400 if kernel else 320)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            arguments = [*node.args.args, *node.args.kwonlyargs]
            flags = [
                a.arg for a in arguments if isinstance(a.annotation, ast.Name) and a.annotation.id == "bool"
            ]
            assert not flags, f"{node.name}({flags})"


def test_no_tracked_file_names_a_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wrong = re.compile(
        "|".join(("/wor[k]/", r"/roo[t]/\.", "pythonhoste[d]", r"pypi\.or[g]", r"registry\.npmj[s]"))
    )
    for name in listed.split("\n"):
        if name.endswith((".py", ".md", ".toml", ".txt")) and (ROOT / name).exists():
            assert not wrong.search((ROOT / name).read_text()), name
