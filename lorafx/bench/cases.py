"""Cases: which model, on how many tokens, in which dtype; who runs it; and which bars they are held to.

A case is a Llama-shaped model or a part of one, with random weights, and one kind of work on it: a training step, a
forward pass alone, or decoding tokens one by one. `CPU` are small enough for two cores, `CUDA` are real shapes for one
GPU, and `QUICK` are what four minutes of one GPU should go to, the most important first, `UNMEASURED` what further ones
should.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EAGER = ("base", "peft-default", "peft", "lorafx-default", "lorafx")
_PEFT_COMPILED = ("peft-compiled", "peft-compiled-0.9", "peft-compiled-whole")
COMPILED = ("base", "base-compiled", *_PEFT_COMPILED, "lorafx-compiled", "lorafx-compiled-1.0")
PEERS = ("liger", "unsloth")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Bar:
    """A limit on the ratio of a contestant's time (or peak memory) to a reference's.

    Both may be patterns: of the contestants that match, the best counts.
    """

    contestant: str
    reference: str
    limit: float
    of: str = "time"


@dataclass(frozen=True)
class Case:
    """What is run and measured.

    `part` is "model" (up to the loss), "block" (one layer), "linears" (a layer's seven) or "linear" (its first).
    """

    name: str
    shape: Shape
    part: str = "model"
    dtype: str = "float32"
    quantised: str = ""  # "nf4" or "int8": the linear layers but the head are bitsandbytes' own
    batch: int = 4
    sequence: int = 256
    targets: tuple[str, ...] = ALL
    rank: int = 16
    dropout: float = 0.0
    checkpointing: bool = False
    decode: int = 0  # instead of a training step, decode this many tokens one by one after a prefix of `sequence`
    static_cache: bool = False
    forward: bool = False  # instead of a training step, a forward pass in evaluation
    adapters: int = 1  # so many, each for as many rows of the batch
    contestants: tuple[str, ...] = EAGER
    references: tuple[str, ...] = ("base", "peft")
    bars: tuple[Bar, ...] = ()
    rounds: int = 0  # at most this many; 0: as many as asked for
    warm_up: int = 0  # steps before the clock runs; 0: what is usual on the device
    budget: int = 0  # seconds after which nobody else is set up; 0: however long it takes

    @property
    def tokens(self) -> int:
        return self.batch * (self.decode or self.sequence)

    def __str__(self) -> str:
        shape = self.shape
        step = "forward pass," if self.forward else "training step,"
        work = f"decode {self.decode} tokens after" if self.decode else step
        extras = [f"dropout {self.dropout}"] * bool(self.dropout) + ["checkpointing"] * self.checkpointing
        extras += [f"{self.adapters} adapters"] * (self.adapters > 1)
        sizes = f"hidden {shape.hidden}, MLP {shape.intermediate}"
        if self.part == "model":
            sizes += f", {shape.layers} layers, vocabulary {shape.vocabulary}"
        dtype = f"{self.dtype}, {self.quantised}" if self.quantised else self.dtype
        return ", ".join([f"{self.part}: {sizes}, {dtype}, {work} {self.batch} x {self.sequence} tokens", *extras])


def _variant(case: Case, name: str, **changes: object) -> Case:
    return dataclasses.replace(case, name=name, **changes)  # type: ignore[arg-type]


EAGER_BARS = (Bar("lorafx", "peft", 0.95), Bar("lorafx", "base", 1.07))
_small = Shape(512, 1376, 8, 8, 8, 4096)
_train = Case("train-fp32", _small, bars=EAGER_BARS)
_decode = Case(
    "decode",
    _small,
    batch=1,
    sequence=64,
    decode=16,
    contestants=("merged", "peft", "lorafx"),
    references=("merged", "peft"),
    bars=(Bar("lorafx", "merged", 1.15),),
)

_rows = Case(
    "rows-8",
    dataclasses.replace(_small, layers=2),
    batch=32,
    sequence=16,
    rank=8,
    forward=True,
    adapters=8,
    contestants=("lorafx", "peft-rows", "lorafx-rows"),
    references=("lorafx", "peft-rows"),
    bars=(Bar("lorafx-rows", "lorafx", 1.3), Bar("lorafx-rows", "peft-rows", 1.0)),
)
_sweep = Case(
    "sweep-8",
    Shape(64, 128, 2, 4, 4, 64),
    batch=32,
    sequence=12,
    rank=8,
    adapters=8,
    contestants=("lorafx-apart", "lorafx-rows"),
    references=("lorafx-apart",),
    bars=(Bar("lorafx-rows", "lorafx-apart", 0.35),),
)

_QUANTISED_BARS = (Bar("lorafx", "peft", 1.0), Bar("lorafx", "peft", 1.0, of="peak"))

CPU = (
    _train,
    _variant(_train, "train-fp32-512", batch=2, sequence=512),
    _variant(_train, "train-bf16", dtype="bfloat16"),
    _variant(_train, "train-bf16-512", dtype="bfloat16", batch=2, sequence=512),
    _variant(_train, "dropout-fp32", dropout=0.05, bars=()),
    _variant(_train, "checkpointing-fp32", checkpointing=True, bars=()),
    _variant(_train, "linear-fp32", part="linear", bars=()),
    _variant(_train, "linears-fp32", part="linears", bars=()),
    _variant(_train, "block-fp32", part="block", bars=()),
    Case(
        "vocabulary-32k",
        dataclasses.replace(_small, vocabulary=32000),
        batch=2,
        sequence=512,
        bars=(Bar("lorafx", "peft", 0.75, of="peak"),),
        rounds=5,
    ),
    # One site and a tiny MLP, so that nearly all of the time is attention. PEFT runs the base's own attention.
    Case(
        "mask-2048",
        Shape(512, 64, 1, 8, 8, 64),
        part="block",
        batch=1,
        sequence=2048,
        targets=("q_proj",),
        bars=(Bar("lorafx", "peft", 1.0),),
    ),
    *(_variant(_train, f"train-{kind}", quantised=kind, bars=_QUANTISED_BARS) for kind in ("nf4", "int8")),
    _decode,
    _rows,
    _variant(_rows, "rows-64", batch=64, adapters=64, bars=(Bar("lorafx-rows", "lorafx", 2.0), _rows.bars[1])),
    _sweep,
    _variant(
        _train,
        "compiled-fp32",
        contestants=COMPILED,
        references=("base", "peft-compiled"),
        bars=(Bar("lorafx-compiled", "peft-compiled*", 0.96),),
    ),
)

_1b = Shape(2048, 8192, 16, 32, 8, 128256)
_8b = Shape(4096, 14336, 32, 32, 8, 128256)
_ours = (*EAGER, *COMPILED[1:], "lorafx-graphs", "lorafx-float8")
_real = Case("1b-4096", _1b, dtype="bfloat16", batch=1, sequence=4096, contestants=_ours + PEERS)
_layer = _variant(_real, "", shape=dataclasses.replace(_8b, layers=1), contestants=_ours)
_offloading = (*_real.contestants, "lorafx-offloaded")
_linears = _variant(_layer, "", batch=2, contestants=(*_layer.contestants, "lorafx-tuned"))
_graphs = ("merged-graphs", "lorafx-graphs")
STEP_BARS = (
    *(Bar("lorafx-compiled", *of) for of in (("peft-compiled*", 0.88), ("unsloth", 0.90), ("peft-default", 0.55))),
    *(Bar("lorafx-compiled", *of, of="peak") for of in (("peft-compiled*", 0.70), ("unsloth", 0.80))),
    Bar("lorafx-compiled", "peft-default", 0.47, of="peak"),
    Bar("lorafx-float8", "lorafx-compiled", 0.75),
)
OFFLOAD_BARS = (Bar("lorafx-offloaded", "unsloth", 0.95), Bar("lorafx-offloaded", "unsloth", 0.90, of="peak"))
LINEARS_BARS = (Bar("lorafx-[!f]*", "base", 1.10),)  # float8 multiplies other products than the base does
SHORT_BARS = (Bar("lorafx-graphs", "peft-compiled", 0.35),)
_8b_4096 = _variant(_real, "8b-4096", shape=_8b, bars=STEP_BARS)
_1b_decode = _variant(
    _decode, "1b-decode", shape=_1b, dtype="bfloat16", sequence=512, decode=8, rounds=6, warm_up=2, bars=()
)

CUDA = (
    _variant(_linears, "8b-linear", part="linear"),
    _variant(_linears, "8b-linears", part="linears", bars=LINEARS_BARS),
    *(_variant(_layer, f"8b-block-{n}", part="block", sequence=n) for n in (512, 2048, 8192, 16384)),
    _variant(_real, "1b-512", sequence=512, bars=SHORT_BARS),
    *(_variant(_real, f"1b-{n}", sequence=n) for n in (2048, 4096, 8192)),
    _variant(_real, "1b-16384-checkpointing", sequence=16384, checkpointing=True, contestants=_offloading),
    _variant(_real, "1b-4096-dropout", dropout=0.05),
    _8b_4096,
    _variant(_real, "8b-4096-dropout", shape=_8b, dropout=0.05),
    _variant(
        _real,
        "8b-4096-nf4",
        shape=_8b,
        quantised="nf4",
        contestants=("base", "peft-default", "peft", "lorafx", "lorafx-default", "lorafx-compiled", "unsloth"),
        bars=(Bar("lorafx*", "peft-default", 0.67), Bar("lorafx*", "peft-default", 1.0, of="peak")),
    ),
    _variant(
        _real,
        "8b-16384-checkpointing",
        shape=_8b,
        sequence=16384,
        checkpointing=True,
        contestants=_offloading,
        bars=OFFLOAD_BARS,
    ),
    _variant(_1b_decode, "1b-decode", bars=(Bar("lorafx", "merged", 1.15),)),
    _variant(
        _1b_decode,
        "1b-decode-graphs",
        static_cache=True,
        contestants=_graphs,
        references=_graphs[:1],
        bars=(Bar("lorafx-graphs", "merged-graphs", 1.05),),
    ),
)


def _quick(name: str, budget: int, contestants: str, new_name: str = "", **changes: object) -> Case:
    """A case with a few contestants, the most important first, and few steps."""
    (case,) = [each for each in (*CPU, *CUDA) if each.name == name]
    names = tuple(contestants.split())
    limits = tuple(name for name in ("base", "merged-graphs", "peft-compiled", *case.references) if name in names)
    own: dict[str, object] = {"contestants": names, "references": limits, "rounds": 6, "warm_up": 3}
    return _variant(case, new_name or name, budget=budget, **own | changes)


# Fewer layers where all of them take long to set up: capturing a step of decoding goes through each.
_8_layers, _4_layers = dataclasses.replace(_8b, layers=8), dataclasses.replace(_1b, layers=4)
_STEP = "base lorafx-compiled peft-compiled lorafx-graphs peft-default base-compiled lorafx-float8"
_PRODUCTS = "base lorafx-compiled peft-compiled lorafx-float8"
QUICK = (
    _quick("8b-4096", 70, _STEP, "8b-4096-8-layers", shape=_8_layers),
    _quick("8b-linears", 40, _PRODUCTS),
    _quick("1b-512", 45, "peft-compiled lorafx-graphs lorafx-compiled base-compiled"),
    _quick("1b-decode-graphs", 35, "merged-graphs lorafx-graphs", "1b-decode-graphs-4-layers", shape=_4_layers),
    _quick("8b-4096", 40, "base lorafx-compiled peft-compiled peft-default lorafx-float8"),
)
# What has not been measured on a GPU, for another call; what may take longest, a process of its own, comes last.
UNMEASURED = (
    _quick("8b-4096-nf4", 90, "peft-default lorafx-compiled lorafx base"),
    *(_quick(name, 10, " ".join(_rows.contestants)) for name in ("rows-8", "rows-64")),
    _quick("sweep-8", 10, " ".join(_sweep.contestants)),
    _quick("8b-4096", 40, "lorafx-compiled peft-compiled liger unsloth", "8b-4096-8-layers-peers", shape=_8_layers),
    _quick("8b-16384-checkpointing", 60, "lorafx-offloaded unsloth", rounds=3, warm_up=2),
)

# These try everything out within seconds, and run only when asked for by name.
_tiny = Shape(64, 96, 2, 4, 2, 128)
_smoke = _variant(_train, "smoke", shape=_tiny, batch=2, sequence=16, bars=(), contestants=(*EAGER, *PEERS), rounds=3)
SMOKE = (
    _smoke,
    _variant(_smoke, "smoke-bf16", part="linears", dtype="bfloat16", dropout=0.05, contestants=EAGER),
    _variant(_smoke, "smoke-block", part="block", checkpointing=True, contestants=EAGER),
    _variant(_smoke, "smoke-nf4", quantised="nf4", contestants=EAGER),
    _variant(_smoke, "smoke-int8", quantised="int8", contestants=EAGER),
    _variant(_decode, "smoke-decode", shape=_tiny, sequence=8, decode=4, rounds=3, bars=()),
    _variant(_decode, "smoke-static", shape=_tiny, sequence=8, decode=4, rounds=3, static_cache=True, bars=()),
    _variant(_rows, "smoke-rows", shape=_tiny, batch=6, adapters=3, sequence=5, rounds=3, bars=()),
    _variant(_sweep, "smoke-sweep", shape=_tiny, batch=6, adapters=3, sequence=5, rounds=3, bars=()),
    _variant(_smoke, "smoke-compiled", contestants=COMPILED, references=("base", "peft-compiled")),
)


def of_device(device: str) -> tuple[Case, ...]:
    return CUDA if device == "cuda" else CPU
