"""Text of others, shown as text: names of classes, files, runs and datasets, and whatever a server or a file says.

Such text may hold escapes that command a terminal, marks that turn the direction of writing around, markup of Rich,
HTML or Markdown, and lines without an end. It stays what it is in data; where it is shown, it passes `plain` or `lines`
on its way to a terminal or a log, `html` on its way to a page, `markdown` or `fenced` on its way to Markdown.
"""

from __future__ import annotations

import html as _html
import re
from typing import Final

LONGEST: Final = 2000
"""Characters of a line that are shown; what is longer is cut off, and told by how much."""

MOST_LINES: Final = 200
"""Lines of a text that are shown."""

_NOTE: Final = 40
"""Characters by which a line may be longer: a text that was cut off is not cut again for the note that says so."""

# Controls; marks and overrides of the direction of writing; what takes no room; separators of lines; tags; surrogates.
# The joiners U+200C and U+200D stay: Persian, Hindi and emojis need them.
_UNSEEN: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKDOWN: Final = re.compile(r"[\\`*_\[\]|~$]|^[#+=-]|!(?=\\?\[)|^[0-9]+(?=[.)])")


def plain(text: object, longest: int = LONGEST) -> str:
    r"""Text on one line that commands nothing: what cannot be seen, or would act, is written as `\x1b` or `\u202e`.

    Args:
        text: The text; of anything else, what `str` makes of it.
        longest: How many characters are shown.
    """
    whole = str(text)
    shown = _UNSEEN.sub(_written, whole[: longest + _NOTE])
    if len(whole) <= longest + _NOTE and len(shown) <= longest + _NOTE:
        return shown
    return f"{shown[:longest]}... ({max(len(whole), len(shown)) - longest:,} more characters)"


def lines(text: object, longest: int = LONGEST) -> str:
    """As `plain`, but the lines of the text stay lines."""
    split = str(text).split("\n", MOST_LINES + 1)
    more = []
    if len(split) > MOST_LINES + 1:  # one more is what a text has that was cut off before
        more = [f"... ({''.join(split[MOST_LINES:]).count(chr(10)) + 2:,} more lines)"]
        split = split[:MOST_LINES]
    return "\n".join([*(plain(line, longest) for line in split), *more])


def html(text: object) -> str:
    """Text for the content or a quoted attribute of HTML."""
    return _html.escape(lines(text))


def markdown(text: object) -> str:
    """Text for a paragraph, a heading or a table's cell of Markdown: its lines in one, without any markup."""
    together = " ".join(filter(None, (line.strip(" \t\r") for line in str(text).split("\n"))))
    return _MARKDOWN.sub(_marked, _html.escape(plain(together), quote=False))


def fenced(text: object) -> str:
    """A block of Markdown with a text that cannot end it."""
    shown = lines(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{shown}\n{fence}"


def _marked(found: re.Match[str]) -> str:
    # A number at the beginning is marked at the dot or bracket behind it, which makes a list of it.
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def _written(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
