"""Why there is no native extension, or none that is used, and what to do. Imported only then."""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def extension_in(folder: Path) -> Path | None:
    """The extension of this Python in a folder, if there is one."""
    return next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").exists()), None)


def hidden_package() -> Path | None:
    """The folder of an installed vidfast with an extension that the one without is imported instead of."""
    specs = [PathFinder.find_spec("vidfast", [entry]) for entry in sys.path]
    for finder in sys.meta_path:  # an editable installation has one of its own
        if finder is not PathFinder and hasattr(finder, "find_spec"):
            specs.append(finder.find_spec("vidfast", None))
    for spec in specs:
        for location in (spec and spec.submodule_search_locations) or ():
            folder = Path(location).resolve()
            if folder != FOLDER and extension_in(folder) is not None:
                return folder
    return None


def source_root() -> Path | None:
    """The root of the checkout that the package is a folder of, or None for an installed package."""
    root = FOLDER.parent
    return root if (root / "setup.py").exists() and (root / "CMakeLists.txt").exists() else None


def reason(error: ImportError) -> str:
    """Why `vidfast._C` could not be imported, and what to do, in one line."""
    there = extension_in(FOLDER)
    if there is not None and not isinstance(error, ModuleNotFoundError):
        return f"the extension {there} does not load ({error}); installing vidfast again builds it anew"
    root = source_root()
    if root is None:
        return f"the extension vidfast._C is not built ({error}); pip install vidfast builds it"
    others = sorted(path.name for path in FOLDER.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib"))
    built = f", and only {', '.join(others)} for another Python" if others else ""
    return (
        f"the extension vidfast._C is not built ({error}): vidfast was imported from {FOLDER}, "
        f"an unbuilt source folder{built}; pip install -e {root} builds it there"
    )


def warn_of_hidden_package() -> None:
    """Says, where an installed vidfast has the extension and this folder has none, which was imported."""
    if extension_in(FOLDER) is not None:
        return
    hidden = hidden_package()
    if hidden is None:
        return
    warn_at_caller(
        f"vidfast was imported from {FOLDER}, where its extension is not built, which hides "
        f"the vidfast that is installed in {hidden}: everything runs on the slow reference. {_advice()}"
    )


def warn_of_foreign_extension(extension: str) -> None:
    """Says that the extension is another folder's, as the finder of an editable installation gives it."""
    if Path(extension).resolve().parent != FOLDER:
        warn_at_caller(
            f"vidfast was imported from {FOLDER}, where its extension is not built, and took the extension "
            f"{extension}, which may be of other sources. {_advice()}"
        )


def _advice() -> str:
    root = source_root()
    build = f"build this one: pip install -e {root}" if root else "remove this one"
    return f"Start Python in another folder, or {build}"


def warn_at_caller(message: str) -> None:
    """A RuntimeWarning at the caller's line: that of the first frame that is not the package's own."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_own(frame.f_code.co_filename):
        level, frame = level + (not frame.f_code.co_filename.startswith("<frozen")), frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def _is_own(file: str) -> bool:
    return file.startswith("<frozen") or Path(file).resolve().is_relative_to(FOLDER)
