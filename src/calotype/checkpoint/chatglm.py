"""ChatGLM3, Kolors' text encoder: its layouts and its tokenizer's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from calotype.checkpoint.keys import Extra, Same, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.errors import DamagedFile, LoadError
from calotype.text.chatglm import CHATGLM3_6B, EPSILON, ChatGlmConfig, ChatGlmEncoder
from calotype.text.glm_tokenizer import GlmTokenizer

MAX_TOKENIZER = 16 * 2**20  # bytes; the published one has 1.0 MB
MULTIPLE = 512  # a vocabulary of embeddings is the tokenizer's, filled up for the hardware by less than this

RULES = {
    "embedding.word_embeddings.*": "tokens.*",
    "encoder.layers.{i}.input_layernorm.*": "layers.{i}.attention_norm.*",
    "encoder.layers.{i}.self_attention.query_key_value.*": "layers.{i}.qkv.*",
    "encoder.layers.{i}.self_attention.dense.*": "layers.{i}.attention_out.*",
    "encoder.layers.{i}.post_attention_layernorm.*": "layers.{i}.mlp_norm.*",
    "encoder.layers.{i}.mlp.dense_h_to_4h.*": "layers.{i}.mlp_in.*",
    "encoder.layers.{i}.mlp.dense_4h_to_h.*": "layers.{i}.mlp_out.*",
}


def layout(name: str, prefix: str, style: str) -> Layout[ChatGlmConfig]:
    """The language model's own files, which call the network `transformer`, or diffusers', which have it bare."""
    tokens = prefix + "embedding.word_embeddings.weight"
    first = prefix + "encoder.layers.0."
    frequencies = prefix + "rotary_pos_emb.inv_freq"

    def config(evidence: Evidence) -> ChatGlmConfig:
        evidence.require(
            add_bias_linear=False,
            add_qkv_bias=True,
            apply_residual_connection_post_layernorm=False,
            layernorm_epsilon=EPSILON,
            multi_query_attention=True,
            pre_seq_len=None,
            quantization_bit=0,
            rmsnorm=True,
            rope_ratio=1,
        )
        inner = evidence.size(first + "self_attention.dense.weight", 1)
        shared = (evidence.size(first + "self_attention.query_key_value.weight") - inner) // 2
        usual = 4 * evidence.size(frequencies) if frequencies in evidence.weights else CHATGLM3_6B.head_width
        head_width = evidence.number("kv_channels", usual)
        heads, groups = inner // head_width, shared // head_width
        if heads % groups:
            raise ValueError(f"{heads} heads cannot share {groups} heads of keys and values")
        return ChatGlmConfig(
            vocabulary=evidence.size(tokens),
            width=evidence.size(tokens, 1),
            layers=evidence.count(prefix + "encoder.layers.{i}."),
            heads=heads,
            groups=groups,
            head_width=head_width,
            mlp_width=evidence.size(first + "mlp.dense_4h_to_h.weight", 1),
        )

    def table(config: ChatGlmConfig) -> Table:
        return Table(
            f"chatglm/{name}",
            tuple(Same(prefix + theirs, ours) for theirs, ours in RULES.items()),
            extras=(
                # The language model's end, behind the states that Kolors takes.
                Extra(prefix + "encoder.final_layernorm.weight", (config.width,)),
                Extra(prefix + "output_layer.weight", (config.vocabulary, config.width)),
                Extra(frequencies, (config.head_width // 4,)),
            ),
        )

    return Layout(
        name=name,
        style=style,
        signature=Signature(has=(tokens, first + "self_attention.query_key_value.weight")),
        config=config,
        table=table,
        settings=settings,
    )


def settings(config: ChatGlmConfig) -> dict[str, Any]:
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_layers": config.layers,
        "num_attention_heads": config.heads,
        "multi_query_attention": True,
        "multi_query_group_num": config.groups,
        "kv_channels": config.head_width,
        "ffn_hidden_size": config.mlp_width,
        "layernorm_epsilon": EPSILON,
        "rmsnorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "post_layer_norm": True,
        "seq_length": 32768,
        "use_cache": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


CHATGLM = Part(
    name="chatglm",
    network=ChatGlmEncoder,
    # The longer names first: the shorter ones are found in them too.
    layouts=(layout("transformers", "transformer.", "original"), layout("diffusers", "", "diffusers")),
)


def read_glm_tokenizer(folder: Path, vocabulary: int = CHATGLM3_6B.vocabulary) -> GlmTokenizer | None:
    """The tokenizer of an encoder with so many embeddings, from the `tokenizer.model` in a folder; None without one.

    Raises DamagedFile for what sentencepiece cannot read, LoadError for another model's tokenizer.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > MAX_TOKENIZER:
        raise DamagedFile(f"{path}: {size:,} bytes; a tokenizer has at most {MAX_TOKENIZER:,}")
    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:  # the library raises nothing more specific
        raise DamagedFile(f"{path}: not a sentencepiece model, or cut short ({error}); fetch it again") from error
    tokenizer = GlmTokenizer(processor)
    if not vocabulary - MULTIPLE < tokenizer.vocabulary <= vocabulary:
        raise LoadError(
            f"{path}: this tokenizer has {tokenizer.vocabulary:,} tokens, but the encoder knows {vocabulary:,}: it "
            "belongs to another model"
        )
    return tokenizer
