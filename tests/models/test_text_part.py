"""Tests that the text part of a model with images is found, by its config and by its tensors."""

from minikv_jax.models.text_part import text_config, text_tensors

TEXT = {"model_type": "gemma3_text", "hidden_size": 48}


def test_the_text_config_and_what_stands_beside_it():
    whole = {"model_type": "gemma3", "text_config": TEXT, "vision_config": {}, "eos_token_id": [1, 106]}
    assert text_config(whole) == TEXT | {"eos_token_id": [1, 106]}
    assert text_config(TEXT) is TEXT
    other = {"model_type": "llava", "text_config": TEXT}
    assert text_config(other) is other  # refused by its model_type


def test_a_text_config_without_a_type_has_that_of_the_whole_model():
    assert text_config({"model_type": "mistral3", "text_config": {}}) == {"model_type": "mistral"}


def test_tensors_of_the_text_have_the_names_of_a_text_checkpoint():
    images = {"vision_tower.layers.0.weight": 1, "multi_modal_projector.linear.weight": 2}
    text = {"model.layers.0.mlp.up_proj.weight": 3, "model.norm.weight": 4, "lm_head.weight": 5}
    before = {f"language_model.{name}": value for name, value in text.items()}
    assert text_tensors(before | images) == text
    after = {name.replace("model.", "model.language_model."): value for name, value in text.items()}
    assert text_tensors(after | {f"model.{name}": value for name, value in images.items()}) == text
    assert text_tensors(text) == text
