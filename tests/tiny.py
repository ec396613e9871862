"""Parts of tiny diffusers pipelines: tokenizers of a handful of words, text encoders, autoencoders, networks of random
weights, what the pipelines are asked for, and how they are listed."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from torchvision.transforms.functional import to_pil_image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

WORDS = ("a", "b", "o", "t")
TEXT = 8  # tokens of a prompt
MEAN, STD = (0.1, -0.2, 0.3, -0.4), (1.5, 0.8, 1.2, 0.6)  # of latents whose autoencoder says so
Options = Callable[..., dict]  # of how many pictures, from which number on


@dataclass(frozen=True)
class Tiny:
    """A pipeline of random weights: how to build it, and how to ask it for `batch` pictures from number `first` on."""

    name: str
    build: Callable[[], DiffusionPipeline]
    options: Options
    output: str = "images"
    kind: str = "image"

    def result(self, output) -> torch.Tensor:
        """The pictures, videos or sounds of what the pipeline returned, as one tensor, channels before rows."""
        made = getattr(output, self.output)
        return made if isinstance(made, torch.Tensor) else torch.from_numpy(made).movedim(-1, 1)


def list_in(pipelines: dict[str, Tiny], name: str, options: Options, **about) -> Callable:
    """Lists a function that makes a pipeline; listed, it is seeded and leaves the caller's random numbers alone."""

    def enter(make: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
        @functools.wraps(make)
        def build() -> DiffusionPipeline:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                pipe = make()
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
            for one in (pipe, *vars(pipe).values()):
                if isinstance(one, DiffusionPipeline):
                    one.set_progress_bar_config(disable=True)
            return pipe

        pipelines[name] = Tiny(name, build, options, **about)
        return make

    return enter


def randomised(module: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """The same module, every parameter moved by a little noise, so that no layer stays at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def drawn(index: int, *shape: int) -> torch.Tensor:
    """Noise that belongs to picture `index`, whatever the batch it is in."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + index))


def prompts(batch: int, first: int = 0) -> list[str]:
    return [WORDS[i % len(WORDS)] for i in range(first, first + batch)]


def negatives(batch: int, first: int = 0) -> list[str]:
    return ["t"] * batch


def labels(batch: int, first: int = 0) -> list[int]:
    return list(range(first, first + batch))


def noise(*shape: int) -> Callable[[int, int], torch.Tensor]:
    """Noise of each picture, for embeddings and the like."""
    return lambda batch, first=0: torch.stack([drawn(i, *shape) for i in range(first, first + batch)])


def photos(size: int = 16, channels: int = 3) -> Callable[[int, int], torch.Tensor]:
    """Pictures in [0, 1] to start from: coarse noise, drawn large, each by itself, for rounding depends on a batch."""

    def one(index: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(drawn(index, 1, channels, 4, 4).sigmoid(), size=(size, size))

    return lambda batch, first=0: torch.cat([one(i) for i in range(first, first + batch)])


def masks(size: int = 16) -> Callable[[int, int], torch.Tensor]:
    """1 over the right half, which is to be painted."""

    def of(batch: int, first: int = 0) -> torch.Tensor:
        mask = torch.zeros(batch, 1, size, size)
        mask[..., size // 2 :] = 1
        return mask

    return of


def grids(size: int = 16) -> Callable[[int, int], list]:
    """A solved example of two pictures above a picture whose second is asked for."""

    def of(batch: int, first: int = 0) -> list:
        example, query = photos(size), photos(size)(batch, first)
        shown = [to_pil_image(picture) for picture in (*example(2, 100), *query)]
        return [[shown[:2], [picture, None]] for picture in shown[2:]]

    return of


def options(**values) -> Options:
    """Call arguments; a function among them says what it is for pictures `first` to `first + batch - 1`."""

    def of(batch: int, first: int = 0) -> dict:
        return {name: value(batch, first) if callable(value) else value for name, value in values.items()}

    return of


def text_options(size: int | None = 16, **values) -> Options:
    """Prompts, a square picture as a tensor, four steps, classifier-free guidance."""
    common = dict(prompt=prompts, num_inference_steps=4, guidance_scale=4.0, height=size, width=size, output_type="pt")
    return options(**{name: value for name, value in (common | values).items() if value is not None})


def told() -> dict:
    """Embeddings in place of prompts, for pipelines whose language models are too much to imitate."""
    return dict(
        prompt=None,
        prompt_embeds=noise(TEXT, 32),
        negative_prompt_embeds=lambda batch, first=0: torch.zeros(batch, TEXT, 32),
    )


def unmasked(batch: int, first: int = 0) -> torch.Tensor:
    return torch.ones(batch, TEXT, dtype=torch.long)


def one_by_one(tensors: Callable[[int, int], torch.Tensor]) -> Callable[[int, int], list[torch.Tensor]]:
    return lambda batch, first=0: list(tensors(batch, first))


def clip_tokenizer(length: int = TEXT) -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS), *WORDS[:2]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=length)


def clip_text(projected: bool = False, length: int = TEXT) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=8,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def word_tokenizer(length: int = TEXT) -> PreTrainedTokenizerFast:
    """Splits at spaces and ends with `</s>`, as T5's does."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", words["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def blocks(halvings: int = 1) -> dict:
    """Of an autoencoder that halves each side so many times."""
    return dict(
        block_out_channels=(8,) * (halvings + 1),
        down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
        latent_channels=4,
        sample_size=16,
        norm_num_groups=4,
    )


def autoencoder(channels: int = 3, halvings: int = 1, **values) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(in_channels=channels, out_channels=channels, **blocks(halvings), **values)


def flow_autoencoder(halvings: int = 1) -> diffusers.AutoencoderKL:
    """The shifted kind of SD3 and Flux, without quantising layers."""
    return autoencoder(
        halvings=halvings, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False
    )


def flux2_autoencoder() -> diffusers.AutoencoderKLFlux2:
    """It knows the mean and the width of each place of 2 x 2 latent pixels."""
    vae = diffusers.AutoencoderKLFlux2(**blocks())
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def vq_autoencoder(**values) -> diffusers.VQModel:
    """Its codes drawn from a normal law, for they start out too alike to tell pictures apart."""
    vae = diffusers.VQModel(**blocks() | dict(latent_channels=3, num_vq_embeddings=32) | values)
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae


def text_unet(channels: int = 4, **values) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        **dict(
            sample_size=8,
            in_channels=channels,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        )
        | values
    )


def controlnet(**values) -> diffusers.ControlNetModel:
    """Its last layers start at zero, so that all are moved."""
    return randomised(
        diffusers.ControlNetModel(
            **dict(
                in_channels=4,
                layers_per_block=1,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=4,
                conditioning_embedding_out_channels=(8, 8),
            )
            | values
        )
    )


def ip_adapter(unet: diffusers.UNet2DConditionModel, width: int = 16, tokens: int = 4) -> dict:
    """Random weights of an adapter that turns an embedding of `width` numbers into `tokens` tokens for the U-Net."""
    text = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(tokens * text, width),
        "proj.bias": torch.randn(tokens * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    keys = {}
    for i, name in enumerate(crossed):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for kind in "kv":
            keys[f"{2 * i + 1}.to_{kind}_ip.weight"] = torch.randn(inner, text) / text**0.5
    return {"image_proj": projection, "ip_adapter": keys}


# told sizes and crops (six numbers) and the pooled prompt, too
SDXL = dict(
    cross_attention_dim=32,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16,
)


def sdxl_unet() -> diffusers.UNet2DConditionModel:
    return randomised(text_unet(**SDXL), 0.2)


def simple_unet(**values) -> diffusers.UNet2DConditionModel:
    """The kind of Kandinsky and DeepFloyd: it scales and shifts by the time, and foretells the variance, too."""
    values = (
        dict(
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            encoder_hid_dim=32,
        )
        | values
    )
    return text_unet(**values)


def sd3_transformer() -> diffusers.SD3Transformer2DModel:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )


def flux_transformer(extra: int = 0) -> diffusers.FluxTransformer2DModel:
    """On packed latents, 2 x 2 x 4 channels, and `extra` channels of what it is shown beside."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16 + extra,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return randomised(transformer, 0.2)


def dit_transformer() -> diffusers.DiTTransformer2DModel:
    """Of 1000 classes; it foretells the variance, too."""
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        norm_num_groups=4,
    )


def pixart_transformer() -> diffusers.PixArtTransformer2DModel:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=32,
        use_additional_conditions=False,
    )


