"""Who may import whom, held against the imports of the package as it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quotalimit

PACKAGE = Path(quotalimit.__file__).parent


def name_of(path: Path) -> str:
    """A module's name inside the package, such as `stores.memory`; that of a package is its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """What a module imports, at the top or inside functions; and whether only type checkers see it."""

    def walk(node: ast.AST, typing_only: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", typing_only
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, typing_only)

    return walk(tree, False)


def own_module(imported: str) -> str | None:
    """The module of ours that an import names, or None."""
    parts = imported.split(".")
    if parts[0] != "quotalimit":
        return None
    while ".".join(parts[1:]) not in MODULES:
        parts.pop()
    return ".".join(parts[1:])


TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
IMPORTS = {module: list(imports_of(tree)) for module, tree in TREES.items()}
OWN = {
    module: {own for name, typing_only in names if not typing_only and (own := own_module(name)) is not None}
    for module, names in IMPORTS.items()
}
"""The modules of ours that each module imports at run time."""

FOREIGN = {
    module: {name for name, typing_only in names if not typing_only and own_module(name) is None}
    for module, names in IMPORTS.items()
}

BASICS = {"rate", "decision", "errors", "clock", "keys"}
SHARED = {"stores.charges", "stores.outage", "stores.settlements", "stores.shared", "stores.writer"}
"""What stores that wait for I/O have in common."""

MEMORY = {"stores.memory_counts", "stores.memory_gates", "stores.sharded_dict", "stores.stripes"}
"""What a memory store is made of."""

STORES = {"stores.base", "stores.several", "stores.names", "stores.memory", "stores.default", "stores"}

