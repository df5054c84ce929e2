"""More rows of `kind_cases.py`: kinds with tensors that nothing trains, and those that change other things than W."""

from __future__ import annotations

from kind_cases import IN_FLOAT32, KindCase

ADDMM = {"fan_in_fan_out": True}
ADALORA = {"init_r": 3, "lora_alpha": 5, "total_step": 10}
# PEFT writes projections once for each site, too: `tests/proofs/test_randlora.py`.
RANDLORA = {"r": 3, "randlora_alpha": 5, "save_projection": False}
# Of C3A, PEFT's derivative with respect to x is another function's, as `gradcheck` says.
CASES = {
    "adalora linear": KindCase("linear", "AdaLoraConfig", ADALORA),
    "adalora addmm": KindCase("addmm", "AdaLoraConfig", ADALORA | ADDMM),
    "adalora conv2d": KindCase("conv2d", "AdaLoraConfig", ADALORA | {"lora_dropout": 0.3}, dropout=True),
    "vera linear": KindCase("linear", "VeraConfig", {"r": 5}),
    "vera addmm": KindCase("addmm", "VeraConfig", {"r": 5} | ADDMM),
    "vera drawn again": KindCase("linear", "VeraConfig", {"r": 5, "save_projection": False, "projection_prng_key": 3}),
    "vera random": KindCase("linear", "VeraConfig", {"r": 5, "init_weights": False}, starts_at_zero=False),
    "vera dropout": KindCase("linear", "VeraConfig", {"r": 5, "vera_dropout": 0.3}, dropout=True),
    "shira linear": KindCase("linear", "ShiraConfig", {"r": 2}),
    "shira seed": KindCase("linear", "ShiraConfig", {"r": 1, "random_seed": 5}),
    "hira linear": KindCase("linear", "HiraConfig", {"r": 2}),
    "hira addmm": KindCase("addmm", "HiraConfig", {"r": 2, "init_weights": "gaussian"} | ADDMM),
    "hira embedding": KindCase("embedding", "HiraConfig", {"r": 2}),
    "hira conv1d": KindCase("conv1d", "HiraConfig", {"r": 2}),
    "hira conv2d": KindCase("conv2d", "HiraConfig", {"r": 2, "hira_dropout": 0.3}, dropout=True),
    "miss linear": KindCase("linear", "MissConfig", {"r": 4}),
    "miss remainder": KindCase("linear", "MissConfig", {"r": 5}),
    "miss mini": KindCase("linear", "MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "miss bat": KindCase("linear", "MissConfig", {"r": 2, "init_weights": "bat"}),
    "miss dropout": KindCase("linear", "MissConfig", {"r": 4, "miss_dropout": 0.3}, dropout=True),
    "fourierft linear": KindCase(
        "linear", "FourierFTConfig", {"n_frequency": 20, "scaling": 9.0}, starts_at_zero=False, close=IN_FLOAT32
    ),
    "fourierft patterns": KindCase(
        "linear",
        "FourierFTConfig",
        {"n_frequency": 20, "random_loc_seed": 4, "n_frequency_pattern": {"up": 9}, "init_weights": True},
        close=IN_FLOAT32,
    ),
    "fourierft addmm": KindCase(
        "addmm", "FourierFTConfig", {"n_frequency": 20, "scaling": 9.0} | ADDMM, starts_at_zero=False, close=IN_FLOAT32
    ),
    "c3a linear": KindCase(
        "linear", "C3AConfig", {"block_size": 4}, starts_at_zero=False, close=IN_FLOAT32, wrong_gradient="c3a_kernel"
    ),
    "c3a patterns": KindCase(
        "linear",
        "C3AConfig",
        {"block_size": 4, "block_size_pattern": {"down": 2}, "init_weights": True},
        close=IN_FLOAT32,
        wrong_gradient="c3a_kernel",
    ),
    "road linear": KindCase("linear", "RoadConfig", {"group_size": 4}),
    "road_2 linear": KindCase("linear", "RoadConfig", {"group_size": 4, "variant": "road_2"}),
    "road_4 linear": KindCase("linear", "RoadConfig", {"group_size": 2, "variant": "road_4"}),
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
    "tokens embedding": KindCase(
        "embedding", "TrainableTokensConfig", {"token_indices": [7, 1, 3], "target_modules": ["embed"]}
    ),
    "tokens random": KindCase(
        "embedding",
        "TrainableTokensConfig",
        {"token_indices": [7, 1, 3], "target_modules": ["embed"], "init_weights": False},
        starts_at_zero=False,
    ),
    "tokens head": KindCase("linear", "TrainableTokensConfig", {"token_indices": [2, 0], "target_modules": ["down"]}),
}
