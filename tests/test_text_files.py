"""Text and JSON in the encodings that other systems write, and what is refused."""

import codecs
import json

import pytest

from imaging import files

CONTENT = {"name": "Läsion", "numbers": [1, 2.5, None]}
TEXT = json.dumps(CONTENT, ensure_ascii=False)


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        json.dumps(CONTENT).encode("ascii"),
    ],
)
def test_json_is_read_in_every_encoding_that_names_itself(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert files.read_json(path) == CONTENT


def test_line_ends_stay(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(codecs.BOM_UTF8 + b"a,b\r\n1,2\n")
    assert files.read_text(path) == "a,b\r\n1,2\n"


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(r'"\ud83d\ude00"')
    assert files.read_json(path) == "\U0001f600"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfe\x00", "UTF-8"),
        ("Läsion".encode("latin-1"), "UTF-8"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' is repeated"),
        (b'[{"b": {"a": 1, "a": 1}}]', "'a' is repeated"),
        (rb'{"a": "\ud800"}', "half a character"),
        (rb'{"\uDfff": 1}', "half a character"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_refused_is_one_line_with_the_name(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        files.read_json(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
