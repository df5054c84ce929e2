"""Encoders of text, encoder-decoders, and speech."""

from __future__ import annotations

from typing import Any

import torch

from .causal import SLIDING, SPECIAL
from .entry import LABELS, VOCABULARY, Call, Entry, classes, ids, pretrained, sentences, sequences

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": LABELS,
    **SPECIAL,
}
TWO_SIDED = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 56,
    "decoder_start_token_id": 2,
    **SPECIAL,
}
SOURCE, MELS = 16, 10  # Whisper's encoder positions, half as many as its frames; and channels

STRIDES = ["frequency_stride", "time_stride"]
SELF = ["query", "key", "value", "dense"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
T5 = {"d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4}


def classifier(name: str, targets: list[str], **settings: Any) -> Entry:
    return pretrained(f"{name}ForSequenceClassification", sentences, targets, ENCODER | settings)


def translator(name: str, targets: list[str] | str, **settings: Any) -> Entry:
    return pretrained(f"{name}ForConditionalGeneration", sequences, targets, TWO_SIDED | settings)


def recordings(batch: int, length: int) -> Call:
    """Spectrograms, which have no length, and what was said."""
    rng = torch.Generator().manual_seed(0)
    return {"input_features": torch.randn(batch, MELS, 2 * SOURCE, generator=rng), "labels": ids(rng, batch, length)}


def spectrograms(batch: int, length: int) -> Call:
    """Spectrograms, which have no length, with a label."""
    rng = torch.Generator().manual_seed(0)
    return {"input_values": torch.randn(batch, SOURCE, MELS, generator=rng), "labels": classes(batch)}


def waves(batch: int, length: int) -> Call:
    """16 samples a step, which the convolutions make 2 frames, and half as many characters as steps."""
    rng = torch.Generator().manual_seed(0)
    return {"input_values": torch.randn(batch, 16 * length, generator=rng), "labels": ids(rng, batch, length // 2)}


SPEECH = (
    ENCODER
    | {"conv_dim": (12, 20), "conv_kernel": (4, 3), "conv_stride": (4, 2), "layerdrop": 0.0}
    | {"num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 2}
)

ENTRIES = (
    classifier("Bert", SELF),
    classifier("Roberta", [*SELF, "word_embeddings"]),
    classifier("Electra", SELF, embedding_size=40),
    classifier(
        "DebertaV2",
        ["query_proj", "key_proj", "value_proj", "dense"],
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    classifier("ModernBert", ["Wqkv", "Wo", "Wi"], **SLIDING, local_attention=4),
    classifier("Albert", SELF[:3], embedding_size=40),
    classifier("ConvBert", ["query", "key", "value"], embedding_size=48),
    # Feed-forward layers with numbers within each layer.
    classifier(
        "MobileBert",
        SELF,
        **{"embedding_size": 24, "intra_bottleneck_size": 32, "true_hidden_size": 32, "num_feedforward_networks": 3},
    ),
    classifier("DistilBert", ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"], hidden_dim=80),
    translator("T5", ["q", "k", "v", "o", "wi", "wo"], **T5),
    translator("MT5", ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], **T5),
    translator("Bart", PROJECTIONS),
    translator("MBart", [*PROJECTIONS, "lm_head"], tie_word_embeddings=False),
    translator("Pegasus", PROJECTIONS),
    pretrained(
        "WhisperForConditionalGeneration",
        recordings,
        PROJECTIONS,
        TWO_SIDED | {"num_mel_bins": MELS, "max_source_positions": SOURCE, "max_target_positions": 64},
    ),
    pretrained(
        "Wav2Vec2ForCTC",
        waves,
        ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"],
        SPEECH,
    ),
    pretrained(
        "ASTForAudioClassification",
        spectrograms,
        ["q_proj", "k_proj", "v_proj", "fc1"],
        ENCODER | {"max_length": SOURCE, "num_mel_bins": MELS, "patch_size": 2} | dict.fromkeys(STRIDES, 2),
    ),
    pretrained("HubertForCTC", waves, ["q_proj", "k_proj", "v_proj", "out_proj"], SPEECH),
)
