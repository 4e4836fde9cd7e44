"""The inputs of GenEval's rules: objects found by transformers' Mask2Former, and their colors by CLIP.

The original runs mmdet's own training of Mask2Former Swin-S (COCO instances); transformers has the authors' training of
the same network.  Preprocessing and post-processing here are those of mmdet, not of transformers' image processor
(which squeezes images to 384x384 and computes masks at that size), so that only the weights differ.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel

from flowbp.evaluation.benchmarks.geneval import (
    CLASSES,
    COLORS,
    THRESHOLD,
    Detection,
    GenEvalTask,
    filter_detections,
    find_mistakes,
)
from flowbp.rewards.clip import ClipReward
from flowbp.rewards.loading import load_frozen
from flowbp.rewards.preprocess import normalize_channels
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.images import from_pil
from imgen_common.weights import read_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MULTIPLE = 32
"""Images are padded so that their sides are multiples of it."""
MAX_DETECTIONS = 100
GRAY = 0.6
"""Gray level around an object whose color is classified."""
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Mask2Former(Mask2FormerPreTrainedModel):
    """transformers' `Mask2FormerForUniversalSegmentation` without its training loss, which needs scipy."""

    _keys_to_ignore_on_load_unexpected = (r"^criterion\.",)

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(
        self, pixel_values: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b queries classes_and_none"], Float[Tensor, "b queries mh mw"]]:
        """Logits of classes and of masks."""
        output = self.model(pixel_values, output_hidden_states=True)
        queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), output.masks_queries_logits[-1]


class Detector:
    """Detects instances of COCO's classes; `short` and `long` bound the sides to which images are resized."""

    def __init__(self, model: Mask2Former, short: int = 800, long: int = 1333) -> None:
        self.model, self.short, self.long = model, short, long

    @classmethod
    def load(cls, ref: str, device: torch.device | str = "cpu") -> "Detector":
        """The frozen float32 detector of a folder that `check_detector` accepts."""
        return cls(load_frozen(Mask2Former, hub.resolve(ref), device, torch.float32))

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> list[list[Detection]]:
        """Detections in images in [0, 1]."""
        size = (images.shape[-2], images.shape[-1])
        scale = min(self.short / min(size), self.long / max(size))
        inner = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
        # mmdet resizes uint8 pixels without antialiasing
        pixels = interpolate(images, inner, mode="bilinear", align_corners=False).mul(255).round().div(255)
        pixels = pad(normalize_channels(pixels, MEAN, STD), (0, -inner[1] % MULTIPLE, 0, -inner[0] % MULTIPLE))
        padded = (pixels.shape[-2], pixels.shape[-1])
        pairs = zip(*self.model(pixels), strict=True)
        return [_instances(logits, masks, padded, inner, size) for logits, masks in pairs]


def _instances(
    logits: Float[Tensor, "queries classes_and_none"],
    masks: Float[Tensor, "queries mh mw"],
    padded: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
) -> list[Detection]:
    """Detections of one image; score = p(class) times the mean probability inside the mask."""
    sure = logits.softmax(-1)[:, :-1]
    scores, places = sure.flatten().topk(min(MAX_DETECTIONS, sure.numel()))
    places = places[scores > THRESHOLD]  # the mask can only lower a score
    if not len(places):
        return []
    scores, queries, names = scores[: len(places)], places // sure.shape[1], places % sure.shape[1]
    large = interpolate(masks[queries][None], padded, mode="bilinear", align_corners=False)[..., : inner[0], : inner[1]]
    probable = interpolate(large, size, mode="bilinear", align_corners=False)[0]
    inside = probable > 0
    scores = scores * (probable.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found = []
    for name, score, mask in zip(names.tolist(), scores.tolist(), inside.cpu(), strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            found.append(Detection(CLASSES[name], score, box, mask.numpy()))
    return found


class GenEval:
    """The whole benchmark: images and their tasks -> the mistakes in each image."""

    def __init__(self, detector: Detector, clip: ClipReward) -> None:
        self.detector, self.clip = detector, clip
        self._classifiers: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], tasks: Sequence[GenEvalTask]) -> list[list[str]]:
        """The mistakes in each image (all of one size); none if it shows what it should."""
        pixels = from_pil(images).to(self.detector.model.device)
        found = zip(tasks, pixels, self.detector(pixels), strict=True)
        return [
            find_mistakes(task, filter_detections(objects, task.tag), partial(self.classify_colors, image))
            for task, image, objects in found
        ]

    @torch.no_grad()
    def classify_colors(self, image: Float[Tensor, "3 h w"], objects: Sequence[Detection], name: str) -> list[str]:
        """The color of each object, one of GenEval's, by the object cut out on gray."""
        features = []
        for one in objects:
            assert one.mask is not None
            left, top, right, bottom = map(round, one.box)
            alone = torch.where(torch.from_numpy(one.mask).to(image.device), image, GRAY)
            features.append(self.clip.image_features(alone[None, :, top:bottom, left:right]))
        best = (torch.cat(features) @ self._classifier(name).T).argmax(1)
        return [COLORS[place] for place in best.tolist()]

    def _classifier(self, name: str) -> Float[Tensor, "colors d"]:
        if name not in self._classifiers:
            texts = [form.format(color=color, name=name) for color in COLORS for form in COLOR_PROMPTS]
            features = self.clip.text_features(texts).unflatten(0, (len(COLORS), len(COLOR_PROMPTS)))
            self._classifiers[name] = normalize(features.mean(1), dim=-1)
        return self._classifiers[name]


def check_detector(ref: str) -> None:
    """Raises UserError unless `ref` is a Mask2Former of COCO's 80 classes of things."""
    config = read_json(hub.resolve(ref) / "config.json")
    kind, number = config.get("model_type"), len(config.get("id2label", {}))
    if kind != "mask2former" or number != len(CLASSES):
        raise UserError(
            f"{ref}: GenEval needs a 'mask2former' of {len(CLASSES)} classes (COCO instances), this is a {kind!r} of "
            f"{number}; give a model like facebook/mask2former-swin-small-coco-instance"
        )
