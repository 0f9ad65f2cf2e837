"""Use ONNX files of export.py as models for predictions, with ONNX Runtime.

A model is one file, STEM.onnx, or one file per part, STEM.PART.onnx. The metadata of each file say
what it is:

    run         JSON with the keys of a run's config.json
    part        name of the part: network, encoder, …
    parts       JSON list of the names of all parts of the model
    weights     hash of the model's weights
    vocabulary  vocab.txt of BiomedCLIPSeg
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import sam_decoder
import swin_unetr3d
from engine.runs import check_run, newer, pick_device
from imaging import files
from recipes import FAMILIES

CPU = "CPUExecutionProvider"  # of ONNX Runtime
CUDA = "CUDAExecutionProvider"
DATA = ".data"  # added to the name of an ONNX file: its weights, if they are beside it

# --- files ----------------------------------------------------------------------------------------


def read_run(source: str) -> dict:
    """Return what the files of a model say about its run. source: one of them.

    Raises OSError or ValueError, one line, if one is missing or damaged, if export.py did not write
    it, or if they are of different exports.
    """
    path = Path(source)
    metadata = read_metadata(path)
    check_run(path, metadata["run"])

    paths = part_paths(path, metadata["parts"])
    if paths[metadata["part"]] != path:
        raise ValueError(f"{path}: is the {metadata['part']} of a model; rename it accordingly")
    for part, sibling in paths.items():
        if sibling == path:
            continue
        if not sibling.is_file():
            raise FileNotFoundError(
                f"{path}: needs {sibling.name}, which is not beside it; the parts of a model are "
                f"{', '.join(paths)}"
            )
        if read_metadata(sibling) != metadata | {"part": part}:
            raise ValueError(
                f"{path} and {sibling.name}: are not of the same export; export the model again"
            )
    return metadata["run"]


def first_file(source: str, run: dict) -> Path:
    """Return the file of a model's first part. source: one of its files. run: of `read_run`."""
    paths = part_paths(Path(source), model_class(run).PARTS)
    return next(iter(paths.values()))