def sana_autoencoder() -> diffusers.AutoencoderDC:
    """4 times smaller, and the latents are no draw: it has no law of them."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )


def sana_transformer() -> diffusers.SanaTransformer2DModel:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
    )


def aura_transformer() -> diffusers.AuraFlowTransformer2DModel:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return randomised(transformer, 0.2)


def qwen_autoencoder() -> diffusers.AutoencoderKLQwenImage:
    """Halves each side of videos of one frame."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=list(MEAN),
        latents_std=list(STD),
    )
    return randomised(vae)


def qwen_transformer() -> diffusers.QwenImageTransformer2DModel:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return randomised(transformer, 0.2)


def z_transformer() -> diffusers.ZImageTransformer2DModel:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )


def flux2_transformer() -> diffusers.Flux2Transformer2DModel:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    return randomised(transformer)


def lumina_transformer() -> diffusers.Lumina2Transformer2DModel:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=32,
    )
    return randomised(transformer)


def cogview_transformer() -> diffusers.CogView4Transformer2DModel:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
    )
    return randomised(transformer)


def chroma_transformer() -> diffusers.ChromaTransformer2DModel:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return randomised(transformer)


def bria_transformer() -> diffusers.BriaTransformer2DModel:
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[2, 2, 4],
    )
    return randomised(transformer)


