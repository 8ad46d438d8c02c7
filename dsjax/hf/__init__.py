"""Published checkpoints in and out."""

from dsjax.hf.chat import ChatTemplate
from dsjax.hf.load import from_pretrained, read_config, stored_dtype
from dsjax.hf.save import save_pretrained

__all__ = ["ChatTemplate", "from_pretrained", "read_config", "save_pretrained", "stored_dtype"]
