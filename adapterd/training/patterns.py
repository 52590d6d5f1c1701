"""What should not stand in training text: secrets, personal data, damage done by wrong encodings. Patterns only."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import ftfy

Kind = Literal["secret", "personal", "encoding"]

# The forms that the issuers of these keys publish, or that scanners such as gitleaks look for.
_SECRETS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("a private key", re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----")),
    ("an AWS access key", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b")),
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")),
    ("an API key", re.compile(r"\bsk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{20,}")),
    ("a Stripe key", re.compile(r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}\b")),
    ("a Google API key", re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b")),
    ("a Slack token", re.compile(r"\bxox[abposr]-[0-9A-Za-z-]{10,}")),
    ("a JSON web token", re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}")),
    ("a password in an address", re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/@]{3,}@")),
    ("a password", re.compile(r"(?i)\b(?:password|passwd|pwd|api[_-]?key|secret)\s*[:=]\s*(?=\S*\d)\S{8,}")),
)
_PERSONAL: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("an e-mail address", re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")),
    (
        "a telephone number",
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}"
            r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?!\w)"
        ),
    ),
    ("a US social security number", re.compile(r"\b(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}\b")),
    (
        "an IP address",
        re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"),
    ),
)
_CARD = re.compile(r"(?<![\d-])(?:\d[ -]?){12,18}\d(?![\d-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_EXAMPLE_MAIL = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|[\w-]+\.(?:example|invalid|test))\b", re.I
)

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile(r"[\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069]")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,4});")
_ESCAPE = re.compile(r"(?<!\\)\\(?:n|r|t|u[0-9a-fA-F]{4})(?![A-Za-z\\])")


@dataclass(frozen=True)
class Match:
    """`what` says it in words, `code` for programs; `shown` is a piece of the text, never a whole secret.

    is_mended: `repair_text` undoes it.
    """

    kind: Kind
    code: str
    what: str
    shown: str
    is_mended: bool = False


def find_patterns(text: str) -> Iterator[Match]:
    """Every kind of thing at most once."""
    for what, pattern in _SECRETS:
        found = pattern.search(text)
        if found:
            yield Match("secret", "secret", what, f"{found[0][:6]}...")
            break
    for what, pattern in _PERSONAL:
        hits = (hit[0] for hit in pattern.finditer(text))
        hit = next((hit for hit in hits if not _EXAMPLE_MAIL.search(hit)), None)
        if hit is not None:
            yield Match("personal", "personal_data", what, hit)
    for what, pattern, is_real in (("a card number", _CARD, _passes_luhn), ("an IBAN", _IBAN, _is_iban)):
        hit = next((hit[0] for hit in pattern.finditer(text) if is_real(hit[0])), None)
        if hit is not None:
            yield Match("personal", "personal_data", what, f"{hit[:6]}...")
    yield from _damage(text)


def repair_text(text: str) -> str:
    """The text with wrong decoding undone, and without control and invisible characters and stray edges."""
    return _INVISIBLE.sub("", _CONTROL.sub("", ftfy.fix_encoding(text))).strip()


def _damage(text: str) -> Iterator[Match]:
    if "\ufffd" in text:
        yield Match(
            "encoding", "encoding", "U+FFFD, where a character was lost", _around(text, text.index("\ufffd"))
        )
    repaired = ftfy.fix_encoding(text)
    if repaired != text:
        at = next(i for i, (a, b) in enumerate(zip(text, repaired + " ", strict=False)) if a != b)
        yield Match(
            "encoding",
            "encoding",
            "UTF-8 that was read as another encoding",
            f"{_around(text, at)}, which is {_around(repaired, at)}",
            is_mended=True,
        )
    for what, pattern, is_mended in (
        ("control characters", _CONTROL, True),
        ("invisible characters", _INVISIBLE, True),
        ("HTML entities", _ENTITY, False),
        ("escapes that were never undone", _ESCAPE, False),
    ):
        found = pattern.search(text)
        if found:
            yield Match("encoding", "encoding", what, _around(text, found.start()), is_mended)


def _around(text: str, at: int) -> str:
    return (
        ascii(text[max(0, at - 8) : at + 12])
        if not text.isprintable()
        else repr(text[max(0, at - 8) : at + 12])
    )


def _passes_luhn(number: str) -> bool:
    """ISO/IEC 7812: every second digit from the right is doubled, and the digits' sum divides by ten."""
    digits = [int(char) for char in number if char.isdigit()]
    doubled = [sum(divmod(digit * 2, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(number: str) -> bool:
    """ISO 13616: country and check digits to the end, letters as numbers, one is left modulo 97."""
    plain = number.replace(" ", "")
    return (
        15 <= len(plain) <= 34
        and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1
    )
