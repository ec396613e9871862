"""Tiny stock diffusers pipelines of random weights, by name, and what to ask each of them for."""

from __future__ import annotations

import functools

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from models import tiny_stable_diffusion, tiny_unet, vp_scheduler
from pipelines_video import VIDEOS
from tiny import (
    SDXL,
    TEXT,
    Options,
    Tiny,
    audio_unet,
    audio_unet_2,
    aura_transformer,
    autoencoder,
    bria_transformer,
    cascade_autoencoder,
    cascade_unet,
    chroma_transformer,
    clip_text,
    clip_tokenizer,
    cogview_transformer,
    controlnet,
    dit_transformer,
    flow_autoencoder,
    flux2_autoencoder,
    flux2_transformer,
    flux_transformer,
    grids,
    hidream_transformer,
    ip_adapter,
    labels,
    list_in,
    lumina_transformer,
    masks,
    negatives,
    noise,
    one_by_one,
    options,
    photos,
    pixart_transformer,
    prompts,
    qwen_autoencoder,
    qwen_transformer,
    sana_autoencoder,
    sana_transformer,
    sd3_transformer,
    sdxl_unet,
    simple_unet,
    sound_autoencoder,
    sound_projection,
    sound_transformer,
    t5,
    text_options,
    text_unet,
    told,
    unmasked,
    vocoder,
    vq_autoencoder,
    word_tokenizer,
    z_transformer,
)

PIPELINES: dict[str, Tiny] = {}
listed = functools.partial(list_in, PIPELINES)


def count(batch: int, first: int = 0) -> int:
    return batch


@listed("ddpm", options(batch_size=count, num_inference_steps=5, output_type="pt"))
def ddpm() -> DiffusionPipeline:
    return diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler())


@listed("ddim", options(batch_size=count, num_inference_steps=5, eta=0.5, output_type="pt"))
def ddim() -> DiffusionPipeline:
    return diffusers.DDIMPipeline(tiny_unet(), vp_scheduler(clip_sample=True))


@listed("ldm", options(batch_size=count, num_inference_steps=5, output_type="np"))
def ldm() -> DiffusionPipeline:
    """It returns arrays, never tensors."""
    return diffusers.LDMPipeline(vq_autoencoder(), tiny_unet(), vp_scheduler(beta_schedule="scaled_linear"))


@listed("sd", text_options())
def sd() -> DiffusionPipeline:
    return tiny_stable_diffusion()


def sd_as(kind: type[DiffusionPipeline], **parts) -> DiffusionPipeline:
    """The parts of Stable Diffusion, some exchanged, in another of its pipelines."""
    return kind(**(tiny_stable_diffusion().components | parts), requires_safety_checker=False)


@listed("sd-img2img", text_options(None, image=photos(), strength=0.75))
def sd_img2img() -> DiffusionPipeline:
    return sd_as(diffusers.StableDiffusionImg2ImgPipeline)


@listed("sd-inpaint", text_options(image=photos(), mask_image=masks()))
def sd_inpaint() -> DiffusionPipeline:
    return sd_as(diffusers.StableDiffusionInpaintPipeline)


@listed("sd-inpaint-9", text_options(image=photos(), mask_image=masks()))
def sd_inpaint_9() -> DiffusionPipeline:
    """Its U-Net sees the mask and what is left of the picture, too."""
    return sd_as(diffusers.StableDiffusionInpaintPipeline, unet=text_unet(9))


@listed("sd-controlnet", text_options(image=photos()))
def sd_controlnet() -> DiffusionPipeline:
    return sd_as(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())


def shown(batch: int, first: int = 0) -> list[torch.Tensor]:
    """What the adapter is shown, the same beside every prompt: nothing, for the unguided half, and one embedding."""
    seen = noise(1, 16)(1)
    return [torch.cat([torch.zeros_like(seen), seen])]


@listed("sd-ip-adapter", text_options(ip_adapter_image_embeds=shown))
def sd_ip_adapter() -> DiffusionPipeline:
    pipe = tiny_stable_diffusion()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    return pipe


