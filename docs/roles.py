"""Let docstrings keep Pyro's roles (``:math:``, ``:class:`` and the like) in pages that are written in Markdown."""

import re
from typing import Any

import griffe

MATH_BLOCK = re.compile(r"^( *)\.\. math::((?:.*)(?:\n\1 +\S.*)*)", re.MULTILINE)
MATH = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


def to_markdown(text: str) -> str:
    """Rewrite roles and formula blocks of a docstring in Markdown."""
    text = MATH_BLOCK.sub(_display, text)
    text = MATH.sub(lambda match: rf"\({match[1]}\)", text)
    return ROLE.sub(lambda match: f"`{match[1]}`", text)


def _display(match: re.Match[str]) -> str:
    indent, formula = match[1], " ".join(match[2].split())
    return f"{indent}$$\n{indent}{formula}\n{indent}$$"


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