def part_paths(path: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Return the file of each part of a model. path: one of them.

    Raises ValueError, one line, if its name does not say which of several parts it is.
    """
    if len(parts) == 1:
        return {parts[0]: path}
    for part in parts:
        ending = f".{part}.onnx"
        if path.name.endswith(ending):
            stem = path.name.removesuffix(ending)
            return {other: path.with_name(f"{stem}.{other}.onnx") for other in parts}
    endings = ", ".join(f"NAME.{part}.onnx" for part in parts)
    raise ValueError(f"{path}: the files of this model must be named {endings}; rename it")


def read_metadata(path: Path) -> dict:
    """Return run, part, parts, weights and vocabulary (None without one) of a file.

    Raises OSError or ValueError, one line, if it cannot be read or has no such metadata.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    session = open_session(path, [CPU], only_metadata=True)
    entries = session.get_modelmeta().custom_metadata_map
    if not {"run", "part", "parts"} <= entries.keys():
        raise ValueError(
            f"{path}: was not written by export.py, so its classes and preprocessing are unknown"
        )

    run = files.parse_json(entries["run"], path)
    parts = files.parse_json(entries["parts"], path)
    part = entries["part"]
    is_known = isinstance(run, dict) and "format" in run and str(run.get("model")) in FAMILIES
    if not is_known or parts != [*model_class(run).PARTS] or part not in parts:
        raise newer(path, "its metadata are unknown")
    metadata = {"run": run, "part": part, "parts": parts}
    return metadata | {key: entries.get(key) for key in ("weights", "vocabulary")}


# --- sessions -------------------------------------------------------------------------------------


def open_session(path: Path, providers: list, only_metadata: bool = False):
    """Return the ONNX Runtime session of a file. providers: what it runs on, the best first.

    Raises ValueError, one line, if onnxruntime is missing or if the file cannot be read.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"{path}: ONNX files need onnxruntime: pip install onnxruntime") from None

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised as exceptions as well
    if only_metadata:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its classes have no common base
        check_memory(error)
        data = path.with_name(path.name + DATA)
        if data.name in str(error) and not data.is_file():
            raise FileNotFoundError(
                f"{path}: needs {data.name}, which is not beside it; keep both files together"
            ) from None
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: ONNX Runtime cannot read it ({reason:.150}); get the whole file, or export "
            "the model again"
        ) from None


def check_memory(error: Exception) -> None:
    """Raise MemoryError if an error of ONNX Runtime means that memory ran out."""
    if re.search("bad_alloc|bad allocation|allocate memory|out of memory", str(error), re.I):
        raise MemoryError(str(error)) from None


def providers_for(device: str) -> list:
    """Return the providers of sessions for --device, the best first.

    Raises ValueError, one line, if ONNX Runtime does not run on the device.
    """
    import onnxruntime

    place = pick_device(device)
    if place.type == "cuda" and CUDA in onnxruntime.get_available_providers():
        return [(CUDA, {"device_id": place.index or 0}), CPU]
    if place.type == "cpu" or device == "auto":
        return [CPU]
    if place.type == "cuda":
        raise ValueError(
            f"--device {device}: this onnxruntime has no CUDA; install onnxruntime-gpu, or use "
            "--device cpu"
        )
    raise ValueError(f"--device {device}: ONNX files run on cpu or cuda")


class Session:
    """An open ONNX file that takes and returns tensors on the CPU."""

    def __init__(self, path: Path, providers: list):
        """Open a file. Raises ValueError, one line, as `open_session` does or without the GPU."""
        self.session = open_session(path, providers)
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.inputs = [node.name for node in self.session.get_inputs()]
        wants_gpu = len(providers) > 1
        if wants_gpu and self.session.get_providers() == [CPU]:
            raise ValueError("--device: ONNX Runtime could not start CUDA; use --device cpu")

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the outputs for inputs in their order. Raises MemoryError if memory runs out."""
        arrays = [tensor.numpy() for tensor in tensors]
        try:
            outputs = self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:
            check_memory(error)
            raise
        return [torch.from_numpy(output) for output in outputs]


# --- models ---------------------------------------------------------------------------------------


class OnnxModel(nn.Module):
    """A model that maps images, or images and texts, to logits; one network in one file.

    It has what recipes use of a PyTorch model: config, pre- and postprocessing, forward.
    """

    PARTS = ("network",)

    def __init__(self, kind: type[nn.Module], config, sessions: dict[str, Session]):
        """kind: class of the PyTorch model. sessions: of PARTS."""
        super().__init__()
        self.kind = kind
        self.config = config
        self.sessions = sessions
        # Tells recipes where tensors belong; with --device cuda, sessions copy them to the GPU.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Image (B,C,…), and tokens (B,T) if the model reads texts -> logits (B,K,…)."""
        (logits,) = self.sessions["network"](*inputs)
        return logits

    def preprocess(self, image) -> Tensor:
        """Preprocess an image or a volume as the PyTorch model does."""
        return self.kind.preprocess(self, image)

    def postprocess(self, logits: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return probabilities (K,*size) of logits (K,…), as the PyTorch model does."""
        return self.kind.postprocess(self, logits, size)


class OnnxCLIPSeg(OnnxModel):
    """CLIPSeg or BiomedCLIPSeg: two towers and a decoder."""

    PARTS = ("vision", "text", "decoder")

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image (B,3,S,S), tokens (B,T) -> logits (B,1,S,S)."""
        return self.decode(self.encode_image(image), self.encode_text(tokens))

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,L,1+H,W,C)."""
        (features,) = self.sessions["vision"](image)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) -> condition (B,embed_dim)."""
        (condition,) = self.sessions["text"](tokens)
        return condition

    def decode(self, features: Tensor, condition: Tensor) -> Tensor:
        """features and condition of the towers -> logits (B,1,S,S)."""
        (logits,) = self.sessions["decoder"](features, condition)
        return logits


class OnnxSAM(OnnxModel):
    """SAM: image encoder and mask decoder, for boxes and points."""

    PARTS = ("encoder", "decoder")

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,C,S/16,S/16)."""
        (features,) = self.sessions["encoder"](image)
        return features

    def decode(
        self,
        features: Tensor,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return masks (B,Q,1,S/4,S/4) and predicted IoU (B,Q,1), as `SAM.decode` does."""
        prompts = {"boxes": boxes, "points": points, "labels": labels}
        prompts = {name: x for name, x in prompts.items() if x is not None}
        sam_decoder.check_prompts(features, prompts, self.config.image_size)
        points, labels = as_points(boxes, points, labels)  # (B,Q,n,2), (B,Q,n)

        B, Q = labels.shape[:2]
        image_index = torch.arange(B).repeat_interleave(Q)  # (B*Q,)
        masks, iou = self.sessions["decoder"](
            features, image_index, points.flatten(0, 1), labels.flatten(0, 1)
        )
        return masks.unflatten(0, (B, Q)), iou.unflatten(0, (B, Q))