def hidream_transformer() -> diffusers.HiDreamImageTransformer2DModel:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(4, 4),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    return randomised(transformer)


def cascade_autoencoder() -> PaellaVQModel:
    """4 times smaller, its pictures in [0, 1] as they are; of latents that random networks leave a hundred times as
    wide as noise."""
    vae = randomised(PaellaVQModel(embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=8, scale_factor=0.003))
    torch.nn.init.constant_(vae.out_block[0].bias, 0.5)
    return vae


def cascade_unet() -> StableCascadeUNet:
    unet = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=2,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=16,
        effnet_in_channels=4,
        timestep_conditioning_type=("sca",),
    )
    return randomised(unet)


def audio_unet() -> diffusers.UNet2DConditionModel:
    """Told the prompt as a class is, and attending to itself alone."""
    unet = text_unet(
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
    )
    return randomised(unet, 0.2)


def vocoder() -> SpeechT5HifiGan:
    """Four samples of sound for each row of 16 mel bands."""
    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return randomised(SpeechT5HifiGan(config), 0.3)


def sound_autoencoder() -> diffusers.AutoencoderOobleck:
    """Stereo, four samples for each latent one."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=16,
    )


def sound_transformer() -> diffusers.StableAudioDiTModel:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    return randomised(transformer, 0.2)


def sound_projection() -> diffusers.StableAudioProjectionModel:
    """Of prompts and of where the sound begins and ends, in seconds."""
    return diffusers.StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=8, min_value=0, max_value=16)


def audio_unet_2() -> diffusers.AudioLDM2UNet2DConditionModel:
    """Attends to itself, to what a language model made of the prompt, and to the prompt."""
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        attention_head_dim=4,
    )
    return randomised(unet)
