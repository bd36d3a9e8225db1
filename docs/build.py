"""Builds the documentation: `make docs`, or `python docs/build.py`, into build/site.

The pages are README, ARCHITECTURE, CHANGELOG, docs/ and the READMEs of examples/, where they stand; what reference.md and
errors.md say of the code is made from the code. A link or an anchor that leads nowhere fails the build.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import unlost
import unlost.testing
from unlost import errors

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "unlost"
HERE = "<!-- made from the code -->\n"  # where a page gets what is made


def main(folder: Path = ROOT / "build") -> int:
    """Lays the pages out in `folder`/pages and builds `folder`/site; not 0 if a link or an anchor leads nowhere."""
    stage(folder / "pages")
    return build(folder)


def build(folder: Path) -> int:
    site = folder / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(site)]
    # What becomes of the tool is nothing for those who build.
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "UNLOST_PAGES": str(folder / "pages")}
    code = subprocess.run(command, env=env, check=False).returncode
    if code == 0:
        print(f"{site / 'index.html'}: {len(list(site.rglob('*.html')))} pages")
    return code


def on_config(config: Any) -> Any:
    """mkdocs calls this: pages that mkdocs.yml does not name come at the end of the how-to pages."""
    named = re.findall(r"[\w/.-]+\.md", str(config["nav"]))
    (how_to,) = (part["How to"] for part in config["nav"] if "How to" in part)
    how_to += [str(path.relative_to(ROOT)) for path in pages() if str(path.relative_to(ROOT)) not in named]
    return config


def stage(folder: Path) -> None:
    """Lays the pages out as they stand in the repository, so that every link between them stays as it is written."""
    shutil.rmtree(folder, ignore_errors=True)
    made = {"reference.md": reference, "errors.md": error_pages}
    for path in pages():
        text = path.read_text()
        if path.name in made and path.parent.name == "docs":
            if HERE not in text:
                raise SystemExit(f"{path} has no line {HERE.strip()}")
            text = text.replace(HERE, made[path.name]())
        _put(folder, path, text.encode())
        for linked in _files_of(path, text):
            _put(folder, linked, linked.read_bytes())


def pages() -> list[Path]:
    top = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md")]
    found = [*top, *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"), *(ROOT / "bench").glob("*.md")]
    return sorted(path for path in found if not path.is_relative_to(ROOT / "build"))


def _put(folder: Path, path: Path, raw: bytes) -> None:
    to = folder / path.relative_to(ROOT)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(raw)


def _files_of(page: Path, text: str) -> Iterator[Path]:
    """Pictures and source files that a page links to; what is not there is found by the build."""
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        path = (page.parent / link).resolve()
        if "://" not in link and path.suffix not in (".md", "") and path.is_file() and path.is_relative_to(ROOT):
            yield path


# ---- the reference: what the docstrings say


def reference() -> str:
    """The public names, those for tests, and what operators call, in this order."""
    parts = ["## unlost\n"]
    parts += [_entry(f"unlost.{name}", getattr(unlost, name), name) for name in public_names()]
    parts += ["## unlost.testing\n"]
    parts += [_entry(f"unlost.testing.{n}", getattr(unlost.testing, n), n) for n in sorted(unlost.testing.__all__)]
    parts += ["## unlost.ops\n", "What the command line calls; programs may do so as well.\n"]
    parts += [_entry(name, thing, name.removeprefix("unlost.ops.")) for name, thing in operator_functions()]
    return "\n".join(parts)


def public_names() -> list[str]:
    return sorted(name for name in unlost.__all__ if not name.startswith("__"))


def operator_functions() -> list[tuple[str, Any]]:
    """The functions of `unlost.ops` that the command line calls."""
    found: dict[str, Any] = {}
    for path in sorted((SOURCE / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unlost.ops."):
                for alias in node.names:
                    thing = getattr(importlib.import_module(str(node.module)), alias.name)
                    if isinstance(thing, types.FunctionType):
                        found[f"{thing.__module__}.{thing.__name__}"] = thing
    return sorted(found.items())


def _entry(full: str, thing: Any, name: str) -> str:
    lines = [f"### {name}\n"]
    if inspect.isclass(thing):
        lines += [_code(f"class {full}{_signature(thing)}"), markdown(_doc(thing))]
        for method, what in _methods(thing):
            lines.append(f"#### {name}.{method}\n")
            if not isinstance(what, property):
                lines.append(_code(f"{'async ' * inspect.iscoroutinefunction(what)}{method}{_signature(what)}"))
            lines.append(markdown(_doc(what)))
    elif callable(thing) and inspect.isroutine(thing):
        lines += [
            _code(f"{'async ' * inspect.iscoroutinefunction(thing)}{full}{_signature(thing)}"),
            markdown(_doc(thing)),
        ]
    else:
        lines += [_code(f"{full} = {_shown(thing)}"), markdown(_said_below(name))]
    return "\n".join(lines)


def _methods(cls: type) -> list[tuple[str, Any]]:
    """Those that are documented; what has no docstring is for the inside."""
    found = []
    for name, what in vars(cls).items():
        plain = what.__func__ if isinstance(what, staticmethod | classmethod) else what
        if not name.startswith("_") and isinstance(plain, property | types.FunctionType) and plain.__doc__:
            found.append((name, plain))
    return found


def _doc(thing: Any) -> str:
    own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return inspect.cleandoc(own or "")


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"<[^>]*>", "...", text).replace("(self, ", "(").replace("(self)", "()")
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    return re.sub(r"~|\b(?:collections\.abc|typing|datetime|pathlib|unlost(?:\.\w+)+)\.", "", text)


def _shown(thing: Any) -> str:
    if isinstance(thing, list):
        return f"[{len(thing)} scenarios]"
    text = str(thing) if not isinstance(thing, type) else thing.__name__
    return re.sub(r"\b(?:typing|unlost(?:\.\w+)+)\.", "", text)


def _said_below(name: str) -> str:
    """The text below the assignment of a name that is no class and no function."""
    for tree in _trees().values():
        for node, after in itertools.pairwise(tree.body):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return inspect.cleandoc(str(after.value.value))
    return ""


def _code(text: str) -> str:
    if len(text) > 100 and "(" in text:
        head, _, rest = text.partition("(")
        inside, _, tail = rest.rpartition(")")
        text = f"{head}(\n{''.join(f'    {part},{chr(10)}' for part in _parts(inside))}){tail}"
    return f"```python\n{text}\n```\n"


def _parts(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for n, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            yield text[start:n].strip()
            start = n + 1
    yield text[start:].strip()


def markdown(doc: str) -> str:
    """A docstring as Markdown: its sections get titles, examples become code, lists and promises their own paragraphs."""
    out: list[str] = []
    lines = doc.splitlines()
    while lines:
        line = lines.pop(0)
        if re.fullmatch(r"(Raises|Examples?):", line):
            section = []
            while lines and (not lines[0].strip() or lines[0].startswith(" ")):
                section.append(lines.pop(0)[4:])
            out += ["", *(_raises(section) if line == "Raises:" else ["```pycon", *_trimmed(section), "```"]), ""]
            continue
        before = out[-1] if out else ""
        starts = line.startswith(("**Guarantee**", "**After a crash**")) or (
            re.match(r"\s*- ", line) and before.strip() and not re.match(r"\s*- |\s{2,}", before)
        )
        code = line.startswith("    ") and before.strip() and not before.startswith(("    ", "- ", "  "))
        out += ["", line] if starts or code else [line]
    return "\n".join(out).strip() + "\n"


def _trimmed(lines: list[str]) -> list[str]:
    return "\n".join(lines).strip("\n").splitlines()


def _raises(lines: Sequence[str]) -> list[str]:
    out = ["**Raises**", ""]
    for line in lines:
        name, colon, what = line.partition(": ")
        if colon and re.fullmatch(r"[A-Za-z_.]+", name):
            out.append(f"- `{name}`: {what}")
        elif line.strip():
            out.append(f"    {line.strip()}" if len(out) > 2 else line.strip())
    return out


# ---- the errors: what the code raises


@dataclass
class Said:
    """What the code says under one code: the kinds of error, where, and each sentence with what to do about it."""

    kinds: set[str] = field(default_factory=set)
    rooms: set[str] = field(default_factory=set)
    cases: list[tuple[str, str]] = field(default_factory=list)


_CODE = re.compile(r"UL[1-9]\d{3}")
_LATER = re.compile(r"(UL[1-9]\d{3}): (.+)", re.S)  # a warning or a line of the log


def error_pages() -> str:
    parts = []
    for code, said in sorted(said_by_code().items()):
        parts.append(f"## {code}\n")
        for sentence, fix in said.cases:
            parts.append(_sentence(sentence) + (f"<br>**Do**: {_sentence(fix)}" if fix else "") + "\n")
        kinds = sorted({_kind(kind) for kind in said.kinds})
        parts.append(f"*{'; '.join(kinds)} — said in {', '.join(sorted(said.rooms))}*\n")
    return "\n".join(parts)


@functools.cache
def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


@functools.cache
def said_by_code() -> dict[str, Said]:
    """Every code of the source, with what is said where it is used."""
    trees = _trees()
    names = {path: _texts_of(tree) for path, tree in trees.items()}
    everywhere = {name: text for found in names.values() for name, text in found.items()}
    found: dict[str, Said] = {}
    for path, tree in trees.items():
        known = everywhere | _said_inside(tree, everywhere) | names[path]
        room = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.walk(tree):
            for code, kind, sentence, fix in [*_called(node, known), *_warned(node, known), *_checks(node)]:
                said = found.setdefault(code, Said())
                said.kinds.add(kind)
                said.rooms.add(f"`{room}`")
                case = (sentence if _says(sentence) else "", fix if _says(fix) else "")
                if any(case) and case not in said.cases:
                    said.cases.append(case)
    for said in found.values():
        said.cases = [
            case for case in said.cases if case[0] or not any(case[1] == fix for text, fix in said.cases if text)
        ]
        # A text that another library or the user's code says is known only when it happens.
        said.cases = [(text or "What it says depends on the case.", fix) for text, fix in said.cases or [("", "")]]
    return found


def _says(text: str) -> bool:
    return re.search(r"\w{2}", re.sub("‹[^›]*›", "", text)) is not None


def _said_inside(tree: ast.Module, everywhere: dict[str, str]) -> dict[str, str]:
    """Names within functions that stand for one sentence."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            text = _text(node.value, everywhere) if isinstance(node.value, ast.JoinedStr | ast.IfExp) else ""
            if _says(text):
                found[node.targets[0].id] = text
    return found


