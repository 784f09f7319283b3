"""The code of a model card: a program of its own that prepares videos as the run did, and classifies them.

It needs numpy, Pillow, torch (PyAV for video files) and transformers or onnxruntime, not this package.
"""

from __future__ import annotations

from collections.abc import Sequence

from vac_ddp.data.scan import IMAGE_SUFFIXES
from vac_ddp.settings import ClipSettings, PredictSettings, ViewSettings

_HUGGING_FACE = """\
model = AutoModelForVideoClassification.from_pretrained(folder).eval()
classes = [model.config.id2label[number] for number in range(model.config.num_labels)]


def logits_of(clips):
    with torch.no_grad():
        return model({argument}=torch.from_numpy(clips)).logits.flatten(1).double().numpy()
"""

_ONNX = """\
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
classes = json.loads(Path(folder, "classes.json").read_text())


def logits_of(clips):
    return session.run(None, {"clips": clips})[0].astype(np.float64)
"""

_FRAMES = """\
def frames_of(video):
    \"\"\"Yield the frames of a video file, or of a folder of images, as upright PIL images.\"\"\"
    if Path(video).is_dir():
        images = [path for path in Path(video).iterdir() if path.suffix.lower() in {suffixes}]
        for path in sorted(images, key=lambda path: (len(path.name), path.name)):
            yield ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    else:
        import av

        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            aspect = float(stream.sample_aspect_ratio or 1)  # of a pixel
            for frame in container.decode(stream):
                image = frame.to_image(width=round(frame.width * aspect), height=frame.height, interpolation="BICUBIC")
                yield image.rotate(frame.rotation, expand=True)
"""

_PREPARE = """\
def prepare(image):
    \"\"\"Crop, resize and normalize a frame: ({crops}, 3, {size}, {size}) float32.\"\"\"
    side = max(1, round(min(image.size) * {size} / {short}))
    made = []
    for along in {places}:
        x, y = (along, 0.5) if image.width >= image.height else (0.5, along)
        left, top = round((image.width - side) * x), round((image.height - side) * y)
        square = image.crop((left, top, left + side, top + side)).resize(({size}, {size}), Image.Resampling.BILINEAR)
        made.append((np.asarray(square, np.float32) / 255 - MEAN) / STD)
    return np.stack(made).transpose(0, 3, 1, 2)
"""

_CLASSIFY = """\
def classify(video, top=5):
    \"\"\"The most probable classes of a video file or a folder of images: (class, probability).\"\"\"
    numbers = clips_of(sum(1 for _ in frames_of(video)))
    wanted = set(numbers.flat)
    frames = {{number: prepare(image) for number, image in enumerate(frames_of(video)) if number in wanted}}
    views = [np.stack([frames[number][crop] for number in clip]) for clip in numbers for crop in range({crops})]
{mirror}    logits = np.concatenate([logits_of(view[None]) for view in views])
{average}
    return [(classes[number], float(probabilities[number])) for number in np.argsort(-probabilities)[:top]]


for video in sys.argv[1:]:
    for name, probability in classify(video):
        print(f"{{video}}  {{probability:.3f}}  {{name}}")"""

_SOFTMAX = "np.exp({0} - {0}.max(-1, keepdims=True))"


def card_code(
    clip: ClipSettings,
    predict: PredictSettings,
    normalization: tuple[Sequence[float], Sequence[float]],
    *,
    argument: str | None,
    repo: str | None = None,
) -> str:
    """The program, for the Hugging Face model whose forward pass takes clips as `argument`, or for model.onnx (None).

    normalization: mean and std, of pixels divided by 255. repo: the hub's id that the model is loaded from; default:
    the folder of the card.
    """
    modules = ["json", "sys"] if argument is None else ["sys"]
    packages = ["import numpy as np"]
    packages += ["import onnxruntime"] if argument is None else ["import torch"]
    packages += ["from huggingface_hub import snapshot_download"] if repo else []
    packages += ["from PIL import Image, ImageOps"]
    packages += ["from transformers import AutoModelForVideoClassification"] if argument else []
    mean, std = (f"np.float32([{', '.join(f'{float(value):.10g}' for value in values)}])" for values in normalization)
    where = f'snapshot_download("{repo}")' if repo else '"."  # the folder of this card'
    short, crops = clip.short_side or clip.size, predict.views.crops
    places = "(0.5,)" if crops == 1 else "(0, 0.5, 1)"
    mirror = "    views += [view[..., ::-1].copy() for view in views]\n" if predict.views.flip else ""
    model = _ONNX if argument is None else _HUGGING_FACE.format(argument=argument)
    parts = [
        "\n".join(f"import {name}" for name in modules) + "\nfrom pathlib import Path\n\n" + "\n".join(packages),
        f"folder = {where}\nMEAN, STD = {mean}, {std}\n{model}",
        _FRAMES.format(suffixes=IMAGE_SUFFIXES),
        _frame_numbers(clip, predict.views),
        _PREPARE.format(size=clip.size, short=short, places=places, crops=crops),
        _CLASSIFY.format(mirror=mirror, crops=crops, average=_average(predict.average)),
    ]
    return parts[0] + "\n\n" + "\n\n".join(parts[1:])


def _frame_numbers(clip: ClipSettings, views: ViewSettings) -> str:
    """The function that chooses frames, as `data.clip_sampling.view_windows` does."""
    count, frames, stride = views.count, clip.frames, clip.stride
    if views.windows == "offsets" or (clip.sampling == "dense" and views.windows == "spread"):
        span = (frames - 1) * stride + 1
        if views.windows == "offsets":
            starts = f"    starts = {list(views.offsets)}"
        elif count == 1:
            starts = f"    starts = [max(0, n - {span}) // 2]"
        else:
            starts = f"    starts = [round(max(0, n - {span}) * i / {count - 1}) for i in range({count})]"
        body = [starts, f"    positions = np.array(starts)[:, None] + {stride} * np.arange({frames})"]
        body += ["    return " + ("positions % n" if clip.short == "repeat" else "np.minimum(positions, n - 1)")]
    elif views.windows == "official_phases":
        body = [f"    phases = np.arange({count})[:, None]"]
        body += [f"    return n * ({count} * np.arange({frames}) + phases) // {count * frames}"]
    else:
        body = [
            f"    edges = np.arange({frames + 1}) * n // {frames}",
            f"    phases = (np.arange({count})[:, None] + 0.5) / {count}",
            "    return edges[:-1] + (phases * np.diff(edges)).astype(int)",
        ]
    head = [
        "def clips_of(n):",
        f'    """Choose the frames of {{}} of {frames} of a video of n frames: (clips, {frames})."""',
    ]
    clips = len(views.offsets) if views.windows == "offsets" else count
    head[1] = head[1].format("one clip" if clips == 1 else f"{clips} clips")
    return "\n".join([*head, *body]) + "\n"


def _average(method: str) -> str:
    """The lines from logits (views, K) to probabilities (K,)."""
    if method == "mean-logits":
        powers = _SOFTMAX.format("logits")
        return f"    logits = logits.mean(0)\n    powers = {powers}\n    probabilities = powers / powers.sum()"
    powers = _SOFTMAX.format("logits")
    return f"    powers = {powers}\n    probabilities = (powers / powers.sum(-1, keepdims=True)).mean(0)"
