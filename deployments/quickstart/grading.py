"""Says whether an answer in words holds what it should."""

from __future__ import annotations

import re
from collections.abc import Sequence


def is_right(text: str, accepted: Sequence[str]) -> bool:
    """Return whether a text holds one of the accepted answers as words or a number of its own.

    Upper and lower case are the same. `7` is not in `17`, `7.5`, `-7` or `H7`, and `Rome` is not in `Romeo`.
    """
    answers = "|".join(map(re.escape, accepted))
    return re.search(rf"(?<![\w-])(?<!\d[.,])(?:{answers})(?![\w-]|[.,]\d)", text, re.IGNORECASE) is not None
