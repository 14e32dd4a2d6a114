"""Other people's text in Markdown and in Python: shown as it is, never taken for markup.

in_markdown("a_*b*")      # a_\\*b\\*
"""

import json
import re
import shlex


def in_markdown(value: object) -> str:
    """A text in one line that Markdown shows as it is: no markup, HTML or link of its own."""
    text = _printable(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~#!$])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    # A word of its own address is a link in GitHub's Markdown.
    return re.sub(r"(?i)\b(https?|ftp|mailto)(:)|\b(www)(\.)", _no_link, text)


def _no_link(found: re.Match[str]) -> str:
    return f"{found[1] or found[3]}{'&#58;' if found[2] else '&#46;'}"


def in_code(value: object) -> str:
    """A text in one line as a Markdown code span, with a fence that it does not hold."""
    text = _printable(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def quoted(value: object) -> str:
    """A text as a Python literal in double quotes, on one line."""
    return json.dumps(_printable(value))


def in_shell(value: object) -> str:
    """A text in one line as one word of a POSIX shell."""
    return shlex.quote(_printable(value))


def fence_for(text: str) -> str:
    """A fence for a code block that holds `text`."""
    return "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)


def _printable(value: object) -> str:
    """One line, without control characters and marks that turn the direction of writing."""
    text = " ".join(str(value).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
