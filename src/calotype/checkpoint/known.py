"""What is not a part of a model that runs here, recognised by name: adapters, quantised files, and other strangers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from calotype.checkpoint.embeddings import T5_WIDTH, embedding_keys
from calotype.checkpoint.files import Shape
from calotype.checkpoint.layouts import Signature


@dataclass(frozen=True, kw_only=True)
class Known:
    """A part of a model that Calotype can name, but not run (yet).

    `family` is None for what several have, or none of ours; `incomplete` says what a half is without; `advice` what to
    do instead.
    """

    family: str | None
    variant: str
    part: str
    layout: str
    signature: Signature
    incomplete: str = ""
    advice: str = ""

    @property
    def title(self) -> str:
        """the unet of sdxl base"""
        return f"the {self.part} of {self.family} {self.variant}" if self.family else self.variant


KINDS = {
    "lora": "a LoRA",
    "controlnet": "a ControlNet",
    "ip_adapter": "an IP-Adapter",
    "t2i_adapter": "a T2I-Adapter",
    "motion_module": "an AnimateDiff motion module",
    "image_encoder": "CLIP's image encoder",
    "embedding": "a textual inversion embedding",
}


@dataclass(frozen=True)
class Attachment:
    """Something that goes with a model and is none itself. `family` is None where the file does not show it.

    `instead` says of what does not run here, though files of its kind and layout do, why, and what to give instead.
    """

    kind: str  # one of KINDS
    layout: str
    family: str | None
    instead: str = ""

    @property
    def title(self) -> str:
        """a LoRA (kohya) for sd1"""
        layout = "" if self.kind == "embedding" else f" ({self.layout})"
        return KINDS[self.kind] + layout + (f" for {self.family}" if self.family else "")


LORA = re.compile(
    r"(\.|_)lora(\.|_)(up|down|A|B|mid|magnitude_vector|linear_layer)(\.|$)"
    r"|_lora[12]?\.(up|down)\."
    r"|\.(hada_w\d|lokr_w\d|dora_scale)|^(lora|lycoris)_.*\.diff$"
)
MERGE = "merge the file into its model by what made it, and give that"


@dataclass(frozen=True)
class Unread:
    """A kind of adapter that is not read here, or something that one may have beside what is: how its keys end.

    `alone`: such keys make an adapter of a file, whatever else is in it; `advice` is what to do instead.
    """

    name: str
    keys: re.Pattern[str]
    alone: bool = True
    advice: str = MERGE

    def __str__(self) -> str:
        return f"{self.name}, which is not read here; {self.advice}"


UNREAD = (
    Unread("OFT or BOFT", re.compile(r"\.(oft|boft)_[A-Za-z]+(\.|$)")),
    Unread("GLoRA", re.compile(r"^(lora|lycoris)_\w+\.(a[12]|b[12]|bm)\.weight$|\.glora_[A-Za-z]+(\.|$)")),
    Unread("(IA)3", re.compile(r"\.on_input$|\.ia3_l(\.|$)")),
    Unread("VeRA", re.compile(r"\.vera_lambda_\w+(\.|$)")),
    Unread("AdaLoRA", re.compile(r"\.lora_E(\.|$)")),
    Unread("an adapter with whole weights", re.compile(r"\.set_weight$")),
    Unread(
        "a control LoRA, with norms and wider layers",
        re.compile(r"\.(query|key)_norm\.scale$|\.reshape_weight$"),
        alone=False,
    ),
    Unread("a change of biases", re.compile(r"\.(diff_b|b_norm)$|\.lora_B(\.[\w-]+)?\.bias$"), alone=False),
    Unread(
        "a change of norms",
        re.compile(r"\.w_norm$|norm(\d|(_added)?_[qk]|_out)?(\.(scale|weight))?\.diff$"),
        alone=False,
    ),
    Unread("a change of embeddings", re.compile(r"\.lora_embedding_[AB](\.|$)"), alone=False),
    Unread(
        "a LoRA with embeddings bundled",
        re.compile(r"^bundle_emb\."),
        advice="take them out into a file of their own, which goes beside the model",
    ),
)


def unread(keys: Iterable[str], *, alone: bool = False) -> tuple[Unread, list[str]] | None:
    """What a file has of an adapter that is not read here, and its keys; None where there is nothing of the kind.

    `alone` asks for what is an adapter without anything else.
    """
    kinds = (kind for kind in UNREAD if kind.alone or not alone)
    listed = ((kind, [key for key in keys if kind.keys.search(key)]) for kind in kinds)
    return next(((kind, found) for kind, found in listed if found), None)


def attachment(shapes: Mapping[str, Shape]) -> Attachment | None:
    """The attachment that these tensors are; None for what may be a model."""
    first = {key.split(".", 1)[0] for key in shapes}
    if first >= {"ip_adapter", "image_proj"}:  # some have LoRAs among theirs
        return Attachment("ip_adapter", "faceid" if _of_faces(shapes) else "original", _adapter_family(shapes))
    other = unread(shapes, alone=True)
    lora = next((key for key in shapes if LORA.search(key)), other[1][0] if other else None)
    if lora is not None:
        return Attachment("lora", _lora_spelling(shapes, lora), _lora_family(shapes))
    controlnet = _controlnet(shapes, first)
    if controlnet is not None:
        return controlnet
    if any(".kv_proj_ip_adapter." in key for key in shapes):
        return Attachment("ip_adapter", "original", "hunyuan_dit")
    if first & {"ip_adapter", "image_proj"}:
        return Attachment("ip_adapter", "original", _adapter_family(shapes))
    if "adapter" in first and any(key.startswith("adapter.body.") for key in shapes):
        return Attachment("t2i_adapter", "diffusers", None)
    if "body.0.in_conv.weight" in shapes or {"body.0.block1.weight", "conv_in.weight"} <= shapes.keys():
        return Attachment("t2i_adapter", "original", None)
    if first >= {"style_embedding", "transformer_layes"}:  # as it is spelt there
        return Attachment("t2i_adapter", "original, of style", None)
    motion = next((key for key in shapes if ".motion_modules." in key), None)
    if motion is not None:
        return Attachment("motion_module", "original", _motion_family(shapes))
    vectors = embedding_keys(shapes)
    if vectors is not None:
        # Vectors for CLIP ViT-L may be meant for any family that has it.
        family = "sdxl" if 1280 in vectors else "sd2" if 1024 in vectors else None
        if T5_WIDTH in vectors:
            family = "sd3" if 1280 in vectors else None
        return Attachment("embedding", "textual inversion", family)
    if "vision_model" in first and not any("text_model" in name or "embeddings" in name for name in first):
        return Attachment("image_encoder", "transformers", None)
    return None


WHOLE = "give the whole ControlNet"


def _controlnet(shapes: Mapping[str, Shape], first: set[str]) -> Attachment | None:
    """The ControlNet that these tensors are; `first` is how their keys begin."""
    if "lora_controlnet" in first:
        why = "its matrices are cut into two, to be added to the UNet's own"
        return Attachment("controlnet", "Control-LoRA", unet_family(shapes), f"{why}; {WHOLE}")
    if first >= {"controlnet_blocks", "double_blocks"} or first >= {"controlnet_blocks", "input_hint_block"}:
        mistoline = "controlnet_blocks.0.linear.weight" in shapes
        instead = "give one of InstantX, Shakker Labs, jasperai or alimama"
        return Attachment("controlnet", "MistoLine" if mistoline else "XLabs", "flux", instead)
    if "control_model" in first or "input_hint_block.0.weight" in shapes:
        if "difference" in first or "control_model.difference" in shapes:
            why = "its weights are to be added to the UNet's own"
            return Attachment("controlnet", "difference", unet_family(shapes), f"{why}; {WHOLE}")
        return Attachment("controlnet", "original", unet_family(shapes))
    if "controlnet_cond_embedding" in first:
        return Attachment("controlnet", "diffusers", unet_family(shapes))
    if {"before_proj", "after_proj_list"} <= first or first >= {"controlnet_blocks", "text_embedding_padding"}:
        return Attachment("controlnet", "original" if "before_proj" in first else "diffusers", "hunyuan_dit")
    if first >= {"controlnet_blocks", "pos_embed_input", "y_embedder"}:
        instead = "give its folder of diffusers' layout, or a file of that"
        return Attachment("controlnet", "original, Stability AI's", "sd3", instead)
    if "controlnet_blocks" in first:
        sd3 = "pos_embed_input" in first or "pos_embed" in first
        return Attachment("controlnet", "diffusers", "sd3" if sd3 else "flux")
    if any(name.startswith("lllite_") for name in first):
        return Attachment("controlnet", "lllite", "sdxl", WHOLE)
    return None


def quantised(keys: Iterable[str]) -> str | None:
    """The name of a quantised storage that is not read here; None for plain tensors."""
    marks = {
        "bitsandbytes": re.compile(r"\.(absmax|quant_map|quant_state\.bitsandbytes__\w+|SCB)$"),
        # Scales of whole weights were taken to them before.
        "ComfyUI in blocks (mxfp8, nvfp4, int8)": re.compile(r"\.(comfy_quant|weight_scale(_2)?|scale_weight)$"),
        "nunchaku (SVDQuant)": re.compile(r"\.(wscales|smooth_factor|qweight)$"),
        "torchao or GPTQ": re.compile(r"\.(qzeros|scales_and_zeros)$"),
    }
    for key in keys:
        for name, pattern in marks.items():
            if pattern.search(key):
                return name
    return None


def unet_family(shapes: Mapping[str, Shape]) -> str | None:
    """The family whose text the cross-attention of a UNet, or of something trained on one, takes."""
    joined = " ".join(key for key in shapes if "label_emb" in key or "add_embedding" in key)
    widths = {
        shape[1]
        for key, shape in shapes.items()
        if "attn2" in key and "to_k" in key and len(shape) == 2 and shape[0] >= 320
    }
    if joined or 2048 in widths:
        return "sdxl"
    return "sd1" if 768 in widths else "sd2" if 1024 in widths else None


def _motion_family(shapes: Mapping[str, Shape]) -> str:
    """SDXL's UNet has three levels, where that of Stable Diffusion 1.x has four."""
    return "sd1" if any("down_blocks.3.motion_modules." in key for key in shapes) else "sdxl"


