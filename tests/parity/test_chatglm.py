"""ChatGLM3 against diffusers: states of tokens and of padding, files in both layouts, and 500 tokenized prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from safetensors.torch import save_file
from test_tokenizers import PROMPTS, published
from tiny_chatglm import encoder
from tiny_glm import tokenizer_model
from torch import Tensor

from calotype.checkpoint.chatglm import CHATGLM, read_glm_tokenizer
from calotype.checkpoint.detect import detect
from calotype.checkpoint.layouts import Found
from calotype.checkpoint.sources import open_source
from calotype.checkpoint.writing import Planned, write
from calotype.text.chatglm import CHATGLM3_6B, ChatGlmEncoder, GlmStates

LENGTH = 20


def found(path: Path) -> Found[Any]:
    (group,) = open_source(path).groups
    detected = detect(group.weights, (CHATGLM,), (), group.settings)
    assert detected.rest == ()
    return detected.found[0]


def load(part: Found[Any]) -> ChatGlmEncoder:
    network, binding = part.bind(part.config())
    network.load_state_dict(binding.load(part.weights), assign=True)
    assert isinstance(network, ChatGlmEncoder)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def theirs() -> ChatGLMModel:
    return encoder()


@pytest.fixture(scope="module")
def saved(theirs: ChatGLMModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatglm")
    theirs.save_pretrained(folder)
    return folder


def padded(*paddings: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of LENGTH with so much padding on the left, as the tokenizer makes it."""
    rng = torch.Generator().manual_seed(len(paddings))
    ids = torch.randint(3, 290, (len(paddings), LENGTH), generator=rng)
    positions = torch.arange(LENGTH).repeat(len(paddings), 1)
    mask = torch.ones(len(paddings), LENGTH, dtype=torch.bool)
    for row, padding in enumerate(paddings):
        ids[row, :padding] = 0
        mask[row, :padding] = False
        positions[row] = (positions[row] - padding).clamp(min=0)
    return ids, positions, mask


@torch.no_grad()
def reference(model: ChatGLMModel, ids: Tensor, positions: Tensor, mask: Tensor) -> GlmStates:
    """What KolorsPipeline takes, with batch first."""
    made = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask.long(),
        output_hidden_states=True,
        use_cache=False,
        return_dict=True,
    )
    return GlmStates(made.hidden_states[-2].transpose(0, 1), made.hidden_states[-1][-1])


