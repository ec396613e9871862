"""Tiny stock diffusers pipelines of random weights that make videos, and their parts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from models import tiny_stable_diffusion
from tiny import (
    MEAN,
    STD,
    TEXT,
    Tiny,
    list_in,
    noise,
    options,
    photos,
    randomised,
    t5,
    text_options,
    unmasked,
    word_tokenizer,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

VIDEOS: dict[str, Tiny] = {}
listed = functools.partial(list_in, VIDEOS, output="frames", kind="video")


def ltx_autoencoder() -> diffusers.AutoencoderKLLTXVideo:
    """4 times smaller in space, twice in time, and with a mean and a width of its latents to undo."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )
    vae.latents_mean.copy_(torch.tensor(MEAN))
    vae.latents_std.copy_(torch.tensor(STD))
    return vae


def wan_autoencoder() -> diffusers.AutoencoderKLWan:
    """4 times smaller in space, twice in time."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=list(MEAN),
        latents_std=list(STD),
        scale_factor_spatial=4,
        scale_factor_temporal=2,
    )
    return randomised(vae)


def cog_autoencoder() -> diffusers.AutoencoderKLCogVideoX:
    """Halves each side and the frames."""
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
    )
    return randomised(vae)


def mochi_autoencoder() -> diffusers.AutoencoderKLMochi:
    """8 times smaller in space, 6 times in time, which its pipeline takes for granted."""
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        add_attention_block=(False,) * 5,
    )
    return randomised(vae)


def hunyuan_autoencoder() -> diffusers.AutoencoderKLHunyuanVideo:
    """8 times smaller in space, 4 times in time."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return randomised(vae)


def svd_autoencoder() -> diffusers.AutoencoderKLTemporalDecoder:
    """Halves each side; it decodes pictures, and looks along time as it does."""
    return diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
    )


def ltx_transformer() -> diffusers.LTXVideoTransformer3DModel:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )


def wan_transformer(**values) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        **dict(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        )
        | values
    )


def cog_transformer() -> diffusers.CogVideoXTransformer3DModel:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        sample_frames=5,
        temporal_compression_ratio=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    return randomised(transformer)


def mochi_transformer() -> diffusers.MochiTransformer3DModel:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    return randomised(transformer)


def hunyuan_transformer() -> diffusers.HunyuanVideoTransformer3DModel:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    return randomised(transformer)


def svd_unet() -> diffusers.UNetSpatioTemporalConditionModel:
    """On latents and those of the first frame; told a rate, a motion and a noise."""
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
        num_frames=3,
    )
    return randomised(unet)


def clip_vision() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config)


def motion_adapter() -> diffusers.MotionAdapter:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    return randomised(adapter)


def clips(size: int = 32, frames: int = 5) -> Callable[[int, int], torch.Tensor]:
    """Videos in [0, 1] to start from: a photo that slides to the side."""
    return lambda batch, first=0: torch.stack([photos(size)(batch, first).roll(i, -1) for i in range(frames)], 1)


def ltx_parts() -> dict:
    return dict(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=ltx_autoencoder(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
        transformer=ltx_transformer(),
    )


@listed("ltx", text_options(32, num_frames=5, max_sequence_length=TEXT))
def ltx() -> DiffusionPipeline:
    return diffusers.LTXPipeline(**ltx_parts())


@listed("ltx-i2v", text_options(32, image=photos(32), num_frames=5, max_sequence_length=TEXT))
def ltx_i2v() -> DiffusionPipeline:
    """Its scheduler never sees the first frame, which stays as given."""
    return diffusers.LTXImageToVideoPipeline(**ltx_parts())


def wan_parts(**parts) -> dict:
    return (
        dict(
            tokenizer=word_tokenizer(),
            text_encoder=t5(),
            vae=wan_autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=wan_transformer(),
        )
        | parts
    )


@listed("wan", text_options(32, num_frames=5, max_sequence_length=TEXT))
def wan() -> DiffusionPipeline:
    return diffusers.WanPipeline(**wan_parts())


def first_frame(batch: int, first: int = 0) -> torch.Tensor:
    """One for all, for Wan encodes what it is given once for each generator."""
    return photos(32)(1)


@listed("wan-i2v", text_options(32, image=first_frame, num_frames=5, max_sequence_length=TEXT))
def wan_i2v() -> DiffusionPipeline:
    """The first frame is put into the latents before each call of the network and after the last, and has no noise."""
    return diffusers.WanImageToVideoPipeline(**wan_parts(), expand_timesteps=True)


@listed("wan-i2v-concat", text_options(32, image=first_frame, num_frames=5, max_sequence_length=TEXT))
def wan_i2v_concat() -> DiffusionPipeline:
    """The first frame stands beside the latents, and one network takes over from another."""
    beside = 2 + 4  # a mask of each frame of a latent one, and latents
    high, low = (wan_transformer(in_channels=4 + beside) for _ in range(2))
    parts = wan_parts(transformer=high, transformer_2=low)
    return diffusers.WanImageToVideoPipeline(**parts, boundary_ratio=0.875)


@listed("wan-v2v", text_options(32, video=clips(), strength=0.6, max_sequence_length=TEXT))
def wan_v2v() -> DiffusionPipeline:
    return diffusers.WanVideoToVideoPipeline(**wan_parts())


@listed("cogvideox", text_options(32, num_frames=5, max_sequence_length=TEXT))
def cogvideox() -> DiffusionPipeline:
    return diffusers.CogVideoXPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5(),
        vae=cog_autoencoder(),
        transformer=cog_transformer(),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
    )


@listed("mochi", text_options(32, num_frames=7, max_sequence_length=TEXT))
def mochi() -> DiffusionPipeline:
    """Its time runs from noise at 0 to videos at 1."""
    return diffusers.MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=mochi_autoencoder(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
        transformer=mochi_transformer(),
    )


@listed("animatediff", text_options(num_frames=3))
def animatediff() -> DiffusionPipeline:
    """Stable Diffusion with layers that look along time: an autoencoder of pictures decodes each frame."""
    parts = tiny_stable_diffusion().components
    kept = ("vae", "text_encoder", "tokenizer", "unet")
    return diffusers.AnimateDiffPipeline(
        **{name: parts[name] for name in kept},
        motion_adapter=motion_adapter(),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False),
    )


@listed(
    "hunyuan-video",
    text_options(
        32,
        prompt=None,
        prompt_embeds=noise(TEXT, 32),
        pooled_prompt_embeds=noise(16),
        prompt_attention_mask=unmasked,
        num_frames=5,
    ),
)
def hunyuan_video() -> DiffusionPipeline:
    """Told how strongly to guide."""
    return diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=hunyuan_transformer(),
        vae=hunyuan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )


@listed(
    "svd",
    options(image=photos(), height=16, width=16, num_frames=3, num_inference_steps=4, output_type="pt"),
)
def svd() -> DiffusionPipeline:
    """A picture comes alive; later frames are guided more strongly."""
    return diffusers.StableVideoDiffusionPipeline(
        vae=svd_autoencoder(),
        image_encoder=clip_vision(),
        unet=svd_unet(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            timestep_spacing="leading",
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=CLIPImageProcessor(),
    )
