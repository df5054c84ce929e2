"""The written config: it picks the same modules in another process, whatever the one in use left to the model."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.files.written_config import targets_by_name, without_trained_rows, written_config


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), Conv1D(5, 6)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.words(ids))))


def written(**config):
    base = Words()
    lora = lorafx.compile(base, lorafx.LoraConfig(r=2, **config))
    return written_config(base, lorafx.of(lora)._adapter("default"))


def test_names_that_were_left_to_the_model_are_written_out():
    found = written(target_modules="all-linear")
    assert found["target_modules"] == ["down", "up"] and found["inference_mode"] is True
    assert found["auto_mapping"] == {"base_model_class": "Words", "parent_library": __name__}


def test_a_layer_of_gpt2s_says_how_its_weight_lies():
    assert written(target_modules=["down"])["fan_in_fan_out"] is True
    assert written(target_modules=["up"])["fan_in_fan_out"] is False


def test_whole_names_are_a_regex_where_other_modules_end_like_them():
    inner = nn.ModuleDict({"up": nn.Linear(3, 2), "other": nn.ModuleDict({"up": nn.Linear(2, 5)})})
    assert targets_by_name(inner, ["other.up"]) == {"target_modules": ["other.up"]}
    found = targets_by_name(inner, ["up"])
    assert found == {"target_modules": "up", "layers_to_transform": None, "layers_pattern": None}


ROWS = "base_model.model.words.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(("besides", "left"), [([], {"up"}), (["base_model.model.words.lora_A"], {"words", "up"})])
def test_a_target_is_left_out_where_the_file_has_trained_rows_of_it_and_nothing_else(besides, left):
    config = lorafx.LoraConfig(r=2, target_modules=["words", "up"], trainable_token_indices={"words": [1]})
    assert set(without_trained_rows(Words(), config, [ROWS, *besides]).target_modules) == left
    assert without_trained_rows(Words(), config, besides).target_modules == config.target_modules
