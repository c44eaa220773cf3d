"""Languages of models such as NLLB: the source's in the prompt, the target's as the first token of the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.torch_engine import TorchSeq2SeqEngine, TorchTextEngine, language_ids
from prefect_huggingface.tasks.records import Request
from support.export_models import ENCODER_DECODER
from support.tiny_models import save_with_spread_weights

CODES = ["eng_Latn", "deu_Latn", "fra_Latn"]
WORDS = ["▁the", "▁house", "▁is", "▁green", "▁das", "▁Haus", "▁ist", "▁grün", "e", "n", "t"]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model of the architecture of NLLB, with a tokenizer of three languages."""
    import torch
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    folder = tmp_path_factory.mktemp("nllb")
    vocabulary = {text: index for index, text in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=CODES, src_lang="eng_Latn")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = M2M100Config(vocab_size=len(tokenizer), **{**ENCODER_DECODER, **special})
    model = M2M100ForConditionalGeneration(config)
    return save_with_spread_weights(model, folder)


@pytest.fixture(scope="module")
def engine(nllb: Path):
    model = LocalModel(model_id=str(nllb), backend="torch", task="translation", device="cpu")
    with TorchSeq2SeqEngine(nllb, model) as engine:
        yield engine


def ask(engine, **options):
    request = Request("the house is green", options=GenerationOptions(max_new_tokens=6, ignore_eos=True, **options))
    return engine.submit(request).result()


def expected(nllb: Path, source: str, target: str | None, **options) -> str:
    """Return what Transformers answers."""
    from transformers import AutoModelForSeq2SeqLM, NllbTokenizer

    tokenizer = NllbTokenizer.from_pretrained(nllb, src_lang=source)
    model = AutoModelForSeq2SeqLM.from_pretrained(nllb)
    first = None if target is None else tokenizer.convert_tokens_to_ids(target)
    made = model.generate(
        **tokenizer("the house is green", return_tensors="pt"), max_new_tokens=6, do_sample=False, eos_token_id=None,
        forced_bos_token_id=first, **options,
    )  # fmt: skip
    return tokenizer.decode(made[0], skip_special_tokens=True)


@pytest.mark.parametrize("target", [None, *CODES])
@pytest.mark.parametrize("source", CODES[:2])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_answer_is_that_of_transformers(nllb, engine, source, target, beams):
    answer = ask(engine, src_lang=source, tgt_lang=target, num_beams=beams)
    assert answer.error is None
    assert answer.text.split() == expected(nllb, source, target, num_beams=beams).split()


def test_languages_beside_one_another_do_not_mix(engine):
    alone = [ask(engine, tgt_lang=code).text for code in CODES]
    options = [GenerationOptions(max_new_tokens=6, ignore_eos=True, tgt_lang=code) for code in CODES]
    futures = [engine.submit(Request("the house is green", options=one)) for one in options]
    assert [future.result().text for future in futures] == alone
    assert ask(engine).text == ask(engine, src_lang="eng_Latn").text, "the source language is that of the model again"


def test_the_first_token_can_be_given_by_its_id(nllb, engine):
    from transformers import AutoTokenizer

    first = language_ids(AutoTokenizer.from_pretrained(nllb))["deu_Latn"]
    assert ask(engine, forced_bos_token_id=first).text == ask(engine, tgt_lang="deu_Latn").text


def test_a_first_token_that_the_model_has_not_is_that_requests_error(engine):
    beside = engine.submit(Request("the house is green"))
    answer = ask(engine, forced_bos_token_id=10**9)
    assert (answer.error_code, "must be a token of the model" in answer.error) == ("invalid_option", True)
    assert beside.result(60).error is None


@pytest.mark.parametrize("option", ["src_lang", "tgt_lang"])
def test_an_unknown_language_is_refused(engine, option):
    answer = ask(engine, **{option: "deu_Latin"})
    assert answer.error_code == "invalid_option"
    assert f"`{option}`" in answer.error
    assert "'deu_Latn'" in answer.error


def test_two_first_tokens_are_refused(engine):
    assert "Leave one of them out" in ask(engine, tgt_lang="deu_Latn", forced_bos_token_id=4).error


@pytest.mark.parametrize("options", [{"src_lang": "eng_Latn"}, {"tgt_lang": "deu_Latn"}, {"forced_bos_token_id": 4}])
def test_models_that_go_on_with_the_prompt_have_no_languages(tiny_llama, options):
    model = LocalModel(model_id=str(tiny_llama), backend="torch", device="cpu")
    with TorchTextEngine(tiny_llama, model) as engine:
        answer = ask(engine, **options)
    assert answer.error_code == "invalid_option"
    assert "encoder-decoder" in answer.error
