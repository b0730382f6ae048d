"""API pages of the package from its docstrings, into the folder that is named (`make docs`: build/docs).

Any warning fails: a name that is listed and not there, a type that does not resolve. Fetches nothing.
"""

import sys
import warnings
from pathlib import Path
from typing import Literal

import pdoc

import detransformer
from detransformer.coformer import submodels
from detransformer.models import configuration


def build(folder: Path) -> list[str]:
    """Writes the pages; the warnings, of which deprecated uses inside other packages are none."""
    # Configurations inherit fields from transformers, whose types are text that is read in the module that inherits.
    for module in (configuration, submodels):
        vars(module).setdefault("Literal", Literal)
    pdoc.render.configure(docformat="google", footer_text=f"detransformer {detransformer.__version__}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc("detransformer", output_directory=folder)
    return [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = build(target)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    print(f"{target}/index.html, {len(list(target.rglob('*.html')))} pages, {len(found)} warnings")
    sys.exit(bool(found))
