import errno
import inspect

import pytest

from wn21k_zoo import errors
from wn21k_zoo.errors import DataError, MissingExtraError, Wn21kError, did_you_mean, first_line, message_of


def test_every_error_is_drawn_exported_and_derived():
    classes = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, BaseException)}
    assert set(classes) == {name for name in errors.__all__ if name[0].isupper()}
    for name, error in classes.items():
        assert issubclass(error, Wn21kError)
        assert name in errors.__doc__


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("fal11", ["fall11", "winter21"], " Did you mean fall11?"),
        ("FALL11", ["fall11"], " Did you mean fall11?"),
        (
            "mobilnet",
            ["mobilenetv3_large_100.miil_in21k", "tresnet_m"],
            " Did you mean mobilenetv3_large_100.miil_in21k?",
        ),
        ("zzzzzz", ["fall11"], ""),
    ],
)
def test_did_you_mean(name, candidates, expected):
    assert did_you_mean(name, candidates) == expected


@pytest.mark.parametrize(("name", "named"), [(b"a/b", "a/b: "), ("a/b", "a/b: "), (3, "3: "), (None, "")])
def test_a_message_of_the_system_names_the_file(name, named):
    assert message_of(OSError(errno.ENOENT, "gone", name)) == f"{named}gone"
    assert message_of(OSError(errno.ENOSPC, "full", name)) == f"{named}full; make room on the disk"


def test_messages_hold_no_passwords():
    for url in (
        "https://me:secret@host/x",
        "https://me:p@secret@host/x",
        "ftp://me:secret@host",
        "s3://key:secret@bucket/x y@z",
    ):
        assert "secret" not in str(DataError(f"{url} cannot be reached."))
    for text in (
        "hf-hub:ORG/NAME@main",
        "https://host/a@b",
        "https://host?mail=a@b.c",
        "https://host#a@b",
        "file:///home/me@host/x",
    ):
        assert str(DataError(text)) == text


def test_messages_are_one_line():
    assert first_line(ValueError("a\nb")) == "ValueError: a"
    assert first_line(ValueError("\x1b[1mload\x1b[0m failed")) == "ValueError: load failed"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("Does not fit:\n  a is missing\n  b")) == "ValueError: Does not fit: a is missing"
    assert len(first_line(ValueError(f"Does not fit:\n{'a' * 9999}"))) < 200
    assert first_line(ValueError("Fails:\n\n  a")) == "ValueError: Fails: a"
    assert len(first_line(ValueError("a" * 9999))) < 2100
    assert str(MissingExtraError("X", "demo")) == 'X needs an extra: pip install "wn21k-zoo[demo]"'
