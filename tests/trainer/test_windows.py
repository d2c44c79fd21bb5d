"""Windows, pretended: what the trainer imports, writes and renames is without what that system refuses. It was not run
there."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import pkgutil
import sys
import types

import srppo
from srppo import metrics

ABSENT = ("fcntl", "grp", "pwd", "resource", "termios")


def test_every_module_is_imported_without_what_windows_has_not(monkeypatch):
    names = [
        found.name for found in pkgutil.walk_packages(srppo.__path__, "srppo.") if "integrations" not in found.name
    ]
    specs = [importlib.util.find_spec(importlib.import_module(name).__name__) for name in names]
    imports = builtins.__import__

    def without(name, given=None, *rest, **options):
        if name in ABSENT and (given or {}).get("__name__", "").startswith("srppo"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imports(name, given, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for spec in specs:
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))  # once more, and apart from the one in use
    assert {"srppo.metrics", "srppo.checkpoint", "srppo.commands", "srppo.demo.run"} <= set(names)


def test_memory_is_measured_without_proc_and_resource(monkeypatch):
    process = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=3 * 2**29))
    monkeypatch.setattr(metrics.Path, "exists", lambda *_, **__: False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(Process=lambda: process))
    assert metrics.peak_memory_gib() == 1.5
