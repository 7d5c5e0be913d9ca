"Reference pages of every public symbol, from docstrings and from the comments beside the parameters."

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType

from fastcore.docments import docments

import spikeprompt
from spikeprompt.config import Config

MODULES = re.compile(r"\b(?:\w+\.)+(?=[A-Za-z_])")
EMPTY = inspect.Parameter.empty
EDITED = re.compile(r"File to edit: (\S*?(\d+)_\w+\.ipynb)")


def public_modules() -> list[ModuleType]:
    "Every module of the package that has public symbols, in reading order."
    found = [importlib.import_module(m.name) for m in pkgutil.walk_packages(spikeprompt.__path__, "spikeprompt.") if not m.ispkg]
    numbers = {module: int(EDITED.search(inspect.getsource(module))[2]) for module in found if getattr(module, "__all__", None)}
    return sorted(numbers, key=numbers.get)


def symbols(module: ModuleType) -> dict[str, object]:
    "The public symbols that a module defines."
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if getattr(value, "__module__", module.__name__) == module.__name__}


def methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    "The documented methods and properties that a class defines itself."
    for name, value in vars(cls).items() if not issubclass(cls, Config) else ():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        value = inspect.unwrap(value) if callable(value) else value
        if not name.startswith("_") and inspect.isfunction(value) and value.__doc__:
            yield name, value


def type_name(annotation) -> str:
    "An annotation as code, without the modules' names."
    if annotation in (EMPTY, None):
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return f"`{MODULES.sub('', text)}`" if text != "None" else ""


def table(rows: list[tuple]) -> str:
    "Rows as a Markdown table; the first one is its head."
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def parameters(function) -> str:
    "Parameters and result of a function or a dataclass."
    notes = docments(function, full=True, returns=True)
    result = notes.pop("return", None)
    rows = [("parameter", "type", "default", "")]
    for name, note in notes.items():
        if name not in ("self", "cls"):
            default = "" if note.default is EMPTY else f"`{note.default!r}`"
            rows.append((f"`{name}`", type_name(note.anno), default, note.docment or ""))
    parts = [table(rows)] if len(rows) > 1 else []
    if result is not None and (returned := type_name(result.anno)):
        parts.append(f"**Returns** {returned}" + (f": {result.docment}" if result.docment else ""))
    return "\n\n".join(parts)


def settings(config: type[Config]) -> str:
    "Settings of a config, its own before those of its bases."
    rows = [("setting", "type", "default", "")]
    for name, info in sorted(config.model_fields.items(), key=lambda field: field[0] not in config.__annotations__):
        default = "" if info.is_required() else f"`{info.get_default(call_default_factory=True)!r}`"
        rows.append((f"`{name}`", type_name(info.annotation), default, info.description or ""))
    return table(rows) if len(rows) > 1 else ""


def signature(function) -> str:
    "The names of a function's parameters."
    return f"({', '.join(name for name in inspect.signature(function).parameters if name not in ('self', 'cls'))})"


def entry(kind: str, name: str, doc: str | None, body: str = "", fence: str = ":::") -> str:
    "A reference entry, to which other pages can link."
    return "\n\n".join([f"{fence}{{py:{kind}}} {name}", inspect.cleandoc(doc or ""), body, fence])


def class_entry(name: str, cls: type) -> str:
    "A class: its settings or parameters, then its own methods."
    shown, parts = "", []
    if issubclass(cls, Config):
        parts.append(settings(cls))
    elif is_dataclass(cls) or hasattr(cls, "_fields"):
        shown, parts = signature(cls), [parameters(cls)]
    elif "__init__" in vars(cls):
        shown, parts = signature(cls.__init__), [parameters(cls.__init__)]
    parts += [entry("method", f"{method}{signature(f)}", f.__doc__, parameters(f)) for method, f in methods(cls)]
    return entry("class", f"{name}{shown}", cls.__doc__, "\n\n".join(filter(None, parts)), "::::")


def page(module: ModuleType) -> str:
    "The reference page of a module."
    notebook = (Path(module.__file__).parent / EDITED.search(inspect.getsource(module))[1]).resolve()
    place = notebook.relative_to(Path(spikeprompt.__file__).resolve().parent.parent).as_posix()
    parts = [f"# {module.__name__}", module.__doc__, f"Explained in [its notebook](/{place}).", f"```{{py:module}} {module.__name__}\n```"]
    for name, value in symbols(module).items():
        function = inspect.unwrap(value) if callable(value) else value
        if inspect.isclass(value):
            parts.append(class_entry(name, value))
        elif inspect.isfunction(function):
            parts.append(entry("function", f"{name}{signature(function)}", function.__doc__, parameters(function)))
        else:
            parts.append(entry("data", name, f"`{value!r}`" if isinstance(value, str | int | float) else f"a {type(value).__name__}"))
    return "\n\n".join(parts) + "\n"


def targets(modules: list[ModuleType]) -> dict[str, tuple[str, str, str]]:
    "What a mention of a module or a symbol links to: name -> domain, role, target; an ambiguous name is not among them."
    found = {}
    for module in modules:
        short = module.__name__.removeprefix("spikeprompt.")
        for name in module.__name__, short, f"{module.__name__.replace('.', '/')}.py":
            found[name] = {("py", "mod", module.__name__)}
        for name, value in symbols(module).items():
            full = f"{module.__name__}.{name}"
            for mention in name, full, f"{short}.{name}":
                found.setdefault(mention, set()).add(("py", "obj", full))
            for method, _ in methods(value) if inspect.isclass(value) else ():
                found.setdefault(f"{name}.{method}", set()).add(("py", "obj", f"{full}.{method}"))
    return {name: next(iter(places)) for name, places in found.items() if len(places) == 1}
