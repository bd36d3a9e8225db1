"""Finding the user's App: `module`, `module:attribute`, `path/to/file.py`, `path/to/file.py:attribute`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType

from unlost import config
from unlost.app import App
from unlost.delivery.service import Service
from unlost.errors import UnlostError, UsageError
from unlost.events import NamingWarning

_OURS = str(Path(__file__).resolve().parent.parent)
_NEAR_MAX = 8


class Loaded:
    """The App, the module that has it, and what was warned of while it was imported."""

    def __init__(self, app: App, module: ModuleType, notes: list[str]) -> None:
        self.app = app
        self.module = module
        self.notes = notes


def load(spec: str | None = None, *, broker: str | None = None) -> Loaded:
    """Imports the App that `spec`, `UNLOST_APP` or pyproject.toml names; `broker` overrides its broker.

    Runs the user's module. The current folder can be imported from, as with `python -m`.

    Raises:
        UsageError: nothing says where the App is; there is no such module, it fails, or it has no or several Apps.
    """
    found = config.setting("app", flag=spec)
    if not found.value:
        near = _apps_here()
        raise UsageError(
            "UL1310", "no App was named",
            found="none of: the command line, --app, UNLOST_APP, [tool.unlost] app in pyproject.toml",
            fix=f"unlost run {near[0]}; other commands: --app {near[0]}" if near else "unlost run hello, where hello.py makes the App",
        )  # fmt: skip
    source = "" if spec is not None else f" (from {found.source})"
    name, attribute = _split(found.value)
    with warnings.catch_warnings(record=True) as caught:
        module = _import(name, found.value + source)
    notes = []
    for w in caught:
        if issubclass(w.category, NamingWarning):
            notes.append(f"{_shown(w.filename)}:{w.lineno}: {w.message}")
        else:
            warnings.showwarning(w.message, w.category, w.filename, w.lineno, w.file, w.line)
    app = _attribute(module, attribute) if attribute else _only(module, found.value)
    if broker is not None:
        app.broker_url = broker  # a flag goes before what the code says
    return Loaded(app, module, notes)


def _split(spec: str) -> tuple[str, str]:
    name, _, attribute = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if not name or (":" in spec and not attribute) or "\0" in spec:
        raise UsageError(
            "UL1311", "an App is named module, module:attribute or path/to/file.py:attribute", found=repr(spec),
            fix="unlost run hello:app",
        )  # fmt: skip
    return name, attribute


def _import(name: str, said: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if name.endswith(".py") or "/" in name or "\\" in name:
        return _import_file(Path(name), said)
    if not all(part.isidentifier() for part in name.split(".")):
        raise _not_found(name, said)
    return _guarded(name, said, lambda: importlib.import_module(name))


def _import_file(path: Path, said: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        if path.is_dir() and (path / "__init__.py").is_file():
            path = path / "__init__.py"
        else:
            raise UsageError("UL1312", f"there is no file {said}", fix=_advice(path.stem, path.parent))
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    name = ".".join(parts)
    if parts[0] in sys.stdlib_module_names:
        raise UsageError(
            "UL1317", f"{path.name} has the name of one of Python's own modules", found=parts[0], fix="rename the file"
        )
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    if all(part.isidentifier() for part in parts):
        module = _guarded(name, said, lambda: importlib.import_module(name))
        origin = getattr(module, "__file__", None)
        if origin is None or not path.samefile(origin):
            raise UsageError(
                "UL1317", f"the name {name} belongs to another module", found=str(origin or "no file"),
                fix=f"rename {path.name}",
            )  # fmt: skip
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be found by the name of their module
    loader = spec.loader

    def run() -> ModuleType:
        loader.exec_module(module)
        return module

    return _guarded(name, said, run)


def _guarded(name: str, said: str, run: object) -> ModuleType:
    """Imports; what the user's code raises is shown with the user's own lines."""
    try:
        module = run()  # type: ignore[operator]
    except ModuleNotFoundError as e:
        if e.name is not None and (name == e.name or name.startswith(f"{e.name}.")) and not _frames(e):
            raise _not_found(name, said, e.name) from None
        raise _failed(said, e) from e
    except (Exception, SystemExit) as e:
        raise _failed(said, e) from e
    assert isinstance(module, ModuleType)
    return module


def _not_found(name: str, said: str, missing: str = "") -> UsageError:
    found = f"no module {missing!r}" if missing and missing != name else ""
    return UsageError("UL1312", f"there is no module {said}", found=found, fix=_advice(name, Path.cwd()))


def _advice(name: str, folder: Path) -> str:
    names = _modules_here(folder)
    near = difflib.get_close_matches(name.rpartition(".")[2], names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    apps = [n for n in _apps_here(folder) if n in names]
    if apps:
        return f"in {folder} an App is made by: {', '.join(apps[:_NEAR_MAX])}"
    return f"modules are looked for in {folder}: change to the project's folder, or give the path of the file"


def _modules_here(folder: Path) -> list[str]:
    try:
        files = sorted(folder.iterdir())
    except OSError:
        return []
    modules = [p.stem for p in files if p.suffix == ".py" and p.stem.isidentifier()]
    return modules + [p.name for p in files if p.name.isidentifier() and (p / "__init__.py").is_file()]


def _apps_here(folder: Path | None = None) -> list[str]:
    """Modules of this folder whose text makes an App."""
    found = []
    for path in sorted((folder or Path.cwd()).glob("*.py"))[:200]:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue  # only a hint is lost
        if path.stem.isidentifier() and "unlost" in text and "App(" in text:
            found.append(path.stem)
    return found


def _failed(said: str, e: BaseException) -> UsageError:
    """The real error, with the way to it through the user's own files."""
    what = f"{said} cannot be imported: it fails"
    if isinstance(e, SystemExit):
        return UsageError(
            "UL1313", what, found="\n".join([f"it ends the program: SystemExit({e.code!r})", *_where(e)]),
            fix='keep what starts the program behind `if __name__ == "__main__":`',
        )  # fmt: skip
    if isinstance(e, UnlostError):
        text = f"{e.code}: {e.what}" + (f" (found: {e.found})" if e.found else "")
        return UsageError("UL1313", what, found="\n".join([text, *_where(e)]), fix=e.fix or "correct that line")
    if isinstance(e, SyntaxError):
        lines = [f"{type(e).__name__}: {e.msg}", f"    {_shown(e.filename or '?')}, line {e.lineno}"]
        if e.text:
            lines.append(f"      {e.text.strip()}")
        return UsageError("UL1313", what, found="\n".join(lines), fix="correct that line")
    said_by_it = "".join(traceback.format_exception_only(e)).strip()
    fix = "correct that line"
    if isinstance(e, ModuleNotFoundError) and e.name:
        fix = f"is {e.name.partition('.')[0]} installed in this environment ({sys.prefix})?"
    return UsageError("UL1313", what, found="\n".join([said_by_it, *_where(e)]), fix=fix)