@listed("sd-upscale", text_options(None, image=photos(8)))
def sd_upscale() -> DiffusionPipeline:
    """Its U-Net sees the small picture, and is told how noisy that is."""
    return diffusers.StableDiffusionUpscalePipeline(
        vae=autoencoder(halvings=2, scaling_factor=0.08333),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(4 + 3, num_class_embeds=400),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=vp_scheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
    )


@listed("lcm", text_options())
def lcm() -> DiffusionPipeline:
    """Told how strongly to guide, it draws noise at each step."""
    unet, scheduler = text_unet(time_cond_proj_dim=16), diffusers.LCMScheduler(beta_schedule="scaled_linear")
    return sd_as(diffusers.LatentConsistencyModelPipeline, unet=unet, scheduler=scheduler)


def sdxl_parts() -> dict:
    return dict(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=sdxl_unet(),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
    )


@listed("sdxl", text_options())
def sdxl() -> DiffusionPipeline:
    return diffusers.StableDiffusionXLPipeline(**sdxl_parts(), add_watermarker=False)


@listed("sdxl-img2img", text_options(None, image=photos(), strength=0.75))
def sdxl_img2img() -> DiffusionPipeline:
    return diffusers.StableDiffusionXLImg2ImgPipeline(**sdxl_parts(), add_watermarker=False)


@listed("sdxl-inpaint", text_options(image=photos(), mask_image=masks()))
def sdxl_inpaint() -> DiffusionPipeline:
    return diffusers.StableDiffusionXLInpaintPipeline(**sdxl_parts(), add_watermarker=False)


@listed("sdxl-controlnet", text_options(image=photos()))
def sdxl_controlnet() -> DiffusionPipeline:
    parts = sdxl_parts() | dict(controlnet=controlnet(**SDXL))
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)