def _texts_of(tree: ast.Module) -> dict[str, str]:
    return {
        target.id: _text(node.value, {})
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str | int)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _called(node: ast.AST, known: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """A call that gets a code: the sentence comes after it or is `what=`, what to do is `fix=`."""
    if not isinstance(node, ast.Call):
        return
    named = {k.arg: k.value for k in node.keywords}
    places: list[tuple[int | None, ast.expr]] = [*enumerate(node.args), (None, named.get("code", ast.Constant("")))]
    for place, given in places:
        for code in _codes(given, known):
            what = named.get("what")
            if what is None and place is not None and place + 1 < len(node.args):
                what = node.args[place + 1]
            fix = named.get("fix")
            if fix is None and place == 1 and len(node.args) == 5:  # severity, code, what, evidence, fix
                fix = node.args[4]
            name = ast.unparse(node.func).rpartition(".")[2]
            severity = named.get("severity", node.args[0] if place == 1 and node.args else None)
            passed = name in ("_ok", "fine") or (isinstance(severity, ast.Constant) and severity.value == "ok")
            yield code, name, "" if passed else _text(what, known), _text(fix, known)


def _codes(given: ast.expr, known: dict[str, str]) -> list[str]:
    if isinstance(given, ast.IfExp):
        return _codes(given.body, known) + _codes(given.orelse, known)
    text = given.value if isinstance(given, ast.Constant) else known.get(_name(given), "")
    return [text] if isinstance(text, str) and _CODE.fullmatch(text) else []


def _warned(node: ast.AST, known: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """A text that begins with its code."""
    if isinstance(node, ast.Constant | ast.JoinedStr) and not isinstance(getattr(node, "value", ""), bytes):
        match = _LATER.match(_text(node, known))
        if match and "\n" not in match[2].strip():
            yield match[1], "warning", match[2], ""


def _checks(node: ast.AST) -> Iterator[tuple[str, str, str, str]]:
    """A table of what each code is about."""
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and _codes(key, {}) and isinstance(value, ast.Constant):
                yield key.value, "check", f"`unlost doctor` checks {value.value}.", ""


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.AST | None, known: dict[str, str]) -> str:
    """What an expression will say, with … for what is known only then."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[-\d.,]*[srdgf]", "…", text)
        case ast.JoinedStr():
            return "".join(_text(part, known) for part in node.values)
        case ast.FormattedValue():
            return _text(node.value, known)
        case ast.Constant(value=int(number)):
            return f"{number:,}"
        case ast.BinOp(op=ast.Add()):
            return _text(node.left, known) + _text(node.right, known)
        case ast.IfExp():
            both = [text for text in (_text(node.body, known), _text(node.orelse, known)) if text.strip(" …,")]
            return " / ".join(both)
        case ast.Subscript():
            return _text(node.value, known)
        case ast.BoolOp():
            return " / ".join(text for part in node.values if (text := _text(part, known)).strip(" …"))
        case ast.Name() | ast.Attribute():
            name = _name(node)
            return known.get(name) or (f"‹{name.strip('_').replace('_', ' ')}›" if len(name) > 2 else "…")
        case None:
            return ""
    return "…"


def _sentence(text: str) -> str:
    """A sentence of the code, as text of a page. Placeholders of command lines are no tags."""
    text = " ".join(text.split())
    return re.sub(r"([<>*_\[\]`\\|#])", r"\\\1", text)


def _kind(name: str) -> str:
    cls = getattr(errors, name, None)
    if isinstance(cls, type) and issubclass(cls, errors.UnlostError):
        return f"{name}: {_doc(cls).splitlines()[0]} Exit code {cls.exit_code}."
    return {"warning": "a warning or a line of the log"}.get(name, "a check, or made in one place for several")


if __name__ == "__main__":
    sys.exit(main())
