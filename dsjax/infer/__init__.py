"""Generation: prefill, absorbed decoding on the latent cache, sampling."""

from dsjax.infer.generate import generate, stream

__all__ = ["generate", "stream"]
