"""The statuses of rows."""

from __future__ import annotations

STATUSES = {
    "ok": "The model ended its answer.",
    "length": "The answer was cut off at `max_new_tokens`, or at the end of the model's context.",
    "malformed": "The row could not be read.",
    "missing_value": "A column that the prompt needs is null, NaN or not there.",
    "empty_prompt": "The prompt has no text.",
    "too_long": "Prompt and answer do not fit the context of the model.",
    "skipped": "The prompt is too long, and such prompts were to be left out.",
    "invalid_prompt": "The chat messages are no conversation that the model's template accepts.",
    "invalid_option": "The options of the row are not valid.",
    "unknown_model": "The row asks for another model.",
    "duplicate_id": "An earlier row has the same id.",
    "schema_invalid": "The answer does not have the form that was asked for.",
    "deadline": "The answer took longer than the row was given.",
    "out_of_cache": "The engine had no memory left for the row.",
    "engine_error": "The engine failed on the row.",
    "unauthorized": "The endpoint does not accept the token, or asks for one.",
    "not_found": "The endpoint has no such model or route.",
    "rate_limited": "The endpoint took no more requests, however long they waited.",
    "unavailable": "The endpoint could not be reached, or did not wake up in time.",
    "bad_answer": "The endpoint did not answer as an inference server does, or its answer was too large.",
}
"""What each status means. "ok" and "length" are the statuses without an error."""
