"""`edge-agent infer`: labels (or numbers, where the task is regression) for a text or for a file's rows, with the score where the rows carry labels.

A language model's checkpoint is scored by language_command.py.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import typer

from edge_agent import exit_codes
from edge_agent.backbone import TextError, Texts
from edge_agent.checkpoint_store import current_checkpoint
from edge_agent.health import peak_rss_bytes
from edge_agent.inference import CheckpointError, Estimate, Predictor, open_predictor
from edge_agent.memory import return_memory_early
from edge_agent.sample_files import FileSource
from edge_agent.samples import Refusal, RowError, Sample, label_index, target_of
from edge_agent.settings import AgentSettings, ConfigError, FileSourceSettings
from side_tuning.tasks import METRICS, correlation

ROWS_AT_A_TIME = 64
REFUSALS_SHOWN = 10

Found = TypeVar("Found")


@dataclass
class Refusals:
    """Rows that could not be used: the first are told, all are counted."""

    refused: int = 0

    def refuse(self, detail: str) -> None:
        self.refused += 1
        if self.refused <= REFUSALS_SHOWN:
            typer.echo(f"refused: {detail}", err=True)
        elif self.refused == REFUSALS_SHOWN + 1:
            typer.echo("refused: more rows; they are counted", err=True)


@dataclass
class _Sums(Refusals):
    samples: int = 0
    labelled: int = 0
    correct: int = 0
    pairs: list[tuple[float, float]] = field(default_factory=list)  # of a regression: estimate and target
    predictions: list[dict[str, Any]] = field(default_factory=list)


def rows_of(source: FileSource, refusals: Refusals) -> Iterator[list[Sample]]:
    """The file's samples, some at a time; a file that cannot be read ends the program."""
    while not source.exhausted:
        rows = source.poll(ROWS_AT_A_TIME)
        for refusal in rows:
            if isinstance(refusal, Refusal):
                refusals.refuse(refusal.detail.removesuffix(" It is looked for again"))
                if refusal.reason in ("file missing", "file unreadable"):
                    raise typer.Exit(exit_codes.CRASH)
        yield [row for row in rows if isinstance(row, Sample)]


def of_each(compute: Callable[[Texts], Sequence[Found]], samples: Sequence[Sample], refusals: Refusals) -> list[Found | None]:
    """What `compute` finds for each sample's text, in order; None for one that the backbone's tokenizer makes nothing of."""
    found: list[Found | None] = [None] * len(samples)
    left = list(range(len(samples)))
    while left:
        try:
            for place, one in zip(left, compute([samples[i].text for i in left]), strict=True):
                found[place] = one
            break
        except TextError as error:
            refusals.refuse(f"{samples[left[error.index]].where}: the text {error.reason}")
            del left[error.index]
    return found


@contextmanager
def checkpoint_trouble_told() -> Iterator[None]:
    """A checkpoint that cannot be used ends the program with one message."""
    try:
        yield
    except CheckpointError as error:
        typer.echo(f"edge-agent: {error}", err=True)
        sys.stderr.flush()
        raise typer.Exit(exit_codes.CRASH) from error


def label_text(settings: AgentSettings, text: str | tuple[str, str], *, as_json: bool) -> None:
    predictor = _open(settings)
    try:
        [prediction] = predictor.predict([text])
    except TextError as error:
        typer.echo(f"edge-agent: the text {error.reason}", err=True)
        raise typer.Exit(exit_codes.USAGE) from error
    if as_json:
        typer.echo(json.dumps({**asdict(prediction), "checkpoint": predictor.generation}))
    else:
        said = f"{prediction.value:.4g}" if isinstance(prediction, Estimate) else f"{prediction.label}  {prediction.probability:.3f}"
        typer.echo(f"{said}  (checkpoint {predictor.generation})")


