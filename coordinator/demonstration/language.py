"""What differs where the demonstration tunes language models: texts without labels, small decoders of one tokenizer, and what they write."""

from __future__ import annotations

import sys
from pathlib import Path

from coordinator.demonstration.data import DataError, Dataset, Row
from coordinator.demonstration.errors import DemoError
from coordinator.demonstration.fleet import (
    DemoDevice,
    PreparedBackbone,
    Say,
    preparation_digest,
    prepare_once,
)
from coordinator.demonstration.observation import Observation
from coordinator.demonstration.processes import Child
from coordinator.demonstration.small_models import STORIES, TOKENIZER, make_models
from coordinator.demonstration.small_models import cache_folder as models_folder
from coordinator.demonstration.text_rows import read_texts
from side_tuning.backbone_manifest import Weights

# Dealt to the devices in turn: the model that stories260K is, and the small ones made here.
BACKBONES: tuple[tuple[str, Weights], ...] = (("stories260K", "int8"), ("llama-96x4", "int8"), ("opt-64x6", "int8"), ("llama-48x3", "float"))
CALIBRATION_TEXTS = 300
SAMPLE_TOKENS = 40


def load_texts(folder: Path | None) -> Dataset:
    """The rows of `folder`, without labels.

    Raises:
        DataError: no folder, or rows that cannot be used.

    """
    if folder is None:
        raise DataError("--task causal-lm needs texts: name a folder with --data, such as --data ../shared/data/shakespeare_roles")
    train, test = (tuple(Row(row.text, "", row.user) for row in read_texts(folder, split)) for split in ("train", "test"))
    return Dataset(folder.resolve().name, (), train, test)


def prepare_decoders(count: int, cache: Path, say: Say) -> list[PreparedBackbone]:
    """The first `count` of BACKBONES, made and prepared once, then taken from `cache`."""
    if not (TOKENIZER / "tokenizer.json").is_file():
        raise DemoError(f"--task causal-lm takes its first model and the tokenizer of all from {TOKENIZER}, which is not there")
    folder = cache / preparation_digest()
    folder.mkdir(parents=True, exist_ok=True)
    calibration = folder / "calibration.txt"
    texts = [" ".join(row.text.split()) for row in read_texts(STORIES, "train")[:CALIBRATION_TEXTS] if isinstance(row.text, str)]
    calibration.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return [_prepare(name, weights, folder, calibration, say) for name, weights in BACKBONES[:count]]


def _prepare(name: str, weights: Weights, cache: Path, calibration: Path, say: Say) -> PreparedBackbone:
    model = TOKENIZER if name == TOKENIZER.name else make_models(models_folder(), [name], say=say)[name]
    options = ["--model", str(model), "--weights", weights, "--calibrate", str(calibration)]
    return prepare_once(cache / f"{name}-{weights}", f"{name}, {weights}", options, say)


class Writer:
    """Lets one device go on with the same words under every checkpoint that it receives; one program at a time, never waited for."""

    def __init__(self, device: DemoDevice, prompt: str, folder: Path) -> None:
        self.device, self.prompt, self._folder = device, prompt, folder
        self._writing: tuple[int, Child] | None = None
        self._written = 0  # the newest checkpoint that it wrote with
        self.texts: dict[int, str] = {}  # by generation

    def look(self, seen: Observation) -> str | None:
        """Begin to write where there is a new checkpoint; what it has written since the last look, as one line."""
        said = self.collect()
        health = seen.devices[self.device.name].health if self.device.name in seen.devices else None
        if self._writing is None and health is not None and health.checkpoint > self._written:
            self._begin(health.checkpoint)
        return said

    def collect(self) -> str | None:
        if self._writing is None or self._writing[1].running:
            return None
        generation, child = self._writing
        self._writing = None
        text = " ".join([self.prompt, *child.log.read_text(encoding="utf-8", errors="replace").split()])
        self.texts[generation] = text
        return f"{self.device.name}, checkpoint {generation}: {text}"

    def end(self) -> None:
        if self._writing is not None:
            self._writing[1].end(1.0)

    def _begin(self, generation: int) -> None:
        self._written = generation
        program = [sys.executable, "-m", "edge_agent.cli", "generate", self.prompt, "--config", str(self.device.config_file)]
        child = Child("writing", [*program, "--max-new-tokens", str(SAMPLE_TOKENS), "--seed", "0"], self._folder / f"written-{generation}.txt")
        child.start()
        self._writing = (generation, child)
