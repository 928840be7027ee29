"""Dependencies point one way, light packages stay light, and nothing from outside is ever unpickled or evaluated."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("side_tuning", "edge_agent", "coordinator", "dashboards")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Which of our own packages each may import besides itself.
ALLOWED = {
    "side_tuning": (),
    "edge_agent": ("side_tuning",),
    "coordinator": ("side_tuning",),
    # One file configures all server programs; states and timelines are pure arithmetic; an operator's new tap plan is made as the CLI makes it.
    "dashboards": ("coordinator.store", "coordinator.settings", "coordinator.arrivals", "coordinator.planning", "coordinator.timeline", "side_tuning"),
}
# The wire is pure: bytes in, objects out.
WIRE_MAY_IMPORT = {"numpy", "msgpack", "lz4", "side_tuning"}
HEAVY = {"torch", "transformers", "sqlalchemy", "alembic", "fastapi", "flask", "starlette", "aiohttp", "amqtt"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, functions' own imports included, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from coordinator import store` imports coordinator.store
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_dependencies_point_one_way():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in SOURCES
        for name, line in imports(path)
        if name.split(".")[0] in PACKAGES
        and not within(name, (home := path.relative_to(ROOT).parts[0]))
        and not any(within(name, allowed) for allowed in ALLOWED[home])
    ]
    assert not wrong


def test_only_one_module_imports_paho():
    assert {module_name(path) for path in SOURCES for name, _ in imports(path) if within(name, "paho")} <= {
        "side_tuning.broker_connection"
    }


def test_the_wire_imports_numpy_msgpack_and_lz4_only():
    wrong = [
        f"{path.name}:{line} imports {name}"
        for path in SOURCES
        if within(module_name(path), "side_tuning.wire")
        for name, line in imports(path)
        if (top := name.split(".")[0]) not in WIRE_MAY_IMPORT | set(sys.stdlib_module_names)
        or (top == "side_tuning" and not within(name, "side_tuning.wire"))
        or top in ("socket", "asyncio", "pathlib")
    ]
    assert not wrong


def test_topic_strings_exist_in_one_module_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if module_name(path) != "side_tuning.wire.topics"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("mobillm/v1")
    ]
    assert not wrong


def test_nothing_is_unpickled_or_evaluated():
    wrong = []
    for path in (*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for name, line in imports(path)
            if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib")
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {called}")
            if called.endswith(".load") and any(
                keyword.arg == "allow_pickle" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                for keyword in node.keywords
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} allows pickles")
    assert not wrong


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def modules_in(package: str) -> list[str]:
    return [module_name(path) for path in SOURCES if within(module_name(path), package)]


def test_the_wire_loads_no_torch_and_no_sockets():
    loaded = loaded_by("import " + ", ".join(modules_in("side_tuning.wire")))
    assert not loaded & (HEAVY | {"paho", "pydantic"})


def test_importing_the_agent_loads_no_torch_and_no_server_library():
    """Every module of it: torch is loaded when a backbone is, not when the command line starts."""
    assert not loaded_by("import " + ", ".join(modules_in("edge_agent"))) & HEAVY


def test_the_gateway_needs_no_torch():
    """A torch crash cannot drop the broker session if the process never loads it."""
    assert "torch" not in loaded_by("import coordinator.gateway")


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_root_loads_next_to_nothing(package):
    assert not loaded_by(f"import {package}") & (HEAVY | {"numpy", "paho", "pydantic", "rich", "typer"})


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_says_what_it_is_for(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{path.name} starts with no docstring"
