"""What GenEval's rules look at: objects by transformers' Mask2Former, and their colours by CLIP.

The original runs mmdet's own training of Mask2Former Swin-S (COCO instances); transformers has the authors' training of
the same network.  Preprocessing and post-processing here are mmdet's, not those of transformers' image processor (which
squeezes pictures to 384x384 and cuts masks out at that size), so what is left of the difference is the weights.
"""

import json
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel

from flowbp.evaluators.geneval import CLASSES, COLOURS, THRESHOLD, Detection, Task, kept, mistakes
from flowbp.rewards.clip import ClipReward
from flowbp.rewards.preprocess import normalise
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.images import from_pil

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MULTIPLE = 32
"""Pictures are padded to multiples of it."""
MAX_DETECTIONS = 100
GREY = 0.6
"""What stands around an object whose colour is asked for."""
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


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
    """Instances of COCO's classes; `short` and `long` bound the sides of the pictures that the network sees."""

    def __init__(self, model: Mask2Former, short: int = 800, long: int = 1333) -> None:
        self.model, self.short, self.long = model, short, long

    @classmethod
    def load(cls, ref: str, device: torch.device | str = "cpu") -> "Detector":
        """Frozen float32 detector of a folder that `check_detector` lets pass."""
        model, found = Mask2Former.from_pretrained(
            hub.resolve(ref), dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{ref}: {len(missing)} weights are missing, the first is {missing[0]}; copy it again")
        return cls(model.to(device).eval().requires_grad_(False))

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> list[list[Detection]]:
        """Detections of pictures in [0, 1]."""
        size = (images.shape[-2], images.shape[-1])
        scale = min(self.short / min(size), self.long / max(size))
        inner = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
        # mmdet resizes pixels of one byte, without antialiasing
        pixels = interpolate(images, inner, mode="bilinear", align_corners=False).mul(255).round().div(255)
        pixels = pad(normalise(pixels, MEAN, STD), (0, -inner[1] % MULTIPLE, 0, -inner[0] % MULTIPLE))
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
    """score = p(class) times the mean probability inside the mask."""
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
    """Pictures and their tasks -> what is wrong with each."""

    def __init__(self, detector: Detector, clip: ClipReward) -> None:
        self.detector, self.clip = detector, clip
        self._classifiers: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], tasks: Sequence[Task]) -> list[list[str]]:
        """The mistakes of each picture (all of one size); none: it shows what it should."""
        images = from_pil(pictures).to(self.detector.model.device)
        found = zip(tasks, images, self.detector(images), strict=True)
        return [mistakes(task, kept(objects, task.tag), partial(self.colours, image)) for task, image, objects in found]

    @torch.no_grad()
    def colours(self, image: Float[Tensor, "3 h w"], objects: Sequence[Detection], name: str) -> list[str]:
        """The colour of each object, of those that GenEval knows, by its crop on grey."""
        features = []
        for one in objects:
            assert one.mask is not None
            left, top, right, bottom = map(round, one.box)
            alone = torch.where(torch.from_numpy(one.mask).to(image.device), image, GREY)
            features.append(self.clip.picture(alone[None, :, top:bottom, left:right]))
        best = (torch.cat(features) @ self._classifier(name).T).argmax(1)
        return [COLOURS[place] for place in best.tolist()]

    def _classifier(self, name: str) -> Float[Tensor, "colours d"]:
        if name not in self._classifiers:
            texts = [form.format(colour=colour, name=name) for colour in COLOURS for form in TEMPLATES]
            features = self.clip.text(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._classifiers[name] = normalize(features.mean(1), dim=-1)
        return self._classifiers[name]


def check_detector(ref: str) -> None:
    """Raises UserError unless `ref` is a Mask2Former of COCO's 80 classes of things."""
    config = json.loads((hub.resolve(ref) / "config.json").read_text(encoding="utf-8"))
    kind, number = config.get("model_type"), len(config.get("id2label", {}))
    if kind != "mask2former" or number != len(CLASSES):
        raise UserError(
            f"{ref}: GenEval needs a 'mask2former' of {len(CLASSES)} classes (COCO instances), this is a {kind!r} of "
            f"{number}; give the like of facebook/mask2former-swin-small-coco-instance"
        )
