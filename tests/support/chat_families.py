"""Chat formats of model families: special tokens, and templates written here after the documented formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('The roles must alternate between user and assistant.') }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('The role system is not supported.') }}{% endif %}"
HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}{% set f = c.function if c.function is defined else c %}"
    '\n<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
CHATML_TURNS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n"
    "{% set text = m.content %}{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ text }}"
    + HERMES_CALLS + "<|im_end|>\n{% endif %}{% endfor %}"
)  # fmt: skip


def _chatml(default_system: str, end: str, tools: bool = True) -> str:
    shown = (
        "{% if tools %}\n\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>\n"
        "Answer with calls in <tool_call></tool_call>.{% endif %}"
    )
    return (
        "{% set has_system = messages[0].role == 'system' %}{% if has_system or tools or " + repr(bool(default_system))
        + " %}<|im_start|>system\n{{ messages[0].content if has_system else " + repr(default_system) + " }}"
        + (shown if tools else "") + "<|im_end|>\n{% endif %}" + CHATML_TURNS
        + "{% if add_generation_prompt %}<|im_start|>assistant\n" + end + "{% endif %}"
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How one family writes conversations.

    Attributes:
        template: Template, or named templates.
        special: Special tokens of the tokenizer.
        eos: End token that the tokenizer names.
        bos: Start token, or None.
        added: Added tokens that are not special.
        turn_end: Token that ends a turn of the assistant, where it is not `eos`.
        hand_written: A prompt with a message of the system and one of the user, as people write it by hand.
    """

    template: str | Mapping[str, str]
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    turn_end: str | None = None
    hand_written: str = ""
    options: tuple[str, ...] = field(default=())


LLAMA2 = Family(
    "{% if messages[0].role == 'system' %}{% set head = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first %}"
    "{{ head }}{% endif %}{{ m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ("<unk>", "<s>", "</s>"), "</s>", "<s>",
    hand_written="<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
)  # fmt: skip
LLAMA3 = Family(
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for m in turns %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>{% elif m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('One call at a time.') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{\"name\": \"{{ f.name }}\", \"parameters\": {{ f.arguments | tojson }}}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if loop.first and tools %}Functions:\n{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
     "<|python_tag|>"),
    "<|end_of_text|>", "<|begin_of_text|>", turn_end="<|eot_id|>",
    hand_written="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    options=("date_string",),
)  # fmt: skip
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_BY_HAND = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
QWEN25 = Family(
    _chatml("You are Qwen.", ""), CHATML_TOKENS, "<|im_end|>", added=("<tool_call>", "</tool_call>"),
    hand_written=CHATML_BY_HAND,
)  # fmt: skip
QWEN3 = Family(
    _chatml(
        "",
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    ),
    CHATML_TOKENS, "<|im_end|>", added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
    hand_written=CHATML_BY_HAND, options=("enable_thinking",),
)  # fmt: skip
QWEN3_CODER = Family(
    "{% if messages[0].role == 'system' or tools %}<|im_start|>system\n"
    "{{ messages[0].content if messages[0].role == 'system' else 'You are Qwen.' }}"
    "{% if tools %}\n\n# Tools\n<tools>{% for t in tools %}\n<function>\n<name>{{ t.function.name }}</name>\n"
    "<description>{{ t.function.description | trim }}</description>\n</function>{% endfor %}\n</tools>{% endif %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ m.content }}\n</tool_response>\n<|im_end|>\n{% elif m.role != 'system' or not loop.first %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    "<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    CHATML_TOKENS, "<|im_end|>", added=("<tool_call>", "</tool_call>"), hand_written=CHATML_BY_HAND,
)  # fmt: skip
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
GEMMA2 = Family(
    "{{ bos_token }}" + NO_SYSTEM + "{% for m in messages %}" + ALTERNATE + "<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    GEMMA_TOKENS, "<eos>", "<bos>", turn_end="<end_of_turn>",
    hand_written="<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
)  # fmt: skip
GEMMA3 = Family(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}" + ALTERNATE + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first %}{{ head }}{% endif %}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    GEMMA_TOKENS, "<eos>", "<bos>", turn_end="<end_of_turn>",
    hand_written="<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
)  # fmt: skip
MISTRAL1 = Family(
    "{{ bos_token }}" + NO_SYSTEM + "{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    ("<unk>", "<s>", "</s>"), "</s>", "<s>", hand_written="<s>[INST] Be brief.\n\nHi [/INST]",
)  # fmt: skip
MISTRAL3 = Family(
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if m.role == 'user' %}{% if loop.last and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('Tool call ids must be strings of length 9.') }}{% endif %}"
    "{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}, \"id\": \"{{ c.id }}\"}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content | trim + eos_token }}{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call ids must be strings of length 9.') }}{% endif %}"
    "[TOOL_RESULTS] {\"content\": {{ m.content | tojson }}, \"call_id\": \"{{ m.tool_call_id }}\"}[/TOOL_RESULTS]"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported.') }}{% endif %}{% endfor %}",
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
     "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    "</s>", "<s>", hand_written="<s>[INST] Be brief.\n\nHi[/INST]",
)  # fmt: skip
MAGISTRAL = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{% if m.reasoning_content is defined %}"
    "[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
    "</s>", "<s>", hand_written="<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]",
)  # fmt: skip
PHI3_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PHI3_BY_HAND = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
PHI3_FIRST = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}",
    ("<s>", *PHI3_TOKENS), "<|endoftext|>", "<s>", turn_end="<|end|>", hand_written="<s>" + PHI3_BY_HAND,
)  # fmt: skip
PHI3 = Family(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ("<s>", *PHI3_TOKENS), "<|endoftext|>", "<s>", turn_end="<|end|>", hand_written="<s>" + PHI3_BY_HAND,
)  # fmt: skip
PHI4 = Family(
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|endoftext|>", turn_end="<|im_end|>",
    hand_written="<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
)  # fmt: skip
PHI4_MINI = Family(
    "{% for m in messages %}{% if m.role == 'system' and 'tools' in m and m.tools is not none %}<|system|>"
    "{{ m.content }}<|tool|>{{ m.tools }}<|/tool|><|end|>{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
    (*PHI3_TOKENS, "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"), "<|endoftext|>", turn_end="<|end|>",
    hand_written="<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>",
)  # fmt: skip
DEEPSEEK_TOKENS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
)  # fmt: skip


