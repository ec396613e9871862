"""Train the demo's masked-token generator: an unconditional UVit2DModel over the demo tokenizer's Fashion-MNIST tokens.

    python -m benchmarks.demo.train_tokens --minutes 12

MaskGIT's objective (Chang et al. 2022): of each picture's tokens a share `cos(pi u / 2)`, u uniform, is masked, and the
model predicts them by cross entropy. Progress, and with it the learning rate, is the larger of steps done and time
spent computing, so that `--minutes` ends a run with a properly decayed learning rate on a slow machine. Stops and
resumes from the folder `--work`; `--pause` ends a part of the run after so many minutes of its own.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from diffusers.models.attention_processor import AttnProcessor

from .data import fashion_mnist

OUT = Path(__file__).parents[2] / "samplers" / "demo_tokens"
CONDITION = 8  # width of the conditioning, which is zero everywhere


def build_transformer(codes: int, side: int) -> UVit2DModel:
    """The generator of `side` x `side` tokens out of `codes`, the mask token besides."""
    return UVit2DModel(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        in_channels=128,
        block_out_channels=128,
        block_num_heads=4,
        num_res_blocks=1,
        cond_embed_dim=CONDITION,
        micro_cond_encode_dim=CONDITION,
        micro_cond_embed_dim=CONDITION,
        encoder_hidden_size=CONDITION,
        vocab_size=codes + 1,
        codebook_size=codes,
        sample_size=side,
    )


def condition(batch: int) -> dict[str, torch.Tensor]:
    """What an unconditional model is told."""
    return dict(
        encoder_hidden_states=torch.zeros(batch, 1, CONDITION),
        pooled_text_emb=torch.zeros(batch, CONDITION),
        micro_conds=torch.zeros(batch, 1),
    )


@torch.no_grad()
def tokens_of(vqvae: VQModel, images: torch.Tensor) -> torch.Tensor:
    """Tokens `(N, h, w)` of pictures `(N, 1, 32, 32)` in [0, 1]."""
    found = []
    for part in images.split(500):
        latents = vqvae.encode(part).latents
        ids = vqvae.quantize(latents)[2][2]
        found.append(ids.view(len(part), *latents.shape[2:]).short())
    return torch.cat(found)


def masked(tokens: torch.Tensor, mask_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(B, h, w)` of which a random share is masked, and which are: `(B, h, w)`, at least one of each."""
    batch, count = len(tokens), tokens[0].numel()
    u = (torch.randperm(batch) + torch.rand(batch)) / batch  # one draw per stratum
    number = (torch.cos(u * math.pi / 2) * count).ceil().clamp(1, count)
    hidden = torch.rand(batch, count).argsort(1).argsort(1) < number[:, None]
    hidden = hidden.view_as(tokens)
    return torch.where(hidden, mask_token, tokens), hidden


def learning_rate(progress: float, peak: float) -> float:
    """Short warm-up, constant, then a cosine over the second half."""
    if progress < 0.05:
        return peak * progress / 0.05
    return peak * 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.5) / 0.5)))


@torch.no_grad()
def held_out(model: UVit2DModel, tokens: torch.Tensor, mask_token: int) -> float:
    """Cross entropy in nats per masked token, of pictures that were not trained on, masks drawn by a fixed seed."""
    total, count = 0.0, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in tokens.split(256):
            seen, hidden = masked(part, mask_token)
            logits = model(seen, **condition(len(part)))
            total += F.cross_entropy(logits.float(), part, reduction="none")[hidden].sum().item()
            count += hidden.sum().item()
    return total / count


def train(
    steps: int, minutes: float, pause: float, batch: int, peak: float, seed: int, vqvae: Path, work: Path, out: Path
) -> None:
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256((vqvae / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:12]
    tokenizer = VQModel.from_pretrained(vqvae, low_cpu_mem_usage=False).eval()
    cache = work / f"tokens-{weights}.pt"
    if not cache.exists():
        torch.save({split: tokens_of(tokenizer, fashion_mnist(split)[0]) for split in ("train", "test")}, cache)
    tokens = torch.load(cache, weights_only=True)
    codes, side = tokenizer.config.num_vq_embeddings, tokens["train"].shape[-1]
    model = build_transformer(codes, side)
    model.set_attn_processor(AttnProcessor())  # on a CPU twice as fast as the fused one, backwards
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.96), weight_decay=0.03)
    step, spent = 0, 0.0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    torch.manual_seed(seed + step)

    begun = time.process_time()
    start, mean_loss, progress = begun - spent, None, 0.0
    while progress < 1:
        if time.process_time() - begun > pause * 60:
            _checkpoint(work, model, average, optimizer, step, time.process_time() - start)
            print(f"{step} paused after {(time.process_time() - start) / 60:.1f} min; start again to go on")
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        chosen = tokens["train"][torch.randint(len(tokens["train"]), (batch,))].long()
        seen, hidden = masked(chosen, codes)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(seen, **condition(batch))
        loss = F.cross_entropy(logits.float().movedim(1, -1)[hidden], chosen[hidden], label_smoothing=0.05)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        for slow, fast in zip(average.parameters(), model.parameters()):
            slow.lerp_(fast.detach(), 1 - decay)
        progress = max(step / steps, (time.process_time() - start) / (minutes * 60))
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        if step % 100 == 0:
            print(f"{step} loss {mean_loss:.4f} {(time.process_time() - start) / 60:.1f} min", flush=True)
        if step % 500 == 0:
            _checkpoint(work, model, average, optimizer, step, time.process_time() - start)
    _checkpoint(work, model, average, optimizer, step, time.process_time() - start)
    facts = dict(
        steps=step,
        batch=batch,
        learning_rate=peak,
        seed=seed,
        minutes=round((time.process_time() - start) / 60),
        training_loss=mean_loss,
        held_out_nats=held_out(average.eval(), tokens["test"][:2000].long(), codes),
        parameters=sum(p.numel() for p in model.parameters()),
        tokenizer=weights,
    )
    average.half().save_pretrained(out / "transformer", safe_serialization=True)
    for file in (out / "transformer").glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600, which a wheel would carry
    AmusedScheduler(mask_token_id=codes, masking_schedule="cosine").save_pretrained(out / "scheduler")
    (out / "transformer_training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


def _checkpoint(work, model, average, optimizer, step, spent) -> None:
    state = dict(
        model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(), step=step, spent=spent
    )
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").replace(work / "state.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--pause", type=float, default=math.inf)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peak", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vqvae", type=Path, default=OUT / "vqvae")
    parser.add_argument("--work", type=Path, default=Path(".train/tokens"))
    parser.add_argument("--out", type=Path, default=OUT)
    train(**vars(parser.parse_args()))
