"""The interface of an adapted model: what it says of itself, and PEFT's names for it."""

from graphs import Chain, adapted


def test_the_line_of_counts_is_pefts(capsys):
    lora = adapted(Chain(), target_modules=["second"])
    lora.print_trainable_parameters()
    trainable, total = 2 * 6 + 3 * 2, 24 + 21 + 18
    expected = f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out == expected


def test_it_introduces_itself():
    assert repr(adapted(Chain())) == "AdaptedModel(Chain, 2 sites, adapters: default*)"
