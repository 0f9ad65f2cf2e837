"""Text and JSON files as other systems write them: with a byte order mark, in UTF-16.

Every file that a user or another program wrote is read with these functions.
"""

import codecs
import json
import re
from pathlib import Path

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Line ends stay as they are. Raises OSError if the file cannot be read, ValueError, one line that
    names the file, if it is not such text.
    """
    return decode_text(Path(path).read_bytes(), path)


def decode_text(content: bytes, name) -> str:
    """Return the text in these bytes, as `read_text` does. Raises ValueError, which says `name`."""
    encoding = "utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: is not text in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None


def read_json(path: Path):
    """Return the content of a JSON file.

    Raises OSError if the file cannot be read, ValueError, one line that names the file, if it is
    not JSON, is nested too deeply, has a key twice in one object, or holds half a character (a
    lone surrogate, which could not be printed or written).
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, name):
    """Return the content of a JSON text. Raises ValueError as `read_json` does, with `name`."""
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(f"{name}: is nested too deeply for a file of this kind") from None
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}: holds half a character (a lone \\ud8…); write it anew"
        ) from None
    except ValueError as error:  # JSONDecodeError is one
        raise ValueError(f"{name}: is not valid JSON ({error})") from None
    return content


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return the object of these keys and values. Raises ValueError if a key comes twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return content
