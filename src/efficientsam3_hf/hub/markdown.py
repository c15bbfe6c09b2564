"""Text of any origin as Markdown, which it cannot leave."""

import re
from typing import Any

from .results import one_line


def prose(text: Any) -> str:
    """A text that Markdown leaves as it is, on one line.

    >>> prose("<b> | *x*")
    '&lt;b&gt; \\\\| \\\\*x\\\\*'
    """
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", one_line(str(text)))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: Any) -> str:
    """A text as code in a line or a table.

    >>> code("a|b")
    '`a\\\\|b`'
    """
    line = one_line(str(text)).replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def block(command: str) -> str:
    """A command as a block that it cannot leave."""
    lines = [
        "".join(letter for letter in line if letter.isprintable() or letter == "\t")
        for line in command.strip().splitlines()
    ]
    body = "\n".join(lines)
    fence = "`" * max(3, _longest_run(body) + 1)
    return f"{fence}bash\n{body}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