def as_points(
    boxes: Tensor | None, points: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return prompts of `SAM.decode` as points (B,Q,n,2) and labels (B,Q,n) of SAM's ONNX decoder.

    A box becomes two points, labelled 2 and 3. Without a box there is a point of label -1.
    """
    all_points = []
    all_labels = []
    if points is not None:
        all_points.append(points.float())
        all_labels.append(labels.long())

    if boxes is not None:
        corners = boxes.float().unflatten(2, (2, 2))  # (B,Q,2,2)
        all_points.append(corners)
        all_labels.append(torch.tensor([2, 3]).expand(corners.shape[:3]))
    else:
        padding = torch.zeros_like(points[:, :, :1]).float()  # (B,Q,1,2)
        all_points.append(padding)
        all_labels.append(torch.full(padding.shape[:3], -1))
    return torch.cat(all_points, 2), torch.cat(all_labels, 2)


class OnnxUniversal(OnnxModel):
    """A Universal Model. The file computes all classes; `forward` can select some of them."""

    def forward(self, volume: Tensor, classes: list[int] | None = None) -> Tensor:
        """volume (B,C,D,H,W) -> logits (B,k,D,H,W) of these classes, None for all."""
        logits = super().forward(volume)
        return logits if classes is None else logits[:, classes]


class OnnxTextSwinUNETR(OnnxModel):
    """A Swin UNETR that reads a text. The file contains the text of all organs."""

    def forward(self, volume: Tensor, text: None = None) -> tuple[Tensor, None]:
        """volume (B,C,D,H,W) -> logits (B,K,D,H,W), and None for the contrastive loss."""
        return super().forward(volume), None


MODELS = {  # class of the PyTorch model -> class here, OnnxModel for all others
    "CLIPSeg": OnnxCLIPSeg,
    "BiomedCLIPSeg": OnnxCLIPSeg,
    "SAM": OnnxSAM,
    "UniversalSwinUNETR": OnnxUniversal,
    "AttentionUniversal": OnnxUniversal,
    "TextSwinUNETR": OnnxTextSwinUNETR,
}


def model_class(run: dict) -> type[OnnxModel]:
    """Return the class for an export of a run."""
    return MODELS.get(str(run.get("class")), OnnxModel)


# --- loading --------------------------------------------------------------------------------------


def load(source: str, run: dict, device: str, overrides: dict) -> OnnxModel:
    """Return the model of ONNX files. source: one of them. run: of `read_run`.

    overrides: fields of its Config. Raises OSError or ValueError, one line, if it cannot be loaded,
    or if `overrides` has anything but a threshold, as the files hold all weights.
    """
    for name in overrides:
        if name != "threshold":
            raise ValueError(f"--{name}: an ONNX file holds all weights of its model; remove it")

    kind, config = kind_and_config(run, source)
    onnx_class = model_class(run)
    providers = providers_for(device)
    sessions = {}
    for part, path in part_paths(Path(source), onnx_class.PARTS).items():
        sessions[part] = Session(path, providers)
    model = onnx_class(kind, replace(config, **overrides), sessions)

    vocabulary = next(iter(sessions.values())).metadata.get("vocabulary")
    if vocabulary is not None:
        write_vocabulary(model, vocabulary)
    return model.eval()


def kind_and_config(run: dict, source: str) -> tuple[type[nn.Module], object]:
    """Return the class and the Config of the PyTorch model that a run describes.

    Raises ValueError, one line, if this version does not have them.
    """
    variants = FAMILIES[run["model"]].variants
    config_class = type(next(iter(variants.values())))
    module = sys.modules[config_class.__module__]
    kind = getattr(module, run.get("class", ""), None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise newer(Path(source), f"it has {run.get('class')!r:.50}")
    config = swin_unetr3d.run_config(run, kind.__name__, source, config_class)
    return kind, config_class(**config)


def write_vocabulary(model: OnnxModel, vocabulary: str) -> None:
    """Write a vocab.txt that exists as long as the model, and name it in the model's config."""
    model.folder = TemporaryDirectory()
    path = Path(model.folder.name) / "vocab.txt"
    path.write_text(vocabulary, encoding="utf-8")
    model.config = replace(model.config, vocabulary=str(path))
