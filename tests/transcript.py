"""The README's transcript: one message to the base and to each shipped adapter, in one batch, over HTTP.

`python -m tests.transcript` writes it anew; `tests/test_readme.py` makes it again and compares.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

from tests.serving import served

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MODELS = ("mini", "mini:support", "mini:moderation", "mini:medical")
MESSAGES = (
    "I was charged twice for order 48213 and I am really angry. Please fix it today.",
    "Woman, 46. Dry cough for 5 days. BP 128/82, pulse 76. Lungs clear. Looks like viral bronchitis. "
    "Paracetamol 500 mg. Review in 7 days.",
)
_BLOCK = re.compile(r"(<!-- transcript:begin -->\n).*?(<!-- transcript:end -->)", re.DOTALL)


def ask(client: OpenAI, model: str, message: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": message}], temperature=0
    )
    return answer.choices[0].message.content or ""


def make_transcript(url: str) -> str:
    """Markdown; all questions are asked at once, so that they share batches."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    with ThreadPoolExecutor(len(MODELS) * len(MESSAGES)) as pool:
        answers = [[pool.submit(ask, client, model, message) for model in MODELS] for message in MESSAGES]
        texts = [[future.result() for future in row] for row in answers]
    return "\n".join(_section(message, row) for message, row in zip(MESSAGES, texts, strict=True))


def _section(message: str, answers: Sequence[str]) -> str:
    rows = [
        f"| `{model}` | {answer.strip().replace('|', '&#124;').replace(chr(10), '<br>')} |"
        for model, answer in zip(MODELS, answers, strict=True)
    ]
    return "\n".join([f"> {message}", "", "| `model` | answer |", "|---|---|", *rows, ""])


def transcript_in(readme: str) -> str:
    """What the README says now. Raises ValueError if its markers are gone."""
    found = _BLOCK.search(readme)
    if found is None:
        raise ValueError("README.md has no transcript markers")
    return found[0].removeprefix(found[1]).removesuffix(found[2])


def main() -> None:
    with served("--adapters", str(ROOT / "adapters")) as url:
        made = make_transcript(url)
    text = README.read_text(encoding="utf-8")
    README.write_text(_BLOCK.sub(lambda block: block[1] + made + block[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