def _of_faces(shapes: Mapping[str, Shape]) -> bool:
    """Whether an IP-Adapter takes what a network that tells faces apart says (FaceID), 512 numbers."""
    return shapes.get("image_proj.proj.0.weight", ())[1:] == (512,)


def _adapter_family(shapes: Mapping[str, Shape]) -> str | None:
    if shapes.get("image_proj.layers.0.0.to_out.weight", ())[:1] == (2048,):
        return "kolors"
    widths = {shape[1] for key, shape in shapes.items() if "to_k_ip" in key and len(shape) == 2}
    return "sdxl" if 2048 in widths else "sd1" if 768 in widths else "flux" if 4096 in widths else None


def _lora_spelling(shapes: Mapping[str, Shape], example: str) -> str:
    if re.match(r"lora_(unet|te|transformer)", example):
        return "kohya"
    if ".hada_w" in example or ".lokr_w" in example:
        return "lycoris"
    original = any(
        key.removeprefix("diffusion_model.").startswith(("double_blocks.", "single_blocks.")) for key in shapes
    )
    if original:
        return "bfl"
    return "diffusers" if re.search(r"(transformer|unet|text_encoder\w*|base_model)\.", example) else "peft"


def _lora_family(shapes: Mapping[str, Shape]) -> str | None:
    """The model that a LoRA was trained on, as far as names and input widths show it."""
    names = " ".join(key.replace(".", "_") for key in shapes)
    if "double_blocks" in names or "single_transformer_blocks" in names or "single_blocks" in names:
        return "flux"
    if "joint_blocks" in names or "attn_add_q_proj" in names:
        return "sd3"
    if "attn1_Wqkv" in names or "mlp_t5" in names or "extra_embedder" in names:
        return "hunyuan_dit"
    if "encoder_hid_proj" in names:
        return "kolors"
    inward = {
        shape[1]
        for key, shape in shapes.items()
        if "attn2" in key and re.search(r"to_k[._]lora[._](down|A)", key) and len(shape) >= 2
    }
    if "lora_te2_" in names or "text_encoder_2" in names or 2048 in inward:
        return "sdxl"
    return "sd1" if 768 in inward else "sd2" if 1024 in inward else None
