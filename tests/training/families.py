"""Real families' chat templates on a small tokenizer that knows their special tokens."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken

from adapterd.render import Renderer
from tests.tiny import byte_level_tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"
# Everything in a template that looks like a special token of one family or another.
_TOKEN = re.compile(
    r"<\|[\w.▁-]+\|>|<｜[\w▁]+｜>|\[\|\w+\|\]|\[/?[A-Z_]{4,}\]|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)


@dataclass(frozen=True)
class Family:
    """One family.

    end: the token that ends an answer. eos: the tokenizer's own, where it is another.
    adds: what the template itself writes between a prompt and a last answer.
    keeps_prompt: whether it leaves the prompt as it is once an answer follows.
    has_tools: whether it writes tool calls; shows_tools: and which tools there are.
    drops_thought: it leaves the thoughts of earlier turns out.
    opens_thought: its generation prompt ends with the beginning of a thought.
    """

    name: str
    end: str
    eos: str | None = None
    bos: str | None = None
    has_system: bool = True
    has_tools: bool = False
    shows_tools: bool = True
    drops_thought: bool = False
    opens_thought: bool = False
    keeps_prompt: bool = True
    adds: str = ""


FAMILIES = (
    Family("qwen2_5", "<|im_end|>", has_tools=True),
    Family("qwen3", "<|im_end|>", has_tools=True, drops_thought=True, adds="<think>\n\n</think>\n\n"),
    Family("qwen3_instruct_2507", "<|im_end|>", has_tools=True),
    Family("llama3", "<|eot_id|>", bos="<|begin_of_text|>"),
    Family("llama3_1", "<|eot_id|>", bos="<|begin_of_text|>", has_tools=True),
    Family("mistral_v3", "</s>", bos="<s>", has_tools=True, keeps_prompt=False, adds=" "),
    Family("gemma", "<end_of_turn>", bos="<bos>", has_system=False),
    Family("gemma3", "<end_of_turn>", bos="<bos>"),
    Family("phi3", "<|end|>"),
    Family("granite3", "<|end_of_text|>"),
    Family("olmo2", "<|endoftext|>", bos="<|endoftext|>"),
    Family("exaone4", "[|endofturn|]", has_tools=True, drops_thought=True),
    Family("glm4moe", "<|endoftext|>", has_tools=True, drops_thought=True, adds="\n<think></think>\n"),
    Family("cohere2", "<|END_RESPONSE|>", eos="<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>"),
    Family(
        "deepseekv3",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        has_tools=True,
        shows_tools=False,
        drops_thought=True,
        opens_thought=True,
    ),
    Family(
        "deepseek_r1_distill",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        drops_thought=True,
        opens_thought=True,
    ),
    Family("lfm2_v2", "<|im_end|>", bos="<|startoftext|>", has_tools=True),
)


@cache
def renderer_of(family: Family) -> Renderer:
    template = (TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8")
    tokenizer = byte_level_tokenizer(chat_template=template)
    special = {
        *_TOKEN.findall(template),
        family.end,
        family.eos or family.end,
        *([family.bos] if family.bos else []),
    }
    tokenizer.add_tokens([AddedToken(token, special=True) for token in sorted(special)])
    # As in Qwen 3 and DeepSeek: tokens of their own, but words of the answer.
    tokenizer.add_tokens(
        [AddedToken(token) for token in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    )
    tokenizer.eos_token = family.eos or family.end
    tokenizer.bos_token = family.bos
    return Renderer(tokenizer, eos_token_ids=frozenset({tokenizer.eos_token_id}))