READERS = {"amounts", "fields", "providers", "usage"}
"""What reads usage out of what a model's call returned."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "clock": set(),
    "amounts": set(),
    "settlement": set(),
    "decision": {"errors", "rate"},
    "keys": {"errors"},
    "rate": {"errors"},
    "usage": {"amounts"},
    "fields": set(),
    "providers": {"amounts", "fields", "usage"},
    "recording": {*READERS, "keys"},
    "estimation": READERS,
    "failures": {*READERS, "errors"},
    "algorithms.base": {"errors", "rate"},
    "algorithms.sliding_window": {"algorithms.base", "errors", "rate"},
    "algorithms.calendar_window": {"algorithms.base", "errors", "rate"},
    "algorithms.token_bucket": {"algorithms.base", "errors", "rate"},
    "algorithms": {
        "algorithms.base",
        "algorithms.sliding_window",
        "algorithms.calendar_window",
        "algorithms.token_bucket",
    },
    "events": {"decision", "errors", "keys"},
    "_fakes": set(),
    "_forks": set(),
    "_waiting": {"_forks", "clock"},
    "stores.names": {*BASICS, "_forks", "algorithms.base"},
    "stores.base": {*BASICS, "_waiting", "algorithms.base", "stores.names"},
    "stores.charges": {*BASICS, "stores.base", "algorithms.base"},
    "stores.stripes": {*BASICS, "stores.base"},
    "stores.sharded_dict": set(),
    "stores.memory_counts": {
        *BASICS,
        "_forks",
        "stores.base",
        "stores.charges",
        "stores.sharded_dict",
        "stores.stripes",
        "algorithms.base",
    },
    "stores.memory_gates": {*BASICS, "stores.base", "stores.memory_counts", "stores.stripes", "algorithms.base"},
    "stores.memory": {*BASICS, "_forks", *MEMORY, "stores.base", "stores.charges", "stores.names", "algorithms.base"},
    "stores.settlements": {*BASICS, "stores.base", "stores.charges", "algorithms.base"},
    "stores.outage": {*BASICS, "events"},
    "stores.writer": {"_waiting"},
    "stores.shared": {*BASICS, *SHARED, "stores.base", "stores.names", "algorithms.base"},
    "stores.database": {*BASICS},
    "stores.journal": {"algorithms.base"},
    "stores.rows": {*BASICS, "stores.journal", "stores.shared", "algorithms.base"},
    "stores.sqlite": {*BASICS, *SHARED, "stores.base", "stores.database", "stores.journal", "stores.rows"},
    "stores.scripts": {*BASICS, "algorithms.base"},
    "stores.links": {*BASICS, "stores.scripts"},
    "stores.redis": {*BASICS, *SHARED, "stores.base", "stores.links", "stores.scripts", "algorithms.base"},
    "stores.default": {*BASICS, "_forks", "stores.base", "stores.memory", "stores.redis", "stores.sqlite"},
    "stores.several": {*BASICS, "stores.base"},
    "stores": {"stores.base", "stores.default", "stores.memory"},
    "limiters": {*BASICS, "_forks", *STORES, "_waiting", "algorithms", "amounts", "events", "holds"},
    "_arguments": {"errors"},
    "_layers": {*BASICS, *STORES, *READERS, "_arguments", "failures", "limiters"},
    "_calls": {*BASICS, *STORES, *READERS, "_layers", "estimation", "events", "failures", "recording", "settlement"},
    "_fast_path": {"_calls", "_layers", "events", "keys", "limiters", "recording", "settlement", "stores.base"},
    "_guard": {
        *BASICS,
        *STORES,
        "_arguments",
        "_calls",
        "_fast_path",
        "_layers",
        "_waiting",
        "events",
        "limiters",
        "recording",
    },
    "_trial": {"_calls", "_fast_path", "_guard", "_layers", "errors"},
    "_generators": {"_guard", "_calls", "recording"},
    "_bodies": {"_calls", "_generators"},
    "_kinds": {"_bodies", "fields"},
    "_streams": {"_bodies", "_calls", "_delivery", "_generators", "_kinds", "fields", "providers", "recording"},
    "_delivery": {"_bodies", "_calls", "_generators", "_kinds", "_streams"},
    "_wrapping": {
        "_arguments",
        "_guard",
        "_calls",
        "_layers",
        "_generators",
        "_delivery",
        "_trial",
        "limiters",
        "events",
        "recording",
    },
    "holds": {*BASICS, *READERS, "_calls", "_guard", "_layers", "failures", "recording", "settlement"},
}
"""What each module may import of ours; `decorators`, `__init__` and `__main__` may import anything."""

KNOW_ALL = {"decorators", "", "__main__", "testing"}


def test_every_module_has_a_rule() -> None:
    ruled = {*MAY_IMPORT, *KNOW_ALL}
    assert {module for module in MODULES if module.split(".")[0] != "integrations"} <= ruled


@pytest.mark.parametrize("module", [module for module in MODULES if module in MAY_IMPORT])
def test_a_module_imports_only_what_the_design_lets_it(module: str) -> None:
    assert OWN[module] - {""} <= MAY_IMPORT[module]
    assert "" not in OWN[module], "nobody imports the package itself, whose __init__ imports everybody"


def test_integrations_know_errors_and_decisions() -> None:
    """And two small helpers; FastAPI's asks `limiters_of` which routes to document."""
    known = {"errors", "decision", "clock", "keys"}
    for module in MODULES:
        if module.startswith("integrations"):
            more = {"decorators"} if module == "integrations.fastapi" else set[str]()
            assert {own for own in OWN[module] if not own.startswith("integrations")} <= known | more


def test_errors_decision_rate_keys_and_clock_import_each_other_downward_only() -> None:
    assert all(OWN[module] <= BASICS for module in BASICS)
    order: list[str] = []
    while len(order) < len(BASICS):
        ready = [module for module in BASICS if module not in order and OWN[module] <= set(order)]
        assert ready, "a circle of imports"
        order += ready


def test_no_imports_at_the_top_of_modules_go_in_circles() -> None:
    """What is imported inside a function may close a circle; what is imported at the top may not."""
    top = {
        module: {
            own
            for node in tree.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name, _ in imports_of(node)
            if (own := own_module(name)) is not None
        }
        for module, tree in TREES.items()
    }
    done: set[str] = set()
    while len(done) < len(top):
        ready = {module for module in top if module not in done and top[module] <= done}
        assert ready, f"a circle among {sorted(top.keys() - done)}"
        done |= ready


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("algorithms")])
def test_algorithms_know_no_store_and_no_clock(module: str) -> None:
    assert not [own for own in OWN[module] if own == "clock" or own.split(".")[0] in ("stores", "limiters", "_waiting")]
    assert not FOREIGN[module] & {"time", "asyncio", "threading"}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("stores")])
def test_stores_know_algorithms_by_their_base_only(module: str) -> None:
    assert {own for own in OWN[module] if own.startswith("algorithms")} <= {"algorithms.base"}


def test_amounts_imports_nothing_of_ours() -> None:
    assert OWN["amounts"] == set()


