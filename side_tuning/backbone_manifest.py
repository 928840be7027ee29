"""What a prepared backbone says about itself: `manifest.json`, its checks, and the fingerprint.

The fingerprint names everything that determines the activations: configuration, kept weights, quantization,
tokenizer and maps. It is computed from the files themselves, so an artifact cannot carry another's fingerprint.
No torch in here.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from side_tuning.wire.messages import BackboneInfo, TapPlan

FORMAT = 1
MANIFEST = "manifest.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
QUANTIZATION = "quantization.json"
TOKENIZER = "tokenizer.json"
MAPS = "maps.safetensors"
# All files that the fingerprint covers. A file that is not here cannot change an activation.
FINGERPRINTED = (CONFIG, MAPS, WEIGHTS, QUANTIZATION, TOKENIZER)

Weights = Literal["float", "int8", "int4"]
Kind = Literal["encoder", "decoder"]
_HASH = re.compile(r"[0-9a-f]{32}")


class BackboneError(ValueError):
    """A model or artifact that cannot be used; the text names the value and the cure."""


class TextError(ValueError):
    """One text of a batch that gives no activations; `index` is its place in the batch, `kind` a few words for counting."""

    def __init__(self, index: int, reason: str, kind: str = "no text") -> None:
        super().__init__(f"text {index} of the batch {reason}")
        self.index = index
        self.reason = reason
        self.kind = kind


@dataclass(frozen=True)
class BackboneManifest:
    """The facts of one artifact. `layers` are kept of `layers_total`; `maps` gives each layer's map by hash."""

    fingerprint: str
    source: str
    family: str
    kind: Kind
    layers: int
    layers_total: int
    width: int
    weights: Weights
    max_tokens: int
    vocabulary: int
    maps: dict[int, str]
    map_rank: int  # columns that every map has; a plan may use fewer
    last_rank: int = 0  # columns of the last layer's map, where a language model's head is among the weights; 0 without one
    created_with: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def info(self) -> BackboneInfo:
        """What a device reports of it."""
        return BackboneInfo(self.fingerprint, self.family, self.layers, self.width, self.weights)

    def refusal(self, plan: TapPlan) -> str | None:
        """Why a device with this backbone cannot carry out `plan`, and the cure; None if it can."""
        if plan.max_tokens > self.max_tokens:
            return (
                f"plan {plan.version} keeps {plan.max_tokens} tokens, but backbone {self.fingerprint} was prepared for "
                f"{self.max_tokens}: lower the plan's max_tokens, or prepare the backbone with --max-tokens {plan.max_tokens}"
            )
        if plan.mode == "sequence" and min(plan.rank, self.width) > self.map_rank:
            return (
                f"plan {plan.version} asks for rank {plan.rank}, but the maps of backbone {self.fingerprint} have "
                f"{self.map_rank} columns: lower the plan's rank to {self.map_rank} or less"
            )
        if plan.task == "causal-lm":
            if not self.last_rank:
                return (
                    f"plan {plan.version} tunes a language model, but backbone {self.fingerprint} has no language model's head: "
                    "prepare a decoder (OPT, GPT-2, Llama, Qwen2) with its head"
                )
            if plan.width_at(self.layers, self.layers, self.width) > self.last_rank:
                return (
                    f"plan {plan.version} asks for rank {max(plan.rank, plan.last_rank)} of the last layer, but its map in backbone "
                    f"{self.fingerprint} has {self.last_rank} columns: lower the plan's rank and last_rank to {self.last_rank} or less"
                )
        return None

    def to_json(self) -> str:
        body = asdict(self)
        body["maps"] = {str(layer): name for layer, name in sorted(self.maps.items())}
        return json.dumps(body, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "manifest") -> BackboneManifest:
        """Inverse of `to_json`; `where` names the file in complaints."""

        def wrong(what: str) -> BackboneError:
            return BackboneError(f"{where}: {what}; prepare the backbone again with `coordinator backbone prepare`")

        try:
            body = json.loads(text)
        except ValueError as error:
            raise wrong(f"not valid JSON ({error})") from error
        if not isinstance(body, dict):
            raise wrong("not a JSON object")
        if body.get("format") != FORMAT:
            raise wrong(f"format {body.get('format')!r} is unknown, this program reads format {FORMAT}")

        def value(name: str, kind: type, choices: tuple[str, ...] = (), lowest: int = 1) -> Any:
            found = body.get(name)
            if not isinstance(found, kind) or isinstance(found, bool) or (choices and found not in choices):
                raise wrong(f"field {name!r} is {found!r:.80}")
            if isinstance(found, int) and found < lowest:
                raise wrong(f"field {name!r} is {found}, not a number of at least {lowest}")
            return found

        maps = value("maps", dict)
        if not all(k.isdecimal() and isinstance(v, str) and _HASH.fullmatch(v) for k, v in maps.items()):
            raise wrong("field 'maps' is not a table of layer to hash")
        body = {"last_rank": 0, **body}
        manifest = cls(
            fingerprint=value("fingerprint", str),
            source=value("source", str),
            family=value("family", str),
            kind=value("kind", str, ("encoder", "decoder")),
            layers=value("layers", int),
            layers_total=value("layers_total", int),
            width=value("width", int),
            weights=value("weights", str, ("float", "int8", "int4")),
            max_tokens=value("max_tokens", int),
            vocabulary=value("vocabulary", int),
            maps={int(k): v for k, v in maps.items()},
            map_rank=value("map_rank", int),
            last_rank=value("last_rank", int, lowest=0),
            created_with={str(k): str(v) for k, v in value("created_with", dict).items()},
        )
        if not _HASH.fullmatch(manifest.fingerprint):
            raise wrong(f"fingerprint {manifest.fingerprint!r:.80} is not 32 hexadecimal digits")
        if set(manifest.maps) != set(range(1, manifest.layers + 1)):
            raise wrong(f"maps are there for layers {sorted(manifest.maps)}, not for 1 to {manifest.layers}")
        return manifest


def read_manifest(folder: Path | str) -> BackboneManifest:
    """The manifest of the artifact in `folder`; cheap, does not look at the weights."""
    path = Path(folder) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BackboneError(
            f"no backbone in {folder}: {MANIFEST} is missing; "
            f"prepare one with `coordinator backbone prepare --model NAME_OR_FOLDER --out {folder}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BackboneError(f"{path} cannot be read ({error}); prepare or copy the backbone again") from error
    return BackboneManifest.from_json(text, str(path))


def fingerprint_of(folder: Path | str) -> str:
    """Hash of the files that determine the activations: 32 hexadecimal digits."""
    whole = hashlib.sha256()
    for name in FINGERPRINTED:
        path = Path(folder) / name
        part = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    part.update(block)
        except FileNotFoundError:
            raise BackboneError(
                f"{path} is missing: the backbone was copied incompletely; copy or prepare it again"
            ) from None
        except OSError as error:
            raise BackboneError(f"{path} cannot be read ({error}); copy or prepare the backbone again") from error
        whole.update(f"{name}\0{part.hexdigest()}\n".encode())
    return whole.hexdigest()[:32]


def check_artifact(folder: Path | str) -> BackboneManifest:
    """The manifest, after proving that the files are the ones it was written for."""
    manifest = read_manifest(folder)
    found = fingerprint_of(folder)
    if found != manifest.fingerprint:
        raise BackboneError(
            f"the backbone in {folder} is damaged: its files hash to {found}, "
            f"its manifest says {manifest.fingerprint}; copy or prepare it again"
        )
    return manifest
