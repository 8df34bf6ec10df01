"""Named shapes: of the published encoders and language models, and of the toy's.

The classes' defaults are DIFFA's, Whisper small and LLaDA-8B.
"""

from diffusion_lm import LMConfig
from encoder import EncoderConfig

# Whisper paper, table 1. English-only variants (.en) have the same shapes. Large is large-v2; turbo
# has large-v3's encoder and a smaller decoder.
ENCODER_SIZES = {
    "tiny": EncoderConfig(width=384, n_layers=4, n_heads=6, ffn=1536),
    "base": EncoderConfig(width=512, n_layers=6, n_heads=8, ffn=2048),
    "small": EncoderConfig(),
    "medium": EncoderConfig(width=1024, n_layers=24, n_heads=16, ffn=4096),
    "large-v2": EncoderConfig(width=1280, n_layers=32, n_heads=20, ffn=5120),
    "large-v3": EncoderConfig(n_mels=128, width=1280, n_layers=32, n_heads=20, ffn=5120),
    "toy": EncoderConfig(width=128, n_layers=3, n_heads=4, ffn=512, context=160),  # 3.2 s; toy/
}
ENCODER_SIZES |= {f"{size}.en": ENCODER_SIZES[size] for size in ("tiny", "base", "small", "medium")}
ENCODER_SIZES |= {"large": ENCODER_SIZES["large-v2"], "large-v3-turbo": ENCODER_SIZES["large-v3"]}

# fmt: off
LM_SIZES = {
    "llada-8b": LMConfig(),
    "llada-1.5": LMConfig(),
    "qwen3-0.6b": LMConfig(
        width=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, qk_norm=True, ffn=3072,
        vocab=151_936, max_length=40_960, rope_theta=1e6, norm_eps=1e-6, mask_id=151_669,
        end_id=151_643, tied=True, family="qwen3",
    ),
    # The toy's vocabulary and special ids come from its tokenizer (toy/pretrain_lm.py). Its rotary
    # base suits prompts of a hundred positions.
    "toy": LMConfig(
        width=128, n_layers=3, n_heads=4, ffn=352, vocab=0, max_length=256, rope_theta=1000.0,
        mask_id=-1, end_id=-1,
    ),
}
# fmt: on