@listed("sdxl-turbo", text_options(num_inference_steps=2, guidance_scale=0.0))
def sdxl_turbo() -> DiffusionPipeline:
    """Two steps of a solver that draws noise, unguided."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    return diffusers.StableDiffusionXLPipeline(**(sdxl_parts() | dict(scheduler=scheduler)), add_watermarker=False)


def sd3_parts() -> dict:
    return dict(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_autoencoder(),
        text_encoder=clip_text(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=word_tokenizer(),
    )


@listed("sd3", text_options(max_sequence_length=TEXT))
def sd3() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(**sd3_parts())


@listed("sd3-img2img", text_options(image=photos(), strength=0.75, max_sequence_length=TEXT))
def sd3_img2img() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Img2ImgPipeline(**sd3_parts())


def flux_parts(extra: int = 0, text: int = TEXT) -> dict:
    """`extra` channels beside the latents, prompts of up to `text` tokens."""
    return dict(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flow_autoencoder(),
        text_encoder=clip_text(length=text),
        tokenizer=clip_tokenizer(text),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(text),
        transformer=flux_transformer(extra),
    )


@listed("flux", text_options(max_sequence_length=TEXT))
def flux() -> DiffusionPipeline:
    return diffusers.FluxPipeline(**flux_parts())


@listed("flux-cfg", text_options(max_sequence_length=TEXT, negative_prompt=negatives, true_cfg_scale=3.0))
def flux_cfg() -> DiffusionPipeline:
    """Guided away from a negative prompt, too, by a second call of the network."""
    return diffusers.FluxPipeline(**flux_parts())


@listed("flux-img2img", text_options(image=photos(), strength=0.75, max_sequence_length=TEXT))
def flux_img2img() -> DiffusionPipeline:
    return diffusers.FluxImg2ImgPipeline(**flux_parts())


FILLED = 16 + 16  # the packed latents of the picture around the hole, and the packed pixels of its mask


@listed("flux-fill", text_options(image=photos(), mask_image=masks(), max_sequence_length=TEXT))
def flux_fill() -> DiffusionPipeline:
    return diffusers.FluxFillPipeline(**flux_parts(FILLED))


@listed("flux-kontext", text_options(image=photos(), max_area=16 * 16, _auto_resize=False, max_sequence_length=TEXT))
def flux_kontext() -> DiffusionPipeline:
    return diffusers.FluxKontextPipeline(**flux_parts())


LONG = 128  # the layout is told in words that the tiny tokenizers spell out


def cloze_options(**values) -> Options:
    return text_options(None, prompt=None, task_prompt=prompts, content_prompt=prompts, image=grids(), **values)


@listed("visualcloze", cloze_options(max_sequence_length=LONG))
def visualcloze() -> DiffusionPipeline:
    return diffusers.VisualClozeGenerationPipeline(**flux_parts(FILLED, LONG), resolution=16)


@listed("visualcloze-upsampled", cloze_options(max_sequence_length=LONG, upsampling_height=32, upsampling_width=32))
def visualcloze_upsampled() -> DiffusionPipeline:
    """What it made, as eight-bit pictures, is enlarged by a second run of the same network."""
    return diffusers.VisualClozePipeline(**flux_parts(FILLED, LONG), resolution=16)


@listed("pixart", text_options(max_sequence_length=TEXT, clean_caption=False, use_resolution_binning=False))
def pixart() -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5(),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=pixart_transformer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


@listed("sana", text_options(32, use_resolution_binning=False, complex_human_instruction=[], max_sequence_length=TEXT))
def sana() -> DiffusionPipeline:
    return diffusers.SanaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5(),
        vae=sana_autoencoder(),
        transformer=sana_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@listed("dit", options(class_labels=labels, guidance_scale=4.0, num_inference_steps=4, output_type="pt"))
def dit() -> DiffusionPipeline:
    return diffusers.DiTPipeline(dit_transformer(), autoencoder(), vp_scheduler())


@listed("auraflow", text_options(max_sequence_length=TEXT))
def auraflow() -> DiffusionPipeline:
    return diffusers.AuraFlowPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5(),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=aura_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


@listed(
    "qwen-image",
    text_options(
        **told(),
        guidance_scale=None,
        true_cfg_scale=3.0,
        prompt_embeds_mask=unmasked,
        negative_prompt_embeds_mask=unmasked,
    ),
)
def qwen_image() -> DiffusionPipeline:
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=qwen_transformer(),
    )


@listed("z-image", text_options(**{name: value and one_by_one(value) for name, value in told().items()}))
def z_image() -> DiffusionPipeline:
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flow_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=z_transformer(),
    )


@listed("flux2", text_options(**told()))
def flux2() -> DiffusionPipeline:
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=flux2_transformer(),
    )


@listed(
    "lumina2",
    text_options(32, **told(), prompt_attention_mask=unmasked, negative_prompt_attention_mask=unmasked),
)
def lumina2() -> DiffusionPipeline:
    """Takes for granted that its autoencoder halves three times; its network is told how little noise there is."""
    return diffusers.Lumina2Pipeline(
        transformer=lumina_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=flow_autoencoder(3),
        text_encoder=None,
        tokenizer=None,
    )


@listed("cogview4", text_options(**told()))
def cogview4() -> DiffusionPipeline:
    return diffusers.CogView4Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        transformer=cogview_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


@listed("chroma", text_options(max_sequence_length=TEXT))
def chroma() -> DiffusionPipeline:
    return diffusers.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        vae=flow_autoencoder(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
        transformer=chroma_transformer(),
    )


@listed("bria", text_options(**told()))
def bria() -> DiffusionPipeline:
    """It sizes its latents by one halving more than its autoencoder has."""
    return diffusers.BriaPipeline(
        transformer=bria_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flow_autoencoder(),
        text_encoder=None,
        tokenizer=None,
    )


def by_layer(batch: int, first: int = 0) -> torch.Tensor:
    """What each of two layers of a language model makes of the prompts."""
    return noise(2, TEXT, 32)(batch, first).transpose(0, 1)


@listed(
    "hidream",
    text_options(
        prompt=None,
        prompt_embeds_t5=noise(TEXT, 32),
        prompt_embeds_llama3=by_layer,
        pooled_prompt_embeds=noise(16),
        negative_prompt_embeds_t5=lambda batch, first=0: torch.zeros(batch, TEXT, 32),
        negative_prompt_embeds_llama3=lambda batch, first=0: torch.zeros(2, batch, TEXT, 32),
        negative_pooled_prompt_embeds=lambda batch, first=0: torch.zeros(batch, 16),
    ),
)
def hidream() -> DiffusionPipeline:
    """A mixture of experts, told prompts in four ways."""
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        text_encoder_4=None,
        tokenizer_4=None,
        transformer=hidream_transformer(),
    )
    pipe.default_sample_size = 8  # it enlarges what is asked for to so many latent pixels
    return pipe


@listed("stable-cascade", text_options(None, image_embeddings=noise(4, 4, 4)))
def stable_cascade() -> DiffusionPipeline:
    """The decoder, told a small picture's embedding; its time runs from 1 to 0."""
    return diffusers.StableCascadeDecoderPipeline(
        decoder=cascade_unet(),
        tokenizer=clip_tokenizer(),
        text_encoder=clip_text(projected=True),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=cascade_autoencoder(),
        latent_dim_scale=2.0,
    )


