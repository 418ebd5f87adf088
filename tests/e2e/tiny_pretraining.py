"""Masked autoencoding of the encoder of ``tiny_run.py``, for tests of what any run does.

It is compiled in a fraction of the time of rounds of prompts.
"""

from ml_collections import ConfigDict

from configs import common
from tests.e2e.tiny_run import get_config as segmentation


def get_config(path: str = "") -> ConfigDict:
    """Pre-training on 32-pixel crops of shapes, or of SA-1B tars at a path or URL."""
    promptable = segmentation()
    sources = ({"kind": "sa1b", "path": path},) if path else promptable.data.sources
    config = common.base_config("reconstruct")
    config.model = {
        "variant": "vit_ti",
        "image_size": (32, 32),
        "encoder": promptable.model.encoder,
    }
    config.autoencoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    config.data = {
        "sources": sources,
        "batch_size": 8,
        "crop_area_rates": (0.2, 1.0),
        "hflip_rate": 0.5,
        "num_workers": 0,
    }
    config.optimizer = {"warmup_steps": 2, "peak_learning_rate": 1e-3}
    config.train = promptable.train
    config.checkpoint = promptable.checkpoint
    config.evals = {
        "shapes": {"kind": "reconstruction", "sources": promptable.data.sources, "num_examples": 1}
    }
    return config
