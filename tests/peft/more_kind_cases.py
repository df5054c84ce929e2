"""More rows of `kind_cases.py`: kinds with tensors that nothing trains, and those that change other things than W."""

from __future__ import annotations

from kind_cases import KindCase

ADDMM = {"fan_in_fan_out": True}
# PEFT writes projections once for each site, too: `tests/proofs/test_randlora.py`.
RANDLORA = {"r": 3, "randlora_alpha": 5, "save_projection": False}
CASES = {
    "vera linear": KindCase("linear", "VeraConfig", {"r": 5}),
    "vera addmm": KindCase("addmm", "VeraConfig", {"r": 5} | ADDMM),
    "vera drawn again": KindCase("linear", "VeraConfig", {"r": 5, "save_projection": False, "projection_prng_key": 3}),
    "vera random": KindCase("linear", "VeraConfig", {"r": 5, "init_weights": False}, starts_at_zero=False),
    "vera dropout": KindCase("linear", "VeraConfig", {"r": 5, "vera_dropout": 0.3}, dropout=True),
    "shira linear": KindCase("linear", "ShiraConfig", {"r": 2}),
    "shira seed": KindCase("linear", "ShiraConfig", {"r": 1, "random_seed": 5}),
    "delora linear": KindCase("linear", "DeloraConfig", {"r": 3}),
    "delora patterns": KindCase(
        "linear", "DeloraConfig", {"r": 3, "rank_pattern": {"up": 2}, "lambda_pattern": {"layers.0.down": 4}}
    ),
    "delora dropout": KindCase("linear", "DeloraConfig", {"r": 3, "module_dropout": 0.3}, dropout=True),
    "randlora linear": KindCase("linear", "RandLoraConfig", RANDLORA),
    "randlora addmm": KindCase("addmm", "RandLoraConfig", RANDLORA | ADDMM),
    "randlora sparse": KindCase("linear", "RandLoraConfig", RANDLORA | {"sparse": True}),
    "randlora very sparse": KindCase("linear", "RandLoraConfig", RANDLORA | {"very_sparse": True}),
    "randlora dropout": KindCase("linear", "RandLoraConfig", RANDLORA | {"randlora_dropout": 0.3}, dropout=True),
}