def _deepseek(end: str) -> str:
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'assistant' and m.tool_calls %}<｜Assistant｜><｜tool▁calls▁begin｜>"
        "{% for c in m.tool_calls %}"
        "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\n```json\n' + c.function.arguments"
        " + '\n```<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{{ eos_token }}"
        "{% elif m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1] %}"
        "{{ '<｜Assistant｜>' + text + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '<｜tool▁outputs▁begin｜>' + m.content + '<｜tool▁outputs▁end｜>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>" + end + "{% endif %}"
    )


DEEPSEEK_R1 = Family(
    _deepseek("<think>\n"), DEEPSEEK_TOKENS, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
    ("<think>", "</think>"),
    hand_written="<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜><think>\n",
)  # fmt: skip
DEEPSEEK_V3 = Family(
    _deepseek(""), DEEPSEEK_TOKENS, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
    hand_written="<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>",
)  # fmt: skip
HERMES = Family(
    {"default": "{{ bos_token }}" + _chatml("", "", tools=False), "tool_use": "{{ bos_token }}" + _chatml("", "")},
    ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|begin_of_text|>",
    hand_written="<|begin_of_text|>" + CHATML_BY_HAND,
)  # fmt: skip
GLM45 = Family(
    "[gMASK]<sop>{% if tools %}<|system|>\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}"
    "{% if enable_thinking is defined and not enable_thinking %}/nothink{% endif %}{% elif m.role == 'assistant' %}"
    "<|assistant|>\n<think></think>\n{{ m.content.split('</think>')[-1] }}{% for c in m.tool_calls or [] %}\n"
    "<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments | items %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|system|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "<|endoftext|>", added=("<think>", "</think>", "<tool_call>", "</tool_call>"), turn_end="<|user|>",
    hand_written="[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>", options=("enable_thinking",),
)  # fmt: skip
GRANITE = Family(
    "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n"
    "{% endif %}{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson(indent=4) }}"
    "<|end_of_text|>\n{% endif %}{% for m in messages %}<|start_of_role|>"
    "{{ 'tool_response' if m.role == 'tool' else m.role }}<|end_of_role|>{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}{\"name\": \"{{ c.function.name }}\", "
    "\"arguments\": {{ c.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}"
    "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
    ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"), "<|end_of_text|>",
    hand_written="<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>"
    "Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
)  # fmt: skip
COMMAND_TURNS = (
    "{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}"
    ".get(m.role, '<|SYSTEM_TOKEN|>') }}{{ m.content }}{% if m.tool_calls %}\nAction: ```json\n[\n"
    '{% for c in m.tool_calls %}{"tool_name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}{% if not loop.last %},{% endif %}\n{% endfor %}]\n```{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
COMMAND_R = Family(
    {
        "default": "{{ bos_token }}" + COMMAND_TURNS,
        "tool_use": "{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>## Tools\n{% for t in tools %}"
        "{{ t | tojson }}\n{% endfor %}<|END_OF_TURN_TOKEN|>" + COMMAND_TURNS,
        "rag": "{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>## Documents\n{% for d in documents %}"
        "{{ d.title }}: {{ d.text }}\n{% endfor %}<|END_OF_TURN_TOKEN|>" + COMMAND_TURNS,
    },
    ("<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
     "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    "<EOS_TOKEN>", "<BOS_TOKEN>", turn_end="<|END_OF_TURN_TOKEN|>",
    hand_written="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)  # fmt: skip
LFM2 = Family(
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if system or tools %}<|im_start|>system\n{{ system }}{% if tools %}\nList of tools: <|tool_list_start|>"
    "{{ tools | tojson }}<|tool_list_end|>{% endif %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}<|tool_response_start|>{{ m.content }}<|tool_response_end|>{% else %}{{ m.content }}"
    "{% endif %}{% if m.tool_calls %}<|tool_call_start|>[{% for c in m.tool_calls %}{{ c.function.name }}("
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}"
    "{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]<|tool_call_end|>{% endif %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>",
     "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
    "<|im_end|>", "<|startoftext|>", hand_written="<|startoftext|>" + CHATML_BY_HAND,
)  # fmt: skip
GPT_OSS = Family(
    "<|start|>system<|message|>You are ChatGPT.\n\nReasoning: {{ reasoning_effort | default('medium') }}\n\n"
    "# Valid channels: analysis, commentary, final.<|end|>{% for m in messages %}{% if m.role == 'system' or tools and "
    "loop.first %}<|start|>developer<|message|># Instructions\n\n{{ m.content if m.role == 'system' }}"
    "{% if tools %}\n\n# Tools\n\nnamespace functions {\n{% for t in tools %}// {{ t.function.description }}\n"
    "type {{ t.function.name }} = (_: "
    "{{ t.function.parameters | tojson }}) => any;\n{% endfor %}}{% endif %}<|end|>{% endif %}"
    "{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% elif m.role == 'tool' %}"
    "<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'assistant' and m.tool_calls %}<|start|>assistant "
    "to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
     "<|message|>", "<|call|>"),
    "<|return|>", "<|startoftext|>", turn_end="<|return|>",
    hand_written="<|start|>system<|message|>You are ChatGPT.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant",
    options=("reasoning_effort",),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama-2": LLAMA2, "llama-3": LLAMA3, "qwen-2.5": QWEN25, "qwen-3": QWEN3, "qwen-3-coder": QWEN3_CODER,
    "gemma-2": GEMMA2, "gemma-3": GEMMA3, "mistral-v0.1": MISTRAL1, "mistral-v0.3": MISTRAL3, "magistral": MAGISTRAL,
    "phi-3-first": PHI3_FIRST, "phi-3": PHI3, "phi-4": PHI4, "phi-4-mini": PHI4_MINI, "deepseek-r1": DEEPSEEK_R1,
    "deepseek-v3": DEEPSEEK_V3, "hermes": HERMES, "glm-4.5": GLM45, "granite": GRANITE, "command-r": COMMAND_R,
    "lfm2": LFM2, "gpt-oss": GPT_OSS,
}  # fmt: skip