@listed(
    "kandinsky22",
    options(
        image_embeds=noise(32),
        negative_image_embeds=lambda batch, first=0: torch.zeros(batch, 32),
        height=16,
        width=16,
        num_inference_steps=4,
        output_type="np",
    ),
)
def kandinsky22() -> DiffusionPipeline:
    """The decoder, told an image's embedding; only its arrays are in [0, 1]."""
    return diffusers.KandinskyV22Pipeline(
        unet=simple_unet(out_channels=8, encoder_hid_dim_type="image_proj", addition_embed_type="image"),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample_range=2.0
        ),
        movq=vq_autoencoder(block_out_channels=(32, 32), latent_channels=4, norm_type="spatial"),
    )


@listed("deepfloyd-if", text_options(**told(), output_type="np"))
def deepfloyd_if() -> DiffusionPipeline:
    """In pixels; only its arrays are in [0, 1]."""
    return diffusers.IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=simple_unet(
            channels=3,
            out_channels=6,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


AUDIO = dict(output="audios", kind="audio")


@listed("audioldm", text_options(None), **AUDIO)
def audioldm() -> DiffusionPipeline:
    """Latents of mel spectrograms, which a vocoder turns into sound; CLIP's text encoder does for CLAP's."""
    return diffusers.AudioLDMPipeline(
        vae=autoencoder(channels=1),
        text_encoder=clip_text(projected=True, length=16),
        tokenizer=clip_tokenizer(16),
        unet=audio_unet(),
        scheduler=vp_scheduler(beta_schedule="scaled_linear"),
        vocoder=vocoder(),
    )


@listed(
    "audioldm2",
    text_options(
        None,
        **told(),
        generated_prompt_embeds=noise(4, 16),
        negative_generated_prompt_embeds=lambda batch, first=0: torch.zeros(batch, 4, 16),
        attention_mask=unmasked,
        negative_attention_mask=unmasked,
    ),
    **AUDIO,
)
def audioldm2() -> DiffusionPipeline:
    """Its text encoders lend no more than their dtype."""
    return diffusers.AudioLDM2Pipeline(
        vae=autoencoder(channels=1),
        text_encoder=None,
        text_encoder_2=t5(),
        projection_model=None,
        language_model=t5(),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=audio_unet_2(),
        scheduler=vp_scheduler(beta_schedule="scaled_linear"),
        vocoder=vocoder(),
    )


@listed("stable-audio", text_options(None), **AUDIO)
def stable_audio() -> DiffusionPipeline:
    return diffusers.StableAudioPipeline(
        vae=sound_autoencoder(),
        text_encoder=t5(),
        projection_model=sound_projection(),
        tokenizer=word_tokenizer(),
        transformer=sound_transformer(),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
    )


PIPELINES |= VIDEOS