def test_only_wrapping_imports_wrapt() -> None:
    assert [module for module, names in FOREIGN.items() if any(n.split(".")[0] == "wrapt" for n in names)] == [
        "_wrapping"
    ]


FRAMEWORKS = ["django", "fastapi", "flask"]


@pytest.mark.parametrize("module", MODULES)
def test_at_run_time_nothing_is_imported_but_the_standard_library_and_wrapt(module: str) -> None:
    """Integrations import their framework, stores their driver, only when used."""
    drivers = ("stores.sqlite", "stores.redis", "stores.links", "testing")
    if module.removeprefix("integrations.") in FRAMEWORKS or module in drivers:
        return
    allowed = sys.stdlib_module_names | {"wrapt"}
    assert {name for name in FOREIGN[module] if name.split(".")[0] not in allowed} == set()


# Rule 18: only clock.py reads the time

CLOCKS = {
    "time",
    "time_ns",
    "monotonic",
    "monotonic_ns",
    "perf_counter",
    "perf_counter_ns",
    "process_time",
    "localtime",
    "gmtime",
    "now",
    "utcnow",
    "today",
}
OWNERS = {"time", "datetime", "date", "loop", "_loop"}


def readings_of_the_time(tree: ast.AST) -> list[str]:
    """Where a module reads the time, by the names of what it asks."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in CLOCKS:
            owner = ast.unparse(node.value)
            if owner.split(".")[-1].split("(")[0] in OWNERS or owner.endswith("get_running_loop()"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_rule_18_only_the_clock_reads_the_time(module: str) -> None:
    expected = ["time.monotonic", "time.time"] if module == "clock" else []
    assert sorted(readings_of_the_time(TREES[module])) == expected
    assert ("time" in FOREIGN[module]) == (module == "clock")


@pytest.mark.parametrize(
    "source",
    ["time.monotonic()", "datetime.now(UTC)", "datetime.datetime.utcnow()", "date.today()", "from time import time"],
)
def test_rule_18_the_scan_sees_a_reading_of_the_time(source: str) -> None:
    assert readings_of_the_time(ast.parse(source))


def test_rule_18_the_clock_is_looked_up_late_through_its_module() -> None:
    """`from quotalimit.clock import now` would keep what a test has replaced."""
    assert not [
        (module, name) for module, names in IMPORTS.items() for name, _ in names if name == "quotalimit.clock.now"
    ]


# What an import loads

HEAVY = {
    "aiohttp",
    "anthropic",
    "asyncio",
    "concurrent",
    "ctypes",
    "django",
    "fastapi",
    "flask",
    "google",
    "http",
    "httpx",
    "litellm",
    "multiprocessing",
    "openai",
    "pydantic",
    "redis",
    "requests",
    "socket",
    "sqlite3",
    "ssl",
    "starlette",
    "tzdata",
    "valkey",
    "zoneinfo",
}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return {module.split(".")[0] for module in run.stdout.split()}


@pytest.mark.parametrize("module", FRAMEWORKS)
def test_an_integration_loads_its_own_framework_only(module: str) -> None:
    loaded = loaded_by(f"import quotalimit.integrations.{module}") & {*FRAMEWORKS, "starlette"}
    assert loaded == {"starlette" if module == "fastapi" else module}  # FastAPI itself is not needed


def test_what_is_framework_neutral_loads_no_framework() -> None:
    loaded = loaded_by("import quotalimit.integrations.http, quotalimit.integrations.client_address")
    assert not loaded & {*FRAMEWORKS, "starlette"}


def test_importing_quotalimit_loads_no_framework_no_sdk_and_no_driver() -> None:
    ours, wrapts = loaded_by("import quotalimit"), loaded_by("import wrapt")
    assert "quotalimit" in ours
    assert (ours - wrapts) & HEAVY == set()
    foreign = ours - wrapts - sys.stdlib_module_names - {"quotalimit"}
    assert {module for module in foreign if not module.startswith("_")} == set()


def test_stores_that_need_more_are_imported_when_they_are_asked_for() -> None:
    code = """
import sys, quotalimit
assert not {"sqlite3", "redis"} & set(sys.modules)
assert quotalimit.SQLiteStore.__name__ == "SQLiteStore" and "redis" not in sys.modules
assert quotalimit.RedisStore.__name__ == "RedisStore"
try:
    quotalimit.NoStore
except AttributeError as error:
    assert "NoStore" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