def _where(e: BaseException) -> list[str]:
    lines = []
    for frame in _frames(e)[-6:]:
        lines.append(f"    {_shown(frame.filename)}, line {frame.lineno}, in {frame.name}")
        if frame.line:
            lines.append(f"      {frame.line}")
    return lines


def _frames(e: BaseException) -> list[traceback.FrameSummary]:
    """The frames of the user's files; without any, those of other libraries."""
    frames = [
        f
        for f in traceback.extract_tb(e.__traceback__)
        if not f.filename.startswith(("<frozen", _OURS)) and "/importlib/" not in f.filename
    ]
    users = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(_STDLIB)]
    return users or frames


_STDLIB = str(Path(traceback.__file__).parent)


def _shown(filename: str) -> str:
    try:
        return str(Path(filename).relative_to(Path.cwd()))
    except ValueError:
        return filename


def _only(module: ModuleType, spec: str) -> App:
    apps: dict[int, tuple[str, App]] = {}
    for name, value in vars(module).items():
        if isinstance(value, App):
            apps.setdefault(id(value), (name, value))
    if len(apps) == 1:
        return next(iter(apps.values()))[1]
    where = f"{module.__name__} ({_shown(getattr(module, '__file__', None) or 'no file')})"
    if not apps:
        raise UsageError(
            "UL1314", f"{where} has no App", found=_instead(module),
            fix="write `app = App(your_service)` in it, or name another module",
        )  # fmt: skip
    names = [name for name, _ in apps.values()]
    raise UsageError(
        "UL1315", f"{where} has {len(apps)} Apps", found=", ".join(names), fix=f"say which: {spec}:{names[0]}"
    )


def _instead(module: ModuleType) -> str:
    services = [n for n, v in vars(module).items() if isinstance(v, Service)]
    return f"services without an App: {', '.join(services[:_NEAR_MAX])}" if services else ""


def _attribute(module: ModuleType, path: str) -> App:
    value: object = module
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            apps = [name for name, v in vars(module).items() if isinstance(v, App)]
            near = apps or difflib.get_close_matches(part, list(vars(module)), n=3)
            raise UsageError(
                "UL1316", f"{module.__name__} has no attribute {path!r}",
                fix=f"did you mean {' or '.join(f'{module.__name__}:{n}' for n in near)}?" if near else "",
            ) from None  # fmt: skip
    if not isinstance(value, App):
        fix = "name the attribute that holds an App"
        if callable(value) and not isinstance(value, type):
            fix = f"it is a function: write `app = {path}()` in the module and name that"
        raise UsageError(
            "UL1316", f"{module.__name__}:{path} is not an App", found=f"it is a {type(value).__name__}", fix=fix
        )
    return value
