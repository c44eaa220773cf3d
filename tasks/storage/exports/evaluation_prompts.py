"""The built-in prompts on which an export is compared with its source: short texts of many kinds."""

from __future__ import annotations

DEFAULT_PROMPTS: tuple[str, ...] = (
    "The capital of France is Paris, and the capital of Japan is",
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain it boils",
    "Question: What is seven times eight?\nAnswer:",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Translate to German: The weather is nice today and we are going for a walk.",
    "Summarize in one sentence: The council met on Tuesday to discuss the new bridge. After three hours of debate, it "
    "decided to postpone the decision until the cost of repairs to the old bridge is known.",
    "Dear Ms Miller,\n\nthank you for your order. Unfortunately, the item that you chose",
    "The three laws of thermodynamics say that energy",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "A recipe for pancakes: mix two eggs, a cup of milk and a cup of flour. Then",
    "Classify the sentiment as positive or negative.\nReview: The battery died after two days.\nSentiment:",
    "In 1969, for the first time, people walked on",
    "The opposite of hot is cold. The opposite of early is",
    "List three animals that live in the desert:\n1.",
    "If all roses are flowers and some flowers fade quickly, then",
    "{\"name\": \"Ada Lovelace\", \"born\": 1815, \"profession\":",
    "User: How do I reset my password?\nAssistant:",
    "Die Hauptstadt von Deutschland ist Berlin. Die Stadt liegt an",
    "La première guerre mondiale a commencé en",
    "The patient reports a dry cough and a fever for three days. The doctor",
    "To be, or not to be, that is the",
    "Monday, Tuesday, Wednesday, Thursday,",
    "The quick brown fox jumps over the lazy dog. The sentence is known because it",
)  # fmt: skip
