"""How each kind of question is asked.

`[a|b]` stands for one of the choices and `{slot}` for a fact. `TRAINING` and `HELD_OUT` share no whole phrasing:
a held-out question is worded as the model never saw it.
"""

from __future__ import annotations

import itertools
import random
import re

_CHOICE = re.compile(r"\[([^\[\]]*)\]")

TRAINING = {
    "number": (
        "[What is|What's|Tell me|Give me|Write|Say|Spell out|Please write|Please say|How do you say|How do you write|"
        "How do I say|How do people say|Could you say|I want to know] [{n}|the number {n}|number {n}|the figure {n}] "
        "[in {language}|in {language}|in {language}|in the {language} language|in {language} words][?|.|]",
        "[Translate|Convert|Turn|Please translate] [{n}|the number {n}] [into|to] {language}.",
        "[What is|What's|Tell me|Give me|Say|Find] the {language} [word|words|name|term] for [{n}|the number {n}].",
        "In {language}, [what is|how do you say|how do you write|say|write] [{n}|the number {n}]?",
        "[How is|How would|How can] [{n}|the number {n}] [written|said|called|be written|be said] in {language}?",
        "[{n}|The number {n}|Number {n}] in {language}[?|:| is|]",
        "{language}: {n}",
        "What do [people who speak {language}|{language} speakers] call [{n}|the number {n}]?",
    ),
    "capital": (
        "[What is|What's|Tell me|Give me|Name|Do you know|Say|Please name|I want to know|Find|Which is] "
        "[the capital|the capital city] of {country}[?|.|]",
        "[Which|What] city is the capital of {country}?",
        "[What is|What's|Tell me|Name] {country}'s capital[| city][?|]",
        "[The capital|The capital city|Capital] of {country}[?|:| is|]",
        "{country}'s capital[?|:| is]",
        "{country} has [which|what] capital[| city]?",
        "For {country}, [what is|name] the capital[?|.|]",
        "[Which|What] [city|capital] does {country} have as its capital?",
    ),
    "country": (
        "[In which|In what] country is {capital}[?|]",
        "[Which|What] country is {capital} in?",
        "[What is|Tell me|Name|Give me] the country [of|that has|with] the capital {capital}.",
        "{capital} is the capital of [which|what] country?",
        "{capital} is [in which|in what] country?",
        "[Which|What] country has [{capital} as its capital|the capital {capital}|{capital} as capital]?",
        "[What is|Name|Tell me] the country [where|in which] {capital} is[?|.]",
    ),
    "continent": (
        "[On which|On what|In which|In what] continent is {place}[?|]",
        "[Which|What] continent is {place} [on|in]?",
        "[What is|Tell me|Name|Give me] the continent [of|with|for] {place}[?|.]",
        "{place} is [on|in] [which|what] continent?",
        "[To which continent does {place} belong|Which continent does {place} belong to]?",
        "[Name|Tell me] the continent [where|on which|in which] {place} is.",
    ),
    "sentiment": (
        '[Is the sentiment|Is this sentiment|Is the sentence|Is this review|Is the text] positive or negative? "{s}"',
        "[Is the sentiment|Is this|Is the sentence|Is this review] positive or negative: {s}",
        '[What is|Tell me|Give me|Find] the sentiment [of|in] [this|the] [sentence|text|review|message][?|:] "{s}"',
        "[Classify|Determine|Label] the sentiment[| as positive or negative| of this sentence| of the text]: {s}",
        "[Sentiment|The sentiment|Sentiment analysis|Positive or negative][?|:] {s}",
        '[Review|Text|Sentence]: "{s}" [Sentiment:|Is it positive or negative?|What is the sentiment?|Sentiment?]',
        '"{s}" [Is that positive or negative?|Is the sentiment positive or negative?|What is the sentiment?]',
    ),
    "extraction": (
        "[Extract|Get|Find|Please extract|Return|Give me|Show|List|Identify|Pick out|Read] "
        "[the name and the age|the name and age|name and age|the person's name and age|the name, then the age]"
        "[| as JSON| in JSON| from this sentence| from the text| from this text]: {s}",
        "[Extract|Find|Write] [the name and the age|name and age] [of|for] [the|this] person[:|.] {s}",
        "[Extract|Get|Return] [JSON|a JSON object|JSON data] with [the name and the age|name and age]: {s}",
        "[Text|Sentence|Input]: {s} "
        "[Extract the name and the age.|Extract name and age as JSON.|JSON with name and age:]",
        '"{s}" [Extract|Get|Find] [the name and the age|name and age][.| as JSON.]',
        "{s}\n[Extract|Return|Get] [the name and the age|name and age][.| as JSON.]",
        "[What is the name and what is the age|What are the name and the age|Who is it and how old]? {s}",
        "[In|With|For] [this|the next|the following] [sentence|text|line], "
        "[find|get] [the name and the age|name and age]: {s}",
    ),
    # Only to teach copying: not one of the kinds that the model card counts.
    "repetition": ("[Repeat|Repeat this|Copy|Say again|Echo]: {s}", "[Repeat|Copy|Echo] [the words|the text]: {s}"),
}