def label_file(settings: AgentSettings, path: Path, *, as_json: bool, with_predictions: bool) -> None:
    source = FileSource(_source_settings(settings, path), path.name, lambda _: False)
    with checkpoint_trouble_told():
        if current_checkpoint(settings.state_directory).manifest.plan.task == "causal-lm":
            from edge_agent.language_command import evaluate_file

            evaluate_file(settings, source, as_json=as_json)
            return
    predictor = _open(settings)
    sums = _Sums()
    for samples in rows_of(source, sums):
        _label(predictor, samples, sums, keep=with_predictions)
    metric = METRICS[predictor.task]
    report = {
        "samples": sums.samples,
        "labelled": sums.labelled,
        **_scored(predictor, sums),
        "metric": metric.name,
        "refused": sums.refused,
        "checkpoint": predictor.generation,
        "peak_rss_mb": round(peak_rss_bytes() / 2**20, 1),
    }
    if as_json:
        typer.echo(json.dumps({**report, "predictions": sums.predictions} if with_predictions else report))
        return
    for row in sums.predictions:
        typer.echo(f"{row['value']:.4g}  {row['text']}" if "value" in row else f"{row['label']}  {row['probability']:.3f}  {row['text']}")
    right = f"{sums.correct} of {sums.labelled} right: " if predictor.task == "classification" else ""
    score = f"{right}{metric.said(report['score'])}" if sums.labelled else "no row carries a label"
    typer.echo(f"{sums.samples} samples, {score}; {sums.refused} refused; checkpoint {predictor.generation}; peak memory {report['peak_rss_mb']} MB")


def _scored(predictor: Predictor, sums: _Sums) -> dict[str, Any]:
    """As the coordinator scores the same samples."""
    if predictor.task == "classification":
        return {"correct": sums.correct, "score": sums.correct / sums.labelled if sums.labelled else None}
    estimates, targets = [e for e, _ in sums.pairs], [t for _, t in sums.pairs]
    errors = [(e - t) ** 2 for e, t in sums.pairs]
    return {
        "mean_squared_error": math.fsum(errors) / len(errors) if errors else None,
        "score": correlation(estimates, targets) if sums.pairs else None,
    }


def _label(predictor: Predictor, samples: list[Sample], sums: _Sums, *, keep: bool) -> None:
    known: list[tuple[Sample, float | None]] = []
    for sample in samples:
        try:
            known.append((sample, target_of(sample.label) if predictor.task == "regression" else label_index(sample.label, predictor.labels)))
        except RowError as error:
            sums.refuse(f"{sample.where}: {error}")
    for (sample, expected), prediction in zip(known, of_each(predictor.predict, [sample for sample, _ in known], sums), strict=True):
        if prediction is None:
            continue
        sums.samples += 1
        sums.labelled += expected is not None
        if not isinstance(prediction, Estimate):
            sums.correct += expected == prediction.index
        elif expected is not None:
            sums.pairs.append((prediction.value, expected))
        if keep:
            text = sample.text if isinstance(sample.text, str) else " | ".join(sample.text)
            wanted = predictor.labels[int(expected)] if predictor.labels and expected is not None else expected
            sums.predictions.append({"id": sample.id, "text": text, "expected": wanted, **asdict(prediction)})


def _open(settings: AgentSettings) -> Predictor:
    return_memory_early()
    with checkpoint_trouble_told():
        return open_predictor(
            settings.backbone.folder, settings.state_directory, threads=settings.backbone.threads, batch_size=settings.backbone.batch_size,
        )


def _source_settings(settings: AgentSettings, path: Path) -> FileSourceSettings:
    """The file's own settings (column names, labels) if it is one of the sources, else plain ones."""
    for source in settings.sources:
        if isinstance(source, FileSourceSettings) and source.path.absolute() == path.absolute():
            return source.model_copy(update={"follow": False, "rate_per_second": None, "send_labels": True})
    try:
        return FileSourceSettings(kind="file", path=path)
    except ValueError as error:
        raise ConfigError(f"--file {path}: its name must end in .jsonl, .ndjson or .csv, or one of these with .gz") from error
