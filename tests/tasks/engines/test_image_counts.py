"""Prompts with many images are counted as the model sees them."""

from __future__ import annotations

import pytest

from support.engine_families import Family


@pytest.mark.parametrize("name", ["torch-images", pytest.param("openvino-images", marks=pytest.mark.slow)])
def test_forty_images_fit_where_the_model_has_room_for_them(family_of, name):
    family, torch = family_of(name), family_of("torch-images")
    for count in (1, 10, 40):
        found, counted = (
            Family(each.name, each.model, each.images * count).ask("What is this?", max_new_tokens=2)
            for each in (family, torch)
        )
        assert (found.error, counted.error) == (None, None)
        # OpenVINO GenAI does not tell how many tokens an image becomes, so that the text is counted.
        expected = counted.prompt_tokens - 5 * count if name.startswith("openvino") else counted.prompt_tokens
        assert found.prompt_tokens == expected
    # Four tokens and a line end for each.
    assert counted.prompt_tokens < 256
    if name.startswith("openvino"):
        return  # where the images alone fill the context, it is the pipeline that has to cope
    many = Family(family.name, family.model, family.images * 60).ask("What is this?", max_new_tokens=2)
    assert many.error_code == "too_long"
