"""Data inside a page."""

from __future__ import annotations

import json
from typing import Any


def json_for_script(data: Any) -> str:
    """``data`` as JSON that is safe inside a script element: no character of it can open a tag, a comment or an entity.

    >>> print(json_for_script({"text": "</script> & <!--"}))
    {"text":"\\u003c/script\\u003e \\u0026 \\u003c!--"}

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