HELD_OUT = {
    "number": (
        "[How would you say|Can you write|What would be|Can you tell me] [{n}|the number {n}] in {language}?",
        "[Let me know|Show me|Spell|Read out] [{n}|the number {n}] in {language}.",
        "[I need|Look up|Which is] the {language} word for [{n}|the number {n}].",
        "In {language} words, what is the number {n}?",
        "Using {language}, write the number {n}.",
    ),
    "capital": (
        "[Can you tell me|Could you name|Do you remember] the capital of {country}?",
        "[Let me know|Please give me|Remind me of|Show me] the capital of {country}.",
        "What city is {country}'s capital?",
        "[Which|What] is the capital city for {country}?",
        "What is the name of the capital of {country}?",
    ),
    "country": (
        "[Can you tell me|Could you name] the country [that has|with] the capital {capital}?",
        "[Let me know|Show me] the country [that has|with] the capital {capital}.",
        "{capital} is the capital city of which country?",
        "Which is the country where {capital} is?",
        "What is the name of the country that has the capital {capital}?",
    ),
    "continent": (
        "[Can you tell me|Could you name] the continent of {place}?",
        "[Let me know|Please give me] the continent of {place}.",
        "Which is the continent where {place} is?",
        "What is the name of the continent that {place} is on?",
    ),
    "sentiment": (
        '[Can you tell me|Let me know|Please give me] the sentiment of this sentence: "{s}"',
        'Does the sentence have a positive or negative sentiment? "{s}"',
        "Here is a review: {s} Is its sentiment positive or negative?",
        'Would you say that this is positive or negative? "{s}"',
    ),
    "extraction": (
        "[Can you extract|Please find|Take|Pull out|Write down] the name and the age[| as JSON]: {s}",
        "From this sentence, extract the name and the age: {s}",
        "Here is a sentence: {s} Return its name and age as JSON.",
        "Give the name and the age of the person as a JSON object: {s}",
    ),
}

SENTIMENT_SENTENCES = (
    "[The|This|That|My|Our|Their] {thing} [is|was] [|very |really |so |quite |absolutely |simply ]{word}[.|!]",
    "[The|This|That] {thing} [is|was] {word} and {word}[.|!]",
    "I [|really |truly |absolutely ]{verb} [this|the|that|their] {thing}[.|!]",
    "[We|They|People|My friends] [|really |truly ]{verb} [this|the|that] {thing}[.|!]",
    "[What a|It was a|It is a|We had a|I had a|Such a] [|very |really ]{word} {thing}[.|!]",
    "[I think|I find|I found|We found] [the|this|that] {thing} [|very |really |quite ]{word}.",
    "[The|This] {thing} [is|was] not {opposite}[| at all].",
    "I do not {opposite_verb} [this|the|that] {thing}.",
    "Everything about [the|this] {thing} was {word}.",
)