def assert_near(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert b.std() > 1, "states that hardly differ prove nothing"
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("paddings", [(0,), (0, 0), (1,), (7,), (LENGTH - 1,), (0, 3, LENGTH - 2, 11)])
def test_states_equal_diffusers(theirs: ChatGLMModel, saved: Path, paddings: tuple[int, ...]) -> None:
    inputs = padded(*paddings)
    ours, wanted = load(found(saved))(*inputs), reference(theirs, *inputs)
    assert_near(ours.penultimate, wanted.penultimate)
    assert_near(ours.pooled, wanted.pooled)


@pytest.mark.parametrize(
    "settings",
    [
        {"multi_query_group_num": 1},
        {"multi_query_group_num": 4},
        {"num_layers": 1},
        {"kv_channels": 32, "hidden_size": 40},
        {"kv_channels": 8, "num_attention_heads": 6},
    ],
)
def test_other_sizes_equal_diffusers(settings: dict[str, int], tmp_path: Path) -> None:
    model = encoder(**settings)
    model.save_pretrained(tmp_path)
    inputs = padded(0, 5)
    ours, wanted = load(found(tmp_path))(*inputs), reference(model, *inputs)
    if settings.get("num_layers") != 1:  # the input of the only layer is the embeddings
        assert_near(ours.penultimate, wanted.penultimate)
    assert_near(ours.pooled, wanted.pooled)


def test_the_original_layout_is_the_same_model(theirs: ChatGLMModel, saved: Path, tmp_path: Path) -> None:
    """THUDM's files: the same names behind `transformer.`, here with the config.json that lies beside them."""
    state = {f"transformer.{key}": value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    original, bare = found(tmp_path), found(saved)
    assert (original.title, bare.title) == ("chatglm/transformers", "chatglm/diffusers")
    assert original.config() == bare.config()
    inputs = padded(2, 9)
    for a, b in zip(load(original)(*inputs), load(bare)(*inputs), strict=True):
        assert torch.equal(a, b)


def test_diffusers_reads_what_is_written(theirs: ChatGLMModel, saved: Path, tmp_path: Path) -> None:
    """The end of the language model is not kept; diffusers says so, and Kolors' pipeline does not miss it."""
    part = found(saved)
    network = load(part)
    layout, (_, binding) = part.layout, part.bind(part.config())
    assert layout.settings is not None
    tensors = dict(binding.save(network.state_dict()))
    plan = [Planned(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
    write(tmp_path / "model.safetensors", plan, tensors.__getitem__, {"format": "pt"})
    ChatGLMConfig(**layout.settings(part.config())).save_pretrained(tmp_path)
    loaded: Any = ChatGLMModel.from_pretrained(tmp_path, output_loading_info=True)
    again, problems = loaded
    assert set(problems["missing_keys"]) == {
        "encoder.final_layernorm.weight",
        "output_layer.weight",
        "rotary_pos_emb.inv_freq",
    }
    assert not problems["unexpected_keys"]
    inputs = padded(0, 4)
    for a, b in zip(reference(again.float().eval(), *inputs), reference(theirs, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_full_size_has_the_shapes_that_diffusers_has(prefix: str) -> None:
    layout = CHATGLM.styled("original" if prefix else "diffusers")
    assert layout is not None
    assert layout.settings is not None
    _, binding = CHATGLM.bind(layout, CHATGLM3_6B)
    ends = ("encoder.final_layernorm.weight", "output_layer.weight", "rotary_pos_emb.inv_freq")
    made = dict(binding.manifest([prefix + end for end in ends]))
    model = ChatGLMModel(ChatGLMConfig(**layout.settings(CHATGLM3_6B)), device="meta")
    assert made == {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(made) == 28 * 7 + 4
    parameters = sum(math.prod(shape) for key, shape in made.items() if not key.endswith("inv_freq"))
    assert parameters == 6_243_584_000, "what ChatGLM3-6B has"


# The tokenizer


def assert_equal_tokens(folder: Path, vocabulary: int, prompts: tuple[str, ...] | list[str], length: int) -> None:
    mine = read_glm_tokenizer(folder, vocabulary)
    assert mine is not None
    theirs = ChatGLMTokenizer.from_pretrained(folder)
    wanted = theirs(list(prompts), padding="max_length", max_length=length, truncation=True)
    for row, prompt in enumerate(prompts):
        made = mine(prompt, length)
        assert made.ids.tolist() == [wanted["input_ids"][row]], prompt
        assert made.positions.tolist() == [wanted["position_ids"][row]], prompt
        assert made.mask.long().tolist() == [wanted["attention_mask"][row]], prompt
        assert made.mask.dtype == torch.bool


MARKS = (
    "[gMASK] sop [MASK]eop <|user|>",
    "<|system|>\n a <|assistant|>\nb<|observation|>",
    "<unk><s></s>",
    "▁ a▁b ▁▁",
    "<0x00><0x0A>\n\n",
    "一只狐狸，" * 100,
    "a " * 400,
)


@pytest.mark.parametrize("length", [256, 8])
def test_prompts_are_tokenized_as_diffusers_does(length: int) -> None:
    assert_equal_tokens(published("kolors", "tokenizer"), CHATGLM3_6B.vocabulary, [*PROMPTS, *MARKS], length)


def test_a_tiny_tokenizer_is_read_as_diffusers_does(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    assert_equal_tokens(tmp_path, 320, [*PROMPTS[:60], *MARKS], 64)


def test_the_published_tokenizer_is_known() -> None:
    tokenizer = read_glm_tokenizer(published("kolors", "tokenizer"))
    assert tokenizer is not None
    assert tokenizer.vocabulary == 64798
    assert tokenizer("a red fox", 6).ids.tolist() == [[0, 64790, 64792, 260, 2603, 25217]]
