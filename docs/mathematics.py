"""Turn the formulas of a page into MathML as the pages are built, so that they read without a network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

FUNCTION = re.compile(r"(<mi>(?:log|exp|max|min|sd)</mi>)(?=<m(?!o|row><mo))")
"""A named function whose argument has no bracket, which browsers set without the space that TeX puts there."""


def on_page_content(page_html: str, **_: Any) -> str:
    """Replace every formula that the Markdown extension has marked."""
    return FORMULA.sub(_to_mathml, page_html)


def _to_mathml(match: re.Match[str]) -> str:
    tag, bracket, formula = match.groups()
    mathml = convert(html.unescape(formula).strip(), display="block" if bracket == "[" else "inline")
    mathml = mathml.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \sim is a relation, with space around it
    mathml = FUNCTION.sub(r'\1<mspace width="0.17em"/>', mathml)
    return f"<{tag}>{mathml}</{tag}>"