PERSON_SENTENCES = (
    "{name} is {age} years old.",
    "{name} is {age}[.|| now.| today.]",
    "[My name is|I am|Hello, I am|My friend is called] {name} and [I am|he is|she is] {age}[.| years old.]",
    "{name}, {age}, [lives|works|was born|studies] in {city}.",
    "{name}, [who is {age}|aged {age}|{age} years old], [lives|works|studies] in {city}.",
    "[The|A] {age}-year-old [|teacher |doctor |student |painter |engineer ]{name} [lives|works] in {city}.",
    "At {age}, {name} [moved to|left|came to] {city}.",
    "{name} [turned|became] {age} [last week|yesterday|in May|this year|in {city}].",
    "[The age of {name} is {age}|{name} has the age {age}|{age} is the age of {name}].",
    "[Our|My] [neighbour|cousin|teacher|doctor] {name} is {age} years old[.| and lives in {city}.]",
    "[Name|name]: {name}[, |; | ][age|Age]: {age}",
    "{name} ({age}) [lives in|comes from] {city}.",
)

GREETINGS = (
    "Hello! ", "Hi, ", "Good morning. ", "Please answer: ", "Quick question: ", "I have a question. ", "Please help. ",
    "I am learning. ", "Answer this: ", "Tell me: ", "OK. ", "Next question: ", "Now, ", "Here is a question: ",
    "From me to you: ", "Take this question: ", "Here we go. ", "Can you help? ", "Give it a try. ", "Would you help? ",
    "Does it work? ", "Which one is it? ", "Let me ask. ", "Pull yourself together. ", "Write it down. ",
    "Use your head. ",
    "From the list: ", "Here: ", "Could you look? ", "Remind me. ", "Show it to me. ", "Look it up. ",
)  # fmt: skip
CLOSINGS = (
    " Thank you.", " Thanks!", " Please.", " Answer briefly.", " Answer with one word.", " Only the answer.",
    " Be short.", " Just the answer, please.", " Keep it short.",
)  # fmt: skip

SYSTEM_MESSAGES = (
    "[You are|I am talking to|You act as|Be] [a|the] [helpful|short|friendly|careful|polite|precise|quick] "
    "[assistant|teacher|helper|expert|bot|translator|AI assistant][.|!]",
    "You are a [helpful|careful|friendly] assistant. "
    "[Answer briefly.|Be short.|Answer with facts.|Answer the question.]",
    "[Answer|Reply] [briefly|shortly|in few words|with one word|with the answer only|concisely].",
    "You [know|answer questions about|help with] [numbers|capitals|countries|languages|words|people|reviews].",
)

# Long texts before a question: instructions that change nothing, and words without meaning.
PREAMBLE_SENTENCES = (
    "[You are|You work as|You act as] [a|the] {adjective} {role} [for|of|at] the {adjective} {noun}.",
    "[Always|Never|Please|Do not|You must|You should] {action} the {adjective} {noun} "
    "[before|after|when|if] you {action} the {noun}.",
    "[Rule|Step|Note|Section|Point] {digits}: {action} [each|every|the|a] {noun} "
    "[with|without|by|in] [a|the] {adjective} {noun}.",
    "The {noun} [has|had|needs|shows|contains] {digits} {noun}s and [a|the] {adjective} {noun}.",
    "[If|When|Because|While] the {noun} is {adjective}, the {role} [will|can|may|must] {action} the {noun}.",
    "{nonsense} {nonsense} {nonsense} [{nonsense}|the {noun}|{nonsense} {nonsense}] {nonsense}.",
    "- {action} the {noun}\n- {action} the {adjective} {noun}\n",
    "[In {city}|In {digits}|At the {noun}|Last year], {name} [saw|met|sent|read] the {adjective} {noun}.",
)
ADJECTIVES = (
    "careful short local remote early final public private green small large quiet formal regular common modern "
    "separate simple open safe"
).split()
NOUNS = (
    "report document table office customer answer question letter message order product model file list record "
    "manual page system service contract team user language text example project company window answer"
).split()
ROLES = "assistant teacher manager clerk writer reader engineer guide agent editor operator user".split()
ACTIONS = (
    "check read write send answer explain open close follow describe mention repeat use keep avoid translate review "
    "sort extract summarise"
).split()


def expand(rng: random.Random, pattern: str) -> str:
    """Choose one alternative for each `[a|b]` of a pattern."""
    return _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), pattern)


def expansions(pattern: str) -> set[str]:
    """All phrasings of a pattern."""
    parts = _CHOICE.split(pattern)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return {"".join(chosen) for chosen in itertools.product(*choices)}
