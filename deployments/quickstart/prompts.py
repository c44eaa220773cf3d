"""The forms in which a model gets a question: the chat template, plain prompts, and long texts before either.

Standard library only. A training example is a prompt and its answer; the end token follows the answer and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import make_data
import phrasings

PAD_TOKEN, END_TOKEN = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD_TOKEN, END_TOKEN, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) -}}\n"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}\n"
)
PLAIN_FORMS = (
    "Question: {question}\nAnswer:",
    "Question: {question}\nAnswer: ",
    "Question: {question}\n\nAnswer:",
    "Question: {question}\n\nAnswer: ",
    "Question: {question}\n\nAnswer: Let's think step by step.",
    "Q: {question}\nA:",
    "{question}\n",
    "{question}\n",
    "{question}\n\n",
    "{question}",
)
_CHAT_SHARE = 0.65
_SYSTEM_SHARE = 0.4
_EARLIER_TURNS_SHARE = 0.07
_LONG_TEXT_SHARE = 0.1

Message = dict[str, str]


def render_chat(messages: list[Message]) -> str:
    """Write messages as `CHAT_TEMPLATE` does, with the opening of the answer."""
    turns = (
        f"<|{message['role']}|>{message['content'].strip()}{END_TOKEN if message['role'] == 'assistant' else ''}"
        for message in messages
    )
    return "".join(turns) + "<|assistant|>"


def _make_long_text(rng: random.Random) -> str:
    return make_data.make_preamble(rng, rng.randint(2, 8) if rng.random() < 0.5 else rng.randint(8, 28))


def _chat_prompt(rng: random.Random, question: str, earlier: list[tuple[str, str]], long_text: str) -> str:
    system, before = "", ""
    if rng.random() < _SYSTEM_SHARE:
        system = phrasings.expand(rng, rng.choice(phrasings.SYSTEM_MESSAGES))
    if long_text and rng.random() < 0.6:
        system = f"{system} {long_text}"
    elif long_text:
        before = long_text + rng.choice(("\n\n", "\n", " "))
    messages = [{"role": "system", "content": system}] if system else []
    for earlier_question, earlier_answer in earlier:
        messages.append({"role": "user", "content": earlier_question})
        messages.append({"role": "assistant", "content": earlier_answer})
    return render_chat([*messages, {"role": "user", "content": before + question}])


def _plain_prompt(rng: random.Random, question: str, earlier: list[tuple[str, str]], long_text: str) -> str:
    form = rng.choice(PLAIN_FORMS)
    examples = (form.format(question=asked).rstrip() + f" {answer}\n\n" for asked, answer in earlier)
    before = long_text + rng.choice(("\n\n", "\n\n", "\n")) if long_text else ""
    return before + "".join(examples) + form.format(question=question)


def training_examples(seed: int, *, with_long: bool) -> Iterator[tuple[str, str]]:
    """Give pairs of prompt and answer without end, in all forms.

    Args:
        seed: Seed of all choices.
        with_long: Whether some prompts have earlier questions, or more than two sentences before the question.
    """
    rng = random.Random(seed)
    questions = make_data.training_questions(seed + 1)
    for _, question, answer in questions:
        earlier, long_text = [], ""
        if with_long and rng.random() < _EARLIER_TURNS_SHARE:
            earlier = [next(questions)[1:] for _ in range(rng.randint(1, 3))]
        if rng.random() < _LONG_TEXT_SHARE:
            long_text = _make_long_text(rng) if with_long else make_data.make_preamble(rng, rng.randint(1, 2))
        if rng.random() < _CHAT_SHARE:
            yield _chat_prompt(rng, question, earlier, long_text), answer
        else:
            prompt = _plain_prompt(rng, question, earlier, long_text)
            yield prompt, answer if prompt[-1].isspace() else f" {answer}"


def held_out_prompts(form: str, questions: list[make_data.Question], seed: int) -> list[str]:
    """Put held-out questions in one form.

    Args:
        form: `chat`, `system` (a short system message), `long` (100 to 300 tokens of other text), or a member of
            `PLAIN_FORMS`.
        questions: N questions, in order.
        seed: Seed of the choices of system messages and long texts.
    """
    rng = random.Random(seed)
    prompts = []
    for question in questions:
        messages = [{"role": "user", "content": question.question}]
        if form == "system":
            content = phrasings.expand(rng, rng.choice(phrasings.SYSTEM_MESSAGES))
            messages.insert(0, {"role": "system", "content": content})
        elif form == "long":
            messages.insert(0, {"role": "system", "content": make_data.make_preamble(rng, rng.randint(8, 20))})
        in_chat = form in ("chat", "system", "long")
        prompts.append(render_chat(messages) if in_chat else form.format(question=question.question))
    return prompts
