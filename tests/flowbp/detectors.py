"""A tiny random Mask2Former of COCO's classes that sees cats everywhere."""

from pathlib import Path

import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former import modeling_mask2former

from flowbp.evaluation.benchmarks.geneval import CLASSES


def tiny_mask2former() -> Mask2FormerForUniversalSegmentation:
    """transformers' own class."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    widths = dict.fromkeys(
        ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"), 32
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=len(CLASSES),
        **widths,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mask2former, "requires_backends", lambda *ignored: None)  # its loss wants scipy
        model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.bias[CLASSES.index("cat")] = 8
    return model


def saved_mask2former(folder: Path) -> str:
    """The same as a folder that `--score geneval=` can name."""
    tiny_mask2former().save_pretrained(folder)
    return str(folder)
